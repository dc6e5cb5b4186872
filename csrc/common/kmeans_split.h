// The arguments of what happens to empty clusters.
#pragma once

#include "host_device.h"
#include "tensor.h"

namespace clustops {

// Rows of clusters by a score: the highest one of each cluster, or where it is.
struct KMeansMembers {
  const void* score;      // [problems, rows], float32 or float64
  const int64_t* labels;  // [problems, rows], -1 for rows to leave out
  const double* weights;  // [problems, rows] at any stride; rows of weight 0 are left out
  void* best;             // [problems, clusters], of the dtype of the score: written, or read where `places` is
  int64_t* places;        // [problems, clusters], or null
  int64_t problems, rows, clusters;
  int64_t weight_problem_stride, weight_row_stride;
  int64_t offset;  // of a row's place
  bool last;       // the last row that has the score, not the first
  DType dtype;
};

// Empty clusters beside the centroids of others.
struct KMeansSplit {
  const void* means;      // [entries, clusters, features], float32 or float64
  const void* farthest;   // likewise: a row of each cluster
  const int64_t* counts;  // [entries, clusters]
  void* centroids;        // [entries, clusters, features]
  int64_t* child;         // [entries, clusters]
  int64_t* tickets;       // [entries, clusters], workspace
  int64_t entries, clusters, features, restarts, iteration;
  uint64_t seed;
  DType dtype;
};

constexpr float kSplitStep = 0x1p-5f;  // as a part of the way to the farthest row

// The random stream of an iteration's donors, of those that reference/kmeans_ops.py lays out.
CLUSTOPS_HOST_DEVICE inline uint64_t split_stream(int64_t restart, int64_t iteration) {
  constexpr uint64_t kSplitUse = 2, kUses = 4;
  return kSplitUse + kUses * static_cast<uint64_t>(restart) + (static_cast<uint64_t>(iteration) << 32);
}

KMeansMembers kmeans_members_arguments(const Tensor& score, const Tensor& labels, const Tensor& weights,
                                       const Tensor& best, const Tensor* places, int64_t offset, bool last,
                                       Device device);
KMeansSplit kmeans_split_arguments(const Tensor& means, const Tensor& farthest, const Tensor& counts,
                                   const Tensor& centroids, const Tensor& child, const Tensor& tickets, uint64_t seed,
                                   int64_t restarts, int64_t iteration, Device device);

}  // namespace clustops
