// The few nearest centroids of each row, by ||x - c||^2 directly: a sorted list a row, nothing N x K.
#include <limits>
#include <vector>

#include "../common/parallel.h"
#include "kmeans_direct.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Rows that meet a group of centroids while it is in the level 1 cache.
constexpr int64_t kRowsAtOnce = 8;
constexpr int64_t kRowsOfUnit = 64;

// The nearest so far, ties to the lowest index: centroids come in ascending order. A NaN ranks with infinity.
template <class T>
struct List {
  int64_t* labels;
  T* distances;
  int64_t size, filled;

  static T rank(T distance) { return distance == distance ? distance : std::numeric_limits<T>::infinity(); }

  void offer(int64_t k, T distance) {
    if (filled == size && !(rank(distance) < rank(distances[size - 1]))) return;
    int64_t place = filled < size ? filled++ : size - 1;
    for (; place > 0 && rank(distance) < rank(distances[place - 1]); --place) {
      labels[place] = labels[place - 1];
      distances[place] = distances[place - 1];
    }
    labels[place] = k;
    distances[place] = distance;
  }
};

// Rows [first, first + count) of problem b, at most kRowsAtOnce.
template <class T>
void nearest_of_rows(const KMeansAssign& a, int64_t top, int64_t b, int64_t first, int64_t count, float* wide) {
  const Rows<T> rows = rows_of<T>(a, b, first, count, wide);
  List<T> lists[kRowsAtOnce];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (b * a.rows + first + i) * top;
    lists[i] = {a.labels + at, static_cast<T*>(a.distances) + at, top, 0};
  }
  for (int64_t k = 0; k < a.clusters; k += kTogether) {
    const T* candidates[kTogether];
    const int64_t used = std::min<int64_t>(kTogether, a.clusters - k);
    for (int64_t j = 0; j < kTogether; ++j) candidates[j] = a.centroid<T>(b, k + std::min(j, used - 1));
    for (int64_t i = 0; i < count; ++i) {
      T distance[kTogether];
      squared_distances(rows[i], candidates, a.features, distance);
      for (int64_t j = 0; j < used; ++j) lists[i].offer(k + j, distance[j]);
    }
  }
}

}  // namespace

void kmeans_nearest(const KMeansAssign& a, int64_t top, int threads) {
  const int64_t units = divide_up(a.rows, kRowsOfUnit);
  parallel_for(a.problems * units, threads, [&](int64_t i, int) {
    const int64_t b = i / units, end = std::min(a.rows, (i % units + 1) * kRowsOfUnit);
    std::vector<float> wide(is_half(a.dtype) ? kRowsAtOnce * a.features : 0);
    for (int64_t n = i % units * kRowsOfUnit; n < end; n += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, end - n);
      if (a.dtype == DType::f64) {
        nearest_of_rows<double>(a, top, b, n, count, nullptr);
      } else {
        nearest_of_rows<float>(a, top, b, n, count, wide.data());
      }
    }
  });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
