// Runs the CPU kernels of the contrastive losses outside Python, so that a sanitizer can watch them (CLUSTOPS_ISA names
// the instruction set).
// stdin: int64 samples, views, width, first, count, dtype, normalize, threads; float64 temperature, threshold; then
// features, int64 labels, float32 confidence, the gradient of the losses, log-sum-exp. stdout: losses, log-sum-exp,
// weights, norms, the gradient of the features of the part.
#include "../../csrc/cpu/contrastive.cpp"
#include "stream.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

int main() {
  namespace kernel = clustops::cpu::CLUSTOPS_ISA;
  using clustops::DType;
#if defined(__AMX_BF16__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 4;
#endif
  const auto size = read<int64_t>(8);
  const auto option = read<double>(2);
  const int64_t n = size[0], v = size[1], d = size[2], count = size[4];
  const DType dtype = static_cast<DType>(size[5]);
  const int64_t element = kernel::element_size(dtype), wide = dtype == DType::f64 ? 8 : 4;
  const int threads = static_cast<int>(size[7]);
  const auto features = read<char>(n * v * d * element);
  const auto labels = read<int64_t>(n);
  const auto confidence = read<float>(n);
  const auto upstream = read<char>(n * v * wide), given_lse = read<char>(n * v * wide);
  std::vector<char> loss(count * v * wide), lse(loss.size()), weight(count * wide), norms(2 * wide);
  std::vector<char> gradient(count * v * d * element);
  const clustops::ContrastiveRows rows{features.data(), dtype, n, v, d, size[3], count, option[0], size[6] != 0};
  const clustops::ContrastiveClasses classes{labels.data(), confidence.data(), DType::f32, option[1], true, false};
  kernel::contrastive_rows({rows, classes, loss.data(), lse.data(), weight.data(), norms.data()}, threads);
  kernel::contrastive_rows_backward({rows, classes, upstream.data(), v, 1, given_lse.data(), gradient.data()},
                                    threads);
  write(loss);
  write(lse);
  write(weight);
  write(norms);
  write(gradient);
}
