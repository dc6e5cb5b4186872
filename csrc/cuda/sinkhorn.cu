// Sinkhorn potentials, column masses and assignments from rows in global memory, for any shape. An update is three kernels:
// masses over the rows of each CTA, their sums over CTAs, and the update of a problem's potentials.
#include "kernels.h"
#include "sinkhorn_columns.h"
#include "sinkhorn_resident.h"
#include "sinkhorn_split.h"
#include "sinkhorn_step.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSmallShared = 48 << 10;  // of a block, without asking for more

template <class T>
struct Pass {
  using A = Accumulator<T>;
  SinkhornRows rows;
  const A* potentials;  // [problems, all], or null: zeros
  A* partials;          // [problems, chunks, all]
  A* offsets;           // [problems, rows]
  const A* stopped;     // [problems], or null: none
  SplitMasses split;    // of long rows: these passes stand in where it failed; without partials there is no other way
  float* split_space;   // null: rows are not long
  Chunks chunks;
  Teams teams;
  int all;
  A scale;
  bool normalized, look, wide, wide_potentials;

  __device__ int64_t first(int64_t unit) const { return unit % chunks.count * chunks.rows; }
  __device__ int64_t end(int64_t unit) const {
    const int64_t n = rows.rows + rows.queued, last = first(unit) + chunks.rows;
    return last < n ? last : n;
  }
  __device__ A* offsets_of(int64_t unit) const {
    return offsets + unit / chunks.count * (rows.rows + rows.queued) + first(unit);
  }
};

// One CTA per chunk of a problem's rows, which it reads twice where sums of rows are needed.
template <class T>
__global__ void __launch_bounds__(kThreads) exact_pass(Pass<T> a) {
  using A = Accumulator<T>;
  CLUSTOPS_DYNAMIC_SHARED(memory);
  if (a.split.failed && *a.split.failed == 0) return;
  for (int64_t unit = blockIdx.x; unit < a.rows.problems * a.chunks.count; unit += gridDim.x) {
    const int64_t p = unit / a.chunks.count;
    if (a.stopped && a.stopped[p] != 0) continue;
    const A* row = a.potentials ? a.potentials + p * a.all : nullptr;
    const Potentials<A> potentials{row, a.all, static_cast<A>(kLog2E), a.wide_potentials};
    const Columns<A> columns{a.all, a.teams, a.scale, reinterpret_cast<A*>(memory), a.partials + unit * a.all};
    exact_masses(GlobalRows<T>{a.rows, p, a.wide}, a.first(unit), a.end(unit), potentials, a.normalized,
                 a.offsets_of(unit), columns);
    __syncthreads();
  }
}

// One CTA per chunk of a problem's rows, which it reads once. Shared memory: potentials, scratch.
template <class T, int kColumns>
__global__ void __launch_bounds__(kMostThreads, 1) fast_pass(Pass<T> a) {
  CLUSTOPS_DYNAMIC_SHARED(memory);
  const int slots = a.teams.width * kColumns, threads = static_cast<int>(blockDim.x);
  float* potentials = reinterpret_cast<float*>(memory);
  for (int64_t unit = blockIdx.x; unit < a.rows.problems * a.chunks.count; unit += gridDim.x) {
    const int64_t p = unit / a.chunks.count;
    if (a.stopped && a.stopped[p] != 0) continue;
    const Potentials<float> given{a.potentials + p * a.all, a.all, static_cast<float>(kLog2E), a.wide_potentials};
    const Columns<float> columns{a.all, a.teams, a.scale, potentials + slots, a.partials + unit * a.all};
    bool nan = false;
    for (int c = static_cast<int>(threadIdx.x); c < slots; c += threads) {
      potentials[c] = given.at(c);
      nan |= potentials[c] != potentials[c];
    }
    if (__syncthreads_or(nan)) {
      for (int c = static_cast<int>(threadIdx.x); c < a.all; c += threads) columns.log_mass[c] = NAN;
    } else {
      masses<kColumns>(GlobalRows<T>{a.rows, p, a.wide}, a.first(unit), a.end(unit), potentials, a.look,
                       a.offsets_of(unit), columns);
    }
    __syncthreads();
  }
}

constexpr int kSide = 32;  // columns of a CTA that adds up masses of chunks; kThreads / kSide threads share a column

// One CTA per kSide columns of a problem. The result is `unit` times log2 of the mass.
template <class A>
__global__ void __launch_bounds__(kThreads) add_chunks(const A* partials, Chunks chunks, SplitMasses split,
                                                       int64_t problems, int all, A unit, const A* stopped, A* log_mass) {
  __shared__ A found[kThreads];
  if constexpr (!std::is_same<A, double>::value) {
    if (split.failed && *split.failed == 0) partials = split.partials, chunks = split.chunks;
  }
  constexpr int kLanes = kThreads / kSide;
  const int tiles = (all + kSide - 1) / kSide, lane = static_cast<int>(threadIdx.x) / kSide;
  for (int64_t at = blockIdx.x; at < problems * tiles; at += gridDim.x) {
    const int64_t p = at / tiles;
    const int c = static_cast<int>(at % tiles) * kSide + static_cast<int>(threadIdx.x) % kSide;
    if (stopped && stopped[p] != 0) continue;
    LogSum<A> sum;
#pragma unroll 4
    for (int64_t i = lane; i < chunks.count && c < all; i += kLanes) sum.add(partials[(p * chunks.count + i) * all + c]);
    found[threadIdx.x] = sum.value();
    __syncthreads();
    LogSum<A> total;
    for (int i = 0; i < kLanes && lane == 0; ++i) total.add(found[i * kSide + threadIdx.x]);
    if (lane == 0 && c < all) log_mass[p * all + c] = unit * total.value();
    __syncthreads();
  }
}

// One CTA per problem: what the reference does in one turn of its loop. `current` is null in the first of a cold start.
template <class A>
__global__ void __launch_bounds__(kThreads) update(SinkhornSolve a, int all, const A* current, const A* log_mass,
                                                   A* stopped, bool first) {
  __shared__ A scratch[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t p = blockIdx.x; p < a.rows.problems; p += gridDim.x) {
    if (stopped && !first && stopped[p] != 0) continue;
    const A* mass = log_mass + p * all;
    const A* before = current ? current + p * all : nullptr;
    A* after = static_cast<A*>(a.potentials) + p * all;
    const SinkhornStep<A> step(a, p, scratch);
    LogSum<A> mine;
    for (int c = thread; c < all; c += kThreads) mine.add(mass[c]);
    const A most = block_fold(mine.top, scratch, [](A one, A other) { return larger(one, other); });
    const A top = most == -Numbers<A>::infinity ? A(0) : most;
    const A sum = block_sum(mine.sum * power_of_two(mine.top - top), scratch);
    const A total = before ? top + log_two(sum) : all > step.columns ? mass[step.columns] : A(0);

    const auto old = [&](int c) { return before ? before[c] * static_cast<A>(kLog2E) : A(0); };
    bool active = sum != 0;  // no row counts otherwise
    if (a.tol >= 0 && before) {
      A moved = 0;
      for (int c = thread; c < all; c += kThreads) {
        moved += step.moved(old(c), step.next(c, old(c), mass[c] - total), mass[c] - total);
      }
      active &= !(block_sum(moved, scratch) <= static_cast<A>(a.tol));
    }
    if (stopped && thread == 0) stopped[p] = active ? A(0) : A(1);
    for (int c = thread; c < all; c += kThreads) {
      const A next = step.next(c, old(c), mass[c] - total) * static_cast<A>(kLn2);
      after[c] = active ? next : before ? before[c] : A(0);
    }
    __syncthreads();
  }
}

// A warp per row of a chunk. Shared memory: potentials, if they fit.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads) assign_rows(SinkhornAssign a, int all, Chunks chunks, bool shared, bool wide,
                                                        bool wide_potentials, bool wide_out) {
  using A = Accumulator<T>;
  CLUSTOPS_DYNAMIC_SHARED(memory);
  A* copy = reinterpret_cast<A*>(memory);
  const int thread = static_cast<int>(threadIdx.x), columns = static_cast<int>(a.rows.columns);
  const A unit = a.hard ? A(1) : static_cast<A>(kLog2E), epsilon = static_cast<A>(a.epsilon);
  const A scale = static_cast<A>(kLog2E / a.epsilon);
  for (int64_t at = blockIdx.x; at < a.rows.problems * chunks.count; at += gridDim.x) {
    const int64_t p = at / chunks.count, first = at % chunks.count * chunks.rows;
    const int64_t end = first + chunks.rows < a.rows.rows ? first + chunks.rows : a.rows.rows;
    Potentials<A> potentials{static_cast<const A*>(a.potentials) + p * all, all, unit, wide_potentials};
    if (shared) {
      for (int c = thread; c < all; c += kThreads) copy[c] = potentials.at(c);
      __syncthreads();
      potentials = {copy, all, A(1), true};
    }
    const GlobalRows<T> rows{a.rows, p, wide};
    for (int64_t n = first + thread / kWarp; n < end; n += kThreads / kWarp) {
      Out* out = static_cast<Out*>(a.assignments) + (p * a.rows.rows + n) * columns;
      if (a.hard) {
        assign_hard(rows, n, potentials, epsilon, columns, out, wide_out);
      } else {
        assign_soft(rows, n, potentials, scale, columns, out, wide_out);
      }
    }
    __syncthreads();
  }
}

// Columns are counted in 32 bits.
int64_t columns_of(const SinkhornRows& rows, bool virtual_column) {
  if (rows.columns >= 1 << 30) throw std::invalid_argument("scores must have fewer than 2^30 columns");
  return rows.columns + virtual_column;
}

template <class T>
Pass<T> pass_of(const SinkhornRows& rows, int64_t all, void* workspace, double epsilon) {
  using A = Accumulator<T>;
  const PassWorkspace at(rows, all);
  Pass<T> pass{};
  pass.rows = rows;
  pass.partials = static_cast<A*>(workspace) + at.partials;
  pass.offsets = static_cast<A*>(workspace) + at.offsets;
  pass.chunks = chunks_of(rows.problems, rows.rows + rows.queued);
  if constexpr (!std::is_same<T, double>::value) {
    if (split_workspace(rows, all) > 0) pass.split_space = pass.partials + at.elements;
  }
  pass.all = static_cast<int>(all);
  pass.scale = static_cast<A>(kLog2E / epsilon);
  pass.wide = wide_rows(rows);
  return pass;
}

template <class T, int kColumns>
void run_fast(Pass<T>& pass, void* stream) {
  pass.teams = teams_of(pass.all, kColumns, kColumns == 8 ? kPassThreads : 0);
  const int64_t numbers = pass.teams.width * kColumns + scratch_of(pass.teams, kColumns, DType::f32);
  launch(fast_pass<T, kColumns>, grid_for(pass.rows.problems * pass.chunks.count), pass.teams.threads(),
         sizeof(float) * static_cast<std::size_t>(numbers), stream, pass);
}

// Masses of columns under these potentials, null for zeros, into the partials.
template <class T>
void run(Pass<T>& pass, const Accumulator<T>* potentials, bool normalized, void* stream) {
  using A = Accumulator<T>;
  pass.potentials = potentials, pass.normalized = normalized, pass.split = {};
  pass.wide_potentials = is_wide(potentials, pass.all, sizeof(A));
  if constexpr (!std::is_same<T, double>::value) {
    if (normalized && pass.split_space) {
      pass.split = split_masses(
          {pass.rows, potentials, pass.stopped, pass.split_space, pass.all, pass.scale, pass.look}, stream);
    } else if (normalized && in_registers(pass.rows.dtype, pass.all)) {
      return columns_per_thread(pass.all) == 8 ? run_fast<T, 8>(pass, stream) : run_fast<T, 32>(pass, stream);
    }
  }
  pass.teams = teams_of(pass.all, kVector<T>, kThreads);
  if (pass.teams.width > kThreads) pass.teams = {kThreads, 1};
  const int64_t numbers = pass.teams.count > 1 ? kVector<T> * pass.teams.threads() : 0;
  launch(exact_pass<T>, grid_for(pass.rows.problems * pass.chunks.count), pass.teams.threads(),
         sizeof(A) * static_cast<std::size_t>(numbers), stream, pass);
}

template <class T>
void add_up(const Pass<T>& pass, double unit, Accumulator<T>* log_mass, void* stream) {
  using A = Accumulator<T>;
  launch(add_chunks<A>, grid_for(pass.rows.problems * divide_up(pass.all, kSide)), kThreads, 0, stream, pass.partials,
         pass.chunks, pass.split, pass.rows.problems, pass.all, static_cast<A>(unit), pass.stopped, log_mass);
}

template <class T>
void solve(const SinkhornSolve& a, int64_t all, void* stream) {
  using A = Accumulator<T>;
  const PassWorkspace at(a.rows, all);
  A* log_mass = static_cast<A*>(a.workspace) + at.log_mass;
  A* stopped = a.tol < 0 ? nullptr : static_cast<A*>(a.workspace) + at.stopped;
  const A* current = static_cast<const A*>(a.init);
  Pass<T> pass = pass_of<T>(a.rows, all, a.workspace, a.epsilon);
  for (int64_t t = 0; t < a.n_iters; ++t) {
    pass.look = t == 0;
    run(pass, current, current != nullptr, stream);
    add_up(pass, 1.0, log_mass, stream);
    launch(update<A>, grid_for(a.rows.problems), kThreads, 0, stream, a, pass.all, current, log_mass, stopped, t == 0);
    current = static_cast<const A*>(a.potentials), pass.stopped = stopped;
  }
}

template <class T, class Out>
void run_assign(const SinkhornAssign& a, void* stream) {
  using A = Accumulator<T>;
  const int64_t all = columns_of(a.rows, a.virtual_column), bytes = static_cast<int64_t>(sizeof(A)) * all;
  const bool shared = bytes <= kSmallShared;
  const Chunks chunks = chunks_of(a.rows.problems, a.rows.rows);
  launch(assign_rows<T, Out>, grid_for(a.rows.problems * chunks.count), kThreads,
         static_cast<std::size_t>(shared ? bytes : 0), stream, a, static_cast<int>(all), chunks, shared,
         wide_rows(a.rows), is_wide(a.potentials, all, sizeof(A)), is_wide(a.assignments, a.rows.columns, sizeof(Out)));
}

int64_t in_words(int64_t elements, DType dtype) { return dtype == DType::f64 ? elements : divide_up(elements, 2); }

}  // namespace

int64_t sinkhorn_mass_workspace(const SinkhornRows& rows, bool virtual_column) {
  const int64_t all = columns_of(rows, virtual_column);
  return in_words(PassWorkspace(rows, all).elements + split_workspace(rows, all), rows.dtype);
}

int64_t sinkhorn_solve_workspace(const SinkhornRows& rows, bool virtual_column) {
  const int64_t resident = resident_workspace(rows, columns_of(rows, virtual_column));
  return resident > 0 ? resident : sinkhorn_mass_workspace(rows, virtual_column);
}

void sinkhorn_column_mass(const SinkhornMass& a, void* stream) {
  const int64_t all = columns_of(a.rows, a.virtual_column);
  with_element(a.rows.dtype, [&](auto x) {
    using T = decltype(x);
    using A = Accumulator<T>;
    Pass<T> pass = pass_of<T>(a.rows, all, a.workspace, a.epsilon);
    pass.look = true;
    run(pass, static_cast<const A*>(a.potentials), a.normalized, stream);
    add_up(pass, kLn2, static_cast<A*>(a.log_mass), stream);
  });
}

void sinkhorn_assign(const SinkhornAssign& a, void* stream) {
  with_element(a.rows.dtype, [&](auto x) {
    using T = decltype(x);
    if (a.assignments_dtype == a.rows.dtype) {
      run_assign<T, T>(a, stream);
    } else {
      run_assign<T, Accumulator<T>>(a, stream);
    }
  });
}

void sinkhorn_solve(const SinkhornSolve& a, void* stream) {
  const bool virtual_column = a.mass >= 0;
  const int64_t all = columns_of(a.rows, virtual_column);
  if (resident_workspace(a.rows, all) > 0) return resident_solve(a, stream);
  with_element(a.rows.dtype, [&](auto x) { solve<decltype(x)>(a, all, stream); });
  if (!a.assignments) return;
  sinkhorn_assign({a.rows, a.potentials, a.assignments, a.epsilon, virtual_column, a.hard, a.assignments_dtype, nullptr},
                  stream);
}

}  // namespace clustops::cuda
