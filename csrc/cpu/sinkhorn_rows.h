// Rows of scores in every dtype, four at a time: powers 2^(scale s + bias), their sums, and what is done with the four
// rows before in the same sweep.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../common/simd_exp.h"
#include "../common/sinkhorn.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Rows of one sweep.
constexpr int kRows = 4;
// A row's sum is kept in lanes for so many columns, then added up in fp64.
constexpr int64_t kChunk = 4096;
// Sums of a row in this range were made of powers of which none that matters overflowed or was lost.
constexpr double kLeastSum = 0x1p-40, kMostSum = 0x1p100;

template <class T>
using Lanes = typename VecFor<T>::type;

// A dtype of scores, and the type in which they are computed with.
struct F32 {
  using Stored = float;
  using Wide = float;
  static Vec load(const float* p) { return Vec::load(p); }
  static Vec load_first(const float* p, int64_t n) { return Vec::load_first(p, n); }
};
struct F64 {
  using Stored = double;
  using Wide = double;
  static VecD load(const double* p) { return VecD::load(p); }
  static VecD load_first(const double* p, int64_t n) { return VecD::load_first(p, n); }
};
template <Vec (*kWiden)(const uint16_t*)>
struct Half {
  using Stored = uint16_t;
  using Wide = float;
  static Vec load(const uint16_t* p) { return kWiden(p); }
  static Vec load_first(const uint16_t* p, int64_t n) {
    uint16_t last[Vec::kWidth] = {};
    std::copy(p, p + n, last);
    return kWiden(last);
  }
};
using BF16 = Half<widen_bf16>;
using F16 = Half<widen_f16>;

// work(element type) for a dtype of scores.
template <class Work>
void with_element(DType dtype, const Work& work) {
  if (dtype == DType::f64) work(F64());
  if (dtype == DType::f32) work(F32());
  if (dtype == DType::bf16) work(BF16());
  if (dtype == DType::f16) work(F16());
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Room for a number for each column: whole cache lines. Behind the last column a bias is -inf, so that powers are 0.
inline int64_t padded_columns(int64_t columns) { return divide_up(columns, 16) * 16; }

// The exponents scale s + bias of a row's powers.
template <class T>
struct Exponents {
  T scale;
  const T* bias;  // [padded]
  int64_t columns, padded;
  double virtual_exponent, virtual_power;  // of the virtual column in each row: -inf and 0 where there is none
};

// step(k, count, last) for each vector of columns; `last` says that only `count` columns are left.
template <class T, class Step>
inline void for_lanes(int64_t first, int64_t end, const Step& step) {
  int64_t k = first;
  for (; k + Lanes<T>::kWidth <= end; k += Lanes<T>::kWidth) step(k, Lanes<T>::kWidth, std::false_type());
  if (k < end) step(k, end - k, std::true_type());
}

template <class V, bool kLast, class T>
V load_lanes(const T* p, int64_t count) {
  if constexpr (kLast) {
    return V::load_first(p, count);
  } else {
    return V::load(p);
  }
}
template <class E, bool kLast>
inline auto load_scores(const typename E::Stored* p, int64_t count) {
  if constexpr (kLast) {
    return E::load_first(p, count);
  } else {
    return E::load(p);
  }
}

template <bool kLast, class V, class T>
void store_lanes(V value, T* p, int64_t count) {
  if constexpr (kLast) {
    store_first(value, p, count);
  } else {
    store(value, p);
  }
}

// Powers of four rows to e [4, padded], and their sums. `flaws` are 0 for rows of finite scores, NaN for others.
// before(k, count, last) is called on columns just before their powers in e are replaced.
template <class E, class Before>
void sweep(const typename E::Stored* const (&rows)[kRows], const Exponents<typename E::Wide>& z,
           typename E::Wide* e, double (&sums)[kRows], typename E::Wide (&flaws)[kRows], const Before& before) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  const V scale = V::set1(z.scale), zero = V::set1(0);
  const T* const biases = z.bias;
  T* to[kRows];
  for (int i = 0; i < kRows; ++i) to[i] = e + i * z.padded;
  V flaw[kRows] = {zero, zero, zero, zero};
  for (double& sum : sums) sum = 0;
  for (int64_t first = 0; first < z.columns; first += kChunk) {
    V sum[kRows] = {zero, zero, zero, zero};
    for_lanes<T>(first, std::min(z.columns, first + kChunk), [&](int64_t k, int64_t count, auto last) {
      before(k, count, last);
      const V bias = V::load(biases + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const V s = load_scores<E, decltype(last)::value>(rows[i] + k, count);
        const V power = exp2(fma(s, scale, bias));
        flaw[i] = fma(s, zero, flaw[i]);
        sum[i] = sum[i] + power;
        store(power, to[i] + k);
      }
    });
    for (int i = 0; i < kRows; ++i) sums[i] += reduce_add(sum[i]);
  }
  for (int i = 0; i < kRows; ++i) flaws[i] = reduce_add(flaw[i]);
}

// The largest exponent of a row, not below `least`.
template <class E>
typename E::Wide largest_exponent(const typename E::Stored* row, const Exponents<typename E::Wide>& z,
                                  typename E::Wide least) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  const V scale = V::set1(z.scale), none = V::set1(-std::numeric_limits<T>::infinity());
  V most = none;
  for_lanes<T>(0, z.columns, [&](int64_t k, int64_t count, auto last) {
    most = max(fma(load_scores<E, decltype(last)::value>(row + k, count), scale, V::load(z.bias + k)), most);
  });
  return std::max(least, reduce_max(most));
}

// The powers of one row divided by 2^most, to e; their sum.
template <class E>
double powers_below(const typename E::Stored* row, const Exponents<typename E::Wide>& z, typename E::Wide most,
                    typename E::Wide* e) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  const V scale = V::set1(z.scale), shift = V::set1(most);
  double total = 0;
  for (int64_t first = 0; first < z.columns; first += kChunk) {
    V sum = V::set1(0);
    for_lanes<T>(first, std::min(z.columns, first + kChunk), [&](int64_t k, int64_t count, auto last) {
      const V s = load_scores<E, decltype(last)::value>(row + k, count);
      const V power = exp2(fma(s, scale, V::load(z.bias + k)) - shift);
      sum = sum + power;
      store(power, e + k);
    });
    total += reduce_add(sum);
  }
  return total;
}

// A row's sum, its virtual column included, and that column's power.
struct RowSum {
  double total, virtual_power;
};

// From the sum of a sweep; where that is out of range, the row is done again below its largest exponent.
template <class E>
RowSum settle(double sum, const typename E::Stored* row, const Exponents<typename E::Wide>& z, typename E::Wide* e) {
  using T = typename E::Wide;
  const double total = sum + z.virtual_power;
  if (total >= kLeastSum && total <= kMostSum) return {total, z.virtual_power};
  const T most = largest_exponent<E>(row, z, static_cast<T>(z.virtual_exponent));
  const double below = std::exp2(z.virtual_exponent - most);
  return {powers_below<E>(row, z, most, e) + below, below};
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
