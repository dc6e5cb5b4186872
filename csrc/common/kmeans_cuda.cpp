#include "kmeans_cuda.h"

#include <limits>

#include "../cuda/kmeans_layout.h"

namespace clustops {

Precision precision_named(const std::string& name) {
  if (name == "highest") return Precision::highest;
  if (name == "high") return Precision::high;
  if (name == "medium") return Precision::medium;
  throw std::invalid_argument("precision must be highest, high or medium, got " + name);
}

int64_t kmeans_assign_cuda_workspace(int64_t problems, int64_t rows, int64_t clusters, int64_t features, int64_t top,
                                     DType dtype, Precision precision) {
  if (!cuda::multiplies(clusters, features, top, dtype)) return 0;
  const int parts = cuda::parts_of(precision);
  int64_t bytes = 0;  // whichever tile the GPU's shared memory calls for
  for (int columns : cuda::kColumnChoices) {
    const cuda::Packed packed = cuda::packed_centroids(clusters, features, parts, columns);
    const int64_t needed = cuda::Workspace(problems, rows, packed, precision == Precision::highest).bytes;
    bytes = needed > bytes ? needed : bytes;
  }
  return bytes;
}

KMeansAssignCuda kmeans_assign_cuda_arguments(const Tensor& x, const Tensor& centroids, const Tensor& labels,
                                              const Tensor& distances, const Tensor& workspace, Precision precision) {
  expect_dims(x, "x", 3);
  expect_dims(centroids, "centroids", 3);
  expect_dims(labels, "labels", 3);
  const int64_t problems = x.shape[0], rows = x.shape[1], features = x.shape[2], clusters = centroids.shape[1];
  const int64_t top = labels.shape[2];
  const DType exact = x.dtype == DType::f64 ? DType::f64 : DType::f32;
  if (x.dtype == DType::i32 || x.dtype == DType::i64) throw std::invalid_argument("x must be floating point");
  expect(x, "x", x.dtype, Device::cuda, {problems, rows, features}, 2);
  expect(centroids, "centroids", exact, Device::cuda, {problems, clusters, features});
  expect(labels, "labels", DType::i64, Device::cuda, {problems, rows, top});
  expect(distances, "distances", exact, Device::cuda, {problems, rows, top});
  const int64_t bytes = kmeans_assign_cuda_workspace(problems, rows, clusters, features, top, x.dtype, precision);
  expect(workspace, "workspace", DType::f32, Device::cuda, {bytes / 4});
  for (const Tensor* tensor : {&centroids, &labels, &distances, &workspace}) {
    if (tensor->device_index != x.device_index) throw std::invalid_argument("all tensors must be on the device of x");
  }
  if (clusters < 1) throw std::invalid_argument("centroids must hold at least one row for each problem");
  if (top < 1 || top > clusters) throw std::invalid_argument("labels must have 1 to clusters entries for each row");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;
  if (clusters > kMost || rows > kMost) throw std::invalid_argument("rows and clusters must stay below 2^31 a problem");
  KMeansAssignCuda a;
  a.x = x.data;
  a.centroids = centroids.data;
  a.labels = labels.as<int64_t>();
  a.distances = distances.data;
  a.workspace = workspace.as<float>();
  a.problems = problems;
  a.rows = rows;
  a.clusters = clusters;
  a.features = features;
  a.problem_stride = x.strides[0];
  a.row_stride = x.strides[1];
  a.dtype = x.dtype;
  a.top = top;
  a.precision = precision;
  return a;
}

}  // namespace clustops
