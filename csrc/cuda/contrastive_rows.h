// What the kernels of the class losses share: their arguments, what they read of all rows first, and how results end.
#pragma once

#include "../common/contrastive.h"
#include "contrastive_layout.h"
#include "contrastive_pairs.h"
#include "element.h"

namespace clustops::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostWidth = 256;  // of rows that these kernels take

#ifdef CLUSTOPS_SIMT
inline void publish() {}
template <class T>
T fresh(const T* where) {
  return *where;
}
#else
// What this thread has written is seen by whoever learns of it.
__device__ inline void publish() { __threadfence(); }
// From the level 2 cache: what another CTA may just have written.
__device__ inline float fresh(const float* where) { return __ldcg(where); }
__device__ inline RowSums fresh(const RowSums* where) {
  const float4 four = __ldcg(reinterpret_cast<const float4*>(where));
  return {four.x, four.y, four.z, four.w};
}
#endif

// Tiles of rows by parts of all columns. A function of the shape alone, so that sums are the same on every GPU; made for
// one with kProcessors multiprocessors.
constexpr int64_t kProcessors = 132;

struct Split {
  int64_t first_row;   // of all row blocks, a multiple of kTileRows
  int64_t row_blocks;  // that hold anchors
  int64_t columns;     // tiles of columns
  int splits;

  CLUSTOPS_HOST_DEVICE int64_t units() const { return row_blocks * splits; }
  CLUSTOPS_HOST_DEVICE int64_t begin(int split) const { return columns * split / splits; }
};

// Row blocks of `rows` rows for anchors [first, last), all rows in tiles of `columns` columns; at most `most` parts.
inline Split split_of(int64_t all, int64_t first, int64_t last, int rows, int columns, int most) {
  Split split{};
  split.first_row = first / kTileRows * kTileRows;
  split.row_blocks = last > first ? divide_up(last - split.first_row, rows) : 0;
  split.columns = divide_up(all, columns);
  split.splits = 1;
  double least = 0;
  for (int s = 1; s <= most && s <= split.columns && split.row_blocks > 0; ++s) {
    // In tiles of columns: a CTA costs two, a part that is read again half of one.
    const int64_t waves = divide_up(split.row_blocks * s, kProcessors);
    const double cost = static_cast<double>(waves * (divide_up(split.columns, s) + 2)) + 0.5 * s;
    if (s == 1 || cost < least) least = cost, split.splits = s;
  }
  return split;
}

struct ForwardTask {
  Prepared p;
  Pairs pairs;  // undecided
  Split split;
  int64_t first, last;  // anchors
  RowSums* sums;        // [splits, row_blocks * rows of a block]
  unsigned* tickets;    // [row_blocks], 0
  float *loss, *lse;    // [last - first]
  float* weight;        // [(last - first) / views]
  float* norms;         // [2]
};

struct BackwardTask {
  Prepared p;
  Pairs pairs;  // undecided
  Split split;
  int64_t first, last;  // rows whose gradient is wanted
  float* sums;          // [splits, row_blocks * rows of a block, features of the kernel], unless there is one split
  unsigned* tickets;    // [row_blocks], 0
  const void* features;  // [rows, width], of the dtype of the operands
  void* gradient;        // [last - first, width], likewise
};

// Those of the lane `by` apart.
__device__ inline RowSums shuffled(const RowSums& sums, int by) {
  RowSums other;
  other.shift = __shfl_xor_sync(kAllLanes, sums.shift, by);
  other.sum = __shfl_xor_sync(kAllLanes, sums.sum, by);
  other.pull = __shfl_xor_sync(kAllLanes, sums.pull, by);
  other.own = __shfl_xor_sync(kAllLanes, sums.own, by);
  return other;
}

template <int kThreads>
__device__ Summary all_of(Summary mine, Summary* room) {
  const auto join = [](Summary& a, const Summary& b) {
    a.least = b.least < a.least ? b.least : a.least;
    a.greatest = b.greatest > a.greatest ? b.greatest : a.greatest;
    a.upstream = b.upstream > a.upstream ? b.upstream : a.upstream;
    a.bad |= b.bad;
  };
#pragma unroll
  for (int by = 16; by > 0; by /= 2) {
    const Summary other{__shfl_xor_sync(kAllLanes, mine.least, by), __shfl_xor_sync(kAllLanes, mine.greatest, by),
                        __shfl_xor_sync(kAllLanes, mine.upstream, by), __shfl_xor_sync(kAllLanes, mine.bad, by)};
    join(mine, other);
  }
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = mine;
  __syncthreads();
  Summary all = room[0];
  for (int w = 1; w < kThreads / 32; ++w) join(all, room[w]);
  __syncthreads();
  return all;
}

// The summary of all rows, for every thread of a CTA; `room` holds one for each of its warps.
template <int kThreads>
__device__ Summary summary_of(const Prepared& p, Summary* room) {
  Summary mine{Numbers<float>::infinity, 0, 0, 0};
  for (int i = threadIdx.x; i < p.summaries(); i += kThreads) {
    const Summary s = p.summary[i];
    mine.least = s.least < mine.least ? s.least : mine.least;
    mine.greatest = s.greatest > mine.greatest ? s.greatest : mine.greatest;
    mine.upstream = s.upstream > mine.upstream ? s.upstream : mine.upstream;
    mine.bad |= s.bad;
  }
  return all_of<kThreads>(mine, room);
}

__device__ inline void write_norms(const Summary& all, float* norms) {
  const float nan = Numbers<float>::infinity - Numbers<float>::infinity;
  norms[0] = all.bad ? nan : all.least;
  norms[1] = all.bad ? nan : all.greatest;
}

// Whether all CTAs of a row block have come here, this one last: it alone then sees what the others wrote before.
__device__ inline bool last_of(unsigned* ticket, int splits, int* room) {
  publish();
  __syncthreads();
  if (threadIdx.x == 0) *room = atomicAdd(ticket, 1u) == static_cast<unsigned>(splits) - 1;
  __syncthreads();
  const bool last = *room != 0;
  if (last) publish();
  return last;
}

// The results of row a, which is an anchor, from its sums over all columns.
__device__ inline void finish_row(const ForwardTask& t, int64_t a, const RowSums& sums, bool bad) {
  const float lse = sums.log_partition(), weight = t.p.weight[a];
  const float pull = t.p.q[a] * sums.pull + t.p.own[a] * sums.own;
  float loss = weight > 0 ? lse - pull * t.pairs.inverse_temperature / weight : 0.0f;
  if (bad) loss = Numbers<float>::infinity - Numbers<float>::infinity;
  t.loss[a - t.first] = loss;
  t.lse[a - t.first] = lse;
  if (a % t.p.views == 0) t.weight[(a - t.first) / t.p.views] = weight;
}

// A power of two that brings gradients of scores into the range of fp16, of which none is above four upstream ones.
__device__ inline float fp16_factor(float upstream) {
  return upstream > 0 && upstream < Numbers<float>::infinity ? ldexpf(1.0f, 12 - static_cast<int>(ceilf(log2f(upstream)))) : 1.0f;
}

// A warp ends row a: `value(d)` is its gradient before division by the temperature, in features d = lane * kEach + e of
// lanes, zero past the width.
template <class T, int kEach>
__device__ void finish_gradient(const BackwardTask& t, int64_t a, const float (&value)[kEach], float factor) {
  const int lane = threadIdx.x % 32;
  const float scale = t.pairs.inverse_temperature * factor, inverse = t.p.inverse[a];
  const T* features = static_cast<const T*>(t.features) + a * t.p.width;
  T* gradient = static_cast<T*>(t.gradient) + (a - t.first) * t.p.width;
  float z[kEach], dot = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int64_t d = lane * kEach + e;
    z[e] = t.pairs.normalized && d < t.p.width ? value_of(features[d]) * inverse : 0.0f;
    dot = fmaf(z[e], value[e] * scale, dot);
  }
  if (t.pairs.normalized) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) dot += __shfl_xor_sync(kAllLanes, dot, by);
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int64_t d = lane * kEach + e;
    if (d >= t.p.width) continue;
    const float dz = value[e] * scale;
    assign(gradient[d], t.pairs.normalized ? fmaf(-z[e], dot, dz) * inverse : dz);
  }
}

// Rows are counted in 32 bits where pairs of them are; all pairs of more would take days.
inline void expect_few(const ContrastiveRows& r) {
  if (r.samples * r.views >= (int64_t{1} << 30)) throw std::invalid_argument("features must have below 2^30 rows");
}

inline Pairs pairs_of(const ContrastiveRows& r) {
  return {r.samples * r.views, r.views, static_cast<float>(kLog2E / r.temperature),
          static_cast<float>(1 / r.temperature), r.normalize, false};
}

// Queues what prepares rows and samples: contrastive_prepare.cu. `tickets` numbers are set to 0.
void prepare(const ContrastiveForward& problem, const Prepared& p, unsigned* tickets, int64_t count, void* stream);
void prepare(const ContrastiveBackward& problem, const Prepared& p, unsigned* tickets, int64_t count, void* stream);

}  // namespace clustops::cuda
