// Cross-entropy of softmaxes against biased softmaxes, and its gradient.
//
// With m the largest score of a row, e_k = exp((s_k - m) / temperature) and targets q_k = w_k / sum_j w_j,
//   loss = log sum_k e_k + sum_k w_k (m - s_k) / (temperature sum_k w_k),
// of which no term is negative. One sweep over the columns finds all sums, relative to the largest values so far.
#include "element.h"
#include "exponent.h"
#include "kernels.h"
#include "sinkhorn_pairs.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kWarpColumns = 1024;   // of rows that one warp sweeps; longer ones take a block
constexpr int64_t kSliceColumns = 4096;  // at least, of a block that sweeps a part of a row
constexpr int64_t kUnits = 1024;         // with fewer rows than this, long ones are cut, to keep a GPU busy

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

// Who sweeps what: `width` threads take a slice of `columns` of a row.
struct Cut {
  int64_t repeats;  // the tile once for each problem, where row p goes with row p
  int64_t rows, slices, columns;
  int width;
  bool wide;  // neighbouring columns can be loaded at once

  int64_t units() const { return repeats * rows * slices; }
  int64_t grid() const { return grid_for(divide_up(units(), kThreads / width)); }
};

__device__ void sync(const Cut& cut) {
  if (cut.width == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Vector {
  T x[n];
};

// n elements, `step` apart, or at once.
template <class T, int n>
__device__ void load(const T* from, int64_t step, bool wide, T (&x)[n]) {
  if (n > 1 && wide) {
    const auto all = *reinterpret_cast<const Vector<T, n>*>(from);
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = all.x[j];
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = from[j * step];
  }
}

template <class T, class Real, int n>
__device__ void store(T* to, int64_t step, bool wide, const Real (&y)[n]) {
  if (n > 1 && wide) {
    Vector<T, n> all;
#pragma unroll
    for (int j = 0; j < n; ++j) assign(all.x[j], y[j]);
    *reinterpret_cast<Vector<T, n>*>(to) = all;
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) assign(to[j * step], y[j]);
  }
}

template <class T, class Real, int n>
__device__ void load_values(const void* row, int64_t c, int64_t step, bool wide, Real (&y)[n]) {
  T x[n];
  load(static_cast<const T*>(row) + c, step, wide, x);
#pragma unroll
  for (int j = 0; j < n; ++j) y[j] = value_of(x[j]);
}

template <int n>
__device__ void load_values(DType dtype, const void* row, int64_t c, int64_t step, bool wide, float (&y)[n]) {
  if (dtype == DType::f32) {
    load_values<float>(row, c, step, wide, y);
  } else if (dtype == DType::bf16) {
    load_values<Bf16>(row, c, step, wide, y);
  } else {
    load_values<F16>(row, c, step, wide, y);
  }
}

template <int n>
__device__ void load_values(DType, const void* row, int64_t c, int64_t step, bool wide, double (&y)[n]) {
  load_values<double>(row, c, step, wide, y);
}

// Where the rows of a tile start; in shared memory, to spare registers.
template <class T, int kViews, int kTargets>
struct Rows {
  using Real = Accumulator<T>;
  const T* view[kViews];
  const void* target[kTargets];
  const Real* bias[kTargets];

  __device__ void find(const SoftCrossEntropy& a, const Tile<kViews, kTargets>& tile, int64_t repeat, int64_t b, int rank,
                       int width) {
    for (int v = rank; v < tile.views; v += width) {
      view[v] = static_cast<const T*>(a.scores) + (tile.view[v] + repeat) * a.view_stride + b * a.row_stride;
    }
    for (int t = rank; t < tile.targets; t += width) {
      const int64_t number = tile.target[t] + repeat;
      const int64_t size = a.target_dtype == DType::f64 ? 8 : a.target_dtype == DType::f32 ? 4 : 2;
      target[t] = static_cast<const char*>(a.targets) + (number * a.target_stride + b * a.target_row_stride) * size;
      bias[t] = static_cast<const Real*>(a.bias) + number * a.bias_stride;
    }
  }

  // t / target_temperature + bias of columns c, .., as exponents of 2; whether all t are finite.
  template <int n>
  __device__ bool exponents(const SoftCrossEntropy& a, int t, int64_t c, int64_t step, bool wide, Real (&y)[n]) const {
    Real shift[n], zero = 0;
    load_values(a.target_dtype, target[t], c, step, wide, y);
    load(bias[t] + c, step, wide, shift);
    const Real scale = static_cast<Real>(kLog2E / a.target_temperature);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      zero += y[j] * 0;
      y[j] = y[j] * scale + shift[j] * static_cast<Real>(kLog2E);
    }
    return zero == 0;
  }
};

// Calls `many` with the first of kColumns columns, `step` apart, then `one` with single ones, for a thread's share of
// a slice from column `begin` on.
template <int kColumns, class Many, class One>
__device__ void for_columns(const Cut& cut, int64_t begin, int64_t columns, const Many& many, const One& one) {
  const int64_t end = begin + cut.columns < columns ? begin + cut.columns : columns;
  const int64_t step = cut.wide ? 1 : cut.width, last = (kColumns - 1) * step;
  const int64_t stride = static_cast<int64_t>(kColumns) * cut.width;
  const int rank = threadIdx.x % cut.width;
  int64_t c = begin + (cut.wide ? kColumns : 1) * rank;
#pragma unroll 1
  for (; c + last < end; c += stride) many(c, step);
  if (cut.wide) c = begin + (end - begin) / kColumns * kColumns + rank;
#pragma unroll 1
  for (; c < end; c += cut.width) one(c);
}

constexpr int power_above(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Of `2 half` values of each lane, lanes of either bit `by` take one half each; then the bits below, until one is left.
template <int half, int by, int n, class Real, class Join>
__device__ void halve(Real (&value)[n], const Join& join) {
  if constexpr (half == 0) value[0] = join(value[0], __shfl_xor_sync(kAll, value[0], by));
  const bool second = (threadIdx.x & by) != 0;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const Real keep = second ? value[i + half] : value[i], give = second ? value[i] : value[i + half];
    value[i] = join(keep, __shfl_xor_sync(kAll, give, by));
  }
  if constexpr (by > 1) halve<half / 2, by / 2>(value, join);
}

// One value from n values of each lane of a warp: lane l gets the join of the values number l / (kWarp / n).
template <int n, class Real, class Join>
__device__ Real join_lanes(Real (&value)[n], const Join& join) {
  static_assert(n <= kWarp && (n & (n - 1)) == 0, "a power of two");
  halve<n / 2, kWarp / 2>(value, join);
  return value[0];
}

// What a thread knows of its columns of one row; in memory, of those of a warp.
template <class T, int kViews, int kTargets>
struct Sweep {
  using Real = Accumulator<T>;
  static constexpr int kColumns = 16 / sizeof(T);
  static constexpr int kMaxima = power_above(kViews + kTargets);
  static constexpr int kSums = power_above(kViews + kTargets + kViews * kTargets);
  static constexpr int kSize = kMaxima + kSums + 1;
  static constexpr Real kLeast = -Numbers<Real>::infinity;

  Real high[kViews], sum[kViews];              // largest score, sum of exp((s - high) / temperature)
  Real top[kTargets], mass[kTargets];          // largest exponent, sum of weights w = exp2(y - top)
  Real dot[kViews][kTargets];                  // sum of w (s - high)
  unsigned bad = 0;                            // bits of views, then of targets: a score is not finite

  __device__ Sweep() {
#pragma unroll
    for (int v = 0; v < kViews; ++v) {
      high[v] = kLeast, sum[v] = 0;
#pragma unroll
      for (int t = 0; t < kTargets; ++t) dot[v][t] = 0;
    }
#pragma unroll
    for (int t = 0; t < kTargets; ++t) top[t] = kLeast, mass[t] = 0;
  }

  // n columns of all views and targets.
  template <int n>
  __device__ void add(const SoftCrossEntropy& a, const Tile<kViews, kTargets>& tile,
                      const Rows<T, kViews, kTargets>& rows, bool wide, int64_t c, int64_t step) {
    constexpr int kAhead = kViews > 4 && sizeof(T) == 2 ? kViews / 2 : kViews;  // scores on their way at once
    T x[kAhead][n];
    Real w[kTargets][n], more[kTargets];
#pragma unroll
    for (int first = 0; first < kViews; first += kAhead) {
#pragma unroll
      for (int v = 0; v < kAhead && first + v < tile.views; ++v) load(rows.view[first + v] + c, step, wide, x[v]);
#pragma unroll
      for (int t = 0; first == 0 && t < kTargets; ++t) {
        more[t] = 0;
#pragma unroll
        for (int j = 0; j < n; ++j) w[t][j] = 0;
        if (t < tile.targets) more[t] = weigh(a, t, rows, wide, c, step, w[t]);
      }
#pragma unroll
      for (int v = 0; v < kAhead && first + v < tile.views; ++v) add_view(a, first + v, x[v], w);
    }
#pragma unroll
    for (int t = 0; t < kTargets; ++t) mass[t] += more[t];
  }

  // Weights of n columns of a target, and their sum; makes the sums so far relative to the new maximum.
  template <int n>
  __device__ Real weigh(const SoftCrossEntropy& a, int t, const Rows<T, kViews, kTargets>& rows, bool wide, int64_t c,
                        int64_t step, Real (&w)[n]) {
    const bool finite = rows.exponents(a, t, c, step, wide, w);
    bad |= finite ? 0u : 1u << (kViews + t);
    Real next = top[t], more = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) next = larger(next, w[j]);
    const Real shift = next == kLeast ? 0 : next, rescale = power_of_two(top[t] - shift);
#pragma unroll
    for (int j = 0; j < n; ++j) more += w[j] = power_of_two(w[j] - shift);
    top[t] = next;
    mass[t] *= rescale;
#pragma unroll
    for (int v = 0; v < kViews; ++v) dot[v][t] *= rescale;
    return more;
  }

  // n columns of a view, to which `mass` does not belong yet.
  template <int n>
  __device__ void add_view(const SoftCrossEntropy& a, int v, const T (&x)[n], const Real (&w)[kTargets][n]) {
    const Real scale = static_cast<Real>(kLog2E / a.temperature);
    Real s[n], zero = 0, next = high[v];
#pragma unroll
    for (int j = 0; j < n; ++j) {
      s[j] = value_of(x[j]);
      zero += s[j] * 0;
      next = larger(next, s[j]);
    }
    bad |= zero == 0 ? 0u : 1u << v;
    // The first difference is -inf, by which an empty sum must not be multiplied.
    const Real shift = next == kLeast ? 0 : next, lower = high[v] - next;
    const Real by = lower > Numbers<Real>::lowest ? lower : Numbers<Real>::lowest;
    high[v] = next;
    sum[v] *= power_of_two(by * scale);
#pragma unroll
    for (int t = 0; t < kTargets; ++t) dot[v][t] += mass[t] * by;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const Real below = s[j] - shift;
      sum[v] += power_of_two(below * scale);
#pragma unroll
      for (int t = 0; t < kTargets; ++t) dot[v][t] += w[t][j] * below;
    }
  }

  // Joins the lanes of a warp into one state in memory: maxima [views, targets, padding], sums [views, targets,
  // views x targets, padding], bits.
  __device__ void write(double temperature, Real* state) {
    const int lane = threadIdx.x % kWarp;
    Real maxima[kMaxima], sums[kSums];
#pragma unroll
    for (int i = 0; i < kMaxima; ++i) {
      maxima[i] = kLeast;
      if (i < kViews) maxima[i] = high[i % kViews];
      if (i >= kViews && i < kViews + kTargets) maxima[i] = top[(i - kViews) % kTargets];
    }
    const Real largest = join_lanes(maxima, [](Real one, Real other) { return larger(one, other); });
    const Real scale = static_cast<Real>(kLog2E / temperature);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0;
    Real rescale[kTargets];
#pragma unroll
    for (int t = 0; t < kTargets; ++t) {
      const Real most = __shfl_sync(kAll, largest, (kViews + t) * (kWarp / kMaxima));
      rescale[t] = top[t] == kLeast ? 0 : power_of_two(top[t] - most);
      sums[kViews + t] = mass[t] * rescale[t];
    }
#pragma unroll
    for (int v = 0; v < kViews; ++v) {
      const Real most = __shfl_sync(kAll, largest, v * (kWarp / kMaxima));
      const Real by = high[v] == kLeast ? 0 : high[v] - most;
      sums[v] = sum[v] * power_of_two(by * scale);
#pragma unroll
      for (int t = 0; t < kTargets; ++t) {
        sums[kViews + kTargets + v * kTargets + t] = (dot[v][t] + mass[t] * by) * rescale[t];
      }
    }
    const Real total = join_lanes(sums, [](Real one, Real other) { return one + other; });
    for (int by = kWarp / 2; by > 0; by /= 2) bad |= __shfl_xor_sync(kAll, bad, by);
    if (lane % (kWarp / kMaxima) == 0) state[lane / (kWarp / kMaxima)] = largest;
    if (lane % (kWarp / kSums) == 0) state[kMaxima + lane / (kWarp / kSums)] = total;
    if (lane == 0) state[kSize - 1] = static_cast<Real>(bad);
  }

  // The largest of maximum `i` of `count` states and, relative to it, the whole of its sum.
  static __device__ void total(const Real* states, int64_t count, int i, Real scale, Real& most, Real& sum) {
    most = kLeast, sum = 0;
    for (int64_t n = 0; n < count; ++n) most = larger(most, states[n * kSize + i]);
    for (int64_t n = 0; n < count; ++n) {
      const Real high = states[n * kSize + i];
      if (high != kLeast) sum += states[n * kSize + kMaxima + i] * power_of_two((high - most) * scale);
    }
  }

  static __device__ Real normalizer(Real most, Real sum, Real natural) {
    return most - most == 0 ? natural + logarithm(sum) : most;
  }

  static constexpr int kItems = kViews * kTargets + kViews + kTargets;

  // Writes one result of a row: the loss of a pair, the normaliser of a view or of a target.
  static __device__ void finish(const SoftCrossEntropy& a, const Tile<kViews, kTargets>& tile, int64_t repeat,
                                int64_t b, const Real* states, int64_t count, int item) {
    constexpr int kPairs = kViews * kTargets;
    const bool is_pair = item < kPairs, is_view = !is_pair && item < kPairs + kViews;
    const int v = is_pair ? item / kTargets : is_view ? item - kPairs : 0;
    const int t = is_pair ? item % kTargets : is_view ? 0 : item - kPairs - kViews;
    if (v >= tile.views && (is_pair || is_view)) return;
    if (t >= tile.targets && !is_view) return;
    if (is_pair && tile.pair[v][t] < 0) return;
    Real most = 0, sum = 0, top = 0, mass = 0;
    if (is_pair || is_view) total(states, count, v, static_cast<Real>(kLog2E / a.temperature), most, sum);
    if (!is_view) total(states, count, kViews + t, 1, top, mass);
    if (is_view) {
      static_cast<Real*>(a.score_normalizers)[(tile.view[v] + repeat) * a.rows + b] =
          normalizer(most, sum, most / static_cast<Real>(a.temperature));
    } else if (!is_pair) {
      static_cast<Real*>(a.target_normalizers)[(tile.target[t] + repeat) * a.rows + b] =
          normalizer(top, mass, top * static_cast<Real>(kLn2));
    } else {
      Real dot = 0;
      bool finite = true;
      for (int64_t n = 0; n < count; ++n) {
        const Real* state = states + n * kSize;
        const Real* sums = state + kMaxima;
        const unsigned bad = static_cast<unsigned>(state[kSize - 1]);
        finite = finite && ((bad >> v | bad >> (kViews + t)) & 1) == 0;
        if (sums[kViews + t] == 0) continue;
        dot += (sums[kViews + kTargets + v * kTargets + t] + sums[kViews + t] * (state[v] - most)) *
               power_of_two(state[kViews + t] - top);
      }
      const Real loss = logarithm(sum) - dot / mass / static_cast<Real>(a.temperature);
      static_cast<Real*>(a.losses)[(tile.pair[v][t] + repeat) * a.rows + b] =
          finite ? loss : Numbers<Real>::infinity - Numbers<Real>::infinity;
    }
  }
};

// CTAs that a multiprocessor has room for, without spilling registers.
template <class T>
constexpr int resident(int views) {
  return views > 4 ? 3 : views > 1 ? (sizeof(T) == 2 ? 4 : 5) : sizeof(T) == 8 ? 5 : sizeof(T) == 2 ? 7 : 8;
}

// One warp or one CTA per slice of row b of all views and targets of the tile: each thread takes its columns of all of
// them at once. Scores are read where they lie, once.
template <class T, int kViews, int kTargets>
__global__ void __launch_bounds__(kThreads, resident<T>(kViews))
    losses_of(SoftCrossEntropy a, const __grid_constant__ Tile<kViews, kTargets> tile, Cut cut, Accumulator<T>* parts) {
  using State = Sweep<T, kViews, kTargets>;
  __shared__ Accumulator<T> states[kWarps * State::kSize];
  __shared__ Rows<T, kViews, kTargets> rows[kWarps];
  const int group = threadIdx.x / cut.width, groups = kThreads / cut.width, warps = cut.width / kWarp;
  const int rank = threadIdx.x % cut.width;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * groups + group; unit < cut.repeats * cut.rows * cut.slices;
       unit += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t slice = unit % cut.slices, b = unit / cut.slices % cut.rows, repeat = unit / cut.slices / cut.rows;
    sync(cut);
    rows[group].find(a, tile, repeat, b, rank, cut.width);
    sync(cut);
    State mine;
    for_columns<State::kColumns>(
        cut, slice * cut.columns, a.columns,
        [&](int64_t c, int64_t step) { mine.template add<State::kColumns>(a, tile, rows[group], cut.wide, c, step); },
        [&](int64_t c) { mine.template add<1>(a, tile, rows[group], cut.wide, c, 1); });
    if (parts) {
      mine.write(a.temperature, parts + (unit * warps + rank / kWarp) * State::kSize);
      continue;
    }
    Accumulator<T>* const shared = states + group * warps * State::kSize;
    mine.write(a.temperature, shared + rank / kWarp * State::kSize);
    sync(cut);
    for (int item = rank; item < State::kItems; item += cut.width) {
      State::finish(a, tile, repeat, b, shared, warps, item);
    }
  }
}

// One thread per result of a row that was cut into slices.
template <class T, int kViews, int kTargets>
__global__ void __launch_bounds__(kThreads)
    join_slices(SoftCrossEntropy a, const __grid_constant__ Tile<kViews, kTargets> tile, Cut cut, const Accumulator<T>* parts) {
  using State = Sweep<T, kViews, kTargets>;
  const int64_t count = cut.slices * (cut.width / kWarp), items = cut.repeats * cut.rows * State::kItems;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < items;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / State::kItems;
    State::finish(a, tile, row / cut.rows, row % cut.rows, parts + row * count * State::kSize, count,
                  static_cast<int>(i % State::kItems));
  }
}

constexpr int kMostViews = 16;  // of one launch of the backward kernel

// What the columns of a row share: upstream / temperature of each pair, and normalisers.
template <class T, int kTargets>
struct RowFactors {
  using Real = Accumulator<T>;
  Rows<T, kMostViews, kTargets> rows;
  T* gradient[kMostViews];
  Real pair[kMostViews][kTargets], view[kMostViews], target[kTargets];

  template <class Tile>
  __device__ void read(const SoftCrossEntropyBackward& a, const Tile& tile, int64_t repeat, int64_t b, int rank,
                       int width) {
    const SoftCrossEntropy& f = a.forward;
    rows.find(f, tile, repeat, b, rank, width);
    for (int i = rank; i < tile.views * kTargets; i += width) {
      const int64_t number = tile.pair[i / kTargets][i % kTargets];
      const int64_t at = (number + repeat) * a.upstream_pair_stride + b * a.upstream_row_stride;
      const Real g = number < 0 ? 0 : static_cast<const Real*>(a.upstream)[at];
      pair[i / kTargets][i % kTargets] = g / static_cast<Real>(f.temperature);
    }
    for (int v = rank; v < tile.views; v += width) {
      const int64_t at = (tile.view[v] + repeat) * f.rows + b;
      view[v] = static_cast<const Real*>(f.score_normalizers)[at];
      gradient[v] = static_cast<T*>(a.gradient) + at * f.columns;
    }
    for (int t = rank; t < tile.targets; t += width) {
      target[t] = static_cast<const Real*>(f.target_normalizers)[(tile.target[t] + repeat) * f.rows + b];
    }
  }
};

// The gradient of n columns of all views of the tile.
template <int n, class T, int kTargets>
__device__ void gradient(const SoftCrossEntropyBackward& a, const Tile<kMostViews, kTargets>& tile, const Cut& cut,
                         const RowFactors<T, kTargets>& row, int64_t c, int64_t step) {
  using Real = Accumulator<T>;
  constexpr int kAhead = 4;  // views whose scores are on their way at once
  const SoftCrossEntropy& f = a.forward;
  const Real per_temperature = static_cast<Real>(1 / f.temperature), log2e = static_cast<Real>(kLog2E);
  Real q[kTargets][n];
#pragma unroll
  for (int t = 0; t < kTargets; ++t) {
    if (t >= tile.targets) break;
    row.rows.exponents(f, t, c, step, cut.wide, q[t]);
#pragma unroll
    for (int j = 0; j < n; ++j) q[t][j] = power_of_two(q[t][j] - row.target[t] * log2e);
  }
#pragma unroll 1
  for (int first = 0; first < tile.views; first += kAhead) {
    T x[kAhead][n];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= tile.views) break;
      load(row.rows.view[first + i] + c, step, cut.wide, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int v = first + i;
      if (v >= tile.views) break;
      Real factor = 0, result[n] = {};
      bool live = false;  // a row without upstream gradient gets 0 whatever its scores are
#pragma unroll
      for (int t = 0; t < kTargets; ++t) {
        const Real g = row.pair[v][t];
        if (g == 0) continue;
        live = true;
        factor += g;
#pragma unroll
        for (int j = 0; j < n; ++j) result[j] -= g * q[t][j];
      }
#pragma unroll
      for (int j = 0; live && j < n; ++j) {
        result[j] += factor * power_of_two((value_of(x[i][j]) * per_temperature - row.view[v]) * log2e);
      }
      T* const to = row.gradient[v] + c;
      if (tile.again[v]) {
        T before[n];
        load(to, step, cut.wide, before);
#pragma unroll
        for (int j = 0; j < n; ++j) result[j] += value_of(before[j]);
      }
      store(to, step, cut.wide, result);
    }
  }
}

// One warp or one CTA per slice of row b of all views and targets of the tile: each thread takes its columns, the
// targets of which stay in registers while the views pass.
template <class T, int kTargets>
__global__ void __launch_bounds__(kThreads, 4)
    gradients_of(SoftCrossEntropyBackward a, const __grid_constant__ Tile<kMostViews, kTargets> tile, Cut cut) {
  constexpr int kColumns = kTargets > 2 && sizeof(T) == 2 ? 4 : 16 / sizeof(T);
  __shared__ RowFactors<T, kTargets> rows[kWarps];
  const int group = threadIdx.x / cut.width, groups = kThreads / cut.width, rank = threadIdx.x % cut.width;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * groups + group; unit < cut.repeats * cut.rows * cut.slices;
       unit += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t slice = unit % cut.slices, b = unit / cut.slices % cut.rows, repeat = unit / cut.slices / cut.rows;
    sync(cut);
    rows[group].read(a, tile, repeat, b, rank, cut.width);
    sync(cut);
    for_columns<kColumns>(
        cut, slice * cut.columns, a.forward.columns,
        [&](int64_t c, int64_t step) { gradient<kColumns, T>(a, tile, cut, rows[group], c, step); },
        [&](int64_t c) { gradient<1, T>(a, tile, cut, rows[group], c, 1); });
  }
}

int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

bool aligned(const void* data, DType dtype, int64_t stride, int64_t row_stride) {
  const int64_t size = bytes_of(dtype);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0 && row_stride * size % 16 == 0;
}

bool wide(const SoftCrossEntropy& a) {
  const DType real = a.dtype == DType::f64 ? DType::f64 : DType::f32;
  return aligned(a.scores, a.dtype, a.view_stride, a.row_stride) &&
         aligned(a.targets, a.target_dtype, a.target_stride, a.target_row_stride) &&
         aligned(a.bias, real, a.bias_stride, 0);
}

int64_t slices_of(int64_t rows, int64_t columns) {
  return std::max<int64_t>(1, std::min(divide_up(kUnits, std::max<int64_t>(1, rows)), columns / kSliceColumns));
}

Cut cut_of(const SoftCrossEntropy& a, int64_t slices) {
  const int64_t repeats = a.view ? 1 : a.pairs, columns = divide_up(divide_up(a.columns, slices), 16) * 16;
  return {repeats, a.rows, slices, columns, a.columns <= kWarpColumns ? kWarp : kThreads, wide(a)};
}

template <class T, int kViews, int kTargets>
void launch_losses(const SoftCrossEntropy& a, const Tile<kViews, kTargets>& tile, void* workspace, void* stream) {
  using Real = Accumulator<T>;
  const Cut cut = cut_of(a, slices_of((a.view ? 1 : a.pairs) * a.rows, a.columns));
  Real* const parts = cut.slices > 1 ? static_cast<Real*>(workspace) : nullptr;
  launch(losses_of<T, kViews, kTargets>, cut.grid(), kThreads, 0, stream, a, tile, cut, parts);
  if (!parts) return;
  const int64_t items = cut.repeats * cut.rows * Sweep<T, kViews, kTargets>::kItems;
  launch(join_slices<T, kViews, kTargets>, grid_for(divide_up(items, kThreads)), kThreads, 0, stream, a, tile, cut,
         static_cast<const Real*>(parts));
}

template <class T, int kViews, int kTargets>
void launch_tiles(const SoftCrossEntropy& a, void* workspace, void* stream) {
  for (const auto& tile : tiles_of<kViews, kTargets>(a, false)) launch_losses<T>(a, tile, workspace, stream);
}

template <class T, int kTargets>
void launch_gradients(const SoftCrossEntropyBackward& a, void* stream) {
  Cut cut = cut_of(a.forward, divide_up(std::max<int64_t>(1, a.forward.columns), kSliceColumns));
  cut.wide = cut.wide && aligned(a.gradient, a.forward.dtype, a.forward.columns, 0);
  std::vector<Tile<kMostViews, kTargets>> tiles;
  if (a.forward.view) {
    tiles = tiles_of<kMostViews, kTargets>(a.forward, true);
  } else {
    tiles.resize(1);
    tiles[0].take(0, 0, 0);
  }
  for (const auto& tile : tiles) {
    if (tile.views > 0) launch(gradients_of<T, kTargets>, cut.grid(), kThreads, 0, stream, a, tile, cut);
  }
}

}  // namespace

int64_t soft_cross_entropy_workspace(int64_t pairs, bool listed, int64_t rows, int64_t columns) {
  const int64_t all = (listed ? 1 : pairs) * rows, slices = slices_of(all, columns);
  const int64_t size = listed ? Sweep<float, 10, 2>::kSize : Sweep<float, 1, 1>::kSize;
  return slices > 1 ? all * slices * kWarps * size : 0;
}

void soft_cross_entropy(const SoftCrossEntropy& a, void* workspace, void* stream) {
  with_element(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (!a.view) {
      launch_losses<T>(a, single_pair(), workspace, stream);
    } else if constexpr (sizeof(T) == 8) {
      launch_tiles<T, 1, 1>(a, workspace, stream);
    } else if (a.views <= 4) {
      launch_tiles<T, 4, 2>(a, workspace, stream);
    } else {
      launch_tiles<T, 10, 2>(a, workspace, stream);
    }
  });
}

void soft_cross_entropy_backward(const SoftCrossEntropyBackward& a, void* stream) {
  with_element(a.forward.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) != 8) {
      if (a.forward.view && a.forward.n_targets > 2) return launch_gradients<T, 8>(a, stream);
    }
    launch_gradients<T, 2>(a, stream);
  });
}

}  // namespace clustops::cuda
