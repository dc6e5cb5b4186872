// The arguments of greedy k-means++, checked once for CPU and CUDA alike.
#pragma once

#include "kmeans_update.h"

namespace clustops {

constexpr int64_t kMaxTrials = 32;  // candidates of one step: the bits of a mask

// What the potential would be with each candidate added, and which rows it would move. An entry is a restart of a
// problem; a problem's entries lie side by side, share its rows, and have candidates of their own.
struct KMeansPotentials {
  KMeansRows rows;         // weights are [entries, rows] here
  const void* candidates;  // [entries, trials, features], float64 if x is, float32 if not, as is `closest`
  const void* closest;     // [entries, rows]
  const double* scale;     // [entries]
  int64_t* potentials;     // [entries, trials]
  int32_t* improves;       // [entries, rows]: bit t is set where candidate t is nearer than `closest`
  int64_t entries, trials;
};

// Lowers `closest` to the distance to one centroid an entry, where that is less.
struct KMeansClosest {
  KMeansRows rows;          // without weights
  void* closest;            // [entries, rows], entries at any stride
  const void* centroid;     // [entries, features], dtypes as above
  const int32_t* improves;  // [entries, rows] and [entries], or null: only rows with bit `chosen` are looked at
  const int64_t* chosen;
  int64_t entries, closest_stride;
};

// Uniform numbers of streams first_stream, first_stream + stream_step, ..: a restart each.
struct KMeansDraws {
  const int64_t* position;  // [problems, positions]
  double* draws;            // [problems, restarts, positions]
  int64_t problems, restarts, positions;
  uint64_t seed, first_stream, stream_step;
};

// Rows to start from.
struct KMeansSeed {
  KMeansRows rows;        // weights are [problems, rows]
  const double* uniform;  // [entries, clusters * trials] in [0, 1)
  int64_t* chosen;        // [entries, clusters]
  void* workspace;        // kmeans_seed_workspace() bytes
  int64_t entries, clusters, trials;
};

KMeansPotentials kmeans_potentials_arguments(const Tensor& x, const Tensor& candidates, const Tensor& closest,
                                             const Tensor& weights, const Tensor& scale, const Tensor& potentials,
                                             const Tensor& improves, Device device);
KMeansClosest kmeans_closest_arguments(const Tensor& closest, const Tensor& x, const Tensor& centroid,
                                       const Tensor* improves, const Tensor* chosen, Device device);
KMeansDraws kmeans_draws_arguments(const Tensor& position, const Tensor& draws, int64_t seed, int64_t first_stream,
                                   int64_t stream_step, Device device);
KMeansSeed kmeans_seed_arguments(const Tensor& x, const Tensor& weights, const Tensor& uniform, const Tensor& chosen,
                                 const Tensor& workspace, int64_t workspace_size, Device device);

}  // namespace clustops
