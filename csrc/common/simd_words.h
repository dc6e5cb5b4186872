// Unsigned 64-bit integers side by side: as many as a register holds, or one where no instruction multiplies them.
// Each function is there for `Words` and for one number.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// The product of the low halves.
inline uint64_t low_product(uint64_t a, uint64_t b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }

inline uint64_t high_half(uint64_t a) { return a >> 32; }

// x mod n for x in [0, 2 n).
inline uint64_t wrapped(uint64_t x, uint64_t n) { return x - (x >= n ? n : 0); }

// x div d.
inline uint64_t quotient(uint64_t x, uint64_t d) { return x / d; }

// The integer nearest to the square root of n < 2^50, above or below it.
inline uint64_t root(uint64_t n) { return static_cast<uint64_t>(std::sqrt(static_cast<double>(n)) + 0.5); }

#if defined(__AVX2__)

#if defined(__AVX512F__)
typedef uint64_t Words __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
inline Words low_product(Words a, Words b) { return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
inline Doubles square_root(Doubles a) { return (Doubles)_mm512_sqrt_pd((__m512d)a); }
// Not a shift, which takes the port of the products.
inline Words high_half(Words a) { return (Words)_mm512_maskz_shuffle_epi32(0x5555, (__m512i)a, _MM_PERM_CDAB); }
inline Words wrapped(Words x, Words n) {
  const __mmask8 above = _mm512_cmpge_epu64_mask((__m512i)x, (__m512i)n);
  return (Words)_mm512_mask_sub_epi64((__m512i)x, above, (__m512i)x, (__m512i)n);
}
#else
typedef uint64_t Words __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
inline Words low_product(Words a, Words b) { return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
inline Doubles square_root(Doubles a) { return (Doubles)_mm256_sqrt_pd((__m256d)a); }
inline Words high_half(Words a) { return a >> 32; }
inline Words wrapped(Words x, Words n) {
  const Words d = x - n;
  return d + (n & -(d >> 63));
}
#endif

// Between integers below 2^52 and doubles: 2^52 plus the one is the other behind the bits of an exponent.
constexpr uint64_t kExponent = 0x4330000000000000;
inline Doubles to_double(Words x) { return (Doubles)(x | kExponent) - 0x1p52; }
inline Words to_nearest(Doubles x) { return (Words)(x + 0x1p52) & ~kExponent; }

// For x < 2^51: the double is off by less than 1/4, so what is nearest to it is the quotient or one more.
inline Words quotient(Words x, Words d) {
  const Words q = to_nearest(to_double(x) / to_double(d));
  return q - ((x - q * d) >> 63);
}
inline Words root(Words n) { return to_nearest(square_root(to_double(n))); }

#else
typedef uint64_t Words;
#endif

constexpr int kLanes = sizeof(Words) / sizeof(uint64_t);

template <class W>
inline W load_words(const uint64_t* p) {
  W words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

template <class W>
inline void store_words(W words, uint64_t* p) {
  std::memcpy(p, &words, sizeof words);
}

}  // namespace
