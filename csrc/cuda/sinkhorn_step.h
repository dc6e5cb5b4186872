// One update of a potential, in logarithms to base 2.
#pragma once

#include "sinkhorn_rows.h"

namespace clustops::cuda {

// The fold of a number of each thread, in a fixed order; all threads have it. `scratch` has room for a block's threads.
template <class A, class Fold>
__device__ A block_fold(A value, A* scratch, const Fold& fold) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  scratch[thread] = value;
  __syncthreads();
  int half = 1;
  while (half < threads) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    if (thread < half && thread + half < threads) scratch[thread] = fold(scratch[thread], scratch[thread + half]);
    __syncthreads();
  }
  const A result = scratch[0];
  __syncthreads();
  return result;
}

template <class A>
__device__ A block_sum(A value, A* scratch) {
  return block_fold(value, scratch, [](A one, A other) { return one + other; });
}

// a <- fi (a + log r - log m) for one problem; fi is 1 for the virtual column.
template <class A>
struct SinkhornStep {
  const A* prior;  // of this problem, or null: uniform
  A total;         // log2 of the sum of the prior, or of the number of columns
  A fi, share, rest;  // log2 of the share of mass of the columns, and of the virtual one
  int columns;

  __device__ SinkhornStep(const SinkhornSolve& a, int64_t p, A* scratch)
      : prior(a.prior ? static_cast<const A*>(a.prior) + p * a.rows.columns : nullptr),
        fi(static_cast<A>(a.fi)),
        share(a.mass < 0 ? A(0) : log_two(static_cast<A>(a.mass))),
        rest(log_two(static_cast<A>(1 - a.mass))),
        columns(static_cast<int>(a.rows.columns)) {
    A sum = prior ? A(0) : static_cast<A>(columns);
    if (prior) {
      for (int c = static_cast<int>(threadIdx.x); c < columns; c += static_cast<int>(blockDim.x)) sum += prior[c];
      sum = block_sum(sum, scratch);
    }
    total = log_two(sum);
  }

  __device__ A log_prior(int c) const {
    if (c == columns) return rest;
    return (prior ? log_two(prior[c]) : A(0)) - total + share;
  }

  __device__ A next(int c, A current, A log_mass) const {
    const A r = log_prior(c);
    if (r == -Numbers<A>::infinity || current == -Numbers<A>::infinity) return -Numbers<A>::infinity;
    return (c == columns ? A(1) : fi) * (current + r - log_mass);
  }

  // The mass that this update moves.
  __device__ A moved(A current, A next, A log_mass) const {
    if (next == -Numbers<A>::infinity) return 0;
    const A moved = power_of_two(log_mass + next - current) - power_of_two(log_mass);
    return moved < 0 ? -moved : moved;
  }
};

}  // namespace clustops::cuda
