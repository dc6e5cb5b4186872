// Runs the CUDA kernels of the class losses on the CPU (simt.h), so that a sanitizer can watch them. stdin: the inputs one
// after the other; stdout: the results, each in memory of exactly its size.
#include <cstdlib>
#include <string>

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/launch.h"
#include "simt.h"
#include "stream.h"

namespace {

using namespace clustops;

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Room for a result, full of what no result is.
std::vector<char> room(int64_t bytes) { return std::vector<char>(static_cast<std::size_t>(bytes), '\xcd'); }

struct Aligned {
  static constexpr int64_t kAlign = 1024;
  char* data;
  explicit Aligned(int64_t bytes) {
    data = static_cast<char*>(std::aligned_alloc(kAlign, static_cast<std::size_t>((bytes + kAlign - 1) / kAlign * kAlign)));
    std::memset(data, 0xcd, static_cast<std::size_t>(bytes));
  }
  ~Aligned() { std::free(data); }
};

}  // namespace

// Arguments: operation, order of threads, dtype, samples, views, width, first, count, temperature, normalize, elements before
// the features, whether there are labels, whether and in which dtype confidence (-1: none), threshold, reweight,
// own_confidence, exact, bytes of shared memory, whether it is Hopper; for the gradient the strides of the upstream one.
//
// Or "fits", dtype, width, bytes of shared memory: one byte says whether these kernels take such rows.
int main(int, char** text) {
  if (std::string(text[1]) == "fits") {
    cuda::shared_limit = std::atoll(text[4]);
    const bool fits = cuda::contrastive_fits(std::atoll(text[3]), static_cast<DType>(std::atoi(text[2])));
    write(std::vector<char>{static_cast<char>(fits)});
    return 0;
  }
  const bool backward = std::string(text[1]) == "gradient";
  simt::order = static_cast<simt::Order>(std::atoi(text[2]));
  ContrastiveRows r{};
  r.dtype = static_cast<DType>(std::atoi(text[3]));
  r.samples = std::atoll(text[4]), r.views = std::atoll(text[5]), r.width = std::atoll(text[6]);
  r.first = std::atoll(text[7]), r.count = std::atoll(text[8]);
  r.temperature = std::atof(text[9]), r.normalize = std::atoi(text[10]) != 0;
  const int64_t before = std::atoll(text[11]), rows = r.samples * r.views, anchors = r.count * r.views;
  auto features = read<char>((before + rows * r.width) * size_of(r.dtype));
  r.features = features.data() + before * size_of(r.dtype);
  ContrastiveClasses c{};
  const bool labelled = std::atoi(text[12]) != 0, sure = std::atoi(text[13]) < 0;
  auto labels = read<int64_t>(labelled ? r.samples : 0);
  c.labels = labelled ? labels.data() : nullptr;
  c.confidence_dtype = sure ? DType::f64 : static_cast<DType>(std::atoi(text[13]));
  auto confidence = read<char>(sure ? 0 : r.samples * size_of(c.confidence_dtype));
  c.confidence = sure ? nullptr : confidence.data();
  c.threshold = std::atof(text[14]), c.reweight = std::atoi(text[15]) != 0, c.own_confidence = std::atoi(text[16]) != 0;
  const bool exact = std::atoi(text[17]) != 0;
  cuda::shared_limit = std::atoll(text[18]);
  cuda::is_hopper = std::atoi(text[19]) != 0;
  if (!backward) {
    auto loss = room(anchors * 4), lse = room(anchors * 4), weight = room(r.count * 4), norms = room(8);
    const Aligned workspace(cuda::contrastive_workspace(r, exact));
    cuda::contrastive_rows({r, c, loss.data(), lse.data(), weight.data(), norms.data()}, workspace.data, exact, nullptr);
    for (const auto* result : {&loss, &lse, &weight, &norms}) write(*result);
    return 0;
  }
  const int64_t sample_stride = std::atoll(text[20]), view_stride = std::atoll(text[21]);
  auto lse = read<float>(rows);
  auto upstream = read<float>(rows == 0 ? 0 : (r.samples - 1) * sample_stride + (r.views - 1) * view_stride + 1);
  auto gradient = room(anchors * r.width * size_of(r.dtype));
  const Aligned workspace(cuda::contrastive_backward_workspace(r, exact));
  cuda::contrastive_rows_backward({r, c, upstream.data(), sample_stride, view_stride, lse.data(), gradient.data()},
                                  workspace.data, exact, nullptr);
  write(gradient);
}
