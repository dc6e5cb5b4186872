// The contrastive loss under any weights, from blocks of inner products that torch has just multiplied: sums of the
// exponentials and weights of each row, and the matrix that the gradient multiplies rows with.
#include "../common/contrastive_weighted.h"

#include "contrastive_rows.h"
#include "kernels.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSumRows = 4;     // rows of a CTA
constexpr int kAtOnce = 4;      // products that a thread has on their way for each
constexpr int kTileLines = 32;  // rows and columns of a CTA's part of the gradient
constexpr int kTileColumns = 256;
constexpr int kColumnThreads = 64;

// Row `line` of a block.
struct Line {
  int64_t row;     // its number among all rows
  int64_t sample;  // from the first anchor on
  uint32_t view;

  __device__ Line(const WeightedBlock& a, int64_t line) : row(a.row * a.views + line) {
    const uint32_t within = static_cast<uint32_t>(line) / static_cast<uint32_t>(a.views);
    sample = a.row - a.first + within, view = static_cast<uint32_t>(line) - within * static_cast<uint32_t>(a.views);
  }
};

template <class W>
__device__ float weight_at(const WeightedBlock& a, int64_t anchor, int64_t sample) {
  return static_cast<float>(value_of(static_cast<const W*>(a.weights)[anchor * a.weights_stride + sample]));
}

// Takes columns c, c + kThreads, ... of one row: `pull` sums w x, `own` w.
template <class W>
__device__ void take_columns(const WeightedBlock& a, const Line& at, const float* products, int64_t c, float scale,
                             RowSums& sums) {
  const int64_t columns = a.columns * a.views;
  float x[kAtOnce], w[kAtOnce], high = sums.shift;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int64_t column = c + i * kThreads;
    const bool counts = column < columns && a.column * a.views + column != at.row;
    x[i] = counts ? products[column] : 0.0f;
    w[i] = column < columns
               ? weight_at<W>(a, at.sample, a.column + static_cast<uint32_t>(column) / static_cast<uint32_t>(a.views))
               : 0.0f;
    // Of a negative or infinite weight, and of NaN, the sum is NaN.
    if (!(w[i] >= 0 && w[i] < Numbers<float>::infinity)) sums.own = Numbers<float>::infinity - Numbers<float>::infinity;
    if (!counts) w[i] = 0;
    high = counts && x[i] * scale > high ? x[i] * scale : high;
  }
  sums.sum *= power_of_two(sums.shift - high);
  sums.shift = high;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int64_t column = c + i * kThreads;
    const bool counts = column < columns && a.column * a.views + column != at.row;
    sums.sum += counts ? power_of_two(fmaf(x[i], scale, -high)) : 0.0f;
    sums.pull = fmaf(w[i], x[i], sums.pull);
    sums.own += w[i];
  }
}

// Adds what a block gave to a row's sums so far.
__device__ inline void add_sums(const WeightedSums& a, const Line& at, const RowSums& sums) {
  const int64_t i = at.sample * a.block.views + at.view;
  if (sums.sum > 0) {
    const double before = a.shift[i], now = sums.shift, high = before > now ? before : now;
    a.partition[i] = a.partition[i] * exp2(before - high) + sums.sum * exp2(now - high);
    a.shift[i] = high;
  }
  a.weighted[i] += sums.pull;
  if (at.view == 0) a.total[at.sample] += sums.own;
}

// One CTA per kSumRows rows of a block. products [rows, columns] row-major.
// Limit: reading products, which the matrix product has just left in the level 2 cache.
template <class W>
__global__ void __launch_bounds__(kThreads) sums_of(WeightedSums a, float scale) {
  __shared__ RowSums joined[kWarps][kSumRows];
  const WeightedBlock& block = a.block;
  const int64_t lines = block.rows * block.views, columns = block.columns * block.views;
  for (int64_t first = int64_t{blockIdx.x} * kSumRows; first < lines; first += int64_t{gridDim.x} * kSumRows) {
#pragma unroll 1
    for (int r = 0; r < kSumRows && first + r < lines; ++r) {
      const Line at(block, first + r);
      const float* const products = static_cast<const float*>(block.products) + (first + r) * columns;
      RowSums sums{Numbers<float>::lowest / 2, 0, 0, 0};
      for (int64_t c = threadIdx.x; c < columns; c += kThreads * kAtOnce) {
        take_columns<W>(block, at, products, c, scale, sums);
      }
#pragma unroll
      for (int by = 16; by > 0; by /= 2) sums.merge(shuffled(sums, by));
      if (threadIdx.x % 32 == 0) joined[threadIdx.x / 32][r] = sums;
    }
    __syncthreads();
    if (threadIdx.x < kSumRows && first + threadIdx.x < lines) {
      RowSums sum = joined[0][threadIdx.x];
      for (int w = 1; w < kWarps; ++w) sum.merge(joined[w][threadIdx.x]);
      add_sums(a, Line(block, first + threadIdx.x), sum);
    }
    __syncthreads();  // before the next rows' sums
  }
}

// One CTA per kTileLines rows and kTileColumns columns: a thread takes every kColumnThreads-th column of every fourth row.
// Weights of the pairs in the other direction are turned around in shared memory. Results may take the products' place.
// Limit: reading products and writing gradients, in the level 2 cache.
template <class W, class T>
__global__ void __launch_bounds__(kThreads) gradients_of(WeightedGradient a, float scale, T* gradients) {
  __shared__ float back[kTileColumns][kTileLines + 1];  // [sample of the columns, sample of the rows]
  constexpr int kEach = kTileColumns / kColumnThreads, kStep = kThreads / kColumnThreads;
  const WeightedBlock& block = a.block;
  const float *const grad = static_cast<const float*>(a.grad), *const lse = static_cast<const float*>(a.lse),
              *const share = static_cast<const float*>(a.share);
  const int64_t views = block.views, lines = block.rows * views, columns = block.columns * views;
  const int64_t parts = divide_up(columns, kTileColumns), units = parts * divide_up(lines, kTileLines);
  const bool both = block.columns_are_anchors();
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t line0 = unit / parts * kTileLines, column0 = unit % parts * kTileColumns;
    const int64_t end = line0 + kTileLines < lines ? line0 + kTileLines : lines;
    const int64_t columns_end = column0 + kTileColumns < columns ? column0 + kTileColumns : columns;
    const int64_t row_sample = block.row + line0 / views, row_count = block.row + (end - 1) / views + 1 - row_sample;
    const int64_t sample = block.column + column0 / views, count = block.column + (columns_end - 1) / views + 1 - sample;
    if (both) {
      __syncthreads();  // all have left what is overwritten
      for (int64_t i = threadIdx.x; i < count * kTileLines; i += kThreads) {
        const int64_t j = i / kTileLines, k = i % kTileLines;
        if (k < row_count) back[j][k] = weight_at<W>(block, sample + j - block.first, row_sample + k);
      }
      __syncthreads();
    }
    int64_t c[kEach], column_sample[kEach];
    float grad_b[kEach], lse_b[kEach], share_b[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      c[i] = column0 + threadIdx.x % kColumnThreads + i * kColumnThreads;
      column_sample[i] = block.column + static_cast<uint32_t>(c[i]) / static_cast<uint32_t>(views);
      const int64_t b = (block.column - block.first) * views + c[i];
      const bool has = both && c[i] < columns;
      grad_b[i] = has ? grad[b] : 0.0f, lse_b[i] = has ? lse[b] : 0.0f, share_b[i] = has ? share[b] : 0.0f;
    }
    for (int64_t line = line0 + threadIdx.x / kColumnThreads; line < end; line += kStep) {
      const Line at(block, line);
      const int64_t row = at.sample * views + at.view;
      const float grad_a = grad[row], lse_a = lse[row], share_a = share[row];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (c[i] >= columns) continue;
        const int64_t place = line * columns + c[i];
        const float score = static_cast<const float*>(block.products)[place] * scale;
        float g = grad_a * power_of_two(score - lse_a) - share_a * weight_at<W>(block, at.sample, column_sample[i]);
        if (both) {
          g = fmaf(grad_b[i], power_of_two(score - lse_b[i]), g);
          g = fmaf(-share_b[i], back[column_sample[i] - sample][at.sample + block.first - row_sample], g);
        }
        assign(gradients[place], at.row == block.column * views + c[i] ? 0.0f : g);
      }
    }
  }
}

float scale_of(const WeightedBlock& a) { return static_cast<float>(kLog2E / a.temperature); }

}  // namespace

void weighted_sums(const WeightedSums& a, void* stream) {
  with_element(a.block.weights_dtype, [&](auto weight) {
    launch(sums_of<decltype(weight)>, grid_for(divide_up(a.block.rows * a.block.views, kSumRows)), kThreads, 0, stream, a,
           scale_of(a.block));
  });
}

void weighted_gradient(const WeightedGradient& a, DType dtype, void* gradients, void* stream) {
  const int64_t units = divide_up(a.block.rows * a.block.views, kTileLines) *
                        divide_up(a.block.columns * a.block.views, kTileColumns);
  with_element(a.block.weights_dtype, [&](auto weight) {
    with_element(dtype, [&](auto element) {
      using T = decltype(element);
      if constexpr (sizeof(T) < 8) {
        launch(gradients_of<decltype(weight), T>, grid_for(units), kThreads, 0, stream, a, scale_of(a.block),
               static_cast<T*>(gradients));
      }
    });
  });
}

}  // namespace clustops::cuda
