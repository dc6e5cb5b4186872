// k-means assignment: which kernels run, and those that take ||x - c||^2 directly: twice the arithmetic of a matrix
// product, and no cancellation.
#include <cstdint>

#include "kernels.h"
#include "kmeans_rows.h"

namespace clustops::cuda {
namespace {

constexpr int kSide = 16;  // threads along rows and along centroids
constexpr int kEach = 4;   // rows and centroids of one thread
constexpr int kTile = kSide * kEach;
constexpr int kThreads = kSide * kSide;
constexpr int kPad = 4;  // keeps the columns of a transposed store in different banks
constexpr int64_t kSlice = 1024;  // centroids of a unit of recheck: many units also where few rows are listed

// Features of a tile in shared memory at a time: 64 bytes of a row.
template <class T>
constexpr int kStep = 64 / static_cast<int>(sizeof(T));

template <class T>
struct Tiles {
  T x[kStep<T>][kTile + kPad], c[kStep<T>][kTile + kPad];
};

// Features [d0, d0 + kStep) of kTile rows, transposed: row i from where(i), or zeros where that is null.
template <class T, class Where>
__device__ void load_tile(T (&tile)[kStep<T>][kTile + kPad], int64_t d0, int64_t features, const Where& where) {
  for (int i = threadIdx.x; i < kTile * kStep<T>; i += kThreads) {
    const int row = i / kStep<T>, d = i % kStep<T>;
    const auto* from = where(row);
    tile[d][row] = from && d0 + d < features ? static_cast<T>(value_of(from[d0 + d])) : T(0);  // guard
  }
}

// ||x - c||^2 of kTile rows with kTile centroids: sum[i][j] is that of rows ty + 16 i and centroids tx + 16 j.
template <class T, class WhereX, class WhereC>
__device__ void distances_of_tile(Tiles<T>& tiles, int64_t features, const WhereX& x, const WhereC& c,
                                  T (&sum)[kEach][kEach]) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int64_t d0 = 0; d0 < features; d0 += kStep<T>) {
    __syncthreads();  // the tiles of the step before are still read
    load_tile<T>(tiles.x, d0, features, x);
    load_tile<T>(tiles.c, d0, features, c);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kStep<T>; ++d) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const T e = tiles.x[d][ty + kSide * i] - tiles.c[d][tx + kSide * j];
          sum[i][j] += e * e;
        }
      }
    }
  }
}

// A NaN sorts like infinity.
template <class T>
__device__ T rank_of(T distance) {
  return distance == distance ? distance : static_cast<T>(INFINITY);
}

// Puts centroid k among the nearest so far of a row, `have` of `top`, nearest first; k only grows.
template <class T>
__device__ void insert(int64_t* labels, T* distances, int64_t& have, int64_t top, int64_t k, T distance) {
  const T rank = rank_of(distance);
  if (have == top && !(rank < rank_of(distances[top - 1]))) return;
  int64_t at = have < top ? have++ : top - 1;
  for (; at > 0 && rank < rank_of(distances[at - 1]); --at) {
    distances[at] = distances[at - 1];
    labels[at] = labels[at - 1];
  }
  distances[at] = distance;
  labels[at] = k;
}

// One CTA per kTile rows of one problem, looping over more if the grid is smaller: all centroids pass by, a tile of kTile at a
// time, and one thread for each row sorts its distances into the result, which is the running list.
// Limit: arithmetic outside the tensor cores, 2 N K D; with a long list, its insertions.
template <class X, class T>
__global__ void __launch_bounds__(kThreads, 2) nearest(KMeansAssignCuda a, int64_t blocks) {
  __shared__ Tiles<T> tiles;
  __shared__ T distances[kTile][kTile / 2 + 1];
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int64_t unit = blockIdx.x; unit < a.problems * blocks; unit += gridDim.x) {
    const int64_t b = unit / blocks, first = unit % blocks * kTile;
    const int64_t n = first + threadIdx.x, row = (b * a.rows + n) * a.top;
    const bool owner = threadIdx.x < kTile && n < a.rows;
    int64_t have = 0;
    for (int64_t k0 = 0; k0 < a.clusters; k0 += kTile) {
      T sum[kEach][kEach] = {};
      distances_of_tile<T>(
          tiles, a.features, [&](int i) { return first + i < a.rows ? a.row<X>(b, first + i) : nullptr; },
          [&](int i) { return k0 + i < a.clusters ? a.centroid<T>(b, k0 + i) : nullptr; }, sum);
#pragma unroll
      for (int part = 0; part < 2; ++part) {  // half of the tile's centroids, in order
        __syncthreads();  // the distances before are still read
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) distances[ty + kSide * i][tx + kSide * j] = sum[i][2 * part + j];
        }
        __syncthreads();
        for (int j = 0; owner && j < kTile / 2; ++j) {
          const int64_t k = k0 + part * (kTile / 2) + j;
          if (k < a.clusters) {
            insert(a.labels + row, static_cast<T*>(a.distances) + row, have, a.top, k, distances[threadIdx.x][j]);
          }
        }
      }
    }
  }
}

// Blocks for lists whose lengths only the GPU knows: each takes every `stride`-th piece of every `problems_step`-th problem.
constexpr int64_t kListGrid = 2048;

struct Share {
  int64_t b, problems_step, piece, stride;

  __device__ explicit Share(int64_t problems)
      : problems_step(problems < gridDim.x ? problems : gridDim.x), stride(gridDim.x / problems_step) {
    b = blockIdx.x / stride;
    piece = blockIdx.x % stride;
    if (b >= problems_step) b = problems;  // one block too many
  }
};

int64_t list_grid(int64_t pieces) { return grid_for(pieces < kListGrid ? pieces : kListGrid); }

// One CTA per kTile listed rows and kSlice centroids: the nearest of them, put into the row's label by an atomic minimum
// over (distance, index) in one number. Distances are not negative, so their bits sort as they do.
// Limit: arithmetic outside the tensor cores, 2 D for each listed row and centroid.
template <class X>
__device__ void recheck_piece(const ScoreTask& s, int64_t b, int64_t first, int64_t count, int64_t slice) {
  __shared__ Tiles<float> tiles;
  __shared__ unsigned long long found[kTile];
  __shared__ int64_t rows[kTile];
  const KMeansAssignCuda& a = s.a;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  __syncthreads();  // the piece before is still read
  if (threadIdx.x < kTile) {
    const int64_t i = first + threadIdx.x;
    rows[threadIdx.x] = i < count ? static_cast<int64_t>(s.listed[b * a.rows + i]) : -1;  // guard
    found[threadIdx.x] = ~0ull;
  }
  __syncthreads();
  float best[kEach];
  int64_t label[kEach];
  for (int i = 0; i < kEach; ++i) best[i] = INFINITY, label[i] = -1;
  const int64_t end = slice + kSlice < a.clusters ? slice + kSlice : a.clusters;
  for (int64_t k0 = slice; k0 < end; k0 += kTile) {
    float sum[kEach][kEach] = {};
    distances_of_tile<float>(
        tiles, a.features, [&](int i) { return rows[i] >= 0 ? a.row<X>(b, rows[i]) : nullptr; },
        [&](int i) { return k0 + i < end ? a.centroid<float>(b, k0 + i) : nullptr; }, sum);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t k = k0 + tx + kSide * j;
        if (k < end && sum[i][j] < best[i]) best[i] = sum[i][j], label[i] = k;  // k only grows
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (label[i] < 0) continue;  // nothing finite
    uint32_t bits;
    memcpy(&bits, &best[i], sizeof bits);
    atomicMin(found + ty + kSide * i, static_cast<unsigned long long>(bits) << 32 | static_cast<uint32_t>(label[i]));
  }
  __syncthreads();
  if (threadIdx.x < kTile && rows[threadIdx.x] >= 0) {
    atomicMin(reinterpret_cast<unsigned long long*>(a.labels + b * a.rows + rows[threadIdx.x]), found[threadIdx.x]);
  }
}

template <class X>
__global__ void __launch_bounds__(kThreads, 2) recheck(ScoreTask s) {
  const int64_t slices = divide_up(s.a.clusters, kSlice);
  const Share share(s.a.problems);
  for (int64_t b = share.b; b < s.a.problems; b += share.problems_step) {
    const int64_t count = s.counts[b], pieces = divide_up(count, kTile) * slices;
    for (int64_t i = share.piece; i < pieces; i += share.stride) {
      recheck_piece<X>(s, b, i / slices * kTile, count, i % slices * kSlice);
    }
  }
}

// One thread per listed row: label and distance out of what recheck left. Where no distance was finite: label 0, and the
// distance says so.
template <class X>
__device__ void unpack_row(const ScoreTask& s, int64_t b, int64_t n) {
  const KMeansAssignCuda& a = s.a;
  const int64_t at = b * a.rows + n;
  const uint64_t packed = static_cast<uint64_t>(a.labels[at]);
  float distance;
  const uint32_t bits = static_cast<uint32_t>(packed >> 32);
  memcpy(&distance, &bits, sizeof distance);
  int64_t label = static_cast<int64_t>(packed & 0xffffffffu);
  if (packed == ~uint64_t{0}) {
    label = 0;
    distance = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      const float e = value_of(a.row<X>(b, n)[d]) - a.centroid<float>(b, 0)[d];
      distance += e * e;
    }
  }
  a.labels[at] = label;
  static_cast<float*>(a.distances)[at] = distance;
}

template <class X>
__global__ void __launch_bounds__(kThreads) unpack(ScoreTask s) {
  const Share share(s.a.problems);
  for (int64_t b = share.b; b < s.a.problems; b += share.problems_step) {
    for (int64_t i = share.piece * kThreads + threadIdx.x; i < s.counts[b]; i += share.stride * kThreads) {
      unpack_row<X>(s, b, s.listed[b * s.a.rows + i]);
    }
  }
}

template <class X>
struct Exact {
  using type = float;
};
template <>
struct Exact<double> {
  using type = double;
};

void assign_directly(const KMeansAssignCuda& a, void* stream) {
  const int64_t blocks = divide_up(a.rows, kTile);
  with_element(a.dtype, [&](auto x) {
    using X = decltype(x);
    launch(nearest<X, typename Exact<X>::type>, grid_for(a.problems * blocks), kThreads, 0, stream, a, blocks);
  });
}

template <class X>
void decide_listed(const ScoreTask& s, void* stream) {
  const int64_t pieces = s.a.problems * divide_up(s.a.rows, kTile) * divide_up(s.a.clusters, kSlice);
  launch(recheck<X>, list_grid(pieces), kThreads, 0, stream, s);
  launch(unpack<X>, list_grid(s.a.problems * divide_up(s.a.rows, kThreads)), kThreads, 0, stream, s);
}

bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bytes % 16 == 0; }

// Hopper's own kernel where there is enough to multiply; else the widest tile with which the rows stay in shared memory;
// if there is none, chunks of the rows pass by as well. By clusters, features and precision alone.
ScoreTask plan(const KMeansAssignCuda& a) {
  const int64_t limit = most_shared();
  ScoreTask s{};
  s.a = a;
  const int parts = parts_of(a.precision), widest = a.clusters <= 64 ? 64 : 128;
  s.packed = packed_centroids(a.clusters, a.features, parts, 128);
  s.sm90 = hopper() && score_sm90_suits(s.packed, a.clusters);
  for (int columns = widest; columns >= 64 && !s.resident && !s.sm90; columns /= 2) {
    s.packed = packed_centroids(a.clusters, a.features, parts, columns);
    s.resident = score_shared_bytes(s.packed, true) <= limit;
  }
  if (!s.resident && !s.sm90) s.packed = packed_centroids(a.clusters, a.features, parts, widest);
  const bool certify = a.precision == Precision::highest;
  const Workspace at(a.problems, a.rows, s.packed, certify);
  unsigned char* base = reinterpret_cast<unsigned char*>(a.workspace);
  s.means = reinterpret_cast<float*>(base + at.means);
  s.norms = reinterpret_cast<float*>(base + at.norms);
  s.centroids = base + at.centroids;
  s.counts = certify ? reinterpret_cast<uint32_t*>(base + at.counts) : nullptr;
  s.listed = certify ? reinterpret_cast<uint32_t*>(base + at.rows) : nullptr;
  const int64_t size = a.dtype == DType::f32 ? 4 : 2;
  s.wide_rows = aligned(a.x, a.row_stride * size) && aligned(a.x, a.problem_stride * size);
  s.wide_centroids = aligned(a.centroids, a.features * 4);
  return s;
}

}  // namespace

void kmeans_assign(const KMeansAssignCuda& a, void* stream) {
  if (a.problems * a.rows == 0) return;
  if (!multiplies(a.clusters, a.features, a.top, a.dtype)) return assign_directly(a, stream);
  const ScoreTask s = plan(a);
  pack_centroids(s, stream);
  s.sm90 ? score_sm90(s, stream) : score(s, stream);
  if (!s.counts) return;
  with_element(a.dtype, [&](auto x) {
    if constexpr (sizeof(x) < sizeof(double)) decide_listed<decltype(x)>(s, stream);
  });
}

}  // namespace clustops::cuda
