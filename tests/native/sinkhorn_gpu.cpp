// Runs the CUDA kernels of Sinkhorn assignment on the CPU (simt.h), so that a sanitizer can watch them.
// Arguments: operation, order of the threads of a block (0, 1, 2), dtype of the scores, dtype of the assignments, bytes of
// shared memory of a block, multiprocessors, sizes. stdin: the settings and inputs one after the other; stdout: the results.
#include <cstring>
#include <string>

#include "../../csrc/cuda/exponent.h"
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/sinkhorn_split.h"
#include "stream.h"


namespace {

using namespace clustops;

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// Room for a result, full of what no result is.
std::vector<char> room(int64_t bytes) { return std::vector<char>(static_cast<std::size_t>(bytes), '\xcd'); }

struct Input {
  DType dtype;
  int64_t problems, rows, queued, columns, padding, all;  // padding: elements between rows
  std::vector<double> settings;
  std::vector<char> scores, queue, weights;

  // sizes: problems, rows, queued, columns, padding, with a virtual column, with weights, one queue for all problems
  Input(DType type, const int64_t* size)
      : dtype(type), problems(size[0]), rows(size[1]), queued(size[2]), columns(size[3]), padding(size[4]) {
    all = columns + size[5];
    settings = read<double>(8);
    scores = elements(problems * rows), queue = elements((size[7] ? 1 : problems) * queued);
    if (size[6]) weights = read<char>(problems * rows * size_of(wide(dtype)));
  }
  std::vector<char> elements(int64_t rows) const { return read<char>(rows * (columns + padding) * size_of(dtype)); }
  SinkhornRows view(bool one_queue) const {
    const int64_t stride = columns + padding;
    return {scores.data(),
            queued ? queue.data() : nullptr,
            weights.empty() ? nullptr : weights.data(),
            problems,
            rows,
            queued,
            columns,
            rows * stride,
            stride,
            one_queue ? 0 : queued * stride,
            stride,
            rows,
            1,
            dtype};
  }
  std::vector<char> potentials(bool given) const { return read<char>(given ? problems * all * size_of(wide(dtype)) : 0); }
};

const void* pointer(const std::vector<char>& values) { return values.empty() ? nullptr : values.data(); }

void column_mass(Input& in, const int64_t* size) {
  const SinkhornRows rows = in.view(size[7]);
  const auto potentials = in.potentials(true);
  auto found = room(in.problems * in.all * size_of(wide(in.dtype)));
  auto workspace = room(8 * cuda::sinkhorn_mass_workspace(rows, size[5]));
  cuda::sinkhorn_column_mass({rows, potentials.data(), found.data(), in.settings[0], size[5] != 0, in.settings[1] != 0,
                              workspace.data()},
                             nullptr);
  write(found);
}

// Column masses of long rows as their own pass leaves them: for each chunk of rows; and whether it gave up.
void split(Input& in, const int64_t* size) {
  const SinkhornRows rows = in.view(size[7]);
  const auto potentials = in.potentials(true);
  auto workspace = room(4 * cuda::split_workspace(rows, in.all));
  const auto scale = static_cast<float>(cuda::kLog2E / in.settings[0]);
  const auto* start = reinterpret_cast<const float*>(potentials.data());
  const cuda::SplitMasses found = cuda::split_masses({rows, start, nullptr, workspace.data(), in.all, scale, true}, nullptr);
  write(std::vector<float>{*found.failed});
  write(std::vector<float>(found.partials, found.partials + in.problems * found.chunks.count * in.all));
}

void assign(Input& in, const int64_t* size, DType out) {
  const SinkhornRows rows = in.view(size[7]);
  const auto potentials = in.potentials(true);
  auto found = room(in.problems * in.rows * in.columns * size_of(out));
  cuda::sinkhorn_assign({rows, potentials.data(), found.data(), in.settings[0], size[5] != 0, in.settings[1] != 0, out,
                         nullptr},
                        nullptr);
  write(found);
}

// settings: epsilon, n_iters, fi, mass, tol, bound, hard. Further sizes: with a prior, with init, with assignments.
void solve(Input& in, const int64_t* size, DType out) {
  const SinkhornRows rows = in.view(size[7]);
  const auto prior = read<char>(size[8] ? in.problems * in.columns * size_of(wide(in.dtype)) : 0);
  const auto init = in.potentials(size[9]);
  auto found = room(in.problems * in.all * size_of(wide(in.dtype)));
  auto assignments = room(size[10] ? in.problems * in.rows * in.columns * size_of(out) : 0);
  auto workspace = room(8 * cuda::sinkhorn_solve_workspace(rows, size[5]));
  const auto& s = in.settings;
  cuda::sinkhorn_solve({rows, pointer(prior), pointer(init), found.data(), size[10] ? assignments.data() : nullptr, s[0],
                        static_cast<int64_t>(s[1]), s[2], s[3], s[4], s[5], s[6] != 0, out, workspace.data()},
                       nullptr);
  write(found);
  write(assignments);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string operation = arguments[1];
  simt::order = static_cast<simt::Order>(std::atoi(arguments[2]));
  const auto dtype = static_cast<DType>(std::atoi(arguments[3])), out = static_cast<DType>(std::atoi(arguments[4]));
  cuda::shared_limit = std::atoll(arguments[5]);
  cuda::processors = std::atoll(arguments[6]);
  std::vector<int64_t> size;
  for (int i = 7; i < count; ++i) size.push_back(std::atoll(arguments[i]));
  Input in(dtype, size.data());
  if (operation == "mass") column_mass(in, size.data());
  if (operation == "split") split(in, size.data());
  if (operation == "assign") assign(in, size.data(), out);
  if (operation == "solve") solve(in, size.data(), out);
}
