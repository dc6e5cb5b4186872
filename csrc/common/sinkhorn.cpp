#include "sinkhorn.h"

#include <cmath>

namespace clustops {

namespace {

DType accumulator(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// Whether the potentials have an entry for a virtual column.
bool has_virtual_column(const SinkhornRows& rows, const Tensor& potentials) {
  expect_dims(potentials, "potentials", 2);
  return potentials.shape[1] == rows.columns + 1;
}

void expect_one_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    if (other && other->device_index != first.device_index) {
      throw std::invalid_argument("all tensors must be on one device");
    }
  }
}

void expect_assignments(const SinkhornRows& rows, const Tensor& assignments, Device device) {
  if (assignments.dtype != rows.dtype && assignments.dtype != accumulator(rows.dtype)) {
    throw std::invalid_argument("assignments must be of the dtype of the scores or of the potentials");
  }
  expect(assignments, "assignments", assignments.dtype, device, {rows.problems, rows.rows, rows.columns});
}

}  // namespace

SinkhornRows sinkhorn_rows_arguments(const Tensor& scores, const Tensor* queue, const Tensor* weights, Device device) {
  expect_dims(scores, "scores", 3);
  if (scores.dtype == DType::i32 || scores.dtype == DType::i64) {
    throw std::invalid_argument("scores must be floating point");
  }
  SinkhornRows rows{};
  rows.scores = scores.data;
  rows.problems = scores.shape[0], rows.rows = scores.shape[1], rows.columns = scores.shape[2];
  rows.problem_stride = scores.strides[0], rows.row_stride = scores.strides[1];
  rows.dtype = scores.dtype;
  expect(scores, "scores", scores.dtype, device, {rows.problems, rows.rows, rows.columns}, 2);
  if (queue) {
    expect_dims(*queue, "queue", 3);
    rows.queued = queue->shape[1];
    expect(*queue, "queue", scores.dtype, device, {rows.problems, rows.queued, rows.columns}, 2);
    rows.queue = queue->data;
    rows.queue_problem_stride = queue->strides[0], rows.queue_row_stride = queue->strides[1];
  }
  if (weights) {
    expect(*weights, "weights", accumulator(scores.dtype), device, {rows.problems, rows.rows}, 2);
    rows.weights = weights->data;
    rows.weight_problem_stride = weights->strides[0], rows.weight_row_stride = weights->strides[1];
  }
  expect_one_device(scores, {queue, weights});
  return rows;
}

SinkhornMass sinkhorn_mass_arguments(const Tensor& scores, const Tensor* queue, const Tensor* weights,
                                     const Tensor& potentials, const Tensor& log_mass, const Tensor& workspace,
                                     int64_t size, double epsilon, bool normalized, Device device) {
  const SinkhornRows rows = sinkhorn_rows_arguments(scores, queue, weights, device);
  const bool virtual_column = has_virtual_column(rows, potentials);
  const DType dtype = accumulator(rows.dtype);
  expect(potentials, "potentials", dtype, device, {rows.problems, rows.columns + virtual_column});
  expect(log_mass, "log_mass", dtype, device, {rows.problems, rows.columns + virtual_column});
  expect(workspace, "workspace", DType::f64, device, {size});
  expect_one_device(scores, {&potentials, &log_mass, &workspace});
  return {rows, potentials.data, log_mass.data, epsilon, virtual_column, normalized, workspace.data};
}

SinkhornSolve sinkhorn_solve_arguments(const Tensor& scores, const Tensor* queue, const Tensor* prior,
                                       const Tensor* weights, const Tensor* init, const Tensor& potentials,
                                       const Tensor* assignments, const Tensor& workspace, int64_t size,
                                       const SinkhornSettings& settings, Device device) {
  const SinkhornRows rows = sinkhorn_rows_arguments(scores, queue, weights, device);
  const int64_t columns = rows.columns + settings.mass.has_value();
  const DType dtype = accumulator(rows.dtype);
  if (prior) expect(*prior, "prior", dtype, device, {rows.problems, rows.columns});
  if (init) expect(*init, "init", dtype, device, {rows.problems, columns});
  expect(potentials, "potentials", dtype, device, {rows.problems, columns});
  if (assignments) expect_assignments(rows, *assignments, device);
  expect(workspace, "workspace", DType::f64, device, {size});
  expect_one_device(scores, {prior, init, &potentials, assignments, &workspace});
  SinkhornSolve problem{};
  problem.rows = rows;
  problem.prior = prior ? prior->data : nullptr;
  problem.init = init ? init->data : nullptr;
  problem.potentials = potentials.data;
  problem.assignments = assignments ? assignments->data : nullptr;
  problem.epsilon = settings.epsilon;
  problem.n_iters = settings.n_iters;
  const bool relaxed = settings.relax && !std::isinf(*settings.relax);
  problem.fi = relaxed ? *settings.relax / (*settings.relax + settings.epsilon) : 1.0;
  problem.mass = settings.mass.value_or(-1.0);
  problem.tol = settings.tol.value_or(-1.0);
  problem.bound = settings.bound.value_or(-1.0);
  problem.hard = settings.hard;
  problem.assignments_dtype = assignments ? assignments->dtype : dtype;
  problem.workspace = workspace.data;
  return problem;
}

SinkhornAssign sinkhorn_assign_arguments(const Tensor& scores, const Tensor& potentials, const Tensor& assignments,
                                         const Tensor& workspace, int64_t size, double epsilon, bool hard,
                                         Device device) {
  const SinkhornRows rows = sinkhorn_rows_arguments(scores, nullptr, nullptr, device);
  const bool virtual_column = has_virtual_column(rows, potentials);
  expect(potentials, "potentials", accumulator(rows.dtype), device, {rows.problems, rows.columns + virtual_column});
  expect_assignments(rows, assignments, device);
  expect(workspace, "workspace", DType::f64, device, {size});
  expect_one_device(scores, {&potentials, &assignments, &workspace});
  return {rows, potentials.data, assignments.data, epsilon, virtual_column, hard, assignments.dtype, workspace.data};
}

}  // namespace clustops
