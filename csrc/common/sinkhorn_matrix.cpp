#include "sinkhorn_matrix.h"

namespace clustops {

SinkhornMatrix sinkhorn_matrix_arguments(const Tensor& m, const Tensor* gradient, const Tensor& result,
                                         int64_t n_iters, Device device) {
  expect_dims(m, "m", 3);
  if (m.dtype == DType::i32 || m.dtype == DType::i64) throw std::invalid_argument("m must be floating point");
  const int64_t matrices = m.shape[0], n = m.shape[1];
  if (n < 1 || n > kLargestMatrix) throw std::invalid_argument("m must have 1 to 32 rows");
  if (n_iters < 0) throw std::invalid_argument("n_iters must be at least 0");
  expect(m, "m", m.dtype, device, {matrices, n, n});
  expect(result, "result", m.dtype, device, {matrices, n, n});
  if (gradient) expect(*gradient, "gradient", m.dtype, device, {matrices, n, n});
  for (const Tensor* other : {&result, gradient ? gradient : &m}) {
    if (other->device_index != m.device_index) throw std::invalid_argument("all tensors must be on one device");
  }
  return {m.data, gradient ? gradient->data : nullptr, result.data, matrices, n, n_iters, m.dtype};
}

}  // namespace clustops
