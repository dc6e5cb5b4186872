// Runs the CPU kernels of the contrastive loss under any weights outside Python, so that a sanitizer can watch them
// (CLUSTOPS_ISA names the instruction set).
// stdin: int64 dtype, dtype of the weights, views, first anchor, anchors, samples, row, rows, column, columns, whether the
// block is mirrored, threads; the temperature; then products, weights, sums so far and numbers of the anchors.
// stdout: sums, gradients of the products.
#include "../../csrc/cpu/contrastive_weighted.cpp"
#include "stream.h"

int main() {
  namespace kernel = clustops::cpu::CLUSTOPS_ISA;
  using clustops::DType;
  const std::vector<int64_t> size = read<int64_t>(12);
  const double temperature = read<double>(1)[0];
  const auto dtype = static_cast<DType>(size[0]), weights_dtype = static_cast<DType>(size[1]);
  const int64_t views = size[2], first = size[3], anchors = size[4], samples = size[5], rows = anchors * views;
  const int64_t wide = kernel::element_size(dtype), products_size = size[7] * size[9] * views * views * wide;
  const int threads = static_cast<int>(size[11]);
  auto products = read<char>(products_size);
  auto gradients = products;
  const auto weights = read<char>(anchors * samples * kernel::element_size(weights_dtype));
  auto shift = read<double>(rows), partition = read<double>(rows), weighted = read<double>(rows), total = read<double>(anchors);
  const auto grad = read<char>(rows * wide), lse = read<char>(rows * wide), share = read<char>(rows * wide);
  clustops::WeightedBlock block{products.data(), weights.data(), samples, dtype,   weights_dtype, views,      first,
                                anchors,         size[6],        size[7], size[8], size[9],       temperature};
  kernel::weighted_sums({block, size[10] != 0, shift.data(), partition.data(), weighted.data(), total.data()}, threads);
  block.products = gradients.data();
  kernel::weighted_gradient({block, grad.data(), lse.data(), share.data()}, threads);
  for (const auto* result : {&shift, &partition, &weighted, &total}) write(*result);
  write(gradients);
}
