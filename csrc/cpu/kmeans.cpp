// k-means assignment in fp32: a matrix product whose result is never written.
//
// With everything shifted by the mean centroid, the nearest centroid of a row maximises x.c - ||c||^2 / 2.
// Centroids are packed into panels [features, kPanel], rows into tiles [features, kRows]; kRows x kPanel scores
// stay in registers. Each row keeps, for each vector lane, its best score, the panel it came from, and the best score
// of all other panels, without a branch: about ln(K) improvements a row would each be a mispredicted one.
// A score is known up to a bound on its rounding. What could be the maximum within it is decided by the direct
// distance ||x - c||^2: mostly the kVecs centroids of one lane of one panel; for a row where another panel comes as
// close, all centroids. So labels are those of direct distances whatever the data, and do not depend on tiles or
// threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/kmeans.h"
#include "../common/parallel.h"
#include "../common/simd.h"

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

constexpr int64_t kMeanColumns = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

  float* panel(float* problem_base, int64_t p, int64_t features) const {
    return problem_base + neg_half_norms + panels * kPanel + p * kPanel * features;
  }
};

// The mean centroid: shifting by it keeps scores small, and so their rounding, where all data lie far from the origin.
void mean_of_columns(const KMeansAssign& a, int64_t b, int64_t first, float* mean) {
  const int64_t count = std::min(kMeanColumns, a.features - first);
  double sum[kMeanColumns] = {};
  for (int64_t k = 0; k < a.clusters; ++k) {
    const float* c = a.centroid(b, k) + first;
    for (int64_t d = 0; d < count; ++d) sum[d] += c[d];
  }
  for (int64_t d = 0; d < count; ++d) mean[first + d] = static_cast<float>(sum[d] / static_cast<double>(a.clusters));
}

void pack_panel(const KMeansAssign& a, int64_t b, int64_t p, const float* mean, float* neg_half_norms, float* panel) {
  for (int j = 0; j < kPanel; ++j) {
    const int64_t k = p * kPanel + j;
    if (k >= a.clusters) {  // padding never wins
      for (int64_t d = 0; d < a.features; ++d) panel[d * kPanel + j] = 0.0f;
      neg_half_norms[p * kPanel + j] = -std::numeric_limits<float>::infinity();
      continue;
    }
    const float* c = a.centroid(b, k);
    double norm = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      const float shifted = c[d] - mean[d];
      panel[d * kPanel + j] = shifted;
      norm += static_cast<double>(shifted) * shifted;
    }
    neg_half_norms[p * kPanel + j] = static_cast<float>(-0.5 * norm);
  }
}

// Rows [first, first + count) of problem b, shifted and transposed to [features, kRows]; missing rows are zero.
void pack_tile(const KMeansAssign& a, int64_t b, int64_t first, int64_t count, const float* mean, float* tile) {
  int r = 0;
#if defined(__SSE2__)
  for (; r + 4 <= count; r += 4) {
    const float* row[4];
    for (int i = 0; i < 4; ++i) row[i] = a.row(b, first + r + i);
    int64_t d = 0;
    for (; d + 4 <= a.features; d += 4) {
      const __m128 m = _mm_loadu_ps(mean + d);
      __m128 q0 = _mm_sub_ps(_mm_loadu_ps(row[0] + d), m), q1 = _mm_sub_ps(_mm_loadu_ps(row[1] + d), m);
      __m128 q2 = _mm_sub_ps(_mm_loadu_ps(row[2] + d), m), q3 = _mm_sub_ps(_mm_loadu_ps(row[3] + d), m);
      _MM_TRANSPOSE4_PS(q0, q1, q2, q3);
      float* out = tile + d * kRows + r;
      _mm_storeu_ps(out, q0);
      _mm_storeu_ps(out + kRows, q1);
      _mm_storeu_ps(out + 2 * kRows, q2);
      _mm_storeu_ps(out + 3 * kRows, q3);
    }
    for (; d < a.features; ++d) {
      for (int i = 0; i < 4; ++i) tile[d * kRows + r + i] = row[i][d] - mean[d];
    }
  }
#endif
  for (; r < kRows; ++r) {
    const float* row = r < count ? a.row(b, first + r) : nullptr;
    for (int64_t d = 0; d < a.features; ++d) tile[d * kRows + r] = row ? row[d] - mean[d] : 0.0f;
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

// ||x - c||^2 for the kVecs candidates k, k + width, ...: their sums run side by side, to hide each other's latency.
void squared_distances(const float* x, const float* const (&c)[kVecs], int64_t features, float (&distance)[kVecs]) {
  Vec sum[kVecs] = {Vec::set1(0.0f), Vec::set1(0.0f), Vec::set1(0.0f)};
  int64_t d = 0;
  for (; d + Vec::kWidth <= features; d += Vec::kWidth) {
    const Vec row = Vec::load(x + d);
    for (int v = 0; v < kVecs; ++v) {
      const Vec e = row - Vec::load(c[v] + d);
      sum[v] = fma(e, e, sum[v]);
    }
  }
  for (int v = 0; v < kVecs; ++v) distance[v] = reduce_add(sum[v]);
  for (; d < features; ++d) {
    for (int v = 0; v < kVecs; ++v) distance[v] += (x[d] - c[v][d]) * (x[d] - c[v][d]);
  }
}

void prefetch(const float* row, int64_t features) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t d = 0; d < features; d += kLine) __builtin_prefetch(row + d, 0, 2);
}

struct Nearest {
  int64_t label;
  float distance;
};

// The nearest of the centroids first, first + step, ... (kVecs of them, past the end `first` again), the lowest if equal.
Nearest nearest_of(const KMeansAssign& a, int64_t b, int64_t n, int64_t first, int64_t step) {
  const float* candidates[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const int64_t k = first + v * step;
    candidates[v] = a.centroid(b, k < a.clusters ? k : first);
  }
  float distance[kVecs];
  squared_distances(a.row(b, n), candidates, a.features, distance);
  Nearest found{first, distance[0]};
  for (int v = 1; v < kVecs; ++v) {
    found.label = distance[v] < found.distance ? first + v * step : found.label;
    found.distance = distance[v] < found.distance ? distance[v] : found.distance;
  }
  return found;
}

bool comes_first(const Nearest& one, const Nearest& other) {
  return one.distance < other.distance || (one.distance == other.distance && one.label < other.label);
}

// By all centroids. For a row with a NaN: label 0, and the distance says so.
Nearest nearest_of_all(const KMeansAssign& a, int64_t b, int64_t n) {
  Nearest nearest = nearest_of(a, b, n, 0, 1);
  for (int64_t k = kVecs; k < a.clusters; k += kVecs) {
    const Nearest found = nearest_of(a, b, n, k, 1);
    if (found.distance < nearest.distance) nearest = found;
  }
  return nearest;
}

// Twice the bound on the rounding of a score: features + 1 fused multiply-adds, the shift of x and c, and the half norm,
// each within 2^-24 of a sum of magnitudes of at most |x'| |c'| + |c'|^2 / 2. The row's own norm is at most its distance to
// any centroid plus that one's norm.
float rounding_slack(float distance, float largest_norm, int64_t features) {
  const float row_norm = std::sqrt(distance) + largest_norm;
  return 2.02f * 0x1p-24f * static_cast<float>(features + 8) * largest_norm * (row_norm + 0.5f * largest_norm);
}

Nearest decide(const KMeansAssign& a, int64_t b, int64_t n, float largest_norm, const Best& best, int r) {
  const Vec scores = Vec::load(best.score[r]);
  const float top = reduce_max(scores);
  const int lane = __builtin_ctz(not_less(scores, Vec::set1(top)));
  const auto look = [&](int l) {
    return nearest_of(a, b, n, static_cast<int64_t>(best.panel[r][l]) * kPanel + l, Vec::kWidth);
  };
  Nearest nearest = look(lane);
  const Vec least = Vec::set1(top - rounding_slack(nearest.distance, largest_norm, a.features));
  // Also where a score or a distance is not finite.
  if (not_less(Vec::load(best.other[r]), least)) return nearest_of_all(a, b, n);
  for (uint32_t lanes = not_less(scores, least) & ~(1u << lane); lanes; lanes &= lanes - 1) {
    const Nearest found = look(__builtin_ctz(lanes));
    if (comes_first(found, nearest)) nearest = found;
  }
  return nearest;
}

float largest_norm_of(const float* neg_half_norms, int64_t clusters) {
  float least = 0;
  for (int64_t k = 0; k < clusters; ++k) least = neg_half_norms[k] < least ? neg_half_norms[k] : least;
  return std::sqrt(-2 * least);
}

// Rows [first, first + count), a block at a time: pack it, pass all panels over it, decide.
void assign_rows(const KMeansAssign& a, const Layout& layout, int64_t b, int64_t first, int64_t count, float* tiles) {
  float* base = a.workspace + b * layout.problem;
  const float* neg_half_norms = base + layout.neg_half_norms;
  const float largest_norm = largest_norm_of(neg_half_norms, a.clusters);
  const int64_t block = layout.tiles * kRows, end = first + count;
  Best best[kMaxTiles];
  for (int64_t n0 = first; n0 < end; n0 += block) {
    const int64_t used = divide_up(std::min(block, end - n0), kRows);
    for (int64_t t = 0; t < used; ++t) {
      const int64_t n = n0 + t * kRows;
      pack_tile(a, b, n, std::min<int64_t>(kRows, end - n), base + layout.mean, tiles + t * kRows * a.features);
      best[t].clear();
    }
    for (int64_t p = 0; p < layout.panels; ++p) {
      for (int64_t t = 0; t < used; ++t) {
        // The next block's rows come from memory while this one computes.
        const int64_t next = n0 + block + t * kRows + p;
        if (p < kRows && next < end) prefetch(a.row(b, next), a.features);
        score(tiles + t * kRows * a.features, layout.panel(base, p, a.features), neg_half_norms + p * kPanel, a, p,
              best[t]);
      }
    }
    for (int64_t i = 0; i < std::min(block, end - n0); ++i) {
      const Nearest nearest = decide(a, b, n0 + i, largest_norm, best[i / kRows], static_cast<int>(i % kRows));
      a.labels[b * a.rows + n0 + i] = nearest.label;
      a.distances[b * a.rows + n0 + i] = nearest.distance;
    }
  }
}

}  // namespace

int64_t kmeans_assign_workspace(int64_t problems, int64_t clusters, int64_t features, int threads) {
  const Layout layout(clusters, features);
  return problems * layout.problem + threads * layout.rows;
}

void kmeans_assign(const KMeansAssign& a, int threads) {
  const Layout layout(a.clusters, a.features);
  const auto base = [&](int64_t b) { return a.workspace + b * layout.problem; };
  const int64_t columns = divide_up(a.features, kMeanColumns);
  parallel_for(a.problems * columns, threads, [&](int64_t i, int) {
    mean_of_columns(a, i / columns, i % columns * kMeanColumns, base(i / columns) + layout.mean);
  });
  parallel_for(a.problems * layout.panels, threads, [&](int64_t i, int) {
    const int64_t b = i / layout.panels, p = i % layout.panels;
    pack_panel(a, b, p, base(b) + layout.mean, base(b) + layout.neg_half_norms, layout.panel(base(b), p, a.features));
  });
  const int64_t units = divide_up(a.rows, kUnit);
  float* rows = a.workspace + a.problems * layout.problem;
  parallel_for(a.problems * units, threads, [&](int64_t i, int thread) {
    const int64_t first = i % units * kUnit;
    assign_rows(a, layout, i / units, first, std::min(kUnit, a.rows - first), rows + thread * layout.rows);
  });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
