// Cross-entropy of softmaxes against biased softmaxes, and its gradient.
//
// With m the largest score of a row, e_k = exp((s_k - m) / temperature) and targets q_k = w_k / sum_j w_j,
//   loss = log sum_k e_k + sum_k w_k (m - s_k) / (temperature sum_k w_k),
// of which no term is negative. One sweep over the columns finds all sums, relative to the largest values so far.
#include "sinkhorn_sweep.h"

namespace clustops::cuda {
namespace {

using namespace loss;

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
  __device__ void add(DType target_dtype, const Tile<kViews, kTargets>& tile, const Cut& cut,
                      const Rows<T, kViews, kTargets>& rows, int64_t c, int64_t step) {
    constexpr int kAhead = kViews > 4 && sizeof(T) == 2 ? kViews / 2 : kViews;  // scores on their way at once
    T x[kAhead][n];
    Real w[kTargets][n], more[kTargets];
#pragma unroll
    for (int first = 0; first < kViews; first += kAhead) {
#pragma unroll
      for (int v = 0; v < kAhead && first + v < tile.views; ++v) load(rows.view[first + v] + c, step, cut.wide, x[v]);
#pragma unroll
      for (int t = 0; first == 0 && t < kTargets; ++t) {
        more[t] = 0;
#pragma unroll
        for (int j = 0; j < n; ++j) w[t][j] = 0;
        if (t >= tile.targets) continue;
        const bool finite = rows.exponents(target_dtype, cut, t, c, step, w[t]);
        bad |= finite ? 0u : 1u << (kViews + t);
        more[t] = weigh(t, w[t]);
      }
#pragma unroll
      for (int v = 0; v < kAhead && first + v < tile.views; ++v) add_view(static_cast<Real>(cut.score_exponent), first + v, x[v], w);
    }
#pragma unroll
    for (int t = 0; t < kTargets; ++t) mass[t] += more[t];
  }

  // Exponents of n columns of a target become weights; their sum. Makes the sums so far relative to the new maximum.
  template <int n>
  __device__ Real weigh(int t, Real (&w)[n]) {
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
  __device__ void add_view(Real scale, int v, const T (&x)[n], const Real (&w)[kTargets][n]) {
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
  __device__ void write(Real scale, Real* state) {
    const int lane = threadIdx.x % kWarp;
    Real maxima[kMaxima], sums[kSums];
#pragma unroll
    for (int i = 0; i < kMaxima; ++i) {
      maxima[i] = kLeast;
      if (i < kViews) maxima[i] = high[i % kViews];
      if (i >= kViews && i < kViews + kTargets) maxima[i] = top[(i - kViews) % kTargets];
    }
    const Real largest = join_lanes(maxima, [](Real one, Real other) { return larger(one, other); });
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

  static __device__ Real normalizer(Real natural, Real sum) {
    return natural - natural == 0 ? natural + logarithm(sum) : natural;
  }

  static constexpr int kItems = kViews * kTargets + kViews + kTargets;

  // Writes one result of a row: the loss of a pair, the normaliser of a view or of a target.
  static __device__ void finish(const SoftCrossEntropy& a, const Tile<kViews, kTargets>& tile, const Cut& cut,
                                int64_t repeat, int64_t b, const Real* states, int64_t count, int item) {
    constexpr int kPairs = kViews * kTargets;
    const Real scale = static_cast<Real>(cut.score_exponent), per_temperature = static_cast<Real>(cut.per_temperature);
    Real most, sum, top, mass;
    if (item >= kPairs + kViews) {
      const int t = item - kPairs - kViews;
      if (t >= tile.targets) return;
      total(states, count, kViews + t, 1, top, mass);
      static_cast<Real*>(a.target_normalizers)[(tile.target[t] + repeat) * a.rows + b] =
          normalizer(top * static_cast<Real>(kLn2), mass);
      return;
    }
    const int v = item < kPairs ? item / kTargets : item - kPairs, t = item % kTargets;
    if (v >= tile.views || (item < kPairs && tile.pair[v][t] < 0)) return;
    total(states, count, v, scale, most, sum);
    if (item >= kPairs) {
      static_cast<Real*>(a.score_normalizers)[(tile.view[v] + repeat) * a.rows + b] =
          normalizer(most * per_temperature, sum);
      return;
    }
    total(states, count, kViews + t, 1, top, mass);
    Real dot = 0;
    unsigned bad = 0;
    for (int64_t n = 0; n < count; ++n) {
      const Real* state = states + n * kSize;
      const Real* sums = state + kMaxima;
      bad |= static_cast<unsigned>(state[kSize - 1]);
      if (sums[kViews + t] == 0) continue;
      dot += (sums[kViews + kTargets + v * kTargets + t] + sums[kViews + t] * (state[v] - most)) *
             power_of_two(state[kViews + t] - top);
    }
    const bool finite = ((bad >> v | bad >> (kViews + t)) & 1) == 0;
    static_cast<Real*>(a.losses)[(tile.pair[v][t] + repeat) * a.rows + b] =
        finite ? logarithm(sum) - dot / mass * per_temperature : Numbers<Real>::infinity - Numbers<Real>::infinity;
  }
};

// CTAs that a multiprocessor has room for, without spilling registers.
template <class T>
constexpr int resident(int views) {
  return views > 4 ? 3 : views > 1 ? (sizeof(T) == 2 ? 4 : 5) : sizeof(T) == 8 ? 4 : sizeof(T) == 2 ? 7 : 8;
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
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * groups + group; i < cut.units();
       i += static_cast<int64_t>(gridDim.x) * groups) {
    const Unit unit = cut.unit(i);
    sync(cut);
    rows[group].find(a, tile, cut, unit);
    sync(cut);
    State mine;
    for_columns<State::kColumns>(
        cut, unit.slice * cut.columns, a.columns,
        [&](int64_t c, int64_t step) {
          mine.template add<State::kColumns>(a.target_dtype, tile, cut, rows[group], c, step);
        },
        [&](int64_t c) { mine.template add<1>(a.target_dtype, tile, cut, rows[group], c, 1); });
    Accumulator<T>* const to = parts ? parts + i * warps * State::kSize : states + group * warps * State::kSize;
    mine.write(static_cast<Accumulator<T>>(cut.score_exponent), to + rank / kWarp * State::kSize);
    if (parts) continue;
    sync(cut);
    for (int item = rank; item < State::kItems; item += cut.width) {
      State::finish(a, tile, cut, unit.repeat, unit.b, to, warps, item);
    }
  }
}

// One thread per result of a row that was cut into slices.
template <class T, int kViews, int kTargets>
__global__ void __launch_bounds__(kThreads)
    join_slices(SoftCrossEntropy a, const __grid_constant__ Tile<kViews, kTargets> tile, Cut cut,
                const Accumulator<T>* parts) {
  using State = Sweep<T, kViews, kTargets>;
  const int64_t count = cut.slices * (cut.width / kWarp), items = cut.repeats * cut.rows * State::kItems;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < items;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / State::kItems;
    State::finish(a, tile, cut, row / cut.rows, row % cut.rows, parts + row * count * State::kSize, count,
                  static_cast<int>(i % State::kItems));
  }
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
      launch_losses<T>(a, single_pair<1, 1>(), workspace, stream);
    } else if constexpr (sizeof(T) == 8) {
      launch_tiles<T, 1, 1>(a, workspace, stream);
    } else if (a.views <= 4) {
      launch_tiles<T, 4, 2>(a, workspace, stream);
    } else {
      launch_tiles<T, 10, 2>(a, workspace, stream);
    }
  });
}

}  // namespace clustops::cuda
