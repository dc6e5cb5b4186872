#include "contrastive.h"

namespace clustops {

namespace {

DType accumulator(const Tensor& x) { return x.dtype == DType::f64 ? DType::f64 : DType::f32; }

void expect_floating(const Tensor& x, const char* name) {
  if (x.dtype == DType::i32 || x.dtype == DType::i64) {
    throw std::invalid_argument(std::string(name) + " must be floating point");
  }
}

void expect_one_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    if (other && other->device_index != first.device_index) {
      throw std::invalid_argument("all tensors must be on one device");
    }
  }
}

ContrastiveRows rows_of(const Tensor& features, int64_t first, int64_t count, const ContrastiveOptions& options,
                        Device device) {
  expect_dims(features, "features", 3);
  expect_floating(features, "features");
  const int64_t n = features.shape[0], views = features.shape[1], width = features.shape[2];
  expect(features, "features", features.dtype, device, {n, views, width});
  if (first < 0 || count < 0 || count > n || first > n - count) {
    throw std::invalid_argument("first and count must be samples of features");
  }
  if (!(options.temperature > 0)) throw std::invalid_argument("temperature must be above 0");
  return {features.data, features.dtype, n, views, width, first, count, options.temperature, options.normalize};
}

ContrastiveClasses classes_of(const Tensor& features, const Tensor* labels, const Tensor* confidence,
                              const ContrastiveOptions& options, Device device) {
  const int64_t n = features.shape[0];
  if (labels) expect(*labels, "labels", DType::i64, device, {n});
  if (confidence) {
    expect_floating(*confidence, "confidence");
    expect(*confidence, "confidence", confidence->dtype, device, {n});
  }
  expect_one_device(features, {labels, confidence});
  return {labels ? labels->as<const int64_t>() : nullptr,
          confidence ? confidence->data : nullptr,
          confidence ? confidence->dtype : DType::f64,
          options.threshold,
          options.reweight,
          options.own_confidence};
}

}  // namespace

ContrastiveForward contrastive_arguments(const Tensor& features, const Tensor* labels, const Tensor* confidence,
                                         int64_t first, int64_t count, const ContrastiveOptions& options,
                                         const Tensor& loss, const Tensor& lse, const Tensor& weight,
                                         const Tensor& norms, Device device) {
  const ContrastiveRows rows = rows_of(features, first, count, options, device);
  const ContrastiveClasses classes = classes_of(features, labels, confidence, options, device);
  const DType dtype = accumulator(features);
  expect(loss, "loss", dtype, device, {count, rows.views});
  expect(lse, "lse", dtype, device, {count, rows.views});
  expect(weight, "weight", dtype, device, {count});
  expect(norms, "norms", dtype, device, {2});
  expect_one_device(features, {&loss, &lse, &weight, &norms});
  return {rows, classes, loss.data, lse.data, weight.data, norms.data};
}

ContrastiveBackward contrastive_backward_arguments(const Tensor& upstream, const Tensor& features, const Tensor* labels,
                                                   const Tensor* confidence, const Tensor& lse, int64_t first,
                                                   int64_t count, const ContrastiveOptions& options,
                                                   const Tensor& gradient, Device device) {
  const ContrastiveRows rows = rows_of(features, first, count, options, device);
  const ContrastiveClasses classes = classes_of(features, labels, confidence, options, device);
  const DType dtype = accumulator(features);
  expect(upstream, "upstream", dtype, device, {rows.samples, rows.views}, 2);
  expect(lse, "lse", dtype, device, {rows.samples, rows.views});
  expect(gradient, "gradient", features.dtype, device, {count, rows.views, rows.width});
  expect_one_device(features, {&upstream, &lse, &gradient});
  return {rows, classes, upstream.data, upstream.strides[0], upstream.strides[1], lse.data, gradient.data};
}

}  // namespace clustops
