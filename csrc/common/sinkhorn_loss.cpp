#include "sinkhorn_loss.h"

namespace clustops {

namespace {

DType accumulator(const Tensor& x) { return x.dtype == DType::f64 ? DType::f64 : DType::f32; }

void expect_scores(const Tensor& x, const char* name, Device device) {
  expect_dims(x, name, 3);
  if (x.dtype == DType::i32 || x.dtype == DType::i64) {
    throw std::invalid_argument(std::string(name) + " must be floating point");
  }
  expect(x, name, x.dtype, device, {x.shape[0], x.shape[1], x.shape[2]}, 2);
}

void expect_one_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    if (other->device_index != first.device_index) throw std::invalid_argument("all tensors must be on one device");
  }
}

void expect_below(const std::vector<int64_t>& indices, int64_t end, const char* name) {
  for (int64_t index : indices) {
    if (index < 0 || index >= end) throw std::invalid_argument(std::string(name) + " must be in range");
  }
}

SoftCrossEntropy without_losses(const Tensor& scores, const Tensor& targets, const Tensor& bias,
                                const Tensor& score_normalizers, const Tensor& target_normalizers,
                                const std::vector<int64_t>& view, const std::vector<int64_t>& target,
                                double temperature, double target_temperature, Device device) {
  expect_scores(scores, "scores", device);
  expect_scores(targets, "targets", device);
  const DType dtype = accumulator(scores);
  if (accumulator(targets) != dtype) throw std::invalid_argument("targets must be float64 just where scores are");
  const int64_t views = scores.shape[0], rows = scores.shape[1], columns = scores.shape[2], a = targets.shape[0];
  expect(targets, "targets", targets.dtype, device, {a, rows, columns}, 2);
  expect(bias, "bias", dtype, device, {a, columns}, 1);
  expect(score_normalizers, "score_normalizers", dtype, device, {views, rows});
  expect(target_normalizers, "target_normalizers", dtype, device, {a, rows});
  expect_one_device(scores, {&targets, &bias, &score_normalizers, &target_normalizers});
  if (view.size() != target.size() || (view.empty() && views != a)) {
    throw std::invalid_argument("pairs must have a view and a target each");
  }
  expect_below(view, views, "views");
  expect_below(target, a, "targets of pairs");
  const int64_t pairs = view.empty() ? views : static_cast<int64_t>(view.size());
  return {scores.data,
          targets.data,
          bias.data,
          view.empty() ? nullptr : view.data(),
          view.empty() ? nullptr : target.data(),
          pairs,
          views,
          a,
          rows,
          columns,
          scores.strides[0],
          scores.strides[1],
          targets.strides[0],
          targets.strides[1],
          bias.strides[0],
          scores.dtype,
          targets.dtype,
          temperature,
          target_temperature,
          nullptr,
          score_normalizers.data,
          target_normalizers.data};
}

}  // namespace

SoftCrossEntropy soft_cross_entropy_arguments(const Tensor& scores, const Tensor& targets, const Tensor& bias,
                                              const std::vector<int64_t>& view, const std::vector<int64_t>& target,
                                              double temperature, double target_temperature, const Tensor& losses,
                                              const Tensor& score_normalizers, const Tensor& target_normalizers,
                                              Device device) {
  SoftCrossEntropy result = without_losses(scores, targets, bias, score_normalizers, target_normalizers, view, target,
                                           temperature, target_temperature, device);
  expect(losses, "losses", accumulator(scores), device, {result.pairs, result.rows});
  expect_one_device(scores, {&losses});
  result.losses = losses.data;
  return result;
}

SoftCrossEntropyBackward soft_cross_entropy_backward_arguments(
    const Tensor& upstream, const Tensor& scores, const Tensor& targets, const Tensor& bias,
    const Tensor& score_normalizers, const Tensor& target_normalizers, const std::vector<int64_t>& view,
    const std::vector<int64_t>& target, double temperature, double target_temperature, const Tensor& gradient,
    Device device) {
  const SoftCrossEntropy forward = without_losses(scores, targets, bias, score_normalizers, target_normalizers, view,
                                                  target, temperature, target_temperature, device);
  expect(upstream, "upstream", accumulator(scores), device, {forward.pairs, forward.rows}, 2);
  expect(gradient, "gradient", scores.dtype, device, {forward.views, forward.rows, forward.columns});
  expect_one_device(scores, {&upstream, &gradient});
  return {forward, upstream.data, upstream.strides[0], upstream.strides[1], gradient.data};
}

}  // namespace clustops
