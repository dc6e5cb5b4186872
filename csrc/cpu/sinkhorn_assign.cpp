// Assignments from potentials: softmax_k(s / epsilon + a), or its one-hot argmax.
#include "../common/pages.h"
#include "../common/parallel.h"
#include "sinkhorn_assign.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Rows of one unit of parallel work.
constexpr int64_t kUnit = 64;

// The dtype of assignments: that of the powers, or that of scores of sixteen bits.
template <class T>
struct Wide {
  using Stored = T;
  static void write(Lanes<T> value, T* p) { store(value, p); }
};
template <void (*kNarrow)(Vec, uint16_t*)>
struct Narrow {
  using Stored = uint16_t;
  static void write(Vec value, uint16_t* p) { kNarrow(value, p); }
};

template <class O, class V>
void write_first(V value, typename O::Stored* p, int64_t count) {
  typename O::Stored lanes[V::kWidth];
  O::write(value, lanes);
  std::copy(lanes, lanes + count, p);
}

// Writes factor e, four rows, in one vector of columns.
template <class T, class O>
struct WriteRows {
  using V = Lanes<T>;
  V factor[kRows];
  typename O::Stored* to[kRows];
  const T* e;
  int64_t padded;

  template <class Last>
  void operator()(int64_t k, int64_t count, Last) const {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const V value = V::load(e + i * padded + k) * factor[i];
      if constexpr (Last::value) {
        write_first<O>(value, to[i] + k, count);
      } else {
        O::write(value, to[i] + k);
      }
    }
  }
};

// Potentials as they were given, -inf behind the last column.
template <class T>
struct Potentials {
  T epsilon;
  const T* real;  // [padded]
  int64_t columns;
  T virtual_one;  // -inf where there is none
};

template <class E, class O>
void soft_rows(const SinkhornAssign& a, const Exponents<typename E::Wide>& z, int64_t p, int64_t first, int64_t end,
               typename E::Wide* e) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  const auto* scores = static_cast<const typename E::Stored*>(a.rows.scores) + p * a.rows.problem_stride;
  auto* out = static_cast<typename O::Stored*>(a.assignments) + p * a.rows.rows * z.columns;
  double sums[kRows];
  T flaws[kRows];
  WriteRows<T, O> previous{{}, {}, e, z.padded};
  for (int64_t r = first; r < end; r += kRows) {
    const typename E::Stored* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = scores + std::min(r + i, end - 1) * a.rows.row_stride;
    if (r == first) {
      sweep<E>(rows, z, e, sums, flaws, [](int64_t, int64_t, auto) {});
    } else {
      sweep<E>(rows, z, e, sums, flaws, previous);
    }
    for (int i = 0; i < kRows; ++i) {
      const double total = settle<E>(sums[i], rows[i], z, e + i * z.padded).total;
      previous.factor[i] = V::set1(static_cast<T>(1 / total) + flaws[i]);
      previous.to[i] = out + std::min(r + i, end - 1) * z.columns;
    }
  }
  if (first < end) for_lanes<T>(0, z.columns, previous);
}

// Where s / epsilon + a is largest in a row, the lowest such column; `columns` for the virtual one, -1 if a score is not
// finite. Divided and added just as written, so that equal sums are ties.
template <class E>
int64_t best_column(const typename E::Stored* row, const Potentials<typename E::Wide>& a) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  const V epsilon = V::set1(a.epsilon), zero = V::set1(0);
  V most = V::set1(-std::numeric_limits<T>::infinity()), flaw = zero;
  for_lanes<T>(0, a.columns, [&](int64_t k, int64_t count, auto last) {
    const V s = load_scores<E, decltype(last)::value>(row + k, count);
    flaw = fma(s, zero, flaw);
    most = max(s / epsilon + V::load(a.real + k), most);
  });
  if (!(reduce_add(flaw) == 0)) return -1;
  const T largest = reduce_max(most);
  if (a.virtual_one > largest) return a.columns;
  int64_t best = a.columns;
  for_lanes<T>(0, a.columns, [&](int64_t k, int64_t count, auto last) {
    if (best < a.columns) return;
    T lanes[V::kWidth];
    store(load_scores<E, decltype(last)::value>(row + k, count) / epsilon + V::load(a.real + k), lanes);
    best = std::min(a.columns, k + (std::find(lanes, lanes + count, largest) - lanes));
    if (best == k + count) best = a.columns;
  });
  return best < a.columns ? best : 0;  // all are NaN
}

template <class E, class O>
void hard_rows(const SinkhornAssign& a, const Potentials<typename E::Wide>& potentials, int64_t p, int64_t first,
               int64_t end) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  const int64_t columns = potentials.columns;
  const auto* scores = static_cast<const typename E::Stored*>(a.rows.scores) + p * a.rows.problem_stride;
  typename O::Stored one[V::kWidth], nan[V::kWidth];
  O::write(V::set1(1), one);
  O::write(V::set1(std::numeric_limits<T>::quiet_NaN()), nan);
  for (int64_t r = first; r < end; ++r) {
    auto* out = static_cast<typename O::Stored*>(a.assignments) + (p * a.rows.rows + r) * columns;
    const int64_t best = best_column<E>(scores + r * a.rows.row_stride, potentials);
    std::fill(out, out + columns, best < 0 ? nan[0] : typename O::Stored(0));
    if (best >= 0 && best < columns) out[best] = one[0];
  }
}

template <class E, class O>
void assign_rows(const SinkhornAssign& a, int64_t p, AssignSpace space, int threads) {
  using T = typename E::Wide;
  const int64_t columns = a.rows.columns, padded = padded_columns(columns);
  const T* given = static_cast<const T*>(a.potentials) + p * (columns + a.virtual_column);
  const T virtual_one = a.virtual_column ? given[columns] : -std::numeric_limits<T>::infinity();
  T* bias = static_cast<T*>(space.bias);
  for (int64_t k = 0; k < columns; ++k) bias[k] = a.hard ? given[k] : given[k] * static_cast<T>(kLog2E);
  std::fill(bias + columns, bias + padded, -std::numeric_limits<T>::infinity());
  const Potentials<T> potentials{static_cast<T>(a.epsilon), bias, columns, virtual_one};
  const Exponents<T> z{static_cast<T>(kLog2E / a.epsilon), bias, columns, padded, virtual_one * kLog2E,
                       std::exp2(virtual_one * kLog2E)};
  parallel_for(divide_up(a.rows.rows, kUnit), threads, [&](int64_t unit, int thread) {
    const int64_t first = unit * kUnit, end = std::min(a.rows.rows, first + kUnit);
    if (a.hard) {
      hard_rows<E, O>(a, potentials, p, first, end);
    } else {
      soft_rows<E, O>(a, z, p, first, end, static_cast<T*>(space.powers) + thread * kAssignRows * padded);
    }
  });
}

}  // namespace

void sinkhorn_assign_problem(const SinkhornAssign& a, int64_t p, AssignSpace space, int threads) {
  const bool narrow = a.assignments_dtype == a.rows.dtype;
  switch (a.rows.dtype) {
    case DType::f64: return assign_rows<F64, Wide<double>>(a, p, space, threads);
    case DType::bf16:
      return narrow ? assign_rows<BF16, Narrow<narrow_bf16>>(a, p, space, threads)
                    : assign_rows<BF16, Wide<float>>(a, p, space, threads);
    case DType::f16:
      return narrow ? assign_rows<F16, Narrow<narrow_f16>>(a, p, space, threads)
                    : assign_rows<F16, Wide<float>>(a, p, space, threads);
    default: return assign_rows<F32, Wide<float>>(a, p, space, threads);
  }
}

int64_t sinkhorn_assign_workspace(const SinkhornRows& rows, int threads) {
  return (1 + kAssignRows) * padded_columns(rows.columns) * size_of_wide(rows.dtype) / 8 * std::max(1, threads);
}

void sinkhorn_assign(const SinkhornAssign& a, int threads) {
  const int64_t padded = padded_columns(a.rows.columns), wide = size_of_wide(a.rows.dtype);
  wish_huge_pages(a.assignments, a.rows.problems * a.rows.rows * a.rows.columns * size_of(a.assignments_dtype));
  each_problem(a.rows.problems, threads, [&](int64_t p, int slot, int within) {
    char* room = static_cast<char*>(a.workspace) + slot * (1 + kAssignRows) * padded * wide;
    sinkhorn_assign_problem(a, p, {room, room + padded * wide}, within);
  });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
