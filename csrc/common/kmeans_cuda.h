// The arguments of the k-means assignment on a GPU.
#pragma once

#include <string>

#include "kmeans.h"

namespace clustops {

// What a score may be multiplied in: bf16; two bf16 numbers for each fp32; or that, with what is too close to call
// decided by ||x - c||^2 in fp32.
enum class Precision { medium, high, highest };

// For each row of x the `top` nearest centroids: labels and distances are [problems, rows, top].
struct KMeansAssignCuda : KMeansAssign {
  int64_t top;
  Precision precision;
};

Precision precision_named(const std::string& name);

// Bytes of workspace; 0 where none is needed.
int64_t kmeans_assign_cuda_workspace(int64_t problems, int64_t rows, int64_t clusters, int64_t features, int64_t top,
                                     DType dtype, Precision precision);

KMeansAssignCuda kmeans_assign_cuda_arguments(const Tensor& x, const Tensor& centroids, const Tensor& labels,
                                              const Tensor& distances, const Tensor& workspace, Precision precision);

}  // namespace clustops
