// One loop over threads. With OpenMP the threads are those of the pool that torch already runs.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#elif defined(CLUSTOPS_STD_THREADS)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace clustops {

// work(index, thread) for every index in [0, count); thread is in [0, threads). Indices go to whichever
// thread is free, so results must depend on the index alone.
template <class Work>
void parallel_for(int64_t count, int threads, const Work& work) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i, 0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) work(i, omp_get_thread_num());
#elif defined(CLUSTOPS_STD_THREADS)
  // For the thread sanitizer, which does not understand OpenMP's barriers.
  std::atomic<int64_t> next{0};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      for (int64_t i; (i = next.fetch_add(1)) < count;) work(i, t);
    });
  }
  for (std::thread& thread : pool) thread.join();
#else
  for (int64_t i = 0; i < count; ++i) work(i, 0);
#endif
}

}  // namespace clustops
