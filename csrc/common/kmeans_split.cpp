#include "kmeans_split.h"

namespace clustops {

namespace {

DType real(const Tensor& tensor) { return tensor.dtype == DType::f64 ? DType::f64 : DType::f32; }

void expect_one_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    if (other->device_index != first.device_index) throw std::invalid_argument("all tensors must be on one device");
  }
}

}  // namespace

KMeansMembers kmeans_members_arguments(const Tensor& score, const Tensor& labels, const Tensor& weights,
                                       const Tensor& best, const Tensor* places, int64_t offset, bool last,
                                       Device device) {
  expect_dims(score, "score", 2);
  expect_dims(best, "best", 2);
  const int64_t problems = score.shape[0], rows = score.shape[1], clusters = best.shape[1];
  expect(score, "score", real(score), device, {problems, rows});
  expect(labels, "labels", DType::i64, device, {problems, rows});
  expect(weights, "weights", DType::f64, device, {problems, rows}, 2);
  expect(best, "best", real(score), device, {problems, clusters});
  if (places) expect(*places, "places", DType::i64, device, {problems, clusters});
  expect_one_device(score, {&labels, &weights, &best, places ? places : &best});
  return {score.data,
          labels.as<const int64_t>(),
          weights.as<const double>(),
          best.data,
          places ? places->as<int64_t>() : nullptr,
          problems,
          rows,
          clusters,
          weights.strides[0],
          weights.strides[1],
          offset,
          last,
          real(score)};
}

KMeansSplit kmeans_split_arguments(const Tensor& means, const Tensor& farthest, const Tensor& counts,
                                   const Tensor& centroids, const Tensor& child, const Tensor& tickets, uint64_t seed,
                                   int64_t restarts, int64_t iteration, Device device) {
  expect_dims(means, "means", 3);
  const int64_t entries = means.shape[0], clusters = means.shape[1], features = means.shape[2];
  for (const Tensor* tensor : {&means, &farthest, &centroids}) {
    expect(*tensor, "centroids", real(means), device, {entries, clusters, features});
  }
  for (const Tensor* tensor : {&counts, &child, &tickets}) {
    expect(*tensor, "counts", DType::i64, device, {entries, clusters});
  }
  if (restarts < 1 || clusters < 1) throw std::invalid_argument("restarts and clusters must be at least 1");
  expect_one_device(means, {&farthest, &counts, &centroids, &child, &tickets});
  return {means.data,
          farthest.data,
          counts.as<const int64_t>(),
          centroids.data,
          child.as<int64_t>(),
          tickets.as<int64_t>(),
          entries,
          clusters,
          features,
          restarts,
          iteration,
          seed,
          real(means)};
}

}  // namespace clustops
