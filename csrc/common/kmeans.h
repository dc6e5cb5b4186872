// The arguments of the k-means kernels, checked once for CPU and CUDA alike.
#pragma once

#include "host_device.h"
#include "tensor.h"

namespace clustops {

// For each row of x the nearest centroid (squared L2, ties to the lowest index) and the distance to it.
struct KMeansAssign {
  const float* x;          // [problems, rows, features], rows and problems at any stride
  const float* centroids;  // [problems, clusters, features]
  int64_t* labels;         // [problems, rows]
  float* distances;        // [problems, rows]
  float* workspace;        // kmeans_assign_workspace() floats; none on a GPU
  int64_t problems, rows, clusters, features;
  int64_t problem_stride, row_stride;  // of x, in elements

  CLUSTOPS_HOST_DEVICE const float* row(int64_t b, int64_t n) const { return x + b * problem_stride + n * row_stride; }
  CLUSTOPS_HOST_DEVICE const float* centroid(int64_t b, int64_t k) const {
    return centroids + (b * clusters + k) * features;
  }
};

KMeansAssign kmeans_assign_arguments(const Tensor& x, const Tensor& centroids, const Tensor& labels,
                                     const Tensor& distances, const Tensor& workspace, int64_t workspace_size,
                                     Device device);

}  // namespace clustops
