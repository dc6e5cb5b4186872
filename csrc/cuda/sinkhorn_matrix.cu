// Small square matrices made doubly stochastic, and the gradient. With scalings u of rows and v of columns,
//   v_j = 1 / sum_i e_ij u_i,  u_i = 1 / sum_j e_ij v_j  in turn,  result_ij = e_ij u_i v_j,
// where e_ij = exp(m_ij - max_i m_ij). Where a sum is too small to be exact, all is done with logarithms instead.
//
// The way back knows the gradient of log u and of log v. A step of rows takes g_i e_ij u_i v_j from the gradient of m_ij,
// and what it takes from a column from the gradient of log v_j; a step of columns likewise.
#include "../common/host_device.h"
#include "element.h"
#include "exponent.h"
#include "kernels.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kKept = 32;            // steps whose v is kept at once for the way back; if there are more, they are redone
constexpr float kSmallest = 1e-14f;  // e below 1e-38 is 0: of a sum above this, scaled by 1e14 at most, 1e-9 is lost

template <class Real>
struct alignas(16) Quad {
  Real x[4];
};

// One of the matrices of a block, in registers of kLanes lanes, each of which has kRows rows and columns. Every vector
// belongs to the lanes in the same way, and goes through shared memory to be seen as a whole. With kLog, e, u and v are
// logarithms to base 2. Rows and columns past the size of the matrix are 0.
template <class Real, int n, int kLanes, bool kLog>
struct Matrix {
  static constexpr int kRows = n / kLanes;
  static constexpr Real kOne = kLog ? 0 : 1, kZero = kLog ? -Numbers<Real>::infinity : Real(0);

  Real row[kRows][n], column[kLanes == 1 ? 1 : kRows][n];
  Real smallest = 1;  // of the sums
  int size;           // rows of the matrix, 0 past the last one
  int first;          // row and column of this lane

  __device__ bool inside(int r) const { return first + r < size; }

  // Row i of column first + r.
  __device__ Real down(int r, int i) const {
    if constexpr (kLanes == 1) {
      return row[i][r];
    } else {
      return column[r][i];
    }
  }

  // All of a vector.
  __device__ static void read(const Real* from, Real (&all)[n]) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const auto four = *reinterpret_cast<const Quad<Real>*>(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) all[i + j] = four.x[j];
    }
  }

  __device__ void share(const Real (&mine)[kRows], Real* through, Real (&all)[n]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) through[first + r] = mine[r];
    if constexpr (kLanes == 1) {
#pragma unroll
      for (int i = 0; i < n; ++i) all[i] = mine[i];
    } else {
      __syncwarp();
      read(through, all);
    }
  }

  __device__ static void fill(Real (&all)[n], Real value) {
#pragma unroll
    for (int i = 0; i < n; ++i) all[i] = value;
  }

  // From shared memory, rows `pitch` apart.
  __device__ void load(const Real* m, int pitch, Real* through) {
    Real most[n];
    fill(most, 0);
    if constexpr (!kLog) {
      Real mine[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        mine[r] = -Numbers<Real>::infinity;
        for (int i = 0; i < size && inside(r); ++i) mine[r] = larger(mine[r], m[i * pitch + first + r]);
      }
      share(mine, through, most);
    }
    const Real log2e = static_cast<Real>(kLog2E);
    const auto entry = [&](Real x, Real shift) { return kLog ? x * log2e : power_of_two((x - shift) * log2e); };
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Real own = kLog ? 0 : through[first + r];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const bool there = inside(r) && i < size;
        row[r][i] = there ? entry(m[(first + r) * pitch + i], most[i]) : kZero;
        if constexpr (kLanes > 1) column[r][i] = there ? entry(m[i * pitch + first + r], own) : kZero;
      }
    }
  }

  // 1 / sum_i line_i scale_i.
  template <class Line>
  __device__ Real inverse(const Line& line, const Real (&scale)[n]) {
    Real sum = 0;
    if constexpr (kLog) {
      Real most = kZero;
#pragma unroll
      for (int i = 0; i < n; ++i) most = larger(most, line(i) + scale[i]);
#pragma unroll
      for (int i = 0; i < n; ++i) sum += power_of_two(line(i) + scale[i] - most);
      return -(most + logarithm(sum) * static_cast<Real>(kLog2E));
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) sum += line(i) * scale[i];
      if (sum < smallest) smallest = sum;
      return reciprocal(sum);
    }
  }

  __device__ void scale_rows(const Real (&v)[n], Real (&u)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) u[r] = inside(r) ? inverse([&](int j) { return row[r][j]; }, v) : kOne;
  }

  __device__ void scale_columns(const Real (&u)[n], Real (&v)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) v[r] = inside(r) ? inverse([&](int i) { return down(r, i); }, u) : kOne;
  }

  // All steps up to `end`: u, and at `kept` v of the steps from `begin` on, `stride` apart; before step 1 it is 1.
  __device__ void forward(int64_t begin, int64_t end, Real* kept, int64_t stride, Real* through, Real (&u)[kRows]) {
    Real all[n], v[kRows];
    fill(all, kOne);
#pragma unroll
    for (int r = 0; r < kRows; ++r) v[r] = kOne;
    if (begin == 0) share(v, kept, all);
    if (end == 0) scale_rows(all, u);
#pragma unroll 1
    for (int64_t t = 1; t <= end; ++t) {
      scale_columns(all, v);
      share(v, kept + (t > begin ? t - begin : 0) * stride, all);
      scale_rows(all, u);
      if (t < end) share(u, through, all);
    }
  }

  // An element of the result, without the factor e unless it is in logarithms; and the factor.
  __device__ static Real term(Real e, Real u, Real v) { return kLog ? power_of_two(e + u + v) : u * v; }
  __device__ static Real times(Real e, Real x) { return kLog ? x : e * x; }

  __device__ void result(const Real (&u)[kRows], const Real* kept, Real (&to)[kRows][n]) const {
    Real v[n];
    read(kept, v);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < n; ++j) to[r][j] = times(row[r][j], term(row[r][j], u[r], v[j]));
    }
  }

  // From the gradient g of the result, rows `pitch` apart, that of m. u and v of steps from `begin` on are known.
  __device__ void backward(const Real* g, int pitch, int64_t begin, int64_t n_iters, Real* kept, int64_t stride,
                           Real* through, Real (&u)[kRows], Real (&to)[kRows][n]) {
    Real v[n], all[n], of_u[kRows], of_v[kRows];  // the gradients of log u and log v
    const Real* own = kept + (n_iters - begin) * stride;
    read(own, v);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      of_u[r] = 0;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        to[r][j] = inside(r) && j < size ? g[(first + r) * pitch + j] * term(row[r][j], u[r], v[j]) : Real(0);
        of_u[r] += times(row[r][j], to[r][j]);
      }
    }
    share(u, through + stride, all);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      of_v[r] = 0;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (!inside(r) || i >= size) continue;
        const Real e = down(r, i);
        of_v[r] += times(e, g[i * pitch + first + r] * term(e, all[i], own[first + r]));
      }
    }
#pragma unroll 1
    for (int64_t t = n_iters;; --t) {
      if (t == begin && t > 0) {
        begin = t > kKept ? t - kKept : 0;
        forward(begin, t, kept, stride, through, u);
      }
      own = kept + (t - begin) * stride;
      read(own, v);
      back_through_rows(u, v, own + first, of_u, through, stride, of_v, to);
      if (t == 0) break;
      Real before[kRows];
      fill(all, kOne);
      if (t > 1) read(own - stride, all);
#pragma unroll
      for (int r = 0; r < kRows; ++r) before[r] = kOne;
      if (t > 1) scale_rows(all, before);
      back_through_columns(before, v, own + first, of_v, through + stride, of_u, to);
      if (t == 1) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) u[r] = before[r], of_v[r] = 0;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < n; ++j) to[r][j] = times(row[r][j], to[r][j]);
    }
  }

  __device__ void back_through_rows(const Real (&u)[kRows], const Real (&v)[n], const Real* own, const Real (&of_u)[kRows],
                                    Real* through, int64_t stride, Real (&of_v)[kRows], Real (&to)[kRows][n]) const {
    Real all[n], given[kRows], all_u[n];
#pragma unroll
    for (int r = 0; r < kRows; ++r) given[r] = kLog ? of_u[r] : of_u[r] * u[r];
    share(given, through, all);
    if constexpr (kLog) share(u, through + 2 * stride, all_u);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Real sum = 0;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const Real e = down(r, i);
        sum += all[i] * (kLog ? term(e, all_u[i], own[r]) : e);
      }
      of_v[r] -= kLog ? sum : sum * own[r];
#pragma unroll
      for (int j = 0; j < n; ++j) to[r][j] -= given[r] * (kLog ? term(row[r][j], u[r], v[j]) : v[j]);
    }
  }

  __device__ void back_through_columns(const Real (&u)[kRows], const Real (&v)[n], const Real* own,
                                       const Real (&of_v)[kRows], Real* through, Real (&of_u)[kRows],
                                       Real (&to)[kRows][n]) const {
    Real all[n], given[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) given[r] = kLog ? of_v[r] : of_v[r] * own[r];
    share(given, through, all);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Real sum = 0;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const Real part = all[j] * (kLog ? term(row[r][j], u[r], v[j]) : u[r]);
        to[r][j] -= part;
        sum += times(row[r][j], part);
      }
      of_u[r] = -sum;
    }
  }
};

// Numbers in memory, of whatever dtype.
__device__ void read_number(const void* from, DType dtype, int64_t i, float& x) {
  if (dtype == DType::f32) {
    x = static_cast<const float*>(from)[i];
  } else if (dtype == DType::bf16) {
    x = value_of(static_cast<const Bf16*>(from)[i]);
  } else {
    x = value_of(static_cast<const F16*>(from)[i]);
  }
}
__device__ void read_number(const void* from, DType, int64_t i, double& x) { x = static_cast<const double*>(from)[i]; }

__device__ void write_number(void* to, DType dtype, int64_t i, float x) {
  if (dtype == DType::f32) {
    static_cast<float*>(to)[i] = x;
  } else if (dtype == DType::bf16) {
    assign(static_cast<Bf16*>(to)[i], x);
  } else {
    assign(static_cast<F16*>(to)[i], x);
  }
}
__device__ void write_number(void* to, DType, int64_t i, double x) { static_cast<double*>(to)[i] = x; }

// Where the matrices of a block are in shared memory: odd pitches, for lanes that read rows at once.
struct Stage {
  int size, pitch, matrix;

  CLUSTOPS_HOST_DEVICE explicit Stage(int n) : size(n), pitch(n | 1), matrix(n * (n | 1) | 1) {}

  // use(number of the element, its place) for the elements of `count` matrices, dealt to the threads of the block.
  template <int n, class Use>
  __device__ void each(int count, const Use& use) const {
    if (size == n) {
      elements(count, n, use);
    } else {
      elements(count, size, use);
    }
  }

 private:
  template <class Use>
  __device__ void elements(int count, int n, const Use& use) const {
#pragma unroll 4
    for (int i = threadIdx.x; i < count * n * n; i += kThreads) {
      use(i, i / (n * n) * matrix + i / n % n * pitch + i % n);
    }
  }
};

// Numbers of shared memory: the stage, then slots of a vector for each matrix of the block.
template <class Real, int n, int kLanes>
struct Layout {
  static constexpr int kPerBlock = kThreads / kLanes;
  static constexpr int kSlot = kPerBlock * n;

  static int64_t bytes(const SinkhornMatrix& a) {
    const int64_t kept = a.gradient ? (a.n_iters < kKept ? a.n_iters : kKept) + 1 : 1;
    return (stage(Stage(static_cast<int>(a.n))) + (3 + kept) * kSlot) * static_cast<int64_t>(sizeof(Real));
  }
  CLUSTOPS_HOST_DEVICE static int stage(const Stage& s) { return (kPerBlock * s.matrix + 3) / 4 * 4; }
};

// Leaves the results of matrices [begin, begin + count) in the stage, where m is; false, with m still there, if sums
// were too small.
template <class Real, int n, int kLanes, bool kBackward, bool kLog>
__device__ bool solve(const SinkhornMatrix& a, const Stage& where, int64_t begin, int count, Real* stage) {
  using Place = Layout<Real, n, kLanes>;
  const int mine = threadIdx.x / kLanes;
  Real* const m = stage + mine * where.matrix;
  Real* const through = stage + Place::stage(where) + mine * n;
  Real* const kept = through + 3 * Place::kSlot;
  Matrix<Real, n, kLanes, kLog> matrix;
  constexpr int kRows = decltype(matrix)::kRows;
  matrix.size = mine < count ? where.size : 0;
  matrix.first = threadIdx.x % kLanes * kRows;
  matrix.load(m, where.pitch, through);

  Real u[kRows], result[kRows][n];
  const int64_t from = !kBackward ? a.n_iters : a.n_iters > kKept ? a.n_iters - kKept : 0;
  matrix.forward(from, a.n_iters, kept, Place::kSlot, through, u);
  if (!kLog && __syncthreads_or(matrix.smallest < kSmallest)) return false;
  if constexpr (kBackward) {
    __syncthreads();
    where.template each<n>(count, [&](int i, int place) {
      read_number(a.gradient, a.dtype, begin * where.size * where.size + i, stage[place]);
    });
    __syncthreads();
    matrix.backward(m, where.pitch, from, a.n_iters, kept, Place::kSlot, through, u, result);
  } else {
    matrix.result(u, kept, result);
  }
  // The lanes of this warp, and no others, have read this matrix, and passed a barrier since.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (matrix.inside(r) && j < where.size) m[(matrix.first + r) * where.pitch + j] = result[r][j];
    }
  }
  return true;
}

// One CTA per kThreads / kLanes neighbouring matrices.
template <class Real, int n, int kLanes, bool kBackward>
__global__ void __launch_bounds__(kThreads) project(SinkhornMatrix a) {
  CLUSTOPS_DYNAMIC_SHARED(shared);
  constexpr int kPerBlock = Layout<Real, n, kLanes>::kPerBlock;
  Real* const stage = reinterpret_cast<Real*>(shared);
  const Stage where(static_cast<int>(a.n));
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kPerBlock; begin < a.matrices;
       begin += static_cast<int64_t>(gridDim.x) * kPerBlock) {
    const int count = static_cast<int>(a.matrices - begin < kPerBlock ? a.matrices - begin : kPerBlock);
    const int64_t first = begin * a.n * a.n;
    where.template each<n>(count, [&](int i, int place) { read_number(a.m, a.dtype, first + i, stage[place]); });
    __syncthreads();
    bool done = false;
    if constexpr (sizeof(Real) == 4) {
      if (a.n_iters > 0) done = solve<Real, n, kLanes, kBackward, false>(a, where, begin, count, stage);
    }
    if (!done) solve<Real, n, kLanes, kBackward, true>(a, where, begin, count, stage);
    __syncthreads();
    // A thread will read the next element into the place from which it writes this one.
    where.template each<n>(count, [&](int i, int place) { write_number(a.result, a.dtype, first + i, stage[place]); });
  }
}

template <class Real, int n, int kLanes>
void launch_project(const SinkhornMatrix& a, void* stream) {
  using Place = Layout<Real, n, kLanes>;
  const int64_t grid = grid_for((a.matrices + Place::kPerBlock - 1) / Place::kPerBlock);
  const auto kernel = a.gradient ? project<Real, n, kLanes, true> : project<Real, n, kLanes, false>;
  launch(kernel, grid, kThreads, static_cast<std::size_t>(Place::bytes(a)), stream, a);
}

}  // namespace

void sinkhorn_matrix(const SinkhornMatrix& a, void* stream) {
  if (a.dtype == DType::f64) {
    launch_project<double, 32, 32>(a, stream);
  } else if (a.n <= 4) {
    launch_project<float, 4, 1>(a, stream);
  } else if (a.n <= 8) {
    launch_project<float, 8, 2>(a, stream);
  } else if (a.n <= 16) {
    launch_project<float, 16, 8>(a, stream);
  } else {
    launch_project<float, 32, 32>(a, stream);
  }
}

}  // namespace clustops::cuda
