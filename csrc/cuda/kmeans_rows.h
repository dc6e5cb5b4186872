// What the kernels of the assignment share: rows as numbers, as parts in a block, and what becomes of their best scores.
#pragma once

#include <cstdint>

#include "element.h"
#include "kmeans_leader.h"
#include "launch.h"
#include "mma.h"

namespace clustops::cuda {

constexpr int kLanesPerRow = kChunk / 8;  // eight neighbouring threads take a row, eight features each

// What the scoring kernels are given.
struct ScoreTask {
  KMeansAssignCuda a;
  Packed packed;
  float* means;                    // [problems, chunks * kChunk]
  float* norms;                    // [problems, tiles, kNorms]
  unsigned char* centroids;        // [problems, tiles, tile_bytes]
  uint32_t* counts;                // [problems]: rows too close to call; null where nothing is certified
  uint32_t* listed;                // [problems, rows]: which
  bool wide_rows, wide_centroids;  // 16 bytes of x, of the centroids, can be loaded at once
  bool sm90;                       // which kernel scores
  bool resident;                   // in the other one, a unit's rows stay in shared memory; if not, each chunk passes again for each tile
};

void pack_centroids(const ScoreTask& s, void* stream);
int64_t score_shared_bytes(const Packed& packed, bool resident);
void score(const ScoreTask& s, void* stream);
bool score_sm90_suits(const Packed& packed, int64_t clusters);
void score_sm90(const ScoreTask& s, void* stream);

template <class Use>
__device__ void with_rows(DType dtype, const Use& use) {
  if (dtype == DType::f32) {
    use(float());
  } else if (dtype == DType::bf16) {
    use(Bf16());
  } else {
    use(F16());
  }
}

// Features [d, d + 8) of a row, zero past the end.
template <class X>
__device__ void load8(const X* row, int64_t d, int64_t features, bool wide, float (&v)[8]) {
  if (wide && d + 8 <= features) {
    constexpr int kWords = sizeof(X) / 2;
    uint4 words[kWords];
    X x[8];
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(row + d)[i];
    memcpy(x, words, sizeof x);
    for (int i = 0; i < 8; ++i) v[i] = value_of(x[i]);
  } else {
    for (int i = 0; i < 8; ++i) v[i] = d + i < features ? value_of(row[d + i]) : 0.0f;  // guard
  }
}

__device__ inline float low_bf16(uint32_t both) { return value_of(Bf16{static_cast<uint16_t>(both & 0xffff)}); }
__device__ inline float high_bf16(uint32_t both) { return value_of(Bf16{static_cast<uint16_t>(both >> 16)}); }

// Eight numbers as one or two bf16 parts each; adds the squares of whole, second part and rest to `squares`.
template <int kParts>
__device__ void split8(const float (&v)[8], uint4 (&parts)[kParts], float (&squares)[3]) {
  uint32_t words[kParts][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float v0 = v[2 * i], v1 = v[2 * i + 1];
    squares[0] += v0 * v0 + v1 * v1;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      words[p][i] = pack_bf16(v0, v1);
      const float low = low_bf16(words[p][i]), high = high_bf16(words[p][i]);
      if (p == 1) squares[1] += low * low + high * high;
      v0 -= low;
      v1 -= high;
    }
    squares[2] += v0 * v0 + v1 * v1;
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) parts[p] = {words[p][0], words[p][1], words[p][2], words[p][3]};
}

// The sum over the eight lanes of a row, in all of them.
template <class T>
__device__ T sum_of_lanes(T value) {
  for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// Rows [first, first + kRows) of problem b, features of `chunk`, shifted, as kParts blocks one after the other; zero past
// the ends. With `measure`, squares of this chunk are added to those of the rows; a row's always by the same thread.
template <int kParts, int kRows, int kThreads, class X>
__device__ void load_rows(const ScoreTask& s, int64_t b, int64_t first, int64_t chunk, unsigned char* blocks,
                          float (*squares)[3], bool measure) {
  constexpr int kStride = kThreads / kLanesPerRow, kEach = kRows / kStride;
  const int group = threadIdx.x % kLanesPerRow, row0 = threadIdx.x / kLanesPerRow;
  const int64_t d = chunk * kChunk + 8 * group;
  float shift[8];
  load8(s.means + b * s.packed.chunks * kChunk, d, s.packed.chunks * kChunk, true, shift);
  constexpr int kBatch = kEach < 4 ? kEach : 4;  // loads under way before the first use
#pragma unroll 1
  for (int done = 0; done < kEach; done += kBatch) {
    float v[kBatch][8];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t n = first + row0 + (done + i) * kStride;
      load8(s.a.row<X>(b, n < s.a.rows ? n : 0), d, n < s.a.rows ? s.a.features : 0, s.wide_rows, v[i]);  // guard
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = row0 + (done + i) * kStride;
      const bool inside = first + row < s.a.rows;
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] = inside ? v[i][j] - shift[j] : 0.0f;
      uint4 parts[kParts];
      float sum[3] = {};
      split8<kParts>(v[i], parts, sum);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        *reinterpret_cast<uint4*>(blocks + p * kRows * kChunkBytes + swizzled(row, group)) = parts[p];
      }
      if (kParts == 2 && measure) {
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          const float total = sum_of_lanes(sum[j]);
          if (group == 0) squares[row][j] += total;
        }
      }
    }
  }
}

// The largest norms of a problem's centroids, from those of its tiles; every thread of a warp must come here.
__device__ inline Norms largest_norms(const ScoreTask& s, int64_t b) {
  Norms most{0, 0, 0};
  const float* norms = s.norms + b * s.packed.tiles * kNorms;
  for (int64_t t = threadIdx.x % 32; t < s.packed.tiles; t += 32) {
    most.whole = fmaxf(most.whole, norms[t * kNorms]);
    most.second = fmaxf(most.second, norms[t * kNorms + 1]);
    most.rest = fmaxf(most.rest, norms[t * kNorms + 2]);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    most.whole = fmaxf(most.whole, __shfl_xor_sync(0xffffffffu, most.whole, lanes));
    most.second = fmaxf(most.second, __shfl_xor_sync(0xffffffffu, most.second, lanes));
    most.rest = fmaxf(most.rest, __shfl_xor_sync(0xffffffffu, most.rest, lanes));
  }
  return most;
}

// The leader among the four neighbouring threads that hold a row's scores, in all of them.
__device__ inline Leader best_of_row(Leader leader) {
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    Leader other;
    other.score = __shfl_xor_sync(0xffffffffu, leader.score, lanes);
    other.second = __shfl_xor_sync(0xffffffffu, leader.second, lanes);
    other.index = __shfl_xor_sync(0xffffffffu, leader.index, lanes);
    leader.merge(other);
  }
  return leader;
}

// Whether the leader is ahead by more than rounding could have done. Not if a score or a norm is not finite.
__device__ inline bool certain(const Leader& leader, const float (&squares)[3], const Norms& centroids,
                               int64_t features) {
  const Norms row{sqrtf(squares[0]), sqrtf(squares[1]), sqrtf(squares[2])};
  return leader.score - leader.second > rounding_slack(row, centroids, features);
}

// ||x - c||^2 by the eight lanes of a row, in all of them.
template <class X>
__device__ float direct_distance(const X* x, const float* c, int64_t features, bool wide_x, bool wide_c) {
  float sum = 0;
  for (int64_t d = 8 * (threadIdx.x % kLanesPerRow); d < features; d += kChunk) {
    float u[8], v[8];
    load8(x, d, features, wide_x, u);
    load8(c, d, features, wide_c, v);
    for (int i = 0; i < 8; ++i) sum += (u[i] - v[i]) * (u[i] - v[i]);
  }
  return sum_of_lanes(sum);
}

constexpr int32_t kUndecided = -1;

// Labels and distances of rows [first, first + kRows); those that are kUndecided are put on the problem's list.
template <int kRows, int kThreads, class X>
__device__ void write_rows(const ScoreTask& s, int64_t b, int64_t first, const int32_t* chosen) {
  for (int row = threadIdx.x / kLanesPerRow; row < kRows; row += kThreads / kLanesPerRow) {
    const int64_t n = first + row;
    const bool inside = n < s.a.rows;
    const int32_t label = inside ? chosen[row] : kUndecided;
    const bool decided = label != kUndecided;
    const float distance = direct_distance(s.a.row<X>(b, decided ? n : 0), s.a.centroid<float>(b, decided ? label : 0),
                                           decided ? s.a.features : 0, s.wide_rows, s.wide_centroids);
    if (!inside || threadIdx.x % kLanesPerRow != 0) continue;
    s.a.labels[b * s.a.rows + n] = label;  // kUndecided has all bits set: the largest of unsigned numbers
    if (decided) static_cast<float*>(s.a.distances)[b * s.a.rows + n] = distance;
    if (!decided) s.listed[b * s.a.rows + atomicAdd(s.counts + b, 1u)] = static_cast<uint32_t>(n);
  }
}

}  // namespace clustops::cuda
