// The contrastive loss under any weights, from blocks of inner products that stay in a cache: sums of the exponentials
// and weights of each row, and the matrix that the gradient multiplies rows with.
//
// A thread takes the rows of a few samples. A sample's weights are widened and repeated for each view once and serve all
// its rows; those of the pairs (b, a) are turned around on the way. Sums over columns are kept in vectors for the length
// of a block, sums over rows for the length of a unit, then in fp64, in an order that depends on the sizes alone.
#include "../common/contrastive_weighted.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../common/parallel.h"
#include "element.h"

// What a sweep does with a vector stays in its loop: as a function of its own it takes three times as long.
#define CLUSTOPS_INLINE __attribute__((always_inline))

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int64_t kUnitSamples = 16;  // at least a vector

inline Vec power_of(Vec x) { return exp2(x); }
inline VecD power_of(VecD x) { return exp2(x); }

// A whole vector.
template <class T>
struct All {
  using V = Vector<T>;
  V read_from(const T* p) const { return read(p); }
  void write_to(V x, T* p) const { write(x, p); }
  V or_zero(V x) const { return x; }
};

// The lanes that are left for the last one.
template <class T>
struct First {
  using V = Vector<T>;
  int64_t count;
  V read_from(const T* p) const { return read_first(p, count); }
  void write_to(V x, T* p) const { write_first(x, p, count); }
  // Zero beyond the end, where x is at least that.
  V or_zero(V x) const {
    T lanes[V::kWidth];
    for (int i = 0; i < V::kWidth; ++i) lanes[i] = i < count ? std::numeric_limits<T>::infinity() : T(0);
    return min(read(lanes), x);
  }
};

// step(column, lanes) for each vector of columns [first, end).
template <class T, class Step>
CLUSTOPS_INLINE inline void over_columns(int64_t first, int64_t end, const Step& step) {
  constexpr int kWidth = Vector<T>::kWidth;
  int64_t k = first;
  for (; k + kWidth <= end; k += kWidth) step(k, All<T>{});
  if (k < end) step(k, First<T>{end - k});
}

// A vector of weights, which may be of any dtype.
inline VecD read_as(const double* p, VecD*) { return read(p); }
inline VecD read_as(const float* p, VecD*) { return load_wide(p); }
template <class S>
VecD read_as(const S* p, VecD*) {
  float lanes[Vec::kWidth];
  write(read_first(p, VecD::kWidth), lanes);
  return load_wide(lanes);
}
template <class S>
Vec read_as(const S* p, Vec*) {
  return read(p);
}
inline Vec read_as(const double* p, Vec*) {
  float lanes[Vec::kWidth];
  for (int i = 0; i < Vec::kWidth; i += VecD::kWidth) store(read(p + i), lanes + i);
  return read(lanes);
}
template <class T, class S>
Vector<T> weights_at(const S* p, int64_t count) {
  constexpr int kWidth = Vector<T>::kWidth;
  if (count >= kWidth) return read_as(p, static_cast<Vector<T>*>(nullptr));
  S all[kWidth] = {};
  std::copy(p, p + count, all);
  return read_as(all, static_cast<Vector<T>*>(nullptr));
}

// work(weights) with them as pointers to their elements.
template <class Work>
void with_weights(const WeightedBlock& a, const Work& work) {
  switch (a.weights_dtype) {
    case DType::f64: return work(static_cast<const double*>(a.weights));
    case DType::bf16: return work(static_cast<const Bf16*>(a.weights));
    case DType::f16: return work(static_cast<const F16*>(a.weights));
    default: return work(static_cast<const float*>(a.weights));
  }
}

// Lanes of two vectors in another order.
template <int kStep, bool kUpper, class Lanes, int... k>
Lanes exchanged(Lanes a, Lanes b, std::integer_sequence<int, k...>) {
  constexpr int n = sizeof...(k);
  return __builtin_shufflevector(a, b, (k & kStep ? n + k - (kUpper ? 0 : kStep) : k + (kUpper ? kStep : 0))...);
}

// Rows become columns: lanes whose number has a bit go where the vector's number has it.
template <int kStep = 1, class V>
CLUSTOPS_INLINE inline void transpose(V (&rows)[V::kWidth]) {
  constexpr std::make_integer_sequence<int, V::kWidth> lanes;
#pragma GCC unroll 16
  for (int i = 0; i < V::kWidth; ++i) {
    if (i & kStep) continue;
    const V a = rows[i], b = rows[i | kStep];
    rows[i] = {exchanged<kStep, false>(a.v, b.v, lanes)};
    rows[i | kStep] = {exchanged<kStep, true>(a.v, b.v, lanes)};
  }
  if constexpr (2 * kStep < V::kWidth) transpose<2 * kStep>(rows);
}

// Whether all weights so far are finite and at least 0.
template <class T>
struct Fault {
  using V = Vector<T>;
  V least = V::set1(0), rest = V::set1(0);

  void look(V w) { least = min(least, w), rest = rest + (w - w); }
  // 0, or NaN.
  double found() const {
    T lanes[V::kWidth];
    write(least, lanes);
    const bool negative = std::any_of(lanes, lanes + V::kWidth, [](T w) { return w < 0; });
    return negative ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(reduce_add(rest));
  }
};

template <class T>
void repeat(const T* w, int64_t count, int64_t views, T* out) {
  if (views == 2) {
    for (int64_t k = 0; k < count; ++k) out[2 * k] = out[2 * k + 1] = w[k];
  } else {
    for (int64_t k = 0; k < count; ++k) std::fill_n(out + views * k, views, w[k]);
  }
}

// A thread's rows of a block, those of samples [first, last), and room for weights: of one sample, as they are and for
// each column, and of the pairs in the other direction, a row for each sample. Rows are whole vectors.
template <class T>
struct Unit {
  using V = Vector<T>;
  const WeightedBlock& a;
  int64_t first, last;
  int64_t columns, stride;
  std::unique_ptr<T[]> room;
  T *narrow, *weights, *back;

  Unit(const WeightedBlock& block, int64_t from, int64_t to, bool both)
      : a(block), first(from), last(to), columns(a.columns * a.views), stride(columns + kUnitSamples) {
    const int64_t rows = both ? kUnitSamples : 0;
    room.reset(new T[a.columns + kUnitSamples + stride * (1 + rows)]);
    narrow = room.get(), weights = narrow + a.columns + kUnitSamples, back = weights + stride;
  }
  T* row(int64_t sample, int64_t view) const {
    return static_cast<T*>(a.products) + ((sample - a.row) * a.views + view) * columns;
  }
  // The column of a row with itself, -1 where it is in another block.
  int64_t itself(int64_t sample, int64_t view) const {
    const int64_t column = sample - a.column;
    return column >= 0 && column < a.columns ? column * a.views + view : -1;
  }
  // Takes the weights of a sample with each column.
  void read_weights(int64_t sample, Fault<T>& fault) const {
    with_weights(a, [&](auto* w) {
      w += (sample - a.first) * a.weights_stride + a.column;
      T* const to = a.views == 1 ? weights : narrow;
      for (int64_t k = 0; k < a.columns; k += V::kWidth) {
        const V some = weights_at<T>(w + k, a.columns - k);
        fault.look(some);
        write(some, to + k);
      }
    });
    if (a.views > 1) repeat(narrow, a.columns, a.views, weights);
  }
  // Takes the weights of samples [from, end of the block), which are anchors, with those of the unit, and adds them up.
  void read_weights_back(int64_t from, Fault<T>& fault, T* total) const {
    with_weights(a, [&](auto* w) {
      for (int64_t sample = from; sample < a.column + a.columns; sample += V::kWidth) {
        const int64_t count = std::min<int64_t>(V::kWidth, a.column + a.columns - sample), at = sample - a.column;
        auto* const corner = w + (sample - a.first) * a.weights_stride + first;
        // Rows lie too far apart for the hardware to guess which is next.
        for (int64_t k = 0; k < V::kWidth && count == V::kWidth; ++k) {
          __builtin_prefetch(corner + (std::min(k + 2 * V::kWidth, a.column + a.columns - 1 - sample)) * a.weights_stride);
        }
        V sum = V::set1(0);
        for (int64_t i = 0; i < last - first; i += V::kWidth) {
          V rows[V::kWidth];
          for (int64_t k = 0; k < V::kWidth; ++k) {
            rows[k] = k < count ? weights_at<T>(corner + k * a.weights_stride + i, last - first - i) : V::set1(0);
            fault.look(rows[k]);
          }
          transpose(rows);
          const int64_t samples = std::min<int64_t>(V::kWidth, last - first - i);
          for (int64_t k = 0; k < samples; ++k) {
            sum = sum + rows[k];
            T* const to = back + (i + k) * stride + at * a.views;
            if (a.views == 1) {
              write(rows[k], to);
            } else {
              T lanes[V::kWidth];
              write(rows[k], lanes);
              repeat(lanes, count, a.views, to);
            }
          }
        }
        write(sum, total + at);
      }
    });
  }
};

int64_t units_of(const WeightedBlock& a) { return (a.rows + kUnitSamples - 1) / kUnitSamples; }

// work(unit, number) for all rows of a block.
template <class T, class Work>
void over_units(const WeightedBlock& a, bool both, int threads, const Work& work) {
  parallel_for(units_of(a), threads, [&](int64_t number, int) {
    const int64_t first = a.row + number * kUnitSamples;
    work(Unit<T>(a, first, std::min(first + kUnitSamples, a.row + a.rows), both), number);
  });
}

// What the rows of a unit add to the columns of a block: a number for each column, and for each sample.
template <class T>
struct Columns {
  std::vector<T> partition, weighted, total;

  explicit Columns(const WeightedBlock& a)
      : partition(a.columns * a.views), weighted(a.columns * a.views), total(a.columns + kUnitSamples) {}
};

struct Swept {
  double partition, weighted, total;
};

// Columns [from, to) of a row; with kMirrored also what the row adds to them.
template <bool kMirrored, class T>
Swept sweep(const T* x, const T* w, const T* back, int64_t from, int64_t to, T scale, T shift, Columns<T>& into) {
  using V = Vector<T>;
  V partition = V::set1(0), weighted = V::set1(0), total = V::set1(0);
  const V by = V::set1(scale), minus = V::set1(-shift);
  T *const partitions = into.partition.data(), *const weighteds = into.weighted.data();
  over_columns<T>(from, to, [&](int64_t k, auto lanes) CLUSTOPS_INLINE {
    const V product = lanes.read_from(x + k), weight = lanes.read_from(w + k);
    const V e = lanes.or_zero(power_of(fma(product, by, minus)));
    partition = partition + e;
    weighted = fma(weight, product, weighted);
    total = total + weight;
    if constexpr (kMirrored) {
      lanes.write_to(lanes.read_from(partitions + k) + e, partitions + k);
      lanes.write_to(fma(lanes.read_from(back + k), product, lanes.read_from(weighteds + k)), weighteds + k);
    }
  });
  return {reduce_add(partition), reduce_add(weighted), reduce_add(total)};
}

template <class T>
T largest(const T* x, int64_t columns) {
  using V = Vector<T>;
  V most = V::set1(x[0]);
  int64_t k = 0;
  for (; k + V::kWidth <= columns; k += V::kWidth) most = max(most, read(x + k));
  T result = reduce_max(most);
  for (; k < columns; ++k) result = std::max(result, x[k]);
  return result;
}

// The first column that stands for both directions of a pair.
int64_t first_mirrored(const WeightedSums& a) {
  const WeightedBlock& block = a.block;
  return a.mirrored ? std::clamp<int64_t>(block.row + block.rows - block.column, 0, block.columns) : block.columns;
}

// The largest score of a row becomes its shift.
template <class T>
void raise_shift(const WeightedSums& a, int64_t at, const T* x, int64_t columns, T scale) {
  const double most = std::max(a.shift[at], static_cast<double>(largest(x, columns)) * scale);
  a.partition[at] *= std::exp2(a.shift[at] - most);
  a.shift[at] = most;
}

template <class T>
void sums_of(const WeightedSums& a, const Unit<T>& unit, Columns<T>& into) {
  const WeightedBlock& block = a.block;
  const T scale = static_cast<T>(kLog2E / block.temperature);
  const int64_t direct = first_mirrored(a), middle = direct * block.views, end = unit.columns;
  Fault<T> fault;
  if (direct < block.columns) unit.read_weights_back(block.column + direct, fault, into.total.data());
  for (int64_t sample = unit.first; sample < unit.last; ++sample) {
    unit.read_weights(sample, fault);
    const int64_t anchor = sample - block.first;
    const T* const back = unit.back + (sample - unit.first) * unit.stride;
    for (int64_t view = 0; view < block.views; ++view) {
      T *const x = unit.row(sample, view), *const w = unit.weights;
      const int64_t at = anchor * block.views + view, itself = unit.itself(sample, view);
      if (itself >= 0 && end == 1) continue;
      const T own = itself >= 0 ? w[itself] : 0;
      if (itself >= 0) x[itself] = -std::numeric_limits<T>::max(), w[itself] = 0;
      if (!a.mirrored) raise_shift(a, at, x, end, scale);
      const T shift = static_cast<T>(a.shift[at]);
      const Swept near = sweep<false>(x, w, back, 0, middle, scale, shift, into);
      const Swept far = sweep<true>(x, w, back, middle, end, scale, shift, into);
      a.partition[at] += near.partition + far.partition;
      a.weighted[at] += near.weighted + far.weighted;
      if (view == 0) a.total[anchor] += near.total + far.total;
      if (itself >= 0) w[itself] = own;
    }
  }
  a.total[unit.first - block.first] += fault.found();
}

template <class T>
void add_block(const WeightedSums& a, int threads) {
  const WeightedBlock& block = a.block;
  const int64_t direct = first_mirrored(a);
  const bool both = direct < block.columns;
  std::vector<Columns<T>> columns(both ? units_of(block) : 1, Columns<T>(block));
  over_units<T>(block, both, threads, [&](const Unit<T>& unit, int64_t number) {
    sums_of(a, unit, columns[both ? number : 0]);
  });
  if (!both) return;
  const int64_t anchor = block.column - block.first, views = block.views;
  double *const partition = a.partition + anchor * views, *const weighted = a.weighted + anchor * views;
  for (const Columns<T>& added : columns) {
    for (int64_t k = direct; k < block.columns; ++k) {
      a.total[anchor + k] += static_cast<double>(added.total[k]) * static_cast<double>(views);
    }
    for (int64_t k = direct * views; k < block.columns * views; ++k) partition[k] += added.partition[k];
    for (int64_t k = direct * views; k < block.columns * views; ++k) weighted[k] += added.weighted[k];
  }
}

// One row of G; the numbers of its own row come first, then those of each column, null where columns are no anchors.
template <class T>
struct Numbers {
  T grad, lse, share;
};
template <bool kBoth, class T>
void turn(T* x, const T* w, const T* back, int64_t columns, T scale, Numbers<T> own, const T* grad, const T* lse,
          const T* share) {
  using V = Vector<T>;
  const V by = V::set1(scale), minus = V::set1(-own.lse), g = V::set1(own.grad), r = V::set1(-own.share);
  over_columns<T>(0, columns, [&](int64_t k, auto lanes) CLUSTOPS_INLINE {
    const V product = lanes.read_from(x + k);
    V result = fma(r, lanes.read_from(w + k), power_of(fma(product, by, minus)) * g);
    if constexpr (kBoth) {
      const V other = power_of(fma(product, by, V::set1(0) - lanes.read_from(lse + k)));
      result = fma(other, lanes.read_from(grad + k), result) - lanes.read_from(back + k) * lanes.read_from(share + k);
    }
    lanes.write_to(result, x + k);
  });
}

template <class T>
void gradient_of(const WeightedGradient& a, const Unit<T>& unit) {
  const WeightedBlock& block = a.block;
  const T scale = static_cast<T>(kLog2E / block.temperature);
  const T* const grad = static_cast<const T*>(a.grad);
  const T* const lse = static_cast<const T*>(a.lse);
  const T* const share = static_cast<const T*>(a.share);
  const int64_t end = unit.columns, offset = (block.column - block.first) * block.views;
  const bool both = block.columns_are_anchors();
  Fault<T> fault;
  if (both) {
    std::vector<T> total(block.columns + kUnitSamples);
    unit.read_weights_back(block.column, fault, total.data());
  }
  for (int64_t sample = unit.first; sample < unit.last; ++sample) {
    unit.read_weights(sample, fault);
    const T* const back = unit.back + (sample - unit.first) * unit.stride;
    for (int64_t view = 0; view < block.views; ++view) {
      const int64_t at = (sample - block.first) * block.views + view, itself = unit.itself(sample, view);
      const Numbers<T> own = {grad[at], lse[at], share[at]};
      T* const x = unit.row(sample, view);
      if (both) {
        turn<true>(x, unit.weights, back, end, scale, own, grad + offset, lse + offset, share + offset);
      } else {
        turn<false>(x, unit.weights, back, end, scale, own, grad, lse, share);
      }
      if (itself >= 0) x[itself] = 0;
    }
  }
}

template <class T>
void turn_block(const WeightedGradient& a, int threads) {
  over_units<T>(a.block, a.block.columns_are_anchors(), threads,
                [&](const Unit<T>& unit, int64_t) { gradient_of(a, unit); });
}

}  // namespace

void weighted_sums(const WeightedSums& a, int threads) {
  (a.block.dtype == DType::f64 ? add_block<double> : add_block<float>)(a, threads);
}

void weighted_gradient(const WeightedGradient& a, int threads) {
  (a.block.dtype == DType::f64 ? turn_block<double> : turn_block<float>)(a, threads);
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
