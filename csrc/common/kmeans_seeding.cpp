#include "kmeans_seeding.h"

namespace clustops {

namespace {

DType accumulator(const Tensor& x) { return x.dtype == DType::f64 ? DType::f64 : DType::f32; }

// x and, unless null, weights of its problems or (`by_entry`) of entries.
KMeansRows rows_of(const Tensor& x, const Tensor* weights, int64_t weight_rows, Device device) {
  expect_dims(x, "x", 3);
  if (x.dtype == DType::i32 || x.dtype == DType::i64) throw std::invalid_argument("x must be floating point");
  const int64_t problems = x.shape[0], rows = x.shape[1], features = x.shape[2];
  expect(x, "x", x.dtype, device, {problems, rows, features}, 2);
  if (!weights) return {x.data, nullptr, problems, rows, features, x.strides[0], x.strides[1], 0, 0, x.dtype};
  expect(*weights, "weights", DType::f64, device, {weight_rows, rows}, 2);
  return {x.data,       weights->as<const double>(), problems,            rows,   features, x.strides[0],
          x.strides[1], weights->strides[0],         weights->strides[1], x.dtype};
}

void expect_entries(int64_t entries, int64_t problems) {
  if (problems == 0 ? entries != 0 : entries % problems != 0) {
    throw std::invalid_argument("entries must be a multiple of the problems of x");
  }
}

void expect_trials(int64_t trials) {
  if (trials > kMaxTrials) throw std::invalid_argument("a step compares at most 32 candidates");
}

void expect_one_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    if (other->device_index != first.device_index) throw std::invalid_argument("all tensors must be on one device");
  }
}

}  // namespace

KMeansPotentials kmeans_potentials_arguments(const Tensor& x, const Tensor& candidates, const Tensor& closest,
                                             const Tensor& weights, const Tensor& scale, const Tensor& potentials,
                                             const Tensor& improves, Device device) {
  expect_dims(candidates, "candidates", 3);
  const int64_t entries = candidates.shape[0], trials = candidates.shape[1];
  const KMeansRows rows = rows_of(x, &weights, entries, device);
  expect_entries(entries, rows.problems);
  expect_trials(trials);
  expect(candidates, "candidates", accumulator(x), device, {entries, trials, rows.features});
  expect(closest, "closest", accumulator(x), device, {entries, rows.rows});
  expect(scale, "scale", DType::f64, device, {entries});
  expect(potentials, "potentials", DType::i64, device, {entries, trials});
  expect(improves, "improves", DType::i32, device, {entries, rows.rows});
  expect_one_device(x, {&candidates, &closest, &weights, &scale, &potentials, &improves});
  return {rows,
          candidates.data,
          closest.data,
          scale.as<const double>(),
          potentials.as<int64_t>(),
          improves.as<int32_t>(),
          entries,
          trials};
}

KMeansClosest kmeans_closest_arguments(const Tensor& closest, const Tensor& x, const Tensor& centroid,
                                       const Tensor* improves, const Tensor* chosen, Device device) {
  expect_dims(closest, "closest", 2);
  const int64_t entries = closest.shape[0];
  const KMeansRows rows = rows_of(x, nullptr, 0, device);
  expect_entries(entries, rows.problems);
  expect(closest, "closest", accumulator(x), device, {entries, rows.rows}, 1);
  expect(centroid, "centroid", accumulator(x), device, {entries, 1, rows.features});
  if (!improves != !chosen) throw std::invalid_argument("improves and chosen go together");
  if (improves) {
    expect(*improves, "improves", DType::i32, device, {entries, rows.rows});
    expect(*chosen, "chosen", DType::i64, device, {entries});
    expect_one_device(x, {improves, chosen});
  }
  expect_one_device(x, {&closest, &centroid});
  return {rows,
          closest.data,
          centroid.data,
          improves ? improves->as<const int32_t>() : nullptr,
          chosen ? chosen->as<const int64_t>() : nullptr,
          entries,
          closest.strides[0]};
}

KMeansDraws kmeans_draws_arguments(const Tensor& position, const Tensor& draws, int64_t seed, int64_t first_stream,
                                   int64_t stream_step, Device device) {
  expect_dims(position, "position", 2);
  expect_dims(draws, "draws", 2);
  const int64_t problems = position.shape[0], positions = position.shape[1], entries = draws.shape[0];
  expect_entries(entries, problems);
  expect(position, "position", DType::i64, device, {problems, positions});
  expect(draws, "draws", DType::f64, device, {entries, positions});
  expect_one_device(position, {&draws});
  return {position.as<const int64_t>(),
          draws.as<double>(),
          problems,
          problems == 0 ? 0 : entries / problems,
          positions,
          static_cast<uint64_t>(seed),
          static_cast<uint64_t>(first_stream),
          static_cast<uint64_t>(stream_step)};
}

KMeansSeed kmeans_seed_arguments(const Tensor& x, const Tensor& weights, const Tensor& uniform, const Tensor& chosen,
                                 const Tensor& workspace, int64_t workspace_size, Device device) {
  expect_dims(chosen, "chosen", 2);
  expect_dims(uniform, "uniform", 2);
  const int64_t entries = chosen.shape[0], clusters = chosen.shape[1];
  const int64_t trials = clusters > 0 ? uniform.shape[1] / clusters : 0;
  const KMeansRows rows = rows_of(x, &weights, x.dims == 3 ? x.shape[0] : 0, device);
  expect_entries(entries, rows.problems);
  expect_trials(trials);
  if (entries > 0 && rows.rows == 0) throw std::invalid_argument("x must have at least one row");
  expect(uniform, "uniform", DType::f64, device, {entries, clusters * trials});
  expect(chosen, "chosen", DType::i64, device, {entries, clusters});
  expect(workspace, "workspace", DType::i64, device, {workspace_size});
  expect_one_device(x, {&weights, &uniform, &chosen, &workspace});
  return {rows, uniform.as<const double>(), chosen.as<int64_t>(), workspace.data, entries, clusters, trials};
}

}  // namespace clustops
