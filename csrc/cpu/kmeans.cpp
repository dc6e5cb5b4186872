// k-means assignment by fp32 scores: a matrix product whose result is never written.
//
// With everything shifted by the mean centroid, the nearest centroid of a row maximises x.c - ||c||^2 / 2.
// Centroids are packed into panels [features, kPanel], rows into tiles [features, kRows]; kRows x kPanel scores
// stay in registers. Each row keeps, for each vector lane, its best score, the panel it came from, and the best score
// of all other panels, without a branch: about ln(K) improvements a row would each be a mispredicted one.
// A score is known up to a bound on its rounding. What could be the maximum within it is decided by the direct
// distance ||x - c||^2: mostly the kVecs centroids of one lane of one panel; for a row where another panel comes as
// close, all centroids. So labels are those of direct distances whatever the data, and do not depend on tiles or
// threads.
#include <limits>

#include "../common/parallel.h"
#include "kmeans_direct.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// As many accumulators as registers allow beside a panel's vectors and a broadcast element.
constexpr int kRows = Vec::kRegisters == 32 ? 8 : 4;
constexpr int kVecs = 3;
constexpr int kPanel = kVecs * Vec::kWidth;
constexpr int kMaxTiles = 16;

// A block of rows stays in the level 2 cache while all panels pass over it.
constexpr int64_t kBlockBytes = 128 << 10;
// Rows of one unit of parallel work.
constexpr int64_t kUnit = 512;

static_assert(kVecs == 3, "score() picks among three");

// Where things lie in the workspace: for each problem [mean | negated half norms | panels], then a row block a thread.
struct Layout {
  int64_t panels, mean, neg_half_norms, problem, tiles, rows;

  Layout(int64_t clusters, int64_t features)
      : panels(divide_up(clusters, kPanel)),
        mean(0),
        neg_half_norms(divide_up(features, kPanel) * kPanel),  // so that panels keep the workspace's alignment
        problem(neg_half_norms + panels * kPanel * (features + 1)),
        tiles(std::clamp<int64_t>(kBlockBytes / (kRows * 4 * std::max<int64_t>(features, 1)), 1, kMaxTiles)),
        rows(tiles * kRows * features) {}

  // Packed rows, and rows widened to fp32 beside them.
  int64_t thread(DType dtype) const { return is_half(dtype) ? 2 * rows : rows; }

  float* panel(float* problem_base, int64_t p, int64_t features) const {
    return problem_base + neg_half_norms + panels * kPanel + p * kPanel * features;
  }
};

template <class T>
void pack_panel(const KMeansAssign& a, int64_t b, int64_t p, const float* mean, float* neg_half_norms, float* panel) {
  for (int j = 0; j < kPanel; ++j) {
    const int64_t k = p * kPanel + j;
    if (k >= a.clusters) {  // padding never wins
      for (int64_t d = 0; d < a.features; ++d) panel[d * kPanel + j] = 0.0f;
      neg_half_norms[p * kPanel + j] = -std::numeric_limits<float>::infinity();
      continue;
    }
    const T* c = a.centroid<T>(b, k);
    double norm = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      const float shifted = static_cast<float>(c[d] - mean[d]);
      panel[d * kPanel + j] = shifted;
      norm += static_cast<double>(shifted) * shifted;
    }
    neg_half_norms[p * kPanel + j] = static_cast<float>(-0.5 * norm);
  }
}

// `count` rows, shifted and transposed to [features, kRows]; missing rows are zero.
template <class T>
void pack_tile(const Rows<T>& rows, int64_t count, int64_t features, const float* mean, float* tile) {
  int64_t r = 0;
#if defined(__SSE2__)
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; r + 4 <= count; r += 4) {
      int64_t d = 0;
      for (; d + 4 <= features; d += 4) {
        const __m128 m = _mm_loadu_ps(mean + d);
        __m128 q0 = _mm_sub_ps(_mm_loadu_ps(rows[r] + d), m), q1 = _mm_sub_ps(_mm_loadu_ps(rows[r + 1] + d), m);
        __m128 q2 = _mm_sub_ps(_mm_loadu_ps(rows[r + 2] + d), m), q3 = _mm_sub_ps(_mm_loadu_ps(rows[r + 3] + d), m);
        _MM_TRANSPOSE4_PS(q0, q1, q2, q3);
        float* out = tile + d * kRows + r;
        _mm_storeu_ps(out, q0);
        _mm_storeu_ps(out + kRows, q1);
        _mm_storeu_ps(out + 2 * kRows, q2);
        _mm_storeu_ps(out + 3 * kRows, q3);
      }
      for (; d < features; ++d) {
        for (int i = 0; i < 4; ++i) tile[d * kRows + r + i] = rows[r + i][d] - mean[d];
      }
    }
  }
#endif
  for (; r < kRows; ++r) {
    for (int64_t d = 0; d < features; ++d) {
      tile[d * kRows + r] = r < count ? static_cast<float>(rows[r][d] - mean[d]) : 0.0f;
    }
  }
}

// What a tile knows of its rows so far, for each lane: the best score, the panel that gave it (as a float, exact up to
// 2^24 panels), and the best score of the other panels.
struct Best {
  float score[kRows][Vec::kWidth];
  float panel[kRows][Vec::kWidth];
  float other[kRows][Vec::kWidth];

  void clear() {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    std::fill_n(score[0], kRows * Vec::kWidth, kNone);
    std::fill_n(other[0], kRows * Vec::kWidth, kNone);
    std::fill_n(panel[0], kRows * Vec::kWidth, 0.0f);
  }
};

// `best` after the first kUsed vectors of panel p.
template <int kUsed>
inline void score_panel(const float* tile, const float* panel, const float* neg_half_norms, int64_t features, int64_t p,
                        Best& best) {
  Vec score[kRows][kUsed];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) score[r][v] = Vec::load(neg_half_norms + v * Vec::kWidth);
  }
#pragma GCC unroll 4
  for (int64_t d = 0; d < features; ++d) {
    Vec c[kUsed];
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) c[v] = Vec::load(panel + d * kPanel + v * Vec::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = Vec::set1(tile[d * kRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) score[r][v] = fma(x, c[v], score[r][v]);
    }
  }
  const Vec id = Vec::set1(static_cast<float>(p));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Vec top = score[r][0];
#pragma GCC unroll 4
    for (int v = 1; v < kUsed; ++v) top = max(top, score[r][v]);
    const Vec before = Vec::load(best.score[r]);
    max(Vec::load(best.other[r]), min(before, top)).store(best.other[r]);
    const Vec::Mask better = greater(top, before);
    top.store_where(better, best.score[r]);
    id.store_where(better, best.panel[r]);
  }
}

// The last panel may be partly empty: only the vectors that hold centroids are computed.
void score(const float* tile, const float* panel, const float* neg_half_norms, const KMeansAssign& a, int64_t p,
           Best& best) {
  const int64_t left = a.clusters - p * kPanel;
  if (left > 2 * Vec::kWidth) {
    score_panel<3>(tile, panel, neg_half_norms, a.features, p, best);
  } else if (left > Vec::kWidth) {
    score_panel<2>(tile, panel, neg_half_norms, a.features, p, best);
  } else {
    score_panel<1>(tile, panel, neg_half_norms, a.features, p, best);
  }
}

// Twice the bound on the rounding of a score: features + 1 fused multiply-adds, the shift of x and c, and the half norm,
// each within 2^-24 of a sum of magnitudes of at most |x'| |c'| + |c'|^2 / 2. The row's own norm is at most its distance to
// any centroid plus that one's norm.
float rounding_slack(float distance, float largest_norm, int64_t features) {
  const float row_norm = std::sqrt(distance) + largest_norm;
  return 2.02f * 0x1p-24f * static_cast<float>(features + 8) * largest_norm * (row_norm + 0.5f * largest_norm);
}

template <class T>
Nearest<T> decide(const KMeansAssign& a, int64_t b, const T* x, float largest_norm, const Best& best, int64_t r) {
  const Vec scores = Vec::load(best.score[r]);
  const float top = reduce_max(scores);
  const int lane = __builtin_ctz(not_less(scores, Vec::set1(top)));
  const auto look = [&](int l) {
    return nearest_of<kVecs>(a, b, x, static_cast<int64_t>(best.panel[r][l]) * kPanel + l, Vec::kWidth);
  };
  Nearest<T> nearest = look(lane);
  const float distance = static_cast<float>(nearest.distance);
  const Vec least = Vec::set1(top - rounding_slack(distance, largest_norm, a.features));
  // Also where a score or a distance is not finite.
  if (not_less(Vec::load(best.other[r]), least)) return nearest_of_all(a, b, x);
  for (uint32_t lanes = not_less(scores, least) & ~(1u << lane); lanes; lanes &= lanes - 1) {
    const Nearest<T> found = look(__builtin_ctz(lanes));
    if (found.before(nearest)) nearest = found;
  }
  return nearest;
}

float largest_norm_of(const float* neg_half_norms, int64_t clusters) {
  float least = 0;
  for (int64_t k = 0; k < clusters; ++k) least = neg_half_norms[k] < least ? neg_half_norms[k] : least;
  return std::sqrt(-2 * least);
}

// Rows [first, first + count), a block at a time: pack it, pass all panels over it, decide.
template <class T>
void assign_rows(const KMeansAssign& a, const Layout& layout, int64_t b, int64_t first, int64_t count, float* tiles) {
  float* base = a.workspace + b * layout.problem;
  const float* neg_half_norms = base + layout.neg_half_norms;
  const float largest_norm = largest_norm_of(neg_half_norms, a.clusters);
  const int64_t block = layout.tiles * kRows, end = first + count;
  Best best[kMaxTiles];
  for (int64_t n0 = first; n0 < end; n0 += block) {
    const int64_t size = std::min(block, end - n0), used = divide_up(size, kRows);
    const Rows<T> rows = rows_of<T>(a, b, n0, size, tiles + layout.rows);
    for (int64_t t = 0; t < used; ++t) {
      pack_tile(Rows<T>{rows[t * kRows], rows.stride}, std::min<int64_t>(kRows, size - t * kRows), a.features,
                base + layout.mean, tiles + t * kRows * a.features);
      best[t].clear();
    }
    for (int64_t p = 0; p < layout.panels; ++p) {
      for (int64_t t = 0; t < used; ++t) {
        const int64_t next = n0 + block + t * kRows + p;
        if (p < kRows && next < end) prefetch_rows(a, b, next, next + 1);
        score(tiles + t * kRows * a.features, layout.panel(base, p, a.features), neg_half_norms + p * kPanel, a, p,
              best[t]);
      }
    }
    for (int64_t i = 0; i < size; ++i) put(a, b, n0 + i, decide(a, b, rows[i], largest_norm, best[i / kRows], i % kRows));
  }
}

template <class T>
void assign(const KMeansAssign& a, int threads) {
  const Layout layout(a.clusters, a.features);
  const auto base = [&](int64_t b) { return a.workspace + b * layout.problem; };
  const int64_t columns = divide_up(a.features, kMeanColumns);
  parallel_for(a.problems * columns, threads, [&](int64_t i, int) {
    mean_of_columns<T>(a, i / columns, i % columns * kMeanColumns, base(i / columns) + layout.mean);
  });
  parallel_for(a.problems * layout.panels, threads, [&](int64_t i, int) {
    const int64_t b = i / layout.panels, p = i % layout.panels;
    pack_panel<T>(a, b, p, base(b) + layout.mean, base(b) + layout.neg_half_norms, layout.panel(base(b), p, a.features));
  });
  const int64_t units = divide_up(a.rows, kUnit);
  float* rows = a.workspace + a.problems * layout.problem;
  parallel_for(a.problems * units, threads, [&](int64_t i, int thread) {
    const int64_t first = i % units * kUnit;
    assign_rows<T>(a, layout, i / units, first, std::min(kUnit, a.rows - first), rows + thread * layout.thread(a.dtype));
  });
}

}  // namespace

int64_t kmeans_assign_workspace(int64_t problems, int64_t clusters, int64_t features, DType dtype, int threads) {
  const Layout layout(clusters, features);
  return problems * layout.problem + threads * layout.thread(dtype);
}

void kmeans_assign(const KMeansAssign& a, int threads) {
  a.dtype == DType::f64 ? assign<double>(a, threads) : assign<float>(a, threads);
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
