// Vectors as the bf16 operands of AMX tiles: shifted, leading directions taken out, rounded, transposed; and how much
// the rounding left out.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <limits>

#include "kmeans_direct.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int kSide = 16;                    // rows and columns of a tile
constexpr int kStep = 32;                    // features of one tile product
constexpr int kTile = kSide * kSide;         // floats, or pairs of bf16
constexpr int kDirections = 4;
constexpr int64_t kColumns = 3 * kDirections;  // that they add: high x high, low x high, high x low
constexpr int64_t kChunk = 64;               // groups of 16 centroids whose scores are kept at a time
constexpr int64_t kPackedBytes = 32 << 10;   // of a block of rows, so that it stays in the level 1 cache
constexpr int64_t kMaxBlocks = 8;            // tiles of rows in a block
constexpr int64_t kSample = 256;             // centroids from which directions are found

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kTooLarge = 0x1p120f;        // for a square: sums of products might overflow

// Relative rounding of a sum of n fp32 terms, whatever their order and the direction of rounding.
float rounding(int64_t n) { return static_cast<float>(n) * 0x1p-23f; }

// At least sqrt(sum), where rounding and underflow may have cost the sum of n squares something.
__m512 root_above(__m512 sum, int64_t n) {
  const __m512 more = _mm512_fmadd_ps(sum, _mm512_set1_ps(1 + rounding(n)), _mm512_set1_ps(static_cast<float>(n) * 0x1p-126f));
  return _mm512_set1_ps(1.000001f) * _mm512_sqrt_ps(more);
}

// The sums of the lanes of 16 vectors, each the bits of its reduce_add: halves are added, then halves of these.
inline __m512 sum_lanes(const __m512 (&v)[16]) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44) + _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd);
  }
  for (int i = 0; i < 2; ++i) {
    c[i] = _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44) + _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee);
  }
  const __m512 sums = _mm512_shuffle_ps(c[0], c[1], 0x88) + _mm512_shuffle_ps(c[0], c[1], 0xdd);
  // Lane 4 p + q of `sums` belongs to vector 4 q + p.
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums);
}

// Where things lie in the workspace, in floats: for each problem the mean and the packed centroids, then for each
// thread what a block of rows needs.
struct Layout {
  int64_t groups, steps, padded, kept;                          // kept: groups of a chunk
  int64_t directions, used, bounds, half_norms, tiles, problem;  // the mean comes first
  int64_t blocks;                                               // tiles of rows in a block
  int64_t rounded, scores, low, wide;                           // packed rows come first

  Layout(int64_t clusters, int64_t features)
      : groups(2 * divide_up(clusters, 2 * kSide)),
        steps(divide_up(features + kColumns, kStep)),
        padded(steps * kStep),
        kept(std::min(groups, kChunk)),
        directions(padded),
        used(directions + kDirections * padded),
        bounds(used + kSide),
        half_norms(bounds + divide_up(groups * 4, kSide) * kSide),
        tiles(half_norms + groups * kTile),
        problem(tiles + groups * steps * kTile),
        blocks(std::clamp<int64_t>(kPackedBytes / (steps * kTile * 8), 1, kMaxBlocks / 2) * 2),
        rounded(blocks * steps * kTile),
        scores(rounded + steps * kTile),
        low(scores + blocks * kept * kTile),
        wide(low + blocks * kept * kSide) {}

  int64_t rows() const { return blocks * kSide; }
  int64_t thread(int64_t features, DType dtype) const {
    return std::max(wide + (is_half(dtype) ? divide_up(rows() * features, kSide) * kSide : 0), (kSample + 1) * padded);
  }
};

// 32 numbers of fp32 as bf16, in order.
inline __m512i to_bf16(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

inline __m512 of_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// x - mean for 16 features from d on.
inline __m512 shifted(const float* x, const float* mean, int64_t d) {
  return _mm512_loadu_ps(x + d) - _mm512_loadu_ps(mean + d);
}

inline __m512 shifted(const double* x, const float* mean, int64_t d) {
  const auto half = [&](int64_t at) {
    return _mm512_cvtpd_ps(_mm512_loadu_pd(x + at) - _mm512_cvtps_pd(_mm256_loadu_ps(mean + at)));
  };
  return _mm512_insertf32x8(_mm512_castps256_ps512(half(d)), half(d + 8), 1);
}

// Likewise, zero past the last.
inline __m512 shifted(const float* x, const float* mean, int64_t d, int64_t features) {
  const __mmask16 inside = d + 16 <= features ? 0xffff : d < features ? Vec::first_lanes(features - d) : 0;
  return _mm512_maskz_sub_ps(inside, _mm512_maskz_loadu_ps(inside, x + d), _mm512_loadu_ps(mean + d));
}

inline __m512 shifted(const double* x, const float* mean, int64_t d, int64_t features) {
  const auto half = [&](int64_t at) {
    const __mmask8 inside = at + 8 <= features ? 0xff : at < features ? (1u << (features - at)) - 1 : 0;
    return _mm512_cvtpd_ps(_mm512_maskz_sub_pd(inside, _mm512_maskz_loadu_pd(inside, x + at),
                                               _mm512_cvtps_pd(_mm256_loadu_ps(mean + at))));
  };
  return _mm512_insertf32x8(_mm512_castps256_ps512(half(d)), half(d + 8), 1);
}

// By what all vectors of a problem are shifted, and the directions taken out of them, if any.
struct Frame {
  const float* mean;        // [padded], as each direction
  const float* directions;  // [kDirections, padded] orthonormal
  bool used;
  int64_t features, steps, padded;

  Frame(const Layout& layout, const float* base, int64_t features)
      : mean(base),
        directions(base + layout.directions),
        used(base[layout.used] != 0),
        features(features),
        steps(used ? layout.steps : std::max<int64_t>(divide_up(features, kStep), 1)),
        padded(layout.padded) {}

  // What the identity x.c = coefficients.coefficients + rest.rest may be off by, relative to |x| |c|: two bf16 parts of
  // a coefficient, and directions that are orthogonal, and to the rests, but for fp32 rounding.
  float slack() const { return used ? 0x1p-16f + rounding(2 * (features / 16) + 80) : 0.0f; }
};

// The coefficients as bf16 in the columns behind the features: high, low, high, or for centroids high, high, low.
inline void add_coefficients(const float (&coefficients)[kDirections], int64_t features, bool centroid, uint16_t* out,
                             int64_t stride) {
  for (int i = 0; i < kDirections; ++i) {
    const __m512 value = _mm512_set1_ps(coefficients[i]);
    const __m512i high = to_bf16(value, value);
    const __m512i low = to_bf16(value - of_bf16(_mm512_castsi512_si256(high)), value);
    const uint16_t parts[2] = {static_cast<uint16_t>(_mm512_cvtsi512_si32(high)),
                               static_cast<uint16_t>(_mm512_cvtsi512_si32(low))};
    const int order[2][3] = {{0, 1, 0}, {0, 0, 1}};
    for (int j = 0; j < 3; ++j) {
      const int64_t column = features + j * kDirections + i;
      out[column / kStep * stride + column % kStep] = parts[order[centroid][j]];
    }
  }
}

// Of 16 vectors, lane by lane until they are summed up.
struct Squares {
  __m512 all[kSide], rest[kSide], residual[kSide];
};

struct Norms {
  __m512 square;    // |x|^2
  __m512 norm;      // at least |x|
  __m512 rest;      // at least |r|, what is left of x without the directions,
  __m512 residual;  // and |r - r'|

  Norms(const Squares& of, int64_t features)
      : square(sum_lanes(of.all)),
        norm(root_above(square, features)),
        rest(root_above(sum_lanes(of.rest), features)),
        residual(root_above(sum_lanes(of.residual), features)) {}
};

// x - mean, row r or centroid r of 16, rounded to [steps, 32] bf16, `stride` elements between steps.
template <class T>
void round_vector(const T* x, const Frame& frame, bool centroid, uint16_t* out, int64_t stride, int r, Squares& squares) {
  const __m512 sign = _mm512_castsi512_ps(_mm512_set1_epi32(centroid ? INT32_MIN : 0));
  const auto load = [&](int64_t d, bool whole) {
    return _mm512_xor_ps(whole ? shifted(x, frame.mean, d) : shifted(x, frame.mean, d, frame.features), sign);
  };
  __m512 square = _mm512_setzero_ps(), rest = square, residual = square;
  __m512 coefficient[kDirections];
  alignas(16) float coefficients[kDirections];
  if (frame.used) {
    std::fill_n(coefficient, kDirections, square);
    for (int64_t d = 0; d < frame.features; d += 16) {
      const __m512 y = load(d, d + 16 <= frame.features);
      square = _mm512_fmadd_ps(y, y, square);
#pragma GCC unroll 4
      for (int i = 0; i < kDirections; ++i) {
        coefficient[i] = _mm512_fmadd_ps(y, _mm512_loadu_ps(frame.directions + i * frame.padded + d), coefficient[i]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kDirections; ++i) {
      coefficients[i] = _mm512_reduce_add_ps(coefficient[i]);
      coefficient[i] = _mm512_set1_ps(coefficients[i]);
    }
  }
  const auto round = [&](int64_t s, bool whole, bool used) __attribute__((always_inline)) {
    __m512 y[2] = {load(s * kStep, whole), load(s * kStep + 16, whole)};
    if (used) {
#pragma GCC unroll 4
      for (int i = 0; i < kDirections; ++i) {
        const float* direction = frame.directions + i * frame.padded + s * kStep;
        y[0] = _mm512_fnmadd_ps(coefficient[i], _mm512_loadu_ps(direction), y[0]);
        y[1] = _mm512_fnmadd_ps(coefficient[i], _mm512_loadu_ps(direction + 16), y[1]);
      }
    }
    const __m512i rounded = to_bf16(y[0], y[1]);
    const __m512 left[2] = {y[0] - of_bf16(_mm512_castsi512_si256(rounded)),
                            y[1] - of_bf16(_mm512_extracti64x4_epi64(rounded, 1))};
    for (int i = 0; i < 2; ++i) {
      rest = _mm512_fmadd_ps(y[i], y[i], rest);
      residual = _mm512_fmadd_ps(left[i], left[i], residual);
    }
    _mm512_storeu_si512(out + s * stride, rounded);
  };
  const int64_t whole = frame.features / kStep;
  if (frame.used) {
    for (int64_t s = 0; s < whole; ++s) round(s, true, true);
  } else {
    for (int64_t s = 0; s < whole; ++s) round(s, true, false);
  }
  for (int64_t s = whole; s < frame.steps; ++s) round(s, false, frame.used);
  if (frame.used) add_coefficients(coefficients, frame.features, centroid, out, stride);
  squares.all[r] = frame.used ? square : rest;
  squares.rest[r] = rest;
  squares.residual[r] = residual;
}

// [16, 16] pairs of bf16, transposed.
inline void transpose(const uint16_t* from, int64_t stride, uint16_t* to) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even[2] = {_mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd), _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd)};
    _mm512_storeu_si512(to + (0 + i) * kStep, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
    _mm512_storeu_si512(to + (4 + i) * kStep, _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
    _mm512_storeu_si512(to + (8 + i) * kStep, _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
    _mm512_storeu_si512(to + (12 + i) * kStep, _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
  }
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
