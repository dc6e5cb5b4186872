// The arguments of the contrastive losses over classes, checked once for CPU and CUDA alike.
#pragma once

#include "tensor.h"

namespace clustops {

// Rows of all samples; the anchors are those of `count` samples from `first` on.
struct ContrastiveRows {
  const void* features;  // [samples, views, width], contiguous
  DType dtype;
  int64_t samples, views, width;
  int64_t first, count;
  double temperature;
  bool normalize;
};

// Weights q_i q_j between samples of one class, o_i between the views of a sample.
struct ContrastiveClasses {
  const int64_t* labels;   // [samples], negative: no class; null: no sample has one
  const void* confidence;  // [samples], null: 1
  DType confidence_dtype;
  double threshold;  // samples below it have no class; compared in the dtype of the confidence
  bool reweight, own_confidence;
};

struct ContrastiveForward {
  ContrastiveRows rows;
  ContrastiveClasses classes;
  // float32, float64 for float64 features:
  void* loss;    // [count, views]
  void* lse;     // [count, views]
  void* weight;  // [count]
  void* norms;   // [2], the least norm above 0 and the greatest
};

struct ContrastiveBackward {
  ContrastiveRows rows;  // the gradient is that of the anchors
  ContrastiveClasses classes;
  const void* upstream;  // [samples, views] of the dtype of the loss, at any stride
  int64_t upstream_sample_stride, upstream_view_stride;
  const void* lse;  // [samples, views] of the dtype of the loss
  void* gradient;   // [count, views, width] of the dtype of the features
};

struct ContrastiveOptions {
  double temperature, threshold;
  bool reweight, own_confidence, normalize;
};

ContrastiveForward contrastive_arguments(const Tensor& features, const Tensor* labels, const Tensor* confidence,
                                         int64_t first, int64_t count, const ContrastiveOptions& options,
                                         const Tensor& loss, const Tensor& lse, const Tensor& weight,
                                         const Tensor& norms, Device device);
ContrastiveBackward contrastive_backward_arguments(const Tensor& upstream, const Tensor& features, const Tensor* labels,
                                                   const Tensor* confidence, const Tensor& lse, int64_t first,
                                                   int64_t count, const ContrastiveOptions& options,
                                                   const Tensor& gradient, Device device);

}  // namespace clustops
