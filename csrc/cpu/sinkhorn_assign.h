// What the solver takes of the assignment, and how both share out problems to threads.
#pragma once

#include "../common/parallel.h"
#include "sinkhorn_rows.h"

namespace clustops::cpu::CLUSTOPS_ISA {

// Rows of powers that a thread has room for; the solver adds one of sums.
constexpr int64_t kAssignRows = 5;

struct AssignSpace {
  void* bias;    // [padded]
  void* powers;  // [threads, kAssignRows, padded]
};

// Problem p alone, by these threads.
void sinkhorn_assign_problem(const SinkhornAssign& a, int64_t p, AssignSpace space, int threads);

namespace {

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
inline int64_t size_of_wide(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

inline bool one_by_one(int64_t problems, int threads) { return threads <= 1 || problems < threads; }

// work(p, slot, threads): many problems go to a thread each, few have all threads one after the other.
template <class Work>
void each_problem(int64_t problems, int threads, const Work& work) {
  if (one_by_one(problems, threads)) {
    for (int64_t p = 0; p < problems; ++p) work(p, 0, std::max(1, threads));
  } else {
    parallel_for(problems, threads, [&](int64_t p, int thread) { work(p, thread, 1); });
  }
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
