// Whole Sinkhorn solutions of problems whose rows fit in shared memory, that of one CTA or of several that run at once.
#include "sinkhorn_resident.h"

#include "grid_barrier.h"
#include "sinkhorn_columns.h"
#include "sinkhorn_step.h"

namespace clustops::cuda {
namespace {

constexpr int64_t kRowsOfMember = 4;
constexpr int64_t kBlocksOfProcessor = 16;  // problems at once where each has one CTA
constexpr int kCounterStride = 32;          // counters of barriers lie in lines of their own

// How many CTAs share a problem, and what each has in its shared memory, in bytes.
struct Layout {
  int64_t members = 0, groups = 0, rows = 0;  // members: 0 if problems do not fit; rows: of a member
  Teams teams{1, 1};
  int all = 0, per_thread = 8, stride = 0;  // stride: of rows, in elements
  int64_t potentials = 0, weights = 0, offsets = 0, scratch = 0, bytes = 0;

  void divide(int64_t n, int64_t by, int64_t size) {
    rows = divide_up(n, by), members = divide_up(n, rows);
    teams = teams_of(all, per_thread, 0);
    const int64_t batches = divide_up(rows, kBatch / per_thread), most = per_thread == 8 ? kMostThreads / teams.width : 1;
    const int64_t step = teams.width < 32 ? 32 / teams.width : 1;  // teams of whole warps
    teams.count = static_cast<int>(round_up(batches < most ? batches : most, step));
    const auto next = [&](int64_t length) {
      const int64_t at = bytes;
      bytes = round_up(bytes + length, 16);
      return at;
    };
    bytes = 0, next(rows * stride * size);
    potentials = next(4 * teams.width * per_thread);
    weights = next(4 * rows), offsets = next(4 * rows);
    const int64_t numbers = scratch_of(teams, per_thread, DType::f32);
    scratch = next(4 * (numbers > teams.threads() ? numbers : teams.threads()));
  }

  Layout(const SinkhornRows& a, int64_t columns) : all(static_cast<int>(columns)) {
    const int64_t n = a.rows + a.queued, size = element_size(a.dtype);
    if (!in_registers(a.dtype, columns) || n < 1 || a.problems < 1) return;
    per_thread = columns_per_thread(columns);
    stride = static_cast<int>(round_up(a.columns, 16 / size));
    const int64_t limit = most_shared(), processors = multiprocessors();
    if (n * stride * size > limit * processors) return;
    int64_t least = 1;
    for (divide(n, least, size); bytes > limit && least < processors; ++least) divide(n, least + 1, size);
    if (bytes > limit) {
      members = 0;
      return;
    }
    const int64_t share = processors / a.problems, scores = n * columns;
    int64_t wanted = divide_up(scores, kScoresOfMember);
    wanted = wanted < divide_up(n, kRowsOfMember) ? wanted : divide_up(n, kRowsOfMember);
    wanted = wanted < share ? wanted : share;
    if (scores >= kSplitFrom && wanted > members) divide(n, wanted, size);
    groups = members > 1 ? processors / members : grid_for(kBlocksOfProcessor * processors);
    if (groups > a.problems) groups = a.problems;
  }

  CLUSTOPS_HOST_DEVICE int64_t grid() const { return groups * members; }
  // In 32-bit words: counters, masses of members, potentials of groups, masses that the updates of members move.
  CLUSTOPS_HOST_DEVICE int64_t partials() const { return groups * kCounterStride; }
  CLUSTOPS_HOST_DEVICE int64_t updated() const { return partials() + grid() * all; }
  CLUSTOPS_HOST_DEVICE int64_t moved() const { return updated() + groups * all; }
  int64_t words() const { return moved() + grid(); }
};

// One group of CTAs per problem at a time, each with some of its rows; all have the potentials.
template <class T, int kColumns>
struct Member {
  const SinkhornSolve& a;
  const Layout& at;
  unsigned char* memory;
  float* workspace;
  int64_t p, group, member;
  GridBarrier& barrier;
  bool wide;

  template <class Part>
  __device__ Part* part(int64_t offset) const {
    return reinterpret_cast<Part*>(memory + offset);
  }
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ int64_t first() const { return member * at.rows; }
  __device__ int count() const {
    const int64_t left = a.rows.rows + a.rows.queued - first();
    return static_cast<int>(left < at.rows ? left : at.rows);
  }
  __device__ float* potentials() const { return part<float>(at.potentials); }
  __device__ float* partials() const { return workspace + at.partials() + group * at.members * at.all; }
  __device__ float* updated() const { return workspace + at.updated() + group * at.all; }
  __device__ float* moved() const { return workspace + at.moved() + group * at.members; }
  __device__ SharedRows<T> rows() const { return {part<T>(0), part<float>(at.weights), at.stride}; }

  __device__ void load() const {
    constexpr int kAhead = 8;  // loads of a thread on their way at once
    const GlobalRows<T> given{a.rows, p, wide};
    const int vectors = at.stride / kVector<T>, size = count() * vectors;
    for (int i0 = thread(); i0 < size; i0 += kAhead * threads()) {
      uint4 raw[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = i0 + j * threads();
        raw[j] = i < size ? given.vector(first() + i / vectors, i % vectors * kVector<T>) : uint4{};
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = i0 + j * threads();
        if (i < size) store16(part<T>(0) + int64_t{i} * kVector<T>, raw[j]);
      }
    }
    for (int n = thread(); n < count(); n += threads()) part<float>(at.weights)[n] = given.weight(first() + n);
    const float* init = a.init ? static_cast<const float*>(a.init) + p * at.all : nullptr;
    const Potentials<float> start{init, at.all, static_cast<float>(kLog2E), false};
    for (int c = thread(); c < at.teams.width * kColumns; c += threads()) potentials()[c] = start.at(c);
    __syncthreads();
  }

  // log2 of the sum of all weights, the same in all members.
  __device__ float log_weight() const {
    const GlobalRows<T> given{a.rows, p, wide};
    const int64_t n = a.rows.rows + a.rows.queued;
    if (!a.rows.weights) return log_two(static_cast<float>(n));
    float sum = 0;
    for (int64_t i = thread(); i < n; i += threads()) sum += given.weight(i);
    return log_two(block_sum(sum, part<float>(at.scratch)));
  }

  // The masses of all columns over this member's rows.
  __device__ void pass(int64_t t) const {
    const Columns<float> to{at.all, at.teams, static_cast<float>(kLog2E / a.epsilon), part<float>(at.scratch),
                            partials() + member * at.all};
    float* offsets = part<float>(at.offsets);
    if (t == 0 && !a.init) {
      exact_masses(rows(), 0, count(), Potentials<float>{potentials(), at.all, 1.0f, true}, false, offsets, to);
    } else {
      masses<kColumns>(rows(), 0, count(), potentials(), t == 0, offsets, to);
    }
  }

  // Updates this member's share of the columns from the masses of all members; the mass that this moves.
  __device__ float update(const SinkhornStep<float>& step, bool cold, float total) const {
    const int share = static_cast<int>(divide_up(at.all, at.members)), begin = static_cast<int>(member) * share;
    const int end = begin + share < at.all ? begin + share : at.all;
    const int side = share < threads() ? share : threads(), lanes = threads() / side, lane = thread() / side;
    const float unit = cold && a.mass < 0 ? 0.0f : total;
    float* scratch = part<float>(at.scratch);
    float change = 0;
    for (int c0 = begin; c0 < begin + share; c0 += side) {
      const int c = c0 + thread() % side;
      LogSum<float> sum;
#pragma unroll 8
      for (int m = lane; m < at.members && lane < lanes && c < end; m += lanes) {
        sum.add(fresh(partials() + int64_t{m} * at.all + c));
      }
      scratch[thread()] = sum.value();
      __syncthreads();
      if (lane == 0 && c < end) {
        LogSum<float> all;
        for (int i = 0; i < lanes; ++i) all.add(scratch[i * side + thread()]);
        const float mass = all.value() - unit, current = potentials()[c];
        const float next = total == -INFINITY ? current : step.next(c, current, mass);
        if (a.tol >= 0) change += step.moved(current, next, mass);
        updated()[c] = next;
      }
      __syncthreads();
    }
    return change;
  }

  __device__ void solve() const {
    float* scratch = part<float>(at.scratch);
    const SinkhornStep<float> step(a, p, scratch);
    const float total = log_weight();
    for (int64_t t = 0; t < a.n_iters; ++t) {
      const bool cold = t == 0 && !a.init, looks = a.tol >= 0 && !cold;
      pass(t);
      barrier.wait();
      float change = update(step, cold, total);
      if (looks) {
        change = block_sum(change, scratch);
        if (thread() == 0) moved()[member] = change;
      }
      barrier.wait();
      if (looks) {
        change = 0;
        for (int m = thread(); m < at.members; m += threads()) change += fresh(moved() + m);
        if (block_sum(change, scratch) <= static_cast<float>(a.tol)) break;
      }
      for (int c = thread(); c < at.all; c += threads()) potentials()[c] = fresh(updated() + c);
      __syncthreads();
    }
  }

  // Potentials as the caller knows them; a member writes its share.
  __device__ void store() const {
    float* result = static_cast<float*>(a.potentials) + p * at.all;
    for (int c = thread(); c < at.all; c += threads()) {
      potentials()[c] *= static_cast<float>(kLn2);
      if (c % at.members == member) result[c] = potentials()[c];
    }
    __syncthreads();
  }

  template <class Out>
  __device__ void assign_rows(bool wide_out) const {
    const Potentials<float> given{potentials(), at.all, a.hard ? 1.0f : static_cast<float>(kLog2E), true};
    const int columns = static_cast<int>(a.rows.columns);
    for (int n = thread() / kWarp; n < count() && first() + n < a.rows.rows; n += threads() / kWarp) {
      Out* out = static_cast<Out*>(a.assignments) + (p * a.rows.rows + first() + n) * columns;
      if (a.hard) {
        assign_hard(rows(), n, given, static_cast<float>(a.epsilon), columns, out, wide_out);
      } else {
        assign_soft(rows(), n, given, static_cast<float>(kLog2E / a.epsilon), columns, out, wide_out);
      }
    }
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kMostThreads, 1) resident(SinkhornSolve a, Layout at, float* workspace, bool wide,
                                                            bool wide_out) {
  CLUSTOPS_DYNAMIC_SHARED(memory);
  const int64_t group = blockIdx.x / at.members, member = blockIdx.x % at.members;
  auto* counter = reinterpret_cast<unsigned*>(workspace) + group * kCounterStride;
  GridBarrier barrier{counter, static_cast<unsigned>(at.members)};
  for (int64_t p = group; p < a.rows.problems; p += at.groups) {
    const Member<T, kColumns> mine{a, at, memory, workspace, p, group, member, barrier, wide};
    mine.load();
    mine.solve();
    mine.store();
    if (a.assignments && a.assignments_dtype == a.rows.dtype) mine.template assign_rows<T>(wide_out);
    if (a.assignments && a.assignments_dtype != a.rows.dtype) mine.template assign_rows<float>(wide_out);
    __syncthreads();  // before the next problem writes to shared memory
  }
}

}  // namespace

int64_t resident_workspace(const SinkhornRows& rows, int64_t all) {
  const Layout at(rows, all);
  return at.members > 0 ? divide_up(at.words(), 2) : 0;
}

void resident_solve(const SinkhornSolve& a, void* stream) {
  const Layout at(a.rows, a.rows.columns + (a.mass >= 0));
  const bool wide_out = a.assignments && is_wide(a.assignments, a.rows.columns, element_size(a.assignments_dtype));
  auto* workspace = static_cast<float*>(a.workspace);
  if (at.members > 1) clear(workspace, sizeof(unsigned) * static_cast<std::size_t>(at.partials()), stream);
  with_element(a.rows.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (!std::is_same<T, double>::value) {
      const auto kernel = at.per_thread == 8 ? resident<T, 8> : resident<T, 32>;
      const auto run = [&](const auto& launcher) {
        launcher(kernel, at.grid(), at.teams.threads(), static_cast<std::size_t>(at.bytes), stream, a, at, workspace,
                 wide_rows(a.rows), wide_out);
      };
      at.members > 1 ? run([](const auto&... given) { launch_together(given...); })
                     : run([](const auto&... given) { launch(given...); });
    }
  });
}

}  // namespace clustops::cuda
