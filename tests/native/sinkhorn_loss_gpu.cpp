// Runs the CUDA kernels of the soft cross-entropy and of small matrices on the CPU (simt.h), so that a sanitizer can
// watch them. stdin: the inputs one after the other; stdout: the results, each in memory of exactly its size.
#include <string>

#include "../../csrc/cuda/kernels.h"
#include "simt.h"
#include "stream.h"

namespace {

using namespace clustops;

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Room for a result, full of what no result is.
std::vector<char> room(int64_t bytes) { return std::vector<char>(static_cast<std::size_t>(bytes), '\xcd'); }

// The bytes that these rows span, from the first that is used on.
int64_t span(int64_t outer, int64_t rows, int64_t columns, int64_t stride, int64_t row_stride) {
  return outer * rows * columns == 0 ? 0 : (outer - 1) * stride + (rows - 1) * row_stride + columns;
}

// Arguments: target dtype, V, A, B, K, strides of views, rows, targets, their rows, biases, elements before the scores,
// pairs (-1: row p with row p), temperatures, then for the gradient the strides of the upstream one.
void loss(DType dtype, char** text, bool backward) {
  const auto target_dtype = static_cast<DType>(std::atoi(text[0]));
  int64_t n[11];
  for (int i = 0; i < 11; ++i) n[i] = std::atoll(text[1 + i]);
  const int64_t v = n[0], a = n[1], b = n[2], k = n[3], before = b > 0 ? n[9] : 0, pairs = n[10] < 0 ? v : n[10];
  const int64_t real = size_of(dtype == DType::f64 ? DType::f64 : DType::f32);
  auto scores = read<char>((before + span(v, b, k, n[4], n[5])) * size_of(dtype));
  auto targets = read<char>(span(a, b, k, n[6], n[7]) * size_of(target_dtype));
  auto bias = read<char>(span(a, 1, k, n[8], 0) * real);
  auto view = read<int64_t>(std::max<int64_t>(0, n[10])), target = read<int64_t>(std::max<int64_t>(0, n[10]));
  SoftCrossEntropy f = {scores.data() + before * size_of(dtype),
                        targets.data(),
                        bias.data(),
                        n[10] < 0 ? nullptr : view.data(),
                        n[10] < 0 ? nullptr : target.data(),
                        pairs,
                        v,
                        a,
                        b,
                        k,
                        n[4],
                        n[5],
                        n[6],
                        n[7],
                        n[8],
                        dtype,
                        target_dtype,
                        std::atof(text[12]),
                        std::atof(text[13]),
                        nullptr,
                        nullptr,
                        nullptr};
  if (!backward) {
    auto losses = room(pairs * b * real), z = room(v * b * real), target_z = room(a * b * real);
    auto workspace = room(cuda::soft_cross_entropy_workspace(pairs, n[10] >= 0, b, k) * real);
    f.losses = losses.data(), f.score_normalizers = z.data(), f.target_normalizers = target_z.data();
    cuda::soft_cross_entropy(f, workspace.data(), nullptr);
    write(losses);
    write(z);
    write(target_z);
    return;
  }
  const int64_t pair_stride = std::atoll(text[14]), row_stride = std::atoll(text[15]);
  auto z = read<char>(v * b * real), target_z = read<char>(a * b * real);
  auto upstream = read<char>(span(pairs, b, 1, pair_stride, row_stride) * real);
  auto gradient = room(v * b * k * size_of(dtype));
  f.score_normalizers = z.data(), f.target_normalizers = target_z.data();
  cuda::soft_cross_entropy_backward({f, upstream.data(), pair_stride, row_stride, gradient.data()}, nullptr);
  write(gradient);
}

// Arguments: matrices, n, iterations.
void matrix(DType dtype, char** text, bool backward) {
  const int64_t matrices = std::atoll(text[0]), n = std::atoll(text[1]), bytes = matrices * n * n * size_of(dtype);
  auto m = read<char>(bytes), gradient = read<char>(backward ? bytes : 0), result = room(bytes);
  cuda::sinkhorn_matrix(
      {m.data(), backward ? gradient.data() : nullptr, result.data(), matrices, n, std::atoll(text[2]), dtype}, nullptr);
  write(result);
}

}  // namespace

int main(int, char** arguments) {
  const std::string operation = arguments[1];
  simt::order = static_cast<simt::Order>(std::atoi(arguments[2]));
  const auto dtype = static_cast<DType>(std::atoi(arguments[3]));
  if (operation == "loss") loss(dtype, arguments + 4, false);
  if (operation == "loss gradient") loss(dtype, arguments + 4, true);
  if (operation == "matrix") matrix(dtype, arguments + 4, false);
  if (operation == "matrix gradient") matrix(dtype, arguments + 4, true);
}
