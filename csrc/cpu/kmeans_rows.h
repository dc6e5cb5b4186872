// Rows of any dtype, read in the type in which kernels compute.
#pragma once

#include "../common/kmeans_update.h"
#include "kmeans_direct.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Features [first, first + count) of a row: double for fp64, float for the rest; where they lie, or in `wide`.
template <class T>
const T* row_as(const KMeansRows& rows, int64_t b, int64_t n, int64_t first, int64_t count, T* wide) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_half(rows.dtype)) {
      widen_row(rows.row<uint16_t>(b, n) + first, rows.dtype, count, wide);
      return wide;
    }
  }
  return rows.row<T>(b, n) + first;
}

inline int64_t size_of(DType dtype) { return is_half(dtype) ? 2 : dtype == DType::f64 ? 8 : 4; }

inline const char* bytes_of(const KMeansRows& rows, int64_t b, int64_t n) {
  return static_cast<const char*>(rows.x) + (b * rows.problem_stride + n * rows.row_stride) * size_of(rows.dtype);
}

// work(T()) with the type in which kernels compute.
template <class Work>
void with_wide(DType dtype, const Work& work) {
  if (dtype == DType::f64) {
    work(double());
  } else {
    work(float());
  }
}

// One weight stands for all, and it is 1.
inline bool all_one(const KMeansRows& rows) {
  const bool one = (rows.problems == 1 || rows.weight_problem_stride == 0) &&
                   (rows.rows == 1 || rows.weight_row_stride == 0);
  return one && rows.problems > 0 && rows.rows > 0 && rows.weights[0] == 1;
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
