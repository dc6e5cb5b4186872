// A barrier of several CTAs that all run at once: a cooperative launch sees to that.
#pragma once

#include "launch.h"

namespace clustops::cuda {

// Each member adds to a counter, 0 at the start of the kernel, and waits for the others; it is never set back, so that a
// slow member cannot miss its turn. What was written to global memory before is seen by all after, through fresh().
struct GridBarrier {
  unsigned* counter;
  unsigned members, due = 0;

  __device__ void wait() {
    __syncthreads();
    due += members;
    if (members > 1) {
      if (threadIdx.x == 0) {
#ifdef CLUSTOPS_SIMT
        *counter += 1;
        simt::poll([&] { return static_cast<int>(*counter - due) >= 0; });
#else
        __threadfence();
        atomicAdd(counter, 1u);
        unsigned seen;
        do {
          asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while (static_cast<int>(seen - due) < 0);
        __threadfence();
#endif
      }
      __syncthreads();
    }
  }
};

}  // namespace clustops::cuda
