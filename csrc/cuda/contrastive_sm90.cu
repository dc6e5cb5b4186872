// Sums over pairs of rows on Hopper's tensor cores by wgmma; nothing [rows, rows] is written.
//
// A CTA has two warpgroups that multiply and one that fetches. Those that multiply keep their rows in shared memory and
// meet the columns of a split tile by tile, each as soon as a stage is empty.
#include "contrastive_sm90.h"

#include <type_traits>

#include "contrastive_sm90_products.h"

namespace clustops::cuda {
namespace {

constexpr int kGroups = 2;                          // warpgroups that multiply
constexpr int kWorkers = kGroups * kGroupThreads;   // their threads
constexpr int kThreads = kWorkers + kGroupThreads;  // and those that fetch
constexpr int kAlign = 1024;                        // of what the matrix units read: eight rows of a block
constexpr int kRoom = 227 << 10;                    // shared memory of a CTA
#ifdef CLUSTOPS_SIMT  // so that tests meet stages that are used again and more tiles than one
constexpr int kMostStages = 3, kMostSplits = 2;
constexpr int64_t kFewestRows = 1;
#else
constexpr int kMostStages = 6, kMostSplits = 16;
constexpr int64_t kFewestRows = 4096;  // with fewer, smaller tiles keep more multiprocessors busy
#endif

constexpr int columns_of(int chunks) { return chunks > 2 ? 64 : 128; }

// What two neighbouring columns bring to their scores.
struct alignas(16) ColumnPair {
  int32_t number[2];
  float q[2];
};
struct alignas(16) GradientPair {
  ColumnPair classes;
  float share[2], strength[2];
  float upstream[2], log_partition[2];
};

// Shared memory of a CTA, in bytes from its start, aligned to kAlign: rows, for each stage a tile of columns and what its
// pairs of columns bring, barriers, two numbers. At the end results of backward rows lie where rows and tiles did.
template <int kChunks, int kRowsOfCta, class Pair>
struct Room {
  static constexpr int kRows = kRowsOfCta, kColumns = columns_of(kChunks);
  static constexpr int kRowBlock = kRows * kChunkBytes, kColumnBlock = kColumns * kChunkBytes;
  static constexpr int kStage = kChunks * kColumnBlock, kPairs = kColumns / 2 * static_cast<int>(sizeof(Pair));
  static constexpr int kFit = (kRoom - kAlign - 128 - kChunks * kRowBlock) / (kStage + kPairs);
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static constexpr int kStagesAt = kChunks * kRowBlock, kPairsAt = kStagesAt + kStages * kStage;
  static constexpr int kBarriersAt = kPairsAt + kStages * kPairs;
  static constexpr int kNumbersAt = kBarriersAt + (1 + 2 * kStages + kGroups) * 8;
  static constexpr int kBytes = kAlign + kNumbersAt + 8;
  static_assert(kStages >= 2 && kBytes <= kRoom, "two tiles at least");
};
template <int kChunks>
using ForwardRoom = Room<kChunks, kForwardRows90, ColumnPair>;
template <int kChunks>
using BackwardRoom = Room<kChunks, kBackwardRows90, GradientPair>;

// A number of which the compiler knows nothing: what follows from it is found where it is needed, and takes no registers
// before.
template <class Integer>
__device__ Integer unknown(Integer x) {
#ifndef CLUSTOPS_SIMT
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// What a CTA does: rows from `row` on, number `block` of their kind, against tiles [tile, last).
struct Unit {
  int32_t block, split, row, tile, last;

  __device__ Unit(const Split& s, int rows) {
    const int32_t index = unknown(static_cast<int32_t>(blockIdx.x)), blocks = static_cast<int32_t>(s.row_blocks);
    block = index % blocks, split = index / blocks;
    row = static_cast<int32_t>(s.first_row) + block * rows;
    tile = static_cast<int32_t>(s.begin(split)), last = static_cast<int32_t>(s.begin(split + 1));
  }
};

#ifdef CLUSTOPS_SM90

constexpr int kWorkerRegisters = 232, kFetchRegisters = 40;  // of a thread; 168 for each to begin with

// A stage in use and the parity of its barriers' phase.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// `rows` when the rows are there; `full` and `empty` of each stage; `order` of each warpgroup when it may multiply.
template <class R>
struct Barriers {
  Barrier *rows, *full, *empty, *order;

  __device__ explicit Barriers(unsigned char* shared)
      : rows(reinterpret_cast<Barrier*>(shared + R::kBarriersAt)), full(rows + 1), empty(full + R::kStages),
        order(empty + R::kStages) {}

  __device__ void init() const {
    init_barrier(rows, 1);
    for (int i = 0; i < R::kStages; ++i) {
      init_barrier(full + i, 1 + R::kColumns / 64);  // the thread that copies, and the warps that bring pairs of columns
      init_barrier(empty + i, kWorkers / 32);
    }
    for (int i = 0; i < kGroups; ++i) init_barrier(order + i, kGroupThreads / 32);
    publish_barriers();
  }

  __device__ static void arrive_warp(Barrier* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
  }
};

// All rows of a tile or its first or second half, to a block for each chunk.
template <int kChunks>
__device__ void fetch_tile(const Prepared& p, int64_t row, int count, unsigned char* to, int block, Barrier* barrier) {
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    copy_bulk(to + chunk * block, p.operands + p.at(row, 8 * chunk), static_cast<uint32_t>(count * kChunkBytes), barrier);
  }
}

template <int kChunks, int kRows>
__device__ void fetch_rows(const Prepared& p, int64_t row, unsigned char* to, Barrier* barrier) {
  const int tiles = p.padded - row < kRows ? 1 : kRows / kTileRows;
  arrive_and_expect(barrier, static_cast<uint32_t>(tiles * p.tile_bytes()));
  for (int i = 0; i < tiles; ++i) {
    fetch_tile<kChunks>(p, row + i * kTileRows, kTileRows, to + i * kBlockBytes, kRows * kChunkBytes, barrier);
  }
}

// By the warpgroup that fetches: a thread of its first warp copies rows and columns, the warps after that bring what
// `pair_at` says of each pair of columns.
template <int kChunks, class R, class Pair, class PairAt>
__device__ void fetch(const Prepared& p, const Split& split, unsigned char* shared, const PairAt& pair_at) {
  const Unit unit(split, R::kRows);
  const Barriers<R> barriers(shared);
  const int warp = (threadIdx.x - kWorkers) / 32, lane = threadIdx.x % 32, pair = (warp - 1) * 32 + lane;
  if (warp > R::kColumns / 64 || (warp == 0 && lane != 0)) return;
  if (warp == 0) fetch_rows<kChunks, R::kRows>(p, unit.row, shared, barriers.rows);
  Turn<R::kStages> turn;
  for (int32_t tile = unit.tile; tile < unit.last; ++tile, turn.next()) {
    Barrier *const full = barriers.full + turn.stage, *const empty = barriers.empty + turn.stage;
    if (warp == 0) {
      wait_for(empty, turn.phase ^ 1);
      arrive_and_expect(full, R::kStage);
      fetch_tile<kChunks>(p, int64_t{tile} * R::kColumns, R::kColumns, shared + R::kStagesAt + turn.stage * R::kStage,
                          R::kColumnBlock, full);
    } else {
      const Pair brought = pair_at(tile * R::kColumns + 2 * pair);
      wait_for(empty, turn.phase ^ 1);
      reinterpret_cast<Pair*>(shared + R::kPairsAt + turn.stage * R::kPairs)[pair] = brought;
      Barriers<R>::arrive_warp(full);
    }
  }
}

__device__ inline ColumnPair classes_at(const Prepared& p, int64_t column) {
  return {{p.number[column], p.number[column + 1]}, {p.q[column], p.q[column + 1]}};
}

__device__ inline GradientPair gradients_at(const Prepared& p, int64_t column, float factor) {
  return {classes_at(p, column),
          {factor * p.share[column], factor * p.share[column + 1]},
          {factor * p.strength[column], factor * p.strength[column + 1]},
          {factor * p.upstream[column], factor * p.upstream[column + 1]},
          {p.log_partition[column], p.log_partition[column + 1]}};
}

// Issues the scores of 64 rows, from row `first` of the CTA on, with the tile of a stage.
template <Operand kOperand, int kChunks, class R>
__device__ void begin_scores(float (&x)[R::kColumns / 2], const unsigned char* shared, int first, int stage) {
  const unsigned char *const rows = shared + unknown(first * kChunkBytes),
                            *const tile = shared + R::kStagesAt + stage * R::kStage;
  begin_products(x);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int k = 0; k < kChunk / kDepth; ++k) {
      multiply_scores<kOperand, R::kColumns>(x, rows + chunk * R::kRowBlock, tile + chunk * R::kColumnBlock, k,
                                             chunk == 0 && k == 0);
    }
  }
  commit_products();
}

// Row of a thread's first score; the other is 8 below. Rows beyond the padding are never wanted.
__device__ inline int32_t row_of_thread(int32_t first) { return first + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

template <bool kEdge>
__device__ RowPlace place_of(const Pairs& pairs, int32_t row) {
  return kEdge ? RowPlace(row, pairs.views) : RowPlace();
}

__device__ inline int64_t within(const Prepared& p, int64_t row) { return row < p.padded ? row : p.padded - 1; }

// The sums of a thread's two rows.
struct Sums {
  int32_t row, number[2];
  RowSums total[2];

  __device__ Sums(const Prepared& p, const Pairs& pairs, int32_t first) : row(first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      number[half] = p.number[within(p, row + 8 * half)];
      total[half].start(pairs);
    }
  }

  // Scores x[4 n + 2 half + e] with columns b0 + 8 n + e, of which pairs_of[4 n] tells. A tile is summed first, so that few
  // numbers are rounded at the size of the total.
  template <bool kEdge, int kScores>
  __device__ void take(const Pairs& pairs, const float (&x)[kScores], int32_t b0, const ColumnPair* columns) {
    const int32_t a = kEdge ? unknown(row) : row;
    const RowPlace place[2] = {place_of<kEdge>(pairs, a), place_of<kEdge>(pairs, a + 8)};
    RowSums here[2] = {total[0], total[1]};
#pragma unroll
    for (int half = 0; half < 2; ++half) here[half].sum = here[half].pull = here[half].own = 0;
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n) {
      const ColumnPair pair = columns[4 * n];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        here[half].template take<2, kEdge>(
            pairs, place[half], number[half], [&](int e) { return x[4 * n + 2 * half + e]; }, b0 + 8 * n, pair.number,
            pair.q, [](int e) { return e; });
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!pairs.fixed) total[half].sum *= power_of_two(total[half].shift - here[half].shift);
      total[half].shift = here[half].shift;
      total[half].sum += here[half].sum, total[half].pull += here[half].pull, total[half].own += here[half].own;
    }
  }

  // To `to`, results of rows from `first` on.
  __device__ void write(int64_t first, RowSums* to) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowSums& sums = total[half];
#pragma unroll
      for (int by = 1; by < 4; by *= 2) sums.merge(shuffled(sums, by));
      if (threadIdx.x % 4 == 0) to[row + 8 * half - first] = sums;
    }
  }
};

// By the warpgroups that multiply. Each has two halves of 64 rows: while it looks through the scores of one, those of the
// other are on their way.
template <Operand kOperand, int kChunks, bool kFixed>
__device__ void sum_tiles(const ForwardTask& t, Pairs pairs, unsigned char* shared) {
  using R = ForwardRoom<kChunks>;
  const Unit unit(t.split, R::kRows);
  pairs.fixed = kFixed;
  const Barriers<R> barriers(shared);
  const int lane = threadIdx.x % 32, group = threadIdx.x / kGroupThreads;
  const int32_t first = unit.row + group * 2 * kGroupRows, row = row_of_thread(first);
  const Edge edge(pairs, first, 2 * kGroupRows);
  Sums sums[2] = {Sums(t.p, pairs, row), Sums(t.p, pairs, row + kGroupRows)};
  float x[2][R::kColumns / 2];

  const auto begin = [&](int h, int stage) {
    begin_scores<kOperand, kChunks, R>(x[h], shared, (2 * group + h) * kGroupRows, stage);
  };
  const auto take = [&](int h, int32_t tile, int stage) {
    read_products(x[h]);
    const auto* const columns = reinterpret_cast<const ColumnPair*>(shared + R::kPairsAt + stage * R::kPairs) + lane % 4;
    const int32_t column = tile * R::kColumns;
    if (edge.meets(column, R::kColumns)) {
      sums[h].template take<true>(pairs, x[h], column + lane % 4 * 2, columns);
    } else {
      sums[h].template take<false>(pairs, x[h], column + lane % 4 * 2, columns);
    }
  };
  wait_for(barriers.rows, 0);
  Turn<R::kStages> turn;
  for (int32_t tile = unit.tile; tile < unit.last; ++tile, turn.next()) {
    wait_for(barriers.full + turn.stage, turn.phase);
    begin(0, turn.stage);
    begin(1, turn.stage);
    wait_for_products<1>();
    take(0, tile, turn.stage);
    wait_for_products<0>();
    take(1, tile, turn.stage);
    barriers.arrive_warp(barriers.empty + turn.stage);
  }
  RowSums* const to = t.sums + int64_t{static_cast<int32_t>(blockIdx.x)} * R::kRows;
#pragma unroll
  for (int h = 0; h < 2; ++h) sums[h].write(unit.row, to);
}

// Losses of the rows of a block, once all CTAs have their sums. The second number of `room` tells whether all is well.
__device__ void finish_rows(const ForwardTask& t, int* room) {
  const Unit unit(t.split, kForwardRows90);
  if (!last_of(t.tickets + unit.block, t.split.splits, room)) return;
  const int64_t a = unit.row + static_cast<int64_t>(threadIdx.x);
  if (a < t.first || a >= t.last) return;
  const RowSums* const from = t.sums + int64_t{unit.block} * kForwardRows90 + threadIdx.x;
  RowSums sums = fresh(from);
  for (int split = 1; split < t.split.splits; ++split) {
    sums.merge(fresh(from + split * t.split.row_blocks * kForwardRows90));
  }
  finish_row(t, a, sums, room[1] != 0);
}

// Two rows of a thread in the gradient.
struct Pulls {
  int32_t first;
  PairRow row[2];

  __device__ Pulls(const Prepared& p, int32_t thread_row, float factor) : first(thread_row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t a = within(p, first + 8 * half);
      row[half] = {p.number[a],
                   p.q[a],
                   factor * p.share[a],
                   factor * p.strength[a],
                   factor * p.upstream[a],
                   p.log_partition[a]};
    }
  }

  // Scores x[4 n + 2 half + e] with columns b0 + 8 n + e, of which columns[4 n] tells, become gradients.
  template <bool kFixed, bool kEdge, int kScores>
  __device__ void take(const Prepared& p, const Pairs& pairs, float (&x)[kScores], int32_t b0,
                       const GradientPair* columns) const {
    const int32_t a = kEdge ? unknown(first) : first;
    const RowPlace place[2] = {place_of<kEdge>(pairs, a), place_of<kEdge>(pairs, a + 8)};
    const float own[2] = {kEdge ? p.own[within(p, a)] : 0, kEdge ? p.own[within(p, a + 8)] : 0};
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n) {
      const GradientPair pair = columns[4 * n];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const PairRow column{pair.classes.number[e], pair.classes.q[e], pair.share[e],
                             pair.strength[e],       pair.upstream[e],  pair.log_partition[e]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& score = x[4 * n + 2 * half + e];
          score = pair_gradient<kFixed, kEdge>(pairs, place[half], row[half], own[half], column, b0 + 8 * n + e, score);
        }
      }
    }
  }
};

// Sums over columns for a thread's two rows, in pieces of one or two chunks of features.
template <int kChunks>
struct Gradients {
  static constexpr int kFeatures = kChunks * kChunk, kPiece = kChunks % 2 ? kChunk : 2 * kChunk;
  static constexpr int kPieces = kFeatures / kPiece, kPitch = kFeatures + 8;  // of rows in shared memory: another bank each
  float sums[kPieces][kPiece / 2];

  __device__ Gradients() {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < kPiece / 2; ++i) sums[piece][i] = 0;
    }
  }

  // Issues weights times the rows of a tile.
  template <Operand kOperand, class R>
  __device__ void begin(const uint32_t (&weights)[R::kColumns / kDepth][4], const unsigned char* tile) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) begin_products(sums[piece]);
#pragma unroll
    for (int k = 0; k < R::kColumns / kDepth; ++k) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        multiply_weights<kOperand, kPiece>(sums[piece], weights[k], tile + piece * (kPiece / kChunk) * R::kColumnBlock,
                                           R::kColumnBlock, k);
      }
    }
    commit_products();
  }

  __device__ void arrived() {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) read_products(sums[piece]);
  }

  // To `to`, of which the rows are this warp's.
  __device__ void write(float* to, int pitch) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < kPiece / 4; ++i) {
        const int n = i / 2, half = i % 2;
        float* const where = to + (lane / 4 + 8 * half) * pitch + piece * kPiece + 8 * n + lane % 4 * 2;
        *reinterpret_cast<float2*>(where) = float2{sums[piece][4 * n + 2 * half], sums[piece][4 * n + 2 * half + 1]};
      }
    }
  }
};

template <Operand kOperand>
__device__ uint32_t pack_pair(float low, float high) {
  return kOperand == Operand::bf16 ? pack_bf16(low, high) : pack_f16(low, high);
}

// By the warpgroups that multiply. Each issues the scores of a tile, then the last tile's gradients times its rows; while those
// are on their way, and the other warpgroup's products after them, it makes gradients of the scores.
template <Operand kOperand, int kChunks, bool kFixed>
__device__ void pull_tiles(const BackwardTask& t, Pairs pairs, float factor, unsigned char* shared,
                           Gradients<kChunks>& gradients) {
  using R = BackwardRoom<kChunks>;
  pairs.fixed = kFixed;
  const Unit unit(t.split, R::kRows);
  const Barriers<R> barriers(shared);
  const int lane = threadIdx.x % 32, group = threadIdx.x / kGroupThreads;
  const int32_t first = unit.row + group * kGroupRows;
  const Edge edge(pairs, first, kGroupRows);
  const Pulls pulls(t.p, row_of_thread(first), factor);
  float x[R::kColumns / 2];
  uint32_t weights[R::kColumns / kDepth][4];

  const auto begin = [&](int stage) { begin_scores<kOperand, kChunks, R>(x, shared, group * kGroupRows, stage); };
  const auto take = [&](int32_t tile, int stage) {
    read_products(x);
    const auto* const columns = reinterpret_cast<const GradientPair*>(shared + R::kPairsAt + stage * R::kPairs) + lane % 4;
    const int32_t column = tile * R::kColumns;
    if (edge.meets(column, R::kColumns)) {
      pulls.template take<kFixed, true>(t.p, pairs, x, column + lane % 4 * 2, columns);
    } else {
      pulls.template take<kFixed, false>(t.p, pairs, x, column + lane % 4 * 2, columns);
    }
  };
  const auto pack = [&] {
#pragma unroll
    for (int k = 0; k < R::kColumns / kDepth; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Unknown, so that it is there before the products begin.
        weights[k][i] = unknown(pack_pair<kOperand>(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]));
      }
    }
  };
  Turn<R::kStages> turn;
  wait_for(barriers.rows, 0);
  wait_for(barriers.full, 0);
  begin(0);
  wait_for_products<0>();
  take(unit.tile, 0);
  pack();
  uint32_t order = group == 0;
  for (int32_t tile = unit.tile + 1; tile < unit.last; ++tile) {
    const int before = turn.stage;
    turn.next();
    wait_for(barriers.full + turn.stage, turn.phase);
    wait_for(barriers.order + group, order);
    begin(turn.stage);
    gradients.template begin<kOperand, R>(weights, shared + R::kStagesAt + before * R::kStage);
    barriers.arrive_warp(barriers.order + 1 - group);
    order ^= 1;
    wait_for_products<1>();
    take(tile, turn.stage);
    wait_for_products<0>();
    gradients.arrived();
    barriers.arrive_warp(barriers.empty + before);
    pack();
  }
  gradients.template begin<kOperand, R>(weights, shared + R::kStagesAt + turn.stage * R::kStage);
  wait_for_products<0>();
  gradients.arrived();
}

// Gradients of this warp's 16 rows: as they are if this CTA saw all columns, else once all CTAs of the rows have theirs.
template <Operand kOperand, int kChunks>
__device__ void finish_gradients(const BackwardTask& t, const Gradients<kChunks>& gradients, float factor,
                                 unsigned char* shared, int* room) {
  using G = Gradients<kChunks>;
  using T = std::conditional_t<kOperand == Operand::bf16, Bf16, F16>;
  constexpr int kRows = kBackwardRows90, kEach = G::kFeatures / 32;
  const Unit unit(t.split, kRows);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  const int64_t next = t.split.row_blocks * kRows * G::kFeatures;  // of sums, to the next split
  float* const mine = t.sums + (int64_t{unit.block} * kRows + row) * G::kFeatures;
  float* const here = reinterpret_cast<float*>(shared) + row * G::kPitch;
  const bool whole = t.split.splits == 1;
  if (whole) {
    __syncthreads();  // rows and tiles are no longer read
    gradients.write(here, G::kPitch);
    __syncwarp();
  } else {
    gradients.write(mine + unit.split * next, G::kFeatures);
    if (!last_of(t.tickets + unit.block, t.split.splits, room)) return;
  }
  for (int r = 0; r < 16; ++r) {
    const int64_t a = unit.row + row + r;
    if (a < t.first || a >= t.last) continue;
    float value[kEach] = {};
    for (int split = 0; split < t.split.splits; ++split) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int d = lane * kEach + e;
        value[e] += whole ? here[r * G::kPitch + d] : fresh(mine + split * next + r * G::kFeatures + d);
      }
    }
    finish_gradient<T>(t, a, value, 1 / factor);
  }
}

#endif

// One CTA per 256 anchors and split of columns.
// Limit: at 128 features products and powers alike. A tile is 2 * 256 * 128 * 128 flops, 2048 cycles, on 32 KB from the level 2
// cache, and 256 * 128 powers at 16 a cycle, 2048 cycles; with the sums some 1500 issue slots of each scheduler.
template <Operand kOperand, int kChunks>
__global__ void __launch_bounds__(kThreads, 1) sum_pairs(const __grid_constant__ ForwardTask t) {
#ifdef CLUSTOPS_SM90
  using R = ForwardRoom<kChunks>;
  static_assert(kForwardRows90 == kWorkers, "each worker finishes a row");
  CLUSTOPS_DYNAMIC_SHARED(unaligned);
  unsigned char* const shared = unaligned + (kAlign - reinterpret_cast<uintptr_t>(unaligned) % kAlign) % kAlign;
  if (threadIdx.x == 0) Barriers<R>(shared).init();
  const Summary all = summary_of<kThreads>(t.p, reinterpret_cast<Summary*>(shared + R::kPairsAt));
  int* const room = reinterpret_cast<int*>(shared + R::kNumbersAt);
  Pairs pairs = t.pairs;
  pairs.decide(all.greatest);
  if (threadIdx.x == 0) room[1] = all.bad;
  if (blockIdx.x == 0 && threadIdx.x == 0) write_norms(all, t.norms);
  if (threadIdx.x < kWorkers) {
    more_registers<kWorkerRegisters>();
    if (pairs.fixed) {
      sum_tiles<kOperand, kChunks, true>(t, pairs, shared);
    } else {
      sum_tiles<kOperand, kChunks, false>(t, pairs, shared);
    }
    finish_rows(t, room);
  } else {
    fewer_registers<kFetchRegisters>();
    fetch<kChunks, R, ColumnPair>(t.p, t.split, shared, [&](int64_t column) { return classes_at(t.p, column); });
    __syncthreads();  // twice, with finish_rows
    __syncthreads();
  }
#endif
}

// One CTA per 128 rows and split of columns.
// Limit: the matrix units. At 128 features a tile is 4 * 128 * 128 * 128 flops, 2048 cycles, on 32 KB from the level 2
// cache; 128 * 128 powers at 16 a cycle are 1024 cycles, and with the rest some 1300 issue slots of each scheduler.
template <Operand kOperand, int kChunks>
__global__ void __launch_bounds__(kThreads, 1) pull_pairs(const __grid_constant__ BackwardTask t) {
#ifdef CLUSTOPS_SM90
  using R = BackwardRoom<kChunks>;
  static_assert(kBackwardRows90 * Gradients<kChunks>::kPitch * 4 <= R::kPairsAt, "results take the place of rows and tiles");
  CLUSTOPS_DYNAMIC_SHARED(unaligned);
  unsigned char* const shared = unaligned + (kAlign - reinterpret_cast<uintptr_t>(unaligned) % kAlign) % kAlign;
  if (threadIdx.x == 0) Barriers<R>(shared).init();
  const Summary all = summary_of<kThreads>(t.p, reinterpret_cast<Summary*>(shared + R::kPairsAt));
  int* const room = reinterpret_cast<int*>(shared + R::kNumbersAt);
  const float factor = kOperand == Operand::f16 ? fp16_factor(all.upstream) : 1.0f;
  Pairs pairs = t.pairs;
  pairs.decide(all.greatest);
  if (threadIdx.x < kWorkers) {
    more_registers<kWorkerRegisters>();
    Gradients<kChunks> gradients;
    if (pairs.fixed) {
      pull_tiles<kOperand, kChunks, true>(t, pairs, factor, shared, gradients);
    } else {
      pull_tiles<kOperand, kChunks, false>(t, pairs, factor, shared, gradients);
    }
    finish_gradients<kOperand>(t, gradients, factor, shared, room);
  } else {
    fewer_registers<kFetchRegisters>();
    fetch<kChunks, R, GradientPair>(t.p, t.split, shared,
                                    [&](int64_t column) { return gradients_at(t.p, column, factor); });
    __syncthreads();  // once or twice, with finish_gradients
    if (t.split.splits > 1) __syncthreads();
  }
#endif
}

// use(operand, chunks) with both as types.
template <class Use>
void with_shape(const Prepared& p, const Use& use) {
  const auto chunks = [&](auto operand) {
    switch (p.chunks) {
      case 1: return use(operand, std::integral_constant<int, 1>());
      case 2: return use(operand, std::integral_constant<int, 2>());
      case 3: return use(operand, std::integral_constant<int, 3>());
      default: return use(operand, std::integral_constant<int, 4>());
    }
  };
  if (p.operand == Operand::bf16) return chunks(std::integral_constant<Operand, Operand::bf16>());
  return chunks(std::integral_constant<Operand, Operand::f16>());
}

}  // namespace

bool sm90_suits(const Prepared& rows, int64_t anchors) {
  return hopper() && bytes_of(rows.operand) == 2 && rows.chunks <= 4 && rows.rows >= kFewestRows && anchors > 0;
}

Split forward_split_sm90(const Prepared& rows, int64_t first, int64_t last) {
  return split_of(rows.rows, first, last, kForwardRows90, columns_of(rows.chunks), kMostSplits);
}

Split backward_split_sm90(const Prepared& rows, int64_t first, int64_t last) {
  return split_of(rows.rows, first, last, kBackwardRows90, columns_of(rows.chunks), kMostSplits);
}

void forward_sm90(const ForwardTask& t, void* stream) {
  with_shape(t.p, [&](auto operand, auto chunks) {
    launch(sum_pairs<operand, chunks>, t.split.units(), kThreads, ForwardRoom<chunks>::kBytes, stream, t);
  });
}

void backward_sm90(const BackwardTask& t, void* stream) {
  with_shape(t.p, [&](auto operand, auto chunks) {
    launch(pull_pairs<operand, chunks>, t.split.units(), kThreads, BackwardRoom<chunks>::kBytes, stream, t);
  });
}

}  // namespace clustops::cuda
