// Runs the CUDA kernels around the matrix products of the class losses of wide rows, and of losses under any weights, on
// the CPU (simt.h), so that a sanitizer can watch them. stdin: the inputs one after the other; stdout: the results.
#include <cstdlib>
#include <string>

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/launch.h"
#include "simt.h"
#include "stream.h"

namespace {

using namespace clustops;

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Room for a result, full of NaN.
std::vector<char> room(int64_t bytes) { return std::vector<char>(static_cast<std::size_t>(bytes), '\xff'); }

struct Arguments {
  char** text;
  int64_t integer() { return std::atoll(*text++); }
  double number() { return std::atof(*text++); }
  DType dtype() { return static_cast<DType>(integer()); }
};

struct Workspace {
  char* data;
  std::size_t bytes;

  explicit Workspace(int64_t size, bool given) : bytes(static_cast<std::size_t>(size)) {
    data = static_cast<char*>(std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024));
    std::memset(data, 0xcd, bytes);
    if (given) std::copy_n(read<char>(size).data(), bytes, data);
  }
  ~Workspace() { std::free(data); }
  void put() const { std::fwrite(data, 1, bytes, stdout); }
};

// Sizes and options of a class loss; then what a command takes.
void classes(const std::string& command, Arguments next) {
  ContrastiveRows r{};
  r.dtype = next.dtype(), r.samples = next.integer(), r.views = next.integer(), r.width = next.integer();
  r.first = next.integer(), r.count = next.integer(), r.temperature = next.number(), r.normalize = next.integer() != 0;
  ContrastiveClasses c{};
  const bool labelled = next.integer() != 0, backward = command == "prepare backward" || command == "turn" || command == "end";
  const int64_t confidence_dtype = next.integer();
  c.threshold = next.number(), c.reweight = next.integer() != 0, c.own_confidence = next.integer() != 0;
  c.confidence_dtype = static_cast<DType>(confidence_dtype < 0 ? 1 : confidence_dtype);
  const int64_t rows = r.samples * r.views, anchors = r.count * r.views, padded = (rows + 127) / 128 * 128;
  const int64_t size = cuda::contrastive_chunked_workspace(r, backward);
  if (command == "workspace") {
    std::printf("%lld %lld", static_cast<long long>(cuda::contrastive_chunked_workspace(r, false)),
                static_cast<long long>(cuda::contrastive_chunked_workspace(r, true)));
  } else if (command == "prepare" || command == "prepare backward") {
    auto features = read<char>(rows * r.width * size_of(r.dtype));
    auto labels = read<int64_t>(labelled ? r.samples : 0);
    auto confidence = read<char>(confidence_dtype < 0 ? 0 : r.samples * size_of(c.confidence_dtype));
    r.features = features.data(), c.labels = labelled ? labels.data() : nullptr;
    c.confidence = confidence_dtype < 0 ? nullptr : confidence.data();
    auto upstream = read<float>(backward ? rows : 0), lse = read<float>(backward ? rows : 0);
    auto z = room(padded * r.width * size_of(r.dtype)), norms = room(8);
    const Workspace workspace(size, false);
    if (backward) {
      cuda::contrastive_chunked_prepare(ContrastiveBackward{r, c, upstream.data(), r.views, 1, lse.data(), nullptr},
                                        workspace.data, z.data(), nullptr);
    } else {
      cuda::contrastive_chunked_prepare(ContrastiveForward{r, c, nullptr, nullptr, nullptr, norms.data()}, workspace.data,
                                        z.data(), nullptr);
    }
    workspace.put();
    write(z);
    write(norms);
  } else if (command == "end") {
    const int64_t row = next.integer(), count = next.integer();
    auto features = read<char>(rows * r.width * size_of(r.dtype));
    const Workspace workspace(size, true);
    auto sums = read<float>(count * r.width);
    auto gradient = room(anchors * r.width * size_of(r.dtype));
    r.features = features.data();
    cuda::contrastive_chunked_end({r, c, nullptr, 0, 0, nullptr, gradient.data()}, workspace.data, sums.data(), row, nullptr);
    write(gradient);
  } else {
    ContrastiveBlock block{};
    block.row = next.integer(), block.rows = next.integer(), block.column = next.integer(), block.columns = next.integer();
    block.first = block.column == 0, block.last = block.column + block.columns == padded;
    const Workspace workspace(size, true);
    auto scores = read<float>(block.rows * block.columns);
    block.scores = scores.data();
    if (command == "turn") {
      auto gradients = room(block.rows * block.columns * size_of(r.dtype));
      void* const to = r.dtype == DType::f32 ? static_cast<void*>(scores.data()) : gradients.data();
      cuda::contrastive_chunked_turn({r, c, nullptr, 0, 0, nullptr, nullptr}, workspace.data, block, to, nullptr);
      r.dtype == DType::f32 ? write(scores) : write(gradients);
      return;
    }
    auto loss = read<float>(anchors), lse = read<float>(anchors), weight = read<float>(r.count);
    cuda::contrastive_chunked_sums({r, c, loss.data(), lse.data(), weight.data(), nullptr}, workspace.data, block, nullptr);
    workspace.put();
    for (const auto* result : {&loss, &lse, &weight}) write(*result);
  }
}

// Dtypes of the weights and of the gradients, views, first, anchors, samples, distance of rows of weights, then row, rows,
// column, columns of the block and the temperature.
void weighted(bool gradient, Arguments next) {
  WeightedBlock a{};
  a.dtype = DType::f32, a.weights_dtype = next.dtype();
  const DType dtype = next.dtype();
  a.views = next.integer(), a.first = next.integer(), a.anchors = next.integer();
  const int64_t samples = next.integer();
  a.weights_stride = next.integer();
  a.row = next.integer(), a.rows = next.integer(), a.column = next.integer(), a.columns = next.integer();
  a.temperature = next.number();
  const int64_t size = a.rows * a.columns * a.views * a.views, rows = a.anchors * a.views;
  auto products = read<float>(size);
  auto weights = read<char>(((a.anchors - 1) * a.weights_stride + samples) * size_of(a.weights_dtype));
  a.products = products.data(), a.weights = weights.data();
  if (gradient) {
    auto grad = read<float>(rows), lse = read<float>(rows), share = read<float>(rows);
    auto gradients = room(size * size_of(dtype));
    void* const to = dtype == DType::f32 ? static_cast<void*>(products.data()) : gradients.data();
    cuda::weighted_gradient({a, grad.data(), lse.data(), share.data()}, dtype, to, nullptr);
    dtype == DType::f32 ? write(products) : write(gradients);
    return;
  }
  auto shift = read<double>(rows), partition = read<double>(rows), sums = read<double>(rows), total = read<double>(a.anchors);
  cuda::weighted_sums({a, false, shift.data(), partition.data(), sums.data(), total.data()}, nullptr);
  for (const auto* result : {&shift, &partition, &sums, &total}) write(*result);
}

}  // namespace

int main(int, char** text) {
  const std::string command = text[1];
  simt::order = static_cast<simt::Order>(std::atoi(text[2]));
  if (command == "weighted sums" || command == "weighted gradient") {
    weighted(command == "weighted gradient", {text + 3});
  } else {
    classes(command, {text + 3});
  }
}
