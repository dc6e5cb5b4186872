// The arguments of Sinkhorn assignment (potentials, column masses, assignments), checked once for CPU and CUDA alike.
#pragma once

#include <optional>

#include "tensor.h"

namespace clustops {

// Rows of scores: those of a batch, then those of a queue, which weigh 1.
struct SinkhornRows {
  const void* scores;   // [problems, rows, columns], neighbouring columns, any other strides
  const void* queue;    // [problems, queued, columns] of the same dtype, likewise; a problem stride of 0 is one for all
  const void* weights;  // [problems, rows] at any stride, float32 (float64 for float64 scores), or null: all 1
  int64_t problems, rows, queued, columns;
  int64_t problem_stride, row_stride;  // of the scores, in elements
  int64_t queue_problem_stride, queue_row_stride;
  int64_t weight_problem_stride, weight_row_stride;
  DType dtype;
};

// What the reference calls column_log_mass.
struct SinkhornMass {
  SinkhornRows rows;
  const void* potentials;  // [problems, columns], or [problems, columns + 1] with a virtual column
  void* log_mass;          // likewise
  double epsilon;
  bool virtual_column, normalized;
  void* workspace;
};

// What the reference calls sinkhorn_potentials and, where there are assignments, sinkhorn_.
struct SinkhornSolve {
  SinkhornRows rows;
  const void* prior;  // [problems, columns], or null: uniform
  const void* init;   // like the potentials, or null: a cold start
  void* potentials;   // [problems, columns], or [problems, columns + 1] with a virtual column
  void* assignments;  // [problems, rows, columns], contiguous, of the dtype of the scores or of the potentials; or null
  double epsilon;
  int64_t n_iters;
  double fi;     // relax / (relax + epsilon), 1 if balanced
  double mass;   // below 0: no virtual column
  double tol;    // below 0: all updates
  double bound;  // below 0: unknown
  bool hard;
  DType assignments_dtype;
  void* workspace;
};

struct SinkhornAssign {
  SinkhornRows rows;       // without queue and weights
  const void* potentials;  // [problems, columns], or [problems, columns + 1] with a virtual column
  void* assignments;       // [problems, rows, columns], contiguous, of the dtype of the scores or of the potentials
  double epsilon;
  bool virtual_column, hard;
  DType assignments_dtype;
  void* workspace;
};

// The scalar arguments, as the op takes them.
struct SinkhornSettings {
  double epsilon;
  int64_t n_iters;
  std::optional<double> relax, mass, tol, bound;
  bool hard;
};

SinkhornRows sinkhorn_rows_arguments(const Tensor& scores, const Tensor* queue, const Tensor* weights, Device device);
// A workspace is float64 and has `size` elements.
SinkhornMass sinkhorn_mass_arguments(const Tensor& scores, const Tensor* queue, const Tensor* weights,
                                     const Tensor& potentials, const Tensor& log_mass, const Tensor& workspace,
                                     int64_t size, double epsilon, bool normalized, Device device);
SinkhornSolve sinkhorn_solve_arguments(const Tensor& scores, const Tensor* queue, const Tensor* prior,
                                       const Tensor* weights, const Tensor* init, const Tensor& potentials,
                                       const Tensor* assignments, const Tensor& workspace, int64_t size,
                                       const SinkhornSettings& settings, Device device);
SinkhornAssign sinkhorn_assign_arguments(const Tensor& scores, const Tensor& potentials, const Tensor& assignments,
                                         const Tensor& workspace, int64_t size, double epsilon, bool hard,
                                         Device device);

}  // namespace clustops
