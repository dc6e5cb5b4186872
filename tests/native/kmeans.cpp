// Runs k-means assignment outside Python, so that a sanitizer can watch it: the CPU kernel (CLUSTOPS_ISA names the
// instruction set).
// stdin: int64 problems, rows, clusters, features, threads; then x and centroids as fp32. stdout: labels, distances, the
// labels of the two nearest, and centroids after three iterations.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

#include "../../csrc/cpu/kmeans_amx.cpp"
#else
#include "../../csrc/cpu/kmeans.cpp"
#endif

#include "../../csrc/common/kmeans_iterate.h"

namespace clustops::cpu::CLUSTOPS_ISA {
void kmeans_nearest(const KMeansAssign& problem, int64_t top, int threads);
void kmeans_iterate(const KMeansIterate& problem, int threads);
}  // namespace clustops::cpu::CLUSTOPS_ISA

namespace {

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  if (count > 0 && std::fread(values.data(), sizeof(T), values.size(), stdin) != values.size()) std::exit(3);
  return values;
}

template <class T>
void write(const std::vector<T>& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

}  // namespace

int main() {
#ifdef __AMX_BF16__
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 4;  // the process must ask before it uses tiles
#endif
  const std::vector<int64_t> size = read<int64_t>(5);
  const int64_t b = size[0], n = size[1], k = size[2], d = size[3];
  const int threads = static_cast<int>(size[4]);
  const std::vector<float> x = read<float>(b * n * d), centroids = read<float>(b * k * d);
  std::vector<int64_t> labels(b * n, -7);
  std::vector<float> distances(b * n, -7);
  clustops::KMeansAssign problem{x.data(), centroids.data(), labels.data(), distances.data(), nullptr, b, n, k, d,
                                 n * d,    d, clustops::DType::f32};
  namespace kernel = clustops::cpu::CLUSTOPS_ISA;
  std::vector<float> workspace(kernel::kmeans_assign_workspace(b, k, d, problem.dtype, threads));
  problem.workspace = workspace.data();
  kernel::kmeans_assign(problem, threads);
  write(labels);
  write(distances);

  const int64_t top = k < 2 ? k : 2;
  std::vector<int64_t> nearest(b * n * top, -7);
  std::vector<float> nearest_distances(b * n * top, -7);
  problem.labels = nearest.data();
  problem.distances = nearest_distances.data();
  kernel::kmeans_nearest(problem, top, threads);
  write(nearest);

  const double one = 1;
  std::vector<double> grid(b * 2 * (d + 1), 0x1p-40);  // coarse and fine parts of small numbers
  for (int64_t i = 0; i < b; ++i) std::fill_n(grid.begin() + (2 * i + 1) * (d + 1), d + 1, 0x1p-80);
  std::vector<float> moved(b * k * d);
  std::vector<int64_t> repaired(b), still(b);
  const clustops::KMeansRows rows{x.data(), &one, b, n, d, n * d, d, 0, 0, problem.dtype};
  kernel::kmeans_iterate({rows, grid.data(), centroids.data(), moved.data(), labels.data(), repaired.data(), still.data(),
                          b, k, 3, false, true, 0},
                         threads);
  write(moved);
}
