// Column masses of long rows. The CTAs of a group walk down some rows together: each sums its slice of a few rows, all add
// these sums up over a barrier, and what a thread has of the softmax goes to the masses in its registers.
#include "sinkhorn_split.h"

#include "grid_barrier.h"
#include "mma.h"
#include "sinkhorn_columns.h"

namespace clustops::cuda {
namespace {

#ifdef CLUSTOPS_SIMT  // small, so that tests meet several slices
constexpr int kSplitThreads = 64;
constexpr int64_t kLongRow = 1000;
#else
constexpr int kSplitThreads = 512;
constexpr int64_t kLongRow = kMostColumns;
#endif
constexpr int kSplitColumns = 16;  // of a thread
constexpr int kSlice = kSplitThreads * kSplitColumns;
constexpr int kSplitWarps = kSplitThreads / kWarp;
constexpr int kStages = 2;
constexpr int kCounterStride = 32;  // counters of barriers lie in lines of their own

// Rows at a time: as many as leave room for two stages in shared memory.
constexpr int rows_at_once(int64_t element) { return element == 2 ? 4 : 2; }

struct Layout {
  int64_t members = 0, groups = 0;  // members: 0 if this way is not taken
  Chunks chunks{};
  int64_t bytes = 0;                                // of shared memory: potentials, stages, sums of warps
  int64_t failed = 0, exchange = 0, partials = 0, words = 0;  // counters come first

  Layout(const SinkhornRows& a, int64_t all) {
    const int64_t size = element_size(a.dtype), n = a.rows + a.queued;
    if (a.dtype == DType::f64 || all <= kLongRow || n < 1 || a.problems < 1) return;
    const int batch = rows_at_once(size);
    bytes = 4 * kSlice + kStages * batch * kSlice * size + 4 * kSplitWarps * batch;
    const int64_t wanted = divide_up(all, kSlice), processors = multiprocessors();
    if (bytes > most_shared() || wanted > processors) return;
    members = wanted, groups = processors / members;
    const int64_t share = divide_up(groups, a.problems);
    const int64_t rows = round_up(divide_up(n, share), batch);
    chunks = {rows, divide_up(n, rows)};
    if (groups > a.problems * chunks.count) groups = a.problems * chunks.count;
    failed = groups * kCounterStride;
    exchange = failed + kCounterStride;
    partials = exchange + groups * kStages * members * batch;
    words = partials + a.problems * chunks.count * all;
  }
};

template <class T, int kRows>
__global__ void __launch_bounds__(kSplitThreads, 1) split_pass(SplitPass a, Layout at, bool wide) {
  constexpr int kSize = kVector<T>, kVectors = kSplitColumns / kSize, kGroup = kWarp / kRows;
  constexpr float kLeast = 0x1p-90f, kMost = 0x1p120f;  // terms below 2^-126 vanish: 2^-36 of the least sum
  CLUSTOPS_DYNAMIC_SHARED(memory);
  auto* potentials = reinterpret_cast<float*>(memory);
  auto* stages = reinterpret_cast<T*>(potentials + kSlice);
  auto* sums = reinterpret_cast<float*>(stages + kStages * kRows * kSlice);
  auto* words = static_cast<float*>(a.workspace);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t group = blockIdx.x / at.members, member = blockIdx.x % at.members, base = member * kSlice;
  const int columns = static_cast<int>(a.rows.columns), all = static_cast<int>(a.all);
  float* exchange = words + at.exchange + group * kStages * at.members * kRows;
  GridBarrier barrier{reinterpret_cast<unsigned*>(words) + group * kCounterStride, static_cast<unsigned>(at.members)};

  int stage = 0;  // goes on over units: the slots below alternate without end
  for (int64_t unit = group; unit < a.rows.problems * at.chunks.count; unit += at.groups) {
    const int64_t p = unit / at.chunks.count, first = unit % at.chunks.count * at.chunks.rows;
    const int64_t n = a.rows.rows + a.rows.queued, end = first + at.chunks.rows < n ? first + at.chunks.rows : n;
    if (a.stopped && a.stopped[p] != 0) continue;
    const GlobalRows<T> rows{a.rows, p, wide};
    const Potentials<float> start{a.potentials + p * all, all, static_cast<float>(kLog2E), false};
    for (int c = thread; c < kSlice; c += kSplitThreads) potentials[c] = start.at(static_cast<int>(base) + c);
    __syncthreads();

    // What a thread copies only it reads.
    const auto fetch = [&](int64_t n0, int stage) {
#pragma unroll 1
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int slot = (v * kSplitThreads + thread) * kSize, c = static_cast<int>(base) + slot;
          T* to = stages + int64_t{stage * kRows + i} * kSlice + slot;
          if (n0 + i < end && wide && c + kSize <= columns) {
            copy_async(to, rows.row(n0 + i) + c);
          } else {
            store16(to, n0 + i < end ? rows.vector(n0 + i, c) : uint4{});
          }
        }
      }
      commit_copies();
    };

    float mass[kSplitColumns];
#pragma unroll
    for (int j = 0; j < kSplitColumns; ++j) mass[j] = 0;
    float largest = 0;
    bool finite = true;
    fetch(first, stage);
    for (int64_t n0 = first; n0 < end; n0 += kRows, stage ^= 1) {
      fetch(n0 + kRows, stage ^ 1);
      wait_for_copies<1>();
      const auto weight = [&](int i) { return n0 + i < end ? rows.weight(n0 + i) : 0.0f; };
      float sum[kRows], e[kRows][kSplitColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i] = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int slot = (v * kSplitThreads + thread) * kSize;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float z[kSize];
          numbers_of<T>(load16(stages + int64_t{stage * kRows + i} * kSlice + slot), z);
          if (a.look && weight(i) != 0) finite &= all_finite<T>(z);
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            e[i][v * kSize + j] = power_of_two(fused(z[j], a.scale, potentials[slot + j]));
            sum[i] += e[i][v * kSize + j];
          }
        }
      }

      // Over the warp, the CTA, the group. Two slots in turn: whoever writes one again has passed the barrier after it.
      const float of_warp = fold_rows(sum);
      if (lane % kGroup == 0) sums[warp * kRows + lane / kGroup] = of_warp;
      __syncthreads();
      float* slots = exchange + stage * at.members * kRows;
      if (thread < kRows) {
        float total = 0;
        for (int w = 0; w < kSplitWarps; ++w) total += sums[w * kRows + thread];
        slots[member * kRows + thread] = total;
      }
      barrier.wait();
      float total = 0;
      for (int64_t m = lane / kRows; m < at.members; m += kGroup) total += fresh(slots + m * kRows + lane % kRows);
#pragma unroll
      for (int by = kWarp / 2; by >= kRows; by /= 2) total += __shfl_xor_sync(kAllLanes, total, by);
      const float inverse = total >= kLeast && total <= kMost ? 1 / total : NAN;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float given = weight(i), share = given * __shfl_sync(kAllLanes, inverse, i);
        if (given == 0) continue;  // may hold NaN
        largest = larger(largest, share);
#pragma unroll
        for (int j = 0; j < kSplitColumns; ++j) mass[j] = fused(e[i][j], share, mass[j]);
      }
    }
    wait_for_copies<0>();

    // A power below 2^-126 vanishes, so up to `largest` times that is missing for each row.
    const float least = largest > 0 ? 0x1p-94f * (largest > 1 ? largest : 1.0f) : largest;
    bool fails = !finite;
#pragma unroll
    for (int j = 0; j < kSplitColumns; ++j) {
      const int slot = (j / kSize * kSplitThreads + thread) * kSize + j % kSize;
      const float m = mass[j];
      fails |= potentials[slot] != -Numbers<float>::infinity && !(m >= least && m <= -Numbers<float>::lowest);
      if (base + slot < all) words[at.partials + unit * all + base + slot] = m == 0 ? -Numbers<float>::infinity : log_two(m);
    }
    if (__syncthreads_or(fails) && thread == 0) words[at.failed] = 1;
  }
}

}  // namespace

int64_t split_workspace(const SinkhornRows& rows, int64_t all) {
  const Layout at(rows, all);
  return at.members > 0 ? at.words : 0;
}

SplitMasses split_masses(const SplitPass& pass, void* stream) {
  const Layout at(pass.rows, pass.all);
  auto* words = static_cast<float*>(pass.workspace);
  clear(words, sizeof(float) * static_cast<std::size_t>(at.exchange), stream);
  with_element(pass.rows.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (!std::is_same<T, double>::value) {
      launch_together(split_pass<T, rows_at_once(sizeof(T))>, at.groups * at.members, kSplitThreads,
                      static_cast<std::size_t>(at.bytes), stream, pass, at, wide_rows(pass.rows));
    }
  });
  return {words + at.partials, words + at.failed, at.chunks};
}

}  // namespace clustops::cuda
