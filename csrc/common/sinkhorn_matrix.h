// The arguments of the projection of small matrices to doubly stochastic ones, checked once for CPU and CUDA alike.
#pragma once

#include "tensor.h"

namespace clustops {

struct SinkhornMatrix {
  const void* m;         // [matrices, n, n], contiguous
  const void* gradient;  // of the result, contiguous, like m; null: forward
  void* result;          // like m: the projection, or the gradient of m
  int64_t matrices, n, n_iters;
  DType dtype;
};

// Rows of the largest matrix that kernels take.
constexpr int64_t kLargestMatrix = 32;

SinkhornMatrix sinkhorn_matrix_arguments(const Tensor& m, const Tensor* gradient, const Tensor& result,
                                         int64_t n_iters, Device device);

}  // namespace clustops
