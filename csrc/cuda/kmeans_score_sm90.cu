// Scores on Hopper's tensor cores by wgmma, and each row's best; nothing [rows, clusters] is written.
#include <type_traits>

#include "hopper.h"
#include "kmeans_rows.h"

namespace clustops::cuda {
namespace {

constexpr int kGroups = 2;                              // warpgroups that multiply
constexpr int kWorkers = kGroups * kGroupThreads;       // their threads
constexpr int kThreads = kWorkers + kGroupThreads;      // and a third, a thread of which fetches
constexpr int kAlign = 1024;                            // of what the matrix units read: eight rows of a block
constexpr int64_t kFewClusters = 256;
constexpr int kFewestStages = 3, kMostStages = 6;

// Shared memory of a CTA, in bytes from its start, aligned to kAlign.
struct Layout {
  int64_t rows, squares, chosen, barriers, stages, stage, bytes;
  int count;  // of stages

  CLUSTOPS_HOST_DEVICE Layout(const Packed& packed, int unit_rows, int64_t limit) {
    stage = align_up(packed.block_bytes() + packed.half_norm_bytes(), kAlign);
    rows = 0;
    squares = packed.steps() * unit_rows * kChunkBytes;
    chosen = squares + unit_rows * 3 * 4;
    barriers = chosen + unit_rows * 4;
    stages = align_up(barriers + 2 * kMostStages * static_cast<int64_t>(sizeof(Barrier)), kAlign);
    const int64_t fit = (limit - kAlign - stages) / stage;
    count = fit > kMostStages ? kMostStages : static_cast<int>(fit);
    bytes = kAlign + stages + count * stage;
  }
};

#ifdef CLUSTOPS_SM90

constexpr int kWorkerRegisters = 240, kFetchRegisters = 24;  // of a thread; 168 for each to begin with
constexpr int kColumns = 128;

// A stage in use and the parity of its barriers' phase, counted on across units.
struct Turn {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void next(int count) {
    if (++stage == count) stage = 0, phase ^= 1;
  }
};

// Issues sums = (fresh ? 0 : sums) + x c over one block, for 64 rows of x; with two parts x2 c, then x1 c. All of the
// block, zeros included: ptxas keeps products in flight only where their number is known.
template <int kParts>
__device__ void multiply_block(float (&sums)[kSums], const unsigned char* x, int64_t part_bytes, const unsigned char* c,
                               bool fresh) {
  begin_products(sums);
#pragma unroll
  for (int part = kParts - 1; part >= 0; --part) {
#pragma unroll
    for (int k = 0; k < kChunk / kDepth; ++k) {
      multiply_group(sums, x + part * part_bytes, c, k, fresh && k == 0 && part == kParts - 1);
    }
  }
  commit_products();
}

__device__ inline void take_tile(float (&sums)[kSums], const float* half_norms, int32_t first, Leader (&best)[2]) {
#pragma unroll
  for (int n = 0; n < kSums / 4; ++n) {
    const float2 h = *reinterpret_cast<const float2*>(half_norms + 8 * n);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[4 * n + e] += e % 2 ? h.y : h.x;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    best[half].take<kSums / 2>([&](int i) { return sums[4 * (i / 2) + 2 * half + i % 2]; }, first);
  }
}

// Every unit of this CTA: its blocks of centroids, one after the other, each as soon as a stage is empty. Barriers as in
// work().
__device__ void fetch_blocks(const ScoreTask& s, const Layout& at, unsigned char* shared, int64_t units) {
  Barrier* const full = reinterpret_cast<Barrier*>(shared + at.barriers);
  Barrier* const empty = full + kMostStages;
  const Packed& packed = s.packed;
  const int64_t steps = packed.steps(), total = packed.tiles * steps, blocks = units / s.a.problems;
  Turn turn;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const unsigned char* from = s.centroids + unit / blocks * packed.tiles * packed.tile_bytes();
    int64_t step = 0;
    for (int64_t i = 0; i < total; ++i) {
      if (i == at.count) __syncthreads();  // the rows are there; until now all stages were empty
      if (threadIdx.x == kWorkers) {
        const uint32_t bytes = static_cast<uint32_t>(packed.bytes_of(step));
        wait_for(empty + turn.stage, turn.phase ^ 1);
        arrive_and_expect(full + turn.stage, bytes);
        copy_bulk(shared + at.stages + turn.stage * at.stage, from, bytes, full + turn.stage);
        from += bytes;
      }
      __syncwarp();
      step = step + 1 == steps ? 0 : step + 1;
      turn.next(at.count);
    }
    if (total <= at.count) __syncthreads();
    __syncthreads();
  }
}

// Every unit of this CTA, by the warpgroups that multiply.
template <int kParts, int kHalves>
__device__ void work(const ScoreTask& s, const Layout& at, unsigned char* shared, int64_t units) {
  constexpr int kRows = kGroups * kHalves * kGroupRows;
  constexpr int64_t kXBlock = kRows * kChunkBytes;
  float(*const squares)[3] = reinterpret_cast<float(*)[3]>(shared + at.squares);
  int32_t* const chosen = reinterpret_cast<int32_t*>(shared + at.chosen);
  Barrier* const full = reinterpret_cast<Barrier*>(shared + at.barriers);
  Barrier* const empty = full + kMostStages;
  const Packed& packed = s.packed;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column0 = lane % 4 * 2;
  const int64_t steps = packed.steps(), blocks = units / s.a.problems;
  const unsigned char* const mine = shared + warp / 4 * kHalves * kGroupRows * kChunkBytes;
  Turn turn;

  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t b = unit / blocks, first = unit % blocks * kRows;
    if (threadIdx.x % kLanesPerRow == 0) {
      for (int row = threadIdx.x / kLanesPerRow; row < kRows; row += kWorkers / kLanesPerRow) {
        for (int i = 0; i < 3; ++i) squares[row][i] = 0;
      }
    }
    for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) {
      with_rows(s.a.dtype, [&](auto x) {
        load_rows<kParts, kRows, kWorkers, decltype(x)>(s, b, first, chunk, shared + chunk * kParts * kXBlock, squares,
                                                        true);
      });
    }
    publish_shared();
    __syncthreads();

    Leader best[kHalves][2];
    float sums[kHalves][kSums];
    const auto release = [&](const Turn& where) {
      __syncwarp();
      if (lane == 0) arrive(empty + where.stage);
    };
    for (int64_t tile = 0; tile < packed.tiles; ++tile) {
      Turn before = turn;
      const auto multiply = [&](auto products, int64_t chunk, bool fresh) {
        wait_for(full + turn.stage, turn.phase);
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          multiply_block<decltype(products)::value>(
              sums[h], mine + chunk * kParts * kXBlock + h * kGroupRows * kChunkBytes, kXBlock,
              shared + at.stages + turn.stage * at.stage, fresh);
        }
        wait_for_products<kHalves>();  // those on the block before are done
        if (!fresh) release(before);
        before = turn;
        turn.next(at.count);
      };
      if (kParts == 2) {
        for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) multiply(std::integral_constant<int, 1>(), chunk, chunk == 0);  // x1 c2
      }
      // x2 c1, x1 c1. The last block stands outside the loop, so that ptxas sees what is in flight after it.
      const std::integral_constant<int, kParts> all;
      for (int64_t chunk = 0; chunk < packed.chunks - 1; ++chunk) multiply(all, chunk, kParts == 1 && chunk == 0);
      multiply(all, packed.chunks - 1, kParts == 1 && packed.chunks == 1);
      const float* const half_norms =
          reinterpret_cast<const float*>(shared + at.stages + before.stage * at.stage + packed.block_bytes()) + column0;
      const int32_t column = static_cast<int32_t>(tile * kColumns) + column0;
      wait_for_products<kHalves - 1>();
      read_products(sums[0]);
      take_tile(sums[0], half_norms, column, best[0]);
      if (kHalves == 2) {
        wait_for_products<0>();
        read_products(sums[kHalves - 1]);
        take_tile(sums[kHalves - 1], half_norms, column, best[kHalves - 1]);
      }
      release(before);
    }

    const Norms norms = s.counts ? largest_norms(s, b) : Norms{};
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Leader leader = best_of_row(best[h][half]);
        const int row = (warp / 4 * kHalves + h) * kGroupRows + warp % 4 * 16 + 8 * half + lane / 4;
        const bool decided = !s.counts || certain(leader, squares[row], norms, s.a.features);
        if (lane % 4 == 0) chosen[row] = decided ? leader.index : kUndecided;
      }
    }
    __syncthreads();
    // `chosen` is read until the next unit's rows are there; nothing else that the next unit writes is.
    with_rows(s.a.dtype, [&](auto x) { write_rows<kRows, kWorkers, decltype(x)>(s, b, first, chosen); });
  }
}

#endif

// One CTA per 2 x 64 x kHalves rows of one problem, looping over more if the grid is smaller. The rows lie in shared memory as
// bf16 parts; one thread fetches blocks of centroids, two warpgroups multiply and look through what they have: a
// warpgroup with two halves of 64 rows looks through the first while the second's last block is multiplied, and
// through the second while the other warpgroup multiplies.
// Limit: the matrix units. A step is 2 * 256 * 128 * 64 flops, 1024 cycles, on 16 KB from the level 2 cache; an
// instruction reads 6 KB of shared memory in its 64 cycles, of 8 KB; looking through a tile is about 2000 issue slots of each
// scheduler, beside 2048 cycles of products at 128 features, of which they take few.
template <int kParts, int kHalves>
__global__ void __launch_bounds__(kThreads, 1) score_rows_sm90(ScoreTask s, int64_t units, int64_t limit) {
#ifdef CLUSTOPS_SM90
  CLUSTOPS_DYNAMIC_SHARED(unaligned);
  unsigned char* const shared = unaligned + (kAlign - reinterpret_cast<uintptr_t>(unaligned) % kAlign) % kAlign;
  const Layout at(s.packed, kGroups * kHalves * kGroupRows, limit);
  if (threadIdx.x == 0) {
    Barrier* const full = reinterpret_cast<Barrier*>(shared + at.barriers);
    for (int i = 0; i < at.count; ++i) {
      init_barrier(full + i, 1);
      init_barrier(full + kMostStages + i, kWorkers / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWorkers) {
    more_registers<kWorkerRegisters>();
    work<kParts, kHalves>(s, at, shared, units);
  } else {
    fewer_registers<kFetchRegisters>();
    fetch_blocks(s, at, shared, units);
  }
#endif
}

bool fits(const Packed& packed, int halves) {
  const Layout at(packed, kGroups * halves * kGroupRows, most_shared());
  return at.count >= kFewestStages;
}

template <int kParts, int kHalves>
void start(const ScoreTask& s, void* stream) {
  constexpr int kRows = kGroups * kHalves * kGroupRows;
  const int64_t units = s.a.problems * divide_up(s.a.rows, kRows), limit = most_shared();
  launch(score_rows_sm90<kParts, kHalves>, grid_for(units), kThreads,
         static_cast<std::size_t>(Layout(s.packed, kRows, limit).bytes), stream, s, units, limit);
}

}  // namespace

// With few clusters reading x is the limit, and small CTAs hide it better; far from a multiple of kChunk features the
// zeros cost more than wgmma gains.
bool score_sm90_suits(const Packed& packed, int64_t clusters) {
  return clusters > kFewClusters && 8 * packed.features >= 5 * packed.chunks * kChunk && fits(packed, 1);
}

void score_sm90(const ScoreTask& s, void* stream) {
  // Fewer rows a CTA where twice as many would leave multiprocessors idle: the same sums in the same order.
  const bool many = s.a.problems * divide_up(s.a.rows, 2 * kGroups * kGroupRows) >= multiprocessors();
  const bool two = many && fits(s.packed, 2);
  if (s.packed.parts == 1) return two ? start<1, 2>(s, stream) : start<1, 1>(s, stream);
  return two ? start<2, 2>(s, stream) : start<2, 1>(s, stream);
}

}  // namespace clustops::cuda
