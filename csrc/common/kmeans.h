// The arguments of the k-means assignment, checked once for CPU and CUDA alike.
#pragma once

#include "host_device.h"
#include "tensor.h"

namespace clustops {

// For each row of x the nearest centroid (squared L2, ties to the lowest index) and the distance to it; or the few nearest.
struct KMeansAssign {
  const void* x;          // [problems, rows, features], rows and problems at any stride
  const void* centroids;  // [problems, clusters, features]: float64 if x is, float32 if not, as are the distances
  int64_t* labels;        // [problems, rows], or [problems, rows, top]
  void* distances;        // likewise
  float* workspace;       // kmeans_assign_workspace() floats; none on a GPU
  int64_t problems, rows, clusters, features;
  int64_t problem_stride, row_stride;  // of x, in elements
  DType dtype;                         // of x

  template <class T>
  CLUSTOPS_HOST_DEVICE const T* row(int64_t b, int64_t n) const {
    return static_cast<const T*>(x) + b * problem_stride + n * row_stride;
  }
  template <class T>
  CLUSTOPS_HOST_DEVICE const T* centroid(int64_t b, int64_t k) const {
    return static_cast<const T*>(centroids) + (b * clusters + k) * features;
  }
};

KMeansAssign kmeans_assign_arguments(const Tensor& x, const Tensor& centroids, const Tensor& labels,
                                     const Tensor& distances, const Tensor& workspace, int64_t workspace_size,
                                     Device device);

}  // namespace clustops
