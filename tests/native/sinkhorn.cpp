// Runs the CPU kernels of Sinkhorn assignment outside Python, so that a sanitizer can watch them (CLUSTOPS_ISA names the
// instruction set).
// stdin: int64 problems, rows, columns, queued, dtype, n_iters, with weights, with mass, hard, threads; double epsilon;
// then scores, queue and weights. stdout: potentials and assignments; assignments from those potentials; log column
// masses under them.
#include "../../csrc/cpu/sinkhorn.cpp"
#include "../../csrc/cpu/sinkhorn_assign.cpp"
#include "stream.h"

int main() {
  namespace kernel = clustops::cpu::CLUSTOPS_ISA;
  using clustops::DType;
  const std::vector<int64_t> size = read<int64_t>(10);
  const int64_t p = size[0], b = size[1], k = size[2], n = size[3];
  const DType dtype = static_cast<DType>(size[4]), wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  const bool weighted = size[6] != 0, with_mass = size[7] != 0, hard = size[8] != 0;
  const int threads = static_cast<int>(size[9]);
  const double epsilon = read<double>(1)[0];
  const auto scores = read<char>(p * b * k * kernel::size_of(dtype)), queue = read<char>(p * n * k * kernel::size_of(dtype));
  const auto weights = read<char>(weighted ? p * b * kernel::size_of(wide) : 0);

  clustops::SinkhornRows rows{};
  rows.scores = scores.data();
  rows.queue = n > 0 ? queue.data() : nullptr;
  rows.weights = weighted ? weights.data() : nullptr;
  rows.problems = p, rows.rows = b, rows.queued = n, rows.columns = k;
  rows.problem_stride = b * k, rows.row_stride = k;
  rows.queue_problem_stride = n * k, rows.queue_row_stride = k;
  rows.weight_problem_stride = b, rows.weight_row_stride = 1;
  rows.dtype = dtype;

  const int64_t entries = p * (k + with_mass);
  std::vector<char> potentials(entries * kernel::size_of(wide)), masses(potentials.size());
  std::vector<char> plan(p * b * k * kernel::size_of(wide)), again(p * b * k * kernel::size_of(dtype));
  std::vector<double> workspace(kernel::sinkhorn_workspace(rows, threads));
  clustops::SinkhornSolve solve{};
  solve.rows = rows;
  solve.potentials = potentials.data(), solve.assignments = plan.data();
  solve.epsilon = epsilon, solve.n_iters = size[5], solve.fi = 1;
  solve.mass = with_mass ? 0.5 : -1, solve.tol = solve.bound = -1;
  solve.hard = hard, solve.assignments_dtype = wide, solve.workspace = workspace.data();
  kernel::sinkhorn_solve(solve, threads);

  kernel::sinkhorn_column_mass({rows, potentials.data(), masses.data(), epsilon, with_mass, true, workspace.data()},
                               threads);
  clustops::SinkhornRows batch = rows;
  batch.queue = batch.weights = nullptr, batch.queued = 0;
  std::vector<double> room(kernel::sinkhorn_assign_workspace(batch, threads));
  kernel::sinkhorn_assign(
      {batch, potentials.data(), again.data(), epsilon, with_mass, hard, dtype, room.data()}, threads);
  write(potentials);
  write(plan);
  write(again);
  write(masses);
}
