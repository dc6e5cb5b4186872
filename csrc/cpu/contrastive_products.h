// Products of two blocks, by fused multiply-adds or on AMX tiles.
#pragma once

#include <optional>

#include "contrastive_amx.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Room for the products of two blocks, and the way they are taken.
template <class T>
class Products {
 public:
  Products(const Rows<T>& rows, bool tiles, bool backward) : panel_(rows.chunks * kSide<T> * kSide<T>) {
#if defined(__AMX_BF16__)
    const bool pays = rows.bf16 || rows.slots.slots > kFewRows;
    if (std::is_same_v<T, float> && tiles && pays && rows.chunks <= kMaxChunks) {
      operands_.emplace(rows.chunks, rows.bf16 ? 1 : kParts, backward);
    }
#endif
    static_cast<void>(tiles), static_cast<void>(backward);
  }

  // As over_tiles.
  template <class Step>
  CLUSTOPS_INLINE void over(const Rows<T>& rows, const Block& one, const Block& other, const Step& step) const {
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<T, float>) {
      if (operands_) {
        const Tiles tiles;
        over_products(rows, one, other, *operands_, step);
        return;
      }
    }
#endif
    over_tiles(rows, one, other, panel_.data(), step);
  }

  // result += G z for the rows of one block, and G' z for those of the other; rows of G are kStride apart, which is no
  // power of 2, or columns would share a set of a cache.
  static constexpr int64_t kStride = kMaxBlock + kSide<T>;
  void add(const Rows<T>& rows, const Block& one, const Block& other, const T* weights, T* result) const;

 private:
  // Operands of wider rows do not stay in the second cache; those of few rows in three parts cost what tiles save.
  static constexpr int64_t kMaxChunks = 16, kFewRows = 1024;
  Numbers<T> panel_;
#if defined(__AMX_BF16__)
  std::optional<Operands> operands_;
#endif
};

// out += product of a and b, for kGroup rows of a chunk.
template <int64_t kRow, int64_t kStep, class T>
CLUSTOPS_INLINE inline void add_product(const T* a, const T* b, int64_t steps, T* out) {
  using V = Vector<T>;
  Tile<T> tile;
  for (int i = 0; i < kGroup; ++i) {
    for (int j = 0; j < 2; ++j) tile[i][j] = V::load(out + i * kSide<T> + j * V::kWidth);
  }
  multiply<kRow, kStep>(a, b, steps, tile);
  for (int i = 0; i < kGroup; ++i) {
    for (int j = 0; j < 2; ++j) store(tile[i][j], out + i * kSide<T> + j * V::kWidth);
  }
}

template <class T>
void Products<T>::add(const Rows<T>& rows, const Block& one, const Block& other, const T* weights, T* result) const {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, float>) {
    if (operands_) {
      const Tiles tiles;
      add_products(rows, one, other, *operands_, weights, kStride, result);
      return;
    }
  }
#endif
  const bool same = one.first == other.first;
  for (int64_t c = 0; c < rows.chunks; ++c) {
    T* out = result + c * rows.slots.slots * kSide<T>;
    for (int64_t row = one.first; row < one.computed(); row += kGroup) {
      const int64_t begin = same ? row / kSide<T> * kSide<T> : other.first;
      add_product<kStride, 1>(weights + (row - one.first) * kStride + begin - other.first, rows.chunk(c, begin),
                              other.end - begin, out + row * kSide<T>);
    }
    if (!other.anchors) continue;
    for (int64_t column = other.first; column < other.computed(); column += kGroup) {
      const int64_t end = same ? column / kSide<T> * kSide<T> : one.computed();
      add_product<1, kStride>(weights + column - other.first, rows.chunk(c, one.first), end - one.first,
                              out + column * kSide<T>);
    }
  }
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
