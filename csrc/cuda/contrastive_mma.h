// Products of prepared rows on tensor cores by mma.sync, for each kind of operand. One step takes 32 bytes of a row: 16
// numbers of 2 bytes or 8 of 4. What mma.h lacks has its twin in plain C++ here.
#pragma once

#include "contrastive_layout.h"
#include "element.h"
#include "mma.h"

namespace clustops::cuda {

constexpr int kStepBytes = 32;

#ifdef CLUSTOPS_SIMT

namespace twin {

inline float f16_of(uint32_t word, int half) { return value_of(F16{static_cast<uint16_t>(half ? word >> 16 : word)}); }

inline float tf32_of(uint32_t word) {
  word &= 0xffffe000u;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// d += a b for depth numbers, each of which `a_of(operands, row, k)` or `b_of(operands, k)` takes from the right lane.
template <int kSteps, class A, class B>
void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const A& a_of, const B& b_of) {
  struct Four {
    double sum[4];
  };
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Four sums = simt::exchange(mine, [&](const Operands* all, unsigned lane, unsigned) {
    Four result{};
    for (int i = 0; i < 4; ++i) {
      const int row = static_cast<int>(lane / 4) + 8 * (i / 2), column = static_cast<int>(2 * (lane % 4)) + i % 2;
      for (int k = 0; k < kSteps; ++k) {
        const int of = kSteps == 16 ? k % 8 / 2 : k % 4;  // the lane of its four that holds k
        result.sum[i] += static_cast<double>(a_of(all[row % 8 * 4 + of], row, k)) * b_of(all[column * 4 + of], k);
      }
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) d[i] = truncated(d[i] + sums.sum[i]);
}

}  // namespace twin

inline void multiply_add_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  twin::product<16>(
      d, a, b0, b1,
      [](const twin::Operands& o, int row, int k) { return twin::f16_of(o.a[(row >= 8) + 2 * (k >= 8)], k % 2); },
      [](const twin::Operands& o, int k) { return twin::f16_of(o.b[k >= 8], k % 2); });
}

inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  twin::product<8>(
      d, a, b0, b1, [](const twin::Operands& o, int row, int k) { return twin::tf32_of(o.a[(row >= 8) + 2 * (k >= 4)]); },
      [](const twin::Operands& o, int k) { return twin::tf32_of(o.b[k >= 4]); });
}

// As load_matrices, but lane l gets numbers l / 4 of rows 2 (l % 4) + {0, 1} of each.
inline void load_transposed(uint32_t (&fragment)[4], const void* row) {
  struct Four {
    uint32_t word[4];
  };
  const Four mine = simt::exchange(row, [](const void* const* rows, unsigned lane, unsigned) {
    Four result;
    for (unsigned i = 0; i < 4; ++i) {
      uint16_t half[2];
      for (unsigned h = 0; h < 2; ++h) {
        std::memcpy(&half[h], static_cast<const char*>(rows[8 * i + 2 * (lane % 4) + h]) + 2 * (lane / 4), 2);
      }
      result.word[i] = half[0] | static_cast<uint32_t>(half[1]) << 16;
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) fragment[i] = mine.word[i];
}

inline uint32_t pack_f16(float low, float high) {
  F16 l, h;
  assign(l, low), assign(h, high);
  return l.bits | static_cast<uint32_t>(h.bits) << 16;
}

// To the nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x - x != 0 ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

#else

__device__ inline void multiply_add_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void load_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline uint32_t pack_f16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }

#endif

// Fragments of 4 (of the left matrix) or 2 (of the right) registers, in parts whose sum is the operand.
template <Operand kOperand, int n>
struct Fragment {
  static constexpr int kParts = kOperand == Operand::f32 ? 2 : 1;
  uint32_t part[kParts][n];

  __device__ void set(int i, uint32_t bits) {
    if constexpr (kParts == 1) {
      part[0][i] = bits;
    } else {
      part[0][i] = to_tf32(float_of(bits));
      part[1][i] = bits_of(float_of(bits) - float_of(part[0][i]));
    }
  }
};

template <Operand kOperand>
__device__ void multiply_add_parts(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kOperand == Operand::bf16) multiply_add(d, a, b0, b1);
  if constexpr (kOperand == Operand::f16) multiply_add_f16(d, a, b0, b1);
  if constexpr (bytes_of(kOperand) == 4) multiply_add_tf32(d, a, b0, b1);
}

// d += a b of one step; the small products first.
template <Operand kOperand>
__device__ void multiply_step(float (&d)[4], const Fragment<kOperand, 4>& a, const Fragment<kOperand, 2>& b) {
  if constexpr (kOperand == Operand::f32) {
    multiply_add_parts<kOperand>(d, a.part[1], b.part[0][0], b.part[0][1]);
    multiply_add_parts<kOperand>(d, a.part[0], b.part[1][0], b.part[1][1]);
  }
  multiply_add_parts<kOperand>(d, a.part[0], b.part[0][0], b.part[0][1]);
}

// Byte `piece` (16 bytes each) of a row in shared memory: for each chunk a block [rows, kChunkBytes].
template <int kRows>
__device__ int place(int row, int piece) {
  return piece / 8 * (kRows * kChunkBytes) + swizzled(row, piece % 8);
}

// x += a b': kM * 16 rows of `a` from row `a_row` on, kN * 8 of `b` from row `b_row` on, all steps of the chunks.
template <Operand kOperand, int kM, int kN, int kARows, int kBRows>
__device__ void multiply_rows(const unsigned char* a, int a_row, const unsigned char* b, int b_row, int chunks,
                              float (&x)[kM][kN][4]) {
  const int lane = threadIdx.x % 32;
  for (int step = 0; step < chunks * (kChunkBytes / kStepBytes); ++step) {
    Fragment<kOperand, 4> left[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t word[4];
      load_matrices(word, a + place<kARows>(a_row + 16 * m + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) left[m].set(i, word[i]);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t word[4];
      load_matrices(word, b + place<kBRows>(b_row + 8 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Fragment<kOperand, 2> right;
        right.set(0, word[2 * i]);
        right.set(1, word[2 * i + 1]);
#pragma unroll
        for (int m = 0; m < kM; ++m) multiply_step<kOperand>(x[m][n + i], left[m], right);
      }
    }
  }
}

// sums += g b: `g` are the gradients of the scores that multiply_rows gave, `b` the rows of those columns. Sums of fp32
// parts are rounded once for the kN * 8 rows: tensor cores truncate.
template <Operand kOperand, int kM, int kN, int kBRows, int kFeatures>
__device__ void multiply_gradients(const float (&g)[kM][kN][4], const unsigned char* b, int b_row, int chunks,
                                   float (&sums)[kM][kFeatures / 8][4]) {
  const int lane = threadIdx.x % 32;
  if constexpr (bytes_of(kOperand) == 2) {
    Fragment<kOperand, 4> left[kM][kN / 2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float low = g[m][n][2 * half], high = g[m][n][2 * half + 1];
          left[m][n / 2].part[0][2 * (n % 2) + half] =
              kOperand == Operand::bf16 ? pack_bf16(low, high) : pack_f16(low, high);
        }
      }
    }
#pragma unroll
    for (int f = 0; f < kFeatures / 8; f += 2) {
      if (f >= 8 * chunks) break;
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t word[4];
        load_transposed(word, b + place<kBRows>(b_row + 8 * n + lane % 16, f + lane / 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Fragment<kOperand, 2> right{{{word[2 * i], word[2 * i + 1]}}};
#pragma unroll
          for (int m = 0; m < kM; ++m) multiply_step<kOperand>(sums[m][f + i], left[m][n / 2], right);
        }
      }
    }
  } else {
    // Number k of a step is row 2 k of b for k < 4, row 2 k - 7 above: so scores are where the left operand wants them.
    Fragment<kOperand, 4> left[kM][kN];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = g[m][n][i];
          left[m][n].set(i / 2 + 2 * (i % 2), kOperand == Operand::tf32 ? to_tf32(value) : bits_of(value));
        }
      }
    }
#pragma unroll
    for (int f = 0; f < kFeatures / 8; ++f) {
      if (f >= 4 * chunks) break;
      float fresh[kM][4] = {};
      const int feature = 8 * f + lane / 4;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        Fragment<kOperand, 2> right;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned char* piece = b + place<kBRows>(b_row + 8 * n + 2 * (lane % 4) + i, feature / 4);
          right.set(i, *reinterpret_cast<const uint32_t*>(piece + feature % 4 * 4));
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) multiply_step<kOperand>(fresh[m], left[m][n], right);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][f][i] += fresh[m][i];
      }
    }
  }
}

}  // namespace clustops::cuda
