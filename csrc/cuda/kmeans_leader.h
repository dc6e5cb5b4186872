// What a row remembers of its scores, and how far a score may be off.
#pragma once

#include <cmath>
#include <cstdint>

#include "kmeans_layout.h"

namespace clustops::cuda {

// The best score so far, whose it is, and the best of all others.
struct Leader {
  float score = -INFINITY, second = -INFINITY;
  int32_t index = 0;

  // at(i), the score of centroid first + 8 (i / 2) + i % 2, for i below kCount: what a thread of a matrix instruction
  // holds of a row. One comparison a score, unless the best improves.
  template <int kCount, class At>
  CLUSTOPS_HOST_DEVICE void take(const At& at, int32_t first) {
    float top = at(0);
#pragma unroll
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, at(i));
    if (top > score) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool better = at(i) > score;
        second = better ? score : fmaxf(second, at(i));
        index = better ? first + 8 * (i / 2) + i % 2 : index;
        score = better ? at(i) : score;
      }
    } else {
      second = fmaxf(second, top);
    }
  }

  template <int kCount>
  CLUSTOPS_HOST_DEVICE void take(const float (&scores)[kCount], int32_t first) {
    take<kCount>([&](int i) { return scores[i]; }, first);
  }

  CLUSTOPS_HOST_DEVICE void merge(const Leader& other) {
    const bool behind = other.score > score || (other.score == score && other.index < index);
    second = behind ? fmaxf(score, other.second) : fmaxf(second, other.score);
    index = behind ? other.index : index;
    score = behind ? other.score : score;
  }
};

// Norms of a row, or the largest of those of centroids: x, its second part x2, and what x1 + x2 leaves of it.
struct Norms {
  float whole, second, rest;
};

// Twice the bound on the error of a score of two parts. Left out of the products: x2 c2 + rest_x c + (x1 + x2) rest_c.
// Sums: 3 D additions, D of them of x1 c2 alone, each within u = 2^-23 of the magnitudes so far, truncation included, a
// tenth more for the carries within a matrix instruction. Then the shift of x and c, the half norm and its addition.
// Last, what underflows, and a little for the rounding of the norms and of this.
CLUSTOPS_HOST_DEVICE inline float rounding_slack(Norms x, Norms c, int64_t features) {
  constexpr float kUnit = 0x1p-23f;
  const float depth = 1.1f * static_cast<float>(align_up(features, kDepth)) + 2.0f;
  const float x1 = x.whole + x.second + x.rest, c1 = c.whole + c.second + c.rest;
  const float left_out = x.second * c.second + x.rest * c.whole + x1 * c.rest;
  const float sums = kUnit * depth * (3.0f * x1 * c.second + 2.0f * (x1 + x.second) * c1);
  const float rest = 4.0f * kUnit * (x1 + c1) * c1 + depth * 0x1p-120f;
  return 2.0f * 1.02f * (left_out + sums + rest);
}

}  // namespace clustops::cuda
