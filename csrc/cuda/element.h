// Elements of x as numbers, whatever their dtype, on a GPU and in the tests' plain C++.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "../common/tensor.h"
#include "launch.h"

namespace clustops::cuda {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

__device__ inline float value_of(float x) { return x; }
__device__ inline double value_of(double x) { return x; }

__device__ inline float value_of(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__device__ inline float value_of(F16 x) {
  float value;
#ifdef CLUSTOPS_SIMT
  // Exponent and fraction in their places, and the bias mended by a product: exact, also for denormals.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((x.bits & 0x7c00) == 0x7c00) bits = 0x7f800000u | (magnitude & 0x7fffffu);
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  memcpy(&value, &bits, sizeof value);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
#endif
  return value;
}

// The number as an element, to the nearest, ties to even.
__device__ inline void assign(float& element, float value) { element = value; }
__device__ inline void assign(double& element, double value) { element = value; }

__device__ inline void assign(Bf16& element, float value) {
#ifdef CLUSTOPS_SIMT
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = value != value ? 0x7fffffffu : bits + 0x7fffu + (bits >> 16 & 1);
  element.bits = static_cast<uint16_t>(bits >> 16);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(element.bits) : "f"(value));
#endif
}

__device__ inline void assign(F16& element, float value) {
#ifdef CLUSTOPS_SIMT
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half = 0x7fff;  // NaN
  if (magnitude < 0x38800000) {
    half = static_cast<uint32_t>(rintf(fabsf(value) * 0x1p24f));  // denormal, or the least of the others
  } else if (magnitude < 0x477ff000) {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  } else if (magnitude <= 0x7f800000) {
    half = 0x7c00;
  }
  element.bits = static_cast<uint16_t>(sign | half);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(element.bits) : "f"(value));
#endif
}

// use(T()) for the element type T of this dtype.
template <class Use>
void with_element(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::f32: return use(float());
    case DType::f64: return use(double());
    case DType::bf16: return use(Bf16());
    case DType::f16: return use(F16());
    default: throw std::invalid_argument("x must be floating point");
  }
}

// Products and sums that no compiler may fuse: the reference rounds after each.
#ifdef CLUSTOPS_SIMT
inline double mul(double a, double b) { return a * b; }
inline float mul(float a, float b) { return a * b; }
inline float sub(float a, float b) { return a - b; }
inline double sub(double a, double b) { return a - b; }
inline double add(double a, double b) { return a + b; }
inline float add(float a, float b) { return a + b; }
#else
__device__ inline double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline double sub(double a, double b) { return __dsub_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
#endif

}  // namespace clustops::cuda
