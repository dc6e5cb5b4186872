#include "kmeans.h"

namespace clustops {

KMeansAssign kmeans_assign_arguments(const Tensor& x, const Tensor& centroids, const Tensor& labels,
                                     const Tensor& distances, const Tensor& workspace, int64_t workspace_size,
                                     Device device) {
  expect_dims(x, "x", 3);
  expect_dims(centroids, "centroids", 3);
  const int64_t problems = x.shape[0], rows = x.shape[1], features = x.shape[2], clusters = centroids.shape[1];
  const DType exact = x.dtype == DType::f64 ? DType::f64 : DType::f32;
  if (x.dtype == DType::i32 || x.dtype == DType::i64) throw std::invalid_argument("x must be floating point");
  expect(x, "x", x.dtype, device, {problems, rows, features}, 2);
  expect(centroids, "centroids", exact, device, {problems, clusters, features});
  expect_dims(labels, "labels", 3);
  expect(labels, "labels", DType::i64, device, {problems, rows, labels.shape[2]});
  expect(distances, "distances", exact, device, {problems, rows, labels.shape[2]});
  expect(workspace, "workspace", DType::f32, device, {workspace_size});
  for (const Tensor* tensor : {&centroids, &labels, &distances, &workspace}) {
    if (tensor->device_index != x.device_index) throw std::invalid_argument("all tensors must be on the device of x");
  }
  if (clusters < 1) throw std::invalid_argument("centroids must hold at least one row for each problem");
  if (labels.shape[2] < 1 || labels.shape[2] > clusters) throw std::invalid_argument("labels must be of 1 to K nearest");
  return {x.data,   centroids.data, labels.as<int64_t>(), distances.data, workspace.as<float>(), problems, rows,
          clusters, features,       x.strides[0],         x.strides[1],   x.dtype};
}

}  // namespace clustops
