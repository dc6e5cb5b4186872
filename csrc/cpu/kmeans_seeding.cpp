// Greedy k-means++: about one pass over x a step.
//
// All candidates of a step are compared with a row while it is in registers. What a row gains is added up as integers,
// which no order changes, and a bit for each candidate that improves it is kept, so that the winner goes back only to
// the rows it improves. Potentials are kept by blocks of rows: a draw finds its block, then its row.
#include "../common/kmeans_seeding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/parallel.h"
#include "../common/simd_double.h"
#include "kmeans_rows.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Rows of one unit of work, whose potential is kept.
constexpr int64_t kBlock = 1024;
// Rows that stay in the level 1 cache while candidates pass over them.
constexpr int64_t kTile = 16;
// Candidates whose distances to a row are computed at once.
constexpr int kGroup = 8;

struct Weights {
  const double* first;
  int64_t stride;

  double operator[](int64_t n) const { return first[n * stride]; }
};

int64_t to_integer(double value, double weight, double scale) {
  return weight > 0 ? round_to_integer(value * weight * scale) : 0;
}

template <int kCount, class T>
void distances_to(const T* x, const T* candidates, int64_t features, T* distances) {
  const T* at[kCount];
  T found[kCount];
  for (int t = 0; t < kCount; ++t) at[t] = candidates + t * features;
  squared_distances(x, at, features, found);
  std::copy(found, found + kCount, distances);
}

template <class T>
using Distances = void (*)(const T* x, const T* candidates, int64_t features, T* distances);

template <class T>
Distances<T> distances_for(int64_t count) {
  static constexpr Distances<T> functions[kGroup] = {distances_to<1, T>, distances_to<2, T>, distances_to<3, T>,
                                                     distances_to<4, T>, distances_to<5, T>, distances_to<6, T>,
                                                     distances_to<7, T>, distances_to<8, T>};
  return functions[count - 1];
}

// Adds to gains[t] how much the integer potential of rows [first, end) falls with candidate t, and notes whose it is.
template <class T>
void weigh(const KMeansRows& rows, int64_t b, int64_t first, int64_t end, const T* candidates, int64_t trials,
           const T* closest, Weights weights, double scale, int64_t* gains, int32_t* improves) {
  std::vector<T> wide(is_half(rows.dtype) ? kTile * rows.features : 0);
  T distances[kTile][kMaxTrials];
  for (int64_t n0 = first; n0 < end; n0 += kTile) {
    const int64_t count = std::min(kTile, end - n0);
    const T* x[kTile];
    for (int64_t i = 0; i < count; ++i) {
      x[i] = row_as<T>(rows, b, n0 + i, 0, rows.features, wide.data() + (wide.empty() ? 0 : i * rows.features));
    }
    for (int64_t t = 0; t < trials; t += kGroup) {
      const Distances<T> distances_of = distances_for<T>(std::min<int64_t>(kGroup, trials - t));
      for (int64_t i = 0; i < count; ++i) {
        distances_of(x[i], candidates + t * rows.features, rows.features, &distances[i][t]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const T before = closest[n0 + i];
      uint32_t mask = 0;
      for (int64_t t = 0; t < trials; ++t) mask |= static_cast<uint32_t>(distances[i][t] < before) << t;
      improves[n0 + i] = static_cast<int32_t>(mask);
      if (mask == 0) continue;
      const double weight = weights[n0 + i];
      const int64_t whole = to_integer(before, weight, scale);
      for (; mask; mask &= mask - 1) {
        const int t = __builtin_ctz(mask);
        gains[t] += whole - to_integer(distances[i][t], weight, scale);
      }
    }
  }
}

// Lowers `closest` of rows [first, end) to the distance to the centroid; of those with the bit, if `improves` is there.
template <class T>
bool lower(const KMeansRows& rows, int64_t b, int64_t first, int64_t end, const T* centroid, T* closest,
           const int32_t* improves, int64_t bit) {
  std::vector<T> wide(is_half(rows.dtype) ? rows.features : 0);
  bool changed = false;
  for (int64_t n = first; n < end; ++n) {
    if (improves && !(static_cast<uint32_t>(improves[n]) >> bit & 1)) continue;
    T distance;
    distances_to<1>(row_as<T>(rows, b, n, 0, rows.features, wide.data()), centroid, rows.features, &distance);
    if (!(distance < closest[n])) continue;
    closest[n] = distance;
    changed = true;
  }
  return changed;
}

// 2^exponent, exponents clamped to those of normal numbers.
double power_of_two(int64_t exponent) {
  return std::ldexp(1.0, static_cast<int>(std::clamp<int64_t>(exponent, -1022, 1023)));
}

// What makes `count` numbers in [0, bound] integers with a sum below 2^62.
double integer_scale(double bound, int64_t count) {
  int of_bound = 0, of_count = 0;
  if (std::isfinite(bound)) std::frexp(bound, &of_bound);
  std::frexp(static_cast<double>(count), &of_count);
  return power_of_two(62 - of_count - of_bound);
}

// The workspace of one entry, in 64-bit words.
struct Layout {
  int64_t blocks, bounds, totals, gains, changed, closest, improves, candidates, size;

  Layout(const KMeansRows& rows, int64_t trials) : blocks(divide_up(rows.rows, kBlock)) {
    const int64_t bytes = rows.dtype == DType::f64 ? 8 : 4;
    int64_t at = 0;
    const auto take = [&at](int64_t words) {
      const int64_t first = at;
      at += divide_up(words, 8) * 8;
      return first;
    };
    bounds = take(blocks);
    totals = take(blocks);
    gains = take(blocks * trials);
    changed = take(blocks);
    closest = take(divide_up(rows.rows * bytes, 8));
    improves = take(divide_up(rows.rows * 4, 8));
    candidates = take(divide_up(std::max<int64_t>(1, trials) * rows.features * bytes, 8));
    size = at;
  }
};

// One entry: a start of one problem.
template <class T>
class Start {
 public:
  Start(const KMeansSeed& a, int64_t entry, int64_t* workspace, int threads)
      : a_(a),
        layout_(a.rows, a.trials),
        b_(entry / (a.entries / a.rows.problems)),
        threads_(threads),
        weights_{a.rows.weights + b_ * a.rows.weight_problem_stride, a.rows.weight_row_stride},
        uniform_(a.uniform + entry * a.clusters * a.trials),
        chosen_(a.chosen + entry * a.clusters),
        bounds_(reinterpret_cast<double*>(workspace + layout_.bounds)),
        totals_(workspace + layout_.totals),
        gains_(workspace + layout_.gains),
        changed_(workspace + layout_.changed),
        closest_(reinterpret_cast<T*>(workspace + layout_.closest)),
        improves_(reinterpret_cast<int32_t*>(workspace + layout_.improves)),
        candidates_(reinterpret_cast<T*>(workspace + layout_.candidates)) {}

  void run() {
    std::fill_n(closest_, a_.rows.rows, T(1));
    for_blocks([&](int64_t i, int64_t first, int64_t end) { note_change(i, first, end); });
    for (int64_t step = 0; step < a_.clusters; ++step) {
      add_up();
      if (step > 0 && total_ == 0) {  // every row is a centroid
        std::fill(chosen_ + step, chosen_ + a_.clusters, chosen_[0]);
        return;
      }
      choose(step);
    }
  }

 private:
  template <class Work>
  void for_blocks(const Work& work) {
    parallel_for(layout_.blocks, threads_, [&](int64_t i, int) {
      work(i, i * kBlock, std::min((i + 1) * kBlock, a_.rows.rows));
    });
  }

  void note_change(int64_t i, int64_t first, int64_t end) {
    double bound = 0;
    for (int64_t n = first; n < end; ++n) {
      const double weight = weights_[n];
      if (weight > 0) bound = std::max(bound, static_cast<double>(closest_[n]) * weight);
    }
    bounds_[i] = bound;
    changed_[i] = 1;
  }

  // The scale on which potentials are integers, and the potential of each block that is not known on it.
  void add_up() {
    if (valid_ < 0) {
      valid_ = 0;
      for (int64_t n = 0; n < a_.rows.rows; ++n) valid_ += weights_[n] > 0;
    }
    const double before = scale_;
    scale_ = integer_scale(*std::max_element(bounds_, bounds_ + layout_.blocks), valid_);
    for_blocks([&](int64_t i, int64_t first, int64_t end) {
      if (scale_ == before && !changed_[i]) return;
      int64_t total = 0;
      for (int64_t n = first; n < end; ++n) total += to_integer(closest_[n], weights_[n], scale_);
      totals_[i] = total;
      changed_[i] = 0;
    });
    total_ = 0;
    for (int64_t i = 0; i < layout_.blocks; ++i) total_ += totals_[i];
  }

  // The row in which the running sum of the potentials passes uniform * total.
  int64_t drawn(double uniform) const {
    int64_t left = std::min(static_cast<int64_t>(uniform * static_cast<double>(total_)), total_ - 1);
    int64_t i = 0;
    while (i < layout_.blocks - 1 && left >= totals_[i]) left -= totals_[i++];
    const int64_t end = std::min((i + 1) * kBlock, a_.rows.rows);
    int64_t n = i * kBlock;
    for (; n < end - 1; ++n) {
      left -= to_integer(closest_[n], weights_[n], scale_);
      if (left < 0) break;
    }
    return n;
  }

  void choose(int64_t step) {
    const int64_t trials = step == 0 ? 1 : a_.trials, features = a_.rows.features;
    int64_t rows[kMaxTrials];
    for (int64_t t = 0; t < trials; ++t) {
      T* to = candidates_ + t * features;
      rows[t] = drawn(uniform_[step * a_.trials + t]);
      const T* from = row_as<T>(a_.rows, b_, rows[t], 0, features, to);
      if (from != to) std::copy(from, from + features, to);
    }
    int64_t best = 0;
    if (step == 0) {
      std::fill_n(closest_, a_.rows.rows, std::numeric_limits<T>::infinity());
    } else {
      best = best_candidate();
    }
    chosen_[step] = rows[best];
    for_blocks([&](int64_t i, int64_t first, int64_t end) {
      const int32_t* improves = step == 0 ? nullptr : improves_;
      const bool changed = lower(a_.rows, b_, first, end, candidates_ + best * features, closest_, improves, best);
      if (changed) note_change(i, first, end);
    });
  }

  // The first of those that leave the smallest potential.
  int64_t best_candidate() {
    const int64_t trials = a_.trials;
    for_blocks([&](int64_t i, int64_t first, int64_t end) {
      std::fill_n(gains_ + i * trials, trials, 0);
      weigh(a_.rows, b_, first, end, candidates_, trials, closest_, weights_, scale_, gains_ + i * trials, improves_);
    });
    for (int64_t i = 1; i < layout_.blocks; ++i) {
      for (int64_t t = 0; t < trials; ++t) gains_[t] += gains_[i * trials + t];
    }
    return std::max_element(gains_, gains_ + trials) - gains_;
  }

  const KMeansSeed& a_;
  const Layout layout_;
  const int64_t b_;
  const int threads_;
  const Weights weights_;
  const double* uniform_;
  int64_t* chosen_;
  double* bounds_;
  int64_t* totals_;
  int64_t* gains_;
  int64_t* changed_;
  T* closest_;
  int32_t* improves_;
  T* candidates_;
  int64_t valid_ = -1, total_ = 0;
  double scale_ = 0;
};

}  // namespace

void kmeans_potentials(const KMeansPotentials& a, int threads) {
  const KMeansRows& rows = a.rows;
  const int64_t blocks = divide_up(rows.rows, kBlock);
  std::vector<int64_t> parts(a.entries * blocks * a.trials);
  parallel_for(a.entries * blocks, threads, [&](int64_t i, int) {
    const int64_t e = i / blocks, first = i % blocks * kBlock, end = std::min(first + kBlock, rows.rows);
    const Weights weights{rows.weights + e * rows.weight_problem_stride, rows.weight_row_stride};
    with_wide(rows.dtype, [&](auto wide) {
      using T = decltype(wide);
      const T* closest = static_cast<const T*>(a.closest) + e * rows.rows;
      const T* candidates = static_cast<const T*>(a.candidates) + e * a.trials * rows.features;
      int64_t* part = parts.data() + i * a.trials;
      weigh(rows, e / (a.entries / rows.problems), first, end, candidates, a.trials, closest, weights, a.scale[e], part,
            a.improves + e * rows.rows);
      int64_t whole = 0;
      for (int64_t n = first; n < end; ++n) whole += to_integer(closest[n], weights[n], a.scale[e]);
      for (int64_t t = 0; t < a.trials; ++t) part[t] = whole - part[t];
    });
  });
  for (int64_t i = 0; i < a.entries * a.trials; ++i) {
    a.potentials[i] = 0;
    for (int64_t j = 0; j < blocks; ++j) {
      a.potentials[i] += parts[(i / a.trials * blocks + j) * a.trials + i % a.trials];
    }
  }
}

void kmeans_closest(const KMeansClosest& a, int threads) {
  const KMeansRows& rows = a.rows;
  const int64_t blocks = divide_up(rows.rows, kBlock);
  parallel_for(a.entries * blocks, threads, [&](int64_t i, int) {
    const int64_t e = i / blocks, first = i % blocks * kBlock, end = std::min(first + kBlock, rows.rows);
    with_wide(rows.dtype, [&](auto wide) {
      using T = decltype(wide);
      lower(rows, e / (a.entries / rows.problems), first, end,
            static_cast<const T*>(a.centroid) + e * rows.features, static_cast<T*>(a.closest) + e * a.closest_stride,
            a.improves ? a.improves + e * rows.rows : nullptr, a.improves ? a.chosen[e] : 0);
    });
  });
}

int64_t kmeans_seed_workspace(const KMeansRows& rows, int64_t entries, int64_t trials, int threads) {
  return (entries < threads ? 1 : threads) * Layout(rows, trials).size;
}

// Entries are the parallel units where there are enough of them, blocks of rows where not.
void kmeans_seed(const KMeansSeed& a, int threads) {
  const bool many = a.entries >= threads;
  const int64_t size = Layout(a.rows, a.trials).size;
  parallel_for(a.entries, many ? threads : 1, [&](int64_t entry, int thread) {
    int64_t* workspace = static_cast<int64_t*>(a.workspace) + thread * size;
    with_wide(a.rows.dtype, [&](auto wide) { Start<decltype(wide)>(a, entry, workspace, many ? 1 : threads).run(); });
  });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
