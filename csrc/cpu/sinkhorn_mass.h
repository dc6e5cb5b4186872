// Column masses of one problem: sums over rows of w softmax(scale s + bias), or of w 2^(scale s), as logarithms.
//
// Rows are cut into stripes, a function of shapes only. A stripe adds up to 64 rows in the type of the powers, then in
// fp64; stripes are added in their order. So the result is the same for any number of threads.
#pragma once

#include <atomic>
#include <limits>

#include "../common/pages.h"
#include "../common/parallel.h"
#include "sinkhorn_rows.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Rows that are added up before fp64.
constexpr int64_t kFlush = 64;
constexpr int64_t kMostStripes = 32;
// Rows whose largest scores give the first shift of each column.
constexpr int64_t kFirstRows = 8;
// A column mass above this share of the weights has lost nothing that fp32 would show; see kLeastSum.
constexpr double kLeastShare = 0x1p-60;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

struct Stripes {
  int64_t count, rows;

  Stripes(int64_t all, int64_t columns) {
    const int64_t most = std::max<int64_t>(8, (int64_t{1} << 20) / std::max<int64_t>(1, columns));
    count = std::min({kMostStripes, most, divide_up(all, kFlush)});
    rows = divide_up(divide_up(all, std::max<int64_t>(1, count)), kRows) * kRows;
    count = rows ? divide_up(all, rows) : 0;
  }
};

// work(stripe, thread) for all stripes, from the last to the first in every other pass: that starts with the rows which the
// pass before left in a cache.
template <class Work>
void each_stripe(const Stripes& stripes, int64_t pass, int threads, const Work& work) {
  parallel_for(stripes.count, threads, [&](int64_t i, int thread) {
    work(pass % 2 == 0 ? i : stripes.count - 1 - i, thread);
  });
}

// The rows of one problem that count: those of the batch, then those of the queue.
template <class E>
struct Problem {
  using Stored = typename E::Stored;
  using T = typename E::Wide;

  const SinkhornRows& all;
  int64_t p;
  int exponent = 0;      // weights are divided by 2^exponent
  double least_part = 1;  // 2^-exponent
  double weight = 0;     // of all rows, so divided

  Problem(const SinkhornRows& rows, int64_t problem) : all(rows), p(problem) {
    double largest = all.queued > 0 || (!all.weights && all.rows > 0) ? 1 : 0;
    for (int64_t b = 0; all.weights && b < all.rows; ++b) largest = std::max<double>(largest, given(b));
    std::frexp(largest, &exponent);
    least_part = std::ldexp(1.0, -exponent);
    for (int64_t b = 0; all.weights && b < all.rows; ++b) weight += given(b) * least_part;
    weight += static_cast<double>(all.queued + (all.weights ? 0 : all.rows)) * least_part;
  }

  int64_t rows() const { return all.rows + all.queued; }
  double given(int64_t r) const {
    if (!all.weights || r >= all.rows) return 1;
    return static_cast<const T*>(all.weights)[p * all.weight_problem_stride + r * all.weight_row_stride];
  }
  const Stored* row(int64_t r) const {
    if (r < all.rows) return static_cast<const Stored*>(all.scores) + p * all.problem_stride + r * all.row_stride;
    return static_cast<const Stored*>(all.queue) + p * all.queue_problem_stride + (r - all.rows) * all.queue_row_stride;
  }
};

// The next rows that count. Where fewer than four are left, the last one stands in with weight 0.
template <class E>
struct Block {
  const typename E::Stored* at[kRows];
  double weight[kRows];

  bool next(const Problem<E>& problem, int64_t& r, int64_t end) {
    int n = 0;
    for (; r < end && n < kRows; ++r) {
      const double given = problem.given(r);
      if (given == 0) continue;
      at[n] = problem.row(r);
      weight[n++] = given * problem.least_part;
    }
    for (int i = n; n > 0 && i < kRows; ++i) at[i] = at[n - 1], weight[i] = 0;
    return n > 0;
  }
};

// Numbers for each column of one problem, and what its threads work in.
template <class T>
struct Space {
  double* partial;  // [stripes, padded]
  double* mass;     // [padded]
  double* virtual_mass;  // [stripes]
  double* flaw;          // [stripes]: NaN where a score is not finite
  T* shift;              // [padded]
  T* log_mass;           // [padded], to base 2, of weights divided by 2^exponent
  T* bias;               // [padded]
  T* never;              // [padded]: -inf for columns that get nothing, 0 for others
  T* log_prior;          // [padded]
  T* scale;              // [padded]
  T* thread_space;       // [threads, kRows + 1, padded]

  static int64_t shared(const Stripes& stripes, int64_t padded) {  // in doubles
    return (stripes.count + 1) * padded + 2 * divide_up(stripes.count, 8) * 8 + 6 * padded * int64_t{sizeof(T)} / 8;
  }
  static int64_t per_thread(int64_t padded) { return (kRows + 1) * padded * int64_t{sizeof(T)} / 8; }

  Space(double* shared_room, double* threads_room, const Stripes& stripes, int64_t padded) {
    const int64_t few = divide_up(stripes.count, 8) * 8;
    partial = shared_room, mass = partial + stripes.count * padded;
    virtual_mass = mass + padded, flaw = virtual_mass + few;
    T* next = reinterpret_cast<T*>(flaw + few);
    for (T** row : {&shift, &log_mass, &bias, &never, &log_prior, &scale}) *row = next, next += padded;
    thread_space = reinterpret_cast<T*>(threads_room);
  }
  T* powers(int thread, int64_t padded) const { return thread_space + thread * (kRows + 1) * padded; }
  T* sums(int thread, int64_t padded) const { return powers(thread, padded) + kRows * padded; }
};

template <class T>
void flush(T* sums, double* partial, int64_t padded) {
  for (int64_t k = 0; k < padded; k += VecD::kWidth) store(VecD::load(partial + k) + load_wide(sums + k), partial + k);
  std::fill(sums, sums + padded, T(0));
}

// Adds factor e, four rows, to sums in one vector of columns.
template <class T>
struct AddRows {
  using V = Lanes<T>;
  V factor[kRows];
  const T* e;
  int64_t padded;
  T* sums;

  AddRows(const T (&factors)[kRows], const T* powers, int64_t stride, T* to) : e(powers), padded(stride), sums(to) {
    for (int i = 0; i < kRows; ++i) factor[i] = V::set1(factors[i]);
  }
  template <class Last>
  void operator()(int64_t k, int64_t, Last) const {
    V sum = V::load(sums + k);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sum = fma(factor[i], V::load(e + i * padded + k), sum);
    store(sum, sums + k);
  }
  void all() const {
    for (int64_t k = 0; k < padded; k += V::kWidth) (*this)(k, V::kWidth, std::false_type());
  }
};

// One stripe of w softmax(scale s + bias): its column sums and what falls to the virtual column.
template <class E>
void softmax_stripe(const Problem<E>& problem, const Exponents<typename E::Wide>& z, const Stripes& stripes,
                    int64_t stripe, const Space<typename E::Wide>& space, int thread) {
  using T = typename E::Wide;
  T* e = space.powers(thread, z.padded);
  T* sums = space.sums(thread, z.padded);
  std::fill(e, e + (kRows + 1) * z.padded, T(0));
  double* partial = space.partial + stripe * z.padded;
  std::fill(partial, partial + z.padded, 0.0);
  const int64_t end = std::min(problem.rows(), (stripe + 1) * stripes.rows);
  T factors[kRows] = {}, flaws[kRows];
  double found[kRows], virtual_mass = 0, flaw = 0;
  Block<E> block;
  int64_t since = 0;
  for (int64_t r = stripe * stripes.rows; block.next(problem, r, end);) {
    sweep<E>(block.at, z, e, found, flaws, AddRows<T>(factors, e, z.padded, sums));
    if ((since += kRows) > kFlush) flush(sums, partial, z.padded), since = kRows;
    for (int i = 0; i < kRows; ++i) {
      const RowSum row = settle<E>(found[i], block.at[i], z, e + i * z.padded);
      factors[i] = static_cast<T>(block.weight[i] / row.total);
      virtual_mass += block.weight[i] / row.total * row.virtual_power;
      flaw += flaws[i];
    }
  }
  AddRows<T>(factors, e, z.padded, sums).all();
  flush(sums, partial, z.padded);
  space.virtual_mass[stripe] = virtual_mass;
  space.flaw[stripe] = flaw;
}

// One stripe of w 2^(scale s + bias): its column sums. Powers go to `keep` [rows, columns] too if kKeep; rows then all
// count and have no queue.
template <class E, bool kKeep>
void power_stripe(const Problem<E>& problem, const Exponents<typename E::Wide>& z, const Stripes& stripes,
                  int64_t stripe, const Space<typename E::Wide>& space, int thread, typename E::Wide* keep) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  T* sums = space.sums(thread, z.padded);
  std::fill(sums, sums + z.padded, T(0));
  double* partial = space.partial + stripe * z.padded;
  std::fill(partial, partial + z.padded, 0.0);
  const V scale = V::set1(z.scale), zero = V::set1(0);
  const int64_t end = std::min(problem.rows(), (stripe + 1) * stripes.rows);
  V flaw = zero;
  Block<E> block;
  int64_t since = 0;
  if (kKeep) {
    const int64_t before = stripe * stripes.rows * z.columns;
    populate_pages(keep + before, (end * z.columns - before) * int64_t{sizeof(T)});
  }
  for (int64_t r = stripe * stripes.rows, first = r; block.next(problem, r, end); first = r) {
    V weight[kRows];
    T* kept[kRows] = {};
    for (int i = 0; i < kRows; ++i) {
      weight[i] = V::set1(static_cast<T>(block.weight[i]));
      if (kKeep) kept[i] = keep + std::min(first + i, end - 1) * z.columns;
    }
    if ((since += kRows) > kFlush) flush(sums, partial, z.padded), since = kRows;
    for_lanes<T>(0, z.columns, [&](int64_t k, int64_t count, auto last) {
      const V bias = V::load(z.bias + k);
      V sum = V::load(sums + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const V s = load_scores<E, decltype(last)::value>(block.at[i] + k, count);
        const V power = exp2(fma(s, scale, bias));
        flaw = fma(s, zero, flaw);
        sum = fma(power, weight[i], sum);
        if (kKeep) store_lanes<decltype(last)::value>(power, kept[i] + k, count);
      }
      store(sum, sums + k);
    });
  }
  flush(sums, partial, z.padded);
  space.virtual_mass[stripe] = 0;
  space.flaw[stripe] = reduce_add(flaw);
}

// What a pass over rows found beside the column masses.
struct Found {
  bool flawed, in_range;
  double log_total, log_virtual;  // of all columns and of the virtual one, as log_mass is
};

// Adds up the stripes: log_mass = log2(mass) + shift, without a shift where that is null. In range are masses of at least
// `least`, that of the virtual column included if it counts.
template <class T>
Found combine(const Space<T>& space, const Stripes& stripes, int64_t padded, const T* shift, double least,
              bool virtual_counts, int threads) {
  using V = Lanes<T>;
  std::atomic<bool> in_range{true};
  parallel_for(divide_up(padded, kChunk), threads, [&](int64_t chunk, int) {
    const int64_t first = chunk * kChunk, end = std::min(padded, first + kChunk);
    VecD lowest = VecD::set1(kMostSum), highest = VecD::set1(0);
    for (int64_t k = first; k < end; k += VecD::kWidth) {
      VecD sum = VecD::load(space.partial + k);
      for (int64_t s = 1; s < stripes.count; ++s) sum = sum + VecD::load(space.partial + s * padded + k);
      store(sum, space.mass + k);
      store(sum, space.log_mass + k);
      const VecD never = load_wide(space.never + k);
      lowest = min(sum - never, lowest), highest = max(sum + never, highest);
    }
    const V tiny = V::set1(static_cast<T>(0x1p-120));
    for (int64_t k = first; k < end; k += V::kWidth) {
      V log_mass = log2(max(V::load(space.log_mass + k), tiny));
      if (shift) log_mass = log_mass + V::load(shift + k);
      store(log_mass, space.log_mass + k);
    }
    if (-reduce_max(VecD::set1(0) - lowest) < least || reduce_max(highest) > kMostSum) in_range = false;
  });
  VecD sum = VecD::set1(0);
  for (int64_t k = 0; k < padded; k += VecD::kWidth) sum = sum + VecD::load(space.mass + k);
  double total = reduce_add(sum), virtual_mass = 0, flaw = 0;
  for (int64_t s = 0; s < stripes.count; ++s) virtual_mass += space.virtual_mass[s], flaw += space.flaw[s];
  // A mass that is NaN makes their sum so.
  if (!(total <= std::numeric_limits<double>::max()) || (virtual_counts && !(virtual_mass >= least))) in_range = false;
  return {!(flaw == 0), in_range, std::log2(total + virtual_mass), std::log2(virtual_mass)};
}

// The largest exponent of each column among the first rows that count, to `shift`; its negative to `bias`.
template <class E>
void shift_by_first_rows(const Problem<E>& problem, typename E::Wide scale, const Space<typename E::Wide>& space,
                         int64_t padded) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  const int64_t columns = problem.all.columns;
  std::fill(space.shift, space.shift + padded, -kInfinity<T>);
  Block<E> block;
  int64_t r = 0;
  for (int64_t taken = 0; taken < kFirstRows && block.next(problem, r, problem.rows()); taken += kRows) {
    for_lanes<T>(0, columns, [&](int64_t k, int64_t count, auto last) {
      V most = V::load(space.shift + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        most = max(load_scores<E, decltype(last)::value>(block.at[i] + k, count) * V::set1(scale), most);
      }
      store(most, space.shift + k);
    });
  }
  for (int64_t k = 0; k < padded; ++k) {
    space.bias[k] = k < columns ? -space.shift[k] : -kInfinity<T>;
    if (k >= columns) space.shift[k] = 0;
  }
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
