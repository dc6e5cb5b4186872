// Counting sort of samples by cluster. Ranges of the samples and, where those are few, of the clusters go to threads; a
// range of samples has a row of counts of its own, so that members ascend and no two threads write to one place.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../common/pages.h"
#include "../common/parallel.h"
#include "../common/sampler.h"
#include "sampler_permute.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int64_t kStretch = 1 << 16;  // labels of one unit of work where any thread may take it
constexpr int64_t kPages = 4 << 20;    // bytes of the table made present at a time
constexpr uint64_t kOfNumber = 0x9E3779B97F4A7C15, kOfPlace = 0xD1342543DE82EF95;
constexpr int64_t kAhead = 16;         // labels from asking for memory to its use

// Calls work with the labels in their own type; of 64 bits without a sign, those past 2^63 are negative.
template <class Work>
auto with_labels(const Labels& labels, const Work& work) {
  const auto as = [&](auto label) { return work(static_cast<const decltype(label)*>(labels.data)); };
  switch (labels.bytes) {
    case 1: return labels.has_sign ? as(int8_t()) : as(uint8_t());
    case 2: return labels.has_sign ? as(int16_t()) : as(uint16_t());
    case 4: return labels.has_sign ? as(int32_t()) : as(uint32_t());
    default: return as(int64_t());
  }
}

// A thread's part: a range of the samples and one of the clusters.
struct Part {
  int64_t range, first, end;  // samples
  int64_t low, width;         // clusters

  bool holds(int64_t label) const { return static_cast<uint64_t>(label - low) < static_cast<uint64_t>(width); }
};

template <class Work>
void for_parts(const ClusterMembers& a, int threads, const Work& work) {
  const int64_t shares = std::clamp<int64_t>(threads / a.ranges, 1, std::max<int64_t>(1, a.clusters));
  parallel_for(a.ranges * shares, threads, [&](int64_t i, int) {
    const auto cut = [](int64_t whole, int64_t part, int64_t parts) {
      return whole / parts * part + std::min(part, whole % parts);
    };
    const int64_t range = i / shares, share = i % shares, n = a.labels.count;
    const int64_t low = cut(a.clusters, share, shares), high = cut(a.clusters, share + 1, shares);
    work(Part{range, cut(n, range, a.ranges), cut(n, range + 1, a.ranges), low, high - low});
  });
}

// Whether all labels are below the number of clusters.
template <class T, class Label>
bool count_part(const ClusterMembers& a, const Label* labels, const Part& part) {
  T* counts = static_cast<T*>(a.cursors) + part.range * a.clusters;
  bool below = true;
  for (int64_t i = part.first; i < part.end; ++i) {
    const int64_t label = static_cast<int64_t>(labels[i * a.labels.stride]);
    if (part.holds(label)) {
      ++counts[label];
    } else {
      below &= label < a.clusters;
    }
  }
  return below;
}

template <class T, class Label>
void place_part(const ClusterMembers& a, const Label* labels, const Part& part) {
  T* members = static_cast<T*>(a.members);
  T* cursors = static_cast<T*>(a.cursors) + part.range * a.clusters;
  if (part.width == 0) return;
  const auto label_at = [&](int64_t i) { return static_cast<int64_t>(labels[i * a.labels.stride]); };
  const auto held_at = [&](int64_t i) {
    const int64_t label = label_at(std::min(i, part.end - 1));
    return part.holds(label) ? label : part.low;
  };
  for (int64_t i = part.first; i < part.end; ++i) {
    __builtin_prefetch(cursors + held_at(i + 2 * kAhead), 1);
    __builtin_prefetch(members + cursors[held_at(i + kAhead)], 1);
    const int64_t label = label_at(i);
    if (part.holds(label)) members[cursors[label]++] = static_cast<T>(i);
  }
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

// Of stride 1.
template <class Label>
uint64_t fingerprint_of(const Label* numbers, int64_t first, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t x = static_cast<uint64_t>(static_cast<int64_t>(numbers[i]));
    sum += mixed<uint64_t>(x * kOfNumber + static_cast<uint64_t>(first + i + 1) * kOfPlace);
  }
  return sum;
}

template <class Label>
int64_t largest_of(const Label* labels, int64_t stride, int64_t count) {
  int64_t largest = -1;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<int64_t>(labels[i * stride]));
  return largest;
}

}  // namespace

int64_t largest_label(const Labels& labels, int threads) {
  std::vector<int64_t> most(std::max(1, threads), -1);
  parallel_for((labels.count + kStretch - 1) / kStretch, threads, [&](int64_t i, int thread) {
    const int64_t count = std::min(kStretch, labels.count - i * kStretch);
    const int64_t largest = with_labels(labels, [&](const auto* data) {
      const auto* first = data + i * kStretch * labels.stride;
      return labels.stride == 1 ? largest_of(first, 1, count) : largest_of(first, labels.stride, count);
    });
    most[thread] = std::max(most[thread], largest);
  });
  return *std::max_element(most.begin(), most.end());
}

int64_t fingerprint(const Labels& numbers, int threads) {
  if (numbers.stride != 1 && numbers.count > 1) throw std::invalid_argument("numbers must be contiguous");
  std::atomic<uint64_t> sum{0};
  parallel_for((numbers.count + kStretch - 1) / kStretch, threads, [&](int64_t i, int) {
    const int64_t first = i * kStretch, count = std::min(kStretch, numbers.count - first);
    sum += with_labels(numbers, [&](const auto* data) { return fingerprint_of(data + first, first, count); });
  });
  return static_cast<int64_t>(sum.load());
}

void count_members(const ClusterMembers& a, int threads) {
  const bool narrow = a.dtype == DType::i32;
  std::atomic<bool> below{true};
  for_parts(a, threads, [&](const Part& part) {
    const bool well = with_labels(a.labels, [&](const auto* labels) {
      return narrow ? count_part<int32_t>(a, labels, part) : count_part<int64_t>(a, labels, part);
    });
    if (!well) below = false;
  });
  if (!below) throw std::invalid_argument("labels must be below " + std::to_string(a.clusters));
  narrow ? add_up<int32_t>(a) : add_up<int64_t>(a);
}

void place_members(const ClusterMembers& a, int threads) {
  const bool narrow = a.dtype == DType::i32;
  const int64_t bytes = a.offsets[a.clusters] * (narrow ? 4 : 8);
  wish_huge_pages(a.members, bytes);
  parallel_for((bytes + kPages - 1) / kPages, threads, [&](int64_t i, int) {
    populate_pages(static_cast<char*>(a.members) + i * kPages, std::min(kPages, bytes - i * kPages));
  });
  for_parts(a, threads, [&](const Part& part) {
    with_labels(a.labels, [&](const auto* labels) {
      narrow ? place_part<int32_t>(a, labels, part) : place_part<int64_t>(a, labels, part);
    });
  });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
