// Fresh memory costs a page fault for each page; a result that will be written in full is made ready before.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace clustops {

// Only wishes: where the system has nothing to give, nothing changes.

// Large results, as a whole.
inline void wish_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2u << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

// A part that is written next: absent pages come in one call, at half the cost of a fault each, and still lie in a
// cache when they are written.
inline void populate_pages(void* data, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kPage = 4096, kMost = 256;
  uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  unsigned char present[kMost];
  for (uintptr_t next; first < end; first = next) {
    next = std::min(end, first + kMost * kPage);
    if (mincore(reinterpret_cast<void*>(first), next - first, present) != 0) return;
    const bool all = std::all_of(present, present + (next - first) / kPage, [](auto p) { return (p & 1) != 0; });
    if (!all) madvise(reinterpret_cast<void*>(first), next - first, MADV_POPULATE_WRITE);
  }
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace clustops
