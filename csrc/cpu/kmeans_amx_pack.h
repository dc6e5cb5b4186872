// What is packed for the scores on AMX tiles: directions that carry most of the centroids, groups of 16 centroids, and
// blocks of 16 rows, each with the numbers that bound the error of a score.
#pragma once

#include "kmeans_amx_round.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int kRounds = 3;                   // of the power iteration for each

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
  uint32_t usable;        // rows whose scores mean something: not those past the end, nor with overflows or a NaN
};

// `count` rows from row i on, as [steps, 16 pairs, 16 rows] pairs of bf16; missing rows are zero and want nothing.
template <class T>
void pack_rows(const Rows<T>& rows, int64_t i, int64_t count, const KMeansAssign& a, const Frame& frame,
               uint16_t* rounded, uint16_t* packed, State<T>& state) {
  Squares squares;
  for (int r = 0; r < kSide; ++r) {
    uint16_t* out = rounded + r * frame.padded;
    if (r < count) {
      round_vector(rows[i + r], frame, false, out, kStep, r, squares);
    } else {
      std::memset(out, 0, frame.padded * sizeof *out);
      squares.all[r] = squares.rest[r] = squares.residual[r] = _mm512_setzero_ps();
    }
    state.nearest[r] = {a.clusters, std::numeric_limits<T>::infinity()};
  }
  const Norms norms(squares, a.features);
  state.usable = _mm512_cmp_ps_mask(norms.square, _mm512_set1_ps(kTooLarge), _CMP_LT_OQ) & ((1u << count) - 1);
  _mm512_store_ps(state.square, norms.square);
  _mm512_store_ps(state.norm, norms.norm);
  _mm512_store_ps(state.rest, norms.rest + norms.residual);
  _mm512_store_ps(state.residual, norms.residual);
  _mm512_store_ps(state.upper, _mm512_set1_ps(kInfinity));
  for (int64_t s = 0; s < frame.steps; ++s) transpose(rounded + s * kStep, frame.padded, packed + s * 2 * kTile);
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
