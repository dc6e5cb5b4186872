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
#include "../common/parallel.h"
#include "amx.h"
#include "kmeans_amx_pack.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int64_t kUnit = 512;               // rows of one unit of parallel work

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
        state.usable & _mm512_cmp_ps_mask(_mm512_load_ps(state.best), _mm512_load_ps(state.upper), _CMP_NGT_UQ);
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
      const __m512 bounds = _mm512_load_ps(low(s, g));
      uint32_t rows = state.usable & _mm512_cmp_ps_mask(bounds, _mm512_load_ps(state.upper), _CMP_NGT_UQ);
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
