// A GPU in plain C++, for tests: each thread of a block is a fiber, and a block's fibers run in turn between barriers,
// in forward, reverse or shuffled order. A kernel with a missing barrier gives another result in another order;
// an access out of bounds is the address sanitizer's to find.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time
#define __syncthreads() simt::barrier()

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

enum class Order { forward, reverse, shuffled };
inline Order order = Order::forward;

constexpr std::size_t kStack = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  void* sanitizer = nullptr;
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber>* fibers;
inline unsigned running;
inline const std::function<void()>* body;
inline const void* scheduler_stack;
inline std::size_t scheduler_size;

inline void enter_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  void* mine = nullptr;
  __sanitizer_start_switch_fiber(&mine, fiber.stack.data(), kStack);
#endif
  swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
}

inline void leave_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.sanitizer, scheduler_stack, scheduler_size);
#endif
  swapcontext(&fiber.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.sanitizer, &scheduler_stack, &scheduler_size);
#endif
}

inline void barrier() {
  leave_fiber((*fibers)[running]);
  threadIdx.x = running;
}

inline void fiber_main() {
  Fiber& fiber = (*fibers)[running];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  (*body)();
  fiber.done = true;
  leave_fiber(fiber);
}

// One round a barrier: every fiber runs up to its next one.
inline void run_block(unsigned threads, std::mt19937& random) {
  std::vector<Fiber> all(threads);
  fibers = &all;
  for (Fiber& fiber : all) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<unsigned> turn(threads);
  for (unsigned t = 0; t < threads; ++t) turn[t] = order == Order::reverse ? threads - 1 - t : t;
  while (!all[0].done) {
    if (order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), random);
    for (unsigned t : turn) {
      running = threadIdx.x = t;
      enter_fiber(all[t]);
    }
  }
}

inline void launch(unsigned grid, unsigned block, const std::function<void()>& kernel) {
  std::mt19937 random(grid);
  gridDim.x = grid;
  blockDim.x = block;
  body = &kernel;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) run_block(block, random);
}

}  // namespace simt
