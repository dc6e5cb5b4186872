// Runs the CPU kernels of the soft cross-entropy and of small Sinkhorn matrices outside Python, so that a sanitizer can
// watch them (CLUSTOPS_ISA names the instruction set).
// stdin: int64 views, targets, rows, columns, pairs, dtype, dtype of the targets, threads; then scores, targets, bias,
// the views and the targets of the pairs, the gradient of the losses; int64 matrices, n, n_iters; then matrices of that
// dtype and the gradient of their projections. stdout: losses, normalisers of scores and of targets, the gradient of
// the scores; projections and the gradient of the matrices.
#include "../../csrc/cpu/sinkhorn_loss.cpp"
#include "../../csrc/cpu/sinkhorn_matrix.cpp"
#include "stream.h"

namespace {

namespace kernel = clustops::cpu::CLUSTOPS_ISA;
using clustops::DType;

void losses(const std::vector<int64_t>& size, int threads) {
  const int64_t v = size[0], a = size[1], b = size[2], k = size[3], listed = size[4], pairs = listed ? listed : v;
  const DType dtype = static_cast<DType>(size[5]), target_dtype = static_cast<DType>(size[6]);
  const int64_t wide = dtype == DType::f64 ? 8 : 4;
  const auto scores = read<char>(v * b * k * kernel::element_size(dtype));
  const auto targets = read<char>(a * b * k * kernel::element_size(target_dtype));
  const auto bias = read<char>(a * k * wide);
  const auto view = read<int64_t>(listed), target = read<int64_t>(listed);
  const auto upstream = read<char>(pairs * b * wide);
  std::vector<char> result(pairs * b * wide), p(v * b * wide), q(a * b * wide), gradient(scores.size());
  clustops::SoftCrossEntropy forward{};
  forward.scores = scores.data(), forward.targets = targets.data(), forward.bias = bias.data();
  forward.view = listed ? view.data() : nullptr, forward.target = listed ? target.data() : nullptr;
  forward.pairs = pairs, forward.views = v, forward.n_targets = a, forward.rows = b, forward.columns = k;
  forward.view_stride = forward.target_stride = b * k;
  forward.row_stride = forward.target_row_stride = forward.bias_stride = k;
  forward.dtype = dtype, forward.target_dtype = target_dtype;
  forward.temperature = 0.1, forward.target_temperature = 0.05;
  forward.losses = result.data(), forward.score_normalizers = p.data(), forward.target_normalizers = q.data();
  kernel::soft_cross_entropy(forward, threads);
  kernel::soft_cross_entropy_backward({forward, upstream.data(), b, 1, gradient.data()}, threads);
  write(result);
  write(p);
  write(q);
  write(gradient);
}

void matrices(DType dtype, int threads) {
  const std::vector<int64_t> size = read<int64_t>(3);
  const int64_t count = size[0], n = size[1], n_iters = size[2];
  const auto m = read<char>(count * n * n * kernel::element_size(dtype)), upstream = read<char>(m.size());
  std::vector<char> result(m.size()), gradient(m.size());
  kernel::sinkhorn_matrix({m.data(), nullptr, result.data(), count, n, n_iters, dtype}, threads);
  kernel::sinkhorn_matrix({m.data(), upstream.data(), gradient.data(), count, n, n_iters, dtype}, threads);
  write(result);
  write(gradient);
}

}  // namespace

int main() {
  const std::vector<int64_t> size = read<int64_t>(8);
  losses(size, static_cast<int>(size[7]));
  matrices(static_cast<DType>(size[5]), static_cast<int>(size[7]));
}
