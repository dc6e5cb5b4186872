// The arguments of cross-entropy against biased softmaxes, checked once for CPU and CUDA alike.
#pragma once

#include <vector>

#include "tensor.h"

namespace clustops {

// Losses of pairs: row b of scores[view[n]] against row b of targets[target[n]].
struct SoftCrossEntropy {
  const void* scores;     // [views, rows, columns], neighbouring columns, any other strides
  const void* targets;    // [n_targets, rows, columns], likewise, of a dtype of its own
  const void* bias;       // [n_targets, columns], neighbouring columns, of the accumulation dtype
  const int64_t* view;    // [pairs] in host memory, or null: pair n is view n with target n
  const int64_t* target;  // likewise
  int64_t pairs, views, n_targets, rows, columns;
  int64_t view_stride, row_stride;           // of the scores, in elements
  int64_t target_stride, target_row_stride;  // of the targets
  int64_t bias_stride;                       // from target to target
  DType dtype, target_dtype;                 // the targets are float64 just where the scores are
  double temperature, target_temperature;
  void* losses;              // [pairs, rows], float32 (float64 for float64 scores), as all that follows
  void* score_normalizers;   // [views, rows]
  void* target_normalizers;  // [n_targets, rows]
};

struct SoftCrossEntropyBackward {
  SoftCrossEntropy forward;  // without losses; the normalisers are read
  const void* upstream;      // [pairs, rows], the gradient of the losses, at any stride
  int64_t upstream_pair_stride, upstream_row_stride;
  void* gradient;  // [views, rows, columns], contiguous, of the dtype of the scores
};

// Without pairs, view n goes with target n. What is returned points into `view` and `target`.
SoftCrossEntropy soft_cross_entropy_arguments(const Tensor& scores, const Tensor& targets, const Tensor& bias,
                                              const std::vector<int64_t>& view, const std::vector<int64_t>& target,
                                              double temperature, double target_temperature, const Tensor& losses,
                                              const Tensor& score_normalizers, const Tensor& target_normalizers,
                                              Device device);
SoftCrossEntropyBackward soft_cross_entropy_backward_arguments(
    const Tensor& upstream, const Tensor& scores, const Tensor& targets, const Tensor& bias,
    const Tensor& score_normalizers, const Tensor& target_normalizers, const std::vector<int64_t>& view,
    const std::vector<int64_t>& target, double temperature, double target_temperature, const Tensor& gradient,
    Device device);

}  // namespace clustops
