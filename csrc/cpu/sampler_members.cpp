// Counting sort of samples by cluster. Ranges of the samples, and where those are few, ranges of the clusters, go to
// threads; a range of samples has a column of counts of its own, so that members ascend and no two threads write to
// one place.
#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "../common/pages.h"
#include "../common/parallel.h"
#include "../common/sampler.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int64_t kPiece = 1024;       // labels at a time, widened in the level 1 cache
constexpr int64_t kStretch = 64 * kPiece;  // labels of one unit of work where any thread may take it

template <class T>
void widen(const Labels& labels, int64_t first, int64_t count, int64_t* wide) {
  const T* from = static_cast<const T*>(labels.data) + first * labels.stride;
  if (labels.stride == 1) {
    for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<int64_t>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<int64_t>(from[i * labels.stride]);
  }
}

using Widen = void (*)(const Labels&, int64_t, int64_t, int64_t*);

Widen widen_of(const Labels& labels) {
  switch (labels.bytes) {
    case 1: return labels.has_sign ? widen<int8_t> : widen<uint8_t>;
    case 2: return labels.has_sign ? widen<int16_t> : widen<uint16_t>;
    case 4: return labels.has_sign ? widen<int32_t> : widen<uint32_t>;
    default: return widen<int64_t>;
  }
}

// use(piece, first, count) for the labels [first, end), a piece at a time.
template <class Use>
void for_pieces(const Labels& labels, int64_t first, int64_t end, const Use& use) {
  int64_t piece[kPiece];
  const Widen widen_piece = widen_of(labels);
  for (; first < end; first += kPiece) {
    const int64_t count = std::min(kPiece, end - first);
    widen_piece(labels, first, count, piece);
    use(piece, first, count);
  }
}

// One thread's part: a range of the samples and one of the clusters.
struct Part {
  int64_t range, first, end;  // samples
  int64_t low, width;         // clusters

  bool holds(int64_t label) const { return static_cast<uint64_t>(label - low) < static_cast<uint64_t>(width); }
};

template <class Work>
void for_parts(const ClusterMembers& a, int threads, const Work& work) {
  const int64_t shares = std::max<int64_t>(1, threads / a.ranges);
  parallel_for(a.ranges * shares, threads, [&](int64_t i, int) {
    const int64_t range = i / shares, share = i % shares, n = a.labels.count;
    const auto cut = [](int64_t whole, int64_t part, int64_t parts) {
      return whole / parts * part + std::min(part, whole % parts);
    };
    const int64_t low = cut(a.clusters, share, shares), high = cut(a.clusters, share + 1, shares);
    work(Part{range, cut(n, range, a.ranges), cut(n, range + 1, a.ranges), low, high - low});
  });
}

// Whether all labels are below the number of clusters.
template <class T>
bool count_part(const ClusterMembers& a, const Part& part) {
  T* counts = static_cast<T*>(a.cursors) + part.range * a.clusters;
  int64_t largest = -1;
  for_pieces(a.labels, part.first, part.end, [&](const int64_t* labels, int64_t, int64_t count) {
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, labels[i]);
    for (int64_t i = 0; i < count; ++i) {
      if (part.holds(labels[i])) ++counts[labels[i]];
    }
  });
  return largest < a.clusters;
}

template <class T>
void place_part(const ClusterMembers& a, const Part& part) {
  T* members = static_cast<T*>(a.members);
  T* cursors = static_cast<T*>(a.cursors) + part.range * a.clusters;
  for_pieces(a.labels, part.first, part.end, [&](const int64_t* labels, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (part.holds(labels[i])) members[cursors[labels[i]]++] = static_cast<T>(first + i);
    }
  });
}

// Counts become places in the table: first those of a cluster's earlier samples.
template <class T>
void add_up(const ClusterMembers& a) {
  T* cursors = static_cast<T*>(a.cursors);
  int64_t at = 0;
  for (int64_t c = 0; c < a.clusters; ++c) {
    a.offsets[c] = at;
    for (int64_t range = 0; range < a.ranges; ++range) {
      T& cursor = cursors[range * a.clusters + c];
      const int64_t count = cursor;
      cursor = static_cast<T>(at);
      at += count;
    }
  }
  a.offsets[a.clusters] = at;
}

}  // namespace

int64_t largest_label(const Labels& labels, int threads) {
  std::vector<int64_t> most(std::max(1, threads), -1);
  parallel_for((labels.count + kStretch - 1) / kStretch, threads, [&](int64_t i, int thread) {
    int64_t largest = -1;
    for_pieces(labels, i * kStretch, std::min(labels.count, (i + 1) * kStretch),
               [&](const int64_t* piece, int64_t, int64_t count) {
                 for (int64_t k = 0; k < count; ++k) largest = std::max(largest, piece[k]);
               });
    most[thread] = std::max(most[thread], largest);
  });
  return *std::max_element(most.begin(), most.end());
}

void count_members(const ClusterMembers& a, int threads) {
  const bool narrow = a.dtype == DType::i32;
  std::atomic<bool> below{true};
  for_parts(a, threads, [&](const Part& part) {
    if (!(narrow ? count_part<int32_t> : count_part<int64_t>)(a, part)) below = false;
  });
  if (!below) throw std::invalid_argument("labels must be below " + std::to_string(a.clusters));
  narrow ? add_up<int32_t>(a) : add_up<int64_t>(a);
}

void place_members(const ClusterMembers& a, int threads) {
  const bool narrow = a.dtype == DType::i32;
  wish_huge_pages(a.members, a.offsets[a.clusters] * (narrow ? 4 : 8));
  for_parts(a, threads, [&](const Part& part) { (narrow ? place_part<int32_t> : place_part<int64_t>)(a, part); });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
