// k-means assignment by bf16 scores on AMX tiles. Labels are exact: what bf16 cannot decide, ||x - c||^2 does.
//
// With everything shifted by the mean centroid, the nearest centroid of a row minimises ||c||^2 / 2 - x.c. A tile holds
// these scores for 16 centroids (its rows) and 16 rows of x (its columns). With x', c' the operands rounded to bf16 a
// score is off by at most
//   e = |x'| |c - c'| + |x - x'| |c| + (rounding of the sums),
// so score - e is a lower bound. A block of rows keeps its minima over 4 and over 16 centroids; then each row
// looks at the 4 centroids with the smallest score, whose distance gives it an upper bound, and at all others with a
// lower bound not above it. Nothing depends on the other rows of a tile.
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
constexpr int kFew = 4;                      // centroids behind one kept bound
constexpr int kParts = kSide / kFew;
constexpr int64_t kChunk = 128;              // groups of 16 centroids whose bounds are kept at a time
constexpr int64_t kPackedBytes = 32 << 10;   // of a block of rows, so that it stays in the level 1 cache
constexpr int64_t kMaxBlocks = 8;            // tiles of rows in a block
constexpr int64_t kUnit = 512;               // rows of one unit of parallel work

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Relative rounding of a sum of n fp32 terms, whatever their order and the direction of rounding.
float rounding(int64_t n) { return static_cast<float>(n) * 0x1p-23f; }

// At least sqrt(sum), where rounding and underflow may have cost the sum of n squares something.
float root_above(float sum, int64_t n) {
  return 1.000001f * std::sqrt(sum * (1 + rounding(n)) + static_cast<float>(n) * 0x1p-126f);
}

// Where things lie in the workspace, in floats: for each problem the mean and the packed centroids, then for each
// thread what a block of rows needs.
struct Layout {
  int64_t groups, steps, kept;                                  // kept: groups of a chunk
  int64_t bounds, half_norms, tiles, problem;
  int64_t blocks;                                               // tiles of rows in a block
  int64_t few, low, wide;

  Layout(int64_t clusters, int64_t features)
      : groups(divide_up(clusters, kSide)),
        steps(std::max<int64_t>(divide_up(features, kStep), 1)),
        kept(std::min(groups, kChunk)),
        bounds(steps * kStep),
        half_norms(bounds + divide_up(groups * 3, kSide) * kSide),
        tiles(half_norms + groups * kTile),
        problem(tiles + groups * steps * kTile),
        blocks(std::clamp<int64_t>(kPackedBytes / (steps * kTile * 4), 2, kMaxBlocks)),
        few(blocks * steps * kTile),
        low(few + blocks * kept * kParts * kSide),
        wide(low + blocks * kept * kSide) {}

  int64_t rows() const { return blocks * kSide; }
  int64_t thread(int64_t features, DType dtype) const {
    return wide + (is_half(dtype) ? divide_up(rows() * features, kSide) * kSide : 0);
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

struct Norms {
  float square;    // |x|^2
  float residual;  // at least |x - x'|, x before it was shifted in fp32
};

// A row of x, or a centroid, shifted and rounded to [steps, 32] bf16, `stride` elements between steps.
template <class T>
Norms round_row(const T* x, const float* mean, int64_t features, int64_t steps, bool negate, uint16_t* out,
                int64_t stride) {
  const __m512i sign = _mm512_set1_epi32(negate ? INT32_MIN : 0);
  __m512 square = _mm512_setzero_ps(), residual = _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s) {
    __m512 y[2];
    for (int i = 0; i < 2; ++i) {
      y[i] = shifted(x, mean, s * kStep + 16 * i, features);
      y[i] = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(y[i]), sign));
    }
    const __m512i rounded = to_bf16(y[0], y[1]);
    const __m512 rest[2] = {y[0] - of_bf16(_mm512_castsi512_si256(rounded)),
                            y[1] - of_bf16(_mm512_extracti64x4_epi64(rounded, 1))};
    for (int i = 0; i < 2; ++i) {
      square = _mm512_fmadd_ps(y[i], y[i], square);
      residual = _mm512_fmadd_ps(rest[i], rest[i], residual);
    }
    _mm512_storeu_si512(out + s * stride, rounded);
  }
  const float norm = _mm512_reduce_add_ps(square);
  return {norm, root_above(_mm512_reduce_add_ps(residual), features) + 0x1.02p-24f * root_above(norm, features)};
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

// 16 centroids: negated bf16 [steps, 16, 32], half norms each repeated over a tile's row, and three numbers b with
// e <= |x'| b0 + |x - x'| b1 + b2 for all of them.
template <class T>
void pack_group(const KMeansAssign& a, const Layout& layout, int64_t b, int64_t g, float* base) {
  uint16_t* tiles = reinterpret_cast<uint16_t*>(base + layout.tiles + g * layout.steps * kTile);
  float* half_norms = base + layout.half_norms + g * kTile;
  const float sums = rounding(layout.steps * kStep + 4);
  float bound[3] = {0, 0, 0};
  for (int j = 0; j < kSide; ++j) {
    const int64_t k = g * kSide + j;
    float half_norm = kInfinity;  // padding never wins
    if (k < a.clusters) {
      const Norms norms = round_row(a.centroid<T>(b, k), base, a.features, layout.steps, true, tiles + j * kStep, 2 * kTile);
      const float norm = root_above(norms.square, a.features);
      half_norm = 0.5f * norms.square;
      bound[0] = std::max(bound[0], norms.residual + sums * (norm + norms.residual));
      bound[1] = std::max(bound[1], norm);
      bound[2] = std::max(bound[2], (sums + rounding(a.features + 4)) * half_norm);
    } else {
      for (int64_t s = 0; s < layout.steps; ++s) std::memset(tiles + s * 2 * kTile + j * kStep, 0, 2 * kStep);
    }
    std::fill_n(half_norms + j * kSide, kSide, half_norm);
  }
  // A product below the smallest normal number counts as zero.
  bound[2] += static_cast<float>(layout.steps * kStep) * 0x1p-125f;
  for (int i = 0; i < 3; ++i) base[layout.bounds + 3 * g + i] = 1.0001f * bound[i];
}

// What is known of 16 rows.
template <class T>
struct alignas(64) State {
  float square[kSide];    // |x|^2
  float norm[kSide];      // at least |x'|
  float residual[kSide];  // at least |x - x'|
  float upper[kSide];     // the score of the nearest centroid so far is not above this
  float best[kSide];      // smallest lower bound of this chunk,
  int32_t group[kSide];   // and where it is
  Nearest<T> nearest[kSide];
};

// `count` rows from row i on, as [steps, 16 pairs, 16 rows] pairs of bf16; missing rows are zero and want nothing.
template <class T>
void pack_rows(const Rows<T>& rows, int64_t i, int64_t count, const KMeansAssign& a, const Layout& layout,
               const float* mean, uint16_t* packed, State<T>& state) {
  alignas(64) uint16_t rounded[kSide][kStep * 8];
  for (int64_t s0 = 0; s0 < layout.steps; s0 += 8) {  // so that `rounded` has a fixed size
    const int64_t steps = std::min<int64_t>(8, layout.steps - s0), d0 = s0 * kStep;
    for (int r = 0; r < kSide; ++r) {
      Norms norms{0, 0};
      if (r < count) {
        norms = round_row(rows[i + r] + d0, mean + d0, a.features - d0, steps, false, rounded[r], kStep);
      } else {
        std::memset(rounded[r], 0, sizeof rounded[r]);
      }
      state.square[r] = s0 == 0 ? norms.square : state.square[r] + norms.square;
      state.residual[r] = s0 == 0 ? norms.residual : state.residual[r] + norms.residual;
    }
    for (int64_t s = 0; s < steps; ++s) transpose(rounded[0] + s * kStep, kStep * 8, packed + (s0 + s) * 2 * kTile);
  }
  for (int r = 0; r < kSide; ++r) {
    state.norm[r] = root_above(state.square[r], a.features) + state.residual[r];
    state.upper[r] = r < count && std::isfinite(state.square[r]) ? kInfinity : -kInfinity;
    state.nearest[r] = {a.clusters, std::numeric_limits<T>::infinity()};
  }
}

// Scores of kGroups x 16 centroids and kBlocks x 16 rows: half norms plus the products of [steps] tiles.
template <int kGroups, int kBlocks>
inline void score(const uint16_t* centroids, const float* half_norms, const uint16_t* rows, int64_t steps, float* scores) {
  const int64_t next = steps * 2 * kTile;
  _tile_loadd(0, half_norms, 64);
  if (kBlocks > 1) _tile_loadd(1, half_norms, 64);
  if (kGroups > 1) _tile_loadd(2, half_norms + kTile, 64);
  if (kGroups > 1 && kBlocks > 1) _tile_loadd(3, half_norms + kTile, 64);
  for (int64_t s = 0; s < steps; ++s, centroids += 2 * kTile, rows += 2 * kTile) {
    _tile_loadd(4, centroids, 64);
    _tile_loadd(6, rows, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kBlocks > 1) _tile_loadd(7, rows + next, 64);
    if (kBlocks > 1) _tile_dpbf16ps(1, 4, 7);
    if (kGroups > 1) _tile_loadd(5, centroids + next, 64);
    if (kGroups > 1) _tile_dpbf16ps(2, 5, 6);
    if (kGroups > 1 && kBlocks > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 64);
  if (kBlocks > 1) _tile_stored(1, scores + kTile, 64);
  if (kGroups > 1) _tile_stored(2, scores + 2 * kTile, 64);
  if (kGroups > 1 && kBlocks > 1) _tile_stored(3, scores + 3 * kTile, 64);
}

// Keeps the lower bounds of one tile.
template <class T>
inline void keep(const float* scores, const float* bound, int64_t g, float* few, float* low, State<T>& state) {
  const __m512 e = _mm512_fmadd_ps(
      _mm512_load_ps(state.norm), _mm512_set1_ps(bound[0]),
      _mm512_fmadd_ps(_mm512_load_ps(state.residual), _mm512_set1_ps(bound[1]), _mm512_set1_ps(bound[2])));
  __m512 least[kParts];
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const float* s = scores + i * kFew * kSide;
    least[i] = _mm512_min_ps(_mm512_min_ps(_mm512_load_ps(s), _mm512_load_ps(s + kSide)),
                             _mm512_min_ps(_mm512_load_ps(s + 2 * kSide), _mm512_load_ps(s + 3 * kSide)));
    least[i] -= e;
    _mm512_store_ps(few + i * kSide, least[i]);
  }
  const __m512 lowest = _mm512_min_ps(_mm512_min_ps(least[0], least[1]), _mm512_min_ps(least[2], least[3]));
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
      : a_(a), layout_(layout), b_(b), base_(a.workspace + b * layout.problem), scratch_(scratch) {}

  void assign(int64_t first, int64_t count) {
    rows_ = rows_of<T>(a_, b_, first, count, scratch_ + layout_.wide);
    const int64_t blocks = divide_up(count, kSide);
    for (int64_t s = 0; s < blocks; ++s) {
      pack_rows(rows_, s * kSide, std::min<int64_t>(kSide, count - s * kSide), a_, layout_, base_, packed(s), state_[s]);
    }
    asm volatile("" ::: "memory");  // tile loads are opaque to the compiler
    for (int64_t g0 = 0; g0 < layout_.groups; g0 += layout_.kept) {
      const int64_t groups = std::min(layout_.kept, layout_.groups - g0);
      for (int64_t s = 0; s < blocks; ++s) std::fill_n(state_[s].best, kSide, kInfinity), std::fill_n(state_[s].group, kSide, 0);
      int64_t g = 0;
      for (; g + 2 <= groups; g += 2) pass<2>(g0, g, blocks);
      if (g < groups) pass<1>(g0, g, blocks);
      for (int64_t s = 0; s < blocks; ++s) decide(s, g0, groups);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Nearest<T>& nearest = state_[i / kSide].nearest[i % kSide];
      put(a_, b_, first + i, nearest.label < a_.clusters ? nearest : nearest_of_all(a_, b_, rows_[i]));
    }
  }

 private:
  uint16_t* packed(int64_t s) { return reinterpret_cast<uint16_t*>(scratch_ + s * layout_.steps * kTile); }
  float* few(int64_t s, int64_t g) { return scratch_ + layout_.few + (s * layout_.kept + g) * kParts * kSide; }
  float* low(int64_t s, int64_t g) { return scratch_ + layout_.low + (s * layout_.kept + g) * kSide; }

  template <int kGroups>
  void pass(int64_t g0, int64_t g, int64_t blocks) {
    int64_t s = 0;
    for (; s + 2 <= blocks; s += 2) tiles<kGroups, 2>(g0, g, s);
    if (s < blocks) tiles<kGroups, 1>(g0, g, s);
  }

  template <int kGroups, int kBlocks>
  void tiles(int64_t g0, int64_t g, int64_t s) {
    alignas(64) float scores[4 * kTile];
    const uint16_t* centroids = reinterpret_cast<const uint16_t*>(base_ + layout_.tiles + (g0 + g) * layout_.steps * kTile);
    score<kGroups, kBlocks>(centroids, base_ + layout_.half_norms + (g0 + g) * kTile, packed(s), layout_.steps, scores);
#pragma GCC unroll 2
    for (int i = 0; i < kGroups; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) {
        keep(scores + (2 * i + j) * kTile, base_ + layout_.bounds + 3 * (g0 + g + i), g + i, few(s + j, g + i),
             low(s + j, g + i), state_[s + j]);
      }
    }
  }

  // The direct distances of kFew centroids: perhaps a nearer one, and a lower upper bound.
  void look(State<T>& state, int64_t s, int r, int64_t k) {
    if (k >= a_.clusters) return;
    const Nearest<T> found = nearest_of<kFew>(a_, b_, rows_[s * kSide + r], k, 1);
    if (!found.before(state.nearest[r])) return;
    state.nearest[r] = found;
    const float distance = static_cast<float>(found.distance), square = state.square[r];
    // Rounding of both squares, and of the distances that are compared in the end.
    const float slack = rounding(a_.features / kSide + 12) * (distance + square);
    state.upper[r] = std::min(state.upper[r], 0.5f * (distance - square) + slack + 0x1p-120f);
  }

  // All of one group that row r may want.
  void look_at_group(State<T>& state, int64_t s, int r, int64_t g0, int64_t g) {
    const float* parts = few(s, g) + r;
    int least = 0;
    for (int i = 1; i < kParts; ++i) least = parts[i * kSide] < parts[least * kSide] ? i : least;
    const int64_t k = (g0 + g) * kSide;
    if (!(parts[least * kSide] > state.upper[r])) look(state, s, r, k + least * kFew);
    for (int i = 0; i < kParts; ++i) {
      if (i != least && !(parts[i * kSide] > state.upper[r])) look(state, s, r, k + i * kFew);
    }
    low(s, g)[r] = kInfinity;
  }

  void decide(int64_t s, int64_t g0, int64_t groups) {
    State<T>& state = state_[s];
    for (int r = 0; r < kSide; ++r) {
      if (!(state.best[r] > state.upper[r])) look_at_group(state, s, r, g0, state.group[r]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const __m512 bound = _mm512_load_ps(low(s, g));
      uint32_t wanted = _mm512_cmp_ps_mask(bound, _mm512_load_ps(state.upper), _CMP_NGT_UQ);
      for (; wanted; wanted &= wanted - 1) {
        const int r = __builtin_ctz(wanted);
        if (!(low(s, g)[r] > state.upper[r])) look_at_group(state, s, r, g0, g);
      }
    }
  }

  const KMeansAssign& a_;
  const Layout& layout_;
  const int64_t b_;
  float* const base_;
  float* const scratch_;
  Rows<T> rows_{};
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
  const int64_t columns = divide_up(layout.bounds, kMeanColumns);
  parallel_for(a.problems * columns, threads, [&](int64_t i, int) {
    float* mean = base(i / columns);
    const int64_t first = i % columns * kMeanColumns;
    std::fill(mean + first, mean + std::min(first + kMeanColumns, layout.bounds), 0.0f);
    if (first < a.features) mean_of_columns<T>(a, i / columns, first, mean);
  });
  parallel_for(a.problems * layout.groups, threads, [&](int64_t i, int) {
    pack_group<T>(a, layout, i / layout.groups, i % layout.groups, base(i / layout.groups));
  });
  const int64_t units = divide_up(a.rows, kUnit);
  float* scratch = a.workspace + a.problems * layout.problem;
  parallel_for(a.problems * units, threads, [&](int64_t i, int thread) {
    const Tiles tiles;
    const int64_t b = i / units, end = std::min(a.rows, (i % units + 1) * kUnit);
    Block<T> block(a, layout, b, scratch + thread * layout.thread(a.features, a.dtype));
    for (int64_t first = i % units * kUnit; first < end; first += layout.rows()) {
      prefetch_rows(a, b, std::min(first + layout.rows(), end), std::min(first + 2 * layout.rows(), end));
      block.assign(first, std::min(layout.rows(), end - first));
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
