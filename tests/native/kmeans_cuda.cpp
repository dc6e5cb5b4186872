// Runs the CUDA kernels of the k-means assignment on the CPU (simt.h), so that a sanitizer can watch them.
// stdin: int64 problems, rows, clusters, features, top, dtype (of DType), precision (of Precision), stride of a row, order of
// the threads of a block (0, 1, 2), bytes of shared memory of a block, whether it is Hopper; then x, rows at their stride, and centroids.
// stdout: labels, distances, and for "highest" how many rows of each problem were too close to call.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/launch.h"

namespace {

using namespace clustops;

std::vector<char> read(int64_t bytes) {
  std::vector<char> data(static_cast<std::size_t>(bytes));
  if (bytes > 0 && std::fread(data.data(), 1, data.size(), stdin) != data.size()) std::exit(3);
  return data;
}

void write(const void* data, int64_t bytes) { std::fwrite(data, 1, static_cast<std::size_t>(bytes), stdout); }

}  // namespace

int main() {
  int64_t size[11];
  std::memcpy(size, read(sizeof size).data(), sizeof size);
  const int64_t b = size[0], n = size[1], k = size[2], d = size[3], top = size[4], stride = size[7];
  const DType dtype = static_cast<DType>(size[5]);
  const Precision precision = static_cast<Precision>(size[6]);
  simt::order = static_cast<simt::Order>(size[8]);
  cuda::shared_limit = size[9];
  cuda::is_hopper = size[10] != 0;
  const int64_t element = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2, exact = dtype == DType::f64 ? 8 : 4;
  const std::vector<char> x = read(b * n * stride * element), centroids = read(b * k * d * exact);
  std::vector<int64_t> labels(static_cast<std::size_t>(b * n * top), -7);
  std::vector<char> distances(static_cast<std::size_t>(b * n * top * exact), -7);
  const int64_t bytes = kmeans_assign_cuda_workspace(b, n, k, d, top, dtype, precision);
  std::vector<char> workspace(static_cast<std::size_t>(bytes), 0x7f);

  KMeansAssignCuda a;
  a.x = x.data();
  a.centroids = centroids.data();
  a.labels = labels.data();
  a.distances = distances.data();
  a.workspace = reinterpret_cast<float*>(workspace.data());
  a.problems = b;
  a.rows = n;
  a.clusters = k;
  a.features = d;
  a.problem_stride = n * stride;
  a.row_stride = stride;
  a.dtype = dtype;
  a.top = top;
  a.precision = precision;
  cuda::kmeans_assign(a, nullptr);

  write(labels.data(), b * n * top * 8);
  write(distances.data(), b * n * top * exact);
  if (bytes > 0 && precision == Precision::highest) write(workspace.data(), b * 4);
}
