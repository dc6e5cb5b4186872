// The samplers' order: position -> slot -> cluster -> place in the member table -> sample, in blocks over threads.
#include "../common/sampler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../common/parallel.h"
#include "sampler_permute.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int64_t kTask = 32 * kBlock;  // numbers of one unit of work: what is not worth a second thread
constexpr uint64_t kLow = 0xffffffffu;

// Finds the cluster of a slot: a table over the high bits of the slot, then halving.
class Finder {
 public:
  Finder(const int64_t* bounds, int64_t clusters, int64_t draws) : bounds_(bounds) {
    const int64_t total = bounds[clusters];
    const int64_t wanted = std::max<int64_t>(1, std::min(draws / 8, 2 * clusters));
    while ((total - 1) >> shift_ >= wanted) ++shift_;
    const int64_t buckets = ((total - 1) >> shift_) + 1;
    first_.reserve(buckets + 1);
    int64_t c = 0, most = 0;
    for (int64_t g = 0; g < buckets; ++g) {
      const int64_t before = c;
      c = last_from(c, clusters - 1, g << shift_);
      most = std::max(most, c - before);
      first_.push_back(c);
    }
    first_.push_back(clusters - 1);
    most = std::max(most, clusters - 1 - c);
    while (int64_t{1} << steps_ <= most) ++steps_;
  }

  // The last cluster with bounds[cluster] <= slot, for 0 <= slot < bounds[clusters].
  int64_t operator()(int64_t slot) const {
    int64_t c = first_[slot >> shift_], left = first_[(slot >> shift_) + 1] - c + 1;
    for (int step = 0; step < steps_; ++step) {
      const int64_t half = left >> 1;
      c += bounds_[c + half] <= slot ? half : 0;
      left -= half;
    }
    return c;
  }

 private:
  // The last in [c, end] that begins at or before the slot: doubling steps, then halving ones.
  int64_t last_from(int64_t c, int64_t end, int64_t slot) const {
    int64_t step = 1;
    for (; c + step <= end && bounds_[c + step] <= slot; step *= 2) c += step;
    for (; step > 0; step /= 2) {
      if (c + step <= end && bounds_[c + step] <= slot) c += step;
    }
    return c;
  }

  const int64_t* bounds_;
  int shift_ = 0, steps_ = 0;
  std::vector<int64_t> first_;
};

// Places in the member table, and the samples there. Places are asked for when they are known and read a block later.
struct Places {
  int64_t at[kBlock];
  int64_t* result;
  int count = 0;

  template <class T>
  void ask(const MemberTable& table) const {
    for (int i = 0; i < count; ++i) __builtin_prefetch(static_cast<const T*>(table.members) + at[i], 0, 2);
  }
  template <class T>
  void read(const MemberTable& table) {
    for (int i = 0; i < count; ++i) result[i] = static_cast<const T*>(table.members)[at[i]];
    count = 0;
  }
};

// Calls fill(block, places) for each block of [first, end), which returns false where a table contradicts itself.
template <class T, class Fill>
bool read_members(const MemberTable& table, int64_t* result, int64_t first, int64_t end, Fill& fill) {
  Places pair[2];
  int turn = 0;
  for (int64_t begin = first; begin < end; begin += kBlock, turn ^= 1) {
    Places& places = pair[turn];
    places.result = result + begin;
    places.count = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
    if (!fill(begin, places)) return false;
    places.ask<T>(table);
    pair[turn ^ 1].read<T>(table);
  }
  pair[turn ^ 1].read<T>(table);
  return true;
}

// Runs task(first, end) over `count` numbers; each says whether the tables were sound.
template <class Task>
void run_tasks(int64_t count, int threads, const Task& task) {
  std::atomic<bool> sound{true};
  parallel_for((count + kTask - 1) / kTask, threads, [&](int64_t i, int) {
    if (!task(i * kTask, std::min(count, (i + 1) * kTask))) sound = false;
  });
  if (!sound) throw std::invalid_argument("members, offsets and bounds must be those of one sampler");
}

// Members of a cluster, or 0 where they do not lie in the table.
inline uint64_t size_of_cluster(const MemberTable& table, int64_t c) {
  const int64_t first = table.offsets[c], end = table.offsets[c + 1];
  return first >= 0 && first <= end && end <= table.samples ? static_cast<uint64_t>(end - first) : 0;
}

// The index of an independent draw from n members.
template <class W>
W draw_of(W slot, W n, uint64_t seed, uint64_t epoch) {
  const uint64_t stream = stream_of(kDraws, epoch);
  W c0 = slot & kLow, c1 = slot >> 32, c2 = W() + (stream & kLow), c3 = W() + (stream >> 32);
  uint64_t low = seed & kLow, high = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    const W p0 = low_product(c0, W() + uint64_t{0xD2511F53}), p1 = low_product(c2, W() + uint64_t{0xCD9E8D57});
    c0 = (p1 >> 32) ^ c1 ^ low, c1 = p1 & kLow, c2 = (p0 >> 32) ^ c3 ^ high, c3 = p0 & kLow;
    low = (low + 0x9E3779B9) & kLow, high = (high + 0xBB67AE85) & kLow;
  }
  return (c0 * n + (c1 * n >> 32)) >> 32;
}

class OrderTask {
 public:
  OrderTask(const SamplerOrder& a, const Keys& key, const Finder& cluster_of)
      : a_(a), key_(key), cluster_of_(cluster_of), total_(static_cast<uint64_t>(a.bounds[a.table.clusters])) {
    const uint64_t side = static_cast<uint64_t>(std::ceil(std::sqrt(static_cast<double>(total_))));
    std::fill_n(slots_.n, kBlock, total_);
    std::fill_n(slots_.t, kBlock, key.slot_tweak);
    std::fill_n(slots_.a, kBlock, side);
    std::fill_n(slots_.b, kBlock, (total_ + side - 1) / side);
  }

  bool operator()(int64_t begin, Places& places) {
    const int count = places.count;
    for (int i = 0; i < count; ++i) slots_.x[i] = position(begin + i);
    permute(slots_, count, total_, key_);
    for (int i = 0; i < count; ++i) {
      const int64_t c = cluster_of_(static_cast<int64_t>(slots_.image[i]));
      cluster_[i] = static_cast<uint64_t>(c);
      __builtin_prefetch(a_.table.offsets + c);
    }
    for (int i = 0; i < count; ++i) {
      const int64_t slot = static_cast<int64_t>(slots_.image[i]), c = static_cast<int64_t>(cluster_[i]);
      first_[i] = a_.table.offsets[c];
      members_.n[i] = size_of_cluster(a_.table, c);
      members_.x[i] = static_cast<uint64_t>(slot - a_.bounds[c]);
      quota_[i] = static_cast<uint64_t>(a_.bounds[c + 1] - a_.bounds[c]);
      if (members_.n[i] == 0 || members_.x[i] >= quota_[i]) return false;
    }
    total_ < kExact ? draw<Words>(count) : draw<uint64_t>(count);
    for (int i = 0; i < count; ++i) places.at[i] = first_[i] + static_cast<int64_t>(members_.image[i]);
    return true;
  }

 private:
  uint64_t position(int64_t i) const {
    const int64_t p = a_.positions ? a_.positions[i] : a_.start + a_.step * i;
    const int64_t total = static_cast<int64_t>(total_);
    if (p >= 0 && p < total) return static_cast<uint64_t>(p);
    return static_cast<uint64_t>(p % total + (p % total < 0 ? total : 0));
  }

  // The image of each x below its quota.
  template <class W>
  void draw(int count) {
    constexpr int lanes = sizeof(W) / sizeof(uint64_t);
    if (a_.replacement != Replacement::always) {
      for (int i = 0; i < count; i += lanes) {
        const W n = load_words<W>(members_.n + i), j = load_words<W>(members_.x + i), pass = quotient(j, n);
        store_words<W>(j - pass * n, members_.x + i);
        store_words(tweak_of(load_words<W>(cluster_ + i), pass, key_), members_.t + i);
      }
      shape_cells(members_, count);
      permute(members_, count, 0, key_);
    }
    if (a_.replacement == Replacement::cover) return;
    for (int i = 0; i < count; i += lanes) {
      const W slot = load_words<W>(slots_.image + i), n = load_words<W>(members_.n + i);
      store_words(draw_of(slot, n, a_.seed, a_.epoch), draws_ + i);
    }
    for (int i = 0; i < count; ++i) {
      const bool exceeds = a_.replacement == Replacement::deepcluster && members_.n[i] > quota_[i];
      if (!exceeds) members_.image[i] = draws_[i];
    }
  }

  const SamplerOrder& a_;
  const Keys& key_;
  const Finder& cluster_of_;
  const uint64_t total_;
  Block slots_, members_;
  alignas(64) uint64_t cluster_[kBlock] = {}, quota_[kBlock], draws_[kBlock];
  int64_t first_[kBlock];
};

class BatchTask {
 public:
  BatchTask(const SamplerBatches& a, const Keys& of_clusters, const Keys& of_members)
      : a_(a), of_clusters_(of_clusters), of_members_(of_members) {
    std::fill_n(clusters_.n, kBlock, static_cast<uint64_t>(a.filled));
    shape_cells(clusters_, kBlock);
  }

  // Number e of the result belongs to row e div samples_per_cluster: one cluster of one batch.
  bool operator()(int64_t begin, Places& places) {
    const int64_t first_row = begin / a_.samples_per_cluster;
    const int64_t last_row = (begin + places.count - 1) / a_.samples_per_cluster;
    if (!choose_clusters(first_row, static_cast<int>(last_row - first_row) + 1)) return false;
    for (int i = 0; i < places.count; ++i) {
      const int64_t row = (begin + i) / a_.samples_per_cluster - first_row;
      const int64_t j = (begin + i) % a_.samples_per_cluster;
      members_.n[i] = size_[row], members_.x[i] = static_cast<uint64_t>(j), row_[i] = static_cast<int>(row);
    }
    for (int i = 0; i < places.count; ++i) {
      const uint64_t again = members_.x[i] / members_.n[i], c = cluster_[row_[i]];
      members_.x[i] -= again * members_.n[i];
      members_.t[i] = tweak_of<uint64_t>(c, pass_[row_[i]] * static_cast<uint64_t>(a_.samples_per_cluster) + again,
                                         of_members_);
    }
    shape_cells(members_, places.count);
    permute(members_, places.count, 0, of_members_);
    for (int i = 0; i < places.count; ++i) {
      places.at[i] = a_.table.offsets[cluster_[row_[i]]] + static_cast<int64_t>(members_.image[i]);
    }
    return true;
  }

 private:
  bool choose_clusters(int64_t first_row, int rows) {
    const int64_t per_pass = a_.filled / a_.clusters_per_batch;
    for (int r = 0; r < rows; ++r) {
      const int64_t batch = a_.batches[(first_row + r) / a_.clusters_per_batch];
      if (batch < 0) return false;
      pass_[r] = static_cast<uint64_t>(batch / per_pass);
      clusters_.x[r] = static_cast<uint64_t>(batch % per_pass * a_.clusters_per_batch +
                                             (first_row + r) % a_.clusters_per_batch);
      clusters_.t[r] = tweak_of<uint64_t>(pass_[r], 0, of_clusters_);
    }
    permute(clusters_, rows, 0, of_clusters_);
    for (int r = 0; r < rows; ++r) {
      const int64_t c = a_.clusters[clusters_.image[r]];
      if (c < 0 || c >= a_.table.clusters) return false;
      cluster_[r] = static_cast<uint64_t>(c), size_[r] = size_of_cluster(a_.table, c);
      if (size_[r] == 0) return false;
    }
    return true;
  }

  const SamplerBatches& a_;
  const Keys &of_clusters_, &of_members_;
  Block clusters_, members_;
  uint64_t pass_[kBlock], cluster_[kBlock], size_[kBlock];
  int row_[kBlock];
};

}  // namespace

void sampler_order(const SamplerOrder& a, int threads) {
  if (a.count == 0) return;
  const Keys key(a.seed, a.epoch, kOrder);
  const Finder cluster_of(a.bounds, a.table.clusters, a.count);
  run_tasks(a.count, threads, [&](int64_t first, int64_t end) {
    OrderTask task(a, key, cluster_of);
    const auto read = a.table.dtype == DType::i32 ? read_members<int32_t, OrderTask> : read_members<int64_t, OrderTask>;
    return read(a.table, a.result, first, end, task);
  });
}

void sampler_batches(const SamplerBatches& a, int threads) {
  const Keys of_clusters(a.seed, a.epoch, kBatchClusters), of_members(a.seed, a.epoch, kBatchMembers);
  run_tasks(a.count * a.clusters_per_batch * a.samples_per_cluster, threads, [&](int64_t first, int64_t end) {
    BatchTask task(a, of_clusters, of_members);
    const auto read = a.table.dtype == DType::i32 ? read_members<int32_t, BatchTask> : read_members<int64_t, BatchTask>;
    return read(a.table, a.result, first, end, task);
  });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
