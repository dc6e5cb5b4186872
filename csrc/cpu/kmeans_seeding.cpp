// Greedy k-means++: about one pass over x a step.
//
// All candidates of a step are compared with a row while it is in registers. What a row gains is added up as integers,
// which no order changes, and a bit for each candidate that improves it is kept, so that the winner goes back only to
// the rows it improves. Rows that the triangle inequality keeps with their centroid are not read at all. Potentials are
// kept by blocks of rows: a draw finds its block, then its row.
#include "../common/kmeans_seeding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/parallel.h"
#include "../common/philox.h"
#include "../common/simd_double.h"
#include "kmeans_rows.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Rows of one unit of work, whose potential is kept.
constexpr int64_t kBlock = 1024;
// Rows that stay in the level 1 cache while candidates pass over them.
constexpr int64_t kTile = 16;
// How far ahead memory is asked for: the time it takes to come, and not more than a core may have on its way.
constexpr int64_t kAheadBytes = 4096;
// So many rows a centroid, and it pays to compare centroids with candidates first.
constexpr int64_t kRowsACentroid = 8;
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

template <class T>
constexpr int64_t kWidth = VecFor<T>::type::kWidth;

template <class T>
int64_t padded(int64_t features) {
  return divide_up(features, kWidth<T>) * kWidth<T>;
}

// Candidates as they are read: for each group of kGroup, vector after vector, those of all its candidates.
template <class T>
void pack(const T* candidates, int64_t count, int64_t features, T* packed) {
  for (int64_t t0 = 0; t0 < count; t0 += kGroup) {
    const int64_t group = std::min<int64_t>(kGroup, count - t0);
    for (int64_t d = 0; d < padded<T>(features); ++d) {
      const int64_t at = d / kWidth<T> * group * kWidth<T> + d % kWidth<T>;
      for (int64_t t = 0; t < group; ++t) {
        packed[at + t * kWidth<T>] = d < features ? candidates[(t0 + t) * features + d] : T(0);
      }
    }
    packed += group * padded<T>(features);
  }
}

// sum_t = (x - c_t)^2, lane by lane, for kCount packed candidates.
template <int kCount, class V, class T>
inline void accumulate(const T* x, const T* packed, int64_t features, V (&sum)[kCount]) {
  for (int t = 0; t < kCount; ++t) sum[t] = V::set1(0);
  int64_t d = 0;
  for (; d + V::kWidth <= features; d += V::kWidth, packed += kCount * V::kWidth) {
    const V row = V::load(x + d);
    for (int t = 0; t < kCount; ++t) {
      const V e = row - V::load(packed + t * V::kWidth);
      sum[t] = fma(e, e, sum[t]);
    }
  }
  if (d == features) return;
  const V row = V::load_first(x + d, features - d);
  for (int t = 0; t < kCount; ++t) {
    const V e = row - V::load(packed + t * V::kWidth);
    sum[t] = fma(e, e, sum[t]);
  }
}

// ||x - c||^2 for one packed centroid.
template <class T>
inline T distance_to(const T* x, const T* packed, int64_t features) {
  typename VecFor<T>::type sum[1];
  accumulate<1>(x, packed, features, sum);
  return reduce_add(sum[0]);
}

// Some rows and what is known of them.
template <class T>
struct Tile {
  int64_t count, features, bytes;  // bytes of a row where it lies
  double scale;
  const T* row[kTile];
  const char* ahead[kTile];  // rows that come later
  T closest[kTile];
  double weight[kTile];
  uint32_t improves[kTile];

  void ask_ahead(int64_t i) const {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead[i] + byte);
  }
};

// Compares a tile's rows with kCount candidates from t on: a bit where one is below `closest`, and what is gained.
template <int kCount, class T>
void compare(Tile<T>& tile, const T* packed, int64_t t, int64_t* gains) {
  using V = typename VecFor<T>::type;
  for (int64_t i = 0; i < tile.count; ++i) {
    if (t == 0) tile.ask_ahead(i);
    V sum[kCount];
    accumulate<kCount>(tile.row[i], packed, tile.features, sum);
    const T before = tile.closest[i];
    int64_t whole = -1;
    for (int j = 0; j < kCount; ++j) {
      const T distance = reduce_add(sum[j]);
      if (!(distance < before)) continue;
      if (whole < 0) whole = to_integer(before, tile.weight[i], tile.scale);
      tile.improves[i] |= 1u << (t + j);
      gains[t + j] += whole - to_integer(distance, tile.weight[i], tile.scale);
    }
  }
}

#if defined(__AVX512F__)

// The lanes of up to 8 vectors added up, each in the order in which reduce_add does.
template <int kCount>
inline __m256 add_lanes(const Vec (&sum)[kCount]) {
  const auto quarter = [&](int t) {
    if (t >= kCount) return _mm_setzero_ps();
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum[t].v), _mm512_extractf32x8_ps(sum[t].v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  };
  const auto four = [&](int t) {
    const __m128 a = quarter(t), b = quarter(t + 1), c = quarter(t + 2), d = quarter(t + 3);
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
  };
  return _mm256_insertf128_ps(_mm256_castps128_ps256(four(0)), kCount > 4 ? four(4) : _mm_setzero_ps(), 1);
}

// The same with the integers of all candidates in one vector, and no branch.
template <int kCount>
void compare_in_vectors(Tile<float>& tile, const float* packed, int64_t t, int64_t* gains) {
  const __m512d scale = _mm512_set1_pd(tile.scale);
  __m512i gained = _mm512_setzero_si512();
  for (int64_t i = 0; i < tile.count; ++i) {
    if (t == 0) tile.ask_ahead(i);
    Vec sum[kCount];
    accumulate<kCount>(tile.row[i], packed, tile.features, sum);
    const __m256 before = _mm256_set1_ps(tile.closest[i]), distances = add_lanes(sum);
    const uint32_t below = _mm256_cmp_ps_mask(distances, before, _CMP_LT_OQ) & ((1u << kCount) - 1);
    tile.improves[i] |= below << t;
    const __m512d weight = _mm512_set1_pd(tile.weight[i]);
    const auto integers = [&](__m256 values) {
      return _mm512_cvtpd_epi64(_mm512_mul_pd(_mm512_mul_pd(_mm512_cvtps_pd(values), weight), scale));
    };
    const __mmask8 counts = tile.weight[i] > 0 ? static_cast<__mmask8>(below) : static_cast<__mmask8>(0);
    gained = _mm512_mask_add_epi64(gained, counts, gained, _mm512_sub_epi64(integers(before), integers(distances)));
  }
  int64_t found[8];
  _mm512_storeu_si512(found, gained);
  for (int j = 0; j < kCount; ++j) gains[t + j] += found[j];
}

#endif

template <class T>
using Compare = void (*)(Tile<T>& tile, const T* packed, int64_t t, int64_t* gains);

template <class T, int kCount>
constexpr Compare<T> compare_of() {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) return compare_in_vectors<kCount>;
#endif
  return compare<kCount, T>;
}

template <class T>
Compare<T> compare_for(int64_t count) {
  static constexpr Compare<T> functions[kGroup] = {compare_of<T, 1>(), compare_of<T, 2>(), compare_of<T, 3>(),
                                                   compare_of<T, 4>(), compare_of<T, 5>(), compare_of<T, 6>(),
                                                   compare_of<T, 7>(), compare_of<T, 8>()};
  return functions[count - 1];
}

// The least of the distances of one row to kCount packed candidates.
template <int kCount, class T>
T least_distance(const T* x, const T* packed, int64_t features) {
  typename VecFor<T>::type sum[kCount];
  accumulate<kCount>(x, packed, features, sum);
  T least = reduce_add(sum[0]);
  for (int t = 1; t < kCount; ++t) least = std::min<T>(least, reduce_add(sum[t]));
  return least;
}

template <class T>
T least_distance(const T* x, const T* packed, int64_t trials, int64_t features) {
  using Least = T (*)(const T* x, const T* packed, int64_t features);
  static constexpr Least functions[kGroup] = {least_distance<1, T>, least_distance<2, T>, least_distance<3, T>,
                                              least_distance<4, T>, least_distance<5, T>, least_distance<6, T>,
                                              least_distance<7, T>, least_distance<8, T>};
  T least = std::numeric_limits<T>::infinity();
  for (int64_t t = 0; t < trials; t += kGroup) {
    const T* group = packed + t * padded<T>(features);
    least = std::min(least, functions[std::min<int64_t>(kGroup, trials - t) - 1](x, group, features));
  }
  return least;
}

// A row within half the way from its centroid to a candidate is not nearer to the candidate. So for squared distances up
// to this limit, `least` from the centroid to any candidate, no computed distance is below that to the centroid. Each is
// a sum of squares known to a relative 2^-24 (2^-53) (features + 8); where squares may underflow there is no limit.
template <class T>
T untouched_limit(T least, int64_t features) {
  const double error = static_cast<double>(features + 8) * std::numeric_limits<T>::epsilon();
  const double limit = 0.25 * (1 - 16 * error) * static_cast<double>(least);
  return std::isfinite(limit) && limit > 1e-25 ? static_cast<T>(limit) : T(-1);
}

// Rows of which it is not known beforehand that no candidate improves them.
template <class T>
struct Untouched {
  const int32_t* centroid = nullptr;  // of each row, which is its closest; null: nothing is known
  const T* limit = nullptr;           // of each centroid
};

// The rows of [first, end) to look at; returns how many.
template <class T>
int64_t rows_to_compare(int64_t first, int64_t end, const T* closest, const Untouched<T>& untouched, int32_t* rows) {
  int64_t count = 0;
  for (int64_t n = first; n < end; ++n) {
    rows[count] = static_cast<int32_t>(n - first);
    count += untouched.centroid ? !(closest[n] <= untouched.limit[untouched.centroid[n]]) : 1;
  }
  return count;
}

// Adds to gains[t] how much the integer potential of rows [first, end), at most a block, falls with candidate t, and
// notes whose it is.
template <class T>
void weigh(const KMeansRows& rows, int64_t b, int64_t first, int64_t end, const T* packed, int64_t trials,
           const T* closest, Weights weights, double scale, int64_t* gains, int32_t* improves,
           const Untouched<T>& untouched = {}) {
  int32_t which[kBlock];
  const int64_t count = rows_to_compare(first, end, closest, untouched, which);
  std::fill(improves + first, improves + end, 0);
  std::vector<T> wide(is_half(rows.dtype) ? kTile * rows.features : 0);
  Tile<T> tile;
  tile.features = rows.features;
  tile.scale = scale;
  tile.bytes = rows.features * size_of(rows.dtype);
  const int64_t ahead = divide_up(kAheadBytes, std::max<int64_t>(1, tile.bytes));
  const char* base = bytes_of(rows, b, first);
  const int64_t stride = rows.row_stride * size_of(rows.dtype);
  for (int64_t i0 = 0; i0 < count; i0 += kTile) {
    tile.count = std::min(kTile, count - i0);
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t n = first + which[i0 + i];
      tile.row[i] = reinterpret_cast<const T*>(base + which[i0 + i] * stride);
      tile.ahead[i] = base + which[std::min(i0 + i + ahead, count - 1)] * stride;
      tile.closest[i] = closest[n];
      tile.weight[i] = weights[n];
      tile.improves[i] = 0;
    }
    for (int64_t i = 0; i < tile.count && !wide.empty(); ++i) {
      T* room = wide.data() + i * rows.features;
      tile.row[i] = row_as<T>(rows, b, first + which[i0 + i], 0, rows.features, room);
    }
    for (int64_t t = 0; t < trials; t += kGroup) {
      const T* group = packed + t * padded<T>(rows.features);
      compare_for<T>(std::min<int64_t>(kGroup, trials - t))(tile, group, t, gains);
    }
    for (int64_t i = 0; i < tile.count; ++i) {
      improves[first + which[i0 + i]] = static_cast<int32_t>(tile.improves[i]);
    }
  }
}

// Lowers `closest` of rows [first, end) to the distance to a packed centroid, of those with the bit where `improves` is
// there; lowered(n, before) for each.
template <class T, class Lowered>
void lower(const KMeansRows& rows, int64_t b, int64_t first, int64_t end, const T* centroid, T* closest,
           const int32_t* improves, int64_t bit, const Lowered& lowered) {
  std::vector<T> wide(is_half(rows.dtype) ? rows.features : 0);
  for (int64_t n = first; n < end; ++n) {
    if (improves && !(static_cast<uint32_t>(improves[n]) >> bit & 1)) continue;
    const T* x = row_as<T>(rows, b, n, 0, rows.features, wide.data());
    const T before = closest[n];
    const T distance = distance_to(x, centroid, rows.features);
    if (!(distance < before)) continue;
    closest[n] = distance;
    lowered(n, before);
  }
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
  int64_t blocks, bounds, totals, gains, limits, closest, centroid, improves, candidates, packed, size;

  Layout(const KMeansRows& rows, int64_t clusters, int64_t trials) : blocks(divide_up(rows.rows, kBlock)) {
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
    closest = take(divide_up(rows.rows * bytes, 8));
    limits = take(clusters);
    centroid = take(divide_up(rows.rows * 4, 8));
    improves = take(divide_up(rows.rows * 4, 8));
    const int64_t most = std::max<int64_t>(1, trials);
    candidates = take(divide_up(most * rows.features * bytes, 8));
    packed = take(divide_up(most * divide_up(rows.features, Vec::kWidth) * Vec::kWidth * bytes, 8));
    size = at;
  }
};

// One entry: a start of one problem.
template <class T>
class Start {
 public:
  Start(const KMeansSeed& a, int64_t entry, int64_t* workspace, int threads)
      : a_(a),
        layout_(a.rows, a.clusters, a.trials),
        b_(entry / (a.entries / a.rows.problems)),
        threads_(threads),
        weights_{a.rows.weights + b_ * a.rows.weight_problem_stride, a.rows.weight_row_stride},
        uniform_(a.uniform + entry * a.clusters * a.trials),
        chosen_(a.chosen + entry * a.clusters),
        bounds_(reinterpret_cast<double*>(workspace + layout_.bounds)),
        totals_(workspace + layout_.totals),
        gains_(workspace + layout_.gains),
        closest_(reinterpret_cast<T*>(workspace + layout_.closest)),
        limits_(reinterpret_cast<T*>(workspace + layout_.limits)),
        centroid_(reinterpret_cast<int32_t*>(workspace + layout_.centroid)),
        improves_(reinterpret_cast<int32_t*>(workspace + layout_.improves)),
        candidates_(reinterpret_cast<T*>(workspace + layout_.candidates)),
        packed_(reinterpret_cast<T*>(workspace + layout_.packed)) {}

  void run() {
    std::fill_n(closest_, a_.rows.rows, T(1));
    std::fill_n(centroid_, a_.rows.rows, 0);
    for (int64_t n = 0; n < a_.rows.rows; ++n) valid_ += weights_[n] > 0;
    for_blocks([&](int64_t i, int64_t first, int64_t end) { bounds_[i] = bound_of(first, end); });
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

  double weighted(int64_t n, T value) const {
    return weights_[n] > 0 ? static_cast<double>(value) * weights_[n] : 0.0;
  }

  double bound_of(int64_t first, int64_t end) const {
    double bound = 0;
    for (int64_t n = first; n < end; ++n) bound = std::max(bound, weighted(n, closest_[n]));
    return bound;
  }

  // The scale on which potentials are integers; where it is another than before, the potential of each block anew.
  void add_up() {
    const double before = scale_;
    scale_ = integer_scale(*std::max_element(bounds_, bounds_ + layout_.blocks), valid_);
    if (scale_ != before) {
      for_blocks([&](int64_t i, int64_t first, int64_t end) {
        totals_[i] = 0;
        for (int64_t n = first; n < end; ++n) totals_[i] += to_integer(closest_[n], weights_[n], scale_);
      });
    }
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
    if (step > 0) {
      pack(candidates_, trials, features, packed_);
      best = best_candidate(step);
    } else {
      std::fill_n(closest_, a_.rows.rows, std::numeric_limits<T>::infinity());
    }
    chosen_[step] = rows[best];
    pack(candidates_ + best * features, 1, features, packed_);
    for_blocks([&](int64_t i, int64_t first, int64_t end) { add_centroid(step, i, first, end, best); });
    if (step == 0) scale_ = 0;
  }

  // What the centroid in `packed_` changes in a block: its potential by what candidate `best` gains, and its bound where
  // a row that had it comes nearer.
  void add_centroid(int64_t step, int64_t i, int64_t first, int64_t end, int64_t best) {
    const bool first_of_all = step == 0;
    bool bound_falls = first_of_all;
    const int32_t* improves = first_of_all ? nullptr : improves_;
    lower(a_.rows, b_, first, end, packed_, closest_, improves, best, [&](int64_t n, T before) {
      centroid_[n] = static_cast<int32_t>(step);
      bound_falls = bound_falls || !(weighted(n, before) < bounds_[i]);
    });
    if (bound_falls) bounds_[i] = bound_of(first, end);
    if (!first_of_all) totals_[i] -= gains_[i * a_.trials + best];
  }

  // Worth it while there are few centroids for so many rows.
  Untouched<T> find_untouched(int64_t step) {
    if (kRowsACentroid * step > a_.rows.rows) return {};
    std::vector<T> wide(is_half(a_.rows.dtype) ? a_.rows.features : 0);
    for (int64_t k = 0; k < step; ++k) {
      const T* centroid = row_as<T>(a_.rows, b_, chosen_[k], 0, a_.rows.features, wide.data());
      const T least = least_distance(centroid, packed_, a_.trials, a_.rows.features);
      limits_[k] = untouched_limit(least, a_.rows.features);
    }
    return {centroid_, limits_};
  }

  // The first of those that leave the smallest potential.
  int64_t best_candidate(int64_t step) {
    const int64_t trials = a_.trials;
    const Untouched<T> untouched = find_untouched(step);
    for_blocks([&](int64_t i, int64_t first, int64_t end) {
      std::fill_n(gains_ + i * trials, trials, 0);
      weigh(a_.rows, b_, first, end, packed_, trials, closest_, weights_, scale_, gains_ + i * trials, improves_,
            untouched);
    });
    int64_t gains[kMaxTrials] = {};
    for (int64_t i = 0; i < layout_.blocks * trials; ++i) gains[i % trials] += gains_[i];
    return std::max_element(gains, gains + trials) - gains;
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
  T* closest_;
  T* limits_;
  int32_t* centroid_;
  int32_t* improves_;
  T* candidates_;
  T* packed_;
  int64_t valid_ = 0, total_ = 0;
  double scale_ = 0;
};

}  // namespace

void kmeans_draws(const KMeansDraws& a, int threads) {
  const int64_t blocks = divide_up(a.positions, kBlock);
  parallel_for(a.problems * a.restarts * blocks, threads, [&](int64_t i, int) {
    const int64_t e = i / blocks, b = e / a.restarts, first = i % blocks * kBlock;
    const uint64_t stream = a.first_stream + static_cast<uint64_t>(e % a.restarts) * a.stream_step;
    for (int64_t n = first; n < std::min(first + kBlock, a.positions); ++n) {
      const auto position = static_cast<uint64_t>(a.position[b * a.positions + n]);
      a.draws[e * a.positions + n] = philox_uniform(a.seed, stream, position);
    }
  });
}

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
      std::vector<T> packed(a.trials * padded<T>(rows.features));
      pack(candidates, a.trials, rows.features, packed.data());
      weigh(rows, e / (a.entries / rows.problems), first, end, packed.data(), a.trials, closest, weights, a.scale[e], part,
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
      std::vector<T> packed(padded<T>(rows.features));
      pack(static_cast<const T*>(a.centroid) + e * rows.features, 1, rows.features, packed.data());
      lower(rows, e / (a.entries / rows.problems), first, end, packed.data(),
            static_cast<T*>(a.closest) + e * a.closest_stride, a.improves ? a.improves + e * rows.rows : nullptr,
            a.improves ? a.chosen[e] : 0, [](int64_t, T) {});
    });
  });
}

int64_t kmeans_seed_workspace(const KMeansRows& rows, int64_t entries, int64_t clusters, int64_t trials, int threads) {
  return (entries < threads ? 1 : threads) * Layout(rows, clusters, trials).size;
}

// Entries are the parallel units where there are enough of them, blocks of rows where not.
void kmeans_seed(const KMeansSeed& a, int threads) {
  const bool many = a.entries >= threads;
  const int64_t size = Layout(a.rows, a.clusters, a.trials).size;
  parallel_for(a.entries, many ? threads : 1, [&](int64_t entry, int thread) {
    int64_t* workspace = static_cast<int64_t*>(a.workspace) + thread * size;
    with_wide(a.rows.dtype, [&](auto wide) { Start<decltype(wide)>(a, entry, workspace, many ? 1 : threads).run(); });
  });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
