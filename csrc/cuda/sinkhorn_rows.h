// Rows of scores on a GPU, and what a warp does with one: its softmax, its argmax.
#pragma once

#include <climits>
#include <type_traits>

#include "element.h"
#include "exponent.h"
#include "sinkhorn_layout.h"

namespace clustops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
using Accumulator = std::conditional_t<std::is_same<T, double>::value, double, float>;
template <class T>
constexpr int kVector = static_cast<int>(16 / sizeof(T));  // elements of one load

#ifdef CLUSTOPS_SIMT
template <class A>
A fused(A a, A b, A c) {
  return std::fma(a, b, c);
}
template <class A>
A fresh(const A* where) {
  return *where;
}
inline uint4 load16(const void* from) {
  uint4 raw;
  std::memcpy(&raw, from, sizeof raw);
  return raw;
}
inline void store16(void* to, uint4 raw) { std::memcpy(to, &raw, sizeof raw); }
#else
template <class A>
__device__ inline A fused(A a, A b, A c) {
  return fma(a, b, c);
}
// What another multiprocessor wrote.
template <class A>
__device__ inline A fresh(const A* where) {
  return __ldcg(where);
}
__device__ inline uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }
__device__ inline void store16(void* to, uint4 raw) { *static_cast<uint4*>(to) = raw; }
#endif

template <class A>
__device__ inline A log_two(A x) {
  return logarithm(x) * static_cast<A>(kLog2E);
}

template <class A>
__device__ inline bool is_finite(A x) {
  return x >= Numbers<A>::lowest && x <= -Numbers<A>::lowest;
}

// kVector elements from column c on, 0 from column `columns` on. `wide`: rows start at multiples of 16 bytes.
template <class T>
__device__ inline uint4 load_vector(const T* row, int c, int columns, bool wide) {
  if (wide && c + kVector<T> <= columns) return load16(row + c);
  T x[kVector<T>];
  memset(x, 0, sizeof x);
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) {
    if (c + j < columns) x[j] = row[c + j];
  }
  uint4 raw;
  memcpy(&raw, x, sizeof raw);
  return raw;
}

template <class T>
__device__ inline void numbers_of(uint4 raw, Accumulator<T> (&x)[kVector<T>]) {
  if constexpr (std::is_same<T, Bf16>::value) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = words[i] << 16, high = words[i] & 0xffff0000u;
      memcpy(&x[2 * i], &low, sizeof low);
      memcpy(&x[2 * i + 1], &high, sizeof high);
    }
  } else {
    T elements[kVector<T>];
    memcpy(elements, &raw, sizeof raw);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) x[j] = value_of(elements[j]);
  }
}

template <class T>
__device__ inline bool all_finite(const Accumulator<T> (&x)[kVector<T>]) {
  bool finite = true;
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) finite &= is_finite(x[j]);
  return finite;
}

// The rows of one problem where they were given.
template <class T>
struct GlobalRows {
  using Element = T;
  SinkhornRows a;
  int64_t p;
  bool wide;

  __device__ int columns() const { return static_cast<int>(a.columns); }
  __device__ const T* row(int64_t n) const {
    if (n < a.rows) return static_cast<const T*>(a.scores) + p * a.problem_stride + n * a.row_stride;
    return static_cast<const T*>(a.queue) + p * a.queue_problem_stride + (n - a.rows) * a.queue_row_stride;
  }
  __device__ uint4 vector(int64_t n, int c) const { return load_vector(row(n), c, columns(), wide); }
  __device__ Accumulator<T> weight(int64_t n) const {
    if (!a.weights || n >= a.rows) return 1;
    return static_cast<const Accumulator<T>*>(a.weights)[p * a.weight_problem_stride + n * a.weight_row_stride];
  }
};

// Rows in shared memory, with zeros up to a whole vector.
template <class T>
struct SharedRows {
  using Element = T;
  const T* x;
  const Accumulator<T>* weights;
  int stride;

  __device__ int columns() const { return stride; }
  __device__ const T* row(int64_t n) const { return x + n * stride; }
  __device__ uint4 vector(int64_t n, int c) const { return load_vector(row(n), c, stride, true); }
  __device__ Accumulator<T> weight(int64_t n) const { return weights[n]; }
};

// Potentials a times `unit`, or zeros; -inf from entry `all` on.
template <class A>
struct Potentials {
  const A* a;
  int all;
  A unit;
  bool wide;

  __device__ A at(int c) const { return c >= all ? -Numbers<A>::infinity : a ? a[c] * unit : A(0); }

  template <int kSize>
  __device__ void at(int c, A (&x)[kSize]) const {
    if (a && wide && c + kSize <= all) {
      constexpr int kStep = static_cast<int>(16 / sizeof(A));
#pragma unroll
      for (int j = 0; j < kSize; j += kStep) {
        const uint4 raw = load16(a + c + j);
        memcpy(&x[j], &raw, sizeof raw);
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] *= unit;
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] = at(c + j);
    }
  }
};

// log2 of a sum of powers of two that come one after the other.
template <class A>
struct LogSum {
  A top = -Numbers<A>::infinity, sum = 0;

  __device__ void add(A log) {
    if (log <= top) {
      if (log > -Numbers<A>::infinity) sum += power_of_two(log - top);
    } else {
      sum = log > top ? fused(sum, power_of_two(top - log), A(1)) : log;
      top = log > top ? log : top;
    }
  }
  __device__ A value() const { return sum == 0 ? -Numbers<A>::infinity : top + log_two(sum); }
};

// The softmax of one row: all lanes of a warp have exp2(z - top) / sum.
template <class A>
struct RowSum {
  A top = -Numbers<A>::infinity, sum = 0;
  bool finite = true;
};

template <class Rows, class A>
__device__ RowSum<A> row_sum(const Rows& rows, int64_t n, const Potentials<A>& potentials, A scale) {
  using T = typename Rows::Element;
  constexpr int kSize = kVector<T>;
  RowSum<A> row;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 2
  for (int c = lane * kSize; c < potentials.all; c += kWarp * kSize) {
    A z[kSize], a[kSize];
    numbers_of<T>(rows.vector(n, c), z);
    row.finite &= all_finite<T>(z);
    potentials.at(c, a);
    A most = row.top;
#pragma unroll
    for (int j = 0; j < kSize; ++j) z[j] = fused(z[j], scale, a[j]), most = larger(most, z[j]);
    const A shift = most == -Numbers<A>::infinity ? A(0) : most;
    row.sum *= power_of_two(row.top - shift);
#pragma unroll
    for (int j = 0; j < kSize; ++j) row.sum += power_of_two(z[j] - shift);
    row.top = most;
  }
  A most = row.top;
  for (int by = kWarp / 2; by > 0; by /= 2) most = larger(most, __shfl_xor_sync(kAllLanes, most, by));
  if (most > -Numbers<A>::infinity) row.sum *= power_of_two(row.top - most);
  row.top = most;
  for (int by = kWarp / 2; by > 0; by /= 2) row.sum += __shfl_xor_sync(kAllLanes, row.sum, by);
  row.finite = !__any_sync(kAllLanes, !row.finite);
  return row;
}

template <class T, class Out>
__device__ void store_vector(Out* row, int c, int columns, const Accumulator<T> (&x)[kVector<T>], bool wide) {
  constexpr int kStep = static_cast<int>(16 / sizeof(Out));
  Out elements[kVector<T>];
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) assign(elements[j], x[j]);
  if (wide && c + kVector<T> <= columns) {
#pragma unroll
    for (int j = 0; j < kVector<T>; j += kStep) {
      uint4 raw;
      memcpy(&raw, elements + j, sizeof raw);
      store16(row + c + j, raw);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      if (c + j < columns) row[c + j] = elements[j];
    }
  }
}

// A warp writes the soft assignment of a row; potentials as powers of two.
template <class Rows, class A, class Out>
__device__ void assign_soft(const Rows& rows, int64_t n, const Potentials<A>& potentials, A scale, int columns, Out* out,
                            bool wide) {
  using T = typename Rows::Element;
  constexpr int kSize = kVector<T>;
  const RowSum<A> row = row_sum(rows, n, potentials, scale);
  const A share = row.finite ? A(1) / row.sum : A(NAN);
  for (int c = static_cast<int>(threadIdx.x) % kWarp * kSize; c < columns; c += kWarp * kSize) {
    A z[kSize], a[kSize];
    numbers_of<T>(rows.vector(n, c), z);
    potentials.at(c, a);
#pragma unroll
    for (int j = 0; j < kSize; ++j) z[j] = power_of_two(fused(z[j], scale, a[j]) - row.top) * share;
    store_vector<T>(out, c, columns, z, wide);
  }
}

// A NaN is above all numbers; the lower index of equals.
template <class A>
__device__ inline bool leads(A one, int i, A other, int j) {
  const bool nan = one != one, other_nan = other != other;
  return nan != other_nan ? nan : one > other || ((one == other || nan) && i < j);
}

// A warp writes 1 where s / epsilon + a is largest, computed as the reference does, and 0 elsewhere.
template <class Rows, class A, class Out>
__device__ void assign_hard(const Rows& rows, int64_t n, const Potentials<A>& potentials, A epsilon, int columns, Out* out,
                            bool wide) {
  using T = typename Rows::Element;
  constexpr int kSize = kVector<T>;
  A best = -Numbers<A>::infinity;
  int at = INT_MAX;
  bool finite = true;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int c = lane * kSize; c < potentials.all; c += kWarp * kSize) {
    A z[kSize], a[kSize];
    numbers_of<T>(rows.vector(n, c), z);
    finite &= all_finite<T>(z);
    potentials.at(c, a);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const A value = add(z[j] / epsilon, a[j]);
      if (c + j < potentials.all && leads(value, c + j, best, at)) best = value, at = c + j;
    }
  }
  for (int by = kWarp / 2; by > 0; by /= 2) {
    const A value = __shfl_xor_sync(kAllLanes, best, by);
    const int index = __shfl_xor_sync(kAllLanes, at, by);
    if (leads(value, index, best, at)) best = value, at = index;
  }
  finite = !__any_sync(kAllLanes, !finite);
  for (int c = lane * kSize; c < columns; c += kWarp * kSize) {
    A q[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) q[j] = !finite ? A(NAN) : c + j == at ? A(1) : A(0);
    store_vector<T>(out, c, columns, q, wide);
  }
}

}  // namespace clustops::cuda
