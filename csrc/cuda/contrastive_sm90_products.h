// Matrix products of a warpgroup for the contrastive losses: scores of 64 rows with a tile of columns, and weights times
// the rows of that tile. Operands lie as `swizzled` of kmeans_layout.h says: the same block is read along its rows for
// scores, and across them for weighted sums.
#pragma once

#include "contrastive_mma.h"
#include "hopper.h"

namespace clustops::cuda {

#ifdef CLUSTOPS_SIMT

namespace twin {

template <Operand kOperand>
double half_of(uint32_t word, int half) {
  return kOperand == Operand::bf16 ? bf16_of(word, half) : f16_of(word, half);
}

template <Operand kOperand>
double element_at(const unsigned char* block, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, block + swizzled(row, column / 8) + column % 8 * 2, 2);
  return half_of<kOperand>(bits, 0);
}

template <Operand kOperand, int kColumns>
void scores_of(float* sums, const unsigned char* a, const unsigned char* b, int depth_step, bool fresh) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32 % 4);
  double mine[2][kDepth];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < kDepth; ++k) {
      mine[half][k] = element_at<kOperand>(a, 16 * warp + 8 * half + lane / 4, kDepth * depth_step + k);
    }
  }
  for (int i = 0; i < kColumns / 4; ++i) {
    double total[2] = {};
    for (int k = 0; k < kDepth; ++k) {
      const double other = element_at<kOperand>(b, 8 * (i / 2) + 2 * (lane % 4) + i % 2, kDepth * depth_step + k);
      for (int half = 0; half < 2; ++half) total[half] += mine[half][k] * other;
    }
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[4 * (i / 2) + 2 * half + i % 2];
      sum = truncated(total[half] + (fresh ? 0.0 : sum));
    }
  }
}

struct Weights {
  uint32_t word[4];
};

// All lanes of a warp come here for the same product, in which their weights are those that lie there now.
template <Operand kOperand, int kFeatures>
void weigh(float* sums, const uint32_t* weights, const unsigned char* b, int64_t block_bytes, int row_step) {
  const Weights given{{weights[0], weights[1], weights[2], weights[3]}};
  struct Rows {
    double weight[2][kDepth];
  };
  const Rows mine = simt::exchange(given, [](const Weights* all, unsigned lane, unsigned) {
    Rows rows;
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned k = 0; k < kDepth; ++k) {
        rows.weight[half][k] = half_of<kOperand>(all[lane / 4 * 4 + k % 8 / 2].word[half + 2 * (k / 8)], k % 2);
      }
    }
    return rows;
  });
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < kFeatures / 4; ++i) {
    const int feature = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
    double total[2] = {};
    for (int k = 0; k < kDepth; ++k) {
      const double other =
          element_at<kOperand>(b + feature / kChunk * block_bytes, kDepth * row_step + k, feature % kChunk);
      for (int half = 0; half < 2; ++half) total[half] += mine.weight[half][k] * other;
    }
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[4 * (i / 2) + 2 * half + i % 2];
      sum = truncated(total[half] + sum);
    }
  }
}

}  // namespace twin

// sums = (fresh ? 0 : sums) + a b': 64 rows of block a, kColumns of block b, features of one depth step.
template <Operand kOperand, int kColumns>
void multiply_scores(float (&sums)[kColumns / 2], const unsigned char* a, const unsigned char* b, int depth_step,
                   bool fresh) {
  float* const to = sums;
  twin::multiply([=] { twin::scores_of<kOperand, kColumns>(to, a, b, depth_step, fresh); });
}

// sums += weights b: 64 rows of weights, which lie like sums of kDepth columns, and kDepth rows of b, from row kDepth row_step
// on, of which each kChunk features are `block_bytes` apart.
template <Operand kOperand, int kFeatures>
void multiply_weights(float (&sums)[kFeatures / 2], const uint32_t (&weights)[4], const unsigned char* b,
                      int64_t block_bytes, int row_step) {
  float* const to = sums;
  const uint32_t* const from = weights;
  twin::multiply([=] { twin::weigh<kOperand, kFeatures>(to, from, b, block_bytes, row_step); });
}

#elif defined(CLUSTOPS_SM90)

// A block as the second factor by rows: eight rows take 1024 bytes, kChunk features `block_bytes`.
__device__ inline uint64_t descriptor_across(const unsigned char* block, int64_t block_bytes, int row_step) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  const uint32_t address = shared_address(block) + row_step * kDepth * kChunkBytes;
  return kSwizzle128 | kEightRows | static_cast<uint64_t>(block_bytes >> 4) << 16 | ((address & 0x3ffff) >> 4);
}

#define CLUSTOPS_SUMS_8(x, i) \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define CLUSTOPS_SUMS_32(x, i) \
  CLUSTOPS_SUMS_8(x, i), CLUSTOPS_SUMS_8(x, i + 8), CLUSTOPS_SUMS_8(x, i + 16), CLUSTOPS_SUMS_8(x, i + 24)
#define CLUSTOPS_NAMES_32                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CLUSTOPS_NAMES_64                                                                                \
  CLUSTOPS_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// sums = (keep ? sums : 0) + product; `factors` are the operands after the sums, `keep` is the one after those.
#define CLUSTOPS_MULTIPLY(columns, type, sums, factors, keep, layouts)                                                \
  "{\n.reg .pred keep;\nsetp.ne.b32 keep, " keep ", 0;\n"                                                            \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" sums "}, " factors ", keep, 1, 1, " layouts \
  ";\n}\n"

#define CLUSTOPS_SCORES_64(type)                                                           \
  asm volatile(CLUSTOPS_MULTIPLY("64", type, CLUSTOPS_NAMES_32, "%32, %33", "%34", "0, 0") \
               : CLUSTOPS_SUMS_32(sums, 0)                                                 \
               : "l"(from_a), "l"(from_b), "r"(keep))
#define CLUSTOPS_SCORES_128(type)                                                                   \
  asm volatile(CLUSTOPS_MULTIPLY("128", type, CLUSTOPS_NAMES_64, "%64, %65", "%66", "0, 0")         \
               : CLUSTOPS_SUMS_32(sums, 0), CLUSTOPS_SUMS_32(sums, 32)                              \
               : "l"(from_a), "l"(from_b), "r"(keep))
#define CLUSTOPS_WEIGHTS_64(type)                                                                                  \
  asm volatile(CLUSTOPS_MULTIPLY("64", type, CLUSTOPS_NAMES_32, "{%32, %33, %34, %35}, %36", "%37", "1")             \
               : CLUSTOPS_SUMS_32(sums, 0)                                                                          \
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(from_b), "r"(keep))
#define CLUSTOPS_WEIGHTS_128(type)                                                                                 \
  asm volatile(CLUSTOPS_MULTIPLY("128", type, CLUSTOPS_NAMES_64, "{%64, %65, %66, %67}, %68", "%69", "1")            \
               : CLUSTOPS_SUMS_32(sums, 0), CLUSTOPS_SUMS_32(sums, 32)                                               \
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(from_b), "r"(keep))

template <Operand kOperand, int kColumns>
__device__ void multiply_scores(float (&sums)[kColumns / 2], const unsigned char* a, const unsigned char* b,
                              int depth_step, bool fresh) {
  constexpr bool kF16 = kOperand == Operand::f16;
  static_assert(kColumns == 64 || kColumns == 128, "shapes written out above");
  const int keep = !fresh;
  const uint64_t from_a = descriptor_of(a, depth_step), from_b = descriptor_of(b, depth_step);
  if constexpr (kColumns == 64 && kF16) CLUSTOPS_SCORES_64("f16");
  if constexpr (kColumns == 64 && !kF16) CLUSTOPS_SCORES_64("bf16");
  if constexpr (kColumns == 128 && kF16) CLUSTOPS_SCORES_128("f16");
  if constexpr (kColumns == 128 && !kF16) CLUSTOPS_SCORES_128("bf16");
}

template <Operand kOperand, int kFeatures>
__device__ void multiply_weights(float (&sums)[kFeatures / 2], const uint32_t (&weights)[4], const unsigned char* b,
                                 int64_t block_bytes, int row_step) {
  constexpr bool kF16 = kOperand == Operand::f16;
  static_assert(kFeatures == 64 || kFeatures == 128, "shapes written out above");
  constexpr int keep = 1;
  const uint64_t from_b = descriptor_across(b, block_bytes, row_step);
  if constexpr (kFeatures == 64 && kF16) CLUSTOPS_WEIGHTS_64("f16");
  if constexpr (kFeatures == 64 && !kF16) CLUSTOPS_WEIGHTS_64("bf16");
  if constexpr (kFeatures == 128 && kF16) CLUSTOPS_WEIGHTS_128("f16");
  if constexpr (kFeatures == 128 && !kF16) CLUSTOPS_WEIGHTS_128("bf16");
}

#endif

}  // namespace clustops::cuda
