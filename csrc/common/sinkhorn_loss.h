// The arguments of cross-entropy against biased softmaxes.
#pragma once

#include "tensor.h"

namespace clustops {

// Losses of pairs: row b of scores[views[n]] against row b of targets[of[n]].
struct SoftCrossEntropy {
  const void* scores;   // [views, rows, columns], neighbouring columns, any other strides
  const void* targets;  // [targets, rows, columns], likewise, of a dtype of its own
  const void* bias;     // [targets, columns], contiguous, of the accumulation dtype
  const int64_t* view;    // [pairs]; host memory
  const int64_t* target;  // [pairs]; host memory
  int64_t pairs, views, n_targets, rows, columns;
  int64_t view_stride, row_stride, target_stride, target_row_stride;
  DType dtype, target_dtype;
  double temperature, target_temperature;
  void* losses;              // [pairs, rows], float32 (float64 for float64 scores)
  void* score_normalizers;   // [views, rows]
  void* target_normalizers;  // [n_targets, rows]
};

// `losses` is then the upstream gradient, read as the normalisers are.
struct SoftCrossEntropyBackward {
  SoftCrossEntropy forward;
  void* gradient;  // [views, rows, columns], contiguous, of the dtype of the scores
};

}  // namespace clustops
