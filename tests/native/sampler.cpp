// Runs the samplers' kernels outside Python, so that a sanitizer can watch them (CLUSTOPS_ISA names the instruction
// set). stdin: int64 labels, clusters, ranges, positions, batches, clusters a batch, samples a cluster, seed, epoch,
// threads; then int32 labels, bounds, positions, batches. stdout: the largest label, the labels' fingerprint, offsets,
// members, the order by each policy, batches; and the places of the last 1000 positions in tables that reach past 2^33,
// samples past 2^31.
#include "../../csrc/cpu/sampler.cpp"
#include "../../csrc/cpu/sampler_members.cpp"
#include "stream.h"

namespace kernel = clustops::cpu::CLUSTOPS_ISA;
using clustops::DType;
using clustops::Replacement;

constexpr Replacement kPolicies[] = {Replacement::cover, Replacement::deepcluster, Replacement::always};

// Places only: the table is not there.
void write_far_places() {
  const std::vector<int64_t> offsets{0, 2147483647, 2147483652, 4294967299, 4311744516};
  const std::vector<int64_t> bounds{0, 10, 20, (int64_t{1} << 34) - 500, int64_t{1} << 34};
  const int64_t total = bounds.back();
  for (const Replacement policy : kPolicies) {
    std::vector<int64_t> places(1000);
    const clustops::SamplerOrder a{{nullptr, offsets.data(), offsets.back(), 4, DType::i64}, bounds.data(), nullptr,
                                   total - 1000, 1, 1000, places.data(), 1, 0, policy};
    const kernel::Keys key(a.seed, a.epoch, kernel::kOrder);
    const kernel::Finder finder(a.bounds, 4, a.count);
    kernel::OrderTask task(a, key, finder);
    for (int64_t begin = 0; begin < a.count; begin += kernel::kBlock) {
      kernel::Places block;
      block.count = static_cast<int>(std::min<int64_t>(kernel::kBlock, a.count - begin));
      if (!task(begin, block)) std::exit(4);
      std::copy_n(block.at, block.count, places.data() + begin);
    }
    write(places);
  }
}

void write_far_samples() {
  const int32_t label = 1;
  std::vector<int64_t> cursors{0, 2}, offsets{0, 0, 7}, members(7);
  const int64_t first = (int64_t{1} << 31) - 2;
  kernel::place_part<int64_t>(
      {{&label, first + 5, 0, 4, true}, cursors.data(), offsets.data(), members.data(), 1, 2, DType::i64}, &label,
      {0, first, first + 5, 0, 2});
  write(members);
}

int main() {
  const std::vector<int64_t> size = read<int64_t>(10);
  const int64_t n = size[0], k = size[1], ranges = size[2], count = size[3], batches = size[4];
  const int64_t per_batch = size[5], per_cluster = size[6];
  const uint64_t seed = static_cast<uint64_t>(size[7]), epoch = static_cast<uint64_t>(size[8]);
  const int threads = static_cast<int>(size[9]);
  const auto data = read<int32_t>(n);
  const auto bounds = read<int64_t>(k + 1), positions = read<int64_t>(count), numbers = read<int64_t>(batches);

  const clustops::Labels labels{data.data(), n, 1, 4, true};
  std::vector<int32_t> cursors(ranges * k);
  std::vector<int64_t> offsets(k + 1);
  clustops::ClusterMembers table{labels, cursors.data(), offsets.data(), nullptr, ranges, k, DType::i32};
  write(std::vector<int64_t>{kernel::largest_label(labels, threads), kernel::fingerprint(labels, threads)});
  kernel::count_members(table, threads);
  std::vector<int32_t> members(offsets[k]);
  table.members = members.data();
  kernel::place_members(table, threads);
  write(offsets);
  write(members);

  const clustops::MemberTable drawn{members.data(), offsets.data(), offsets[k], k, DType::i32};
  for (const Replacement policy : kPolicies) {
    std::vector<int64_t> order(count);
    kernel::sampler_order(
        {drawn, bounds.data(), positions.data(), 0, 1, count, order.data(), seed, epoch, policy}, threads);
    write(order);
  }
  std::vector<int64_t> filled, result(batches * per_batch * per_cluster);
  for (int64_t c = 0; c < k; ++c) {
    if (offsets[c + 1] > offsets[c]) filled.push_back(c);
  }
  kernel::sampler_batches({drawn, numbers.data(), filled.data(), result.data(), batches,
                           static_cast<int64_t>(filled.size()), per_batch, per_cluster, seed, epoch},
                          threads);
  write(result);
  write_far_places();
  write_far_samples();
}
