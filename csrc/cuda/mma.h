// Matrix products on tensor cores, and copies to shared memory that go on beside them. Each has a twin in plain C++ for
// tests, with the layout that the PTX manual gives, sums truncated instead of rounded, and copies as late as allowed.
#pragma once

#include <cstdint>

#include "launch.h"

namespace clustops::cuda {

#ifdef CLUSTOPS_SIMT

namespace twin {

inline float bf16_of(uint32_t word, int half) {
  const uint32_t bits = (half ? word >> 16 : word & 0xffff) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float truncated(double value) {
  const float near = static_cast<float>(value);
  return std::abs(static_cast<double>(near)) > std::abs(value) ? std::nextafter(near, 0.0f) : near;
}

struct Operands {
  uint32_t a[4], b[2];

  float at_a(int row, int k) const { return bf16_of(a[(row >= 8) + 2 * (k >= 8)], k % 2); }
  float at_b(int k) const { return bf16_of(b[k >= 8], k % 2); }
};

struct Copy {
  void* to;
  const void* from;
};

// Copies that this thread has asked for, a vector for each group.
inline std::vector<std::vector<Copy>>& pending() {
  static std::vector<std::vector<std::vector<Copy>>> of_threads;
  const std::size_t mine = std::size_t{blockIdx.x} * 1024 + threadIdx.x;
  if (mine >= of_threads.size()) of_threads.resize(std::max(mine + 1, 2 * of_threads.size()));
  if (of_threads[mine].empty()) of_threads[mine].emplace_back();
  return of_threads[mine];
}

}  // namespace twin

// Four 8 x 8 matrices of 16-bit numbers: lane l names row l % 8 of matrix l / 8 and gets numbers 2 (l % 4) + {0, 1} of row
// l / 4 of each.
inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  struct Four {
    uint32_t word[4];
  };
  const Four mine = simt::exchange(row, [](const void* const* rows, unsigned lane, unsigned) {
    Four result;
    for (unsigned i = 0; i < 4; ++i) {
      std::memcpy(&result.word[i], static_cast<const char*>(rows[8 * i + lane / 4]) + 4 * (lane % 4), 4);
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) fragment[i] = mine.word[i];
}

// d += a b, a [16, 16] and b [16, 8] in bf16. Lane l holds of d rows l / 4 and l / 4 + 8, columns 2 (l % 4) + {0, 1}.
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Four {
    double sum[4];
  };
  const twin::Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Four sums = simt::exchange(mine, [](const twin::Operands* all, unsigned lane, unsigned) {
    Four result{};
    for (int i = 0; i < 4; ++i) {
      const int row = static_cast<int>(lane / 4) + 8 * (i / 2), column = static_cast<int>(2 * (lane % 4)) + i % 2;
      for (int k = 0; k < 16; ++k) {
        const int of = k % 8 / 2;  // the lane of its four that holds k
        result.sum[i] += static_cast<double>(all[row % 8 * 4 + of].at_a(row, k)) * all[column * 4 + of].at_b(k);
      }
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) d[i] = twin::truncated(d[i] + sums.sum[i]);
}

inline uint32_t pack_bf16(float low, float high) { return twin::to_bf16(low) | twin::to_bf16(high) << 16; }

inline void copy_async(void* to, const void* from) {
  auto& groups = twin::pending();
  groups.back().push_back({to, from});
  if (simt::order == simt::Order::forward) std::memcpy(to, from, 16);  // the earliest that is allowed
}

inline void commit_copies() { twin::pending().emplace_back(); }

// All but the last `kOpen` groups of this thread have arrived.
template <int kOpen>
void wait_for_copies() {
  auto& groups = twin::pending();
  while (groups.size() > kOpen + 1) {
    if (simt::order != simt::Order::forward) {
      for (const twin::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    }
    groups.erase(groups.begin());
  }
}

#else

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kOpen>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

#endif

}  // namespace clustops::cuda
