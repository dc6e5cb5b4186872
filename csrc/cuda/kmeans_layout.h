// How the operands of the assignment lie in memory: plain arithmetic for GPU and CPU.
//
// With x and c shifted by a mean of some centroids, the nearest centroid of a row maximises x.c - ||c||^2 / 2. Each
// fp32 operand is x1 (bf16), or x1 + x2 (two bf16, 16 bits). Centroids are packed once a call, in the order and
// the layout in which shared memory takes them: for each tile of `columns` centroids its blocks [columns, kChunk],
// then the tile's -||c||^2 / 2. A block is one step: first c2, chunk by chunk (for x1 c2), then c1 (for x2 c1 and x1 c1):
// small products first, so that fewer are rounded at the size of the score.
#pragma once

#include <cstdint>

#include "../common/kmeans_cuda.h"

namespace clustops::cuda {

constexpr int kChunk = 64;              // features of a block
constexpr int kChunkBytes = kChunk * 2;  // of one row of a block: every bank of shared memory once
constexpr int kDepth = 16;              // features of one matrix instruction
constexpr int kColumnChoices[] = {64, 128};
constexpr int kNorms = 4;               // numbers that a tile says of its centroids' norms

CLUSTOPS_HOST_DEVICE inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
CLUSTOPS_HOST_DEVICE inline int64_t align_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline int parts_of(Precision precision) { return precision == Precision::medium ? 1 : 2; }

// Whether labels come from matrix products: not where padding would cost more than it gains. Never by the number of rows or
// problems: a label depends on its row and the centroids alone.
inline bool multiplies(int64_t clusters, int64_t features, int64_t top, DType dtype) {
  return top == 1 && clusters * features >= 256 && dtype != DType::f64;
}

// Byte of 8 features `group` of a row in a block [rows, kChunk]. The exclusive or keeps eight rows of one group, and
// eight groups of one row, in different banks; it is the 128-byte swizzle of the matrix units.
CLUSTOPS_HOST_DEVICE inline int swizzled(int row, int group) { return row * kChunkBytes + ((group ^ (row & 7)) << 4); }

struct Packed {
  int parts, columns;
  int64_t tiles, chunks, features;

  CLUSTOPS_HOST_DEVICE int64_t steps() const { return parts * chunks; }  // blocks of a tile
  CLUSTOPS_HOST_DEVICE int64_t block_bytes() const { return static_cast<int64_t>(columns) * kChunkBytes; }
  CLUSTOPS_HOST_DEVICE int64_t half_norm_bytes() const { return columns * 4; }
  CLUSTOPS_HOST_DEVICE int64_t tile_bytes() const { return steps() * block_bytes() + half_norm_bytes(); }
  // The block of part 0 (c1) or 1 (c2).
  CLUSTOPS_HOST_DEVICE int64_t step_of(int part, int64_t chunk) const { return part == parts - 1 ? chunk : chunks + chunk; }
  CLUSTOPS_HOST_DEVICE int part_of(int64_t step) const { return step < chunks ? parts - 1 : 0; }
  CLUSTOPS_HOST_DEVICE int64_t chunk_of(int64_t step) const { return step < chunks ? step : step - chunks; }
  CLUSTOPS_HOST_DEVICE int64_t bytes_of(int64_t step) const {  // as copied: half norms come with the last block
    return block_bytes() + (step == steps() - 1 ? half_norm_bytes() : 0);
  }
  // Matrix instructions that cover the features of a chunk.
  CLUSTOPS_HOST_DEVICE int depth_steps(int64_t chunk) const {
    const int64_t left = features - chunk * kChunk;
    return left >= kChunk ? kChunk / kDepth : static_cast<int>(divide_up(left, kDepth));
  }
};

inline Packed packed_centroids(int64_t clusters, int64_t features, int parts, int columns) {
  return {parts, columns, divide_up(clusters, columns), divide_up(features, kChunk), features};
}

// Where things lie in the workspace, in bytes. Rows too close to call are listed for each problem.
struct Workspace {
  int64_t counts, rows, means, norms, centroids, bytes;

  Workspace(int64_t problems, int64_t n, const Packed& packed, bool lists) {
    constexpr int64_t kAlign = 1024;
    counts = 0;
    rows = lists ? align_up(problems * 4, kAlign) : 0;
    means = rows + (lists ? align_up(problems * n * 4, kAlign) : 0);
    norms = means + align_up(problems * packed.chunks * kChunk * 4, kAlign);
    centroids = norms + align_up(problems * packed.tiles * kNorms * 4, kAlign);
    bytes = centroids + align_up(problems * packed.tiles * packed.tile_bytes(), kAlign);
  }
};

}  // namespace clustops::cuda
