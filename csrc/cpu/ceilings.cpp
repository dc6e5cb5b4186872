// What this CPU can do at most: fused multiply-adds, exponentials, bytes.
#include <chrono>
#include <cstdlib>

#include "../common/parallel.h"
#include "../common/simd_exp.h"
#include "amx.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// How often a second all threads together run `work`, which does one unit for a thread.
template <class Work>
double rate(double seconds, int threads, const Work& work) {
  double best = 0;
  const double end = now() + seconds;
  do {
    const double start = now();
    parallel_for(threads, threads, [&](int64_t i, int) { work(i); });
    const double speed = threads / (now() - start);
    best = speed > best ? speed : best;
  } while (now() < end);
  return best;
}

// Keeps a value alive without storing it.
inline void keep(Vec& value) { asm volatile("" : "+x"(value.v)); }

}  // namespace

double measure_fma(double seconds, int threads) {
  constexpr int kChains = Vec::kRegisters == 32 ? 24 : 12;
  constexpr int kSteps = 1 << 16;
  const double runs = rate(seconds, threads, [](int64_t) {
    Vec chain[kChains];
    Vec a = Vec::set1(0.999f), b = Vec::set1(1e-3f);
    keep(a);
    keep(b);
#pragma GCC unroll 24
    for (Vec& c : chain) keep(c = Vec::set1(1.0f));  // equal chains must not be merged into one
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
      for (int c = 0; c < kChains; ++c) chain[c] = fma(chain[c], a, b);
    }
#pragma GCC unroll 24
    for (Vec& c : chain) keep(c);
  });
  return runs * 2.0 * kChains * kSteps * Vec::kWidth * 1e-9;
}

double measure_matmul(double seconds, int threads) {
#if defined(__AMX_BF16__)
  constexpr int kSteps = 1 << 14;
  constexpr int kTile = 16 * 32;
  // Random numbers: with zeros the clock stays higher than any real product lets it.
  alignas(64) static uint16_t operands[4 * kTile];
  uint32_t state = 1;
  for (uint16_t& bits : operands) {
    state = state * 1664525u + 1013904223u;
    bits = static_cast<uint16_t>((state >> 16 & 0x807f) | 0x3f00 | (state >> 24 & 0x80));
  }
  const double runs = rate(seconds, threads, [](int64_t) {
    const Tiles tiles;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < kSteps; ++step) {
      _tile_loadd(4, operands, 64);
      _tile_loadd(5, operands + kTile, 64);
      _tile_loadd(6, operands + 2 * kTile, 64);
      _tile_loadd(7, operands + 3 * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  });
  return runs * kSteps * 4 * (2.0 * 16 * 16 * 32) * 1e-9;
#else
  static_cast<void>(seconds), static_cast<void>(threads);
  return 0;
#endif
}

double measure_exp(double seconds, int threads) {
  constexpr int kChains = 8;
  constexpr int kSteps = 1 << 14;
  const double runs = rate(seconds, threads, [](int64_t) {
    Vec x[kChains];
    for (int c = 0; c < kChains; ++c) x[c] = Vec::set1(-0.1f * static_cast<float>(c));
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        Vec y = exp2(x[c]);
        keep(y);
      }
      for (Vec& v : x) keep(v);
    }
  });
  return runs * kChains * kSteps * Vec::kWidth * 1e-9;
}

double measure_stream(int64_t bytes, double seconds, int threads) {
  const int64_t count = bytes / static_cast<int64_t>(sizeof(float)) / threads / Vec::kWidth * Vec::kWidth;
  float* source = static_cast<float*>(std::malloc(sizeof(float) * count * threads));
  float* target = static_cast<float*>(std::malloc(sizeof(float) * count * threads));
  double speed = 0;
  if (source && target) {
    parallel_for(threads, threads, [&](int64_t t, int) {  // first touch by the thread that will use it
      for (int64_t i = t * count; i < (t + 1) * count; ++i) source[i] = 1.0f, target[i] = 0.0f;
    });
    speed = rate(seconds, threads, [&](int64_t t) {
      for (int64_t i = t * count; i < (t + 1) * count; i += Vec::kWidth) Vec::load(source + i).store(target + i);
      asm volatile("" : : "r"(target) : "memory");
    });
  }
  std::free(source);
  std::free(target);
  return speed * 2.0 * static_cast<double>(count) * sizeof(float) * 1e-9;
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
