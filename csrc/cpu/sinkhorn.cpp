// Sinkhorn potentials: passes over the rows give column masses, an update of one number for each column follows.
#include <vector>

#include "../common/pages.h"
#include "sinkhorn_assign.h"
#include "sinkhorn_exact.h"
#include "sinkhorn_kept.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Up to so many bytes powers are kept: reading them again from a cache costs less than computing them again.
constexpr int64_t kKeptBytes = 64 << 20;
// With scales in this range, and masses above this share, nothing that matters was lost from kept powers.
constexpr double kLeastScale = 0x1p-80, kMostScale = 0x1p16, kLeastKeptShare = 0x1p-44;

constexpr double kNone = -std::numeric_limits<double>::infinity();

// Where potentials go: a <- fi (a + log r - log m), in natural logarithms.
struct Target {
  double fi, tol, log_virtual;
  bool with_virtual;
};

template <class T>
Target prepare_target(const SinkhornSolve& a, int64_t p, const Space<T>& space, int64_t padded) {
  const int64_t columns = a.rows.columns;
  const bool with_virtual = a.mass >= 0;
  const T* prior = a.prior ? static_cast<const T*>(a.prior) + p * columns : nullptr;
  const T* init = a.init ? static_cast<const T*>(a.init) + p * (columns + with_virtual) : nullptr;
  double total = 0;
  for (int64_t k = 0; k < columns; ++k) total += prior ? static_cast<double>(prior[k]) : 1.0;
  const double log_share = (with_virtual ? std::log(a.mass) : 0.0) - std::log(total);
  for (int64_t k = 0; k < padded; ++k) {
    const bool never = k >= columns || (prior && prior[k] == 0) || (init && init[k] == static_cast<T>(kNone));
    space.never[k] = never ? -kInfinity<T> : 0;
    space.log_prior[k] = never ? 0 : static_cast<T>(log_share + (prior ? std::log(double{prior[k]}) : 0.0));
    space.bias[k] = k >= columns ? -kInfinity<T> : init ? static_cast<T>(init[k] * static_cast<T>(kLog2E)) : 0;
  }
  const bool no_virtual = !with_virtual || a.mass == 1 || (init && init[columns] == static_cast<T>(kNone));
  return {a.fi, a.tol, no_virtual ? kNone : std::log(1 - a.mass), with_virtual};
}

// Mass that an update would move: sum |m exp(updated - a) - m|.
template <class T>
double moved_mass(const Target& target, const Space<T>& space, const T* potentials, int64_t columns, double log_total,
                  double log_virtual) {
  const auto moved = [](double log_mass, double by) { return std::fabs(std::exp(log_mass + by) - std::exp(log_mass)); };
  double sum = 0;
  for (int64_t k = 0; k < columns; ++k) {
    if (space.never[k] != 0) continue;
    const double log_mass = kLn2 * (space.log_mass[k] - log_total), a = potentials[k];
    sum += moved(log_mass, target.fi * (a + space.log_prior[k] - log_mass) - a);
  }
  if (target.log_virtual != kNone) {
    const double log_mass = kLn2 * (log_virtual - log_total);
    sum += moved(log_mass, target.log_virtual - log_mass);
  }
  return sum;
}

// One update of potentials and bias.
template <class T>
void update(const Target& target, const Space<T>& space, T* potentials, int64_t columns, double log_total,
            double log_virtual, int threads) {
  using V = Lanes<T>;
  const V fi = V::set1(static_cast<T>(target.fi)), least = V::set1(std::numeric_limits<T>::lowest() / 4);
  const V ln2 = V::set1(static_cast<T>(kLn2)), log2e = V::set1(static_cast<T>(kLog2E));
  const V total = V::set1(static_cast<T>(log_total));
  parallel_for(divide_up(columns, kChunk), threads, [&](int64_t chunk, int) {
    for_lanes<T>(chunk * kChunk, std::min(columns, (chunk + 1) * kChunk), [&](int64_t k, int64_t count, auto last) {
      constexpr bool kLast = decltype(last)::value;
      const V a = max(load_lanes<V, kLast>(potentials + k, count), least);  // a number, also for what never gets any
      const V log_mass = (V::load(space.log_mass + k) - total) * ln2, never = V::load(space.never + k);
      const V updated = fi * (a + V::load(space.log_prior + k) - log_mass) + never;
      store_lanes<kLast>(updated, potentials + k, count);
      store(updated * log2e + never, space.bias + k);
    });
  });
  if (target.with_virtual) {
    T& a = potentials[columns];
    a = target.log_virtual == kNone
            ? -kInfinity<T>
            : static_cast<T>(a + target.log_virtual - kLn2 * (log_virtual - log_total));
  }
}

// log_mass by one pass over the rows, by two more where powers were out of range.
template <class E>
Found masses(const Problem<E>& problem, const Exponents<typename E::Wide>& z, const Stripes& stripes, int64_t pass,
             bool normalized, const Space<typename E::Wide>& space, int threads) {
  if (!normalized) shift_by_first_rows(problem, z.scale, space, z.padded);
  each_stripe(stripes, pass, threads, [&](int64_t stripe, int thread) {
    if (normalized) {
      softmax_stripe(problem, z, stripes, stripe, space, thread);
    } else {
      power_stripe<E, false>(problem, z, stripes, stripe, space, thread, nullptr);
    }
  });
  const Found found = combine(space, stripes, z.padded, normalized ? nullptr : space.shift,
                              problem.weight * kLeastShare, normalized && z.virtual_exponent != kNone, threads);
  if (found.flawed || found.in_range) return found;
  if (!normalized) std::fill(space.bias, space.bias + z.columns, typename E::Wide(0));
  return exact_mass(problem, z, stripes, normalized, space, threads);
}

enum class Done { nothing, potentials, assignments };

// The solution of one problem.
template <class E>
struct Solver {
  using T = typename E::Wide;

  const SinkhornSolve& a;
  const Problem<E>& problem;
  const Stripes& stripes;
  const Space<T>& space;
  const int threads;
  const int64_t columns = a.rows.columns, padded = padded_columns(columns), entries = columns + (a.mass >= 0);
  T* const potentials = static_cast<T*>(a.potentials) + problem.p * entries;
  Target target{};

  Done solve() {
    if (start(); a.n_iters == 0 || problem.weight == 0) return Done::potentials;
    if (can_keep()) {
      const Done done = solve_kept(static_cast<T*>(a.assignments) + problem.p * a.rows.rows * columns);
      if (done != Done::nothing) return done;
      start();
    }
    for (int64_t t = 0; t < a.n_iters; ++t) {
      const bool cold = !a.init && t == 0;
      const Found found = masses(problem, exponents(), stripes, t, !cold, space, threads);
      if (found.flawed) return not_finite();
      if (!step(found, cold)) break;
    }
    return Done::potentials;
  }

  void start() {
    target = prepare_target(a, problem.p, space, padded);
    const T* init = static_cast<const T*>(a.init);
    for (int64_t k = 0; k < entries; ++k) potentials[k] = init ? init[problem.p * entries + k] : T(0);
  }

  Exponents<T> exponents() const {
    const double exponent = target.with_virtual ? potentials[columns] * kLog2E : kNone;
    return {static_cast<T>(kLog2E / a.epsilon), space.bias, columns, padded, exponent, std::exp2(exponent)};
  }

  Done not_finite() const {
    std::fill(potentials, potentials + entries, std::numeric_limits<T>::quiet_NaN());
    return Done::potentials;
  }

  // Updates the potentials, unless the problem is solved well enough: then false.
  bool step(const Found& found, bool cold) const {
    // In a cold start masses are measured by the virtual column's, which is the weight, or not at all.
    const double none = target.with_virtual ? std::log2(problem.weight) : -problem.exponent;
    const double total = cold ? none : found.log_total, log_virtual = cold ? none : found.log_virtual;
    if (!cold && target.tol >= 0 &&
        moved_mass(target, space, potentials, columns, total, log_virtual) <= target.tol) {
      return false;
    }
    update(target, space, potentials, columns, total, log_virtual, threads);
    return true;
  }

  bool can_keep() const {
    const SinkhornRows& rows = a.rows;
    return a.assignments && size_of(a.assignments_dtype) == int64_t{sizeof(T)} && !rows.weights && rows.queued == 0 &&
           !a.init && rows.rows * columns * int64_t{sizeof(T)} <= kKeptBytes;
  }

  Done solve_kept(T* powers) const {
    shift_by_first_rows(problem, exponents().scale, space, padded);
    each_stripe(stripes, 0, threads, [&](int64_t stripe, int thread) {
      power_stripe<E, true>(problem, exponents(), stripes, stripe, space, thread, powers);
    });
    Found found = combine(space, stripes, padded, space.shift, problem.weight * kLeastKeptShare, false, threads);
    if (found.flawed) return not_finite();
    if (!found.in_range) return Done::nothing;
    step(found, true);
    for (int64_t t = 1; t < a.n_iters; ++t) {
      if (!rescale()) return Done::nothing;
      each_stripe(stripes, t, threads, [&](int64_t stripe, int thread) {
        kept_stripe(kept(powers), problem.least_part, stripes, stripe, space, thread, padded);
      });
      found = combine<T>(space, stripes, padded, nullptr, problem.weight * kLeastKeptShare,
                         exponents().virtual_exponent != kNone, threads);
      if (found.flawed || !found.in_range) return Done::nothing;
      if (!step(found, false)) break;
    }
    if (!rescale()) return Done::nothing;
    if (a.hard) return Done::potentials;
    std::atomic<bool> fine{true};
    each_stripe(stripes, a.n_iters, threads, [&](int64_t stripe, int) {
      if (!finish_stripe(kept(powers), stripes, stripe)) fine = false;
    });
    return fine ? Done::assignments : Done::nothing;
  }

  Kept<T> kept(T* powers) const {
    return {powers, a.rows.rows, columns, space.scale, exponents().virtual_power};
  }

  // Scales of kept powers, from potentials; whether all are in range.
  bool rescale() const {
    using V = Lanes<T>;
    bool fine = true;
    for (int64_t k = 0; k < padded; k += V::kWidth) {
      store(exp2(V::load(space.bias + k) + V::load(space.shift + k)), space.scale + k);
    }
    for (int64_t k = 0; k < columns; ++k) {
      fine = fine && ((space.scale[k] >= kLeastScale && space.scale[k] <= kMostScale) || space.never[k] != 0);
    }
    return fine;
  }
};

template <class T>
struct Room {
  Stripes stripes;
  int64_t padded, threads, slot;  // a slot in doubles

  Room(const SinkhornRows& rows, int all_threads)
      : stripes(rows.rows + rows.queued, rows.columns),
        padded(padded_columns(rows.columns)),
        threads(one_by_one(rows.problems, all_threads) ? std::min<int64_t>(kMostStripes, std::max(1, all_threads)) : 1),
        slot(Space<T>::shared(stripes, padded) + threads * Space<T>::per_thread(padded)) {}

  Space<T> space(void* workspace, int64_t index) const {
    double* room = static_cast<double*>(workspace) + index * slot;
    return Space<T>(room, room + Space<T>::shared(stripes, padded), stripes, padded);
  }
};

template <class E>
void solve_all(const SinkhornSolve& a, int threads) {
  using T = typename E::Wide;
  const Room<T> room(a.rows, threads);
  each_problem(a.rows.problems, threads, [&](int64_t p, int slot, int) {
    const Space<T> space = room.space(a.workspace, slot);
    const Problem<E> problem(a.rows, p);
    const int within = static_cast<int>(room.threads);
    Solver<E> solver{a, problem, room.stripes, space, within};
    if (solver.solve() == Done::assignments || !a.assignments) return;
    const SinkhornAssign assign{a.rows,   a.potentials, a.assignments,      a.epsilon, a.mass >= 0,
                                a.hard, a.assignments_dtype, nullptr};
    sinkhorn_assign_problem(assign, p, {space.bias, space.thread_space}, within);
  });
}

template <class E>
void mass_of(const SinkhornMass& a, int64_t p, const Room<typename E::Wide>& room,
             const Space<typename E::Wide>& space) {
  using T = typename E::Wide;
  const int64_t columns = a.rows.columns, padded = room.padded, entries = columns + a.virtual_column;
  const T* potentials = static_cast<const T*>(a.potentials) + p * entries;
  T* result = static_cast<T*>(a.log_mass) + p * entries;
  for (int64_t k = 0; k < padded; ++k) {
    space.bias[k] = k < columns ? static_cast<T>(potentials[k] * static_cast<T>(kLog2E)) : -kInfinity<T>;
    space.never[k] = space.bias[k] == -kInfinity<T> ? -kInfinity<T> : 0;
  }
  const Problem<E> problem(a.rows, p);
  if (problem.weight == 0) return std::fill(result, result + entries, -kInfinity<T>), void();
  const double exponent = a.virtual_column ? potentials[columns] * kLog2E : kNone;
  const Exponents<T> z{static_cast<T>(kLog2E / a.epsilon), space.bias, columns, padded, exponent, std::exp2(exponent)};
  const Found found = masses(problem, z, room.stripes, 0, a.normalized, space, static_cast<int>(room.threads));
  if (found.flawed) return std::fill(result, result + entries, std::numeric_limits<T>::quiet_NaN()), void();
  const auto natural = [&](double log_mass, double a_k) {
    return static_cast<T>(kLn2 * (log_mass + problem.exponent) + (a.normalized ? 0 : a_k));
  };
  for (int64_t k = 0; k < columns; ++k) {
    result[k] = space.never[k] != 0 ? -kInfinity<T> : natural(space.log_mass[k], potentials[k]);
  }
  if (a.virtual_column) {
    result[columns] = natural(a.normalized ? found.log_virtual : std::log2(problem.weight), potentials[columns]);
  }
}

}  // namespace

int64_t sinkhorn_workspace(const SinkhornRows& rows, int threads) {
  const int64_t slots = one_by_one(rows.problems, threads) ? 1 : threads;
  return slots * (rows.dtype == DType::f64 ? Room<double>(rows, threads).slot : Room<float>(rows, threads).slot);
}

void sinkhorn_solve(const SinkhornSolve& a, int threads) {
  if (a.rows.columns == 0) return;
  const int64_t bytes = a.rows.problems * a.rows.rows * a.rows.columns * size_of(a.assignments_dtype);
  if (a.assignments) wish_huge_pages(a.assignments, bytes);
  with_element(a.rows.dtype, [&](auto element) { solve_all<decltype(element)>(a, threads); });
}

void sinkhorn_column_mass(const SinkhornMass& a, int threads) {
  if (a.rows.columns == 0) return;
  with_element(a.rows.dtype, [&](auto element) {
    using E = decltype(element);
    const Room<typename E::Wide> room(a.rows, threads);
    each_problem(a.rows.problems, threads, [&](int64_t p, int slot, int) {
      mass_of<E>(a, p, room, room.space(a.workspace, slot));
    });
  });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
