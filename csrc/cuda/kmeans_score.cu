// Scores on tensor cores by mma.sync, and each row's best; nothing [rows, clusters] is written.
#include "kmeans_rows.h"

namespace clustops::cuda {
namespace {

constexpr int kRows = 128;     // of a unit
constexpr int kThreads = 256;  // eight warps: four along the rows, two along the centroids of a tile
constexpr int kWarpRows = 32;
constexpr int kStages = 3;     // blocks of centroids in shared memory: one in use, two on their way

// Shared memory of a CTA, in bytes from its start.
struct Layout {
  int64_t stage, rows, squares, leaders, chosen, bytes;

  CLUSTOPS_HOST_DEVICE Layout(const Packed& packed, bool resident) {
    stage = packed.block_bytes() + packed.half_norm_bytes();
    rows = kStages * stage;
    squares = rows + (resident ? packed.chunks : 1) * packed.parts * kRows * kChunkBytes;
    leaders = squares + kRows * 3 * 4;
    chosen = leaders + 2 * kRows * static_cast<int64_t>(sizeof(Leader));
    bytes = chosen + kRows * 4;
  }
};

// One block of centroids on its way to shared memory.
__device__ void fetch(const unsigned char* from, unsigned char* to, int64_t bytes) {
  for (int64_t i = threadIdx.x * 16; i < bytes; i += kThreads * 16) copy_async(to + i, from + i);
}

// score += x c over one chunk: this warp's kWarpRows rows of `x` with its half of the kColumns centroids in `c`.
template <int kColumns>
__device__ void multiply_block(const unsigned char* x, const unsigned char* c, int depth_steps,
                               float (&score)[2][kColumns / 16][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = warp % 4 * kWarpRows + lane % 16;
  const int column0 = warp / 4 * (kColumns / 2) + lane % 8 + lane / 16 * 8;
  for (int k = 0; k < depth_steps; ++k) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_matrices(a[m], x + swizzled(row0 + 16 * m, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < kColumns / 16; n += 2) {
      uint32_t both[4];
      load_matrices(both, c + swizzled(column0 + 8 * n, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_add(score[m][n], a[m], both[0], both[1]);
        multiply_add(score[m][n + 1], a[m], both[2], both[3]);
      }
    }
  }
}

// One CTA per kRows rows of one problem, looping over more if the grid is smaller. The rows lie in shared memory as bf16
// parts; centroids stream past them, a block [kColumns, kChunk] at a time; a warp holds 32 x kColumns / 2 scores
// in registers and, for each of its rows and threads, the best so far.
// Limit, at one part and 128 columns: a step is 2 * 128 * 128 * 64 flops on 16 KB from the level 2 cache, 128 flops a
// byte, and 24 KB read from shared memory each 16 features, under the matrix units at 128 bytes a cycle. With few
// clusters: reading x. Two parts: three products on two blocks.
template <int kParts, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 64 ? 2 : 1) score_rows(ScoreTask s, int64_t blocks) {
  CLUSTOPS_DYNAMIC_SHARED(shared);
  const Layout at(s.packed, s.resident);
  float(*const squares)[3] = reinterpret_cast<float(*)[3]>(shared + at.squares);
  Leader* const leaders = reinterpret_cast<Leader*>(shared + at.leaders);
  int32_t* const chosen = reinterpret_cast<int32_t*>(shared + at.chosen);
  const Packed& packed = s.packed;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column0 = warp / 4 * (kColumns / 2) + lane % 4 * 2;
  constexpr int64_t kXBlock = kRows * kChunkBytes;
  const int64_t steps = packed.steps(), total = packed.tiles * steps;

  for (int64_t unit = blockIdx.x; unit < s.a.problems * blocks; unit += gridDim.x) {
    const int64_t b = unit / blocks, first = unit % blocks * kRows;
    const unsigned char* from = s.centroids + b * packed.tiles * packed.tile_bytes();  // the next block to fetch
    int64_t fetched = 0, fetched_step = 0;
    int filled = 0, used = 0;  // stages
    const auto fetch_next = [&] {
      if (fetched < total) {
        fetch(from, shared + filled * at.stage, packed.bytes_of(fetched_step));
        from += packed.bytes_of(fetched_step);
        fetched_step = fetched_step + 1 == steps ? 0 : fetched_step + 1;
      }
      ++fetched;
      filled = filled + 1 == kStages ? 0 : filled + 1;
      commit_copies();
    };
    for (int i = 0; i < kStages - 1; ++i) fetch_next();

    if (threadIdx.x % kLanesPerRow == 0) {
      for (int row = threadIdx.x / kLanesPerRow; row < kRows; row += kThreads / kLanesPerRow) {
        for (int i = 0; i < 3; ++i) squares[row][i] = 0;
      }
    }
    const auto load = [&](int64_t chunk, int64_t slot, bool measure) {
      with_rows(s.a.dtype, [&](auto x) {
        load_rows<kParts, kRows, kThreads, decltype(x)>(s, b, first, chunk, shared + at.rows + slot * kParts * kXBlock,
                                                        squares, measure);
      });
    };
    if (s.resident) {
      for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) load(chunk, chunk, true);
    }

    Leader best[2][2];
    float score[2][kColumns / 16][4];
    int64_t step = 0, tile = 0;
    for (int64_t i = 0; i < total; ++i) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // block i is here for all, and all have left the stage that is filled next
      fetch_next();
      const int64_t chunk = packed.chunk_of(step);
      if (!s.resident) {
        load(chunk, 0, i < packed.chunks);
        __syncthreads();
      }
      if (step == 0) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int n = 0; n < kColumns / 16; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) score[m][n][e] = 0;
          }
        }
      }
      const unsigned char* x = shared + at.rows + (s.resident ? chunk : 0) * kParts * kXBlock;
      const unsigned char* c = shared + used * at.stage;
      used = used + 1 == kStages ? 0 : used + 1;
      const int depth = packed.depth_steps(chunk);
      if (kParts == 2 && packed.part_of(step) == 0) multiply_block<kColumns>(x + kXBlock, c, depth, score);
      multiply_block<kColumns>(x, c, depth, score);

      if (++step < steps) continue;
      const float* half_norms = reinterpret_cast<const float*>(c + packed.block_bytes()) + column0;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) {
          const float2 h = *reinterpret_cast<const float2*>(half_norms + 8 * n);
#pragma unroll
          for (int e = 0; e < 4; ++e) score[m][n][e] += e % 2 ? h.y : h.x;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          best[m][half].template take<kColumns / 8>([&](int i) { return score[m][i / 2][2 * half + i % 2]; },
                                                    static_cast<int32_t>(tile * kColumns) + column0);
        }
      }
      step = 0;
      ++tile;
    }

#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Leader leader = best_of_row(best[m][half]);
        const int row = warp % 4 * kWarpRows + 16 * m + 8 * half + lane / 4;
        if (lane % 4 == 0) leaders[warp / 4 * kRows + row] = leader;
      }
    }
    const Norms norms = s.counts ? largest_norms(s, b) : Norms{};
    __syncthreads();
    if (threadIdx.x < kRows) {
      Leader leader = leaders[threadIdx.x];
      leader.merge(leaders[kRows + threadIdx.x]);
      const bool decided = !s.counts || certain(leader, squares[threadIdx.x], norms, s.a.features);
      chosen[threadIdx.x] = decided ? leader.index : kUndecided;
    }
    __syncthreads();
    with_rows(s.a.dtype, [&](auto x) { write_rows<kRows, kThreads, decltype(x)>(s, b, first, chosen); });
    wait_for_copies<0>();
    __syncthreads();  // before the next unit writes to shared memory
  }
}

}  // namespace

int64_t score_shared_bytes(const Packed& packed, bool resident) { return Layout(packed, resident).bytes; }

void score(const ScoreTask& s, void* stream) {
  const auto kernel = s.packed.parts == 1 ? s.packed.columns == 64 ? score_rows<1, 64> : score_rows<1, 128>
                                          : s.packed.columns == 64 ? score_rows<2, 64> : score_rows<2, 128>;
  const int64_t blocks = divide_up(s.a.rows, kRows);
  launch(kernel, grid_for(s.a.problems * blocks), kThreads, static_cast<std::size_t>(Layout(s.packed, s.resident).bytes),
         stream, s, blocks);
}

}  // namespace clustops::cuda
