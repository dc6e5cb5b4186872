// Class losses of rows too wide for tensor cores to keep: torch multiplies blocks of rows, and these kernels do what comes
// before, between and after. Nothing [rows, rows] is written.
#include "contrastive_rows.h"
#include "kernels.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWide = 4;           // columns that a thread takes at once: 16 bytes of scores
constexpr int kSumRows = 4;        // rows of a CTA
constexpr int kGradientRows = 8;   // whose columns a thread holds in registers
constexpr int64_t kBlockRows = 128;  // of blocks: a multiple of both
static_assert(kBlockRows % kSumRows == 0 && kBlockRows % kGradientRows == 0 && kBlockRows == kTileRows);

// What is known of rows and samples, as the kernels of narrow rows know it, and what belongs to rows of any width.
struct Chunked {
  Prepared p;        // of rows of one feature, their norm: p.operands and p.inverse mean nothing
  float* norm;       // [padded]
  float* inverse;    // [padded] 1 / norm, or 1
  RowSums* carried;  // [padded] sums over the blocks so far
};

Chunked chunked_rows(const ContrastiveRows& r, bool backward, void* workspace, int64_t* bytes) {
  Chunked c{};
  c.p = prepared_rows(r.samples, r.views, 1, Operand::tf32, backward, workspace, bytes);
  const auto take = [&](int64_t size) {
    void* const here = static_cast<unsigned char*>(workspace) + *bytes;
    *bytes += align_up(size, 1024);
    return here;
  };
  c.norm = static_cast<float*>(take(c.p.padded * 4));
  c.inverse = static_cast<float*>(take(c.p.padded * 4));
  if (!backward) c.carried = static_cast<RowSums*>(take(c.p.padded * static_cast<int64_t>(sizeof(RowSums))));
  return c;
}

// One warp per row of z [padded, width]: its norm, and the row divided by that if asked; zeros beyond the last row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    unit_rows(const T* features, T* z, float* norms, float* inverses, int64_t rows, int64_t padded, int64_t width,
              bool normalize) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp; row < padded; row += int64_t{gridDim.x} * kWarps) {
    const T* const from = features + row * width;
    T* const to = z + row * width;
    double square = 0;  // of any fp32 without overflow
    for (int64_t d = lane; row < rows && d < width; d += 32) {
      const double x = value_of(from[d]);
      square += x * x;
    }
#pragma unroll
    for (int by = 16; by > 0; by /= 2) square += __shfl_xor_sync(kAllLanes, square, by);
    const double norm = sqrt(square);
    float inverse = normalize ? static_cast<float>(1 / norm) : 1.0f;
    if (inverse > -Numbers<float>::lowest) inverse = 0;
    for (int64_t d = lane; d < width; d += 32) assign(to[d], row < rows ? value_of(from[d]) * inverse : 0.0f);
    // A norm beyond fp32 is not that of a feature which is not finite.
    const float most = -Numbers<float>::lowest;
    const bool finite = square < Numbers<double>::infinity;
    if (lane == 0) norms[row] = finite && norm > most ? most : static_cast<float>(norm), inverses[row] = inverse;
  }
}

__global__ void __launch_bounds__(kThreads) tell_norms(Prepared p, float* norms) {
  __shared__ Summary room[kWarps];
  const Summary all = summary_of<kThreads>(p, room);
  if (blockIdx.x == 0 && threadIdx.x == 0) write_norms(all, norms);
}

struct alignas(16) Four {
  float x[kWide];
};
struct alignas(16) FourIntegers {
  int32_t x[kWide];
};

// One CTA per kSumRows rows of a block: each thread takes four columns of all of them at a time.
// Limit: reading scores, which the matrix product has just left in the level 2 cache.
__global__ void __launch_bounds__(kThreads) sum_block(ForwardTask t, ContrastiveBlock block, RowSums* carried) {
  __shared__ Summary summaries[kWarps];
  __shared__ RowSums joined[kWarps][kSumRows];
  const Summary all = summary_of<kThreads>(t.p, summaries);
  Pairs pairs = t.pairs;
  pairs.decide(all.greatest);
  for (int64_t group = blockIdx.x; group < block.rows / kSumRows; group += gridDim.x) {
    const int64_t row = block.row + group * kSumRows;
    const Edge around(pairs, row, kSumRows);
    const float* const scores = block.scores + group * kSumRows * block.columns;
    RowPlace place[kSumRows];
    int32_t number[kSumRows];
    RowSums sums[kSumRows];
#pragma unroll
    for (int r = 0; r < kSumRows; ++r) {
      place[r] = RowPlace(row + r, pairs.views), number[r] = t.p.number[row + r];
      sums[r].start(pairs);
    }
    for (int64_t c = threadIdx.x * kWide; c < block.columns; c += kThreads * kWide) {
      const int64_t column = block.column + c;
      Four x[kSumRows];
#pragma unroll
      for (int r = 0; r < kSumRows; ++r) x[r] = *reinterpret_cast<const Four*>(scores + r * block.columns + c);
      const Four q = *reinterpret_cast<const Four*>(t.p.q + column);
      const FourIntegers numbers = *reinterpret_cast<const FourIntegers*>(t.p.number + column);
      const auto nth = [](int i) { return i; };
      const bool edge = around.meets(column, kWide);
#pragma unroll
      for (int r = 0; r < kSumRows; ++r) {
        const auto score = [&](int i) { return x[r].x[i]; };
        const int32_t b0 = static_cast<int32_t>(column);
        if (edge) {
          sums[r].take<kWide, true>(pairs, place[r], number[r], score, b0, numbers.x, q.x, nth);
        } else {
          sums[r].take<kWide, false>(pairs, place[r], number[r], score, b0, numbers.x, q.x, nth);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kSumRows; ++r) {
#pragma unroll
      for (int by = 16; by > 0; by /= 2) sums[r].merge(shuffled(sums[r], by));
      if (threadIdx.x % 32 == 0) joined[threadIdx.x / 32][r] = sums[r];
    }
    __syncthreads();
    if (threadIdx.x < kSumRows) {
      const int64_t a = row + threadIdx.x;
      RowSums sum = joined[0][threadIdx.x];
      for (int w = 1; w < kWarps; ++w) sum.merge(joined[w][threadIdx.x]);
      if (!block.first) sum.merge(carried[a]);
      if (!block.last) {
        carried[a] = sum;
      } else if (a >= t.first && a < t.last) {
        finish_row(t, a, sum, all.bad != 0);
      }
    }
    __syncthreads();  // before the next rows' sums
  }
}

__device__ inline PairRow row_at(const Prepared& p, int64_t row) {
  return {p.number[row], p.q[row], p.share[row], p.strength[row], p.upstream[row], p.log_partition[row]};
}

// One CTA per kGradientRows rows and kThreads * kWide columns of a block: a thread holds what its four columns say and
// turns their scores, row by row, into gradients, which may take the place of the scores.
// Limit: reading scores and writing gradients, in the level 2 cache.
template <class T>
__global__ void __launch_bounds__(kThreads) turn_block(Prepared p, Pairs undecided, ContrastiveBlock block, T* gradients) {
  __shared__ Summary summaries[kWarps];
  const Summary all = summary_of<kThreads>(p, summaries);
  Pairs pairs = undecided;
  pairs.decide(all.greatest);
  const float factor = std::is_same<T, F16>::value ? fp16_factor(all.upstream) : 1.0f;
  constexpr int64_t kColumns = kThreads * kWide;
  const int64_t parts = divide_up(block.columns, kColumns), units = parts * (block.rows / kGradientRows);
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t line = unit / parts * kGradientRows, c = unit % parts * kColumns + threadIdx.x * kWide;
    if (c >= block.columns) continue;
    const int64_t row = block.row + line, column = block.column + c;
    PairRow b[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) b[i] = row_at(p, column + i);
    const bool edge = Edge(pairs, row, kGradientRows).meets(column, kWide);
#pragma unroll 2
    for (int r = 0; r < kGradientRows; ++r) {
      const RowPlace place(row + r, edge ? pairs.views : 1);
      const PairRow a = row_at(p, row + r);
      const float own = p.own[row + r];
      const Four x = *reinterpret_cast<const Four*>(block.scores + (line + r) * block.columns + c);
      struct alignas(sizeof(T) * kWide) Result {
        T of[kWide];
      } g;
      const auto derive = [&](auto fixed, auto at_edge) {
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
          assign(g.of[i], factor * pair_gradient<decltype(fixed)::value, decltype(at_edge)::value>(
                                       pairs, place, a, own, b[i], static_cast<int32_t>(column) + i, x.x[i]));
        }
      };
      if (pairs.fixed) {
        edge ? derive(std::true_type(), std::true_type()) : derive(std::true_type(), std::false_type());
      } else {
        edge ? derive(std::false_type(), std::true_type()) : derive(std::false_type(), std::false_type());
      }
      *reinterpret_cast<Result*>(gradients + (line + r) * block.columns + c) = g;
    }
  }
}

// One warp per row whose gradient is wanted: from sums_b G_ab z_b, [rows from `row` on, width].
template <class T>
__global__ void __launch_bounds__(kThreads)
    end_gradients(Prepared p, Pairs pairs, const float* inverses, const float* sums, int64_t row, int64_t first,
                  int64_t last, int64_t width, const T* features, T* gradient) {
  __shared__ Summary summaries[kWarps];
  const Summary all = summary_of<kThreads>(p, summaries);
  const float factor = std::is_same<T, F16>::value ? fp16_factor(all.upstream) : 1.0f;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = pairs.inverse_temperature / factor;
  for (int64_t a = first + int64_t{blockIdx.x} * kWarps + warp; a < last; a += int64_t{gridDim.x} * kWarps) {
    const float* const sum = sums + (a - row) * width;
    const T* const x = features + a * width;
    T* const to = gradient + (a - first) * width;
    const float inverse = inverses[a];
    float dot = 0;
    for (int64_t d = lane; pairs.normalized && d < width; d += 32) {
      dot = fmaf(value_of(x[d]) * inverse, sum[d] * scale, dot);
    }
#pragma unroll
    for (int by = 16; by > 0; by /= 2) dot += __shfl_xor_sync(kAllLanes, dot, by);
    for (int64_t d = lane; d < width; d += 32) {
      const float dz = sum[d] * scale;
      assign(to[d], pairs.normalized ? fmaf(-(value_of(x[d]) * inverse), dot, dz) * inverse : dz);
    }
  }
}

// use(T()) for the features' dtype, which is not fp64.
template <class Use>
void with_features(DType dtype, const Use& use) {
  with_element(dtype, [&](auto element) {
    if constexpr (sizeof(element) < 8) use(element);
  });
}

template <class Problem>
void prepare_any_width(const Problem& problem, const Chunked& c, void* z, void* stream) {
  const ContrastiveRows& r = problem.rows;
  with_features(r.dtype, [&](auto element) {
    using T = decltype(element);
    launch(unit_rows<T>, grid_for(divide_up(c.p.padded, kWarps)), kThreads, 0, stream,
           static_cast<const T*>(r.features), static_cast<T*>(z), c.norm, c.inverse, c.p.rows, c.p.padded, r.width,
           r.normalize);
  });
  Problem norms = problem;
  norms.rows.features = c.norm, norms.rows.dtype = DType::f32, norms.rows.width = 1, norms.rows.normalize = false;
  prepare(norms, c.p, nullptr, 0, stream);
}

}  // namespace

int64_t contrastive_chunked_workspace(const ContrastiveRows& rows, bool backward) {
  int64_t bytes = 0;
  chunked_rows(rows, backward, nullptr, &bytes);
  return bytes;
}

void contrastive_chunked_prepare(const ContrastiveForward& problem, void* workspace, void* z, void* stream) {
  int64_t bytes = 0;
  const Chunked c = chunked_rows(problem.rows, false, workspace, &bytes);
  prepare_any_width(problem, c, z, stream);
  launch(tell_norms, 1, kThreads, 0, stream, c.p, static_cast<float*>(problem.norms));
}

void contrastive_chunked_prepare(const ContrastiveBackward& problem, void* workspace, void* z, void* stream) {
  int64_t bytes = 0;
  prepare_any_width(problem, chunked_rows(problem.rows, true, workspace, &bytes), z, stream);
}

void contrastive_chunked_sums(const ContrastiveForward& problem, void* workspace, const ContrastiveBlock& block,
                              void* stream) {
  const ContrastiveRows& r = problem.rows;
  int64_t bytes = 0;
  const Chunked c = chunked_rows(r, false, workspace, &bytes);
  ForwardTask t{};
  t.p = c.p, t.pairs = pairs_of(r), t.first = r.first * r.views, t.last = (r.first + r.count) * r.views;
  t.loss = static_cast<float*>(problem.loss), t.lse = static_cast<float*>(problem.lse);
  t.weight = static_cast<float*>(problem.weight);
  launch(sum_block, grid_for(block.rows / kSumRows), kThreads, 0, stream, t, block, c.carried);
}

void contrastive_chunked_turn(const ContrastiveBackward& problem, void* workspace, const ContrastiveBlock& block,
                              void* gradients, void* stream) {
  const ContrastiveRows& r = problem.rows;
  int64_t bytes = 0;
  const Chunked c = chunked_rows(r, true, workspace, &bytes);
  const int64_t units = divide_up(block.columns, int64_t{kThreads} * kWide) * (block.rows / kGradientRows);
  with_features(r.dtype, [&](auto element) {
    using T = decltype(element);
    launch(turn_block<T>, grid_for(units), kThreads, 0, stream, c.p, pairs_of(r), block, static_cast<T*>(gradients));
  });
}

void contrastive_chunked_end(const ContrastiveBackward& problem, void* workspace, const float* sums, int64_t row,
                             void* stream) {
  const ContrastiveRows& r = problem.rows;
  int64_t bytes = 0;
  const Chunked c = chunked_rows(r, true, workspace, &bytes);
  with_features(r.dtype, [&](auto element) {
    using T = decltype(element);
    launch(end_gradients<T>, grid_for(divide_up(r.count * r.views, kWarps)), kThreads, 0, stream, c.p, pairs_of(r),
           static_cast<const float*>(c.inverse), sums, row, r.first * r.views, (r.first + r.count) * r.views, r.width,
           static_cast<const T*>(r.features), static_cast<T*>(problem.gradient));
  });
}

}  // namespace clustops::cuda
