// A GPU in plain C++, for tests: each thread of a block is a fiber, and a block's fibers run in turn between barriers,
// in forward, reverse or shuffled order. A kernel with a missing barrier gives another result in another order; one
// whose threads wait at different barriers ends the program; an access out of bounds is the address sanitizer's to find.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time
#define __grid_constant__
#define __syncthreads() simt::wait(simt::Wait::block)
#define __syncwarp() simt::wait(simt::Wait::warp)

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace simt {

enum class Order { forward, reverse, shuffled };
inline Order order = Order::forward;

constexpr std::size_t kStack = 64 << 10;
constexpr unsigned kWarp = 32;

enum class Wait { none, poll, warp, block, ended };

using Place = void*[5];  // of __builtin_setjmp

struct Fiber {
  ucontext_t context;  // for its first turn
  bool started = false;
  Place place;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* sanitizer = nullptr;
  Wait waits = Wait::none;
};

inline Place scheduler;
inline std::vector<Fiber>* fibers;
inline unsigned running;
inline const std::function<void()>* body;
inline const void* scheduler_stack;
inline std::size_t scheduler_size;
inline unsigned char* dynamic_shared;

// Hidden from the compiler: where it sees a jump, the sanitizer clears the stack's shadow, four times the work of all else.
__attribute__((noipa, no_sanitize_address)) inline void jump(Place& place) { __builtin_longjmp(place, 1); }

__attribute__((noinline)) inline void enter_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  void* mine = nullptr;
  __sanitizer_start_switch_fiber(&mine, fiber.stack.get(), kStack);
#endif
  if (__builtin_setjmp(scheduler) == 0) {
    if (fiber.started) jump(fiber.place);
    fiber.started = true;
    setcontext(&fiber.context);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
}

__attribute__((noinline)) inline void leave_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  void** keep = fiber.waits == Wait::ended ? nullptr : &fiber.sanitizer;
  __sanitizer_start_switch_fiber(keep, scheduler_stack, scheduler_size);
#endif
  if (__builtin_setjmp(fiber.place) == 0) jump(scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber((*fibers)[running].sanitizer, &scheduler_stack, &scheduler_size);
#endif
}

inline void wait(Wait barrier) {
  Fiber& fiber = (*fibers)[running];
  fiber.waits = barrier;
  leave_fiber(fiber);
}

// Waits for something that another thread does.
constexpr int kMostPolls = 100000;
inline int polls;

template <class Ready>
void poll(const Ready& ready) {
  while (!ready()) wait(Wait::poll);
  polls = 0;
}

inline void fiber_main() {
  Fiber& fiber = (*fibers)[running];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  (*body)();
  wait(Wait::ended);
}

// Lets threads [first, last) go on that wait at this barrier: if all of them do that have not ended, or any.
inline bool release(unsigned first, unsigned last, Wait barrier, bool all = true) {
  bool some = false;
  for (unsigned t = first; t < last; ++t) {
    const Wait waits = (*fibers)[t].waits;
    if (all && waits != barrier && waits != Wait::ended) return false;
    some |= waits == barrier;
  }
  for (unsigned t = first; t < last; ++t) {
    if ((*fibers)[t].waits == barrier) (*fibers)[t].waits = Wait::none;
  }
  return some;
}

struct Block {
  unsigned index = 0;
  std::vector<Fiber> threads;
  std::vector<unsigned char> memory;

  Block(unsigned size, std::size_t shared) : threads(size), memory(shared) {}

  // Shared memory holds garbage when a block starts.
  void start(unsigned at) {
    index = at;
    std::fill(memory.begin(), memory.end(), static_cast<unsigned char>(0xcd));
    for (Fiber& fiber : threads) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(fiber.stack.get(), kStack);  // frames of the block before never returned
#endif
      fiber.waits = Wait::none;
      fiber.started = false;
      makecontext(&fiber.context, fiber_main, 0);
    }
  }
};

// Runs a block until it ends; or, if some of its threads wait for what others do, until no other thread can go on: false.
inline bool run_block(Block& block, std::mt19937& random) {
  std::vector<Fiber>& all = block.threads;
  const unsigned threads = static_cast<unsigned>(all.size());
  fibers = &all;
  blockIdx.x = block.index;
  dynamic_shared = block.memory.data();
  std::vector<unsigned> turn(threads);
  for (unsigned t = 0; t < threads; ++t) turn[t] = order == Order::reverse ? threads - 1 - t : t;
  release(0, threads, Wait::poll, false);
  unsigned behind = 0, rounds = 0;
  for (;;) {
    if (order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), random);
    // Some warps fall behind, as they do on a GPU, now and then for long.
    if (order == Order::shuffled && rounds-- == 0) {
      behind = static_cast<unsigned>(random());
      rounds = random() % 8 ? 0 : static_cast<unsigned>(random() % 64);
    }
    bool late = false, ran = false;
    for (unsigned t : turn) {
      if (all[t].waits != Wait::none) continue;
      if (behind >> t / kWarp & 1) {
        late = true;
        continue;
      }
      running = threadIdx.x = t;
      enter_fiber(all[t]);
      ran = true;
    }
    if (!ran) rounds = 0;
    bool more = late;
    for (unsigned t = 0; t < threads; t += kWarp) more |= release(t, std::min(t + kWarp, threads), Wait::warp);
    if (more || release(0, threads, Wait::block)) {
      release(0, threads, Wait::poll, false);
      continue;
    }
    const auto is = [](Wait wait) { return [wait](const Fiber& fiber) { return fiber.waits == wait; }; };
    if (std::any_of(all.begin(), all.end(), is(Wait::poll))) return false;
    if (std::all_of(all.begin(), all.end(), is(Wait::ended))) return true;
    std::fprintf(stderr, "threads of a block wait at different barriers\n");
    std::exit(4);
  }
}

inline void start(unsigned grid, unsigned block, const std::function<void()>& kernel) {
  gridDim.x = grid;
  blockDim.x = block;
  body = &kernel;
  polls = 0;
}

inline void check_polls() {
  if (++polls <= kMostPolls) return;
  std::fprintf(stderr, "threads wait for what no other thread does\n");
  std::exit(4);
}

inline void launch(unsigned grid, unsigned block, std::size_t shared, const std::function<void()>& kernel) {
  std::mt19937 random(grid);
  start(grid, block, kernel);
  Block one(block, shared);
  for (unsigned b = 0; b < grid; ++b) {
    one.start(b);
    while (!run_block(one, random)) check_polls();
  }
}

inline void launch(unsigned grid, unsigned block, const std::function<void()>& kernel) { launch(grid, block, 0, kernel); }

// All blocks run at once: each until it waits for the others. Their kernel may have dynamic shared memory only.
inline void launch_together(unsigned grid, unsigned block, std::size_t shared, const std::function<void()>& kernel) {
  std::mt19937 random(grid);
  start(grid, block, kernel);
  std::vector<std::unique_ptr<Block>> left;
  for (unsigned b = 0; b < grid; ++b) {
    left.emplace_back(new Block(block, shared));
    left.back()->start(b);
  }
  if (order == Order::reverse) std::reverse(left.begin(), left.end());
  while (!left.empty()) {
    if (order == Order::shuffled) std::shuffle(left.begin(), left.end(), random);
    const auto ended = [&](const std::unique_ptr<Block>& one) { return run_block(*one, random); };
    left.erase(std::remove_if(left.begin(), left.end(), ended), left.end());
    check_polls();
  }
}

// What every lane of a warp gave, once all of them have.
template <class T, class Use>
auto exchange(T mine, const Use& use) {
  static T given[1024];
  const unsigned first = threadIdx.x / kWarp * kWarp, last = std::min(first + kWarp, blockDim.x);
  given[threadIdx.x] = mine;
  __syncwarp();
  const auto result = use(given + first, threadIdx.x % kWarp, last - first);
  __syncwarp();
  return result;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return simt::exchange(value, [&](const T* all, unsigned, unsigned lanes) {
    return all[static_cast<unsigned>(from) % simt::kWarp % lanes];
  });
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::exchange(value, [&](const T* all, unsigned lane, unsigned lanes) {
    const unsigned from = lane ^ static_cast<unsigned>(mask);
    return from < lanes ? all[from] : value;
  });
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  return simt::exchange(value, [&](const T* all, unsigned lane, unsigned) { return lane < by ? value : all[lane - by]; });
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  return simt::exchange(
      value, [&](const T* all, unsigned lane, unsigned lanes) { return lane + by < lanes ? all[lane + by] : value; });
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  return simt::exchange(predicate, [](const int* all, unsigned, unsigned lanes) {
    unsigned bits = 0;
    for (unsigned l = 0; l < lanes; ++l) bits |= (all[l] != 0 ? 1u : 0u) << l;
    return bits;
  });
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline int __syncthreads_or(int predicate) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= predicate != 0;
  __syncthreads();
  return any;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Fibers change only at barriers, so nothing comes between the two halves.
template <class T, class V>
T atomicAdd(T* where, V value) {
  const T before = *where;
  *where = before + static_cast<T>(value);
  return before;
}
template <class T, class V>
T atomicMax(T* where, V value) {
  const T before = *where;
  *where = std::max(before, static_cast<T>(value));
  return before;
}
template <class T, class V>
T atomicMin(T* where, V value) {
  const T before = *where;
  *where = std::min(before, static_cast<T>(value));
  return before;
}
