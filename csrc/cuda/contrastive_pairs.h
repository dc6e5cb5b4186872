// What happens to the score of a pair of rows, whichever matrix product gave it, on a GPU and in the tests' plain C++.
//
// Scores are x = z_a.z_b; exp(x / temperature) = exp2(scale x). While no score is far from those of unit rows
// (`fixed`), exponentials are taken relative to exp(1 / temperature), and one serves both rows of a pair; otherwise
// relative to a running maximum, or to the row's own log-partition.
#pragma once

#include <cstdint>

#include "exponent.h"

namespace clustops::cuda {

constexpr float kMostSpread = 64;  // exp(+-64) and its product with any sane gradient are normal numbers of fp32

// The options that scores know; filled on the host but for `fixed`, which waits for the norms.
struct Pairs {
  int64_t rows, views;
  float scale;  // log2(e) / temperature
  float inverse_temperature;
  bool normalized;
  bool fixed;

  // From the greatest norm of given rows.
  __device__ void decide(float greatest) {
    const float norm = normalized ? 1.0f : greatest;
    fixed = norm * norm * inverse_temperature + inverse_temperature <= kMostSpread;
  }
};

// Of a row a: the columns of its own sample are own_begin ... own_begin + views - 1.
struct RowPlace {
  int32_t row, own_begin;

  __device__ RowPlace() {}
  __device__ RowPlace(int64_t a, int64_t views)
      : row(static_cast<int32_t>(a)),
        own_begin(static_cast<int32_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(views) * static_cast<uint32_t>(views))) {}
  __device__ bool own(int32_t b, int64_t views) const {
    return static_cast<uint32_t>(b - own_begin) < static_cast<uint32_t>(views);
  }
  __device__ bool counts(int32_t b, int64_t rows) const { return b != row && b < static_cast<int32_t>(rows); }
};

// The columns that some row of [row, row + count) meets as itself, as one of its own views, or as padding.
struct Edge {
  int32_t begin, end, rows;

  __device__ Edge(const Pairs& pairs, int64_t row, int count)
      : begin(RowPlace(row, pairs.views).own_begin),
        end(RowPlace(row + count - 1, pairs.views).own_begin + static_cast<int32_t>(pairs.views)),
        rows(static_cast<int32_t>(pairs.rows)) {}
  __device__ bool meets(int64_t column, int count) const {
    return column + count > rows || (column < end && column + count > begin);
  }
};

// Sums over some columns of a row: of exp2(scale x - shift), of q_b x over its class without its sample, of x over its
// sample without itself.
struct alignas(16) RowSums {
  float shift, sum, pull, own;

  __device__ void start(const Pairs& pairs) {
    shift = pairs.fixed ? pairs.scale : Numbers<float>::lowest / 2;
    sum = pull = own = 0;
  }

  // Scores x(0) ... x(n - 1) of row `at` with this class number and the columns b0 + column(i), which are
  // number[column(i)], q[column(i)]. Without kEdge none of them is the row, one of its views or padding.
  template <int n, bool kEdge, class Score, class Column>
  __device__ void take(const Pairs& pairs, const RowPlace& at, int32_t class_number, const Score& x, int32_t b0,
                       const int32_t* number, const float* q, const Column& column) {
    if (!pairs.fixed) raise<n, kEdge>(pairs, at, x, b0, column);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int c = column(i);
      const float score = x(i), power = power_of_two(fmaf(score, pairs.scale, -shift));
      bool other = true;
      if (kEdge) {
        const bool counts = at.counts(b0 + c, pairs.rows);
        other = counts && !at.own(b0 + c, pairs.views);
        sum += counts ? power : 0.0f;
        if (counts && !other) own += score;
      } else {
        sum += power;
      }
      if (other && number[c] == class_number) pull = fmaf(q[c], score, pull);
    }
  }

  __device__ void merge(const RowSums& more) {
    const float high = shift > more.shift ? shift : more.shift;
    sum = sum * power_of_two(shift - high) + more.sum * power_of_two(more.shift - high);
    shift = high;
    pull += more.pull, own += more.own;
  }

  // LSE; the lowest number where there is no other row.
  __device__ float log_partition() const {
    if (sum == 0) return Numbers<float>::lowest;
    return (shift + log2f(sum)) * static_cast<float>(kLn2);
  }

 private:
  template <int n, bool kEdge, class Score, class Column>
  __device__ void raise(const Pairs& pairs, const RowPlace& at, const Score& x, int32_t b0, const Column& column) {
    float high = shift;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float s = x(i) * pairs.scale;
      if (!kEdge || at.counts(b0 + column(i), pairs.rows)) high = s > high ? s : high;
    }
    sum *= power_of_two(shift - high);
    shift = high;
  }
};

// What the gradient of a score needs of each of its rows.
struct PairRow {
  int32_t number;
  float q, share, strength, upstream, log_partition;
};

// temperature times the gradient of the sum of losses with respect to the score of rows a and b, as a number for both
// directions: g_a P_ab + g_b P_ba - w_ab (r_a + r_b). kFixed is pairs.fixed; `own` is the weight of pairs within the sample of a.
template <bool kFixed, bool kEdge>
__device__ inline float pair_gradient(const Pairs& pairs, const RowPlace& at, const PairRow& a, float own,
                                      const PairRow& b, int32_t column, float x) {
  float g;
  if (kFixed) {
    g = power_of_two(fmaf(x, pairs.scale, -pairs.scale)) * (a.strength + b.strength);
  } else {
    g = a.upstream * power_of_two(fmaf(x, pairs.scale, -a.log_partition)) +
        b.upstream * power_of_two(fmaf(x, pairs.scale, -b.log_partition));
  }
  const float shares = a.share + b.share;
  if (kEdge && at.own(column, pairs.views)) {
    g = fmaf(-own, shares, g);
  } else if (a.number == b.number) {
    g = fmaf(-(a.q * b.q), shares, g);
  }
  return !kEdge || at.counts(column, pairs.rows) ? g : 0.0f;
}

}  // namespace clustops::cuda
