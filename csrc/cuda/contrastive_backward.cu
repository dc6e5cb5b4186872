// Gradients of class losses on tensor cores by mma.sync, from scores computed again; nothing [rows, rows] is written.
#include <type_traits>

#include "contrastive_sm90.h"
#include "contrastive_tiles.h"
#include "kernels.h"

namespace clustops::cuda {
namespace {

template <Operand kOperand>
using ElementOf = std::conditional_t<kOperand == Operand::bf16, Bf16, std::conditional_t<kOperand == Operand::f16, F16, float>>;

// The arrays of one stage, in the order in which they are fetched.
template <int kColumns>
struct ColumnArrays {
  const unsigned char* base;

  __device__ float2 two(int array, int c) const {
    return *reinterpret_cast<const float2*>(base + (array * kColumns + c) * 4);
  }
  // Columns c and c + 1, c even.
  template <bool kFixed>
  __device__ void load(int c, PairRow (&b)[2]) const {
    const int32_t* number = reinterpret_cast<const int32_t*>(base) + c;
    const float2 q = two(1, c), share = two(2, c);
    b[0].number = number[0], b[0].q = q.x, b[0].share = share.x;
    b[1].number = number[1], b[1].q = q.y, b[1].share = share.y;
    if (kFixed) {
      const float2 strength = two(3, c);
      b[0].strength = strength.x, b[1].strength = strength.y;
    } else {
      const float2 upstream = two(4, c), log_partition = two(5, c);
      b[0].upstream = upstream.x, b[1].upstream = upstream.y;
      b[0].log_partition = log_partition.x, b[1].log_partition = log_partition.y;
    }
  }
};

template <int kColumns>
__device__ void fetch_columns(const Prepared& p, int64_t tile, unsigned char* stage, int64_t arrays) {
  fetch_rows<kColumns>(p, tile * kColumns, stage);
  const void* const from[] = {p.number, p.q, p.share, p.strength, p.upstream, p.log_partition};
#pragma unroll
  for (int i = 0; i < kBackwardArrays; ++i) {
    fetch_numbers<kColumns>(from[i], tile * kColumns, stage + arrays + i * kColumns * 4, i);
  }
}

__device__ inline PairRow row_at(const Prepared& p, int64_t row) {
  return {p.number[row], p.q[row], p.share[row], p.strength[row], p.upstream[row], p.log_partition[row]};
}

// Feature d of a row in shared memory, [rows, kFeatures]: four rows of a warp's store are in different banks.
template <int kFeatures>
__device__ int sum_at(int row, int d) {
  return row * kFeatures + (d ^ (row % 4 * 8));
}

// Leaves in shared memory, as sum_at says, the sums of both columns of warps.
template <int kM, int kFeatures>
__device__ void join_sums(const float (&sums)[kM][kFeatures / 8][4], float* joined) {
  const int lane = threadIdx.x % 32, column_warp = threadIdx.x / 32 / kRowWarps;
  for (int turn = kColumnWarps - 1; turn >= 0; --turn) {
    if (column_warp == turn) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int f = 0; f < kFeatures / 8; ++f) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2* at = reinterpret_cast<float2*>(joined + sum_at<kFeatures>(row_of(m, half, kM), 8 * f + 2 * (lane % 4)));
            float2 sum{sums[m][f][2 * half], sums[m][f][2 * half + 1]};
            if (turn < kColumnWarps - 1) sum = {at->x + sum.x, at->y + sum.y};
            *at = sum;
          }
        }
      }
    }
    __syncthreads();
  }
}

// One CTA per block of rows and part of the columns, as in class_rows: the gradients of a tile's scores are, in registers,
// the left operand of a second product with the tile's rows; a warp holds 16 kM x kFeatures sums. The last CTA of a
// row block adds the sums of all parts, in their order, and ends the rows.
// Limit: matrix products at 4 D flops a score.
template <Operand kOperand, int kM, int kColumns, int kFeatures>
__global__ void __launch_bounds__(kTileThreads, 1) class_gradients(BackwardTask t, TileLayout at) {
  CLUSTOPS_DYNAMIC_SHARED(shared);
  constexpr int kRows = kBlockRows<kM>, kN = kColumns / kColumnWarps / 8, kEach = kFeatures / 32;
  using T = ElementOf<kOperand>;
  float* const joined = reinterpret_cast<float*>(shared);  // in the end
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column_warp = warp / kRowWarps;
  const Summary all = summary_of<kTileThreads>(t.p, reinterpret_cast<Summary*>(shared + at.room));
  Pairs pairs = t.pairs;
  pairs.decide(all.greatest);
  const float factor = kOperand == Operand::f16 ? fp16_factor(all.upstream) : 1.0f;

  for (int64_t unit = blockIdx.x; unit < t.split.units(); unit += gridDim.x) {
    const int64_t block = unit / t.split.splits;
    const int split = static_cast<int>(unit % t.split.splits);
    const int64_t row0 = t.split.first_row + block * kRows;
    fetch_rows<kRows>(t.p, row0, shared + at.rows);  // arrives with the first tile
    const Edge edge(pairs, row0, kRows);
    float sums[kM][kFeatures / 8][4] = {};
    for_tiles(
        at, shared, t.split.begin(split), t.split.begin(split + 1),
        [&](int64_t tile, unsigned char* stage) { fetch_columns<kColumns>(t.p, tile, stage, at.arrays); },
        [&](int64_t tile, const unsigned char* stage) {
          float x[kM][kN][4] = {};
          multiply_rows<kOperand, kM, kN, kRows, kColumns>(shared + at.rows, 16 * kM * (warp % kRowWarps), stage,
                                                           8 * kN * column_warp, t.p.chunks, x);
          const ColumnArrays<kColumns> columns{stage + at.arrays};
          const int first = 8 * kN * column_warp + 2 * (lane % 4);
          const auto derive = [&](auto fixed, auto on_edge) {
            constexpr bool kFixed = decltype(fixed)::value, kEdge = decltype(on_edge)::value;
            PairRow a[kM][2];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
              for (int half = 0; half < 2; ++half) a[m][half] = row_at(t.p, row0 + row_of(m, half, kM));
            }
#pragma unroll
            for (int n = 0; n < kN; ++n) {
              PairRow b[2];
              columns.template load<kFixed>(first + 8 * n, b);
#pragma unroll
              for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const int64_t row = row0 + row_of(m, i / 2, kM);
                  const RowPlace place(row, kEdge ? pairs.views : 1);
                  const float own = kEdge ? t.p.own[row] : 0.0f;
                  const int32_t column = static_cast<int32_t>(tile * kColumns) + first + 8 * n + i % 2;
                  float& score = x[m][n][i];
                  score = factor *
                          pair_gradient<kFixed, kEdge>(pairs, place, a[m][i / 2], own, b[i % 2], column, score);
                }
              }
            }
          };
          const auto with = [&](auto fixed) {
            edge.meets(tile * kColumns, kColumns) ? derive(fixed, std::true_type()) : derive(fixed, std::false_type());
          };
          pairs.fixed ? with(std::true_type()) : with(std::false_type());
          multiply_gradients<kOperand, kM, kN, kColumns, kFeatures>(x, stage, 8 * kN * column_warp, t.p.chunks, sums);
        });
    join_sums<kM, kFeatures>(sums, joined);
    const auto finish = [&](const auto& value_at) {
      for (int r = warp; r < kRows; r += kTileThreads / 32) {
        const int64_t row = row0 + r;
        if (row < t.first || row >= t.last) continue;
        float value[kEach];
#pragma unroll
        for (int e = 0; e < kEach; ++e) value[e] = value_at(r, lane * kEach + e);
        finish_gradient<T, kEach>(t, row, value, 1 / factor);
      }
    };
    if (t.split.splits == 1) {
      finish([&](int r, int d) { return joined[sum_at<kFeatures>(r, d)]; });
    } else {
      const int64_t part = t.split.row_blocks * kRows * kFeatures;
      float* const to = t.sums + block * (kRows * kFeatures);
      for (int i = threadIdx.x; i < kRows * kFeatures; i += kTileThreads) {
        to[split * part + i] = joined[sum_at<kFeatures>(i / kFeatures, i % kFeatures)];
      }
      if (last_of(t.tickets + block, t.split.splits, reinterpret_cast<int*>(shared + at.room))) {
        finish([&](int r, int d) {
          float sum = 0;
          for (int s = 0; s < t.split.splits; ++s) sum += fresh(to + s * part + r * kFeatures + d);
          return sum;
        });
      }
    }
    __syncthreads();  // before the next unit writes to shared memory
  }
}

constexpr int kMostSplits = 8;

struct Plan {
  Prepared p;
  Split split;
  bool sm90;
  int m, columns, features;
  float* sums;
  unsigned* tickets;
  int64_t bytes;

  Plan(const ContrastiveRows& r, Operand operand, void* workspace) {
    p = prepared_rows(r.samples, r.views, r.width, operand, true, workspace, &bytes);
    const int64_t first = r.first * r.views, last = first + r.count * r.views;
    sm90 = sm90_suits(p, last - first);
    columns = columns_for(p.chunks);
    features = sm90 ? p.chunks * kChunk : r.width <= 64 ? 64 : r.width <= 128 ? 128 : 256;
    m = sm90 ? kBackwardRows90 / 64 : p.rows >= kManyRows && features <= 128 && bytes_of(operand) == 2 ? 2 : 1;
    split = sm90 ? backward_split_sm90(p, first, last) : split_of(p.rows, first, last, 64 * m, columns, kMostSplits);
    sums = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + bytes);
    if (split.splits > 1) bytes += split.splits * split.row_blocks * 64 * m * features * 4;
    tickets = reinterpret_cast<unsigned*>(static_cast<unsigned char*>(workspace) + bytes);
    bytes += split.row_blocks * 4;
  }

  TileLayout layout(int64_t limit) const {
    return {p.chunks, 64 * m, columns, kBackwardArrays, 64 * static_cast<int64_t>(m) * features * 4, limit};
  }
};

template <Operand kOperand>
void run(const BackwardTask& t, const Plan& plan, void* stream) {
  const TileLayout at = plan.layout(most_shared());
  const auto go = [&](auto kernel) {
    launch(kernel, grid_for(t.split.units()), kTileThreads, static_cast<std::size_t>(at.bytes), stream, t, at);
  };
  if (plan.features == 256) {
    return go(class_gradients<kOperand, 1, bytes_of(kOperand) == 2 ? 64 : 32, 256>);
  }
  if constexpr (bytes_of(kOperand) == 2) {
    if (plan.m == 2) {
      return plan.features == 64 ? go(class_gradients<kOperand, 2, 64, 64>) : go(class_gradients<kOperand, 2, 64, 128>);
    }
  }
  plan.features == 64 ? go(class_gradients<kOperand, 1, 64, 64>) : go(class_gradients<kOperand, 1, 64, 128>);
}

}  // namespace

int64_t backward_shared_bytes(int64_t width, Operand operand, int64_t limit) {
  ContrastiveRows one{};
  one.samples = one.views = one.count = 1, one.width = width;
  return Plan(one, operand, nullptr).layout(limit).bytes;
}

int64_t contrastive_backward_workspace(const ContrastiveRows& rows, bool exact) {
  return Plan(rows, operand_of(rows.dtype, exact), nullptr).bytes;
}

void contrastive_rows_backward(const ContrastiveBackward& problem, void* workspace, bool exact, void* stream) {
  const ContrastiveRows& r = problem.rows;
  const Operand operand = operand_of(r.dtype, exact);
  expect_few(r);
  const Plan plan(r, operand, workspace);
  if (plan.split.units() == 0) return;
  prepare(problem, plan.p, plan.tickets, plan.split.row_blocks, stream);
  const BackwardTask t{plan.p,
                       pairs_of(r),
                       plan.split,
                       r.first * r.views,
                       (r.first + r.count) * r.views,
                       plan.sums,
                       plan.tickets,
                       r.features,
                       problem.gradient};
  if (plan.sm90) return backward_sm90(t, stream);
  with_operand(operand, [&](auto known) { run<decltype(known)::value>(t, plan, stream); });
}

}  // namespace clustops::cuda
