#include "sampler.h"

namespace clustops {

namespace {

DType member_dtype(const Tensor& tensor, const char* name) {
  if (tensor.dtype != DType::i32 && tensor.dtype != DType::i64) {
    throw std::invalid_argument(std::string(name) + " must be int32 or int64, got " + name_of(tensor.dtype));
  }
  return tensor.dtype;
}

void expect_vector(const Tensor& tensor, const char* name, DType dtype) {
  expect_dims(tensor, name, 1);
  expect(tensor, name, dtype, Device::cpu, {tensor.shape[0]});
}

MemberTable table_arguments(const Tensor& members, const Tensor& offsets) {
  const DType dtype = member_dtype(members, "members");
  expect_vector(members, "members", dtype);
  expect_vector(offsets, "offsets", DType::i64);
  if (offsets.shape[0] < 2) throw std::invalid_argument("offsets must hold at least 2 numbers");
  return {members.data, offsets.as<const int64_t>(), members.shape[0], offsets.shape[0] - 1, dtype};
}

Replacement replacement_of(const std::string& name) {
  if (name == "cover") return Replacement::cover;
  if (name == "deepcluster") return Replacement::deepcluster;
  if (name == "always") return Replacement::always;
  throw std::invalid_argument("replacement must be cover, deepcluster or always, got " + name);
}

}  // namespace

ClusterMembers cluster_members_arguments(const Labels& labels, const Tensor& cursors, const Tensor& offsets,
                                         const Tensor* members) {
  expect_dims(cursors, "cursors", 2);
  const int64_t ranges = cursors.shape[0], clusters = cursors.shape[1];
  const DType dtype = labels.count < (int64_t{1} << 31) ? DType::i32 : DType::i64;
  if (ranges < 1) throw std::invalid_argument("cursors must have at least 1 row");
  expect(cursors, "cursors", dtype, Device::cpu, {ranges, clusters});
  expect(offsets, "offsets", DType::i64, Device::cpu, {clusters + 1});
  if (members) expect(*members, "members", dtype, Device::cpu, {offsets.as<const int64_t>()[clusters]});
  return {labels,   cursors.data, offsets.as<int64_t>(), members ? members->data : nullptr, ranges,
          clusters, dtype};
}

SamplerOrder sampler_order_arguments(const Tensor& result, const Tensor* positions, int64_t start, int64_t step,
                                     const Tensor& members, const Tensor& offsets, const Tensor& bounds, int64_t seed,
                                     int64_t epoch, const std::string& replacement) {
  const MemberTable table = table_arguments(members, offsets);
  expect(bounds, "bounds", DType::i64, Device::cpu, {table.clusters + 1});
  expect_vector(result, "result", DType::i64);
  const int64_t count = result.shape[0], total = bounds.as<const int64_t>()[table.clusters];
  if (positions) expect(*positions, "positions", DType::i64, Device::cpu, {count});
  if (count > 0 && (total < 1 || total >= int64_t{1} << 60)) {
    throw std::invalid_argument("bounds must end with a number in [1, 2^60), got " + std::to_string(total));
  }
  return {table, bounds.as<const int64_t>(), positions ? positions->as<const int64_t>() : nullptr, start, step, count,
          result.as<int64_t>(), static_cast<uint64_t>(seed), static_cast<uint64_t>(epoch),
          replacement_of(replacement)};
}

SamplerBatches sampler_batches_arguments(const Tensor& result, const Tensor& batches, const Tensor& members,
                                         const Tensor& offsets, const Tensor& clusters, int64_t clusters_per_batch,
                                         int64_t samples_per_cluster, int64_t seed, int64_t epoch) {
  const MemberTable table = table_arguments(members, offsets);
  expect_vector(batches, "batches", DType::i64);
  expect_vector(clusters, "clusters", DType::i64);
  const int64_t count = batches.shape[0], filled = clusters.shape[0];
  constexpr int64_t kMost = int64_t{1} << 31;
  if (clusters_per_batch < 1 || clusters_per_batch > filled) {
    throw std::invalid_argument("clusters_per_batch must be from 1 to the number of clusters");
  }
  if (samples_per_cluster < 1 || samples_per_cluster >= kMost || filled >= kMost) {
    throw std::invalid_argument("samples_per_cluster must be from 1 to 2^31 - 1, and so must the number of clusters");
  }
  expect(result, "result", DType::i64, Device::cpu, {count, clusters_per_batch * samples_per_cluster});
  return {table,  batches.as<const int64_t>(), clusters.as<const int64_t>(), result.as<int64_t>(), count, filled,
          clusters_per_batch, samples_per_cluster, static_cast<uint64_t>(seed), static_cast<uint64_t>(epoch)};
}

}  // namespace clustops
