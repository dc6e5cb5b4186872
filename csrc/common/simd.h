// One vector type for each instruction set, so that a kernel is written once and compiled for each.
// A source that includes this is compiled several times, with CLUSTOPS_ISA naming the set (and the namespace).
// Everything here has internal linkage: two sets must never share a function through the linker.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kRegisters = 32;
  __m512 v;

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
  static __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_first(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  using Mask = __mmask16;
  friend Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  void store_where(Mask m, float* p) const { _mm512_mask_storeu_ps(p, m, v); }
  friend uint32_t not_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ); }  // also if NaN
};

inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }

struct VecD {
  static constexpr int kWidth = 8;
  __m512d v;

  static VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static VecD load_first(const double* p, int64_t n) {
    return {_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p)};
  }
  static VecD set1(double x) { return {_mm512_set1_pd(x)}; }
  friend VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
};

inline double reduce_add(VecD a) { return _mm512_reduce_add_pd(a.v); }

// Sixteen bits a number, read as fp32.
inline Vec widen_bf16(const uint16_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}
inline Vec widen_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// Rounded to the nearest number of sixteen bits, ties to even.
inline void narrow_bf16(Vec a, uint16_t* p) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void narrow_f16(Vec a, uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// 2^n for integral n held in floats.
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec round_nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kRegisters = 16;
  __m256 v;

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_first(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, first_lanes(n))};
  }
  static __m256i first_lanes(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  }
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_first(float* p, int64_t n) const { _mm256_maskstore_ps(p, first_lanes(n), v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  using Mask = __m256;
  friend Mask greater(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  void store_where(Mask m, float* p) const { _mm256_storeu_ps(p, _mm256_blendv_ps(_mm256_loadu_ps(p), v, m)); }
  friend uint32_t not_less(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)); }
};

inline float reduce_max(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
inline float reduce_add(Vec a) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_shuffle_ps(m, m, 1)));
}

struct VecD {
  static constexpr int kWidth = 4;
  __m256d v;

  static VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static VecD load_first(const double* p, int64_t n) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return {_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane))};
  }
  static VecD set1(double x) { return {_mm256_set1_pd(x)}; }
  friend VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
};

inline double reduce_add(VecD a) {
  const __m128d m = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(m, _mm_unpackhi_pd(m, m)));
}

inline Vec widen_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
}
inline Vec widen_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

inline void narrow_bf16(Vec a, uint16_t* p) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000),
                               _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void narrow_f16(Vec a, uint16_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i bias = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bias))};
}
inline Vec round_nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

#else

// Four lanes in the compiler's own vector type: SSE2 on x86-64, NEON on Arm.
struct Vec {
  static constexpr int kWidth = 4;
#if defined(__aarch64__)
  static constexpr int kRegisters = 32;
#else
  static constexpr int kRegisters = 16;
#endif
  typedef float Lanes __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  Lanes v;

  static Vec load(const float* p) {
    Vec a;
    std::memcpy(&a.v, p, sizeof a.v);
    return a;
  }
  static Vec load_first(const float* p, int64_t n) {
    Vec a = set1(0.0f);
    std::memcpy(&a.v, p, static_cast<std::size_t>(n) * sizeof(float));
    return a;
  }
  static Vec set1(float x) { return {Lanes{x, x, x, x}}; }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  void store_first(float* p, int64_t n) const { std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(float)); }
  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  friend Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  friend Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  static uint32_t bits(Mask m) {
#if defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(m)));
#else
    return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
#endif
  }
  friend Mask greater(Vec a, Vec b) { return a.v > b.v; }
  void store_where(Mask m, float* p) const { Vec{m ? v : load(p).v}.store(p); }
  friend uint32_t not_less(Vec a, Vec b) { return bits(~(a.v < b.v)); }
};

inline float reduce_max(Vec a) {
  float best = a.v[0];
  for (int i = 1; i < 4; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}
inline float reduce_add(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }

struct VecD {
  static constexpr int kWidth = 2;
  typedef double Lanes __attribute__((vector_size(16)));
  Lanes v;

  static VecD load(const double* p) { return load_first(p, kWidth); }
  static VecD load_first(const double* p, int64_t n) {
    VecD a = set1(0.0);
    std::memcpy(&a.v, p, static_cast<std::size_t>(n) * sizeof(double));
    return a;
  }
  static VecD set1(double x) { return {Lanes{x, x}}; }
  friend VecD operator+(VecD a, VecD b) { return {a.v + b.v}; }
  friend VecD operator-(VecD a, VecD b) { return {a.v - b.v}; }
  friend VecD fma(VecD a, VecD b, VecD c) { return {a.v * b.v + c.v}; }
};

inline double reduce_add(VecD a) { return a.v[0] + a.v[1]; }

inline Vec widen_bf16(const uint16_t* p) {
  float wide[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(&wide[i], &bits, sizeof bits);
  }
  return Vec::load(wide);
}
inline Vec widen_f16(const uint16_t* p) {
  float wide[4];
  for (int i = 0; i < 4; ++i) {
    // The exponent and fraction moved to their places and the bias mended by a product: exact, also for denormals.
    const uint32_t magnitude = static_cast<uint32_t>(p[i] & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((p[i] & 0x7c00) == 0x7c00) bits = 0x7f800000u | (magnitude & 0x7fffffu);
    bits |= static_cast<uint32_t>(p[i] & 0x8000) << 16;
    std::memcpy(&wide[i], &bits, sizeof bits);
  }
  return Vec::load(wide);
}

inline void narrow_bf16(Vec a, uint16_t* p) {
  uint32_t bits[4];
  std::memcpy(bits, &a.v, sizeof bits);
  for (int i = 0; i < 4; ++i) {
    const bool is_nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    p[i] = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits[i] + 0x7fffu + (bits[i] >> 16 & 1u)) >> 16);
  }
}
inline void narrow_f16(Vec a, uint16_t* p) {
  uint32_t bits[4];
  std::memcpy(bits, &a.v, sizeof bits);
  for (int i = 0; i < 4; ++i) {
    const uint32_t sign = bits[i] >> 16 & 0x8000u, magnitude = bits[i] & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00;
    } else if (magnitude >= 0x477ff000u) {  // 65520, from where on numbers round to infinity
      half = 0x7c00;
    } else if (magnitude < 0x38800000u) {  // 2^-14: what is added to 1/2 is rounded to multiples of 2^-24
      float value;
      std::memcpy(&value, &magnitude, sizeof value);
      value += 0.5f;
      std::memcpy(&half, &value, sizeof half);
      half -= 0x3f000000u;
    } else {
      half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    p[i] = static_cast<uint16_t>(sign | half);
  }
}

inline Vec scale_by_power(Vec a, Vec n) {
  const Vec::Mask bias = (__builtin_convertvector(n.v, Vec::Mask) + 127) << 23;
  Vec::Lanes power;
  std::memcpy(&power, &bias, sizeof power);
  return {a.v * power};
}
inline Vec round_nearest(Vec a) {
  const Vec magic = Vec::set1(12582912.0f);  // 1.5 * 2^23: adding it drops the fraction
  return (a + magic) - magic;
}

#endif

template <class T>
struct VecFor;
template <>
struct VecFor<float> {
  using type = Vec;
};
template <>
struct VecFor<double> {
  using type = VecD;
};

}  // namespace
