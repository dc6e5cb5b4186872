// Runs the CUDA kernels of the k-means update on the CPU (simt.h), so that a sanitizer can watch them.
// Arguments: operation, order of the threads of a block (0, 1, 2), dtype of x, sizes. stdin: the inputs one after the
// other; stdout: the results. The main of all operations, so that the kernels compile once.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "simt.h"

namespace {

using namespace clustops;

template <class T>
struct Array {
  std::vector<T> values;

  static Array read(int64_t count) {
    Array array{std::vector<T>(static_cast<std::size_t>(count))};
    if (count > 0 && std::fread(array.values.data(), sizeof(T), array.values.size(), stdin) != array.values.size()) {
      std::exit(3);
    }
    return array;
  }
  // Room for a result, full of what no result is.
  static Array room(int64_t count) {
    Array array{std::vector<T>(static_cast<std::size_t>(count))};
    if (count > 0) std::memset(array.values.data(), 0xcd, sizeof(T) * array.values.size());
    return array;
  }
  void write() const {
    if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
  }
  T* data() { return values.data(); }
};

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

void bounds(DType dtype, const int64_t* size) {
  const int64_t b = size[0], n = size[1], d = size[2];
  auto x = Array<char>::read(b * n * d * size_of(dtype));
  auto weights = Array<double>::read(b * n);
  auto found = Array<double>::room(b * (d + 1));
  cuda::kmeans_bounds({{x.data(), weights.data(), b, n, d, n * d, d, n, 1, dtype}, found.data()}, nullptr);
  found.write();
}

void sums(DType dtype, const int64_t* size) {
  const int64_t b = size[0], n = size[1], d = size[2], k = size[3], with_before = size[4];
  auto x = Array<char>::read(b * n * d * size_of(dtype));
  auto weights = Array<double>::read(b * n);
  auto labels = Array<int64_t>::read(b * n), before = Array<int64_t>::read(with_before ? b * n : 0);
  auto grid = Array<double>::read(b * 2 * (d + 1));
  auto found = Array<double>::read(b * 2 * k * (d + 1));
  auto counts = Array<int64_t>::read(b * k);
  cuda::kmeans_sums({{x.data(), weights.data(), b, n, d, n * d, d, n, 1, dtype},
                     labels.data(),
                     with_before ? before.data() : nullptr,
                     grid.data(),
                     found.data(),
                     counts.data(),
                     k},
                    nullptr);
  found.write();
  counts.write();
}

void counts(const int64_t* size) {
  const int64_t b = size[0], n = size[1], k = size[2];
  auto labels = Array<int64_t>::read(b * n);
  auto weights = Array<double>::read(b * n);
  auto found = Array<int64_t>::room(b * k);
  cuda::kmeans_counts({labels.data(), weights.data(), found.data(), b, n, k, n, 1}, nullptr);
  found.write();
}

void means(DType dtype, const int64_t* size) {
  const int64_t b = size[0], k = size[1], d = size[2];
  auto sums = Array<double>::read(b * 2 * k * (d + 1));
  auto previous = Array<char>::read(b * k * d * size_of(dtype)), found = Array<char>::room(b * k * d * size_of(dtype));
  auto shift = Array<double>::room(b), workspace = Array<double>::room(b * kmeans_means_blocks(k * d));
  cuda::kmeans_means({sums.data(), previous.data(), found.data(), shift.data(), workspace.data(), b, k, d, dtype},
                     nullptr);
  found.write();
  shift.write();
}

DType accumulator(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

KMeansRows rows_of(Array<char>& x, Array<double>* weights, const int64_t* size, DType dtype) {
  const int64_t b = size[0], n = size[1], d = size[2];
  return {x.data(), weights ? weights->data() : nullptr, b, n, d, n * d, d, n, 1, dtype};
}

void potentials(DType dtype, const int64_t* size) {
  const int64_t b = size[0], n = size[1], d = size[2], e = size[3], t = size[4], wide = size_of(accumulator(dtype));
  auto x = Array<char>::read(b * n * d * size_of(dtype));
  auto candidates = Array<char>::read(e * t * d * wide), closest = Array<char>::read(e * n * wide);
  auto weights = Array<double>::read(e * n), scale = Array<double>::read(e);
  auto found = Array<int64_t>::room(e * t);
  auto improves = Array<int32_t>::room(e * n);
  cuda::kmeans_potentials({rows_of(x, &weights, size, dtype), candidates.data(), closest.data(), scale.data(),
                           found.data(), improves.data(), e, t},
                          nullptr);
  found.write();
  improves.write();
}

void closest(DType dtype, const int64_t* size) {
  const int64_t b = size[0], n = size[1], d = size[2], e = size[3], masked = size[4], wide = size_of(accumulator(dtype));
  auto closest = Array<char>::read(e * n * wide), x = Array<char>::read(b * n * d * size_of(dtype));
  auto centroid = Array<char>::read(e * d * wide);
  auto improves = Array<int32_t>::read(masked ? e * n : 0);
  auto chosen = Array<int64_t>::read(masked ? e : 0);
  cuda::kmeans_closest({rows_of(x, nullptr, size, dtype), closest.data(), centroid.data(),
                        masked ? improves.data() : nullptr, masked ? chosen.data() : nullptr, e, n},
                       nullptr);
  closest.write();
}

void seed(DType dtype, const int64_t* size) {
  const int64_t b = size[0], n = size[1], d = size[2], e = size[3], k = size[4], t = size[5];
  auto x = Array<char>::read(b * n * d * size_of(dtype));
  auto weights = Array<double>::read(b * n), uniform = Array<double>::read(e * k * t);
  auto chosen = Array<int64_t>::room(e * k), workspace = Array<int64_t>::room(cuda::kmeans_seed_workspace(e, n, d, t));
  cuda::kmeans_seed(
      {rows_of(x, &weights, size, dtype), uniform.data(), chosen.data(), workspace.data(), e, k, t}, nullptr);
  chosen.write();
}

void members(DType dtype, const int64_t* size) {
  const int64_t b = size[0], n = size[1], k = size[2], offset = size[3], last = size[4];
  auto score = Array<char>::read(b * n * size_of(dtype));
  auto labels = Array<int64_t>::read(b * n);
  auto weights = Array<double>::read(b * n);
  auto best = Array<char>::room(b * k * size_of(dtype));
  auto places = Array<int64_t>::room(b * k);
  KMeansMembers a{score.data(), labels.data(), weights.data(), best.data(), nullptr, b,     n,
                  k,            n,             1,              offset,      last != 0,       dtype};
  cuda::kmeans_members(a, nullptr);
  a.places = places.data();
  if (b * k > 0) cuda::kmeans_members(a, nullptr);
  best.write();
  places.write();
}

void split(DType dtype, const int64_t* size) {
  const int64_t e = size[0], k = size[1], d = size[2];
  auto means = Array<char>::read(e * k * d * size_of(dtype)), farthest = Array<char>::read(e * k * d * size_of(dtype));
  auto counts = Array<int64_t>::read(e * k), child = Array<int64_t>::room(e * k), tickets = Array<int64_t>::room(e * k);
  auto centroids = Array<char>::room(e * k * d * size_of(dtype));
  cuda::kmeans_split({means.data(), farthest.data(), counts.data(), centroids.data(), child.data(), tickets.data(), e, k,
                      d, size[3], size[4], static_cast<uint64_t>(size[5]), dtype},
                     nullptr);
  centroids.write();
  child.write();
}

void iterate(DType dtype, const int64_t* size) {
  const int64_t b = size[0], n = size[1], d = size[2], e = size[3], k = size[4];
  auto x = Array<char>::read(b * n * d * size_of(dtype));
  auto weights = Array<double>::read(b * n), grid = Array<double>::read(b * 2 * (d + 1));
  auto centroids = Array<float>::read(e * k * d), result = Array<float>::room(e * k * d);
  auto labels = Array<int64_t>::room(e * n), repaired = Array<int64_t>::room(e), still = Array<int64_t>::room(e);
  cuda::kmeans_iterate({rows_of(x, &weights, size, dtype), grid.data(), centroids.data(), result.data(), labels.data(),
                        repaired.data(), still.data(), e, k, size[5], size[6] != 0, size[7] != 0,
                        static_cast<uint64_t>(size[8])},
                       nullptr);
  result.write();
  labels.write();
  repaired.write();
  still.write();
}

}  // namespace

int main(int count, char** arguments) {
  const std::string operation = arguments[1];
  simt::order = static_cast<simt::Order>(std::atoi(arguments[2]));
  const auto dtype = static_cast<DType>(std::atoi(arguments[3]));
  std::vector<int64_t> size;
  for (int i = 4; i < count; ++i) size.push_back(std::atoll(arguments[i]));
  if (operation == "bounds") bounds(dtype, size.data());
  if (operation == "sums") sums(dtype, size.data());
  if (operation == "counts") counts(size.data());
  if (operation == "means") means(dtype, size.data());
  if (operation == "potentials") potentials(dtype, size.data());
  if (operation == "closest") closest(dtype, size.data());
  if (operation == "members") members(dtype, size.data());
  if (operation == "split") split(dtype, size.data());
  if (operation == "iterate") iterate(dtype, size.data());
  if (operation == "seed") seed(dtype, size.data());
}
