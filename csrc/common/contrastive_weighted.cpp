#include "contrastive_weighted.h"

namespace clustops {

namespace {

WeightedBlock block_of(const Tensor& products, const Tensor& weights, const WeightedPlace& place, double temperature,
                       Device device) {
  expect_dims(products, "products", 1);
  expect_dims(weights, "weights", 2);
  if (products.dtype != DType::f32 && products.dtype != DType::f64) {
    throw std::invalid_argument("products must be float32 or float64");
  }
  if (weights.dtype == DType::i32 || weights.dtype == DType::i64) {
    throw std::invalid_argument("weights must be floating point");
  }
  expect(products, "products", products.dtype, device, {products.shape[0]});
  const int64_t anchors = weights.shape[0], samples = weights.shape[1], last = place.first + anchors;
  expect(weights, "weights", weights.dtype, device, {anchors, samples}, 1);
  const auto within = [](int64_t begin, int64_t count, int64_t from, int64_t to) {
    return count > 0 && begin >= from && begin + count <= to;
  };
  const bool columns = within(place.column, place.columns, 0, place.first) ||
                       within(place.column, place.columns, place.first, last) ||
                       within(place.column, place.columns, last, samples);
  if (place.views < 1 || place.first < 0 || last > samples || !columns ||
      !within(place.row, place.rows, place.first, last)) {
    throw std::invalid_argument("a block must lie within the anchors and the samples");
  }
  if (products.shape[0] < place.rows * place.columns * place.views * place.views) {
    throw std::invalid_argument("products must hold the block");
  }
  return {products.data, weights.data, weights.strides[0], products.dtype, weights.dtype, place.views,  place.first,
          anchors,       place.row,    place.rows,         place.column,   place.columns, temperature};
}

// One number for each anchor's row, or sample.
void expect_anchors(const Tensor& tensor, const char* name, DType dtype, int64_t count, const Tensor& products,
                    Device device) {
  expect(tensor, name, dtype, device, {count});
  if (tensor.device_index != products.device_index) throw std::invalid_argument("all tensors must be on one device");
}

}  // namespace

WeightedSums weighted_sums_arguments(const Tensor& products, const Tensor& weights, const Tensor& shift,
                                     const Tensor& partition, const Tensor& weighted, const Tensor& total,
                                     const WeightedPlace& place, double temperature, bool mirrored, Device device) {
  const WeightedBlock block = block_of(products, weights, place, temperature, device);
  const int64_t rows = block.anchors * block.views;
  expect_anchors(shift, "shift", DType::f64, rows, products, device);
  expect_anchors(partition, "partition", DType::f64, rows, products, device);
  expect_anchors(weighted, "weighted", DType::f64, rows, products, device);
  expect_anchors(total, "total", DType::f64, block.anchors, products, device);
  return {block,
          mirrored && block.columns_are_anchors(),
          shift.as<double>(),
          partition.as<double>(),
          weighted.as<double>(),
          total.as<double>()};
}

WeightedGradient weighted_gradient_arguments(const Tensor& products, const Tensor& weights, const Tensor& grad,
                                             const Tensor& lse, const Tensor& share, const WeightedPlace& place,
                                             double temperature, Device device) {
  const WeightedBlock block = block_of(products, weights, place, temperature, device);
  const int64_t rows = block.anchors * block.views;
  expect_anchors(grad, "grad", products.dtype, rows, products, device);
  expect_anchors(lse, "lse", products.dtype, rows, products, device);
  expect_anchors(share, "share", products.dtype, rows, products, device);
  return {block, grad.data, lse.data, share.data};
}

}  // namespace clustops
