// Masses of columns over the rows of one CTA, as logarithms to base 2. Two ways: an exact one for whatever numbers come,
// and one that reads each score once, where no row or column is too far from the others. Both run on all threads.
#pragma once

#include "sinkhorn_rows.h"

namespace clustops::cuda {

template <class A>
struct Columns {
  int all;  // those of the scores, and the virtual one
  Teams teams;
  A scale;  // log2(e) / epsilon
  A* scratch;
  A* log_mass;  // [all], the result
};

// Adds log2 of what the teams found, one value a thread and slot, in the order of teams; the first team has the result.
template <int kSlots, class A>
__device__ inline void merge_teams(const Columns<A>& to, A (&log_mass)[kSlots]) {
  if (to.teams.count == 1) return;
#pragma unroll
  for (int j = 0; j < kSlots; ++j) to.scratch[threadIdx.x * kSlots + j] = log_mass[j];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < to.teams.width) {
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      LogSum<A> sum;
      for (int team = 0; team < to.teams.count; ++team) {
        sum.add(to.scratch[(team * to.teams.width + static_cast<int>(threadIdx.x)) * kSlots + j]);
      }
      log_mass[j] = sum.value();
    }
  }
  __syncthreads();
}

// sum_n w_n 2^(s_n scale + a), divided by the sums of rows where `normalized`; NaN if a score is not finite. A warp takes
// the sum of a row, which goes to offsets[n - first]; then a thread walks down a vector of columns with a running maximum.
template <class Rows, class A>
__device__ void exact_masses(const Rows& rows, int64_t first, int64_t end, const Potentials<A>& potentials, bool normalized,
                             A* offsets, const Columns<A>& to) {
  using T = typename Rows::Element;
  constexpr int kSize = kVector<T>, kRows = 4;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int64_t n = first + thread; n < end && !normalized; n += threads) offsets[n - first] = log_two(rows.weight(n));
  for (int64_t n = first + thread / kWarp; n < end && normalized; n += threads / kWarp) {
    const A weight = rows.weight(n);
    A offset = log_two(weight);
    if (weight != 0) {
      const RowSum<A> row = row_sum(rows, n, potentials, to.scale);
      offset -= row.top + log_two(row.sum);
    }
    if (thread % kWarp == 0) offsets[n - first] = offset;
  }
  __syncthreads();

  const int width = to.teams.width, column = thread % width * kSize, team = thread / width;
  bool finite = true;
  for (int c0 = 0; c0 < to.all; c0 += width * kSize) {
    const int c = c0 + column;
    A top[kSize], sum[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) top[j] = -Numbers<A>::infinity, sum[j] = 0;
    for (int64_t n0 = first + team; n0 < end && c < to.all; n0 += kRows * to.teams.count) {
      A offset[kRows], z[kRows][kSize];
      uint4 raw[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t n = n0 + i * to.teams.count;
        offset[i] = n < end ? offsets[n - first] : -Numbers<A>::infinity;
        raw[i] = n < end ? rows.vector(n, c) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        numbers_of<T>(offset[i] == -Numbers<A>::infinity ? uint4{} : raw[i], z[i]);
        finite &= all_finite<T>(z[i]);
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        A most = top[j];
#pragma unroll
        for (int i = 0; i < kRows; ++i) z[i][j] = fused(z[i][j], to.scale, offset[i]), most = larger(most, z[i][j]);
        const A shift = most == -Numbers<A>::infinity ? A(0) : most;
        sum[j] *= power_of_two(top[j] - shift);
#pragma unroll
        for (int i = 0; i < kRows; ++i) sum[j] += power_of_two(z[i][j] - shift);
        top[j] = most;
      }
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] = sum[j] == 0 ? -Numbers<A>::infinity : top[j] + log_two(sum[j]);
    merge_teams(to, sum);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const A a = potentials.at(c + j);
      if (team == 0 && c + j < to.all) to.log_mass[c + j] = a == -Numbers<A>::infinity ? a : sum[j] + a;
    }
  }
  if (!__syncthreads_or(!finite)) return;
  for (int c = thread; c < to.all; c += threads) to.log_mass[c] = A(NAN);
}

// Sums of kRows rows over the lanes of a warp: afterwards a lane has that of row lane / (32 / kRows).
template <int kRows>
__device__ inline float fold_rows(float (&sum)[kRows]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = kWarp / 2, left = kRows; step > 0; step /= 2) {
    left /= 2;
    if (left == 0) {
      sum[0] += __shfl_xor_sync(kAllLanes, sum[0], step);
      continue;
    }
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      if (i >= left) break;
      const float given = upper ? sum[i] : sum[i + left], kept = upper ? sum[i + left] : sum[i];
      sum[i] = kept + __shfl_xor_sync(kAllLanes, given, step);
    }
  }
  return sum[0];
}

// The sums of a team's rows become their inverses, NaN where one is too small or large to say anything about its terms.
// `partial` has room for kRows numbers a warp; those of the call before must have been read by all, or be elsewhere.
template <int kRows>
__device__ inline void invert_row_sums(float (&sum)[kRows], int width, float* partial) {
  constexpr float kLeast = 0x1p-90f, kMost = 0x1p120f;  // terms below 2^-126 vanish: 2^-36 of the least sum
  constexpr int kGroup = kWarp / kRows;
  if (width < kWarp) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      for (int by = width / 2; by > 0; by /= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], by);
      sum[i] = sum[i] >= kLeast && sum[i] <= kMost ? 1 / sum[i] : NAN;
    }
    return;
  }
  float total = fold_rows(sum);
  if (width > kWarp) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int row = lane / kGroup, fellows = width / kWarp, begin = warp / fellows * fellows;
    if (lane % kGroup == 0) partial[warp * kRows + row] = total;
    __syncthreads();
    total = 0;
    for (int w = lane % kGroup; w < fellows; w += kGroup) total += partial[(begin + w) * kRows + row];
#pragma unroll
    for (int by = kGroup / 2; by > 0; by /= 2) total += __shfl_xor_sync(kAllLanes, total, by);
  }
  const float inverse = total >= kLeast && total <= kMost ? 1 / total : NAN;
#pragma unroll
  for (int i = 0; i < kRows; ++i) sum[i] = __shfl_sync(kAllLanes, inverse, i * kGroup);
}

constexpr int kBatch = 32;  // numbers of one thread at once: rows times columns

// Numbers of scratch that the functions here take.
inline int64_t scratch_of(const Teams& teams, int per_thread, DType dtype) {
  const int64_t slots = dtype == DType::f64 ? kVector<double> : per_thread;
  const int64_t partial = dtype == DType::f64 ? 0 : 2 * (kBatch / per_thread) * (teams.threads() / kWarp);
  return partial + (teams.count > 1 ? slots * teams.threads() : 0);
}

// sum_n w_n softmax(s_n scale + a), each score read once: kColumns columns of a thread, kBatch / kColumns rows of a team
// at a time, potentials in shared memory up to column kColumns width. Where a sum is out of range, or a column so light
// that what was lost of it may count, exact_masses takes over. `look`: whether scores may be infinite.
template <int kColumns, class Rows>
__device__ void masses(const Rows& rows, int64_t first, int64_t end, const float* a, bool look, float* offsets,
                       const Columns<float>& given) {
  using T = typename Rows::Element;
  constexpr int kSize = kVector<T>, kVectors = kColumns / kSize, kRows = kBatch / kColumns;
  const int thread = static_cast<int>(threadIdx.x), width = given.teams.width;
  const int team = thread / width, step = given.teams.count;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  Columns<float> to = given;
  float* partial = to.scratch;
  to.scratch += 2 * kRows * warps;

  float mass[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) mass[j] = 0;
  float largest = 0;
  bool finite = true;
  uint4 next[kRows][kVectors];
  const auto fetch = [&](int64_t n0) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t n = n0 + i * step + team;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int c = (v * width + thread % width) * kSize;
        next[i][v] = n < end && c < to.all ? rows.vector(n, c) : uint4{};
      }
    }
  };
  fetch(first);
  bool odd = false;
  for (int64_t n0 = first; n0 < end; n0 += kRows * step) {
    uint4 raw[kRows][kVectors];
    float weight[kRows], sum[kRows], e[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t n = n0 + i * step + team;
      weight[i] = n < end ? rows.weight(n) : 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) raw[i][v] = next[i][v];
    }
    fetch(n0 + kRows * step);
#pragma unroll
    for (int i = 0; i < kRows; ++i) sum[i] = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float potential[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) potential[j] = a[(v * width + thread % width) * kSize + j];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float z[kSize];
        numbers_of<T>(raw[i][v], z);
        if (look && weight[i] != 0) finite &= all_finite<T>(z);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          e[i][v * kSize + j] = power_of_two(fused(z[j], to.scale, potential[j]));
          sum[i] += e[i][v * kSize + j];
        }
      }
    }
    invert_row_sums(sum, width, partial + (odd ? kRows * warps : 0));
    odd = !odd;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (weight[i] == 0) continue;  // may hold NaN
      const float share = weight[i] * sum[i];
      largest = larger(largest, share);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) mass[j] = fused(e[i][j], share, mass[j]);
    }
  }

  // A power below 2^-126 vanishes, so up to `largest` times that is missing for each row.
  const float least = largest > 0 ? 0x1p-94f * (largest > 1 ? largest : 1.0f) : largest;
  bool fails = !finite;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const float potential = a[(j / kSize * width + thread % width) * kSize + j % kSize];
    fails |= potential != -Numbers<float>::infinity && !(mass[j] >= least && mass[j] <= -Numbers<float>::lowest);
    mass[j] = mass[j] == 0 ? -Numbers<float>::infinity : log_two(mass[j]);
  }
  if (__syncthreads_or(fails)) {
    const Potentials<float> potentials{a, to.all, 1.0f, true};
    exact_masses(rows, first, end, potentials, true, offsets, to);
    return;
  }
  merge_teams(to, mass);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int c = (j / kSize * width + thread % width) * kSize + j % kSize;
    if (team == 0 && c < to.all) to.log_mass[c] = mass[j];
  }
}

}  // namespace clustops::cuda
