// The k-means update: column bounds, exact sums by label, means, counts.
//
// Every summand is rounded to a grid of a power of two that is coarse enough for fp64 to hold all partial sums exactly,
// what that cuts off to a finer grid. So any order of the additions gives the same bits.
#include "../common/kmeans_update.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../common/parallel.h"
#include "../common/simd_double.h"
#include "kmeans_rows.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Rows of one unit of the bounds.
constexpr int64_t kBoundRows = 2048;
// Rows whose magnitudes are compared at once.
constexpr int kAtOnce = 4;
// Features of one unit of the sums: whole cache lines of x and of the sums.
constexpr int64_t kSlice = 32;

// Magnitudes compare as the integers of their bits do, and a NaN is above them all.
inline int32_t magnitude(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffff;
}
inline int64_t magnitude(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffffffffffff;
}

template <class Bits, class T>
void raise(Bits* most, const T* const (&rows)[kAtOnce], int64_t features) {
  for (int64_t d = 0; d < features; ++d) {
    const Bits one = std::max<Bits>(magnitude(rows[0][d]), magnitude(rows[1][d]));
    const Bits other = std::max<Bits>(magnitude(rows[2][d]), magnitude(rows[3][d]));
    most[d] = std::max(most[d], std::max(one, other));
  }
}

template <class T>
void raise_weighted(int64_t* most, const T* row, double weight, int64_t features) {
  for (int64_t d = 0; d < features; ++d) most[d] = std::max(most[d], magnitude(weight * static_cast<double>(row[d])));
}

double value_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
double value_of(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Bounds of rows [first, end) of problem b, all of weight 1.
template <class T>
void bounds_of_rows(const KMeansRows& rows, int64_t b, int64_t first, int64_t end, double* bounds) {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  std::vector<T> wide(kAtOnce * rows.features);
  std::vector<Bits> most(rows.features);
  for (int64_t n = first; n < end; n += kAtOnce) {
    const T* at[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      at[i] = row_as<T>(rows, b, std::min(n + i, end - 1), 0, rows.features, wide.data() + i * rows.features);
    }
    raise(most.data(), at, rows.features);
  }
  for (int64_t d = 0; d < rows.features; ++d) bounds[d] = value_of(most[d]);
  bounds[rows.features] = first < end ? 1.0 : 0.0;
}

template <class T>
void bounds_of_weighted(const KMeansRows& rows, int64_t b, int64_t first, int64_t end, double* bounds) {
  std::vector<T> wide(rows.features);
  std::vector<int64_t> most(rows.features + 1);
  const double one = 1.0;
  for (int64_t n = first; n < end; ++n) {
    const double weight = rows.weight(b, n);
    if (weight <= 0) continue;
    raise_weighted(most.data(), row_as<T>(rows, b, n, 0, rows.features, wide.data()), weight, rows.features);
    raise_weighted(most.data() + rows.features, &one, weight, 1);
  }
  for (int64_t d = 0; d <= rows.features; ++d) bounds[d] = value_of(most[d]);
}

// One column of the grids. Adding and taking away `shift` = 1.5 2^52 unit rounds to a multiple of unit.
struct Grid {
  std::vector<double> unit, finer, shift, finer_shift;
  bool shifts = true;

  Grid(const double* grid, int64_t columns, int64_t first, int64_t count)
      : unit(grid + first, grid + first + count), finer(grid + columns + first, grid + columns + first + count) {
    for (int64_t d = 0; d < count; ++d) {
      shift.push_back(0x1.8p52 * unit[d]);
      finer_shift.push_back(0x1.8p52 * finer[d]);
      // Of two rows and more, summands are below 2^51 units; not of one, nor is that known at the ends of the range.
      shifts = shifts && unit[d] <= 0x1p52 * finer[d] && finer[d] > 0x1p-1022 && unit[d] < 0x1p960;
    }
  }
};

// The sums of a few columns of one cluster.
struct Sums {
  double* high;
  double* low;
};

inline void fold(double value, double unit, double finer, double& high, double& low) {
  high = std::nearbyint(value * (1 / unit)) * unit;
  low = std::nearbyint((value - high) * (1 / finer)) * finer;
}

// Adds w x on the grids to one cluster and takes it from another, in columns [0, count).
template <bool kWeighted, bool kTo, bool kFrom, class T>
void move_row(const T* x, double weight, const Grid& grid, int64_t count, Sums to, Sums from) {
  const VecD w = VecD::set1(weight);
  int64_t d = 0;
  for (; grid.shifts && d + VecD::kWidth <= count; d += VecD::kWidth) {
    const VecD shift = VecD::load(grid.shift.data() + d), finer_shift = VecD::load(grid.finer_shift.data() + d);
    VecD value = load_wide(x + d);
    if (kWeighted) value = value * w;
    const VecD high = (value + shift) - shift;
    const VecD low = ((value - high) + finer_shift) - finer_shift;
    if (kTo) {
      store(VecD::load(to.high + d) + high, to.high + d);
      store(VecD::load(to.low + d) + low, to.low + d);
    }
    if (kFrom) {
      store(VecD::load(from.high + d) - high, from.high + d);
      store(VecD::load(from.low + d) - low, from.low + d);
    }
  }
  for (; d < count; ++d) {
    double high, low;
    fold(weight * static_cast<double>(x[d]), grid.unit[d], grid.finer[d], high, low);
    if (kTo) to.high[d] += high, to.low[d] += low;
    if (kFrom) from.high[d] -= high, from.low[d] -= low;
  }
}

// Columns [first, first + count) of one problem's sums, for the clusters [low, high).
struct Part {
  int64_t b, first, count, low, high;

  bool holds(int64_t cluster) const { return cluster >= low && cluster < high; }
};

template <bool kWeighted, class T>
void sum_part(const KMeansSums& a, const Part& part) {
  const KMeansRows& rows = a.rows;
  const int64_t columns = rows.features + 1, features = std::min(part.count, rows.features - part.first);
  const Grid grid(a.grid + part.b * 2 * columns, columns, part.first, part.count);
  const bool with_mass = features < part.count;
  std::vector<T> wide(features);
  double* sums = a.sums + part.b * 2 * a.clusters * columns + part.first;
  const auto sums_of = [&](int64_t k) { return Sums{sums + k * columns, sums + (a.clusters + k) * columns}; };
  const int64_t* labels = a.labels + part.b * rows.rows;
  const int64_t* before = a.before ? a.before + part.b * rows.rows : nullptr;
  int64_t* counts = a.counts + part.b * a.clusters;

  for (int64_t n = 0; n < rows.rows; ++n) {
    const int64_t to = labels[n], from = before ? before[n] : -1;
    if (to == from) continue;
    const bool comes = part.holds(to), leaves = part.holds(from);
    const double weight = rows.weight(part.b, n);
    if (!(comes || leaves) || !(weight > 0)) continue;
    const Sums there = sums_of(comes ? to : from), here = sums_of(leaves ? from : to);
    const T* x = row_as<T>(rows, part.b, n, part.first, features, wide.data());
    if (comes && leaves) {
      move_row<kWeighted, true, true>(x, weight, grid, features, there, here);
    } else if (comes) {
      move_row<kWeighted, true, false>(x, weight, grid, features, there, here);
    } else {
      move_row<kWeighted, false, true>(x, weight, grid, features, there, here);
    }
    if (!with_mass) continue;
    double high, low;
    fold(weight, grid.unit[features], grid.finer[features], high, low);
    if (comes) there.high[features] += high, there.low[features] += low, ++counts[to];
    if (leaves) here.high[features] -= high, here.low[features] -= low, --counts[from];
  }
}

// One block of the means of problem b; the part of the shift that it makes.
template <class T>
double means_of_block(const KMeansMeans& a, int64_t b, int64_t first, int64_t end) {
  const int64_t columns = a.features + 1;
  const double* high = a.sums + b * 2 * a.clusters * columns;
  const double* low = high + a.clusters * columns;
  const T* previous = static_cast<const T*>(a.previous) + b * a.clusters * a.features;
  T* means = static_cast<T*>(a.means) + b * a.clusters * a.features;
  VecD moved = VecD::set1(0);
  double shift = 0;
  for (int64_t i = first; i < end;) {
    // Each cluster's sums end in its mass, so those of element i lie at i + k.
    const int64_t k = i / a.features, stop = std::min(end, (k + 1) * a.features);
    const double mass = high[k * columns + a.features] + low[k * columns + a.features];
    if (!(mass > 0)) {
      std::copy(previous + i, previous + stop, means + i);
      i = stop;
      continue;
    }
    for (; i + VecD::kWidth <= stop; i += VecD::kWidth) {
      const VecD sum = VecD::load(high + i + k) + VecD::load(low + i + k);
      store(sum / VecD::set1(mass), means + i);
      const VecD step = load_wide(means + i) - load_wide(previous + i);
      moved = moved + step * step;
    }
    for (; i < stop; ++i) {
      means[i] = static_cast<T>((high[i + k] + low[i + k]) / mass);
      const double step = static_cast<double>(means[i]) - static_cast<double>(previous[i]);
      shift += step * step;
    }
  }
  return shift + reduce_add(moved);
}

}  // namespace

void kmeans_bounds(const KMeansBounds& a, int threads) {
  const KMeansRows& rows = a.rows;
  const int64_t columns = rows.features + 1, most = std::max<int64_t>(1, 4 * threads);
  const int64_t blocks = std::clamp<int64_t>(divide_up(rows.rows, kBoundRows), 1, most);
  const int64_t size = divide_up(rows.rows, blocks);
  std::vector<double> parts(rows.problems * blocks * columns);
  parallel_for(rows.problems * blocks, threads, [&](int64_t i, int) {
    const int64_t b = i / blocks, first = std::min(i % blocks * size, rows.rows);
    const int64_t end = std::min(first + size, rows.rows);
    with_wide(rows.dtype, [&](auto wide) {
      using T = decltype(wide);
      (all_one(rows) ? bounds_of_rows<T> : bounds_of_weighted<T>)(rows, b, first, end, parts.data() + i * columns);
    });
  });
  for (int64_t b = 0; b < rows.problems; ++b) {
    for (int64_t d = 0; d < columns; ++d) {
      int64_t bits = 0;
      for (int64_t i = 0; i < blocks; ++i) bits = std::max(bits, magnitude(parts[(b * blocks + i) * columns + d]));
      a.bounds[b * columns + d] = value_of(bits);
    }
  }
}

// A unit of work owns its part of the sums, columns first, then clusters too: no two threads write to the same place.
void kmeans_sums(const KMeansSums& a, int threads) {
  const KMeansRows& rows = a.rows;
  const int64_t columns = rows.features + 1;
  if (rows.problems == 0 || rows.rows == 0 || a.clusters == 0) return;
  const int64_t wanted = threads > 1 ? divide_up(4 * threads, rows.problems) : 1;
  const int64_t slices = std::max<int64_t>(1, rows.features / kSlice);
  const int64_t wide = std::max<int64_t>(1, slices / wanted);
  const int64_t count = divide_up(slices, wide);
  const int64_t ranges = std::min(a.clusters, divide_up(wanted, count));
  parallel_for(rows.problems * count * ranges, threads, [&](int64_t i, int) {
    const int64_t slice = i / ranges % count, range = i % ranges;
    const int64_t first = slice * wide * kSlice;
    const int64_t end = slice == count - 1 ? columns : first + wide * kSlice;
    const Part part{i / ranges / count, first, end - first, range * a.clusters / ranges,
                    (range + 1) * a.clusters / ranges};
    with_wide(rows.dtype, [&](auto wide_type) {
      using T = decltype(wide_type);
      (all_one(rows) ? sum_part<false, T> : sum_part<true, T>)(a, part);
    });
  });
}

void kmeans_means(const KMeansMeans& a, int threads) {
  const int64_t elements = a.clusters * a.features, blocks = kmeans_means_blocks(elements);
  parallel_for(a.problems * blocks, threads, [&](int64_t i, int) {
    const int64_t first = i % blocks * kMeansBlock, end = std::min(first + kMeansBlock, elements);
    const auto block = a.dtype == DType::f64 ? means_of_block<double> : means_of_block<float>;
    a.workspace[i] = block(a, i / blocks, first, end);
  });
  for (int64_t b = 0; b < a.problems; ++b) {
    a.shift[b] = 0;
    for (int64_t i = 0; i < blocks; ++i) a.shift[b] += a.workspace[b * blocks + i];
  }
}

void kmeans_counts(const KMeansCounts& a, int threads) {
  parallel_for(a.problems, threads, [&](int64_t b, int) {
    int64_t* counts = a.counts + b * a.clusters;
    std::fill_n(counts, a.clusters, 0);
    for (int64_t n = 0; n < a.rows; ++n) {
      const int64_t label = a.labels[b * a.rows + n];
      const double weight = a.weights[b * a.weight_problem_stride + n * a.weight_row_stride];
      if (label >= 0 && label < a.clusters && weight > 0) ++counts[label];
    }
  });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
