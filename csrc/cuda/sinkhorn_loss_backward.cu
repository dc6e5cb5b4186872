// The gradient of the cross-entropy against biased softmaxes: upstream (p - q) / temperature, summed over the pairs of a
// view, with p and q from the normalisers that the forward kernel saved.
#include "sinkhorn_sweep.h"

namespace clustops::cuda {
namespace {

using namespace loss;

constexpr int kMostViews = 16;  // of one launch of the backward kernel

// What the columns of a row share: upstream / temperature of each pair, and normalisers.
template <class T, int kTargets>
struct RowFactors {
  using Real = Accumulator<T>;
  Rows<T, kMostViews, kTargets> rows;
  T* gradient[kMostViews];
  Real pair[kMostViews][kTargets], view[kMostViews], target[kTargets];

  __device__ void read(const SoftCrossEntropyBackward& a, const Tile<kMostViews, kTargets>& tile, const Cut& cut,
                       const Unit& unit) {
    const SoftCrossEntropy& f = a.forward;
    const int rank = threadIdx.x % cut.width;
    rows.find(f, tile, cut, unit);
    for (int i = rank; i < tile.views * kTargets; i += cut.width) {
      const int64_t number = tile.pair[i / kTargets][i % kTargets];
      const int64_t at = (number + unit.repeat) * a.upstream_pair_stride + unit.b * a.upstream_row_stride;
      const Real g = number < 0 ? 0 : static_cast<const Real*>(a.upstream)[at];
      pair[i / kTargets][i % kTargets] = g * static_cast<Real>(cut.per_temperature);
    }
    for (int v = rank; v < tile.views; v += cut.width) {
      const int64_t at = (tile.view[v] + unit.repeat) * f.rows + unit.b;
      view[v] = static_cast<const Real*>(f.score_normalizers)[at];
      gradient[v] = static_cast<T*>(a.gradient) + at * f.columns;
    }
    for (int t = rank; t < tile.targets; t += cut.width) {
      target[t] = static_cast<const Real*>(f.target_normalizers)[(tile.target[t] + unit.repeat) * f.rows + unit.b];
    }
  }
};

// The gradient of n columns of all views of the tile.
template <int n, class T, int kTargets>
__device__ void gradient(DType target_dtype, const Tile<kMostViews, kTargets>& tile, const Cut& cut,
                         const RowFactors<T, kTargets>& row, int64_t c, int64_t step) {
  using Real = Accumulator<T>;
  constexpr int kAhead = 4;  // views whose scores are on their way at once
  const Real per_temperature = static_cast<Real>(cut.per_temperature), log2e = static_cast<Real>(kLog2E);
  Real q[kTargets][n];
#pragma unroll
  for (int t = 0; t < kTargets; ++t) {
    if (t >= tile.targets) break;
    row.rows.exponents(target_dtype, cut, t, c, step, q[t]);
#pragma unroll
    for (int j = 0; j < n; ++j) q[t][j] = power_of_two(q[t][j] - row.target[t] * log2e);
  }
#pragma unroll 1
  for (int first = 0; first < tile.views; first += kAhead) {
    T x[kAhead][n];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= tile.views) break;
      load(row.rows.view[first + i] + c, step, cut.wide, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int v = first + i;
      if (v >= tile.views) break;
      Real factor = 0, result[n] = {};
      bool live = false;  // a row without upstream gradient gets 0 whatever its scores are
#pragma unroll
      for (int t = 0; t < kTargets; ++t) {
        const Real g = row.pair[v][t];
        if (g == 0) continue;
        live = true;
        factor += g;
#pragma unroll
        for (int j = 0; j < n; ++j) result[j] -= g * q[t][j];
      }
#pragma unroll
      for (int j = 0; live && j < n; ++j) {
        result[j] += factor * power_of_two((value_of(x[i][j]) * per_temperature - row.view[v]) * log2e);
      }
      T* const to = row.gradient[v] + c;
      if (tile.again[v]) {
        T before[n];
        load(to, step, cut.wide, before);
#pragma unroll
        for (int j = 0; j < n; ++j) result[j] += value_of(before[j]);
      }
      store(to, step, cut.wide, result);
    }
  }
}

// One warp or one CTA per slice of row b of all views and targets of the tile: each thread takes its columns, the
// targets of which stay in registers while the views pass.
template <class T, int kTargets>
__global__ void __launch_bounds__(kThreads, 4)
    gradients_of(SoftCrossEntropyBackward a, const __grid_constant__ Tile<kMostViews, kTargets> tile, Cut cut) {
  constexpr int kColumns = kTargets > 2 && sizeof(T) == 2 ? 4 : 16 / sizeof(T);
  __shared__ RowFactors<T, kTargets> rows[kWarps];
  const int group = threadIdx.x / cut.width, groups = kThreads / cut.width;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * groups + group; i < cut.units();
       i += static_cast<int64_t>(gridDim.x) * groups) {
    const Unit unit = cut.unit(i);
    const DType dtype = a.forward.target_dtype;
    sync(cut);
    rows[group].read(a, tile, cut, unit);
    sync(cut);
    for_columns<kColumns>(
        cut, unit.slice * cut.columns, a.forward.columns,
        [&](int64_t c, int64_t step) { gradient<kColumns, T>(dtype, tile, cut, rows[group], c, step); },
        [&](int64_t c) { gradient<1, T>(dtype, tile, cut, rows[group], c, 1); });
  }
}

template <class T, int kTargets>
void launch_gradients(const SoftCrossEntropyBackward& a, void* stream) {
  Cut cut = cut_of(a.forward, divide_up(std::max<int64_t>(1, a.forward.columns), kSliceColumns));
  cut.wide = cut.wide && aligned(a.gradient, a.forward.dtype, a.forward.columns, 0);
  const auto tiles = a.forward.view ? tiles_of<kMostViews, kTargets>(a.forward, true)
                                    : std::vector{single_pair<kMostViews, kTargets>()};
  for (const auto& tile : tiles) {
    if (tile.views > 0) launch(gradients_of<T, kTargets>, cut.grid(), kThreads, 0, stream, a, tile, cut);
  }
}

}  // namespace

void soft_cross_entropy_backward(const SoftCrossEntropyBackward& a, void* stream) {
  with_element(a.forward.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) != 8) {
      if (a.forward.view && a.forward.n_targets > 2) return launch_gradients<T, 8>(a, stream);
    }
    launch_gradients<T, 2>(a, stream);
  });
}

}  // namespace clustops::cuda
