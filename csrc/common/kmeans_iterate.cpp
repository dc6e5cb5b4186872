#include "kmeans_iterate.h"

namespace clustops {

KMeansIterate kmeans_iterate_arguments(const Tensor& x, const Tensor& weights, const Tensor& grid,
                                       const Tensor& centroids, const Tensor& result, const Tensor& labels,
                                       const Tensor& repaired, const Tensor& still, int64_t iterations, bool cosine,
                                       bool split, uint64_t seed, Device device) {
  const KMeansRows rows = kmeans_rows_arguments(x, weights, device);
  if (rows.dtype == DType::f64) throw std::invalid_argument("x must be float32, bfloat16 or float16");
  expect_dims(centroids, "centroids", 3);
  const int64_t entries = centroids.shape[0], clusters = centroids.shape[1];
  if (rows.problems == 0 ? entries != 0 : entries % rows.problems != 0) {
    throw std::invalid_argument("entries must be a multiple of the problems of x");
  }
  if (clusters < 1) throw std::invalid_argument("centroids must hold at least one row for each entry");
  expect(grid, "grid", DType::f64, device, {rows.problems, 2, rows.features + 1});
  expect(centroids, "centroids", DType::f32, device, {entries, clusters, rows.features});
  expect(result, "result", DType::f32, device, {entries, clusters, rows.features});
  expect(labels, "labels", DType::i64, device, {entries, rows.rows});
  expect(repaired, "repaired", DType::i64, device, {entries});
  expect(still, "still", DType::i64, device, {entries});
  for (const Tensor* other : {&grid, &centroids, &result, &labels, &repaired, &still}) {
    if (other->device_index != x.device_index) throw std::invalid_argument("all tensors must be on the device of x");
  }
  return {rows,
          grid.as<const double>(),
          centroids.as<const float>(),
          result.as<float>(),
          labels.as<int64_t>(),
          repaired.as<int64_t>(),
          still.as<int64_t>(),
          entries,
          clusters,
          iterations,
          cosine,
          split,
          seed};
}

}  // namespace clustops
