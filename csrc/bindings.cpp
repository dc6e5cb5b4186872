// The only file that knows Python: DLPack capsules in, tensor views out, and the list of what the module offers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <new>
#include <optional>

#include "common/kmeans.h"
#include "cpu/kernels.h"
#ifdef CLUSTOPS_WITH_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

// The stable layout of the DLPack exchange format, version 0.x, as capsules named "dltensor" carry it.
struct DLTensor {
  void* data;
  struct {
    int32_t device_type, device_id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

clustops::DType dtype_of(const DLTensor& t) {
  enum : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };
  using clustops::DType;
  if (t.dtype.lanes == 1) {
    if (t.dtype.code == kFloat && t.dtype.bits == 32) return DType::f32;
    if (t.dtype.code == kFloat && t.dtype.bits == 64) return DType::f64;
    if (t.dtype.code == kFloat && t.dtype.bits == 16) return DType::f16;
    if (t.dtype.code == kBfloat && t.dtype.bits == 16) return DType::bf16;
    if (t.dtype.code == kInt && t.dtype.bits == 32) return DType::i32;
    if (t.dtype.code == kInt && t.dtype.bits == 64) return DType::i64;
  }
  throw std::invalid_argument("a kernel takes float32, float64, float16, bfloat16, int32 or int64 tensors");
}

clustops::Device device_of(const DLTensor& t) {
  constexpr int32_t kCpu = 1, kCuda = 2, kCudaHost = 3;
  if (t.device.device_type == kCpu || t.device.device_type == kCudaHost) return clustops::Device::cpu;
  if (t.device.device_type == kCuda) return clustops::Device::cuda;
  throw std::invalid_argument("a kernel takes tensors in host memory or on a CUDA device");
}

clustops::Tensor view_of(const DLTensor& t) {
  if (t.ndim > clustops::Tensor::kMaxDims) throw std::invalid_argument("a kernel takes tensors of up to 8 dimensions");
  clustops::Tensor view;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.dtype = dtype_of(t);
  view.device = device_of(t);
  view.device_index = t.device.device_id;
  view.dims = t.ndim;
  int64_t dense = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    view.shape[i] = t.shape[i];
    view.strides[i] = t.strides ? t.strides[i] : dense;
    dense *= t.shape[i];
  }
  return view;
}

// Labels may be integers of any kind, which no other kernel takes.
clustops::Labels labels_of(const DLTensor& t) {
  enum : uint8_t { kInt = 0, kUnsigned = 1 };
  const auto [code, bits, lanes] = t.dtype;
  const bool whole = (code == kInt || code == kUnsigned) && lanes == 1 && bits >= 8 && bits <= 64;
  if (!whole || t.ndim != 1 || device_of(t) != clustops::Device::cpu) {
    throw std::invalid_argument("labels must be one dimension of integers in host memory");
  }
  return {static_cast<char*>(t.data) + t.byte_offset, t.shape[0], t.strides ? t.strides[0] : 1, bits / 8,
          code == kInt};
}

}  // namespace

namespace pybind11::detail {

// A DLPack capsule is read, not consumed: the caller's argument keeps the memory alive during the call.
template <>
struct type_caster<clustops::Tensor> {
  PYBIND11_TYPE_CASTER(clustops::Tensor, const_name("dltensor"));

  bool load(handle source, bool) {
    if (!PyCapsule_IsValid(source.ptr(), "dltensor")) return false;
    value = view_of(*static_cast<const DLTensor*>(PyCapsule_GetPointer(source.ptr(), "dltensor")));
    return true;
  }
};

template <>
struct type_caster<clustops::Labels> {
  PYBIND11_TYPE_CASTER(clustops::Labels, const_name("dltensor"));

  bool load(handle source, bool) {
    if (!PyCapsule_IsValid(source.ptr(), "dltensor")) return false;
    value = labels_of(*static_cast<const DLTensor*>(PyCapsule_GetPointer(source.ptr(), "dltensor")));
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

using clustops::Device;
using clustops::Tensor;
namespace cpu = clustops::cpu;

void bind_machine(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("instruction_set", &cpu::instruction_set, "The instruction set whose CPU kernels are in use.");
  m.def("instruction_sets", &cpu::instruction_sets, "Those that this CPU can run, the best first.");
  m.def("use_instruction_set", &cpu::use_instruction_set, "Take the kernels of another set: for tests.");
  m.def("cuda_built", [] { return *CLUSTOPS_CUDA_ARCHS != '\0'; }, "Whether CUDA kernels are in this module.");
  m.def("cuda_archs", [] { return std::string(CLUSTOPS_CUDA_ARCHS); }, "What CUDA kernels were compiled for, or ''.");
  m.def("measure_fma", [](double s, int t) { return cpu::kernels().measure_fma(s, t); }, py::arg("seconds"),
        py::arg("threads"), release(), "GFLOP/s");
  m.def("measure_matmul", [](double s, int t) { return cpu::kernels().measure_matmul(s, t); }, py::arg("seconds"),
        py::arg("threads"), release(), "GFLOP/s of bf16 tiles, 0 where the instruction set in use has none");
  m.def("measure_exp", [](double s, int t) { return cpu::kernels().measure_exp(s, t); }, py::arg("seconds"),
        py::arg("threads"), release(), "1e9 exponentials a second");
  m.def("measure_stream", [](int64_t b, double s, int t) { return cpu::kernels().measure_stream(b, s, t); },
        py::arg("bytes"), py::arg("seconds"), py::arg("threads"), release(), "GB/s, read plus written");
}

int64_t workspace_of_assign(const Tensor& x, const Tensor& centroids, int threads) {
  if (centroids.dims != 3) return 0;
  const int64_t* shape = centroids.shape;
  return cpu::kernels().kmeans_assign_workspace(shape[0], shape[1], shape[2], x.dtype, threads);
}

void bind_kmeans(py::module_& m) {
  m.def("kmeans_assign_workspace", [](const Tensor& x, const Tensor& centroids, int threads) {
    return workspace_of_assign(x, centroids, threads);
  });
  m.def(
      "kmeans_assign",
      [](const Tensor& x, const Tensor& centroids, const Tensor& labels, const Tensor& distances,
         const Tensor& workspace, int threads) {
        threads = threads < 1 ? 1 : threads;
        const bool one = labels.dims == 3 && labels.shape[2] == 1;
        const int64_t size = one ? workspace_of_assign(x, centroids, threads) : 0;
        const auto problem =
            clustops::kmeans_assign_arguments(x, centroids, labels, distances, workspace, size, Device::cpu);
        one ? cpu::kernels().kmeans_assign(problem, threads)
            : cpu::kernels().kmeans_nearest(problem, labels.shape[2], threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_kmeans_iterate(py::module_& m) {
  m.def(
      "kmeans_iterate",
      [](const Tensor& x, const Tensor& weights, const Tensor& grid, const Tensor& centroids, const Tensor& result,
         const Tensor& labels, const Tensor& repaired, const Tensor& still, int64_t iterations, bool split, uint64_t seed,
         int threads) {
        const auto problem = clustops::kmeans_iterate_arguments(x, weights, grid, centroids, result, labels, repaired,
                                                                still, iterations, false, split, seed, Device::cpu);
        cpu::kernels().kmeans_iterate(problem, threads < 1 ? 1 : threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

using Maybe = std::optional<Tensor>;

const Tensor* pointer(const Maybe& tensor) { return tensor ? &*tensor : nullptr; }

void bind_kmeans_update(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("kmeans_means_blocks", &clustops::kmeans_means_blocks);
  m.def(
      "kmeans_bounds",
      [](const Tensor& x, const Tensor& weights, const Tensor& bounds, int threads) {
        cpu::kernels().kmeans_bounds(clustops::kmeans_bounds_arguments(x, weights, bounds, Device::cpu), threads);
      },
      release());
  m.def(
      "kmeans_sums",
      [](const Tensor& sums, const Tensor& counts, const Tensor& x, const Tensor& labels, const Tensor& weights,
         const Tensor& grid, const Maybe& before, int threads) {
        cpu::kernels().kmeans_sums(clustops::kmeans_sums_arguments(x, labels, pointer(before), weights, grid, sums,
                                                                   counts, Device::cpu),
                                   threads);
      },
      release());
  m.def(
      "kmeans_means",
      [](const Tensor& sums, const Tensor& previous, const Tensor& means, const Tensor& shift, const Tensor& workspace,
         int threads) {
        cpu::kernels().kmeans_means(
            clustops::kmeans_means_arguments(sums, previous, means, shift, workspace, Device::cpu), threads);
      },
      release());
  m.def(
      "kmeans_counts",
      [](const Tensor& labels, const Tensor& weights, const Tensor& counts, int threads) {
        cpu::kernels().kmeans_counts(clustops::kmeans_counts_arguments(labels, weights, counts, Device::cpu), threads);
      },
      release());
}

void bind_kmeans_seeding(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "kmeans_potentials",
      [](const Tensor& x, const Tensor& candidates, const Tensor& closest, const Tensor& weights, const Tensor& scale,
         const Tensor& potentials, const Tensor& improves, int threads) {
        cpu::kernels().kmeans_potentials(clustops::kmeans_potentials_arguments(x, candidates, closest, weights, scale,
                                                                               potentials, improves, Device::cpu),
                                         threads);
      },
      release());
  m.def(
      "kmeans_closest",
      [](const Tensor& closest, const Tensor& x, const Tensor& centroid, const Maybe& improves, const Maybe& chosen,
         int threads) {
        cpu::kernels().kmeans_closest(clustops::kmeans_closest_arguments(closest, x, centroid, pointer(improves),
                                                                         pointer(chosen), Device::cpu),
                                      threads);
      },
      release());
  m.def(
      "kmeans_draws",
      [](const Tensor& position, const Tensor& draws, int64_t seed, int64_t first_stream, int64_t step, int threads) {
        cpu::kernels().kmeans_draws(
            clustops::kmeans_draws_arguments(position, draws, seed, first_stream, step, Device::cpu), threads);
      },
      release());
  const auto workspace_of = [](const Tensor& x, const Tensor& uniform, int64_t k, int threads) -> int64_t {
    if (x.dims != 3 || uniform.dims != 2 || k < 1) return 0;
    clustops::KMeansRows rows{};
    rows.rows = x.shape[1], rows.features = x.shape[2], rows.dtype = x.dtype;
    return cpu::kernels().kmeans_seed_workspace(rows, uniform.shape[0], k, uniform.shape[1] / k, threads);
  };
  m.def("kmeans_seed_workspace_cpu", workspace_of);
  m.def(
      "kmeans_seed",
      [workspace_of](const Tensor& x, const Tensor& weights, const Tensor& uniform, const Tensor& chosen,
                     const Tensor& workspace, int threads) {
        const int64_t size = workspace_of(x, uniform, chosen.dims == 2 ? chosen.shape[1] : 0, threads);
        cpu::kernels().kmeans_seed(
            clustops::kmeans_seed_arguments(x, weights, uniform, chosen, workspace, size, Device::cpu), threads);
      },
      release());
}

// Rows as far as they say how large a workspace is; where those are none, the checks that follow say so.
clustops::SinkhornRows shapes_of(const Tensor& scores, const Tensor* queue) {
  clustops::SinkhornRows rows{};
  if (scores.dims != 3 || (queue && queue->dims != 3)) return rows;
  rows.problems = scores.shape[0], rows.rows = scores.shape[1], rows.columns = scores.shape[2];
  rows.queued = queue ? queue->shape[1] : 0, rows.dtype = scores.dtype;
  return rows;
}

// A workspace for the time of a call: here rather than in Python, where it costs as much as a small problem.
struct Room {
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(double* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<double, Free> numbers;
  Tensor view;

  explicit Room(int64_t size) : numbers(static_cast<double*>(::operator new(size * sizeof(double), kLine))) {
    view.data = numbers.get(), view.dtype = clustops::DType::f64;
    view.dims = 1, view.shape[0] = size, view.strides[0] = 1;
  }
  int64_t size() const { return view.shape[0]; }
};

void bind_sinkhorn(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "sinkhorn",
      [](const Tensor& potentials, const Maybe& assignments, const Tensor& scores, const Maybe& queue,
         const Maybe& prior, const Maybe& weights, const Maybe& init, double epsilon, int64_t n_iters,
         std::optional<double> relax, std::optional<double> mass, std::optional<double> tol, bool hard, int threads) {
        threads = threads < 1 ? 1 : threads;
        const Room room(cpu::kernels().sinkhorn_workspace(shapes_of(scores, pointer(queue)), threads));
        const clustops::SinkhornSettings settings{epsilon, n_iters, relax, mass, tol, std::nullopt, hard};
        cpu::kernels().sinkhorn_solve(
            clustops::sinkhorn_solve_arguments(scores, pointer(queue), pointer(prior), pointer(weights), pointer(init),
                                               potentials, pointer(assignments), room.view, room.size(), settings,
                                               Device::cpu),
            threads);
      },
      release());
  m.def(
      "sinkhorn_column_mass",
      [](const Tensor& log_mass, const Tensor& scores, const Maybe& queue, const Maybe& weights,
         const Tensor& potentials, double epsilon, bool normalized, int threads) {
        threads = threads < 1 ? 1 : threads;
        const Room room(cpu::kernels().sinkhorn_workspace(shapes_of(scores, pointer(queue)), threads));
        cpu::kernels().sinkhorn_column_mass(
            clustops::sinkhorn_mass_arguments(scores, pointer(queue), pointer(weights), potentials, log_mass, room.view,
                                              room.size(), epsilon, normalized, Device::cpu),
            threads);
      },
      release());
  m.def(
      "sinkhorn_assign",
      [](const Tensor& assignments, const Tensor& scores, const Tensor& potentials, double epsilon, bool hard,
         int threads) {
        threads = threads < 1 ? 1 : threads;
        const Room room(cpu::kernels().sinkhorn_assign_workspace(shapes_of(scores, nullptr), threads));
        cpu::kernels().sinkhorn_assign(
            clustops::sinkhorn_assign_arguments(scores, potentials, assignments, room.view, room.size(), epsilon, hard,
                                                Device::cpu),
            threads);
      },
      release());
}

// A block of anchors and columns: views, first, row, rows, column, columns.
using Place = std::array<int64_t, 6>;

clustops::WeightedPlace place_of(const Place& p) { return {p[0], p[1], p[2], p[3], p[4], p[5]}; }

void bind_contrastive_weighted(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "weighted_sums",
      [](const Tensor& products, const Tensor& weights, const Tensor& shift, const Tensor& partition,
         const Tensor& weighted, const Tensor& total, const Place& place, double temperature, bool mirrored,
         int threads) {
        cpu::kernels().weighted_sums(
            clustops::weighted_sums_arguments(products, weights, shift, partition, weighted, total, place_of(place),
                                              temperature, mirrored, Device::cpu),
            threads);
      },
      release());
  m.def(
      "weighted_gradient",
      [](const Tensor& products, const Tensor& weights, const Tensor& grad, const Tensor& lse, const Tensor& share,
         const Place& place, double temperature, int threads) {
        cpu::kernels().weighted_gradient(
            clustops::weighted_gradient_arguments(products, weights, grad, lse, share, place_of(place), temperature,
                                                  Device::cpu),
            threads);
      },
      release());
}

void bind_sinkhorn_loss(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using Indices = std::vector<int64_t>;
  m.def(
      "soft_cross_entropy",
      [](const Tensor& scores, const Tensor& targets, const Tensor& bias, const Indices& view, const Indices& target,
         double temperature, double target_temperature, const Tensor& losses, const Tensor& score_normalizers,
         const Tensor& target_normalizers, int threads) {
        cpu::kernels().soft_cross_entropy(
            clustops::soft_cross_entropy_arguments(scores, targets, bias, view, target, temperature, target_temperature,
                                                   losses, score_normalizers, target_normalizers, Device::cpu),
            threads);
      },
      release());
  m.def(
      "soft_cross_entropy_backward",
      [](const Tensor& upstream, const Tensor& scores, const Tensor& targets, const Tensor& bias,
         const Tensor& score_normalizers, const Tensor& target_normalizers, const Indices& view, const Indices& target,
         double temperature, double target_temperature, const Tensor& gradient, int threads) {
        cpu::kernels().soft_cross_entropy_backward(
            clustops::soft_cross_entropy_backward_arguments(upstream, scores, targets, bias, score_normalizers,
                                                            target_normalizers, view, target, temperature,
                                                            target_temperature, gradient, Device::cpu),
            threads);
      },
      release());
  m.def(
      "sinkhorn_matrix",
      [](const Tensor& m, const Maybe& gradient, const Tensor& result, int64_t n_iters, int threads) {
        cpu::kernels().sinkhorn_matrix(
            clustops::sinkhorn_matrix_arguments(m, pointer(gradient), result, n_iters, Device::cpu), threads);
      },
      release());
}

void bind_sampler(py::module_& m) {
  using clustops::Labels;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "largest_label",
      [](const Labels& labels, int threads) { return cpu::kernels().largest_label(labels, threads); }, release());
  m.def(
      "fingerprint",
      [](const Labels& numbers, int threads) { return cpu::kernels().fingerprint(numbers, threads); }, release());
  m.def(
      "count_members",
      [](const Labels& labels, const Tensor& cursors, const Tensor& offsets, int threads) {
        cpu::kernels().count_members(clustops::cluster_members_arguments(labels, cursors, offsets, nullptr), threads);
      },
      release());
  m.def(
      "place_members",
      [](const Labels& labels, const Tensor& cursors, const Tensor& offsets, const Tensor& members, int threads) {
        cpu::kernels().place_members(clustops::cluster_members_arguments(labels, cursors, offsets, &members), threads);
      },
      release());
  m.def(
      "sampler_order",
      [](const Tensor& result, const Maybe& positions, int64_t start, int64_t step, const Tensor& members,
         const Tensor& offsets, const Tensor& bounds, int64_t seed, int64_t epoch, const std::string& replacement,
         int threads) {
        cpu::kernels().sampler_order(
            clustops::sampler_order_arguments(result, pointer(positions), start, step, members, offsets, bounds, seed,
                                              epoch, replacement),
            threads);
      },
      release());
  m.def(
      "sampler_batches",
      [](const Tensor& result, const Tensor& batches, const Tensor& members, const Tensor& offsets,
         const Tensor& clusters, int64_t clusters_per_batch, int64_t samples_per_cluster, int64_t seed, int64_t epoch,
         int threads) {
        cpu::kernels().sampler_batches(
            clustops::sampler_batches_arguments(result, batches, members, offsets, clusters, clusters_per_batch,
                                                samples_per_cluster, seed, epoch),
            threads);
      },
      release());
}

void bind_contrastive(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "contrastive_rows",
      [](const Tensor& features, const Maybe& labels, const Maybe& confidence, int64_t first, int64_t count,
         double temperature, double threshold, bool reweight, bool own_confidence, bool normalize, const Tensor& loss,
         const Tensor& lse, const Tensor& weight, const Tensor& norms, int threads) {
        cpu::kernels().contrastive_rows(
            clustops::contrastive_arguments(features, pointer(labels), pointer(confidence), first, count,
                                            {temperature, threshold, reweight, own_confidence, normalize}, loss, lse,
                                            weight, norms, Device::cpu),
            threads < 1 ? 1 : threads);
      },
      release());
  m.def(
      "contrastive_rows_backward",
      [](const Tensor& upstream, const Tensor& features, const Maybe& labels, const Maybe& confidence,
         const Tensor& lse, int64_t first, int64_t count, double temperature, double threshold, bool reweight,
         bool own_confidence, bool normalize, const Tensor& gradient, int threads) {
        cpu::kernels().contrastive_rows_backward(
            clustops::contrastive_backward_arguments(upstream, features, pointer(labels), pointer(confidence), lse,
                                                     first, count,
                                                     {temperature, threshold, reweight, own_confidence, normalize},
                                                     gradient, Device::cpu),
            threads < 1 ? 1 : threads);
      },
      release());
}

#ifdef CLUSTOPS_WITH_CUDA
void bind_kmeans_assign_cuda(py::module_& m) {
  m.def(
      "kmeans_assign_cuda_workspace",
      [](int64_t problems, int64_t rows, int64_t clusters, int64_t features, int64_t top, const Tensor& x,
         const std::string& precision) {
        return clustops::kmeans_assign_cuda_workspace(problems, rows, clusters, features, top, x.dtype,
                                                      clustops::precision_named(precision));
      },
      "bytes");
  m.def(
      "kmeans_assign_cuda",
      [](const Tensor& x, const Tensor& centroids, const Tensor& labels, const Tensor& distances,
         const Tensor& workspace, const std::string& precision, uintptr_t stream) {
        clustops::cuda::kmeans_assign(
            clustops::kmeans_assign_cuda_arguments(x, centroids, labels, distances, workspace,
                                                   clustops::precision_named(precision)),
            reinterpret_cast<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_kmeans_update_cuda(py::module_& m) {
  namespace cuda = clustops::cuda;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "kmeans_bounds_cuda",
      [](const Tensor& x, const Tensor& weights, const Tensor& bounds, uintptr_t stream) {
        cuda::kmeans_bounds(clustops::kmeans_bounds_arguments(x, weights, bounds, Device::cuda),
                            reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "kmeans_sums_cuda",
      [](const Tensor& sums, const Tensor& counts, const Tensor& x, const Tensor& labels, const Tensor& weights,
         const Tensor& grid, const Maybe& before, uintptr_t stream) {
        cuda::kmeans_sums(clustops::kmeans_sums_arguments(x, labels, pointer(before), weights, grid, sums,
                                                          counts, Device::cuda),
                          reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "kmeans_means_cuda",
      [](const Tensor& sums, const Tensor& previous, const Tensor& means, const Tensor& shift, const Tensor& workspace,
         uintptr_t stream) {
        cuda::kmeans_means(
            clustops::kmeans_means_arguments(sums, previous, means, shift, workspace, Device::cuda),
            reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "kmeans_counts_cuda",
      [](const Tensor& labels, const Tensor& weights, const Tensor& counts, uintptr_t stream) {
        cuda::kmeans_counts(clustops::kmeans_counts_arguments(labels, weights, counts, Device::cuda),
                            reinterpret_cast<void*>(stream));
      },
      release());
}

void bind_kmeans_iterate_cuda(py::module_& m) {
  namespace cuda = clustops::cuda;
  m.def("kmeans_iterate_fits", [](int64_t rows, int64_t features, int64_t clusters, int64_t element) {
    return cuda::kmeans_iterate_fits(rows, features, clusters,
                                     element == 4 ? clustops::DType::f32 : clustops::DType::bf16);
  });
  m.def(
      "kmeans_iterate_cuda",
      [](const Tensor& x, const Tensor& weights, const Tensor& grid, const Tensor& centroids, const Tensor& result,
         const Tensor& labels, const Tensor& repaired, const Tensor& still, int64_t iterations, bool cosine, bool split,
         uint64_t seed, uintptr_t stream) {
        cuda::kmeans_iterate(
            clustops::kmeans_iterate_arguments(x, weights, grid, centroids, result, labels, repaired, still, iterations,
                                               cosine, split, seed, Device::cuda),
            reinterpret_cast<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "kmeans_members_cuda",
      [](const Tensor& score, const Tensor& labels, const Tensor& weights, const Tensor& best,
         const std::optional<Tensor>& places, int64_t offset, bool last, uintptr_t stream) {
        cuda::kmeans_members(clustops::kmeans_members_arguments(score, labels, weights, best,
                                                                places ? &*places : nullptr, offset, last, Device::cuda),
                             reinterpret_cast<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "kmeans_split_cuda",
      [](const Tensor& means, const Tensor& farthest, const Tensor& counts, const Tensor& centroids,
         const Tensor& child, const Tensor& tickets, uint64_t seed, int64_t restarts, int64_t iteration,
         uintptr_t stream) {
        cuda::kmeans_split(clustops::kmeans_split_arguments(means, farthest, counts, centroids, child, tickets, seed,
                                                            restarts, iteration, Device::cuda),
                           reinterpret_cast<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_kmeans_seeding_cuda(py::module_& m) {
  namespace cuda = clustops::cuda;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "kmeans_potentials_cuda",
      [](const Tensor& x, const Tensor& candidates, const Tensor& closest, const Tensor& weights, const Tensor& scale,
         const Tensor& potentials, const Tensor& improves, uintptr_t stream) {
        cuda::kmeans_potentials(clustops::kmeans_potentials_arguments(x, candidates, closest, weights, scale,
                                                                      potentials, improves, Device::cuda),
                                reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "kmeans_closest_cuda",
      [](const Tensor& closest, const Tensor& x, const Tensor& centroid, const std::optional<Tensor>& improves,
         const std::optional<Tensor>& chosen, uintptr_t stream) {
        cuda::kmeans_closest(
            clustops::kmeans_closest_arguments(closest, x, centroid, improves ? &*improves : nullptr,
                                               chosen ? &*chosen : nullptr, Device::cuda),
            reinterpret_cast<void*>(stream));
      },
      release());
  m.def("kmeans_seed_workspace", &cuda::kmeans_seed_workspace);
  m.def(
      "kmeans_seed_cuda",
      [](const Tensor& x, const Tensor& weights, const Tensor& uniform, const Tensor& chosen, const Tensor& workspace,
         uintptr_t stream) {
        const int64_t entries = chosen.shape[0], clusters = chosen.shape[1];
        const int64_t trials = clusters > 0 ? uniform.shape[1] / clusters : 0;
        const int64_t size = cuda::kmeans_seed_workspace(entries, x.shape[1], x.shape[2], trials);
        cuda::kmeans_seed(
            clustops::kmeans_seed_arguments(x, weights, uniform, chosen, workspace, size, Device::cuda),
            reinterpret_cast<void*>(stream));
      },
      release());
}

void bind_sinkhorn_loss_cuda(py::module_& m) {
  namespace cuda = clustops::cuda;
  using release = py::call_guard<py::gil_scoped_release>;
  using Indices = std::vector<int64_t>;
  m.def("soft_cross_entropy_workspace", &cuda::soft_cross_entropy_workspace);
  m.def(
      "soft_cross_entropy_cuda",
      [](const Tensor& scores, const Tensor& targets, const Tensor& bias, const Indices& view, const Indices& target,
         double temperature, double target_temperature, const Tensor& losses, const Tensor& score_normalizers,
         const Tensor& target_normalizers, const Tensor& workspace, uintptr_t stream) {
        const auto problem =
            clustops::soft_cross_entropy_arguments(scores, targets, bias, view, target, temperature, target_temperature,
                                                   losses, score_normalizers, target_normalizers, Device::cuda);
        const int64_t size =
            cuda::soft_cross_entropy_workspace(problem.pairs, problem.view != nullptr, problem.rows, problem.columns);
        clustops::expect(workspace, "workspace", losses.dtype, Device::cuda, {size});
        cuda::soft_cross_entropy(problem, workspace.data, reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "soft_cross_entropy_backward_cuda",
      [](const Tensor& upstream, const Tensor& scores, const Tensor& targets, const Tensor& bias,
         const Tensor& score_normalizers, const Tensor& target_normalizers, const Indices& view, const Indices& target,
         double temperature, double target_temperature, const Tensor& gradient, uintptr_t stream) {
        cuda::soft_cross_entropy_backward(
            clustops::soft_cross_entropy_backward_arguments(upstream, scores, targets, bias, score_normalizers,
                                                            target_normalizers, view, target, temperature,
                                                            target_temperature, gradient, Device::cuda),
            reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "sinkhorn_matrix_cuda",
      [](const Tensor& m, const Maybe& gradient, const Tensor& result, int64_t n_iters, uintptr_t stream) {
        cuda::sinkhorn_matrix(clustops::sinkhorn_matrix_arguments(m, pointer(gradient), result, n_iters, Device::cuda),
                              reinterpret_cast<void*>(stream));
      },
      release());
}

void bind_contrastive_cuda(py::module_& m) {
  namespace cuda = clustops::cuda;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "contrastive_cuda_workspace",
      [](const Tensor& features, int64_t first, int64_t count, bool exact, bool backward) -> int64_t {
        clustops::expect_dims(features, "features", 3);
        const int64_t* shape = features.shape;
        if (!cuda::contrastive_fits(shape[2], features.dtype)) return 0;
        const clustops::ContrastiveRows rows{nullptr, features.dtype, shape[0], shape[1], shape[2], first, count, 1, false};
        return backward ? cuda::contrastive_backward_workspace(rows, exact) : cuda::contrastive_workspace(rows, exact);
      },
      "bytes; 0 where the kernels of the current device do not take such features");
  m.def(
      "contrastive_rows_cuda",
      [](const Tensor& features, const Maybe& labels, const Maybe& confidence, int64_t first, int64_t count,
         double temperature, double threshold, bool reweight, bool own_confidence, bool normalize, const Tensor& loss,
         const Tensor& lse, const Tensor& weight, const Tensor& norms, const Tensor& workspace, bool exact,
         uintptr_t stream) {
        const auto problem =
            clustops::contrastive_arguments(features, pointer(labels), pointer(confidence), first, count,
                                            {temperature, threshold, reweight, own_confidence, normalize}, loss, lse,
                                            weight, norms, Device::cuda);
        clustops::expect(workspace, "workspace", clustops::DType::i32, Device::cuda,
                         {cuda::contrastive_workspace(problem.rows, exact) / 4});
        cuda::contrastive_rows(problem, workspace.data, exact, reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "contrastive_rows_backward_cuda",
      [](const Tensor& upstream, const Tensor& features, const Maybe& labels, const Maybe& confidence,
         const Tensor& lse, int64_t first, int64_t count, double temperature, double threshold, bool reweight,
         bool own_confidence, bool normalize, const Tensor& gradient, const Tensor& workspace, bool exact,
         uintptr_t stream) {
        const auto problem = clustops::contrastive_backward_arguments(
            upstream, features, pointer(labels), pointer(confidence), lse, first, count,
            {temperature, threshold, reweight, own_confidence, normalize}, gradient, Device::cuda);
        clustops::expect(workspace, "workspace", clustops::DType::i32, Device::cuda,
                         {cuda::contrastive_backward_workspace(problem.rows, exact) / 4});
        cuda::contrastive_rows_backward(problem, workspace.data, exact, reinterpret_cast<void*>(stream));
      },
      release());
}

void bind_sinkhorn_cuda(py::module_& m) {
  namespace cuda = clustops::cuda;
  using release = py::call_guard<py::gil_scoped_release>;
  const auto rows_of = [](const Tensor& scores, const Maybe& queue) {
    return clustops::sinkhorn_rows_arguments(scores, pointer(queue), nullptr, Device::cuda);
  };
  const auto mass_workspace = [=](const Tensor& scores, const Maybe& queue, bool virtual_column) {
    return cuda::sinkhorn_mass_workspace(rows_of(scores, queue), virtual_column);
  };
  const auto solve_workspace = [=](const Tensor& scores, const Maybe& queue, bool virtual_column) {
    return cuda::sinkhorn_solve_workspace(rows_of(scores, queue), virtual_column);
  };
  m.def("sinkhorn_column_mass_workspace_cuda", mass_workspace, "float64 numbers");
  m.def("sinkhorn_workspace_cuda", solve_workspace, "float64 numbers");
  m.def(
      "sinkhorn_cuda",
      [=](const Tensor& potentials, const Maybe& assignments, const Tensor& scores, const Maybe& queue,
          const Maybe& prior, const Maybe& weights, const Maybe& init, const Tensor& workspace, double epsilon,
          int64_t n_iters, std::optional<double> relax, std::optional<double> mass, std::optional<double> tol, bool hard,
          uintptr_t stream) {
        const clustops::SinkhornSettings settings{epsilon, n_iters, relax, mass, tol, std::nullopt, hard};
        cuda::sinkhorn_solve(
            clustops::sinkhorn_solve_arguments(scores, pointer(queue), pointer(prior), pointer(weights), pointer(init),
                                               potentials, pointer(assignments), workspace,
                                               solve_workspace(scores, queue, mass.has_value()), settings,
                                               Device::cuda),
            reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "sinkhorn_column_mass_cuda",
      [=](const Tensor& log_mass, const Tensor& scores, const Maybe& queue, const Maybe& weights,
          const Tensor& potentials, const Tensor& workspace, double epsilon, bool normalized, uintptr_t stream) {
        const int64_t columns = scores.dims == 3 ? scores.shape[2] : 0;
        const bool virtual_column = potentials.dims == 2 && potentials.shape[1] > columns;
        cuda::sinkhorn_column_mass(
            clustops::sinkhorn_mass_arguments(scores, pointer(queue), pointer(weights), potentials, log_mass, workspace,
                                              mass_workspace(scores, queue, virtual_column), epsilon, normalized,
                                              Device::cuda),
            reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "sinkhorn_assign_cuda",
      [](const Tensor& assignments, const Tensor& scores, const Tensor& potentials, const Tensor& workspace,
         double epsilon, bool hard, uintptr_t stream) {
        cuda::sinkhorn_assign(clustops::sinkhorn_assign_arguments(scores, potentials, assignments, workspace, 0,
                                                                  epsilon, hard, Device::cuda),
                              reinterpret_cast<void*>(stream));
      },
      release());
}

// The kernels of one call around the matrix products of its caller, who keeps the tensors.
struct ChunkedForward {
  clustops::ContrastiveForward problem;
  void *workspace, *stream;
};
struct ChunkedBackward {
  clustops::ContrastiveBackward problem;
  void *workspace, *stream;
};

int64_t padded_rows(const clustops::ContrastiveRows& rows) { return (rows.samples * rows.views + 127) / 128 * 128; }

void expect_chunked(const clustops::ContrastiveRows& rows, const Tensor& workspace, const Tensor& z, bool backward) {
  clustops::expect(workspace, "workspace", clustops::DType::i32, Device::cuda,
                   {clustops::cuda::contrastive_chunked_workspace(rows, backward) / 4});
  clustops::expect(z, "z", rows.dtype, Device::cuda, {padded_rows(rows), rows.width});
}

using Chunk = std::array<int64_t, 4>;  // row, rows, column, columns

clustops::ContrastiveBlock chunk_of(const clustops::ContrastiveRows& rows, const Tensor& scores, const Chunk& c) {
  for (const int64_t number : c) {
    if (number < 0 || number % 128 != 0) throw std::invalid_argument("a block must be of multiples of 128");
  }
  const int64_t padded = padded_rows(rows);
  if (c[0] + c[1] > padded || c[2] + c[3] > padded) throw std::invalid_argument("a block must lie within the rows");
  clustops::expect(scores, "scores", clustops::DType::f32, Device::cuda, {c[1], c[3]});
  return {scores.as<float>(), c[0], c[1], c[2], c[3], c[2] == 0, c[2] + c[3] == padded};
}

void bind_contrastive_chunked(py::module_& m) {
  namespace cuda = clustops::cuda;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "contrastive_chunked_workspace",
      [](const Tensor& features, bool backward) {
        clustops::expect_dims(features, "features", 3);
        const int64_t* shape = features.shape;
        return cuda::contrastive_chunked_workspace(
            {nullptr, features.dtype, shape[0], shape[1], shape[2], 0, shape[0], 1, false}, backward);
      },
      "bytes");
  py::class_<ChunkedForward>(m, "ContrastiveChunks")
      .def(py::init([](const Tensor& features, const Maybe& labels, const Maybe& confidence, int64_t first,
                       int64_t count, double temperature, double threshold, bool reweight, bool own_confidence,
                       bool normalize, const Tensor& loss, const Tensor& lse, const Tensor& weight, const Tensor& norms,
                       const Tensor& workspace, const Tensor& z, uintptr_t stream) {
             const ChunkedForward chunks{
                 clustops::contrastive_arguments(features, pointer(labels), pointer(confidence), first, count,
                                                 {temperature, threshold, reweight, own_confidence, normalize}, loss,
                                                 lse, weight, norms, Device::cuda),
                 workspace.data, reinterpret_cast<void*>(stream)};
             expect_chunked(chunks.problem.rows, workspace, z, false);
             cuda::contrastive_chunked_prepare(chunks.problem, chunks.workspace, z.data, chunks.stream);
             return chunks;
           }),
           release())
      .def(
          "sums",
          [](const ChunkedForward& chunks, const Tensor& scores, const Chunk& block) {
            cuda::contrastive_chunked_sums(chunks.problem, chunks.workspace,
                                           chunk_of(chunks.problem.rows, scores, block), chunks.stream);
          },
          release());
  py::class_<ChunkedBackward>(m, "ContrastiveChunksBackward")
      .def(py::init([](const Tensor& upstream, const Tensor& features, const Maybe& labels, const Maybe& confidence,
                       const Tensor& lse, int64_t first, int64_t count, double temperature, double threshold,
                       bool reweight, bool own_confidence, bool normalize, const Tensor& gradient,
                       const Tensor& workspace, const Tensor& z, uintptr_t stream) {
             const ChunkedBackward chunks{
                 clustops::contrastive_backward_arguments(
                     upstream, features, pointer(labels), pointer(confidence), lse, first, count,
                     {temperature, threshold, reweight, own_confidence, normalize}, gradient, Device::cuda),
                 workspace.data, reinterpret_cast<void*>(stream)};
             expect_chunked(chunks.problem.rows, workspace, z, true);
             cuda::contrastive_chunked_prepare(chunks.problem, chunks.workspace, z.data, chunks.stream);
             return chunks;
           }),
           release())
      .def(
          "turn",
          [](const ChunkedBackward& chunks, const Tensor& scores, const Tensor& gradients, const Chunk& block) {
            const clustops::ContrastiveRows& rows = chunks.problem.rows;
            clustops::expect(gradients, "gradients", rows.dtype, Device::cuda, {block[1], block[3]});
            cuda::contrastive_chunked_turn(chunks.problem, chunks.workspace, chunk_of(rows, scores, block),
                                           gradients.data, chunks.stream);
          },
          release())
      .def(
          "end",
          [](const ChunkedBackward& chunks, const Tensor& sums, int64_t row) {
            const clustops::ContrastiveRows& rows = chunks.problem.rows;
            clustops::expect_dims(sums, "sums", 2);
            clustops::expect(sums, "sums", clustops::DType::f32, Device::cuda, {sums.shape[0], rows.width});
            if (row > rows.first * rows.views || row + sums.shape[0] < (rows.first + rows.count) * rows.views) {
              throw std::invalid_argument("sums must hold the rows whose gradient is wanted");
            }
            cuda::contrastive_chunked_end(chunks.problem, chunks.workspace, sums.as<float>(), row, chunks.stream);
          },
          release());
}

void bind_contrastive_weighted_cuda(py::module_& m) {
  namespace cuda = clustops::cuda;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "weighted_sums_cuda",
      [](const Tensor& products, const Tensor& weights, const Tensor& shift, const Tensor& partition,
         const Tensor& weighted, const Tensor& total, const Place& place, double temperature, uintptr_t stream) {
        clustops::expect(products, "products", clustops::DType::f32, Device::cuda, {products.shape[0]});
        cuda::weighted_sums(clustops::weighted_sums_arguments(products, weights, shift, partition, weighted, total,
                                                              place_of(place), temperature, false, Device::cuda),
                            reinterpret_cast<void*>(stream));
      },
      release());
  m.def(
      "weighted_gradient_cuda",
      [](const Tensor& products, const Tensor& weights, const Tensor& grad, const Tensor& lse, const Tensor& share,
         const Tensor& gradients, const Place& place, double temperature, uintptr_t stream) {
        clustops::expect(products, "products", clustops::DType::f32, Device::cuda, {products.shape[0]});
        clustops::expect(gradients, "gradients", gradients.dtype, Device::cuda, {products.shape[0]});
        cuda::weighted_gradient(clustops::weighted_gradient_arguments(products, weights, grad, lse, share,
                                                                      place_of(place), temperature, Device::cuda),
                                gradients.dtype, gradients.data, reinterpret_cast<void*>(stream));
      },
      release());
}
#endif

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "Kernels of clustops over DLPack tensors; clustops.native gives them to torch.";
  bind_machine(m);
  bind_kmeans(m);
  bind_kmeans_update(m);
  bind_kmeans_seeding(m);
  bind_kmeans_iterate(m);
  bind_sinkhorn(m);
  bind_sinkhorn_loss(m);
  bind_contrastive(m);
  bind_contrastive_weighted(m);
  bind_sampler(m);
#ifdef CLUSTOPS_WITH_CUDA
  bind_kmeans_assign_cuda(m);
  bind_kmeans_update_cuda(m);
  bind_kmeans_seeding_cuda(m);
  bind_kmeans_iterate_cuda(m);
  bind_sinkhorn_cuda(m);
  bind_sinkhorn_loss_cuda(m);
  bind_contrastive_cuda(m);
  bind_contrastive_chunked(m);
  bind_contrastive_weighted_cuda(m);
#endif
}
