// k-means assignment by bf16 scores on AMX tiles. Labels are exact: what bf16 cannot decide, ||x - c||^2 does.
//
// With everything shifted by the mean centroid, the nearest centroid of a row minimises ||c||^2 / 2 - x.c. A tile holds
// these scores for 16 centroids (its rows) and 16 rows of x (its columns). With x', c' the operands rounded to bf16 a
// score is off by at most
//   e = |x'| |c - c'| + |x - x'| |c| + (rounding of the sums),
// so score - e is a lower bound. Where a few directions carry most of x and c, as in images, their coefficients enter
// the product in two bf16 parts, which leaves x and c in e without them.
//
// A block of rows keeps its scores and the lower bounds of groups of 16 centroids. Then each row takes the distance to
// the centroid with the smallest score, which gives an upper bound, and to all others whose lower bound is not above it.
// Nothing depends on the other rows of a tile.
#include <immintrin.h>

#include <cstring>
#include <limits>

#include "../common/parallel.h"
#include "kmeans_direct.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int kSide = 16;                    // rows and columns of a tile
constexpr int kStep = 32;                    // features of one tile product
constexpr int kTile = kSide * kSide;         // floats, or pairs of bf16
constexpr int64_t kChunk = 64;               // groups of 16 centroids whose scores are kept at a time
constexpr int64_t kPackedBytes = 32 << 10;   // of a block of rows, so that it stays in the level 1 cache
constexpr int64_t kMaxBlocks = 8;            // tiles of rows in a block
constexpr int64_t kUnit = 512;               // rows of one unit of parallel work

constexpr int kDirections = 4;
constexpr int64_t kColumns = 3 * kDirections;  // that they add: high x high, low x high, high x low
constexpr int64_t kSample = 256;             // centroids from which directions are found
constexpr int kRounds = 3;                   // of the power iteration for each

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

// x - mean for 16 features from d on, zero past the last.
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
  const auto load = [&](int64_t d) { return _mm512_xor_ps(shifted(x, frame.mean, d, frame.features), sign); };
  __m512 square = _mm512_setzero_ps(), rest = square, residual = square;
  __m512 coefficient[kDirections];
  alignas(16) float coefficients[kDirections];
  if (frame.used) {
    std::fill_n(coefficient, kDirections, square);
    for (int64_t d = 0; d < frame.features; d += 16) {
      const __m512 y = load(d);
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
  for (int64_t s = 0; s < frame.steps; ++s) {
    __m512 y[2] = {load(s * kStep), load(s * kStep + 16)};
    if (frame.used) {
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
  }
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

// Makes direction m of `directions` orthogonal to those before it and of length 1, to the last bits of fp32.
inline bool orthonormal(float* directions, int m, int64_t padded) {
  float* u = directions + m * padded;
  const auto dot = [&](const float* v) {
    double sum = 0;
    for (int64_t d = 0; d < padded; ++d) sum += static_cast<double>(u[d]) * v[d];
    return sum;
  };
  for (int again = 0; again < 2; ++again) {
    double overlap[kDirections];
    const double scale = 1 / std::sqrt(dot(u));
    if (!std::isfinite(scale)) return false;
    for (int i = 0; i < m; ++i) overlap[i] = scale * dot(directions + i * padded);
    for (int64_t d = 0; d < padded; ++d) {
      double value = scale * u[d];
      for (int i = 0; i < m; ++i) value -= overlap[i] * directions[i * padded + d];
      u[d] = static_cast<float>(value);
    }
  }
  for (int i = 0; i <= m; ++i) {
    if (!(std::abs(dot(directions + i * padded) - (i == m)) < 0x1p-22)) return false;
  }
  return true;
}

// The directions that carry most of (up to kSample of) the centroids, by power iteration on what is left of them in
// `left` [kSample, padded], and whether they are worth taking out: whether they carry more than half.
template <class T>
void find_directions(const KMeansAssign& a, const Layout& layout, int64_t b, float* base, float* left) {
  const int64_t count = std::min(a.clusters, kSample), padded = layout.padded;
  const auto dot = [&](const float* u, const float* v) {
    Vec sum = Vec::set1(0.0f);
    for (int64_t d = 0; d < padded; d += 16) sum = fma(Vec::load(u + d), Vec::load(v + d), sum);
    return reduce_add(sum);
  };
  const auto add = [&](float factor, const float* u, float* v) {
    for (int64_t d = 0; d < padded; d += 16) fma(Vec::set1(factor), Vec::load(u + d), Vec::load(v + d)).store(v + d);
  };
  double energy[kDirections + 1] = {}, taken = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T* c = a.centroid<T>(b, i * a.clusters / count);
    for (int64_t d = 0; d < padded; d += 16) Vec{shifted(c, base, d, a.features)}.store(left + i * padded + d);
  }
  base[layout.used] = 0;
  for (int m = 0; m <= kDirections; ++m) {
    const float* longest = left;
    float most = -1;
    for (int64_t i = 0; i < count; ++i) {
      const float square = dot(left + i * padded, left + i * padded);
      energy[m] += square;
      if (square > most) most = square, longest = left + i * padded;
    }
    if (m == kDirections || !(most > 0x1p-80f) || !(energy[m] < 0x1p80)) break;
    float* direction = base + layout.directions + m * padded;
    std::copy(longest, longest + padded, direction);
    for (int round = 0; round < kRounds; ++round) {
      float* sum = left + count * padded;
      std::fill(sum, sum + padded, 0.0f);
      const float scale = 1 / std::sqrt(dot(direction, direction));
      for (int64_t i = 0; i < count; ++i) add(scale * dot(left + i * padded, direction), left + i * padded, sum);
      std::copy(sum, sum + padded, direction);
    }
    if (!orthonormal(base + layout.directions, m, padded)) break;
    double carried = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float coefficient = dot(left + i * padded, direction);
      carried += static_cast<double>(coefficient) * coefficient;
      add(-coefficient, direction, left + i * padded);
    }
    taken += carried;
    if (taken + (kDirections - 1 - m) * carried < 0.5 * energy[0]) break;  // the others carry no more than this one
    if (m + 1 == kDirections) base[layout.used] = 1;
  }
  if (!(energy[kDirections] < 0.5 * energy[0])) base[layout.used] = 0;
}

// 16 centroids: negated bf16 [steps, 16, 32], half norms each repeated over a tile's row, and four numbers b with
// e <= |r'| b0 + |r - r'| b1 + |x| b2 + b3 for all of them.
template <class T>
void pack_group(const KMeansAssign& a, const Layout& layout, int64_t b, int64_t g, float* base) {
  const Frame frame(layout, base, a.features);
  uint16_t* tiles = reinterpret_cast<uint16_t*>(base + layout.tiles + g * layout.steps * kTile);
  float* half_norms = base + layout.half_norms + g * kTile;
  const float sums = rounding(layout.padded + 4);
  Squares squares{};
  std::memset(tiles, 0, layout.steps * kTile * sizeof(float));
  const int count = static_cast<int>(std::clamp<int64_t>(a.clusters - g * kSide, 0, kSide));
  for (int j = 0; j < count; ++j) {
    round_vector(a.centroid<T>(b, g * kSide + j), frame, true, tiles + j * kStep, 2 * kTile, j, squares);
  }
  const Norms norms(squares, a.features);
  float square[kSide];
  _mm512_storeu_ps(square, norms.square);
  for (int j = 0; j < kSide; ++j) {
    std::fill_n(half_norms + j * kSide, kSide, j < count ? 0.5f * square[j] : kInfinity);  // padding never wins
  }
  const float largest = _mm512_reduce_max_ps(norms.norm), half_square = 0.5f * _mm512_reduce_max_ps(norms.square);
  float bound[4] = {_mm512_reduce_max_ps(norms.residual), _mm512_reduce_max_ps(norms.rest),
                    (2 * sums + frame.slack()) * largest,
                    half_square < kTooLarge ? 2 * sums * half_square : kInfinity};
  // A product below the smallest normal number counts as zero.
  bound[3] += static_cast<float>(layout.padded) * 0x1p-125f;
  for (int i = 0; i < 4; ++i) base[layout.bounds + 4 * g + i] = 1.0001f * bound[i];
}

// What is known of 16 rows.
template <class T>
struct alignas(64) State {
  float square[kSide];    // |x|^2
  float norm[kSide];      // at least |x|
  float rest[kSide];      // at least |r'|
  float residual[kSide];  // at least |r - r'|
  float upper[kSide];     // the score of the nearest centroid so far is not above this
  float best[kSide];      // smallest lower bound of this chunk,
  int32_t group[kSide];   // and where it is
  Nearest<T> nearest[kSide];
};

// `count` rows from row i on, as [steps, 16 pairs, 16 rows] pairs of bf16; missing rows are zero and want nothing.
template <class T>
void pack_rows(const Rows<T>& rows, int64_t i, int64_t count, const KMeansAssign& a, const Frame& frame,
               uint16_t* rounded, uint16_t* packed, State<T>& state) {
  Squares squares{};
  for (int r = 0; r < kSide; ++r) {
    uint16_t* out = rounded + r * frame.padded;
    if (r < count) {
      round_vector(rows[i + r], frame, false, out, kStep, r, squares);
    } else {
      std::memset(out, 0, frame.padded * sizeof *out);
    }
    state.nearest[r] = {a.clusters, std::numeric_limits<T>::infinity()};
  }
  const Norms norms(squares, a.features);
  const __mmask16 usable = _mm512_cmp_ps_mask(norms.square, _mm512_set1_ps(kTooLarge), _CMP_LT_OQ) & ((1u << count) - 1);
  _mm512_store_ps(state.square, norms.square);
  _mm512_store_ps(state.norm, norms.norm);
  _mm512_store_ps(state.rest, norms.rest + norms.residual);
  _mm512_store_ps(state.residual, norms.residual);
  _mm512_store_ps(state.upper, _mm512_mask_blend_ps(usable, _mm512_set1_ps(-kInfinity), _mm512_set1_ps(kInfinity)));
  for (int64_t s = 0; s < frame.steps; ++s) transpose(rounded + s * kStep, frame.padded, packed + s * 2 * kTile);
}

// Scores of two groups of centroids and two blocks of rows: half norms plus the products of `steps` tiles; `next`
// elements lie between groups, and between blocks; the scores of the second block lie `next_scores` further.
inline void score(const uint16_t* centroids, const float* half_norms, const uint16_t* rows, int64_t next, int64_t steps,
                  float* scores, int64_t next_scores) {
  _tile_loadd(0, half_norms, 64);
  _tile_loadd(1, half_norms, 64);
  _tile_loadd(2, half_norms + kTile, 64);
  _tile_loadd(3, half_norms + kTile, 64);
  const auto load_operands = [&] {
    _tile_loadd(4, centroids, 64);
    _tile_loadd(6, rows, 64);
    _tile_loadd(7, rows + next, 64);
    _tile_loadd(5, centroids + next, 64);
  };
  for (int64_t s = 1; s < steps; ++s, centroids += 2 * kTile, rows += 2 * kTile) {
    load_operands();
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  load_operands();
  _tile_dpbf16ps(0, 4, 6);
  _tile_stored(0, scores, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stored(1, scores + next_scores, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_stored(2, scores + kTile, 64);
  _tile_dpbf16ps(3, 5, 7);
  _tile_stored(3, scores + next_scores + kTile, 64);
}

// Keeps the lowest bound of one tile for each of its rows.
template <class T>
inline void keep(const float* scores, const float* bound, int64_t g, float* low, State<T>& state) {
  const __m512 e = _mm512_fmadd_ps(
      _mm512_load_ps(state.rest), _mm512_set1_ps(bound[0]),
      _mm512_fmadd_ps(_mm512_load_ps(state.residual), _mm512_set1_ps(bound[1]),
                      _mm512_fmadd_ps(_mm512_load_ps(state.norm), _mm512_set1_ps(bound[2]), _mm512_set1_ps(bound[3]))));
  __m512 least[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* s = scores + i * 4 * kSide;
    least[i] = _mm512_min_ps(_mm512_min_ps(_mm512_load_ps(s), _mm512_load_ps(s + kSide)),
                             _mm512_min_ps(_mm512_load_ps(s + 2 * kSide), _mm512_load_ps(s + 3 * kSide)));
  }
  const __m512 lowest = _mm512_min_ps(_mm512_min_ps(least[0], least[1]), _mm512_min_ps(least[2], least[3])) - e;
  _mm512_store_ps(low, lowest);
  const __mmask16 better = _mm512_cmp_ps_mask(lowest, _mm512_load_ps(state.best), _CMP_LT_OQ);
  _mm512_mask_store_ps(state.best, better, lowest);
  _mm512_mask_store_epi32(state.group, better, _mm512_set1_epi32(static_cast<int32_t>(g)));
}

// A block of rows against all centroids.
template <class T>
class Block {
 public:
  Block(const KMeansAssign& a, const Layout& layout, int64_t b, float* scratch)
      : a_(a), layout_(layout), b_(b), base_(a.workspace + b * layout.problem), scratch_(scratch), frame_(layout, base_, a.features) {}

  // Rows [first, first + count); up to `end` others follow.
  void assign(int64_t first, int64_t count, int64_t end) {
    ahead_ = first + count;
    ahead_end_ = std::min(ahead_ + layout_.rows(), end);
    ahead_step_ = divide_up(4 * layout_.rows(), layout_.groups * layout_.blocks);
    rows_ = rows_of<T>(a_, b_, first, count, scratch_ + layout_.wide);
    const int64_t blocks = 2 * divide_up(count, 2 * kSide);
    for (int64_t s = 0; s < blocks; ++s) {
      pack_rows(rows_, s * kSide, std::clamp<int64_t>(count - s * kSide, 0, kSide), a_, frame_,
                reinterpret_cast<uint16_t*>(scratch_ + layout_.rounded), packed(s), state_[s]);
    }
    asm volatile("" ::: "memory");  // tile loads are opaque to the compiler
    for (int64_t g0 = 0; g0 < layout_.groups; g0 += layout_.kept) {
      const int64_t groups = std::min(layout_.kept, layout_.groups - g0);
      for (int64_t s = 0; s < blocks; ++s) std::fill_n(state_[s].best, kSide, kInfinity), std::fill_n(state_[s].group, kSide, 0);
      score_groups(g0, groups, blocks);
      for (int64_t s = 0; s < blocks; ++s) decide(s, g0, groups);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Nearest<T>& nearest = state_[i / kSide].nearest[i % kSide];
      put(a_, b_, first + i, nearest.label < a_.clusters ? nearest : nearest_of_all(a_, b_, rows_[i]));
    }
  }

 private:
  uint16_t* packed(int64_t s) { return reinterpret_cast<uint16_t*>(scratch_ + s * layout_.steps * kTile); }
  float* scores(int64_t s, int64_t g) { return scratch_ + layout_.scores + (s * layout_.kept + g) * kTile; }
  float* low(int64_t s, int64_t g) { return scratch_ + layout_.low + (s * layout_.kept + g) * kSide; }

  // All scores of some groups. Those of one step are looked through while the tiles of the next are multiplied.
  void score_groups(int64_t g0, int64_t groups, int64_t blocks) {
    int64_t before_g = -1, before_s = 0;
    for (int64_t g = 0; g < groups; g += 2) {
      const float* tiles = base_ + layout_.tiles + (g0 + g) * layout_.steps * kTile;
      for (int64_t s = 0; s < blocks; s += 2) {
        score(reinterpret_cast<const uint16_t*>(tiles), base_ + layout_.half_norms + (g0 + g) * kTile, packed(s),
              layout_.steps * 2 * kTile, frame_.steps, scores(s, g), layout_.kept * kTile);
        if (before_g >= 0) keep_four(g0, before_g, before_s);
        before_g = g, before_s = s;
        fetch_ahead();
      }
    }
    keep_four(g0, before_g, before_s);
  }

  void keep_four(int64_t g0, int64_t g, int64_t s) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t gi = g + i / 2, si = s + i % 2;
      keep(scores(si, gi), base_ + layout_.bounds + 4 * (g0 + gi), gi, low(si, gi), state_[si]);
    }
  }

  // The next block's rows come from memory while this one computes.
  void fetch_ahead() {
    const int64_t until = std::min(ahead_ + ahead_step_, ahead_end_);
    prefetch_rows(a_, b_, ahead_, until);
    ahead_ = until;
  }

  // The scores of row r in one group.
  __m512 scores_of(int64_t s, int r, int64_t g) {
    const __m512i places = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    return _mm512_i32gather_ps(places, scores(s, g) + r, 4);
  }

  // At most so far from the truth are the scores of row r in one group.
  float error(const State<T>& state, int r, int64_t g) {
    const float* bound = base_ + layout_.bounds + 4 * g;
    return state.rest[r] * bound[0] + state.residual[r] * bound[1] + state.norm[r] * bound[2] + bound[3];
  }

  // Those of one group that row r wants, lowest first, but for `seen`.
  void look(State<T>& state, int64_t s, int r, int64_t g, __m512 score, uint32_t seen) {
    const int64_t k = g * kSide;
    const float e = error(state, r, g);
    uint32_t left = (a_.clusters - k >= kSide ? 0xffff : (1u << std::max<int64_t>(a_.clusters - k, 0)) - 1) & ~seen;
    while (left &= _mm512_cmp_ps_mask(score, _mm512_set1_ps(state.upper[r] + e), _CMP_NGT_UQ)) {
      const int j = __builtin_ctz(left);
      left &= left - 1;
      const Nearest<T> found = nearest_of<1>(a_, b_, rows_[s * kSide + r], k + j, 1);
      if (!found.before(state.nearest[r])) continue;
      state.nearest[r] = found;
      state.upper[r] = std::min(state.upper[r], upper_bound(Vec::set1(found.distance).v, Vec::set1(state.square[r]).v)[0]);
    }
  }

  // Above the exact score of a centroid at this distance: rounding of both squares, and of the distances that are
  // compared in the end.
  __m512 upper_bound(__m512 distance, __m512 square) {
    const __m512 slack = _mm512_set1_ps(rounding(a_.features / kSide + 12)) * (distance + square);
    return _mm512_fmadd_ps(_mm512_set1_ps(0.5f), distance - square, slack + _mm512_set1_ps(0x1p-120f));
  }

  // What the groups kept say of 16 rows. For all of them the centroid with the smallest score comes first; then what the
  // distance to it leaves open.
  void decide(int64_t s, int64_t g0, int64_t groups) {
    State<T>& state = state_[s];
    const uint32_t wanted =
        _mm512_cmp_ps_mask(_mm512_load_ps(state.best), _mm512_load_ps(state.upper), _CMP_NGT_UQ);
    if (!wanted) return;
    __m512 score[kSide];
    int place[kSide];
    Nearest<T> found[kSide];
    for (int r = 0; r < kSide; ++r) {
      score[r] = scores_of(s, r, state.group[r]);
      const uint32_t least = _mm512_cmp_ps_mask(score[r], _mm512_set1_ps(_mm512_reduce_min_ps(score[r])), _CMP_EQ_OQ);
      const int64_t k = (g0 + state.group[r]) * kSide;
      place[r] = least ? __builtin_ctz(least) : 0;
      found[r].label = std::min(k + place[r], a_.clusters - 1);
      low(s, state.group[r])[r] = kInfinity;
    }
    measure(s, wanted, found);
    alignas(64) float distances[kSide];
    for (int r = 0; r < kSide; ++r) {
      distances[r] = static_cast<float>(found[r].distance);
      if (wanted >> r & 1 && found[r].before(state.nearest[r])) state.nearest[r] = found[r];
    }
    const __m512 upper = upper_bound(_mm512_load_ps(distances), _mm512_load_ps(state.square));
    const __m512 before = _mm512_load_ps(state.upper);
    _mm512_store_ps(state.upper, _mm512_mask_min_ps(before, wanted, upper, before));

    for (uint32_t rows = wanted; rows; rows &= rows - 1) {
      const int r = __builtin_ctz(rows);
      look(state, s, r, g0 + state.group[r], score[r], 1u << place[r]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      uint32_t rows = _mm512_cmp_ps_mask(_mm512_load_ps(low(s, g)), _mm512_load_ps(state.upper), _CMP_NGT_UQ);
      for (; rows; rows &= rows - 1) {
        const int r = __builtin_ctz(rows);
        look(state, s, r, g0 + g, scores_of(s, r, g), 0);
      }
    }
  }

  // Distances to the labels found, of the rows wanted.
  void measure(int64_t s, uint32_t wanted, Nearest<T> (&found)[kSide]) {
    __m512 lanes[kSide];
    for (int r = 0; r < kSide; ++r) {
      lanes[r] = _mm512_setzero_ps();
      if (!(wanted >> r & 1)) continue;
      const T* const centroid[1] = {a_.centroid<T>(b_, found[r].label)};
      typename VecFor<T>::type sum[1];
      square_lanes(rows_[s * kSide + r], centroid, a_.features, sum);
      if constexpr (sizeof(T) == sizeof(float)) {
        lanes[r] = sum[0].v;
      } else {
        found[r].distance = reduce_add(sum[0]);
      }
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      const __m512 distance = sum_lanes(lanes);
      for (int r = 0; r < kSide; ++r) found[r].distance = distance[r];
    }
  }

  const KMeansAssign& a_;
  const Layout& layout_;
  const int64_t b_;
  float* const base_;
  float* const scratch_;
  const Frame frame_;
  Rows<T> rows_{};
  int64_t ahead_ = 0, ahead_end_ = 0, ahead_step_ = 0;  // rows to prefetch
  State<T> state_[kMaxBlocks];
};

struct Tiles {  // each with 16 rows of 64 bytes, for the life of this
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

template <class T>
void assign(const KMeansAssign& a, int threads) {
  const Layout layout(a.clusters, a.features);
  const auto base = [&](int64_t b) { return a.workspace + b * layout.problem; };
  float* scratch = a.workspace + a.problems * layout.problem;
  const int64_t columns = divide_up(layout.padded, kMeanColumns);
  parallel_for(a.problems * columns, threads, [&](int64_t i, int) {
    float* mean = base(i / columns);
    const int64_t first = i % columns * kMeanColumns;
    std::fill(mean + first, mean + std::min(first + kMeanColumns, layout.padded), 0.0f);
    if (first < a.features) mean_of_columns<T>(a, i / columns, first, mean);
  });
  parallel_for(a.problems, threads, [&](int64_t b, int thread) {
    find_directions<T>(a, layout, b, base(b), scratch + thread * layout.thread(a.features, a.dtype));
  });
  parallel_for(a.problems * layout.groups, threads, [&](int64_t i, int) {
    pack_group<T>(a, layout, i / layout.groups, i % layout.groups, base(i / layout.groups));
  });
  const int64_t units = divide_up(a.rows, kUnit);
  parallel_for(a.problems * units, threads, [&](int64_t i, int thread) {
    const Tiles tiles;
    const int64_t b = i / units, end = std::min(a.rows, (i % units + 1) * kUnit);
    Block<T> block(a, layout, b, scratch + thread * layout.thread(a.features, a.dtype));
    for (int64_t first = i % units * kUnit; first < end; first += layout.rows()) {
      block.assign(first, std::min(layout.rows(), end - first), end);
    }
  });
}

}  // namespace

int64_t kmeans_assign_workspace(int64_t problems, int64_t clusters, int64_t features, DType dtype, int threads) {
  const Layout layout(clusters, features);
  return problems * layout.problem + threads * layout.thread(features, dtype);
}

void kmeans_assign(const KMeansAssign& a, int threads) {
  a.dtype == DType::f64 ? assign<double>(a, threads) : assign<float>(a, threads);
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
