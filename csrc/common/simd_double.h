// What sums in fp64 take beside the vector types of simd.h.
#pragma once

#include <cmath>

#include "simd.h"

namespace {

#if defined(__AVX512F__)

inline VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline VecD operator/(VecD a, VecD b) { return {_mm512_div_pd(a.v, b.v)}; }
inline VecD load_wide(const double* p) { return VecD::load(p); }
inline VecD load_wide(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
inline void store(VecD a, double* p) { _mm512_storeu_pd(p, a.v); }
inline void store(VecD a, float* p) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v)); }

#elif defined(__AVX2__)

inline VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
inline VecD load_wide(const double* p) { return VecD::load(p); }
inline VecD load_wide(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
inline void store(VecD a, double* p) { _mm256_storeu_pd(p, a.v); }
inline void store(VecD a, float* p) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a.v)); }

#else

inline VecD operator*(VecD a, VecD b) { return {a.v * b.v}; }
inline VecD operator/(VecD a, VecD b) { return {a.v / b.v}; }
inline VecD load_wide(const double* p) { return VecD::load(p); }
// Both lanes at once: GCC 12 forgets the rounding of lanes that are narrowed one by one and widened again.
typedef float Pair __attribute__((vector_size(8)));
inline VecD load_wide(const float* p) {
  Pair pair;
  std::memcpy(&pair, p, sizeof pair);
  return {__builtin_convertvector(pair, VecD::Lanes)};
}
inline void store(VecD a, double* p) { std::memcpy(p, &a.v, sizeof a.v); }
inline void store(VecD a, float* p) {
  const Pair pair = __builtin_convertvector(a.v, Pair);
  std::memcpy(p, &pair, sizeof pair);
}

#endif

// To the nearest integer, ties to the even one.
inline int64_t round_to_integer(double value) {
#if defined(__SSE2__)
  return _mm_cvtsd_si64(_mm_set_sd(value));
#else
  return std::llrint(value);
#endif
}

}  // namespace
