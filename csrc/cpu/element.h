// Numbers as tensors hold them, read and written as vectors of the type in which kernels compute: double for fp64,
// float for the rest.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/simd_exp.h"
#include "../common/tensor.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

template <class T>
using Vector = typename VecFor<T>::type;

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline Vec read(const float* p) { return Vec::load(p); }
inline VecD read(const double* p) { return VecD::load(p); }
inline Vec read(const Bf16* p) { return widen_bf16(reinterpret_cast<const uint16_t*>(p)); }
inline Vec read(const F16* p) { return widen_f16(reinterpret_cast<const uint16_t*>(p)); }

inline void write(Vec a, float* p) { a.store(p); }
inline void write(VecD a, double* p) { store(a, p); }
inline void write(Vec a, Bf16* p) { narrow_bf16(a, reinterpret_cast<uint16_t*>(p)); }
inline void write(Vec a, F16* p) { narrow_f16(a, reinterpret_cast<uint16_t*>(p)); }

// The first n numbers, and zeros; no memory beyond them is touched.
inline Vec read_first(const float* p, int64_t n) { return Vec::load_first(p, n); }
inline VecD read_first(const double* p, int64_t n) { return VecD::load_first(p, n); }
template <class S>
Vec read_first(const S* p, int64_t n) {
  S all[Vec::kWidth] = {};
  std::copy(p, p + n, all);
  return read(all);
}

inline void write_first(Vec a, float* p, int64_t n) { a.store_first(p, n); }
inline void write_first(VecD a, double* p, int64_t n) { store_first(a, p, n); }
template <class S>
void write_first(Vec a, S* p, int64_t n) {
  S all[Vec::kWidth];
  write(a, all);
  std::copy(all, all + n, p);
}

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// work(p) with p as a pointer to numbers of that dtype, of those that are computed with in T.
template <class T, class Work>
auto with_elements(DType dtype, const void* p, const Work& work) {
  if constexpr (std::is_same_v<T, double>) {
    return work(static_cast<const double*>(p));
  } else if (dtype == DType::bf16) {
    return work(static_cast<const Bf16*>(p));
  } else if (dtype == DType::f16) {
    return work(static_cast<const F16*>(p));
  } else {
    return work(static_cast<const float*>(p));
  }
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
