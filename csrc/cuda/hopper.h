// Matrix products of a warpgroup (128 threads) and bulk copies of sm_90a, and the barriers in shared memory that count
// them. Each has a twin in plain C++ for tests, where copies and products happen as soon, or as late, as is allowed.
#pragma once

#include <cstdint>

#include "kmeans_layout.h"
#include "mma.h"

namespace clustops::cuda {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = 64;      // of its matrix instruction, by 128 columns: 64 sums a thread
constexpr int kSums = 64;

// Where this code is compiled: nowhere but for the GPU that has it, and for its twin.
#if defined(CLUSTOPS_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CLUSTOPS_SM90
#endif

#ifdef CLUSTOPS_SIMT

namespace twin {

struct Bulk {
  void* to;
  const void* from;
  uint32_t bytes;
  const void* barrier;
};
inline std::vector<Bulk> bulk;  // copies under way

inline std::vector<std::vector<std::function<void()>>> products[1024];  // a vector for each group of a thread

// Sums change as soon, or as late, as is allowed.
inline void multiply(std::function<void()> product) {
  if (simt::order == simt::Order::forward) return product();
  products[threadIdx.x].back().push_back(std::move(product));
}

// The features of one depth step in a row of a block.
inline void load_step(const unsigned char* block, int row, int depth_step, double (&v)[kDepth]) {
  uint16_t bits[kDepth];
  for (int i = 0; i < 2; ++i) std::memcpy(bits + 8 * i, block + swizzled(row, 2 * depth_step + i), 16);
  for (int k = 0; k < kDepth; ++k) v[k] = bf16_of(bits[k], 0);
}

inline void run(float* sums, const unsigned char* block_a, const unsigned char* block_b, int depth_step, bool fresh) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32 % 4);
  double a[2][kDepth], b[kDepth];
  for (int half = 0; half < 2; ++half) load_step(block_a, 16 * warp + 8 * half + lane / 4, depth_step, a[half]);
  for (int i = 0; i < kSums / 2; ++i) {
    load_step(block_b, 8 * (i / 2) + 2 * (lane % 4) + i % 2, depth_step, b);
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[4 * (i / 2) + 2 * half + i % 2];
      double total = fresh ? 0.0 : sum;
      for (int k = 0; k < kDepth; ++k) total += a[half][k] * b[k];
      sum = truncated(total);
    }
  }
}

}  // namespace twin

struct Barrier {
  int32_t bytes;  // still to come in this phase
  uint8_t expected, left, phase, unused;

  void settle() {
    if (left == 0 && bytes == 0) {
      phase ^= 1;
      left = expected;
    }
  }
};

inline void init_barrier(Barrier* barrier, int arrivals) {
  *barrier = {0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 0};
}
inline void publish_barriers() {}
inline void publish_shared() {}

inline void arrive(Barrier* barrier) {
  if (barrier->left == 0) std::fprintf(stderr, "more arrivals than a barrier expects\n"), std::exit(5);
  --barrier->left;
  barrier->settle();
}

inline void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  barrier->bytes += static_cast<int32_t>(bytes);
  arrive(barrier);
}

inline void finish(const twin::Bulk& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  Barrier* barrier = static_cast<Barrier*>(const_cast<void*>(copy.barrier));
  barrier->bytes -= static_cast<int32_t>(copy.bytes);
  barrier->settle();
}

inline void copy_bulk(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  const twin::Bulk copy{to, from, bytes, barrier};
  if (simt::order != simt::Order::reverse) return finish(copy);  // early, also where products are late
  twin::bulk.push_back(copy);
}

// The copy that this barrier has waited for longest arrives.
inline void finish_one(const Barrier* barrier) {
  for (std::size_t i = 0; i < twin::bulk.size(); ++i) {
    if (twin::bulk[i].barrier != barrier) continue;
    const twin::Bulk copy = twin::bulk[i];
    twin::bulk.erase(twin::bulk.begin() + static_cast<std::ptrdiff_t>(i));
    return finish(copy);
  }
}

inline void wait_for(Barrier* barrier, uint32_t phase) {
  simt::poll([&] {
    if (barrier->phase == phase) finish_one(barrier);
    return barrier->phase != phase;
  });
}

template <int kCount>
void begin_products(float (&)[kCount]) {
  if (twin::products[threadIdx.x].empty()) twin::products[threadIdx.x].emplace_back();
}

inline void multiply_group(float (&sums)[kSums], const unsigned char* a, const unsigned char* b, int depth_step,
                           bool fresh) {
  float* const to = sums;
  twin::multiply([=] { twin::run(to, a, b, depth_step, fresh); });
}

inline void commit_products() { twin::products[threadIdx.x].emplace_back(); }

template <int kOpen>
void wait_for_products() {
  auto& groups = twin::products[threadIdx.x];
  while (groups.size() > kOpen + 1) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}

template <int kCount>
void read_products(float (&)[kCount]) {}

template <int kCount>
void more_registers() {}
template <int kCount>
void fewer_registers() {}

#else

struct Barrier {
  uint64_t word;
};

#ifdef CLUSTOPS_SM90

__device__ inline void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes barriers visible to the copy engine; a __syncthreads() must follow.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Makes what this thread has stored visible to the matrix units; a __syncthreads() must follow.
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// 16-byte multiples from global memory; their arrival counts on the barrier.
__device__ inline void copy_bulk(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Until the phase of this parity has ended.
__device__ inline void wait_for(Barrier* barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// Keeps the compiler from moving uses of `sums` across this point.
template <int kCount>
__device__ void read_products(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

template <int kCount>
__device__ void begin_products(float (&sums)[kCount]) {
  read_products(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kOpen>
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

// Moves registers between warpgroups; all warps of one must come here.
template <int kCount>
__device__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// A block [rows, kChunk] with the 128-byte swizzle, features along its rows: eight rows take 1024 bytes.
__device__ inline uint64_t descriptor_of(const unsigned char* block, int depth_step) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32, kUnused = uint64_t{1} << 16;
  const uint32_t address = shared_address(block) + depth_step * kDepth * 2;
  return kSwizzle128 | kEightRows | kUnused | ((address & 0x3ffff) >> 4);
}

// sums = (fresh ? 0 : sums) + a b': 64 rows of block a, 128 of block b, features of one depth step.
__device__ inline void multiply_group(float (&sums)[kSums], const unsigned char* a, const unsigned char* b,
                                      int depth_step, bool fresh) {
  const int keep = !fresh;
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.b32 keep, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, keep, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]), "+f"(sums[5]), "+f"(sums[6]),
        "+f"(sums[7]), "+f"(sums[8]), "+f"(sums[9]), "+f"(sums[10]), "+f"(sums[11]), "+f"(sums[12]), "+f"(sums[13]),
        "+f"(sums[14]), "+f"(sums[15]), "+f"(sums[16]), "+f"(sums[17]), "+f"(sums[18]), "+f"(sums[19]),
        "+f"(sums[20]), "+f"(sums[21]), "+f"(sums[22]), "+f"(sums[23]), "+f"(sums[24]), "+f"(sums[25]),
        "+f"(sums[26]), "+f"(sums[27]), "+f"(sums[28]), "+f"(sums[29]), "+f"(sums[30]), "+f"(sums[31]),
        "+f"(sums[32]), "+f"(sums[33]), "+f"(sums[34]), "+f"(sums[35]), "+f"(sums[36]), "+f"(sums[37]),
        "+f"(sums[38]), "+f"(sums[39]), "+f"(sums[40]), "+f"(sums[41]), "+f"(sums[42]), "+f"(sums[43]),
        "+f"(sums[44]), "+f"(sums[45]), "+f"(sums[46]), "+f"(sums[47]), "+f"(sums[48]), "+f"(sums[49]),
        "+f"(sums[50]), "+f"(sums[51]), "+f"(sums[52]), "+f"(sums[53]), "+f"(sums[54]), "+f"(sums[55]),
        "+f"(sums[56]), "+f"(sums[57]), "+f"(sums[58]), "+f"(sums[59]), "+f"(sums[60]), "+f"(sums[61]),
        "+f"(sums[62]), "+f"(sums[63])
      : "l"(descriptor_of(a, depth_step)), "l"(descriptor_of(b, depth_step)), "r"(keep));
}

#endif
#endif

}  // namespace clustops::cuda
