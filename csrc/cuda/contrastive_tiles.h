// How the mma.sync kernels of the class losses go through prepared rows: sizes, shared memory, tiles of columns on their way.
#pragma once

#include "contrastive_mma.h"
#include "contrastive_rows.h"

namespace clustops::cuda {

constexpr int kTileThreads = 256;  // eight warps: four along the rows of a block, two along the columns of a tile
constexpr int kRowWarps = 4, kColumnWarps = 2;
#ifdef CLUSTOPS_SIMT  // few, so that tests meet both
constexpr int64_t kManyRows = 300;
#else
constexpr int64_t kManyRows = 4096;  // from here on a warp takes 32 of them
#endif

// kM matrices of 16 rows a warp, kColumns columns a tile. Wide fp32 rows take narrow tiles, or shared memory ends.
template <int kM>
constexpr int kBlockRows = 16 * kM * kRowWarps;
inline int columns_for(int chunks) { return chunks > 4 ? 32 : 64; }

// Arrays [padded] of which a stage has the part that belongs to its columns.
constexpr int kForwardArrays = 2, kBackwardArrays = 6;

// Shared memory of a CTA, in bytes from its start.
struct TileLayout {
  int64_t rows, stages, stage, arrays, room, bytes;
  int count;  // of stages

  CLUSTOPS_HOST_DEVICE TileLayout(int chunks, int block_rows, int columns, int n_arrays, int64_t end_bytes, int64_t limit) {
    rows = 0;
    arrays = static_cast<int64_t>(chunks) * columns * kChunkBytes;  // in a stage
    stage = arrays + n_arrays * columns * 4;
    stages = static_cast<int64_t>(chunks) * block_rows * kChunkBytes;
    count = stages + 3 * stage <= limit ? 3 : 2;
    // What a block ends with takes the place of rows and stages; so does what its warps say to each other before and then.
    room = end_bytes;
    const int64_t used = stages + count * stage, ended = room + static_cast<int64_t>(sizeof(Summary)) * kTileThreads / 32;
    bytes = used > ended ? used : ended;
  }
};

// Copies of 16 bytes to shared memory: `count` rows from `row` on, a block [count, kChunkBytes] for each chunk.
template <int kCount>
__device__ void fetch_rows(const Prepared& p, int64_t row, unsigned char* to) {
  constexpr int kPieces = kChunkBytes / 16;
  const unsigned char* from = p.operands + row / kTileRows * p.tile_bytes() + row % kTileRows * kChunkBytes;
  for (int i = threadIdx.x; i < p.chunks * kCount * kPieces; i += kTileThreads) {
    const int chunk = i / (kCount * kPieces), byte = i % (kCount * kPieces) * 16;
    copy_async(to + chunk * (kCount * kChunkBytes) + byte, from + static_cast<int64_t>(chunk) * kBlockBytes + byte);
  }
}

// As many numbers of an array.
template <int kCount>
__device__ void fetch_numbers(const void* array, int64_t row, unsigned char* to, int turn) {
  const int i = static_cast<int>(threadIdx.x) - turn * (kCount / 4);
  if (i >= 0 && i < kCount / 4) copy_async(to + 16 * i, static_cast<const unsigned char*>(array) + row * 4 + 16 * i);
}

// use(column tile, its stage) for each tile [begin, end), as its rows and numbers come: fetch(column tile, stage).
template <class Fetch, class Use>
__device__ void for_tiles(const TileLayout& at, unsigned char* shared, int64_t begin, int64_t end, const Fetch& fetch,
                          const Use& use) {
  int filled = 0, used = 0;
  int64_t next = begin;
  const auto fetch_next = [&] {
    if (next < end) fetch(next, shared + at.stages + filled * at.stage);
    ++next;
    filled = filled + 1 == at.count ? 0 : filled + 1;
    commit_copies();
  };
  for (int i = 0; i < at.count - 1; ++i) fetch_next();
  for (int64_t tile = begin; tile < end; ++tile) {
    if (at.count == 3) {
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();  // the tile is here for all, and all have left the stage that is filled next
    fetch_next();
    use(tile, shared + at.stages + used * at.stage);
    used = used + 1 == at.count ? 0 : used + 1;
  }
  wait_for_copies<0>();
  __syncthreads();
}

// The row, within its block, of sum (m, 2 * half or 2 * half + 1) of this thread.
__device__ inline int row_of(int m, int half, int kM) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return 16 * (kM * (warp % kRowWarps) + m) + 8 * half + lane / 4;
}

int64_t backward_shared_bytes(int64_t width, Operand operand, int64_t limit);  // the more of both directions

}  // namespace clustops::cuda
