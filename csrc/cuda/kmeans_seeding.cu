// Greedy k-means++: rows drawn by integer potentials, of which any order of additions gives the same sums.
#include "element.h"
#include "kernels.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kSeedRows = 1024;  // rows of one partial sum of potentials

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// sum + (x - c)^2: the same bits wherever a distance is computed, as long as features come in ascending order.
__device__ float add_square(float x, float c, float sum) {
  const float e = x - c;
  return fmaf(e, e, sum);
}
__device__ double add_square(double x, double c, double sum) {
  const double e = x - c;
  return fma(e, e, sum);
}

__device__ int64_t integer(double value, double weight, double scale) {
  return weight > 0 ? static_cast<int64_t>(rint(mul(mul(value, weight), scale))) : 0;
}

// The power of two that makes n numbers in [0, bound] integers with a sum below 2^62.
__device__ double integer_scale(double bound, int64_t n) {
  int e, c;
  frexp(bound, &e);
  frexp(static_cast<double>(n), &c);
  const int exponent = 62 - c - e;
  return ldexp(1.0, exponent < -1022 ? -1022 : exponent > 1023 ? 1023 : exponent);
}

__device__ int64_t warp_sum(int64_t value) {
  for (int by = kWarp / 2; by > 0; by /= 2) value += __shfl_xor_sync(kAll, value, by);
  return value;
}

__device__ unsigned long long warp_max(unsigned long long value) {
  for (int by = kWarp / 2; by > 0; by /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAll, value, by);
    value = other > value ? other : value;
  }
  return value;
}

__device__ void add_to(int64_t* total, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(value));
}

// Where a whole start keeps what it knows, of entries [e].
template <class A>
struct State {
  KMeansSeed a;
  int64_t blocks;
  unsigned long long* bound;  // [e]: bits of the largest weighted distance
  int64_t* valid;             // [e]: rows of positive weight
  int64_t* total;             // [e]: the potential
  int64_t* best;              // [e]: the candidate taken, -1 for none
  double* scale;              // [e]
  int64_t* picked;            // [e, trials]: rows drawn
  int64_t* after;             // [e, trials]: the potential with each of them
  int64_t* partial;           // [e, blocks]
  A* candidates;              // [e, trials, features]
  A* closest;                 // [e, rows]
  int32_t* improves;          // [e, rows]

  // Returns the 64-bit words that it takes.
  int64_t place(const KMeansSeed& seed) {
    a = seed;
    blocks = divide_up(a.rows.rows, kSeedRows);
    int64_t words = 0;
    const auto next = [&](auto*& pointer, int64_t count) {
      using Item = std::remove_reference_t<decltype(*pointer)>;
      pointer = a.workspace ? reinterpret_cast<Item*>(static_cast<int64_t*>(a.workspace) + words) : nullptr;
      words += divide_up(count * static_cast<int64_t>(sizeof(Item)), 8);
    };
    const int64_t e = a.entries;
    next(bound, e), next(valid, e), next(total, e), next(best, e), next(scale, e);
    next(picked, e * a.trials), next(after, e * a.trials), next(partial, e * blocks);
    next(candidates, e * a.trials * a.rows.features), next(closest, e * a.rows.rows), next(improves, e * a.rows.rows);
    return words;
  }
  __device__ int64_t problem(int64_t e) const { return e / (a.entries / a.rows.problems); }
};

// One thread a row: lowers its closest distance to that of a centroid.
template <class T, class A>
__device__ A lowered(const T* x, const A* centroid, int64_t features, A closest) {
  A distance = 0;
  for (int64_t d = 0; d < features; ++d) distance = add_square(value_of(x[d]), centroid[d], distance);
  return distance < closest ? distance : closest;
}

// One CTA per kSeedRows rows of one entry. Step 0: every row is as close as any other. Later: takes the last step's
// centroid in. Then the largest weighted distance, compared as the integers of its bits.
template <class T, class A>
__global__ void __launch_bounds__(kThreads) bound_of(State<A> s, int64_t step) {
  __shared__ unsigned long long largest;
  __shared__ unsigned long long valid;
  const KMeansRows& rows = s.a.rows;
  for (int64_t unit = blockIdx.x; unit < s.a.entries * s.blocks; unit += gridDim.x) {
    const int64_t e = unit / s.blocks, first = unit % s.blocks * kSeedRows, b = s.problem(e);
    if (threadIdx.x == 0) largest = valid = 0;
    __syncthreads();
    unsigned long long mine = 0;
    int64_t some = 0;
    const int64_t taken = step == 0 ? -1 : s.best[e];
    const A* centroid = s.candidates + (e * s.a.trials + (taken < 0 ? 0 : taken)) * rows.features;
    for (int64_t n = first + threadIdx.x; n < first + kSeedRows && n < rows.rows; n += kThreads) {
      A& closest = s.closest[e * rows.rows + n];
      if (step == 0) {
        closest = 1;
      } else if (step == 1) {
        closest = lowered(rows.template row<T>(b, n), centroid, rows.features, static_cast<A>(INFINITY));
      } else if (taken >= 0 && (static_cast<uint32_t>(s.improves[e * rows.rows + n]) >> taken & 1)) {
        closest = lowered(rows.template row<T>(b, n), centroid, rows.features, closest);
      }
      const double w = rows.weight(b, n), weighted = w > 0 ? mul(static_cast<double>(closest), w) : 0.0;
      unsigned long long bits;
      memcpy(&bits, &weighted, sizeof bits);
      mine = bits > mine ? bits : mine;
      some += w > 0;
    }
    mine = warp_max(mine), some = warp_sum(some);
    if (threadIdx.x % kWarp == 0) {
      atomicMax(&largest, mine);
      atomicAdd(&valid, static_cast<unsigned long long>(some));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      atomicMax(s.bound + e, largest);
      if (step == 0) add_to(s.valid + e, static_cast<int64_t>(valid));
    }
    __syncthreads();
  }
}

// One CTA per kSeedRows rows of one entry: their part of the potential.
template <class A>
__global__ void __launch_bounds__(kThreads) partial_sums(State<A> s) {
  __shared__ unsigned long long sum;
  const KMeansRows& rows = s.a.rows;
  for (int64_t unit = blockIdx.x; unit < s.a.entries * s.blocks; unit += gridDim.x) {
    const int64_t e = unit / s.blocks, first = unit % s.blocks * kSeedRows, b = s.problem(e);
    double bound;
    memcpy(&bound, s.bound + e, sizeof bound);
    const double scale = integer_scale(bound, s.valid[e]);
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    int64_t mine = 0;
    for (int64_t n = first + threadIdx.x; n < first + kSeedRows && n < rows.rows; n += kThreads) {
      mine += integer(s.closest[e * rows.rows + n], rows.weight(b, n), scale);
    }
    mine = warp_sum(mine);
    if (threadIdx.x % kWarp == 0) atomicAdd(&sum, static_cast<unsigned long long>(mine));
    __syncthreads();
    if (threadIdx.x == 0) s.partial[unit] = static_cast<int64_t>(sum);
    if (threadIdx.x == 0 && unit % s.blocks == 0) s.scale[e] = scale;
    __syncthreads();
  }
}

// The first row of a block at which the running potential passes `target`; a warp works together.
template <class A>
__device__ int64_t row_at(const State<A>& s, int64_t e, int64_t block, int64_t running, int64_t target) {
  const KMeansRows& rows = s.a.rows;
  const int lane = threadIdx.x % kWarp;
  const int64_t end = block * kSeedRows + kSeedRows < rows.rows ? block * kSeedRows + kSeedRows : rows.rows;
  for (int64_t first = block * kSeedRows; first < end; first += kWarp) {
    const int64_t n = first + lane;
    int64_t sum = n < end ? integer(s.closest[e * rows.rows + n], rows.weight(s.problem(e), n), s.scale[e]) : 0;
    for (int by = 1; by < kWarp; by *= 2) {
      const int64_t left = __shfl_up_sync(kAll, sum, by);
      if (lane >= by) sum += left;
    }
    const unsigned passed = __ballot_sync(kAll, n < end && running + sum > target);
    if (passed) return first + __ffs(static_cast<int>(passed)) - 1;
    running += __shfl_sync(kAll, sum, kWarp - 1);
  }
  return end - 1;  // not with finite numbers
}

// One CTA per entry: the rows drawn in this step, a warp for each, by search in the running sums, and copies of them.
template <class T, class A>
__global__ void __launch_bounds__(kThreads) draw(State<A> s, int64_t step) {
  __shared__ int64_t running[kThreads];  // up to the end of each thread's share of the blocks
  __shared__ int64_t picked[kMaxTrials];
  const KMeansRows& rows = s.a.rows;
  const int64_t share = (s.blocks + kThreads - 1) / kThreads, trials = step == 0 ? 1 : s.a.trials;
  for (int64_t e = blockIdx.x; e < s.a.entries; e += gridDim.x) {
    const int64_t* partial = s.partial + e * s.blocks;
    int64_t sum = 0;
    for (int64_t i = threadIdx.x * share; i < (threadIdx.x + 1) * share && i < s.blocks; ++i) sum += partial[i];
    running[threadIdx.x] = sum;
    __syncthreads();
    for (int by = 1; by < kThreads; by *= 2) {
      const int64_t left = static_cast<int>(threadIdx.x) >= by ? running[threadIdx.x - by] : 0;
      __syncthreads();
      running[threadIdx.x] += left;
      __syncthreads();
    }
    const int64_t total = running[kThreads - 1];
    for (int64_t t = threadIdx.x / kWarp; t < trials; t += kThreads / kWarp) {
      const double uniform = s.a.uniform[e * s.a.clusters * s.a.trials + step * s.a.trials + t];
      int64_t target = static_cast<int64_t>(mul(uniform, static_cast<double>(total)));
      if (target > total - 1) target = total - 1;
      int thread = 0;  // the first that passes the target, or the last
      for (int last = kThreads - 1; thread < last;) {
        const int middle = (thread + last) / 2;
        if (running[middle] > target) {
          last = middle;
        } else {
          thread = middle + 1;
        }
      }
      int64_t before = thread > 0 ? running[thread - 1] : 0, block = thread * share;
      while (block < s.blocks - 1 && before + partial[block] <= target) before += partial[block++];
      const int64_t row = row_at(s, e, block < s.blocks ? block : s.blocks - 1, before, target);
      if (threadIdx.x % kWarp == 0) picked[t] = s.picked[e * s.a.trials + t] = row;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < trials * rows.features; i += kThreads) {
      const int64_t t = i / rows.features, d = i % rows.features;
      s.candidates[e * s.a.trials * rows.features + i] = value_of(rows.template row<T>(s.problem(e), picked[t])[d]);
    }
    if (threadIdx.x == 0) s.total[e] = total;
    __syncthreads();
  }
}

constexpr int kPotentialRows = kThreads;  // a thread each
template <class A>
constexpr int kStep = sizeof(A) == 8 ? 16 : 32;  // features in shared memory at a time

// One CTA per kPotentialRows rows of one entry: a thread holds the distances of its row to all candidates, whose
// features, like those of the rows, pass through shared memory a step at a time. kTrials: a bound on the candidates.
template <class T, class A, int kTrials>
__global__ void __launch_bounds__(kThreads) potentials_of(KMeansPotentials a, int64_t blocks, int64_t weight_copies) {
  __shared__ A xs[kPotentialRows][kStep<A> + 1];
  __shared__ A cs[kTrials][kStep<A>];
  __shared__ unsigned long long sums[kTrials];
  const KMeansRows& rows = a.rows;
  const int trials = static_cast<int>(a.trials);
  for (int64_t unit = blockIdx.x; unit < a.entries * blocks; unit += gridDim.x) {
    const int64_t e = unit / blocks, first = unit % blocks * kPotentialRows, b = e / (a.entries / rows.problems);
    const A* candidates = static_cast<const A*>(a.candidates) + e * a.trials * rows.features;
    A distance[kTrials] = {};
    if (static_cast<int>(threadIdx.x) < kTrials) sums[threadIdx.x] = 0;
    for (int64_t d0 = 0; d0 < rows.features; d0 += kStep<A>) {
      __syncthreads();
#pragma unroll 8
      for (int i = threadIdx.x; i < kPotentialRows * kStep<A>; i += kThreads) {
        const int64_t n = first + i / kStep<A>, d = d0 + i % kStep<A>;
        const bool inside = n < rows.rows && d < rows.features;  // guard
        xs[i / kStep<A>][i % kStep<A>] = inside ? static_cast<A>(value_of(rows.template row<T>(b, n)[d])) : A(0);
      }
      for (int i = threadIdx.x; i < trials * kStep<A>; i += kThreads) {
        const int64_t d = d0 + i % kStep<A>;
        cs[i / kStep<A>][i % kStep<A>] = d < rows.features ? candidates[i / kStep<A> * rows.features + d] : A(0);
      }
      __syncthreads();
#pragma unroll 4
      for (int d = 0; d < kStep<A>; ++d) {
        const A x = xs[threadIdx.x][d];
#pragma unroll
        for (int t = 0; t < kTrials; ++t) {
          if (t < trials) distance[t] = add_square(x, cs[t][d], distance[t]);
        }
      }
    }
    __syncthreads();
    const int64_t n = first + threadIdx.x;
    const bool inside = n < rows.rows;
    const A closest = inside ? static_cast<const A*>(a.closest)[e * rows.rows + n] : A(0);
    const double w = inside ? rows.weight(e / weight_copies, n) : 0.0, scale = a.scale[e];
    uint32_t nearer = 0;
#pragma unroll
    for (int t = 0; t < kTrials; ++t) {
      if (t >= trials) continue;
      const bool less = distance[t] < closest;
      nearer |= (less ? 1u : 0u) << t;
      const int64_t sum = warp_sum(integer(less ? distance[t] : closest, w, scale));
      if (threadIdx.x % kWarp == 0) atomicAdd(&sums[t], static_cast<unsigned long long>(sum));
    }
    if (inside) a.improves[e * rows.rows + n] = static_cast<int32_t>(nearer);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < trials) {
      add_to(a.potentials + e * a.trials + threadIdx.x, static_cast<int64_t>(sums[threadIdx.x]));
    }
    __syncthreads();
  }
}

// One thread per entry: the candidate that leaves the smallest potential, the first drawn of equals.
template <class A>
__global__ void __launch_bounds__(kThreads) choose(State<A> s, int64_t step) {
  for (int64_t e = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; e < s.a.entries;
       e += gridDim.x * static_cast<int64_t>(kThreads)) {
    int64_t best = 0;
    int64_t* after = s.after + e * s.a.trials;
    for (int64_t t = 1; step > 0 && t < s.a.trials; ++t) best = after[t] < after[best] ? t : best;
    int64_t* chosen = s.a.chosen + e * s.a.clusters;
    const bool fresh = step == 0 || s.total[e] > 0;
    chosen[step] = fresh ? s.picked[e * s.a.trials + best] : chosen[0];
    s.best[e] = fresh ? best : -1;
    s.bound[e] = 0;  // for the next step
    for (int64_t t = 0; t < s.a.trials; ++t) after[t] = 0;
  }
}

template <class T, class A, int kTrials = 4>
void potentials(const KMeansPotentials& a, int64_t weight_copies, void* stream) {
  if constexpr (kTrials < kMaxTrials) {
    if (a.trials > kTrials) return potentials<T, A, 2 * kTrials>(a, weight_copies, stream);
  }
  const int64_t blocks = divide_up(a.rows.rows, kPotentialRows);
  launch(potentials_of<T, A, kTrials>, grid_for(a.entries * blocks), kThreads, 0, stream, a, blocks, weight_copies);
}

template <class T, class A>
void seed(const KMeansSeed& a, void* stream) {
  State<A> s;
  s.place(a);
  const int64_t grid = grid_for(a.entries * s.blocks);
  clear(s.bound, sizeof(int64_t) * a.entries, stream);
  clear(s.valid, sizeof(int64_t) * a.entries, stream);
  clear(s.after, sizeof(int64_t) * a.entries * a.trials, stream);
  KMeansPotentials step_of{a.rows, s.candidates, s.closest, s.scale, s.after, s.improves, a.entries, a.trials};
  for (int64_t step = 0; step < a.clusters; ++step) {
    launch(bound_of<T, A>, grid, kThreads, 0, stream, s, step);
    launch(partial_sums<A>, grid, kThreads, 0, stream, s);
    launch(draw<T, A>, grid_for(a.entries), kThreads, 0, stream, s, step);
    if (step > 0) potentials<T, A>(step_of, a.entries / a.rows.problems, stream);
    launch(choose<A>, grid_for(divide_up(a.entries, kThreads)), kThreads, 0, stream, s, step);
  }
}

// One thread per row of an entry.
template <class T, class A>
__global__ void __launch_bounds__(kThreads) lower(KMeansClosest a, int64_t blocks) {
  const KMeansRows& rows = a.rows;
  for (int64_t unit = blockIdx.x; unit < a.entries * blocks; unit += gridDim.x) {
    const int64_t e = unit / blocks, n = unit % blocks * kThreads + threadIdx.x;
    if (n >= rows.rows) continue;  // guard
    if (a.improves && !(static_cast<uint32_t>(a.improves[e * rows.rows + n]) >> a.chosen[e] & 1)) continue;
    A& closest = static_cast<A*>(a.closest)[e * a.closest_stride + n];
    const A* centroid = static_cast<const A*>(a.centroid) + e * rows.features;
    closest = lowered(rows.template row<T>(e / (a.entries / rows.problems), n), centroid, rows.features, closest);
  }
}

}  // namespace

void kmeans_potentials(const KMeansPotentials& a, void* stream) {
  clear(a.potentials, sizeof(int64_t) * a.entries * a.trials, stream);
  with_element(a.rows.dtype, [&](auto x) {
    using T = decltype(x);
    potentials<T, Accumulator<T>>(a, 1, stream);
  });
}

void kmeans_closest(const KMeansClosest& a, void* stream) {
  const int64_t blocks = divide_up(a.rows.rows, kThreads);
  with_element(a.rows.dtype, [&](auto x) {
    using T = decltype(x);
    launch(lower<T, Accumulator<T>>, grid_for(a.entries * blocks), kThreads, 0, stream, a, blocks);
  });
}

int64_t kmeans_seed_workspace(int64_t entries, int64_t rows, int64_t features, int64_t trials) {
  KMeansSeed a{};
  a.rows.rows = rows, a.rows.features = features;
  a.entries = entries, a.trials = trials;
  return State<double>().place(a);  // an fp32 one takes less
}

void kmeans_seed(const KMeansSeed& a, void* stream) {
  if (a.entries == 0) return;
  with_element(a.rows.dtype, [&](auto x) {
    using T = decltype(x);
    seed<T, Accumulator<T>>(a, stream);
  });
}

}  // namespace clustops::cuda
