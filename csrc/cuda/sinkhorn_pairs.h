// How the launches of the soft cross-entropy share the pairs of views and targets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/sinkhorn_loss.h"

namespace clustops::cuda {

// A few views and targets, read together, and which of them are compared.
template <int kViews, int kTargets>
struct Tile {
  int views = 0, targets = 0;
  int64_t view[kViews] = {}, target[kTargets] = {};
  int64_t pair[kViews][kTargets];  // its number, or -1
  bool again[kViews] = {};         // the view was in an earlier tile

  Tile() {
    for (auto& row : pair) std::fill(row, row + kTargets, -1);
  }

  // Whether there was room for the pair.
  bool take(int64_t v, int64_t t, int64_t number) {
    const auto i = std::find(view, view + views, v) - view, j = std::find(target, target + targets, t) - target;
    if (i == kViews || j == kTargets || pair[i][j] >= 0) return false;
    view[i] = v, target[j] = t, pair[i][j] = number;
    views = std::max(views, static_cast<int>(i) + 1), targets = std::max(targets, static_cast<int>(j) + 1);
    return true;
  }
};

// Tiles that hold all pairs, with every view and every target in one at least; around a few targets each, or with
// `by_view` around a few views, which then seldom come again.
template <int kViews, int kTargets>
std::vector<Tile<kViews, kTargets>> tiles_of(const SoftCrossEntropy& a, bool by_view) {
  std::vector<Tile<kViews, kTargets>> tiles;
  std::vector<int64_t> left(static_cast<std::size_t>(a.pairs));
  for (std::size_t n = 0; n < left.size(); ++n) left[n] = static_cast<int64_t>(n);
  std::vector<bool> seen(static_cast<std::size_t>(a.views)), seen_target(static_cast<std::size_t>(a.n_targets));
  while (!left.empty()) {
    std::vector<int64_t> centers, near, rest;
    for (int64_t n : left) {
      const int64_t center = by_view ? a.view[n] : a.target[n];
      bool is_near = std::find(centers.begin(), centers.end(), center) != centers.end();
      if (!is_near && centers.size() < static_cast<std::size_t>(by_view ? kViews : kTargets)) {
        centers.push_back(center);
        is_near = true;
      }
      (is_near ? near : rest).push_back(n);
    }
    while (!near.empty()) {
      Tile<kViews, kTargets> tile;
      const auto taken = [&](int64_t n) { return tile.take(a.view[n], a.target[n], n); };
      near.erase(std::remove_if(near.begin(), near.end(), taken), near.end());
      for (int i = 0; i < tile.views; ++i) {
        tile.again[i] = seen[tile.view[i]];
        seen[tile.view[i]] = true;
      }
      for (int j = 0; j < tile.targets; ++j) seen_target[tile.target[j]] = true;
      tiles.push_back(tile);
    }
    left = rest;
  }
  Tile<kViews, kTargets> alone;
  const auto flush = [&](bool full) {
    if (!full) return;
    tiles.push_back(alone);
    alone = {};
  };
  for (int64_t v = 0; v < a.views; ++v) {
    if (!seen[v]) alone.view[alone.views++] = v;
    flush(alone.views == kViews);
  }
  for (int64_t t = 0; t < a.n_targets; ++t) {
    if (!seen_target[t]) alone.target[alone.targets++] = t;
    flush(alone.targets == kTargets);
  }
  flush(alone.views + alone.targets > 0);
  return tiles;
}

// The tile of row p with row p: its numbers are those of problem 0.
template <int kViews, int kTargets>
Tile<kViews, kTargets> single_pair() {
  Tile<kViews, kTargets> tile;
  tile.take(0, 0, 0);
  return tile;
}

}  // namespace clustops::cuda
