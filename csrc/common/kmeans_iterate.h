// The arguments of whole iterations of k-means.
#pragma once

#include "kmeans_update.h"

namespace clustops {

// A fixed number of iterations of each entry: a restart of a problem, the restarts of one side by side.
struct KMeansIterate {
  KMeansRows rows;         // float32, bfloat16 or float16
  const double* grid;      // [problems, 2, features + 1]
  const float* centroids;  // [entries, clusters, features]
  float* result;           // likewise
  int64_t* labels;         // [entries, rows], of the last assignment
  int64_t* repaired;       // [entries]: clusters split off others
  int64_t* still;          // [entries]: 1 where the last iteration moved nothing
  int64_t entries, clusters, iterations;
  bool cosine, split;  // centroids of norm 1; empty clusters split off others instead of staying where they are
  uint64_t seed;
};

KMeansIterate kmeans_iterate_arguments(const Tensor& x, const Tensor& weights, const Tensor& grid,
                                       const Tensor& centroids, const Tensor& result, const Tensor& labels,
                                       const Tensor& repaired, const Tensor& still, int64_t iterations, bool cosine,
                                       bool split, uint64_t seed, Device device);

}  // namespace clustops
