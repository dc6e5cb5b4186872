// What the k-means assignments share: rows in the type of their distances, and ||x - c||^2 itself, which decides.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/kmeans.h"
#include "../common/simd.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Candidates whose distances are computed side by side, to hide the latency of each sum.
constexpr int kTogether = 4;

constexpr int64_t kMeanColumns = 64;

template <class T>
struct Nearest {
  int64_t label;
  T distance;

  bool before(const Nearest& other) const {
    return distance < other.distance || (distance == other.distance && label < other.label);
  }
};

// Some rows of a problem, in the type of its centroids.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;

  const T* operator[](int64_t i) const { return first + i * stride; }
};

inline bool is_half(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

inline void widen_row(const uint16_t* from, DType dtype, int64_t features, float* to) {
  const auto widen = [&](const uint16_t* p) { return dtype == DType::bf16 ? widen_bf16(p) : widen_f16(p); };
  int64_t d = 0;
  for (; d + Vec::kWidth <= features; d += Vec::kWidth) widen(from + d).store(to + d);
  if (d < features) {
    uint16_t last[Vec::kWidth] = {};
    float wide[Vec::kWidth];
    std::copy(from + d, from + features, last);
    widen(last).store(wide);
    std::copy(wide, wide + (features - d), to + d);
  }
}

// Rows [first, first + count) of problem b where they lie, or widened to `wide` [count, features].
template <class T>
Rows<T> rows_of(const KMeansAssign& a, int64_t b, int64_t first, int64_t count, float* wide) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_half(a.dtype)) {
      for (int64_t i = 0; i < count; ++i) {
        widen_row(a.row<uint16_t>(b, first + i), a.dtype, a.features, wide + i * a.features);
      }
      return {wide, a.features};
    }
  }
  return {a.row<T>(b, first), a.row_stride};
}

// Rows [first, end) come from memory while something else is computed. Inlined by force: a call of a function that only
// prefetches is one without effect, which GCC drops.
__attribute__((always_inline)) inline void prefetch_rows(const KMeansAssign& a, int64_t b, int64_t first, int64_t end) {
  const int64_t size = is_half(a.dtype) ? 2 : a.dtype == DType::f64 ? 8 : 4;
  for (int64_t n = first; n < end; ++n) {
    const char* row = static_cast<const char*>(a.x) + (b * a.problem_stride + n * a.row_stride) * size;
    for (int64_t byte = 0; byte < a.features * size; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// The mean centroid: shifting by it keeps scores small, and so their rounding, where all data lie far from the origin.
template <class T>
void mean_of_columns(const KMeansAssign& a, int64_t b, int64_t first, float* mean) {
  const int64_t count = std::min(kMeanColumns, a.features - first);
  double sum[kMeanColumns] = {};
  for (int64_t k = 0; k < a.clusters; ++k) {
    const T* c = a.centroid<T>(b, k) + first;
    for (int64_t d = 0; d < count; ++d) sum[d] += c[d];
  }
  for (int64_t d = 0; d < count; ++d) mean[first + d] = static_cast<float>(sum[d] / static_cast<double>(a.clusters));
}

// The lanes whose sum is ||x - c||^2, for each c: two interleaved sums, the same bits whatever is computed beside them.
template <int kCount, class T, class V = typename VecFor<T>::type>
inline void square_lanes(const T* x, const T* const (&c)[kCount], int64_t features, V (&lanes)[kCount]) {
  V odd[kCount];
  for (int i = 0; i < kCount; ++i) lanes[i] = odd[i] = V::set1(0);
  const auto add = [](V row, V centroid, V& sum) {
    const V e = row - centroid;
    sum = fma(e, e, sum);
  };
  int64_t d = 0;
  for (; d + 2 * V::kWidth <= features; d += 2 * V::kWidth) {
    const V first = V::load(x + d), second = V::load(x + d + V::kWidth);
    for (int i = 0; i < kCount; ++i) {
      add(first, V::load(c[i] + d), lanes[i]);
      add(second, V::load(c[i] + d + V::kWidth), odd[i]);
    }
  }
  for (; d < features; d += V::kWidth) {
    const int64_t count = std::min<int64_t>(V::kWidth, features - d);
    const V row = V::load_first(x + d, count);
    for (int i = 0; i < kCount; ++i) add(row, V::load_first(c[i] + d, count), lanes[i]);
  }
  for (int i = 0; i < kCount; ++i) lanes[i] = lanes[i] + odd[i];
}

template <int kCount, class T>
inline void squared_distances(const T* x, const T* const (&c)[kCount], int64_t features, T (&distance)[kCount]) {
  typename VecFor<T>::type lanes[kCount];
  square_lanes(x, c, features, lanes);
  for (int i = 0; i < kCount; ++i) distance[i] = reduce_add(lanes[i]);
}

// The nearest of the kCount centroids first, first + step, ... (past the end `first` again), the lowest if equal.
template <int kCount, class T>
Nearest<T> nearest_of(const KMeansAssign& a, int64_t b, const T* x, int64_t first, int64_t step) {
  const T* candidates[kCount];
  for (int i = 0; i < kCount; ++i) {
    const int64_t k = first + i * step;
    candidates[i] = a.centroid<T>(b, k < a.clusters ? k : first);
  }
  T distance[kCount];
  squared_distances(x, candidates, a.features, distance);
  Nearest<T> found{first, distance[0]};
  for (int i = 1; i < kCount; ++i) {
    found.label = distance[i] < found.distance ? first + i * step : found.label;
    found.distance = distance[i] < found.distance ? distance[i] : found.distance;
  }
  return found;
}

// By all centroids. For a row with a NaN: label 0, and the distance says so.
template <class T>
Nearest<T> nearest_of_all(const KMeansAssign& a, int64_t b, const T* x) {
  Nearest<T> nearest = nearest_of<kTogether>(a, b, x, 0, 1);
  for (int64_t k = kTogether; k < a.clusters; k += kTogether) {
    const Nearest<T> found = nearest_of<kTogether>(a, b, x, k, 1);
    if (found.distance < nearest.distance) nearest = found;
  }
  return nearest;
}

template <class T>
void put(const KMeansAssign& a, int64_t b, int64_t n, const Nearest<T>& nearest) {
  a.labels[b * a.rows + n] = nearest.label;
  static_cast<T*>(a.distances)[b * a.rows + n] = nearest.distance;
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
