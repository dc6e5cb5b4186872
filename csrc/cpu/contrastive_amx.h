// Products of blocks on AMX tiles, as accurate as those of fp32: a number is the sum of three of bf16, and of nine
// products of two such sums the six large ones count. Numbers of bf16 are one part, and exact.
#pragma once

#include "amx.h"
#include "contrastive_pairs.h"

#if defined(__AMX_BF16__)

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int kParts = 3;
constexpr int64_t kTile = 16 * 32;  // numbers in a tile, of bf16

inline __m512 of_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The next part of 32 numbers, which are left without it.
inline __m512i next_part(__m512& first, __m512& second) {
  const __m512i part = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  first = _mm512_sub_ps(first, of_bf16(_mm512_castsi512_si256(part)));
  second = _mm512_sub_ps(second, of_bf16(_mm512_extracti64x4_epi64(part, 1)));
  return part;
}

// 16 rows of 32 numbers, `stride` apart, as a left operand; `next` lies between parts.
inline void pack_left(const float* from, int64_t stride, int parts, uint16_t* to, int64_t next) {
  for (int r = 0; r < 16; ++r) {
    __m512 first = _mm512_loadu_ps(from + r * stride), second = _mm512_loadu_ps(from + r * stride + 16);
    for (int p = 0; p < parts; ++p) _mm512_store_si512(to + p * next + r * 32, next_part(first, second));
  }
}

// 32 rows of 16 numbers as a right operand: pairs of rows side by side.
inline void pack_right(const float* from, int64_t stride, int parts, uint16_t* to, int64_t next) {
  alignas(64) uint16_t place[32];
  for (int i = 0; i < 32; ++i) place[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  const __m512i order = _mm512_load_si512(place);
  for (int r = 0; r < 16; ++r) {
    __m512 first = _mm512_loadu_ps(from + 2 * r * stride), second = _mm512_loadu_ps(from + (2 * r + 1) * stride);
    for (int p = 0; p < parts; ++p) {
      _mm512_store_si512(to + p * next + r * 32, _mm512_permutexvar_epi16(order, next_part(first, second)));
    }
  }
}

// Operands of one kind: `tiles` groups of `steps` tiles, for each part.
struct Operand {
  Numbers<uint16_t> numbers;
  int64_t next_part;

  Operand(int64_t tiles, int parts) : numbers(tiles * parts * kTile), next_part(tiles * kTile) {}
  uint16_t* tile(int64_t i) const { return numbers.data() + i * kTile; }
};

// A side of a product: where its first tile lies, and how far from it the second one, a step and a part are.
struct Side {
  const uint16_t* first;
  int64_t second, step, part;
};

// out = or += left right, 32 by 32 numbers, rows of out `stride` apart.
template <int kLeft, int kRight>
void multiply_tiles(const Side& left, const Side& right, int64_t steps, bool add, float* out, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  if (add) {
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, out + 16, bytes);
    _tile_loadd(2, out + 16 * stride, bytes);
    _tile_loadd(3, out + 16 * stride + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    // Small products first.
#pragma GCC unroll 3
    for (int p = kLeft - 1; p >= 0; --p) {
      const uint16_t* a = left.first + s * left.step + p * left.part;
      _tile_loadd(4, a, 64);
      _tile_loadd(5, a + left.second, 64);
#pragma GCC unroll 3
      for (int q = (kRight < kParts - p ? kRight : kParts - p) - 1; q >= 0; --q) {
        const uint16_t* b = right.first + s * right.step + q * right.part;
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + right.second, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + 16, bytes);
  _tile_stored(2, out + 16 * stride, bytes);
  _tile_stored(3, out + 16 * stride + 16, bytes);
}

// Room for the operands of two blocks.
struct Operands {
  static constexpr int64_t kSquares = kMaxBlock / 32;
  int parts;        // of the rows
  int64_t chunks;
  Operand left, right;      // rows of one block and of the other, for scores: [row / 16, chunk]
  Operand ours, theirs;     // the same rows for sums of them: [row / 32, feature / 16]
  Operand weights, turned;  // G and G': [row / 16, column / 32]

  Operands(int64_t chunks, int parts, bool backward)
      : parts(parts),
        chunks(chunks),
        left(2 * kSquares * chunks, parts),
        right(2 * kSquares * chunks, parts),
        ours(backward ? 2 * kSquares * chunks : 0, parts),
        theirs(backward ? 2 * kSquares * chunks : 0, parts),
        weights(backward ? 2 * kSquares * kSquares : 0, kParts),
        turned(backward ? 2 * kSquares * kSquares : 0, kParts) {}
};

inline void pack_scores(const Rows<float>& rows, const Block& one, const Block& other, const Operands& to) {
  const int64_t steps = to.chunks;
  for (int64_t t = 0; t < (one.end - one.first) / 16; ++t) {
    for (int64_t c = 0; c < steps; ++c) {
      pack_left(rows.chunk(c, one.first + t * 16), 32, to.parts, to.left.tile(t * steps + c), to.left.next_part);
    }
  }
  for (int64_t t = 0; t < (other.end - other.first) / 16; ++t) {
    for (int64_t c = 0; c < steps; ++c) {
      alignas(64) uint16_t part[kParts * kTile];
      pack_left(rows.chunk(c, other.first + t * 16), 32, to.parts, part, kTile);
      for (int p = 0; p < to.parts; ++p) {
        transpose_16(reinterpret_cast<const float*>(part + p * kTile), 16,
                     reinterpret_cast<float*>(to.right.tile(t * steps + c) + p * to.right.next_part), 16);
      }
    }
  }
}

inline void pack_sums(const Rows<float>& rows, const Block& block, int parts, const Operand& to) {
  for (int64_t s = 0; s < (block.end - block.first) / 32; ++s) {
    for (int64_t f = 0; f < 2 * rows.chunks; ++f) {
      pack_right(rows.chunk(f / 2, block.first + s * 32) + f % 2 * 16, 32, parts, to.tile(s * 2 * rows.chunks + f),
                 to.next_part);
    }
  }
}

// The products of rows [row, row + 32) and [column, column + 32).
inline void multiply_rows(const Operands& of, const Block& one, const Block& other, int64_t row, int64_t column,
                          float* out) {
  const int64_t row_tile = (row - one.first) / 16 * of.chunks, column_tile = (column - other.first) / 16 * of.chunks;
  const Side left{of.left.tile(row_tile), of.chunks * kTile, kTile, of.left.next_part};
  const Side right{of.right.tile(column_tile), of.chunks * kTile, kTile, of.right.next_part};
  (of.parts == 1 ? multiply_tiles<1, 1> : multiply_tiles<kParts, kParts>)(left, right, of.chunks, false, out, 32);
}

// As over_tiles.
template <class Step>
CLUSTOPS_INLINE inline void over_products(const Rows<float>& rows, const Block& one, const Block& other,
                                          const Operands& of, const Step& step) {
  pack_scores(rows, one, other, of);
  asm volatile("" ::: "memory");  // tile loads are opaque to the compiler
  const bool same = one.first == other.first;
  for (int64_t column = other.first; column < other.end; column += 32) {
    for (int64_t square = one.first; square < one.end && !(same && square > column); square += 32) {
      alignas(64) float numbers[32 * 32];
      multiply_rows(of, one, other, square, column, numbers);
      asm volatile("" ::: "memory");
      for (int64_t row = square; row < square + 32; row += kGroup) {
        Tile<float> tile;
#pragma GCC unroll 8
        for (int i = 0; i < kGroup; ++i) {
          for (int j = 0; j < 2; ++j) tile[i][j] = Vec::load(numbers + (row - square + i) * 32 + j * 16);
        }
        take_out<float>(one, other, row, column, tile);
        step(row, column, tile, other.anchors && !(same && square == column));
      }
    }
  }
}

// result += G z for the rows of one block, and G' z for those of the other.
inline void add_products(const Rows<float>& rows, const Block& one, const Block& other, const Operands& of,
                         const float* weights, int64_t stride, float* result) {
  const bool same = one.first == other.first;
  const int64_t down = (one.end - one.first) / 32, across = (other.end - other.first) / 32;
  constexpr int64_t kSquares = Operands::kSquares;
  pack_sums(rows, other, of.parts, of.theirs);
  if (!same && other.anchors) pack_sums(rows, one, of.parts, of.ours);
  for (int64_t r = 0; r < down; ++r) {
    for (int64_t c = same ? r : 0; c < across; ++c) {
      const float* square = weights + r * 32 * stride + c * 32;
      alignas(64) float turned[32 * 32];
      for (int i = 0; i < 4; ++i) {
        transpose_16(square + i / 2 * 16 * stride + i % 2 * 16, stride, turned + i % 2 * 16 * 32 + i / 2 * 16, 32);
      }
      for (int i = 0; i < 2; ++i) {
        pack_left(square + i * 16 * stride, stride, kParts, of.weights.tile((2 * r + i) * kSquares + c),
                  of.weights.next_part);
        pack_left(turned + i * 16 * 32, 32, kParts, of.turned.tile((2 * c + i) * kSquares + r), of.turned.next_part);
      }
    }
  }
  asm volatile("" ::: "memory");
  const auto add = [&](const Operand& g, int64_t square, int64_t begin, int64_t end, const Operand& z, int64_t slot) {
    for (int64_t c = 0; c < rows.chunks && begin < end; ++c) {
      const Side left{g.tile(2 * square * kSquares + begin), kSquares * kTile, kTile, g.next_part};
      const Side right{z.tile((begin * rows.chunks + c) * 2), kTile, 2 * rows.chunks * kTile, z.next_part};
      const auto multiply = of.parts == 1 ? multiply_tiles<kParts, 1> : multiply_tiles<kParts, kParts>;
      multiply(left, right, end - begin, true, result + (rows.chunk(c, slot) - rows.z.data()), 32);
    }
  };
  for (int64_t r = 0; r < down; ++r) add(of.weights, r, same ? r : 0, across, of.theirs, one.first + 32 * r);
  for (int64_t c = 0; c < across && other.anchors; ++c) {
    add(of.turned, c, 0, same ? c : down, same ? of.theirs : of.ours, other.first + 32 * c);
  }
  asm volatile("" ::: "memory");
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA

#endif
