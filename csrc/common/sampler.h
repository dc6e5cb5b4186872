// The arguments of the samplers' ops, checked once. The order they compute is defined in
// clustops/reference/sampler.py.
#pragma once

#include "tensor.h"

namespace clustops {

// The cluster of each sample, integers of any kind as they lie; negative ones belong to no cluster.
struct Labels {
  const void* data = nullptr;
  int64_t count = 0, stride = 1;  // in elements
  int bytes = 8;                  // of one label
  bool has_sign = true;
};

// Counting sort. Samples are cut into `ranges`; cursors say how many samples of a range each cluster has, then where
// in the table they go.
struct ClusterMembers {
  Labels labels;
  void* cursors;     // [ranges, clusters], of the dtype of the members; zero before counting
  int64_t* offsets;  // [clusters + 1]
  void* members;     // [offsets[clusters]]; null while counting
  int64_t ranges, clusters;
  DType dtype;  // of the members: int32 or int64
};

// The samples of each cluster: those of c are members[offsets[c]] .. members[offsets[c + 1] - 1].
struct MemberTable {
  const void* members;
  const int64_t* offsets;
  int64_t samples, clusters;
  DType dtype;  // of the members: int32 or int64
};

enum class Replacement { cover, deepcluster, always };

// The data set index at each position of an epoch.
struct SamplerOrder {
  MemberTable table;
  const int64_t* bounds;     // [clusters + 1]: where each cluster's slots begin
  const int64_t* positions;  // [count], or null: start, start + step, ..
  int64_t start, step, count;
  int64_t* result;  // [count]
  uint64_t seed, epoch;
  Replacement replacement;
};

// The data set indices of each batch.
struct SamplerBatches {
  MemberTable table;
  const int64_t* batches;   // [count]
  const int64_t* clusters;  // [filled]
  int64_t* result;          // [count, clusters_per_batch * samples_per_cluster]
  int64_t count, filled, clusters_per_batch, samples_per_cluster;
  uint64_t seed, epoch;
};

ClusterMembers cluster_members_arguments(const Labels& labels, const Tensor& cursors, const Tensor& offsets,
                                         const Tensor* members);
SamplerOrder sampler_order_arguments(const Tensor& result, const Tensor* positions, int64_t start, int64_t step,
                                     const Tensor& members, const Tensor& offsets, const Tensor& bounds, int64_t seed,
                                     int64_t epoch, const std::string& replacement);
SamplerBatches sampler_batches_arguments(const Tensor& result, const Tensor& batches, const Tensor& members,
                                         const Tensor& offsets, const Tensor& clusters, int64_t clusters_per_batch,
                                         int64_t samples_per_cluster, int64_t seed, int64_t epoch);

}  // namespace clustops
