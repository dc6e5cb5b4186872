// The arguments of the projection of small matrices to doubly stochastic ones.
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

}  // namespace clustops
