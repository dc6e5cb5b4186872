// One block of inner products of the contrastive loss under any weights, checked once for CPU and CUDA alike.
#pragma once

#include "host_device.h"
#include "tensor.h"

namespace clustops {

// Products of the rows of some samples, which are anchors, with those of others, row-major in `products`. Row a is view
// a % views of sample a / views. Anchors are samples [first, first + anchors); the columns are all anchors or none.
struct WeightedBlock {
  void* products;       // [rows * views, columns * views], float32 or float64 as all numbers but the weights
  const void* weights;  // [anchors, samples], neighbouring columns
  int64_t weights_stride;
  DType dtype, weights_dtype;
  int64_t views, first, anchors;
  int64_t row, rows;        // samples
  int64_t column, columns;  // samples
  double temperature;

  CLUSTOPS_HOST_DEVICE bool columns_are_anchors() const { return first <= column && column < first + anchors; }
};

// What a block adds to the losses: of an anchor a over all rows b but itself
//   partition = sum_b exp(s_ab - shift_a), weighted = sum_b w_ab z_a.z_b, total = sum_b w_ab; s_ab = z_a.z_b / temperature.
struct WeightedSums {
  WeightedBlock block;
  // The columns beyond the block's last row stand for the pairs (b, a) as well; shifts are equal and stay. Otherwise
  // a shift is the largest score so far.
  bool mirrored;
  double* shift;      // [anchors * views], of scores times log2(e)
  double* partition;  // [anchors * views]
  double* weighted;   // [anchors * views]
  double* total;      // [anchors]; NaN where a weight is negative or not finite
};

// Turns the products in place into
//   G_ab = grad_a (exp(s_ab - lse_a) - w_ab / W_a) + grad_b (exp(s_ab - lse_b) - w_ba / W_b),
// 0 on the diagonal; without the second half where the columns are no anchors.
struct WeightedGradient {
  WeightedBlock block;
  const void* grad;   // [anchors * views]
  const void* lse;    // [anchors * views], times log2(e)
  const void* share;  // [anchors * views], grad_a / W_a
};

struct WeightedPlace {
  int64_t views, first, row, rows, column, columns;
};

WeightedSums weighted_sums_arguments(const Tensor& products, const Tensor& weights, const Tensor& shift,
                                     const Tensor& partition, const Tensor& weighted, const Tensor& total,
                                     const WeightedPlace& place, double temperature, bool mirrored, Device device);
WeightedGradient weighted_gradient_arguments(const Tensor& products, const Tensor& weights, const Tensor& grad,
                                             const Tensor& lse, const Tensor& share, const WeightedPlace& place,
                                             double temperature, Device device);

}  // namespace clustops
