// The arguments of the k-means update (bounds, sums, means), checked once for CPU and CUDA alike.
#pragma once

#include "host_device.h"
#include "tensor.h"

namespace clustops {

// Weighted rows of several problems.
struct KMeansRows {
  const void* x;          // [problems, rows, features], rows and problems at any stride
  const double* weights;  // [problems, rows] at any stride; a row of weight 0 counts nowhere
  int64_t problems, rows, features;
  int64_t problem_stride, row_stride;                // of x, in elements
  int64_t weight_problem_stride, weight_row_stride;  // of the weights
  DType dtype;                                       // of x

  template <class T>
  CLUSTOPS_HOST_DEVICE const T* row(int64_t b, int64_t n) const {
    return static_cast<const T*>(x) + b * problem_stride + n * row_stride;
  }
  CLUSTOPS_HOST_DEVICE double weight(int64_t b, int64_t n) const {
    return weights[b * weight_problem_stride + n * weight_row_stride];
  }
};

// The largest magnitude of w [x, 1] in each column.
struct KMeansBounds {
  KMeansRows rows;
  double* bounds;  // [problems, features + 1]
};

// Adds w [x, 1] of each row to the sums of its cluster, on two grids on which they are exact in any order; and counts.
struct KMeansSums {
  KMeansRows rows;
  const int64_t* labels;  // [problems, rows], -1 for rows to leave out
  const int64_t* before;  // likewise, or null: labels whose rows are in the sums already; only the others move
  const double* grid;     // [problems, 2, features + 1], powers of two
  double* sums;           // [problems, 2, clusters, features + 1]
  int64_t* counts;        // [problems, clusters]
  int64_t clusters;
};

// Rows of positive weight with each label.
struct KMeansCounts {
  const int64_t* labels;  // [problems, rows], -1 for rows to leave out
  const double* weights;  // [problems, rows] at any stride
  int64_t* counts;        // [problems, clusters]
  int64_t problems, rows, clusters;
  int64_t weight_problem_stride, weight_row_stride;
};

// Means from sums; a cluster without mass keeps its previous one.
struct KMeansMeans {
  const double* sums;    // [problems, 2, clusters, features + 1]
  const void* previous;  // [problems, clusters, features], float32 or float64, as are the means
  void* means;
  double* shift;      // [problems]: sum of (means - previous)^2
  double* workspace;  // [problems, kmeans_means_blocks(clusters * features)]
  int64_t problems, clusters, features;
  DType dtype;
};

// Partial sums of `shift`, each over this many elements.
constexpr int64_t kMeansBlock = 1024;
inline int64_t kmeans_means_blocks(int64_t elements) { return (elements + kMeansBlock - 1) / kMeansBlock; }

KMeansRows kmeans_rows_arguments(const Tensor& x, const Tensor& weights, Device device);
KMeansBounds kmeans_bounds_arguments(const Tensor& x, const Tensor& weights, const Tensor& bounds, Device device);
KMeansSums kmeans_sums_arguments(const Tensor& x, const Tensor& labels, const Tensor* before, const Tensor& weights,
                                 const Tensor& grid, const Tensor& sums, const Tensor& counts, Device device);
KMeansCounts kmeans_counts_arguments(const Tensor& labels, const Tensor& weights, const Tensor& counts, Device device);
KMeansMeans kmeans_means_arguments(const Tensor& sums, const Tensor& previous, const Tensor& means, const Tensor& shift,
                                   const Tensor& workspace, Device device);

}  // namespace clustops
