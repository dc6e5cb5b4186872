// Whole iterations of k-means for problems that fit in the shared memory of one CTA: rows are read once.
//
// Scores x.c - ||c||^2 / 2 come from tensor cores with operands of two bf16 parts. A score is known up to a bound; where
// the two best come closer than that, ||x - c||^2 in fp32 decides. Sums by cluster are exact (kmeans_update.cu), so a
// row that changes its cluster leaves one sum and joins another, and once no row does, nothing will change any more.
#include "../common/kmeans_split.h"
#include "../common/philox.h"
#include "element.h"
#include "kernels.h"
#include "kmeans_leader.h"
#include "mma.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kTiles = 4;  // of 8 centroids, whose scores a warp holds at once
constexpr int kPad = 8;    // keeps neighbouring rows of 16-bit numbers in different banks

constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Where things lie in shared memory, in bytes.
struct Layout {
  int n, d, k, n16, d16, k8, stride;  // stride: of rows of x and of parts of centroids, in elements
  int x, parts, now, next, half_norms, sums, grid, weights, norms, labels, before, own, counts, farthest, tickets, child;
  int64_t bytes;

  Layout(int64_t rows, int64_t features, int64_t clusters, int64_t element)
      : n(static_cast<int>(rows)), d(static_cast<int>(features)), k(static_cast<int>(clusters)) {
    n16 = round_up(n, 16), d16 = round_up(d, 16), k8 = round_up(k, 8), stride = d16 + kPad;
    bytes = 0;
    const auto next_of = [&](int64_t size) {
      const int64_t at = bytes;
      bytes = (bytes + size + 15) / 16 * 16;
      return static_cast<int>(at);
    };
    x = next_of(element * n16 * stride);
    parts = next_of(int64_t{2} * 2 * k8 * stride);
    now = next_of(int64_t{4} * k * (d + 1)), next = next_of(int64_t{4} * k * (d + 1));
    half_norms = next_of(int64_t{4} * k8);
    sums = next_of(int64_t{2} * 8 * k * (d + 1)), grid = next_of(int64_t{4} * 8 * (d + 1));
    weights = next_of(int64_t{8} * n), norms = next_of(int64_t{4} * n);
    labels = next_of(int64_t{4} * n), before = next_of(int64_t{4} * n), own = next_of(int64_t{4} * n);
    counts = next_of(int64_t{4} * k), farthest = next_of(int64_t{4} * k);
    tickets = next_of(int64_t{4} * k), child = next_of(int64_t{4} * k);
  }
};

// Sizes at which offsets cannot overflow; what fits in shared memory is far smaller.
constexpr int64_t kMaxSize = 1 << 15;

struct Flags {
  int moved, empty, plain, shifted, repaired;
  unsigned largest_norm;  // bits of a float that is not negative
};

__device__ double warp_sum(double value) {
  for (int by = kWarp / 2; by > 0; by /= 2) value += __shfl_xor_sync(kAll, value, by);
  return value;
}
__device__ bool any(bool value) { return __any_sync(kAll, value) != 0; }

// Features d and d + 1 of a row as bf16 pairs: what they round to, and what that leaves.
__device__ void parts_of(const float* row, int d, uint32_t& first, uint32_t& second) {
  const float low = row[d], high = row[d + 1];
  first = pack_bf16(low, high);
  second = pack_bf16(low - value_of(Bf16{static_cast<uint16_t>(first & 0xffff)}),
                     high - value_of(Bf16{static_cast<uint16_t>(first >> 16)}));
}
__device__ void parts_of(const F16* row, int d, uint32_t& first, uint32_t& second) {
  const float both[2] = {value_of(row[d]), value_of(row[d + 1])};
  parts_of(both, 0, first, second);
}
__device__ void parts_of(const Bf16* row, int d, uint32_t& first, uint32_t& second) {
  first = row[d].bits | static_cast<uint32_t>(row[d + 1].bits) << 16;
  second = 0;
}

// What one CTA knows of its entry. Every member function is called by all threads and ends with a barrier.
template <class T>
struct Entry {
  static constexpr bool kTwoParts = sizeof(T) == 4 || std::is_same<T, F16>::value;

  const Layout& at;
  unsigned char* memory;
  Flags& flags;
  int lane, warp;
  float *now, *next;  // centroids [k, d + 1]: the last column only keeps columns in different banks

  template <class U>
  __device__ U* part(int offset) const {
    return reinterpret_cast<U*>(memory + offset);
  }
  __device__ T* row(int n) const { return part<T>(at.x) + n * at.stride; }
  __device__ int* labels() const { return part<int>(at.labels); }
  __device__ int* before() const { return part<int>(at.before); }
  __device__ int* counts() const { return part<int>(at.counts); }
  __device__ int* child() const { return part<int>(at.child); }
  __device__ double* weights() const { return part<double>(at.weights); }
  __device__ double* high(int c) const { return part<double>(at.sums) + c * (at.d + 1); }
  __device__ double* low(int c) const { return high(at.k + c); }
  __device__ float* centroid(float* of, int c) const { return of + c * (at.d + 1); }

  // Rows, weights, grid and centroids into shared memory; no sums, no labels yet.
  __device__ void load(const KMeansIterate& a, int64_t b, int64_t e, bool wide) {
    const T* source = a.rows.template row<T>(b, 0);
    constexpr int kWide = 16 / sizeof(T);
    const int per_row = at.d / kWide;
    if (wide) {
      for (int i = threadIdx.x; i < at.n * per_row; i += kThreads) {
        const int n = i / per_row, d = i % per_row * kWide;
        copy_async(row(n) + d, source + n * a.rows.row_stride + d);
      }
      commit_copies();
    } else {
      for (int n = warp; n < at.n; n += kWarps) {
        for (int d = lane; d < at.d; d += kWarp) row(n)[d] = source[n * a.rows.row_stride + d];
      }
    }
    for (int n = warp; n < at.n16; n += kWarps) {  // zero past the ends
      for (int d = (n < at.n ? at.d : 0) + lane; d < at.d16; d += kWarp) row(n)[d] = T{};
    }
    for (int n = threadIdx.x; n < at.n; n += kThreads) {
      weights()[n] = a.rows.weight(b, n);
      before()[n] = -1;
    }
    double* grid = part<double>(at.grid);
    for (int d = threadIdx.x; d <= at.d; d += kThreads) {
      const double unit = a.grid[b * 2 * (at.d + 1) + d], finer = a.grid[(b * 2 + 1) * (at.d + 1) + d];
      grid[4 * d] = unit, grid[4 * d + 1] = 1 / unit, grid[4 * d + 2] = finer, grid[4 * d + 3] = 1 / finer;
    }
    for (int i = threadIdx.x; i < 2 * at.k * (at.d + 1); i += kThreads) part<double>(at.sums)[i] = 0;
    for (int c = warp; c < at.k; c += kWarps) {
      if (lane == 0) counts()[c] = 0;
      for (int d = lane; d < at.d; d += kWarp) centroid(now, c)[d] = a.centroids[(e * at.k + c) * at.d + d];
    }
    if (threadIdx.x == 0) flags = Flags{0, 0, 1, 0, 0, 0};
    wait_for_copies<0>();
    __syncthreads();
  }

  // Norms of rows, and whether all rows of positive weight are on the coarse grid as they are and weigh 1.
  __device__ void look() {
    const double* grid = part<double>(at.grid);
    constexpr float kOneUlp = sizeof(T) == 4 ? 0x1p23f : std::is_same<T, F16>::value ? 0x1p10f : 0x1p7f;
    for (int n = threadIdx.x; n < at.n; n += kThreads) {
      float sum = 0;
      bool plain = weights()[n] == 1;
      for (int d = 0; d < at.d; ++d) {
        const float x = value_of(row(n)[d]);
        sum += x * x;
        // A multiple of its own last place, which is at least the unit.
        plain &= x == 0 || static_cast<double>(fabsf(x)) >= grid[4 * d] * kOneUlp;
      }
      part<float>(at.norms)[n] = sqrtf(sum) * (1 + 0x1p-10f);  // rounded up
      if (!plain && weights()[n] > 0) flags.plain = 0;
    }
    __syncthreads();
  }

  // Centroids as bf16 parts, with the halves of their squared norms.
  __device__ void pack() {
    if (threadIdx.x == 0) flags.largest_norm = 0;
    __syncthreads();
    for (int c = warp; c < at.k8; c += kWarps) {
      auto* first = part<uint16_t>(at.parts) + c * at.stride;
      auto* second = first + at.k8 * at.stride;
      double sum = 0;
      for (int d = 2 * lane; d < at.d16; d += 2 * kWarp) {
        const bool inside = c < at.k && d < at.d, both = c < at.k && d + 1 < at.d;
        const float pair[2] = {inside ? centroid(now, c)[d] : 0.0f, both ? centroid(now, c)[d + 1] : 0.0f};
        uint32_t one, other;
        parts_of(pair, 0, one, other);
        memcpy(first + d, &one, sizeof one);
        memcpy(second + d, &other, sizeof other);
        sum += static_cast<double>(pair[0]) * pair[0] + static_cast<double>(pair[1]) * pair[1];
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        part<float>(at.half_norms)[c] = c < at.k ? static_cast<float>(-0.5 * sum) : -INFINITY;
        const float norm = static_cast<float>(sqrt(sum)) * (1 + 0x1p-10f);
        unsigned bits;
        memcpy(&bits, &norm, sizeof bits);
        atomicMax(&flags.largest_norm, bits & 0x7fffffffu);
      }
    }
    __syncthreads();
  }

  // Twice the bound on the error of a score. A part of a bf16 pair is within 2^-8 of what it stands for, so the products
  // left out are within 3 x 2^-16 of |x| |c|, with x of one part a third of that. At most 3 D sums, each within 2^-23 of
  // the magnitudes so far, a tenth more for the carries within a matrix instruction; the half norm and its sum.
  __device__ float slack(float x, float c) const {
    const float left_out = (kTwoParts ? 3.1f : 1.1f) * 0x1p-16f * x * c;
    const float sums = 1.1f * 0x1p-23f * static_cast<float>(3 * at.d16 + 8) * (1.02f * x * c + 0.5f * c * c);
    return 2.02f * (left_out + sums) + static_cast<float>(at.d16) * 0x1p-120f;
  }

  // ||x - c||^2 in fp32.
  __device__ float distance(int n, const float* c) const {
    float sum = 0;
    for (int d = 0; d < at.d; ++d) {
      const float e = value_of(row(n)[d]) - c[d];
      sum = fmaf(e, e, sum);
    }
    return sum;
  }

  // A warp finds the nearest of all centroids; the lowest of equals, 0 where no distance is a number.
  __device__ int nearest(int n) const {
    float least = INFINITY;
    int best = at.k;
    for (int c = lane; c < at.k; c += kWarp) {
      const float found = distance(n, centroid(now, c));
      if (found < least || (found == least && c < best)) least = found, best = c;
    }
    for (int by = kWarp / 2; by > 0; by /= 2) {
      const float other = __shfl_xor_sync(kAll, least, by);
      const int index = __shfl_xor_sync(kAll, best, by);
      if (other < least || (other == least && index < best)) least = other, best = index;
    }
    return best < at.k ? best : 0;
  }

  // Scores of rows first + lane / 4 and + 8 with the centroids of kTiles tiles from c0 on.
  __device__ void score(int first, int c0, float (&sum)[kTiles][4]) const {
    const T* one = row(first + lane / 4);
    const T* other = row(first + lane / 4 + 8);
    const auto* parts = part<uint16_t>(at.parts) + lane / 16 * at.k8 * at.stride + lane / 8 % 2 * 8;
    for (int d0 = 0; d0 < at.d16; d0 += 16) {
      const int d = d0 + lane % 4 * 2;
      uint32_t x1[4], x2[4];
      parts_of(one, d, x1[0], x2[0]), parts_of(other, d, x1[1], x2[1]);
      parts_of(one, d + 8, x1[2], x2[2]), parts_of(other, d + 8, x1[3], x2[3]);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (c0 + 8 * t >= at.k8) break;
        uint32_t c[4];  // two of the first parts, two of the second
        load_matrices(c, parts + (c0 + 8 * t + lane % 8) * at.stride + d0);
        multiply_add(sum[t], x1, c[2], c[3]);
        if (kTwoParts) multiply_add(sum[t], x2, c[0], c[1]);
        multiply_add(sum[t], x1, c[0], c[1]);
      }
    }
  }

  // Labels of 16 rows a warp at a time.
  __device__ void assign() {
    float largest;
    memcpy(&largest, &flags.largest_norm, sizeof largest);
    const float* half_norms = part<float>(at.half_norms);
    for (int first = 16 * warp; first < at.n; first += 16 * kWarps) {
      Leader leader[2];
      for (int c0 = 0; c0 < at.k8; c0 += 8 * kTiles) {
        float sum[kTiles][4] = {};
        score(first, c0, sum);
        float scores[2][2 * kTiles];
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          const int c = c0 + 8 * (i / 2) + lane % 4 * 2 + i % 2;
          const float half_norm = c < at.k8 ? half_norms[c] : -INFINITY;
          scores[0][i] = sum[i / 2][i % 2] + half_norm, scores[1][i] = sum[i / 2][2 + i % 2] + half_norm;
        }
        leader[0].take(scores[0], c0 + lane % 4 * 2), leader[1].take(scores[1], c0 + lane % 4 * 2);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        for (int by = 1; by < 4; by *= 2) {
          leader[r].merge({__shfl_xor_sync(kAll, leader[r].score, by), __shfl_xor_sync(kAll, leader[r].second, by),
                           __shfl_xor_sync(kAll, leader[r].index, by)});
        }
        const int n = first + lane / 4 + 8 * r;
        const bool mine = lane % 4 == 0 && n < at.n;
        const float margin = leader[r].score - leader[r].second;
        const bool close = mine && !(margin > slack(part<float>(at.norms)[n < at.n ? n : 0], largest));
        if (mine && !close) labels()[n] = leader[r].index;
        for (unsigned left = __ballot_sync(kAll, close); left; left &= left - 1) {
          const int at_row = first + (__ffs(static_cast<int>(left)) - 1) / 4 + 8 * r, found = nearest(at_row);
          if (lane == 0) labels()[at_row] = found;
        }
      }
    }
    __syncthreads();
  }

  // A warp adds a row to the sums of a cluster, or takes it away.
  __device__ void add(int n, int c, bool leaves, bool plain) const {
    const double w = leaves ? -weights()[n] : weights()[n];
    const double* grid = part<double>(at.grid);
    for (int d = lane; d <= at.d; d += kWarp) {
      const double x = d < at.d ? static_cast<double>(value_of(row(n)[d])) : 1.0;
      if (plain) {
        high(c)[d] += leaves ? -x : x;
        continue;
      }
      const double value = mul(w, x), on_grid = mul(rint(mul(value, grid[4 * d + 1])), grid[4 * d]);
      high(c)[d] += on_grid;
      const double rest = value - on_grid;
      if (rest != 0) low(c)[d] += mul(rint(mul(rest, grid[4 * d + 3])), grid[4 * d + 2]);
    }
    if (lane == 0) counts()[c] += leaves ? -1 : 1;
  }

  // Sums after the rows that changed their cluster. Clusters belong to warps, so that no two write to one sum.
  __device__ void update() {
    if (threadIdx.x == 0) flags.moved = flags.empty = 0;
    __syncthreads();
    const bool plain = flags.plain;
    for (int first = 0; first < at.n; first += kWarp) {
      const int n = first + lane;
      const bool counted = n < at.n && weights()[n] > 0;
      const int to = counted ? labels()[n] : -1, from = counted ? before()[n] : -1;
      const bool changed = to != from;
      for (int leaves = 0; leaves < 2; ++leaves) {
        const int c = leaves ? from : to;
        for (unsigned left = __ballot_sync(kAll, changed && c >= 0 && c % kWarps == warp); left; left &= left - 1) {
          const int j = __ffs(static_cast<int>(left)) - 1;
          add(first + j, __shfl_sync(kAll, c, j), leaves, plain);
        }
      }
      if (any(changed) && lane == 0) flags.moved = 1;
    }
    __syncthreads();
    for (int n = threadIdx.x; n < at.n; n += kThreads) before()[n] = weights()[n] > 0 ? labels()[n] : -1;
    for (int c = threadIdx.x; c < at.k; c += kThreads) {
      if (counts()[c] == 0) flags.empty = 1;
    }
    __syncthreads();
  }

  // A warp gives `c` norm 1 unless it has that or is zero; returns whether it has a direction.
  __device__ bool normalise(float* c) const {
    double sum = 0;
    bool some = false;
    for (int d = lane; d < at.d; d += kWarp) {
      sum += static_cast<double>(c[d]) * c[d];
      some |= c[d] != 0;
    }
    const double norm = sqrt(warp_sum(sum));
    const bool keep = norm == 0 || fabs(norm - 1) <= 0x1p-23;
    for (int d = lane; d < at.d && !keep; d += kWarp) c[d] = static_cast<float>(c[d] / norm);
    return any(some);
  }

  __device__ void average(bool cosine) {
    for (int c = warp; c < at.k; c += kWarps) {
      const double mass = high(c)[at.d] + low(c)[at.d];
      float* mean = centroid(next, c);
      for (int d = lane; d < at.d; d += kWarp) {
        mean[d] = mass > 0 ? static_cast<float>((high(c)[d] + low(c)[d]) / mass) : centroid(now, c)[d];
      }
      __syncwarp();
      if (cosine && !normalise(mean)) {
        for (int d = lane; d < at.d; d += kWarp) mean[d] = centroid(now, c)[d];
      }
    }
    __syncthreads();
  }

  // Which clusters may be split, by how many tickets, and at which row: the farthest one from the centroid that it had.
  __device__ void draw_donors(uint64_t seed, uint64_t stream) {
    float* own = part<float>(at.own);
    int *farthest = part<int>(at.farthest), *tickets = part<int>(at.tickets);
    for (int n = threadIdx.x; n < at.n; n += kThreads) {
      own[n] = before()[n] < 0 ? 0.0f : distance(n, centroid(now, before()[n]));
    }
    __syncthreads();
    for (int c = threadIdx.x; c < at.k; c += kThreads) {
      int found = -1;
      for (int n = 0; n < at.n; ++n) {
        if (before()[n] == c && (found < 0 || own[n] > own[found])) found = n;
      }
      bool divisible = false;
      for (int d = 0; d < at.d && counts()[c] > 1; ++d) {
        divisible |= value_of(row(found)[d]) != centroid(next, c)[d];
      }
      farthest[c] = found, tickets[c] = divisible ? counts()[c] - 1 : 0, child()[c] = at.k;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int c = 1; c < at.k; ++c) tickets[c] += tickets[c - 1];
    }
    __syncthreads();
    const int total = tickets[at.k - 1];
    for (int c = threadIdx.x; c < at.k && total > 0; c += kThreads) {
      if (counts()[c] != 0) continue;
      int target = static_cast<int>(mul(philox_uniform(seed, stream, static_cast<uint64_t>(c)), total));
      target = target < total - 1 ? target : total - 1;
      int donor = 0;
      while (tickets[donor] <= target) ++donor;
      atomicMin(&child()[donor], c);
    }
    __syncthreads();
  }

  // Donors and their children stand on either side of the donor's mean.
  __device__ void split(bool cosine) {
    for (int donor = warp; donor < at.k; donor += kWarps) {
      if (child()[donor] == at.k) continue;
      float *one = centroid(next, donor), *other = centroid(next, child()[donor]);
      const T* far = row(part<int>(at.farthest)[donor]);
      bool apart = false;
      for (int d = lane; d < at.d; d += kWarp) {
        const float step = mul(kSplitStep, sub(value_of(far[d]), one[d]));
        apart |= sub(one[d], step) != cuda::add(one[d], step);
      }
      apart = any(apart);
      for (int d = lane; d < at.d; d += kWarp) {
        // Where the step is lost in rounding the child takes the whole way.
        const float way = sub(value_of(far[d]), one[d]), mean = one[d];
        other[d] = cuda::add(mean, apart ? mul(kSplitStep, way) : way);
        one[d] = apart ? sub(mean, mul(kSplitStep, way)) : mean;
      }
      __syncwarp();
      if (cosine) normalise(one), normalise(other);
      if (lane == 0) atomicAdd(&flags.repaired, 1);
    }
    __syncthreads();
  }

  // The new centroids become the current ones; returns whether any differs.
  __device__ bool advance() {
    if (threadIdx.x == 0) flags.shifted = 0;
    __syncthreads();
    for (int c = warp; c < at.k; c += kWarps) {
      bool differs = false;
      for (int d = lane; d < at.d; d += kWarp) differs |= centroid(next, c)[d] != centroid(now, c)[d];
      if (any(differs) && lane == 0) flags.shifted = 1;
    }
    __syncthreads();
    float* last = now;
    now = next, next = last;
    return flags.shifted;
  }
};

// One CTA per entry.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) iterate(KMeansIterate a, Layout at, bool wide) {
  CLUSTOPS_DYNAMIC_SHARED(memory);
  __shared__ Flags flags;
  const int64_t restarts = a.entries / a.rows.problems;
  for (int64_t e = blockIdx.x; e < a.entries; e += gridDim.x) {
    Entry<T> entry{at,
                   memory,
                   flags,
                   static_cast<int>(threadIdx.x % kWarp),
                   static_cast<int>(threadIdx.x / kWarp),
                   reinterpret_cast<float*>(memory + at.now),
                   reinterpret_cast<float*>(memory + at.next)};
    entry.load(a, e / restarts, e, wide);
    entry.look();
    bool shifted = true;
    for (int64_t i = 0; i < a.iterations; ++i) {
      entry.pack();
      entry.assign();
      entry.update();
      const bool acts = a.split && flags.empty;
      // So it stays. (A split fills a cluster or leaves it empty: after one, a row moves or the next one acts.)
      if (!flags.moved && !acts && i > 0) {
        shifted = false;
        break;
      }
      entry.average(a.cosine);
      if (acts) {
        entry.draw_donors(a.seed, split_stream(e % restarts, i));
        entry.split(a.cosine);
      }
      shifted = entry.advance();
    }
    for (int c = entry.warp; c < at.k; c += kWarps) {
      for (int d = entry.lane; d < at.d; d += kWarp) {
        a.result[(e * at.k + c) * at.d + d] = entry.centroid(entry.now, c)[d];
      }
    }
    for (int n = threadIdx.x; n < at.n; n += kThreads) a.labels[e * at.n + n] = entry.labels()[n];
    if (threadIdx.x == 0) a.repaired[e] = flags.repaired, a.still[e] = shifted ? 0 : 1;
    __syncthreads();  // before the next entry writes to shared memory
  }
}

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace

bool kmeans_iterate_fits(int64_t rows, int64_t features, int64_t clusters, DType dtype) {
  if (dtype == DType::f64 || rows < 1 || clusters < 1 || rows > kMaxSize || features > kMaxSize || clusters > kMaxSize) {
    return false;
  }
  return Layout(rows, features, clusters, element_size(dtype)).bytes + static_cast<int64_t>(sizeof(Flags)) + 16 <=
         most_shared();
}

void kmeans_iterate(const KMeansIterate& a, void* stream) {
  if (a.entries == 0) return;
  if (!kmeans_iterate_fits(a.rows.rows, a.rows.features, a.clusters, a.rows.dtype)) {
    throw std::invalid_argument("a problem must fit in the shared memory of a block");
  }
  with_element(a.rows.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (!std::is_same<T, double>::value) {
      const Layout at(a.rows.rows, a.rows.features, a.clusters, sizeof(T));
      const auto aligned = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
      const bool wide = reinterpret_cast<uintptr_t>(a.rows.x) % 16 == 0 && aligned(a.rows.features) &&
                        aligned(a.rows.row_stride) && aligned(a.rows.problem_stride);
      launch(iterate<T>, grid_for(a.entries), kThreads, static_cast<std::size_t>(at.bytes), stream, a, at, wide);
    }
  });
}

}  // namespace clustops::cuda
