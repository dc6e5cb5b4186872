// Runs the CPU kernels of the k-means update outside Python, so that a sanitizer can watch them (CLUSTOPS_ISA names the
// instruction set).
// stdin: int64 problems, rows, clusters, features, dtype, threads; then x, weights, labels, the labels before and the
// grid. stdout: bounds; sums and counts after a pass over the labels before and one over what changed; means and shift
// from zero; counts.
#include "../../csrc/cpu/kmeans_update.cpp"
#include "stream.h"

int main() {
  namespace kernel = clustops::cpu::CLUSTOPS_ISA;
  using clustops::DType;
  const std::vector<int64_t> size = read<int64_t>(6);
  const int64_t b = size[0], n = size[1], k = size[2], d = size[3];
  const DType dtype = static_cast<DType>(size[4]), wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  const int threads = static_cast<int>(size[5]);
  const auto x = read<char>(b * n * d * kernel::size_of(dtype));
  const auto weights = read<double>(b * n);
  const auto labels = read<int64_t>(b * n), before = read<int64_t>(b * n);
  const auto grid = read<double>(b * 2 * (d + 1));
  const clustops::KMeansRows rows{x.data(), weights.data(), b, n, d, n * d, d, n, 1, dtype};

  std::vector<double> bounds(b * (d + 1)), sums(b * 2 * k * (d + 1)), shift(b);
  std::vector<int64_t> counts(b * k), numbers(b * k);
  kernel::kmeans_bounds({rows, bounds.data()}, threads);
  kernel::kmeans_sums({rows, before.data(), nullptr, grid.data(), sums.data(), counts.data(), k}, threads);
  kernel::kmeans_sums({rows, labels.data(), before.data(), grid.data(), sums.data(), counts.data(), k}, threads);
  std::vector<char> previous(b * k * d * kernel::size_of(wide)), means(previous.size());
  std::vector<double> workspace(b * clustops::kmeans_means_blocks(k * d));
  kernel::kmeans_means({sums.data(), previous.data(), means.data(), shift.data(), workspace.data(), b, k, d, wide},
                       threads);
  kernel::kmeans_counts({labels.data(), weights.data(), numbers.data(), b, n, k, n, 1}, threads);
  write(bounds);
  write(sums);
  write(counts);
  write(means);
  write(shift);
  write(numbers);
}
