// Cross-entropy against biased softmaxes: the losses of pairs of rows, and their gradient.
//
// One row index at a time over all targets and views, so that a target that is also a view comes from a cache. The
// numerators of the targets' softmaxes wait in a buffer; then each row of scores is read once for all its pairs.
// Exponents are shifted by the score of the prototype that the target prefers: near the end of training that is the
// largest, so what remains is small and exact. Where another one is so much larger that sums overflow, the row is read
// again with its maximum as the shift.
#include "../common/sinkhorn_loss.h"

#include <cmath>
#include <limits>
#include <vector>

#include "../common/pages.h"
#include "../common/parallel.h"
#include "element.h"

// What a sweep does with a vector stays in its loop: as a function of its own it takes three times as long.
#define CLUSTOPS_INLINE __attribute__((always_inline))

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Sums side by side, and the columns after which they go to double: long sums in fp32 lose digits.
constexpr int kChains = 2;
constexpr int64_t kBlock = 4096;
// Rows of a unit of work have at least this many scores.
constexpr int64_t kUnit = 1 << 15;
// Targets of one sweep.
constexpr int kTogether = 2;

// A sum above this may have overflowed or be about to.
template <class T>
constexpr T kTooLarge = std::is_same_v<T, double> ? 0x1p1000 : 0x1p100f;

// A whole vector.
template <class T>
struct All {
  using V = Vector<T>;

  template <class S>
  V read_from(const S* p) const {
    return read(p);
  }
  template <class S>
  void write_to(V x, S* p) const {
    write(x, p);
  }
  V or_zero(V x) const { return x; }
  V or_least(V x) const { return x; }
};

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// What numbers are cut to: infinity in the first lanes, then another bound.
template <class T>
struct Cut {
  static constexpr int kWidth = Vector<T>::kWidth;
  T lanes[2 * kWidth] = {};

  constexpr explicit Cut(T other) {
    for (int i = 0; i < 2 * kWidth; ++i) lanes[i] = i < kWidth ? kInfinity<T> : other;
  }
  Vector<T> after(int64_t count) const { return Vector<T>::load(lanes + kWidth - count); }
};
template <class T>
constexpr Cut<T> kCutToZero(0);
template <class T>
constexpr Cut<T> kCutToLeast(-kInfinity<T>);

// The columns that are left for the last one.
template <class T>
struct First {
  using V = Vector<T>;
  int64_t count;

  template <class S>
  V read_from(const S* p) const {
    return read_first(p, count);
  }
  template <class S>
  void write_to(V x, S* p) const {
    write_first(x, p, count);
  }
  // Another number in the lanes beyond the end, where x is at least that.
  V or_zero(V x) const { return min(kCutToZero<T>.after(count), x); }
  V or_least(V x) const { return min(kCutToLeast<T>.after(count), x); }
};

// step(column, lanes, chain) for each vector of columns [first, end).
template <class T, class Step>
CLUSTOPS_INLINE inline void over_columns(int64_t first, int64_t end, const Step& step) {
  constexpr int kWidth = Vector<T>::kWidth;
  static_assert(kChains == 2);
  int64_t k = first;
  for (; k + 2 * kWidth <= end; k += 2 * kWidth) {
    step(k, All<T>{}, 0);
    step(k + kWidth, All<T>{}, 1);
  }
  if (k + kWidth <= end) {
    step(k, All<T>{}, 0);
    k += kWidth;
  }
  if (k < end) step(k, First<T>{end - k}, 1);
}

template <class V>
V zero() {
  return V::set1(0);
}

template <class T>
struct Chains {
  Vector<T> part[kChains] = {zero<Vector<T>>(), zero<Vector<T>>()};

  double total() const { return reduce_add(part[0] + part[1]); }
};

template <class S, class T>
T largest(const S* s, int64_t columns) {
  using V = Vector<T>;
  V most = V::set1(-kInfinity<T>);
  over_columns<T>(0, columns, [&](int64_t k, auto lanes, int) CLUSTOPS_INLINE {
    most = max(most, lanes.or_least(lanes.read_from(s + k)));
  });
  return reduce_max(most);
}

template <class S>
auto value_of(const S* p) {
  decltype(reduce_add(read(p))) value;
  store_first(read_first(p, 1), &value, 1);
  return value;
}

// 1 / temperature in two parts: with one alone, quotients in the thousands would be off by its rounding times as much.
template <class T>
struct Reciprocal {
  T high, low;

  explicit Reciprocal(double x)
      : high(static_cast<T>(1 / x)), low(static_cast<T>(1 / x - static_cast<double>(high))) {}
};

template <class T>
Vector<T> power_of(Vector<T> exponent) {
  return exp2(exponent * Vector<T>::set1(static_cast<T>(kLog2E)));
}

// The logarithms of the numerators of softmax(t / temperature + bias).
template <class S, class T>
struct TargetRow {
  const S* t;
  const T* bias;
  int64_t columns;
  Reciprocal<T> scale;

  // A bias often cancels most of the quotient: what its rounding cut off is added again.
  template <class Lanes>
  Vector<T> exponents(int64_t k, const Lanes& lanes) const {
    using V = Vector<T>;
    const V x = lanes.read_from(t + k), high = V::set1(scale.high), quotient = x * high;
    const V cut_off = fma(x, V::set1(scale.low), fma(x, high, zero<V>() - quotient));
    return quotient + lanes.read_from(bias + k) + cut_off;
  }
  // The largest one in columns [0, end).
  T largest(int64_t end) const {
    using V = Vector<T>;
    V most = V::set1(-kInfinity<T>);
    over_columns<T>(0, end, [&](int64_t k, auto lanes, int) CLUSTOPS_INLINE {
      most = max(most, lanes.or_least(exponents(k, lanes)));
    });
    return reduce_max(most);
  }
};

// The softmax of a target, e_k / sum.
template <class T>
struct Softmax {
  const T* e;  // 0 beyond the last column, in whole vectors
  double sum;
  double poison;  // 0, or NaN if a score is not finite
  int64_t peak;   // the column of the largest one
  double log_normalizer;
};

template <class T>
int64_t position_of(const T* e, T most, int64_t columns) {
  int64_t k = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; k + Vec::kWidth <= columns; k += Vec::kWidth) {
      if (not_less(Vec::load(e + k), Vec::set1(most))) break;
    }
  }
  while (k < columns && e[k] != most) ++k;
  return k < columns ? k : 0;
}

// e_k = exp(exponent - shift).
template <class S, class T>
Softmax<T> exponentials(const TargetRow<S, T>& row, T shift, T* e, const char* next) {
  using V = Vector<T>;
  double sum = 0;
  V most = zero<V>(), poison = zero<V>();
  for (int64_t first = 0; first < row.columns; first += kBlock) {
    Chains<T> sums;
    over_columns<T>(first, std::min(first + kBlock, row.columns), [&](int64_t k, auto lanes, int chain) CLUSTOPS_INLINE {
      __builtin_prefetch(next + k * static_cast<int64_t>(sizeof(S)), 0, 2);
      const V power = lanes.or_zero(power_of<T>(row.exponents(k, lanes) - V::set1(shift)));
      store(power, e + k);
      sums.part[chain] = sums.part[chain] + power;
      most = max(most, power);
      poison = fma(lanes.read_from(row.t + k), zero<V>(), poison);
    });
    sum += sums.total();
  }
  return {e, sum, reduce_add(poison), position_of(e, reduce_max(most), row.columns),
          std::log(sum) + static_cast<double>(shift)};
}

template <class S, class T>
Softmax<T> softmax_of(const TargetRow<S, T>& row, T* e, const char* next) {
  const T near = row.largest(std::min<int64_t>(row.columns, Vector<T>::kWidth));
  const Softmax<T> result = exponentials(row, near, e, next);
  if (result.sum < kTooLarge<T>) return result;
  const T most = row.largest(row.columns);
  return exponentials(row, std::isinf(most) ? T(0) : most, e, next);
}

// What one sweep over a row of scores finds, with d = s - shift.
struct Swept {
  double sum = 0;               // of 2^(d scale)
  double dots[kTogether] = {};  // of e d
};

template <int kTargets, bool kSum, class S, class T>
Swept sweep(const S* s, int64_t columns, T shift, T scale, const Softmax<T>* const* targets, const char* next) {
  using V = Vector<T>;
  Swept found;
  for (int64_t first = 0; first < columns; first += kBlock) {
    Chains<T> sums, dots[kTogether];
    over_columns<T>(first, std::min(first + kBlock, columns), [&](int64_t k, auto lanes, int chain) CLUSTOPS_INLINE {
      __builtin_prefetch(next + k * static_cast<int64_t>(sizeof(S)), 0, 2);
      const V d = lanes.read_from(s + k) - V::set1(shift);
      if (kSum) sums.part[chain] = sums.part[chain] + lanes.or_zero(exp2(d * V::set1(scale)));
      for (int i = 0; i < kTargets; ++i) {
        dots[i].part[chain] = fma(V::load(targets[i]->e + k), d, dots[i].part[chain]);
      }
    });
    found.sum += sums.total();
    for (int i = 0; i < kTargets; ++i) found.dots[i] += dots[i].total();
  }
  return found;
}

// The pairs of each view, in their order.
struct Pairs {
  struct Pair {
    int64_t number, target;
  };
  std::vector<int64_t> first;
  std::vector<Pair> all;

  explicit Pairs(const SoftCrossEntropy& a) : first(a.views + 1), all(a.pairs) {
    for (int64_t n = 0; n < a.pairs; ++n) ++first[(a.view ? a.view[n] : n) + 1];
    for (int64_t v = 0; v < a.views; ++v) first[v + 1] += first[v];
    std::vector<int64_t> place(first.begin(), first.end() - 1);
    for (int64_t n = 0; n < a.pairs; ++n) all[place[a.view ? a.view[n] : n]++] = {n, a.target ? a.target[n] : n};
  }
  const Pair* begin(int64_t view) const { return all.data() + first[view]; }
  const Pair* end(int64_t view) const { return all.data() + first[view + 1]; }
};

// Views and targets whose pairs stay among themselves: all, or one each where there is no list of pairs.
struct Group {
  int64_t first, views, targets;
};

struct Rows {
  const SoftCrossEntropy& a;

  int64_t groups() const { return a.view ? 1 : a.views; }
  Group group(int64_t g) const { return a.view ? Group{0, a.views, a.n_targets} : Group{g, 1, 1}; }
  const char* score(int64_t v, int64_t b) const {
    return static_cast<const char*>(a.scores) + (v * a.view_stride + b * a.row_stride) * element_size(a.dtype);
  }
  const char* target(int64_t t, int64_t b) const {
    return static_cast<const char*>(a.targets) +
           (t * a.target_stride + b * a.target_row_stride) * element_size(a.target_dtype);
  }
  // What is read after the row of a target or view of the group.
  const char* after_target(const Group& group, int64_t t, int64_t b) const {
    if (t + 1 < group.first + group.targets) return target(t + 1, b);
    return group.views > 0 ? score(group.first, b) : target(t, b);
  }
  const char* after_score(const Group& group, int64_t v, int64_t b) const {
    if (v + 1 < group.first + group.views) return score(v + 1, b);
    return b + 1 < a.rows && group.targets > 0 ? target(group.first, b + 1) : score(v, b);
  }
};

// One target's share of a gradient.
template <class T>
struct Share {
  const T* q;
  T weight;
};

// Room for a thread: a row for each target of a group and one more, each of whole cache lines.
template <class T>
struct Scratch {
  static constexpr int64_t kNumbers = 64 / sizeof(T);
  struct alignas(64) Line {
    T number[kNumbers];
  };
  int64_t stride;
  std::vector<Line> lines;
  std::vector<Softmax<T>> softmaxes;  // e is null where it is not known
  std::vector<Share<T>> shares;

  Scratch(int64_t targets, int64_t columns)
      : stride((columns + kNumbers - 1) / kNumbers), lines((targets + 1) * stride), softmaxes(targets) {}
  T* row(int64_t i) { return lines[i * stride].number; }
};

// One row of scores: its normaliser and its losses. The first sweep takes the exponentials and two targets.
template <class S, class T>
bool losses_with(const SoftCrossEntropy& a, const S* s, T shift, int64_t v, int64_t b, const Pairs& pairs,
                 const Softmax<T>* softmaxes, int64_t first_target, const char* next) {
  const T scale = static_cast<T>(kLog2E / a.temperature);
  double log_sum = 0;
  bool finite = true;
  const Pairs::Pair* pair = pairs.begin(v);
  const Pairs::Pair* const end = pairs.end(v);
  for (bool is_first = true; is_first || pair < end; is_first = false) {
    const int count = static_cast<int>(std::min<int64_t>(kTogether, end - pair));
    const Softmax<T>* targets[kTogether] = {};
    for (int i = 0; i < count; ++i) targets[i] = softmaxes + (pair[i].target - first_target);
    const auto with_sum = count == 2 ? sweep<2, true, S, T> : count == 1 ? sweep<1, true, S, T> : sweep<0, true, S, T>;
    const auto without = count == 2 ? sweep<2, false, S, T> : sweep<1, false, S, T>;
    const Swept found = (is_first ? with_sum : without)(s, a.columns, shift, scale, targets, next);
    if (is_first) {
      finite = found.sum < kTooLarge<T>;
      log_sum = std::log(found.sum);
      static_cast<T*>(a.score_normalizers)[v * a.rows + b] =
          static_cast<T>(log_sum + static_cast<double>(shift) / a.temperature);
    }
    for (int i = 0; i < count; ++i, ++pair) {
      const double loss = log_sum - found.dots[i] / targets[i]->sum / a.temperature + targets[i]->poison;
      finite = finite && std::isfinite(loss);
      static_cast<T*>(a.losses)[pair->number * a.rows + b] =
          static_cast<T>(std::isfinite(loss) ? loss : std::numeric_limits<double>::quiet_NaN());
    }
  }
  return finite;
}

template <class T>
void losses_of_row(const SoftCrossEntropy& a, const Pairs& pairs, const Group& group, int64_t b, Scratch<T>& scratch) {
  const Rows rows{a};
  const Reciprocal<T> target_scale(a.target_temperature);
  for (int64_t i = 0; i < group.targets; ++i) {
    const int64_t t = group.first + i;
    const T* bias = static_cast<const T*>(a.bias) + t * a.bias_stride;
    scratch.softmaxes[i] = with_elements<T>(a.target_dtype, rows.target(t, b), [&](auto* row) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(row)>>;
      return softmax_of(TargetRow<S, T>{row, bias, a.columns, target_scale}, scratch.row(i),
                        rows.after_target(group, t, b));
    });
    static_cast<T*>(a.target_normalizers)[t * a.rows + b] = static_cast<T>(scratch.softmaxes[i].log_normalizer);
  }
  const Softmax<T>* softmaxes = scratch.softmaxes.data();
  for (int64_t v = group.first; v < group.first + group.views; ++v) {
    with_elements<T>(a.dtype, rows.score(v, b), [&](auto* s) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
      const char* next = rows.after_score(group, v, b);
      const Pairs::Pair* pair = pairs.begin(v);
      const int64_t near = pair < pairs.end(v) ? softmaxes[pair->target - group.first].peak : 0;
      if (losses_with<S, T>(a, s, value_of(s + near), v, b, pairs, softmaxes, group.first, next)) return;
      losses_with<S, T>(a, s, largest<S, T>(s, a.columns), v, b, pairs, softmaxes, group.first, next);
    });
  }
}

// q of a target.
template <class S, class T>
void probabilities(const TargetRow<S, T>& row, T normalizer, T* q) {
  using V = Vector<T>;
  over_columns<T>(0, row.columns, [&](int64_t k, auto lanes, int) CLUSTOPS_INLINE {
    store(power_of<T>(row.exponents(k, lanes) - V::set1(normalizer)), q + k);
  });
}

template <int kTargets, class S, class T>
void write_gradient(const S* s, int64_t columns, Reciprocal<T> scale, T normalizer, T total, const Share<T>* shares,
                    S* out, const char* next) {
  using V = Vector<T>;
  over_columns<T>(0, columns, [&](int64_t k, auto lanes, int) CLUSTOPS_INLINE {
    __builtin_prefetch(next + k * static_cast<int64_t>(sizeof(S)), 0, 2);
    const V x = lanes.read_from(s + k);
    // Rounded as the normaliser was: of a sure prediction nothing is left but 1.
    const V exponent = fma(x, V::set1(scale.high), x * V::set1(scale.low));
    V g = power_of<T>(exponent - V::set1(normalizer)) * V::set1(total);
    for (int i = 0; i < kTargets; ++i) g = g - V::load(shares[i].q + k) * V::set1(shares[i].weight);
    lanes.write_to(g, out + k);
  });
}

template <class T>
void add_up(const std::vector<Share<T>>& shares, int64_t columns, T* sum) {
  std::fill_n(sum, columns, T(0));
  for (const Share<T>& share : shares) {
    for (int64_t k = 0; k < columns; ++k) sum[k] += share.weight * share.q[k];
  }
}

template <class T>
void gradient_of_row(const SoftCrossEntropyBackward& problem, const Pairs& pairs, const Group& group, int64_t b,
                     Scratch<T>& scratch) {
  std::vector<Share<T>>& shares = scratch.shares;
  const SoftCrossEntropy& a = problem.forward;
  const Rows rows{a};
  const Reciprocal<T> target_scale(a.target_temperature);
  for (Softmax<T>& softmax : scratch.softmaxes) softmax.e = nullptr;
  const auto target = [&](int64_t t) {
    Softmax<T>& softmax = scratch.softmaxes[t - group.first];
    if (softmax.e) return softmax.e;
    T* q = scratch.row(t - group.first);
    const T* bias = static_cast<const T*>(a.bias) + t * a.bias_stride;
    with_elements<T>(a.target_dtype, rows.target(t, b), [&](auto* row) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(row)>>;
      probabilities(TargetRow<S, T>{row, bias, a.columns, target_scale},
                    static_cast<const T*>(a.target_normalizers)[t * a.rows + b], q);
    });
    return softmax.e = q;
  };
  for (int64_t v = group.first; v < group.first + group.views; ++v) {
    double total = 0;
    shares.clear();
    for (const Pairs::Pair* pair = pairs.begin(v); pair < pairs.end(v); ++pair) {
      const T g = static_cast<const T*>(problem.upstream)[pair->number * problem.upstream_pair_stride +
                                                          b * problem.upstream_row_stride];
      if (g == 0) continue;
      shares.push_back({target(pair->target), static_cast<T>(g / a.temperature)});
      total += g / a.temperature;
    }
    if (shares.size() > kTogether) {
      T* sum = scratch.row(group.targets);
      add_up(shares, a.columns, sum);
      shares.assign(1, {sum, T(1)});
    }
    with_elements<T>(a.dtype, rows.score(v, b), [&](auto* s) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
      S* out = static_cast<S*>(problem.gradient) + (v * a.rows + b) * a.columns;
      if (shares.empty()) {
        std::fill_n(out, a.columns, S{});
        return;
      }
      const T normalizer = static_cast<const T*>(a.score_normalizers)[v * a.rows + b];
      const auto write = shares.size() == 2 ? write_gradient<2, S, T> : write_gradient<1, S, T>;
      write(s, a.columns, Reciprocal<T>(a.temperature), normalizer, static_cast<T>(total), shares.data(), out,
            rows.after_score(group, v, b));
    });
  }
}

// work(T(), group, row, thread) for each row of each group: double for fp64 scores, float for the rest.
template <class Work>
void over_rows(const SoftCrossEntropy& a, int threads, const Work& work) {
  const Rows rows{a};
  const int64_t count = rows.groups() * a.rows;
  if (count == 0) return;
  const Group some = rows.group(0);
  const int64_t scores = std::max<int64_t>(1, a.columns * (some.views + some.targets));
  const int64_t each = std::max<int64_t>(1, kUnit / scores), units = (count + each - 1) / each;
  parallel_for(units, threads, [&](int64_t unit, int thread) {
    for (int64_t i = unit * each; i < std::min(count, (unit + 1) * each); ++i) {
      work(rows.group(i / a.rows), i % a.rows, thread);
    }
  });
}

template <class T>
std::vector<Scratch<T>> scratch_for(const SoftCrossEntropy& a, int threads) {
  return std::vector<Scratch<T>>(threads, Scratch<T>(a.view ? a.n_targets : 1, a.columns));
}

template <class T>
void forward(const SoftCrossEntropy& a, int threads) {
  const Pairs pairs(a);
  std::vector<Scratch<T>> scratch = scratch_for<T>(a, threads);
  over_rows(a, threads, [&](const Group& group, int64_t b, int thread) {
    losses_of_row(a, pairs, group, b, scratch[thread]);
  });
}

template <class T>
void backward(const SoftCrossEntropyBackward& a, int threads) {
  const Pairs pairs(a.forward);
  std::vector<Scratch<T>> scratch = scratch_for<T>(a.forward, threads);
  over_rows(a.forward, threads, [&](const Group& group, int64_t b, int thread) {
    gradient_of_row(a, pairs, group, b, scratch[thread]);
  });
}

}  // namespace

void soft_cross_entropy(const SoftCrossEntropy& a, int threads) {
  (a.dtype == DType::f64 ? forward<double> : forward<float>)(a, threads);
}

void soft_cross_entropy_backward(const SoftCrossEntropyBackward& a, int threads) {
  const SoftCrossEntropy& f = a.forward;
  wish_huge_pages(a.gradient, f.views * f.rows * f.columns * element_size(f.dtype));
  (f.dtype == DType::f64 ? backward<double> : backward<float>)(a, threads);
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
