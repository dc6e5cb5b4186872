// What happens to empty clusters: the extreme rows of the others, and splits.
#include "../common/kmeans_split.h"

#include "../common/philox.h"
#include "element.h"
#include "kernels.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kNowhere = INT64_MIN;

// Floats as integers in the same order, a NaN above all.
template <class A>
struct Ordered;
template <>
struct Ordered<float> {
  using Bits = unsigned;
};
template <>
struct Ordered<double> {
  using Bits = unsigned long long;
};
template <class A>
using Bits = typename Ordered<A>::Bits;

template <class A>
__device__ Bits<A> ordered(A value) {
  constexpr Bits<A> kSign = Bits<A>{1} << (8 * sizeof(A) - 1);
  if (value != value) return ~Bits<A>{0};
  Bits<A> bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & kSign ? ~bits : bits | kSign;
}
template <class A>
__device__ A value_of_ordered(Bits<A> bits) {
  constexpr Bits<A> kSign = Bits<A>{1} << (8 * sizeof(A) - 1);
  if (bits == ~Bits<A>{0}) return static_cast<A>(NAN);
  bits = bits & kSign ? bits ^ kSign : ~bits;
  A value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One thread per cluster.
template <class A>
__global__ void __launch_bounds__(kThreads) start_best(KMeansMembers a) {
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < a.problems * a.clusters; i += step) {
    static_cast<Bits<A>*>(a.best)[i] = ordered(static_cast<A>(-INFINITY));
  }
}
template <class A>
__global__ void __launch_bounds__(kThreads) finish_best(KMeansMembers a) {
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < a.problems * a.clusters; i += step) {
    const Bits<A> bits = static_cast<Bits<A>*>(a.best)[i];
    static_cast<A*>(a.best)[i] = value_of_ordered<A>(bits);
  }
}
__global__ void __launch_bounds__(kThreads) start_places(KMeansMembers a) {
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < a.problems * a.clusters; i += step) {
    a.places[i] = kNowhere;
  }
}

// One thread per row. A value that is read before the atomic is never above the final one: most rows need no atomic.
template <class A>
__global__ void __launch_bounds__(kThreads) best_of(KMeansMembers a, int64_t blocks) {
  for (int64_t unit = blockIdx.x; unit < a.problems * blocks; unit += gridDim.x) {
    const int64_t b = unit / blocks, n = unit % blocks * kThreads + threadIdx.x;
    if (n >= a.rows) continue;  // guard
    const int64_t k = a.labels[b * a.rows + n];
    const double w = a.weights[b * a.weight_problem_stride + n * a.weight_row_stride];
    if (!(w > 0) || k < 0 || k >= a.clusters) continue;
    const A score = static_cast<const A*>(a.score)[b * a.rows + n];
    if (a.places) {
      if (score != static_cast<const A*>(a.best)[b * a.clusters + k]) continue;
      const long long place = a.last ? n + a.offset : -(n + a.offset);
      atomicMax(reinterpret_cast<long long*>(a.places) + b * a.clusters + k, place);
    } else {
      Bits<A>* best = static_cast<Bits<A>*>(a.best) + b * a.clusters + k;
      const Bits<A> bits = ordered(score);
      if (bits > *const_cast<volatile Bits<A>*>(best)) atomicMax(best, bits);
    }
  }
}

template <class A>
void members(const KMeansMembers& a, void* stream) {
  const int64_t blocks = divide_up(a.rows, kThreads);
  const int64_t each = grid_for(divide_up(a.problems * a.clusters, kThreads));
  if (a.places) {
    launch(start_places, each, kThreads, 0, stream, a);
  } else {
    launch(start_best<A>, each, kThreads, 0, stream, a);
  }
  launch(best_of<A>, grid_for(a.problems * blocks), kThreads, 0, stream, a, blocks);
  if (!a.places) launch(finish_best<A>, each, kThreads, 0, stream, a);
}

// One warp per cluster: how many tickets it has in the draw of donors; its mean is copied.
template <class A>
__global__ void __launch_bounds__(kThreads) tickets_of(KMeansSplit a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t clusters = a.entries * a.clusters;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp; i < clusters;
       i += gridDim.x * static_cast<int64_t>(kWarps)) {
    bool apart = false;
    for (int64_t d = lane; d < a.features; d += kWarp) {
      const A mean = static_cast<const A*>(a.means)[i * a.features + d];
      apart |= static_cast<const A*>(a.farthest)[i * a.features + d] - mean != 0;
      static_cast<A*>(a.centroids)[i * a.features + d] = mean;
    }
    apart = __any_sync(kAll, apart);
    if (lane == 0) {
      a.tickets[i] = apart && a.counts[i] > 1 ? a.counts[i] - 1 : 0;
      a.child[i] = a.clusters;
    }
  }
}

// One CTA per entry: running sums of the tickets, and the donor that each empty cluster draws.
__global__ void __launch_bounds__(kThreads) draw_donors(KMeansSplit a) {
  __shared__ int64_t running[kThreads];  // up to the end of each thread's share of the clusters
  const int64_t share = (a.clusters + kThreads - 1) / kThreads;
  for (int64_t e = blockIdx.x; e < a.entries; e += gridDim.x) {
    int64_t* tickets = a.tickets + e * a.clusters;
    const int64_t first = threadIdx.x * share, end = first + share < a.clusters ? first + share : a.clusters;
    int64_t sum = 0;
    for (int64_t k = first; k < end; ++k) sum += tickets[k];
    running[threadIdx.x] = sum;
    __syncthreads();
    for (int by = 1; by < kThreads; by *= 2) {
      const int64_t left = static_cast<int>(threadIdx.x) >= by ? running[threadIdx.x - by] : 0;
      __syncthreads();
      running[threadIdx.x] += left;
      __syncthreads();
    }
    int64_t before = running[threadIdx.x] - sum;
    for (int64_t k = first; k < end; ++k) tickets[k] = before += tickets[k];
    __syncthreads();
    const int64_t total = running[kThreads - 1];
    const uint64_t stream = split_stream(e % a.restarts, a.iteration);
    for (int64_t k = threadIdx.x; k < a.clusters && total > 0; k += kThreads) {
      if (a.counts[e * a.clusters + k] != 0) continue;
      const double uniform = philox_uniform(a.seed, stream, static_cast<uint64_t>(k));
      int64_t target = static_cast<int64_t>(mul(uniform, static_cast<double>(total)));
      target = target < total - 1 ? target : total - 1;
      int64_t donor = 0;  // the first whose running sum passes the target
      for (int64_t last = a.clusters - 1; donor < last;) {
        const int64_t middle = (donor + last) / 2;
        if (tickets[middle] > target) {
          last = middle;
        } else {
          donor = middle + 1;
        }
      }
      atomicMin(reinterpret_cast<long long*>(a.child) + e * a.clusters + donor, static_cast<long long>(k));
    }
    __syncthreads();
  }
}

// One warp per cluster: a donor and its child take their places on either side of the donor's mean.
template <class A>
__global__ void __launch_bounds__(kThreads) move(KMeansSplit a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t clusters = a.entries * a.clusters;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp; i < clusters;
       i += gridDim.x * static_cast<int64_t>(kWarps)) {
    if (a.child[i] == a.clusters) continue;
    const A* mean = static_cast<const A*>(a.means) + i * a.features;
    const A* far = static_cast<const A*>(a.farthest) + i * a.features;
    A* donor = static_cast<A*>(a.centroids) + i * a.features;
    A* child = static_cast<A*>(a.centroids) + (i / a.clusters * a.clusters + a.child[i]) * a.features;
    const A part = static_cast<A>(kSplitStep);
    bool apart = false;
    for (int64_t d = lane; d < a.features; d += kWarp) {
      const A step = mul(part, sub(far[d], mean[d]));
      apart |= add(mean[d], step) != sub(mean[d], step);
    }
    apart = __any_sync(kAll, apart);
    for (int64_t d = lane; d < a.features; d += kWarp) {
      // Where the step is lost in rounding the child takes the whole way.
      const A way = sub(far[d], mean[d]);
      child[d] = add(mean[d], apart ? mul(part, way) : way);
      donor[d] = apart ? sub(mean[d], mul(part, way)) : mean[d];
    }
  }
}

template <class A>
void split(const KMeansSplit& a, void* stream) {
  const int64_t grid = grid_for(divide_up(a.entries * a.clusters, kWarps));
  launch(tickets_of<A>, grid, kThreads, 0, stream, a);
  launch(draw_donors, grid_for(a.entries), kThreads, 0, stream, a);
  launch(move<A>, grid, kThreads, 0, stream, a);
}

}  // namespace

void kmeans_members(const KMeansMembers& a, void* stream) {
  a.dtype == DType::f64 ? members<double>(a, stream) : members<float>(a, stream);
}

void kmeans_split(const KMeansSplit& a, void* stream) {
  a.dtype == DType::f64 ? split<double>(a, stream) : split<float>(a, stream);
}

}  // namespace clustops::cuda
