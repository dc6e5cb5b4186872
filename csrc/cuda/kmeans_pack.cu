// Centroids as the scoring kernels read them; see kmeans_layout.h.
#include "kmeans_rows.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = kThreads / kChunk;  // of samples, in the mean
constexpr int64_t kSamples = 32;

// The mean of up to kSamples centroids, features of `chunk`: shifting by it keeps scores, and so their rounding, small
// where all data lie far from the origin. Every thread gets all of `mean`.
__device__ void mean_of_samples(const KMeansAssignCuda& a, int64_t b, int64_t chunk, float* mean) {
  __shared__ float sums[kGroups][kChunk];
  const int64_t samples = a.clusters < kSamples ? a.clusters : kSamples;
  const int column = threadIdx.x % kChunk, group = threadIdx.x / kChunk;
  const int64_t d = chunk * kChunk + column;
  float sum = 0;
  for (int64_t i = group; i < samples && d < a.features; i += kGroups) {
    sum += a.centroid<float>(b, i * a.clusters / samples)[d];
  }
  __syncthreads();  // `mean` and `sums` of the chunk before are still read
  sums[group][column] = sum;
  __syncthreads();
  if (threadIdx.x < kChunk) {
    float total = 0;
    for (int g = 0; g < kGroups; ++g) total += sums[g][threadIdx.x];
    mean[threadIdx.x] = total / static_cast<float>(samples);
  }
  __syncthreads();
}

// One CTA per tile of kColumns centroids of one problem: eight threads a centroid, eight features each.
// Limit: launch latency; K D reads and 2 or 4 bytes written for each.
template <int kParts, int kColumns>
__global__ void __launch_bounds__(kThreads) pack(ScoreTask s) {
  constexpr int kStride = kThreads / kLanesPerRow, kEach = kColumns / kStride;
  __shared__ float mean[kChunk];
  __shared__ float largest[kThreads / 32][3];
  const KMeansAssignCuda& a = s.a;
  const Packed& packed = s.packed;
  const int group = threadIdx.x % kLanesPerRow, row0 = threadIdx.x / kLanesPerRow;
  for (int64_t unit = blockIdx.x; unit < a.problems * packed.tiles; unit += gridDim.x) {
    const int64_t b = unit / packed.tiles, tile = unit % packed.tiles;
    unsigned char* out = s.centroids + unit * packed.tile_bytes();
    float squares[kEach][3] = {};
    double norm[kEach] = {};
    for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) {
      mean_of_samples(a, b, chunk, mean);
      if (tile == 0 && threadIdx.x < kChunk) {
        s.means[(b * packed.chunks + chunk) * kChunk + threadIdx.x] = mean[threadIdx.x];
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int row = row0 + i * kStride;
        const int64_t k = tile * kColumns + row;
        const bool inside = k < a.clusters;
        const int64_t d = chunk * kChunk + 8 * group;
        float v[8];
        load8(a.centroid<float>(b, inside ? k : 0), d, inside ? a.features : 0, false, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          v[j] = inside ? v[j] - mean[8 * group + j] : 0.0f;
          norm[i] += static_cast<double>(v[j]) * v[j];
        }
        uint4 parts[kParts];
        split8<kParts>(v, parts, squares[i]);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          *reinterpret_cast<uint4*>(out + packed.step_of(p, chunk) * packed.block_bytes() + swizzled(row, group)) = parts[p];
        }
      }
    }
    float* half_norms = reinterpret_cast<float*>(out + packed.steps() * packed.block_bytes());
    float most[3] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = row0 + i * kStride;
      const double total = sum_of_lanes(norm[i]);
      const bool inside = tile * kColumns + row < a.clusters;
      if (group == 0) half_norms[row] = inside ? static_cast<float>(-0.5 * total) : -INFINITY;  // padding never wins
#pragma unroll
      for (int j = 0; j < 3; ++j) most[j] = fmaxf(most[j], sqrtf(sum_of_lanes(squares[i][j])));
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      for (int lanes = 16; lanes > 0; lanes /= 2) most[j] = fmaxf(most[j], __shfl_xor_sync(0xffffffffu, most[j], lanes));
      if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32][j] = most[j];
    }
    __syncthreads();
    if (threadIdx.x < 3) {
      float value = 0;
      for (int w = 0; w < kThreads / 32; ++w) value = fmaxf(value, largest[w][threadIdx.x]);
      s.norms[unit * kNorms + threadIdx.x] = value;
    }
    if (s.counts && tile == 0 && threadIdx.x == 0) s.counts[b] = 0;
  }
}

}  // namespace

void pack_centroids(const ScoreTask& s, void* stream) {
  const auto kernel = s.packed.parts == 1 ? s.packed.columns == 64 ? pack<1, 64> : pack<1, 128>
                                          : s.packed.columns == 64 ? pack<2, 64> : pack<2, 128>;
  launch(kernel, grid_for(s.a.problems * s.packed.tiles), kThreads, 0, stream, s);
}

}  // namespace clustops::cuda
