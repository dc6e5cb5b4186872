// Powers, logarithms and largest values as softmaxes need them, on a GPU and in the tests' plain C++.
#pragma once

#include <cmath>

#include "launch.h"

namespace clustops::cuda {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.69314718055994531;

template <class Real>
struct Numbers;
template <>
struct Numbers<float> {
  static constexpr float lowest = -3.402823466e38f, infinity = __builtin_huge_valf();
};
template <>
struct Numbers<double> {
  static constexpr double lowest = -1.7976931348623157e308, infinity = __builtin_huge_val();
};

#ifdef CLUSTOPS_SIMT
inline float power_of_two(float x) { return std::exp2(x); }
inline double power_of_two(double x) { return std::exp2(x); }
inline float logarithm(float x) { return std::log(x); }
inline double logarithm(double x) { return std::log(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float larger(float a, float b) { return a > b || a != a ? a : b; }
#else
__device__ inline float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
__device__ inline double power_of_two(double x) { return exp2(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}
__device__ inline float larger(float a, float b) {
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(b));
  return largest;
}
#endif

// The larger one; NaN if one is.
__device__ inline double larger(double a, double b) { return a > b || a != a ? a : b; }
__device__ inline double reciprocal(double x) { return 1 / x; }

}  // namespace clustops::cuda
