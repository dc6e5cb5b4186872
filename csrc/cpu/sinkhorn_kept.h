// Sinkhorn with the powers kept where the plan goes: they are computed once, a later pass multiplies and adds.
#pragma once

#include "sinkhorn_mass.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Powers E [rows, columns], of which the plan is E scale / (the sum of that over the row and the virtual column).
template <class T>
struct Kept {
  T* powers;
  int64_t rows, columns;
  const T* scale;  // [padded]
  double virtual_power;

  // Four rows from r on; the last one stands in for those behind the end.
  void at(int64_t r, int64_t end, T* (&rows_at)[kRows]) const {
    for (int i = 0; i < kRows; ++i) rows_at[i] = powers + std::min(r + i, end - 1) * columns;
  }
};

// Scalar products of four rows with the scales. before(k, count, last) is called on each vector of columns.
template <class T, class Before>
void products(const Kept<T>& kept, T* const (&rows)[kRows], double (&sums)[kRows], const Before& before) {
  using V = Lanes<T>;
  const V zero = V::set1(0);
  V sum[kRows] = {zero, zero, zero, zero};
  for_lanes<T>(0, kept.columns, [&](int64_t k, int64_t count, auto last) {
    before(k, count, last);
    const V scale = V::load(kept.scale + k);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      sum[i] = fma(load_lanes<V, decltype(last)::value>(rows[i] + k, count), scale, sum[i]);
    }
  });
  for (int i = 0; i < kRows; ++i) sums[i] = kept.virtual_power + reduce_add(sum[i]);
}

// One stripe of softmaxes: column sums without their scale until the end. The flaw is NaN where a row's sum is out of
// range.
template <class T>
void kept_stripe(const Kept<T>& kept, double weight, const Stripes& stripes, int64_t stripe, const Space<T>& space,
                 int thread, int64_t padded) {
  using V = Lanes<T>;
  T* sums = space.sums(thread, padded);
  std::fill(sums, sums + padded, T(0));
  double* partial = space.partial + stripe * padded;
  std::fill(partial, partial + padded, 0.0);
  const int64_t first = stripe * stripes.rows, end = std::min(kept.rows, first + stripes.rows);
  V factor[kRows];
  T *rows[kRows], *previous[kRows];
  kept.at(first, end, previous);
  for (V& f : factor) f = V::set1(0);
  const auto add_previous = [&](int64_t k, int64_t count, auto last) {
    V sum = V::load(sums + k);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      sum = fma(factor[i], load_lanes<V, decltype(last)::value>(previous[i] + k, count), sum);
    }
    store(sum, sums + k);
  };
  double found[kRows], virtual_mass = 0, flaw = 0;
  int64_t since = 0;
  for (int64_t r = first; r < end; r += kRows) {
    kept.at(r, end, rows);
    products(kept, rows, found, add_previous);
    if ((since += kRows) > kFlush) flush(sums, partial, padded), since = kRows;
    for (int i = 0; i < kRows; ++i) {
      const double share = r + i < end ? weight / found[i] : 0;
      factor[i] = V::set1(static_cast<T>(share));
      virtual_mass += share * kept.virtual_power;
      if (!(found[i] >= kLeastSum && found[i] <= kMostSum)) flaw = std::numeric_limits<double>::quiet_NaN();
      previous[i] = rows[i];
    }
  }
  for_lanes<T>(0, kept.columns, add_previous);
  flush(sums, partial, padded);
  for (int64_t k = 0; k < padded; ++k) partial[k] *= static_cast<double>(kept.scale[k]);
  space.virtual_mass[stripe] = virtual_mass;
  space.flaw[stripe] = flaw;
}

// Powers of one stripe become the plan; whether all sums were in range.
template <class T>
bool finish_stripe(const Kept<T>& kept, const Stripes& stripes, int64_t stripe) {
  using V = Lanes<T>;
  const int64_t first = stripe * stripes.rows, end = std::min(kept.rows, first + stripes.rows);
  V factor[kRows];
  T *rows[kRows], *previous[kRows];
  double found[kRows];
  bool fine = true;
  const auto scale_previous = [&](int64_t k, int64_t count, auto last) {
    const V scale = V::load(kept.scale + k);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const V power = load_lanes<V, decltype(last)::value>(previous[i] + k, count);
      store_lanes<decltype(last)::value>(power * scale * factor[i], previous[i] + k, count);
    }
  };
  for (int64_t r = first; r < end; r += kRows) {
    // A row that stands in must not be scaled twice: the rows of an incomplete block go one by one.
    const int64_t n = std::min<int64_t>(kRows, end - r);
    kept.at(r, end, rows);
    if (r == first) {
      products(kept, rows, found, [](int64_t, int64_t, auto) {});
    } else {
      products(kept, rows, found, scale_previous);
    }
    for (int i = 0; i < kRows; ++i) {
      factor[i] = V::set1(static_cast<T>(1 / found[i]));
      previous[i] = rows[i];
      fine = fine && found[i] >= kLeastSum && found[i] <= kMostSum;
    }
    if (n < kRows) {
      for (int64_t i = 0; i < n; ++i) {
        for_lanes<T>(0, kept.columns, [&](int64_t k, int64_t count, auto last) {
          const V power = load_lanes<V, decltype(last)::value>(rows[i] + k, count) * V::load(kept.scale + k);
          store_lanes<decltype(last)::value>(power * factor[i], rows[i] + k, count);
        });
      }
      return fine;
    }
  }
  if (first < end) for_lanes<T>(0, kept.columns, scale_previous);
  return fine;
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
