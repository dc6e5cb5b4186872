#include "kmeans_update.h"

namespace clustops {

namespace {

void expect_floating(const Tensor& tensor, const char* name) {
  if (tensor.dtype == DType::i32 || tensor.dtype == DType::i64) {
    throw std::invalid_argument(std::string(name) + " must be floating point");
  }
}

void expect_one_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    if (other->device_index != first.device_index) throw std::invalid_argument("all tensors must be on one device");
  }
}

}  // namespace

KMeansRows kmeans_rows_arguments(const Tensor& x, const Tensor& weights, Device device) {
  expect_dims(x, "x", 3);
  expect_floating(x, "x");
  const int64_t problems = x.shape[0], rows = x.shape[1], features = x.shape[2];
  expect(x, "x", x.dtype, device, {problems, rows, features}, 2);
  expect(weights, "weights", DType::f64, device, {problems, rows}, 2);
  expect_one_device(x, {&weights});
  return {x.data,          weights.as<const double>(), problems,           rows,   features, x.strides[0],
          x.strides[1], weights.strides[0],         weights.strides[1], x.dtype};
}

KMeansBounds kmeans_bounds_arguments(const Tensor& x, const Tensor& weights, const Tensor& bounds, Device device) {
  const KMeansRows rows = kmeans_rows_arguments(x, weights, device);
  expect(bounds, "bounds", DType::f64, device, {rows.problems, rows.features + 1});
  expect_one_device(x, {&bounds});
  return {rows, bounds.as<double>()};
}

KMeansSums kmeans_sums_arguments(const Tensor& x, const Tensor& labels, const Tensor* before, const Tensor& weights,
                                 const Tensor& grid, const Tensor& sums, const Tensor& counts, Device device) {
  const KMeansRows rows = kmeans_rows_arguments(x, weights, device);
  expect_dims(counts, "counts", 2);
  const int64_t clusters = counts.shape[1], columns = rows.features + 1;
  expect(labels, "labels", DType::i64, device, {rows.problems, rows.rows});
  if (before) expect(*before, "before", DType::i64, device, {rows.problems, rows.rows});
  expect(grid, "grid", DType::f64, device, {rows.problems, 2, columns});
  expect(sums, "sums", DType::f64, device, {rows.problems, 2, clusters, columns});
  expect(counts, "counts", DType::i64, device, {rows.problems, clusters});
  expect_one_device(x, {&labels, before ? before : &labels, &grid, &sums, &counts});
  return {rows,
          labels.as<const int64_t>(),
          before ? before->as<const int64_t>() : nullptr,
          grid.as<const double>(),
          sums.as<double>(),
          counts.as<int64_t>(),
          clusters};
}

KMeansCounts kmeans_counts_arguments(const Tensor& labels, const Tensor& weights, const Tensor& counts, Device device) {
  expect_dims(labels, "labels", 2);
  expect_dims(counts, "counts", 2);
  const int64_t problems = labels.shape[0], rows = labels.shape[1], clusters = counts.shape[1];
  expect(labels, "labels", DType::i64, device, {problems, rows});
  expect(weights, "weights", DType::f64, device, {problems, rows}, 2);
  expect(counts, "counts", DType::i64, device, {problems, clusters});
  expect_one_device(labels, {&weights, &counts});
  return {labels.as<const int64_t>(), weights.as<const double>(), counts.as<int64_t>(), problems, rows, clusters,
          weights.strides[0],         weights.strides[1]};
}

KMeansMeans kmeans_means_arguments(const Tensor& sums, const Tensor& previous, const Tensor& means, const Tensor& shift,
                                   const Tensor& workspace, Device device) {
  expect_dims(previous, "previous", 3);
  const DType dtype = previous.dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t problems = previous.shape[0], clusters = previous.shape[1], features = previous.shape[2];
  expect(sums, "sums", DType::f64, device, {problems, 2, clusters, features + 1});
  expect(previous, "previous", dtype, device, {problems, clusters, features});
  expect(means, "means", dtype, device, {problems, clusters, features});
  expect(shift, "shift", DType::f64, device, {problems});
  expect(workspace, "workspace", DType::f64, device, {problems, kmeans_means_blocks(clusters * features)});
  expect_one_device(sums, {&previous, &means, &shift, &workspace});
  return {sums.as<const double>(), previous.data, means.data, shift.as<double>(), workspace.as<double>(),
          problems, clusters, features, dtype};
}

}  // namespace clustops
