// k-means assignment in fp32, by ||x - c||^2 directly: twice the arithmetic of a matrix product, and no cancellation.
#include <cstdint>

#include "kernels.h"
#include "launch.h"

namespace clustops::cuda {
namespace {

constexpr int kSide = 16;          // threads along rows and along centroids
constexpr int kEach = 4;           // rows and centroids of one thread
constexpr int kTile = kSide * kEach;
constexpr int kStep = 16;          // features in shared memory at a time
constexpr int kPad = 4;            // keeps the columns of a transposed store in different banks

// One tile of kTile rows starting at `first`, features [d0, d0 + kStep), transposed; zero past the ends.
__device__ void load_tile(float (*tile)[kTile + kPad], const float* base, int64_t stride, int64_t first, int64_t rows,
                          int64_t d0, int64_t features) {
  for (int i = threadIdx.x; i < kTile * kStep; i += kSide * kSide) {
    const int row = i / kStep, d = i % kStep;
    const bool inside = first + row < rows && d0 + d < features;  // guard
    tile[d][row] = inside ? base[(first + row) * stride + d0 + d] : 0.0f;
  }
}

__device__ bool comes_first(float distance, int64_t k, float other, int64_t other_k) {
  return distance < other || (distance == other && k < other_k);
}

// One CTA per kTile rows of one problem, looping over more if the grid is smaller: all centroids pass through shared
// memory, a tile of kTile at a time; thread (ty, tx) holds rows ty + 16 i and centroids tx + 16 j of the tile.
// x [problems, rows, features] at any row stride; centroids [problems, clusters, features].
__global__ void __launch_bounds__(kSide* kSide) assign(KMeansAssign a, int64_t blocks) {
  __shared__ float xs[kStep][kTile + kPad];
  __shared__ float cs[kStep][kTile + kPad];
  __shared__ float best_distance[kTile][kSide + 1];
  __shared__ int64_t best_label[kTile][kSide + 1];
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;

  for (int64_t unit = blockIdx.x; unit < a.problems * blocks; unit += gridDim.x) {
    const int64_t b = unit / blocks, first = unit % blocks * kTile;
    float nearest[kEach];
    int64_t label[kEach];
    for (int i = 0; i < kEach; ++i) nearest[i] = INFINITY, label[i] = a.clusters;

    for (int64_t k0 = 0; k0 < a.clusters; k0 += kTile) {
      float sum[kEach][kEach] = {};
      for (int64_t d0 = 0; d0 < a.features; d0 += kStep) {
        load_tile(xs, a.row<float>(b, 0), a.row_stride, first, a.rows, d0, a.features);
        load_tile(cs, a.centroid<float>(b, 0), a.features, k0, a.clusters, d0, a.features);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < kStep; ++d) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
              const float e = xs[d][ty + kSide * i] - cs[d][tx + kSide * j];
              sum[i][j] += e * e;
            }
          }
        }
        __syncthreads();
      }
      for (int i = 0; i < kEach; ++i) {
        for (int j = 0; j < kEach; ++j) {
          const int64_t k = k0 + tx + kSide * j;
          if (k < a.clusters && sum[i][j] < nearest[i]) nearest[i] = sum[i][j], label[i] = k;  // k only grows
        }
      }
    }

    for (int i = 0; i < kEach; ++i) {
      best_distance[ty + kSide * i][tx] = nearest[i];
      best_label[ty + kSide * i][tx] = label[i];
    }
    __syncthreads();
    const int64_t n = first + threadIdx.x;
    if (threadIdx.x < kTile && n < a.rows) {
      float distance = INFINITY;
      int64_t k = a.clusters;
      for (int t = 0; t < kSide; ++t) {
        const float other = best_distance[threadIdx.x][t];
        const int64_t other_k = best_label[threadIdx.x][t];
        if (comes_first(other, other_k, distance, k)) distance = other, k = other_k;
      }
      if (k == a.clusters) {  // no finite distance, as for a row with a NaN: label 0, and the distance says so
        k = 0;
        distance = 0;
        for (int64_t d = 0; d < a.features; ++d) {
          const float e = a.row<float>(b, n)[d] - a.centroid<float>(b, 0)[d];
          distance += e * e;
        }
      }
      a.labels[b * a.rows + n] = k;
      static_cast<float*>(a.distances)[b * a.rows + n] = distance;
    }
    __syncthreads();  // before the next unit writes to best_*
  }
}

}  // namespace

void kmeans_assign(const KMeansAssign& a, void* stream) {
  const int64_t blocks = (a.rows + kTile - 1) / kTile;
  const int64_t units = a.problems * blocks;
  if (units == 0) return;
  const unsigned grid = static_cast<unsigned>(units < CLUSTOPS_MAX_GRID ? units : CLUSTOPS_MAX_GRID);
  CLUSTOPS_LAUNCH(assign, grid, kSide * kSide, stream, a, blocks);
}

}  // namespace clustops::cuda
