// Pairs of rows, a block against a block. Scores are symmetric: each pair of blocks of anchors is visited once, for the
// rows of both.
#pragma once

#include "contrastive_rows.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

template <class T>
using Tile = Vector<T>[kGroup][2];

// Slots [first, end) of which those below `rows` hold one.
struct Block {
  int64_t first, end, rows;
  bool anchors;

  // Rows beyond are not even computed.
  int64_t computed() const { return std::min(end, first + divide_up(rows - first, kGroup) * kGroup); }
};

// Rows of a block: the numbers of two blocks and their products stay in the second cache.
constexpr int64_t kMaxBlock = 256;

struct Blocks {
  std::vector<Block> all;
  int64_t anchors = 0;  // so many come first

  Blocks(const Slots& slots, int64_t size) {
    add(slots, 0, slots.anchor_slots, size);
    anchors = static_cast<int64_t>(all.size());
    add(slots, slots.anchor_slots, slots.slots, size);
  }

 private:
  void add(const Slots& slots, int64_t first, int64_t end, int64_t size) {
    for (int64_t i = first; i < end; i += size) {
      const int64_t last = std::min(end, i + size);
      all.push_back({i, last, std::min(last, slots.end_of_rows(i)), first < slots.anchor_slots});
    }
  }
};

// work(block, block, thread) for each pair of blocks one of which has anchors, that one first. Pairs that run at once
// have no block of anchors in common, and the order in which a block meets others is always the same.
template <class Work>
void over_pairs(const Blocks& blocks, int threads, const Work& work) {
  const int64_t n = blocks.anchors;
  for (int64_t round = 0; round < n; ++round) {
    parallel_for(n, threads, [&](int64_t i, int thread) {
      const int64_t j = (round - i + n) % n;
      if (i <= j) work(blocks.all[i], blocks.all[j], thread);
    });
  }
  parallel_for(n, threads, [&](int64_t i, int thread) {
    for (std::size_t j = n; j < blocks.all.size(); ++j) work(blocks.all[i], blocks.all[j], thread);
  });
}

// tile += a b, where b has kSide columns; rows of a are kRow numbers apart, its columns kStep.
template <int64_t kRow, int64_t kStep, class T>
CLUSTOPS_INLINE inline void multiply(const T* a, const T* b, int64_t steps, Tile<T>& tile) {
  using V = Vector<T>;
  for (int64_t k = 0; k < steps; ++k, a += kStep, b += kSide<T>) {
    const V left = V::load(b), right = V::load(b + V::kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      const V factor = V::set1(a[i * kRow]);
      tile[i][0] = fma(factor, left, tile[i][0]);
      tile[i][1] = fma(factor, right, tile[i][1]);
    }
  }
}

// Takes pairs out of a tile, by -inf: those of a row with itself, and of slots that hold no row.
template <class T>
CLUSTOPS_INLINE inline void take_out(const Block& one, const Block& other, int64_t row, int64_t column,
                                     Tile<T>& tile) {
  const bool diagonal = one.first == other.first && row >= column;
  if (!diagonal && row + kGroup <= one.rows && column + kSide<T> <= other.rows) return;
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  T numbers[kGroup][kSide<T>];
  for (int i = 0; i < kGroup; ++i) {
    for (int j = 0; j < 2; ++j) store(tile[i][j], numbers[i] + j * Vector<T>::kWidth);
    const int64_t kept = row + i < one.rows ? std::clamp<int64_t>(other.rows - column, 0, kSide<T>) : 0;
    std::fill(numbers[i] + kept, numbers[i] + kSide<T>, kNone);
    if (diagonal) numbers[i][row + i - column] = kNone;
    for (int j = 0; j < 2; ++j) tile[i][j] = Vector<T>::load(numbers[i] + j * Vector<T>::kWidth);
  }
}

// step(row, column, tile, both) for products of rows, kGroup rows and kSide columns at a time; -inf where there is no
// pair. Of a block with itself tiles below the diagonal are left out. `both`: the columns are to hear of it as well.
// `panel` is room for kSide rows, transposed.
template <class T, class Step>
CLUSTOPS_INLINE inline void over_tiles(const Rows<T>& rows, const Block& one, const Block& other, T* panel,
                                       const Step& step) {
  constexpr int64_t kSquare = kSide<T> * kSide<T>;
  for (int64_t column = other.first; column < other.end; column += kSide<T>) {
    for (int64_t c = 0; c < rows.chunks; ++c) transpose(rows.chunk(c, column), panel + c * kSquare);
    const bool same = one.first == other.first;
    const int64_t end = same ? std::min(one.computed(), column + kSide<T>) : one.computed();
    for (int64_t row = one.first; row < end; row += kGroup) {
      Tile<T> tile;
      for (int i = 0; i < kGroup; ++i) tile[i][0] = tile[i][1] = Vector<T>::set1(0);
      for (int64_t c = 0; c < rows.chunks; ++c) {
        multiply<kSide<T>, 1>(rows.chunk(c, row), panel + c * kSquare, kSide<T>, tile);
      }
      take_out<T>(one, other, row, column, tile);
      step(row, column, tile, other.anchors && !(same && row >= column));
    }
  }
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
