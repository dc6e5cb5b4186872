// Runs the CPU kernels of greedy k-means++ outside Python, so that a sanitizer can watch them (CLUSTOPS_ISA names the
// instruction set).
// stdin: int64 problems, entries, rows, clusters, trials, features, dtype, threads; then x, weights and the uniform
// numbers. stdout: the rows chosen; potentials and masks of each entry's first `trials` rows as candidates, where every
// row is at distance 9; distances lowered to the first of them.
#include "../../csrc/cpu/kmeans_seeding.cpp"
#include "stream.h"

namespace kernel = clustops::cpu::CLUSTOPS_ISA;

template <class T>
void run(const std::vector<int64_t>& size, clustops::DType dtype) {
  const int64_t b = size[0], e = size[1], n = size[2], k = size[3], t = size[4], d = size[5];
  const int threads = static_cast<int>(size[7]);
  const auto x = read<char>(b * n * d * kernel::size_of(dtype));
  const auto weights = read<double>(b * n), uniform = read<double>(e * k * t);
  clustops::KMeansRows rows{x.data(), weights.data(), b, n, d, n * d, d, n, 1, dtype};
  std::vector<int64_t> chosen(e * k), workspace(kernel::kmeans_seed_workspace(rows, e, k, t, threads));
  kernel::kmeans_seed({rows, uniform.data(), chosen.data(), workspace.data(), e, k, t}, threads);

  std::vector<T> candidates(e * t * d), closest(e * n, T(9)), first(e * d);
  std::vector<double> scale(e, 1024.0), of_entry(e * n);
  for (int64_t i = 0; i < e; ++i) {
    for (int64_t j = 0; j < t; ++j) {
      T* to = candidates.data() + (i * t + j) * d;
      const T* from = kernel::row_as<T>(rows, i / (e / b), j, 0, d, to);
      if (from != to) std::copy(from, from + d, to);
    }
    std::copy_n(candidates.data() + i * t * d, d, first.data() + i * d);
    std::copy_n(weights.data() + i / (e / b) * n, n, of_entry.data() + i * n);
  }
  rows.weights = of_entry.data();
  std::vector<int64_t> potentials(e * t), bits(e, 0);
  std::vector<int32_t> improves(e * n);
  kernel::kmeans_potentials(
      {rows, candidates.data(), closest.data(), scale.data(), potentials.data(), improves.data(), e, t}, threads);
  kernel::kmeans_closest({rows, closest.data(), first.data(), improves.data(), bits.data(), e, n}, threads);
  write(chosen);
  write(potentials);
  write(improves);
  write(closest);
}

int main() {
  const std::vector<int64_t> size = read<int64_t>(8);
  const auto dtype = static_cast<clustops::DType>(size[6]);
  dtype == clustops::DType::f64 ? run<double>(size, dtype) : run<float>(size, dtype);
}
