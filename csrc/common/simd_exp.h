// Powers and logarithms to base 2 on the vector types: bring exp and log to it by a factor of log2(e) beforehand.
#pragma once

#include "simd_double.h"

namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x to 2e-7 of its value; 0 where that is below the normal numbers, infinity where above, NaN for NaN.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec r{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
#else
  // The constant comes first: of two operands one of which is NaN, min and max take the second.
  x = min(Vec::set1(128.0f), max(Vec::set1(-126.5f), x));
  const Vec n = round_nearest(x - Vec::set1(0.5f)), r = x - n;
#endif
  // 2^r on [0, 1], exact at 0.
  Vec p = Vec::set1(1.8671298e-3f);
  p = fma(p, r, Vec::set1(9.017031e-3f));
  p = fma(p, r, Vec::set1(5.5799913e-2f));
  p = fma(p, r, Vec::set1(0.24016444f));
  p = fma(p, r, Vec::set1(0.6931513f));
  p = fma(p, r, Vec::set1(1.0f));
#if defined(__AVX512F__)
  // Takes the floor of x. No result below the normal numbers: arithmetic with those is slow.
  return {_mm512_maskz_scalef_ps(not_less(x, Vec::set1(-126.0f)), p.v, x.v)};
#else
  return scale_by_power(p, n);
#endif
}

// The same to the last bits of fp64.
inline VecD exp2(VecD x) {
  x = min(VecD::set1(1024.0), max(VecD::set1(-1023.0), x));
  const VecD n = round_nearest(x), r = x - n;
  // ln(2)^i / i!
  constexpr double kTerms[] = {2.5678435993488196e-11, 4.44553827187081e-10,   7.054911620801121e-09,
                               1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05,
                               1.5403530393381606e-04, 1.3333558146428441e-03, 9.618129107628477e-03,
                               5.5504108664821576e-02, 0.2402265069591007,     0.6931471805599453,
                               1.0};
  VecD p = VecD::set1(1.3691488853904124e-12);
  for (const double term : kTerms) p = fma(p, r, VecD::set1(term));
  return scale_by_power(p, n);
}

// log2(x) of normal numbers above 0, to 1e-7 of the larger of its value and 1.
inline Vec log2(Vec x) {
#if defined(__AVX512F__)
  // The fraction in [1/sqrt(2), sqrt(2)).
  const Vec root = Vec::set1(1.41421356f);
  const Vec exponent{_mm512_getexp_ps(_mm512_mul_ps(x.v, root.v))};
  const Vec t = Vec{_mm512_scalef_ps(x.v, _mm512_sub_ps(_mm512_setzero_ps(), exponent.v))} - Vec::set1(1.0f);
#else
  float lanes[Vec::kWidth], exponents[Vec::kWidth];
  x.store(lanes);
  for (int i = 0; i < Vec::kWidth; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &lanes[i], sizeof bits);
    const uint32_t shifted = bits - 0x3f3504f3u;  // 1/sqrt(2)
    const int32_t power = static_cast<int32_t>(shifted) >> 23;
    bits = (shifted & 0x7fffffu) + 0x3f3504f3u;
    std::memcpy(&lanes[i], &bits, sizeof bits);
    exponents[i] = static_cast<float>(power);
  }
  const Vec t = Vec::load(lanes) - Vec::set1(1.0f), exponent = Vec::load(exponents);
#endif
  Vec p = Vec::set1(0.12583715f);
  p = fma(p, t, Vec::set1(-0.20726994f));
  p = fma(p, t, Vec::set1(0.21571565f));
  p = fma(p, t, Vec::set1(-0.2389448f));
  p = fma(p, t, Vec::set1(0.28791624f));
  p = fma(p, t, Vec::set1(-0.36070368f));
  p = fma(p, t, Vec::set1(0.48091063f));
  p = fma(p, t, Vec::set1(-0.72134733f));
  p = fma(p, t, Vec::set1(1.442695f));
  return fma(p, t, exponent);
}
inline VecD log2(VecD x) {
  double lanes[VecD::kWidth];
  store(x, lanes);
  for (double& lane : lanes) lane = std::log2(lane);
  return VecD::load(lanes);
}

}  // namespace
