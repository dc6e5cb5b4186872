// The k-means update: column bounds, exact sums by label, means.
//
// Every summand lies on a grid of a power of two that is coarse enough for fp64 to hold all partial sums exactly. So
// fp64 atomics, in whatever order they happen, give the same bits.
#include "element.h"
#include "kernels.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

constexpr int kBoundRows = 4096;  // rows of one block: enough that its atomics are few

// One CTA per kBoundRows rows of one problem: thread (r, c) takes rows r, r + height, .. and columns c, c + width, ..
// Magnitudes are compared as the integers of their bits, in which a NaN is above all numbers.
template <class T>
__global__ void __launch_bounds__(kThreads) bounds_of(KMeansBounds a, int64_t blocks, int width) {
  const KMeansRows& rows = a.rows;
  const int height = kThreads / width, column = threadIdx.x % width, first_row = threadIdx.x / width;
  for (int64_t unit = blockIdx.x; unit < rows.problems * blocks; unit += gridDim.x) {
    const int64_t b = unit / blocks, first = unit % blocks * kBoundRows;
    const int64_t end = first + kBoundRows < rows.rows ? first + kBoundRows : rows.rows;
    for (int64_t d = column; d <= rows.features; d += width) {
      double largest = 0;
      bool nan = false;
#pragma unroll 4
      for (int64_t n = first + first_row; n < end; n += height) {
        const double w = rows.weight(b, n);
        const double x = d < rows.features ? value_of(rows.template row<T>(b, n)[d]) : 1.0;
        const double magnitude = w <= 0 ? 0.0 : fabs(mul(w, x));
        nan |= magnitude != magnitude;
        largest = magnitude > largest ? magnitude : largest;
      }
      unsigned long long bits;
      memcpy(&bits, &largest, sizeof bits);
      if (nan) bits = 0x7ff8000000000000ull;
      if (bits) atomicMax(reinterpret_cast<unsigned long long*>(a.bounds) + b * (rows.features + 1) + d, bits);
    }
  }
}

constexpr int kSumRows = 1024;  // rows of one block, sorted by label there
constexpr int kColumns = 4;     // of one lane at a time, kWarp apart

// A row that comes to a cluster or leaves it: [cluster | row in the block | leaves], in the order of clusters.
constexpr int kClusterShift = 11;
static_assert(2 * kSumRows == 1 << kClusterShift, "row and direction fill the low bits");
constexpr unsigned long long kPadding = ~0ull;

__device__ void sort(unsigned long long* keys, int size) {
  for (int k = 2; k <= size; k *= 2) {
    for (int j = k / 2; j > 0; j /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = i / j * 2 * j + i % j, high = low + j;
        const unsigned long long one = keys[low], other = keys[high];
        if ((one > other) == ((low & k) == 0)) keys[low] = other, keys[high] = one;
      }
      __syncthreads();
    }
  }
}

// The two grids of a column, and the sums of one cluster on them so far.
struct Column {
  double unit, per_unit, finer, per_finer, high, low;

  __device__ void start(const double* grid, int64_t columns, int64_t d) {
    unit = grid[d], finer = grid[columns + d];
    per_unit = 1 / unit, per_finer = 1 / finer;  // exact: powers of two
    high = low = 0;
  }
  __device__ void add(double value) {
    const double part = mul(rint(mul(value, per_unit)), unit);
    high += part;
    const double rest = value - part;
    if (rest != 0) low += mul(rint(mul(rest, per_finer)), finer);
  }
};

// One CTA per kSumRows rows of one problem: the changes of its rows, sorted by cluster, are dealt to the warps, and a
// warp adds up each run of one cluster in registers, lane by column, before an atomic takes it to the result. So there
// are as many atomics as clusters in a block, however few or many clusters there are in all.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) sums_of(KMeansSums a, int64_t blocks) {
  constexpr int kAhead = sizeof(T) == 8 ? 2 : 4;  // rows whose elements are on their way at once
  __shared__ unsigned long long keys[2 * kSumRows];
  __shared__ double weight[kSumRows];
  __shared__ int size;
  const KMeansRows& rows = a.rows;
  const int64_t columns = rows.features + 1;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  for (int64_t unit = blockIdx.x; unit < rows.problems * blocks; unit += gridDim.x) {
    const int64_t b = unit / blocks, first = unit % blocks * kSumRows;
    if (threadIdx.x == 0) size = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < kSumRows && first + i < rows.rows; i += kThreads) {
      const int64_t n = b * rows.rows + first + i;
      const int64_t to = a.labels[n], from = a.before ? a.before[n] : -1;
      const double w = rows.weight(b, first + i);
      weight[i] = w;
      if (!(w > 0) || to == from) continue;
      for (int leaves = 0; leaves < 2; ++leaves) {
        const int64_t cluster = leaves ? from : to;
        if (cluster < 0 || cluster >= a.clusters) continue;
        const unsigned long long key = static_cast<unsigned long long>(cluster) << kClusterShift;
        keys[atomicAdd(&size, 1)] = key | static_cast<unsigned>(2 * i + leaves);
      }
    }
    __syncthreads();
    const int changes = size;
    int padded = 1;
    while (padded < changes) padded *= 2;
    for (int i = changes + threadIdx.x; i < padded; i += kThreads) keys[i] = kPadding;
    __syncthreads();
    sort(keys, padded);

    const int share = (changes + kThreads / kWarp - 1) / (kThreads / kWarp);
    const int begin = warp * share, end = begin + share < changes ? begin + share : changes;
    double* sums = a.sums + b * 2 * a.clusters * columns;
    for (int64_t d0 = 0; begin < end && d0 < columns; d0 += kColumns * kWarp) {
      Column column[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int64_t d = d0 + j * kWarp + lane;
        column[j].start(a.grid + b * 2 * columns, columns, d < columns ? d : columns - 1);
      }
      int64_t cluster = static_cast<int64_t>(keys[begin] >> kClusterShift);
      int count = 0;
      const auto flush = [&] {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int64_t d = d0 + j * kWarp + lane;
          double* sum = sums + cluster * columns + d;
          if (d < columns && column[j].high != 0) atomicAdd(sum, column[j].high);
          if (d < columns && column[j].low != 0) atomicAdd(sum + a.clusters * columns, column[j].low);
          column[j].high = column[j].low = 0;
        }
        if (d0 == 0 && lane == 0 && count != 0) {
          // Two's complement: a negative count adds as its unsigned twin.
          atomicAdd(reinterpret_cast<unsigned long long*>(a.counts) + b * a.clusters + cluster,
                    static_cast<unsigned long long>(static_cast<long long>(count)));
        }
        count = 0;
      };
      for (int e0 = begin; e0 < end; e0 += kAhead) {
        T x[kAhead][kColumns] = {};
#pragma unroll
        for (int e = 0; e < kAhead; ++e) {
          const int i = e0 + e < end ? e0 + e : end - 1;
          const int64_t n = first + static_cast<int64_t>(keys[i] >> 1 & (kSumRows - 1));
          const T* row = rows.template row<T>(b, n);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            const int64_t d = d0 + j * kWarp + lane;
            if (d < rows.features) x[e][j] = row[d];
          }
        }
#pragma unroll
        for (int e = 0; e < kAhead; ++e) {
          if (e0 + e >= end) break;
          const unsigned long long key = keys[e0 + e];
          const int64_t next = static_cast<int64_t>(key >> kClusterShift);
          if (next != cluster) flush();
          cluster = next;
          const bool leaves = key & 1;
          const double w = weight[key >> 1 & (kSumRows - 1)];
          count += leaves ? -1 : 1;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            const int64_t d = d0 + j * kWarp + lane;
            const double value = d < rows.features ? static_cast<double>(value_of(x[e][j])) : 1.0;
            if (d < columns) column[j].add(mul(leaves ? -w : w, value));
          }
        }
      }
      flush();
    }
    __syncthreads();  // before the next unit writes to shared memory
  }
}

constexpr int kCountRows = 4096;   // rows of one block
constexpr int kMaxShared = 4096;   // clusters whose counts fit in shared memory

// One CTA per kCountRows rows of one problem: counts in shared memory, or for many clusters, where few rows meet, in
// the result itself.
__global__ void __launch_bounds__(kThreads) counts_of(KMeansCounts a, int64_t blocks) {
  __shared__ int found[kMaxShared];
  const bool shared = a.clusters <= kMaxShared;
  for (int64_t unit = blockIdx.x; unit < a.problems * blocks; unit += gridDim.x) {
    const int64_t b = unit / blocks, first = unit % blocks * kCountRows;
    auto* counts = reinterpret_cast<unsigned long long*>(a.counts) + b * a.clusters;
    for (int64_t k = threadIdx.x; shared && k < a.clusters; k += kThreads) found[k] = 0;
    __syncthreads();
    for (int64_t n = first + threadIdx.x; n < first + kCountRows && n < a.rows; n += kThreads) {
      const int64_t k = a.labels[b * a.rows + n];
      const double w = a.weights[b * a.weight_problem_stride + n * a.weight_row_stride];
      if (!(w > 0) || k < 0 || k >= a.clusters) continue;
      if (shared) {
        atomicAdd(&found[k], 1);
      } else {
        atomicAdd(counts + k, 1ull);
      }
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; shared && k < a.clusters; k += kThreads) {
      if (found[k]) atomicAdd(counts + k, static_cast<unsigned long long>(found[k]));
    }
    __syncthreads();
  }
}

// The sum of one value of each thread, in a fixed order; thread 0 has it.
__device__ double block_sum(double value) {
  __shared__ double parts[kThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = parts[0];
  __syncthreads();
  return sum;
}

// One CTA per kMeansBlock elements of one problem's means; their part of the shift goes to the workspace.
template <class T>
__global__ void __launch_bounds__(kThreads) means_of(KMeansMeans a, int64_t blocks) {
  const int64_t elements = a.clusters * a.features, columns = a.features + 1;
  for (int64_t unit = blockIdx.x; unit < a.problems * blocks; unit += gridDim.x) {
    const int64_t b = unit / blocks, first = unit % blocks * kMeansBlock;
    const double* high = a.sums + b * 2 * a.clusters * columns;
    const double* low = high + a.clusters * columns;
    double shift = 0;
    for (int64_t i = first + threadIdx.x; i < first + kMeansBlock && i < elements; i += kThreads) {
      const int64_t k = i / a.features, at = k * columns + i % a.features, last = k * columns + a.features;
      const double mass = high[last] + low[last];
      const T before = static_cast<const T*>(a.previous)[b * elements + i];
      const T mean = mass > 0 ? static_cast<T>((high[at] + low[at]) / mass) : before;
      static_cast<T*>(a.means)[b * elements + i] = mean;
      const double moved = static_cast<double>(mean) - static_cast<double>(before);
      shift += moved * moved;
    }
    shift = block_sum(shift);
    if (threadIdx.x == 0) a.workspace[unit] = shift;
  }
}

// One CTA per problem.
__global__ void __launch_bounds__(kThreads) total_shift(KMeansMeans a, int64_t blocks) {
  for (int64_t b = blockIdx.x; b < a.problems; b += gridDim.x) {
    double shift = 0;
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads) shift += a.workspace[b * blocks + i];
    shift = block_sum(shift);
    if (threadIdx.x == 0) a.shift[b] = shift;
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void kmeans_bounds(const KMeansBounds& a, void* stream) {
  const int64_t blocks = divide_up(a.rows.rows, kBoundRows);
  int width = 1;
  while (width < kThreads && width < a.rows.features) width *= 2;
  clear(a.bounds, sizeof(double) * a.rows.problems * (a.rows.features + 1), stream);
  with_element(a.rows.dtype, [&](auto x) {
    launch(bounds_of<decltype(x)>, grid_for(a.rows.problems * blocks), kThreads, 0, stream, a, blocks, width);
  });
}

void kmeans_sums(const KMeansSums& a, void* stream) {
  const int64_t blocks = divide_up(a.rows.rows, kSumRows), problems = a.rows.problems;
  with_element(a.rows.dtype, [&](auto x) {
    launch(sums_of<decltype(x)>, grid_for(problems * blocks), kThreads, 0, stream, a, blocks);
  });
}

void kmeans_counts(const KMeansCounts& a, void* stream) {
  const int64_t blocks = divide_up(a.rows, kCountRows);
  clear(a.counts, sizeof(int64_t) * a.problems * a.clusters, stream);
  launch(counts_of, grid_for(a.problems * blocks), kThreads, 0, stream, a, blocks);
}

void kmeans_means(const KMeansMeans& a, void* stream) {
  const int64_t blocks = kmeans_means_blocks(a.clusters * a.features);
  const int64_t grid = grid_for(a.problems * blocks);
  if (a.dtype == DType::f64) {
    launch(means_of<double>, grid, kThreads, 0, stream, a, blocks);
  } else {
    launch(means_of<float>, grid, kThreads, 0, stream, a, blocks);
  }
  launch(total_shift, grid_for(a.problems), kThreads, 0, stream, a, blocks);
}

}  // namespace clustops::cuda
