// Class losses of single anchors on tensor cores by mma.sync; nothing [rows, rows] is written.
#include <type_traits>

#include "contrastive_sm90.h"
#include "contrastive_tiles.h"
#include "kernels.h"

namespace clustops::cuda {
namespace {

template <int kColumns>
__device__ void fetch_columns(const Prepared& p, int64_t tile, unsigned char* stage, int64_t arrays) {
  fetch_rows<kColumns>(p, tile * kColumns, stage);
  fetch_numbers<kColumns>(p.number, tile * kColumns, stage + arrays, 0);
  fetch_numbers<kColumns>(p.q, tile * kColumns, stage + arrays + kColumns * 4, 1);
}

// This thread's sums for its rows, over the columns of its warp; the same for all four lanes of a row.
template <int kM>
__device__ void join_columns(RowSums (&sums)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int by = 1; by < 4; by *= 2) sums[m][half].merge(shuffled(sums[m][half], by));
    }
  }
}

// One CTA per block of rows and part of the columns: tiles of kColumns columns stream past the rows, which stay in shared
// memory; a warp holds the scores of 16 kM rows and half a tile in registers and, for each row, running sums. The
// last CTA of a row block adds the sums of all parts, in their order, and ends the rows.
// Limit: matrix products at 2 D flops a score, or seven instructions and a power of two for each.
template <Operand kOperand, int kM, int kColumns>
__global__ void __launch_bounds__(kTileThreads, 2) class_rows(ForwardTask t, TileLayout at) {
  CLUSTOPS_DYNAMIC_SHARED(shared);
  constexpr int kRows = kBlockRows<kM>, kN = kColumns / kColumnWarps / 8;
  RowSums* const joined = reinterpret_cast<RowSums*>(shared);  // [kColumnWarps, kRows], in the end
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column_warp = warp / kRowWarps;
  const Summary all = summary_of<kTileThreads>(t.p, reinterpret_cast<Summary*>(shared + at.room));
  Pairs pairs = t.pairs;
  pairs.decide(all.greatest);
  if (blockIdx.x == 0 && threadIdx.x == 0) write_norms(all, t.norms);

  for (int64_t unit = blockIdx.x; unit < t.split.units(); unit += gridDim.x) {
    const int64_t block = unit / t.split.splits;
    const int split = static_cast<int>(unit % t.split.splits);
    const int64_t row0 = t.split.first_row + block * kRows;
    fetch_rows<kRows>(t.p, row0, shared + at.rows);  // arrives with the first tile
    const Edge edge(pairs, row0, kRows);
    RowSums sums[kM][2];
    RowPlace place_of[kM][2];
    int32_t number[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + row_of(m, half, kM);
        sums[m][half].start(pairs);
        place_of[m][half] = RowPlace(row, pairs.views);
        number[m][half] = t.p.number[row];
      }
    }
    for_tiles(
        at, shared, t.split.begin(split), t.split.begin(split + 1),
        [&](int64_t tile, unsigned char* stage) { fetch_columns<kColumns>(t.p, tile, stage, at.arrays); },
        [&](int64_t tile, const unsigned char* stage) {
          float x[kM][kN][4] = {};
          multiply_rows<kOperand, kM, kN, kRows, kColumns>(shared + at.rows, 16 * kM * (warp % kRowWarps), stage,
                                                           8 * kN * column_warp, t.p.chunks, x);
          const int first = 8 * kN * column_warp + 2 * (lane % 4);
          const int32_t* numbers = reinterpret_cast<const int32_t*>(stage + at.arrays) + first;
          const float* q = reinterpret_cast<const float*>(stage + at.arrays + kColumns * 4) + first;
          const int32_t b0 = static_cast<int32_t>(tile * kColumns) + first;
          const auto column = [](int i) { return 8 * (i / 2) + i % 2; };
          const bool on_edge = edge.meets(tile * kColumns, kColumns);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const auto score = [&](int i) { return x[m][i / 2][2 * half + i % 2]; };
              const auto take = [&](auto on) {
                sums[m][half].template take<2 * kN, decltype(on)::value>(pairs, place_of[m][half], number[m][half],
                                                                         score, b0, numbers, q, column);
              };
              on_edge ? take(std::true_type()) : take(std::false_type());
            }
          }
        });
    join_columns(sums);
    if (lane % 4 == 0) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) joined[column_warp * kRows + row_of(m, half, kM)] = sums[m][half];
      }
    }
    __syncthreads();
    const int64_t rows = t.split.row_blocks * kRows;  // of one part
    if (threadIdx.x < kRows) {
      RowSums sum = joined[threadIdx.x];
      sum.merge(joined[kRows + threadIdx.x]);
      t.sums[split * rows + block * kRows + threadIdx.x] = sum;
    }
    if (last_of(t.tickets + block, t.split.splits, reinterpret_cast<int*>(shared + at.room))) {
      const int64_t row = row0 + threadIdx.x;
      if (threadIdx.x < kRows && row >= t.first && row < t.last) {
        const RowSums* from = t.sums + block * kRows + threadIdx.x;
        RowSums sum = fresh(from);
        for (int s = 1; s < t.split.splits; ++s) sum.merge(fresh(from + s * rows));
        finish_row(t, row, sum, all.bad);
      }
    }
    __syncthreads();  // before the next unit writes to shared memory
  }
}

constexpr int kMostSplits = 16;

struct Plan {
  Prepared p;
  Split split;
  bool sm90;
  int m, columns;
  RowSums* sums;
  unsigned* tickets;
  int64_t bytes;

  Plan(const ContrastiveRows& r, Operand operand, void* workspace) {
    p = prepared_rows(r.samples, r.views, r.width, operand, false, workspace, &bytes);
    const int64_t first = r.first * r.views, last = first + r.count * r.views;
    sm90 = sm90_suits(p, last - first);
    columns = columns_for(p.chunks);
    m = sm90 ? kForwardRows90 / 64 : p.rows >= kManyRows && p.chunks <= 4 ? 2 : 1;
    split = sm90 ? forward_split_sm90(p, first, last) : split_of(p.rows, first, last, 64 * m, columns, kMostSplits);
    const int64_t rows = split.row_blocks * 64 * m;
    sums = reinterpret_cast<RowSums*>(static_cast<unsigned char*>(workspace) + bytes);
    bytes += split.splits * rows * static_cast<int64_t>(sizeof(RowSums));
    tickets = reinterpret_cast<unsigned*>(static_cast<unsigned char*>(workspace) + bytes);
    bytes += split.row_blocks * 4;
  }

  TileLayout layout(int64_t limit) const {
    return {p.chunks, 64 * m, columns, kForwardArrays, 2 * 64 * m * static_cast<int64_t>(sizeof(RowSums)), limit};
  }
};

template <Operand kOperand>
void run(const ForwardTask& t, const Plan& plan, void* stream) {
  // Two CTAs of a multiprocessor, or else a third stage.
  const int64_t most = most_shared(), half = most / 2 - 1024;
  const TileLayout shared = plan.layout(half), at = shared.bytes <= half ? shared : plan.layout(most);
  const int64_t units = t.split.units();
  const auto go = [&](auto kernel) {
    launch(kernel, grid_for(units < 1 ? 1 : units), kTileThreads, static_cast<std::size_t>(at.bytes), stream, t, at);
  };
  if (plan.columns == 32) {
    if constexpr (bytes_of(kOperand) == 4) go(class_rows<kOperand, 1, 32>);
  } else {
    plan.m == 1 ? go(class_rows<kOperand, 1, 64>) : go(class_rows<kOperand, 2, 64>);
  }
}

}  // namespace

int64_t contrastive_workspace(const ContrastiveRows& rows, bool exact) {
  return Plan(rows, operand_of(rows.dtype, exact), nullptr).bytes;
}

bool contrastive_fits(int64_t width, DType dtype) {
  if (dtype == DType::f64 || width < 1 || width > kMostWidth) return false;
  const int64_t limit = most_shared();
  return backward_shared_bytes(width, operand_of(dtype, true), limit) <= limit;
}

void contrastive_rows(const ContrastiveForward& problem, void* workspace, bool exact, void* stream) {
  const ContrastiveRows& r = problem.rows;
  const Operand operand = operand_of(r.dtype, exact);
  expect_few(r);
  const Plan plan(r, operand, workspace);
  prepare(problem, plan.p, plan.tickets, plan.split.row_blocks, stream);
  const ForwardTask t{plan.p,
                      pairs_of(r),
                      plan.split,
                      r.first * r.views,
                      (r.first + r.count) * r.views,
                      plan.sums,
                      plan.tickets,
                      static_cast<float*>(problem.loss),
                      static_cast<float*>(problem.lse),
                      static_cast<float*>(problem.weight),
                      static_cast<float*>(problem.norms)};
  if (plan.sm90) return forward_sm90(t, stream);
  with_operand(operand, [&](auto known) { run<decltype(known)::value>(t, plan, stream); });
}

}  // namespace clustops::cuda
