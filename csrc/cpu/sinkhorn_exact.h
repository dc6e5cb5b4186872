// Column masses where powers overflow or vanish: each column below its own largest exponent. Two passes over the rows.
#pragma once

#include "sinkhorn_mass.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// log2(w), less that of the row's sum where rows are normalised: what is added to all exponents of the row.
template <class E>
double row_offset(const Problem<E>& problem, int64_t r, const Exponents<typename E::Wide>& z, bool normalized,
                  typename E::Wide* e) {
  using T = typename E::Wide;
  const double log_weight = std::log2(problem.given(r)) - problem.exponent;
  if (!normalized) return log_weight;
  const T most = largest_exponent<E>(problem.row(r), z, static_cast<T>(z.virtual_exponent));
  const double sum = powers_below<E>(problem.row(r), z, most, e) + std::exp2(z.virtual_exponent - most);
  return log_weight - most - std::log2(sum);
}

// work(row, offset) for the rows of a stripe that count.
template <class E, class Work>
void each_row(const Problem<E>& problem, const Exponents<typename E::Wide>& z, const Stripes& stripes, int64_t stripe,
              bool normalized, typename E::Wide* e, const Work& work) {
  const int64_t end = std::min(problem.rows(), (stripe + 1) * stripes.rows);
  for (int64_t r = stripe * stripes.rows; r < end; ++r) {
    if (problem.given(r) != 0) work(problem.row(r), row_offset(problem, r, z, normalized, e));
  }
}

// Largest exponents of the columns in one stripe, in the room of its sums.
template <class E>
void largest_in_stripe(const Problem<E>& problem, const Exponents<typename E::Wide>& z, const Stripes& stripes,
                       int64_t stripe, bool normalized, const Space<typename E::Wide>& space, int thread) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  T* largest = reinterpret_cast<T*>(space.partial + stripe * z.padded);
  std::fill(largest, largest + z.padded, -kInfinity<T>);
  double virtual_most = -kInfinity<double>;
  each_row(problem, z, stripes, stripe, normalized, space.powers(thread, z.padded), [&](auto row, double offset) {
    virtual_most = std::max(virtual_most, z.virtual_exponent + offset);
    for_lanes<T>(0, z.columns, [&](int64_t k, int64_t count, auto last) {
      const V s = load_scores<E, decltype(last)::value>(row + k, count);
      const V exponent = fma(s, V::set1(z.scale), V::load(z.bias + k)) + V::set1(static_cast<T>(offset));
      store(max(exponent, V::load(largest + k)), largest + k);
    });
  });
  space.virtual_mass[stripe] = virtual_most;
}

template <class E>
void sum_of_stripe(const Problem<E>& problem, const Exponents<typename E::Wide>& z, const Stripes& stripes,
                   int64_t stripe, bool normalized, double virtual_most, const Space<typename E::Wide>& space,
                   int thread) {
  using T = typename E::Wide;
  using V = Lanes<T>;
  T* sums = space.sums(thread, z.padded);
  std::fill(sums, sums + z.padded, T(0));
  double* partial = space.partial + stripe * z.padded;
  std::fill(partial, partial + z.padded, 0.0);
  double virtual_mass = 0;
  int64_t since = 0;
  each_row(problem, z, stripes, stripe, normalized, space.powers(thread, z.padded), [&](auto row, double offset) {
    virtual_mass += std::exp2(z.virtual_exponent + offset - virtual_most);
    for_lanes<T>(0, z.columns, [&](int64_t k, int64_t count, auto last) {
      const V s = load_scores<E, decltype(last)::value>(row + k, count);
      const V exponent = fma(s, V::set1(z.scale), V::load(z.bias + k)) + V::set1(static_cast<T>(offset));
      store(V::load(sums + k) + exp2(exponent - V::load(space.shift + k)), sums + k);
    });
    if (++since == kFlush) flush(sums, partial, z.padded), since = 0;
  });
  flush(sums, partial, z.padded);
  space.virtual_mass[stripe] = virtual_mass;
  space.flaw[stripe] = 0;
}

// As the other passes: log_mass, and what else was found. The scores are finite.
template <class E>
Found exact_mass(const Problem<E>& problem, const Exponents<typename E::Wide>& z, const Stripes& stripes,
                 bool normalized, const Space<typename E::Wide>& space, int threads) {
  using T = typename E::Wide;
  parallel_for(stripes.count, threads, [&](int64_t stripe, int thread) {
    largest_in_stripe(problem, z, stripes, stripe, normalized, space, thread);
  });
  double virtual_most = -kInfinity<double>;
  std::fill(space.shift, space.shift + z.padded, -kInfinity<T>);
  for (int64_t s = 0; s < stripes.count; ++s) {
    const T* largest = reinterpret_cast<const T*>(space.partial + s * z.padded);
    for (int64_t k = 0; k < z.padded; ++k) space.shift[k] = std::max(space.shift[k], largest[k]);
    virtual_most = std::max(virtual_most, space.virtual_mass[s]);
  }
  for (int64_t k = 0; k < z.padded; ++k) space.shift[k] = space.shift[k] == -kInfinity<T> ? 0 : space.shift[k];
  if (virtual_most == -kInfinity<double>) virtual_most = 0;
  parallel_for(stripes.count, threads, [&](int64_t stripe, int thread) {
    sum_of_stripe(problem, z, stripes, stripe, normalized, virtual_most, space, thread);
  });
  Found found = combine(space, stripes, z.padded, space.shift, 0.0, false, threads);
  found.log_virtual += virtual_most;
  double most = found.log_virtual, sum = 0;
  for (int64_t k = 0; k < z.columns; ++k) {
    if (space.mass[k] > 0) most = std::max<double>(most, space.log_mass[k]);
  }
  for (int64_t k = 0; k < z.columns; ++k) sum += space.mass[k] > 0 ? std::exp2(space.log_mass[k] - most) : 0;
  found.log_total = most + std::log2(sum + std::exp2(found.log_virtual - most));
  return found;
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
