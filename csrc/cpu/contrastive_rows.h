// The rows of the contrastive losses, read once: in the type in which kernels compute, of norm 1 if asked, laid out for
// products of blocks.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "../common/contrastive.h"
#include "../common/pages.h"
#include "../common/parallel.h"
#include "element.h"

#define CLUSTOPS_INLINE __attribute__((always_inline))

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Numbers that wait in registers for a product: kGroup rows by kSide columns, which are two vectors.
template <class T>
constexpr int kSide = 2 * Vector<T>::kWidth;
constexpr int kGroup = Vec::kRegisters == 32 ? 8 : 4;

// Memory for numbers, not initialised.
template <class T>
class Numbers {
 public:
  explicit Numbers(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kLine))) {
    wish_huge_pages(data_.get(), size * static_cast<int64_t>(sizeof(T)));
  }
  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<T, Free> data_;
};

// Which row is where: the anchors come first, then the other rows, each part filled up to whole panels of kSide rows.
struct Slots {
  int64_t first, anchors, rows;  // rows [first, first + anchors) are those of anchors
  int64_t anchor_slots, slots;

  Slots(const ContrastiveRows& a, int64_t side)
      : first(a.first * a.views),
        anchors(a.count * a.views),
        rows(a.samples * a.views),
        anchor_slots(divide_up(anchors, side) * side),
        slots(anchor_slots + divide_up(rows - anchors, side) * side) {}

  int64_t slot_of(int64_t row) const {
    if (row >= first && row < first + anchors) return row - first;
    return anchor_slots + (row < first ? row : row - anchors);
  }
  // -1 where a panel is filled up.
  int64_t row_of(int64_t slot) const {
    if (slot < anchor_slots) return slot < anchors ? first + slot : -1;
    slot -= anchor_slots;
    return slot >= rows - anchors ? -1 : slot < first ? slot : slot + anchors;
  }
  // The end of the rows in the part that slot begins or is in.
  int64_t end_of_rows(int64_t slot) const { return slot < anchor_slots ? anchors : anchor_slots + rows - anchors; }
};

template <class T>
struct Rows {
  Slots slots;
  int64_t width, chunks;  // features, and how many times kSide they are
  Numbers<T> z;           // [chunks, slots, kSide], 0 where there is no row or feature
  Numbers<T> inverse;     // [slots], of the norm, where it is asked for
  double least, greatest;  // norms of the rows as given; the least above 0, or infinity
  bool finite;
  const bool bf16;  // no number has more digits

  Rows(const ContrastiveRows& a, int threads);

  T* chunk(int64_t c, int64_t slot) const { return z.data() + (c * slots.slots + slot) * kSide<T>; }
  // No score is larger, in units of 1 / temperature.
  double bound(bool normalized) const { return normalized ? 1.0 : greatest * greatest; }

 private:
  double read_row(const ContrastiveRows& a, int64_t slot);
};

// x as T in chunks, and the sum of its squares.
template <class S, class T>
double unpack(const S* x, const Rows<T>& rows, int64_t slot) {
  using V = Vector<T>;
  VecD square[2] = {VecD::set1(0), VecD::set1(0)};
  for (int64_t c = 0; c < rows.chunks; ++c) {
    T* out = rows.chunk(c, slot);
    for (int64_t k = 0; k < kSide<T>; k += V::kWidth) {
      const int64_t left = rows.width - c * kSide<T> - k;
      const V value = left >= V::kWidth ? read(x + c * kSide<T> + k)
                      : left > 0        ? read_first(x + c * kSide<T> + k, left)
                                        : V::set1(0);
      store(value, out + k);
    }
    for (int64_t k = 0; k < kSide<T>; k += 2 * VecD::kWidth) {
      for (int i = 0; i < 2; ++i) {
        const VecD wide = load_wide(out + k + i * VecD::kWidth);
        square[i] = fma(wide, wide, square[i]);
      }
    }
  }
  return reduce_add(square[0] + square[1]);
}

template <class T>
bool all_finite(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return false;
  }
  return true;
}

// The norm, negative where a number is not finite.
template <class T>
double Rows<T>::read_row(const ContrastiveRows& a, int64_t slot) {
  const int64_t row = slots.row_of(slot);
  if (row < 0) {
    for (int64_t c = 0; c < chunks; ++c) std::fill_n(chunk(c, slot), kSide<T>, T(0));
    return 0;
  }
  const char* x = static_cast<const char*>(a.features) + row * width * element_size(a.dtype);
  const double square = with_elements<T>(a.dtype, x, [&](auto* p) { return unpack(p, *this, slot); });
  bool good = std::isfinite(square);
  for (int64_t c = 0; c < chunks && !good; ++c) {
    if (!all_finite(chunk(c, slot), kSide<T>)) return -1;
    good = c + 1 == chunks;
  }
  const double norm = std::sqrt(square);
  if (a.normalize) {
    const T exact = static_cast<T>(1 / norm);
    inverse[slot] = std::isinf(exact) ? T(0) : exact;
    const Vector<T> factor = Vector<T>::set1(inverse[slot]);
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t k = 0; k < kSide<T>; k += Vector<T>::kWidth) {
        store(Vector<T>::load(chunk(c, slot) + k) * factor, chunk(c, slot) + k);
      }
    }
  }
  return norm;
}

// A square of kSide by kSide numbers, transposed.
template <class T>
void transpose(const T* from, T* to) {
  for (int64_t k = 0; k < kSide<T>; ++k) {
    for (int64_t r = 0; r < kSide<T>; ++r) to[k * kSide<T> + r] = from[r * kSide<T> + k];
  }
}

#if defined(__AVX512F__)
// 16 by 16 numbers, rows `stride` and `to_stride` apart.
inline void transpose_16(const float* from, int64_t stride, float* to, int64_t to_stride) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i other_register = _mm512_set1_epi32(16);
  __m512 rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_ps(from + i * stride);
  // Of rows i and i + s, lanes whose number has bit s change places with those of which it has not.
#pragma GCC unroll 4
  for (int s = 1; s < 16; s *= 2) {
    const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(s));
    const __m512i partner = _mm512_xor_si512(lane, _mm512_set1_epi32(s));
    const __m512i low = _mm512_mask_add_epi32(lane, odd, partner, other_register);
    const __m512i high = _mm512_mask_add_epi32(partner, odd, lane, other_register);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & s) continue;
      const __m512 one = rows[i], other = rows[i + s];
      rows[i] = _mm512_permutex2var_ps(one, low, other);
      rows[i + s] = _mm512_permutex2var_ps(one, high, other);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * to_stride, rows[i]);
}

inline void transpose(const float* from, float* to) {
  for (int i = 0; i < 4; ++i) transpose_16(from + i / 2 * 512 + i % 2 * 16, 32, to + i % 2 * 512 + i / 2 * 16, 32);
}
#endif

template <class T>
Rows<T>::Rows(const ContrastiveRows& a, int threads)
    : slots(a, kSide<T>),
      width(a.width),
      chunks(divide_up(a.width, kSide<T>)),
      z(slots.slots * chunks * kSide<T>),
      inverse(slots.slots),
      least(std::numeric_limits<double>::infinity()),
      greatest(0),
      finite(true),
      bf16(a.dtype == DType::bf16 && !a.normalize) {
  std::vector<double> norms(slots.slots);
  parallel_for(slots.slots / kSide<T>, threads, [&](int64_t p, int) {
    for (int64_t slot = p * kSide<T>; slot < (p + 1) * kSide<T>; ++slot) norms[slot] = read_row(a, slot);
  });
  for (double norm : norms) {
    if (norm < 0) finite = false;
    if (norm > 0 && norm < least) least = norm;
    if (norm > greatest) greatest = norm;
  }
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
