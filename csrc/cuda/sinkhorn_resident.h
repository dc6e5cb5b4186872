// Problems whose rows fit in the shared memory of the multiprocessors together: read once, solved in one launch.
#pragma once

#include "../common/sinkhorn.h"

namespace clustops::cuda {

// In 64-bit words; 0 where problems do not fit on the current device.
int64_t resident_workspace(const SinkhornRows& rows, int64_t all);
void resident_solve(const SinkhornSolve& problem, void* stream);

}  // namespace clustops::cuda
