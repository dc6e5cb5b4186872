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
inline VecD max(VecD a, VecD b) { return {_mm512_max_pd(a.v, b.v)}; }
inline VecD min(VecD a, VecD b) { return {_mm512_min_pd(a.v, b.v)}; }
// 2^n for integral n from -1023, where it is 0, to 1024, where it is infinity.
inline VecD scale_by_power(VecD a, VecD n) {
  const __m512i biased = _mm512_castpd_si512(_mm512_add_pd(n.v, _mm512_set1_pd(0x1.8p52 + 1023)));
  return {_mm512_mul_pd(a.v, _mm512_castsi512_pd(_mm512_slli_epi64(biased, 52)))};
}

#elif defined(__AVX2__)

inline VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
inline VecD load_wide(const double* p) { return VecD::load(p); }
inline VecD load_wide(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
inline void store(VecD a, double* p) { _mm256_storeu_pd(p, a.v); }
inline void store(VecD a, float* p) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a.v)); }
inline VecD max(VecD a, VecD b) { return {_mm256_max_pd(a.v, b.v)}; }
inline VecD min(VecD a, VecD b) { return {_mm256_min_pd(a.v, b.v)}; }
inline VecD scale_by_power(VecD a, VecD n) {
  const __m256i biased = _mm256_castpd_si256(_mm256_add_pd(n.v, _mm256_set1_pd(0x1.8p52 + 1023)));
  return {_mm256_mul_pd(a.v, _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52)))};
}

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
inline VecD max(VecD a, VecD b) { return {a.v > b.v ? a.v : b.v}; }
inline VecD min(VecD a, VecD b) { return {a.v < b.v ? a.v : b.v}; }
inline VecD scale_by_power(VecD a, VecD n) {
  typedef int64_t Bits __attribute__((vector_size(16)));
  const VecD::Lanes biased = n.v + (0x1.8p52 + 1023);
  Bits bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits <<= 52;
  VecD::Lanes power;
  std::memcpy(&power, &bits, sizeof power);
  return {a.v * power};
}

#endif

inline VecD round_nearest(VecD a) {
  const VecD magic = VecD::set1(0x1.8p52);
  return (a + magic) - magic;
}
inline double reduce_max(VecD a) {
  double lanes[VecD::kWidth], best;
  store(a, lanes);
  best = lanes[0];
  for (int i = 1; i < VecD::kWidth; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// The same names for both vector types.
inline void store(Vec a, float* p) { a.store(p); }
inline void store_first(Vec a, float* p, int64_t n) { a.store_first(p, n); }
inline void store_first(VecD a, double* p, int64_t n) {
  double lanes[VecD::kWidth];
  store(a, lanes);
  std::memcpy(p, lanes, static_cast<std::size_t>(n) * sizeof(double));
}

// To the nearest integer, ties to the even one.
inline int64_t round_to_integer(double value) {
#if defined(__SSE2__)
  return _mm_cvtsd_si64(_mm_set_sd(value));
#else
  return std::llrint(value);
#endif
}

}  // namespace
