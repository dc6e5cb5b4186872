// What the kernels of the soft cross-entropy share: who sweeps which columns, and how rows are read.
#pragma once

#include "../common/host_device.h"
#include "element.h"
#include "exponent.h"
#include "kernels.h"
#include "sinkhorn_pairs.h"

namespace clustops::cuda::loss {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kWarpColumns = 1024;   // of rows that one warp sweeps; longer ones take a block
constexpr int64_t kSliceColumns = 4096;  // at least, of a block that sweeps a part of a row
constexpr int64_t kUnits = 1024;         // with fewer rows than this, long ones are cut, to keep a GPU busy

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

CLUSTOPS_HOST_DEVICE inline int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

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

// A row, or a slice of one, that some threads sweep.
struct Unit {
  int64_t repeat, b, slice;
};

// Who sweeps what: `width` threads take a slice of `columns` of row b of the whole tile.
struct Cut {
  int64_t repeats;  // the tile once for each problem, where row p goes with row p
  int64_t rows, slices, columns;
  int width;
  bool wide;                                // neighbouring columns can be loaded at once
  double per_temperature, score_exponent, target_exponent;  // 1 / temperature, log2(e) / temperatures

  CLUSTOPS_HOST_DEVICE int64_t units() const { return repeats * rows * slices; }
  CLUSTOPS_HOST_DEVICE Unit unit(int64_t i) const {
    const int64_t row = slices == 1 ? i : i / slices, repeat = repeats == 1 ? 0 : row / rows;
    return {repeat, row - repeat * rows, i - row * slices};
  }
  int64_t grid() const { return grid_for(divide_up(units(), kThreads / width)); }
};

__device__ inline void sync(const Cut& cut) {
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

  __device__ void find(const SoftCrossEntropy& a, const Tile<kViews, kTargets>& tile, const Cut& cut, const Unit& unit) {
    for (int v = threadIdx.x % cut.width; v < tile.views; v += cut.width) {
      view[v] = static_cast<const T*>(a.scores) + (tile.view[v] + unit.repeat) * a.view_stride + unit.b * a.row_stride;
    }
    for (int t = threadIdx.x % cut.width; t < tile.targets; t += cut.width) {
      const int64_t number = tile.target[t] + unit.repeat;
      target[t] = static_cast<const char*>(a.targets) +
                  (number * a.target_stride + unit.b * a.target_row_stride) * bytes_of(a.target_dtype);
      bias[t] = static_cast<const Real*>(a.bias) + number * a.bias_stride;
    }
  }

  // t / target_temperature + bias of columns c, .., as exponents of 2; whether all t are finite.
  template <int n>
  __device__ bool exponents(DType dtype, const Cut& cut, int t, int64_t c, int64_t step, Real (&y)[n]) const {
    Real shift[n], zero = 0;
    load_values(dtype, target[t], c, step, cut.wide, y);
    load(bias[t] + c, step, cut.wide, shift);
    const Real scale = static_cast<Real>(cut.target_exponent);
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

inline bool aligned(const void* data, DType dtype, int64_t stride, int64_t row_stride) {
  const int64_t size = bytes_of(dtype);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0 && row_stride * size % 16 == 0;
}

inline bool wide(const SoftCrossEntropy& a) {
  const DType real = a.dtype == DType::f64 ? DType::f64 : DType::f32;
  return aligned(a.scores, a.dtype, a.view_stride, a.row_stride) &&
         aligned(a.targets, a.target_dtype, a.target_stride, a.target_row_stride) &&
         aligned(a.bias, real, a.bias_stride, 0);
}

inline int64_t slices_of(int64_t rows, int64_t columns) {
  return std::max<int64_t>(1, std::min(divide_up(kUnits, std::max<int64_t>(1, rows)), columns / kSliceColumns));
}

inline Cut cut_of(const SoftCrossEntropy& a, int64_t slices) {
  const int64_t repeats = a.view ? 1 : a.pairs, columns = divide_up(divide_up(a.columns, slices), 16) * 16;
  return {repeats,
          a.rows,
          slices,
          columns,
          a.columns <= kWarpColumns ? kWarp : kThreads,
          wide(a),
          1 / a.temperature,
          kLog2E / a.temperature,
          kLog2E / a.target_temperature};
}

}  // namespace clustops::cuda::loss
