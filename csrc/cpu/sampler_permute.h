// The permutations behind the samplers' order, a block of numbers at a time, as clustops/reference/sampler.py defines
// them.
#pragma once

#include "../common/philox.h"
#include "../common/simd_words.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int kBlock = 512;  // numbers at a time: what a block needs of memory stays in the level 1 cache
constexpr int kSideBySide = 8;  // vectors in flight, because each waits for its last product
constexpr int kRounds = 8;
constexpr uint64_t kRanked = 16;                 // up to here images are ranks
constexpr uint64_t kExact = uint64_t{1} << 50;  // below it Words divide exactly
constexpr uint64_t kMix = 0xFF51AFD7ED558CCD, kMixAgain = 0xC4CEB9FE1A85EC53;

enum Tag : uint64_t { kOrder = 0x5A01, kDraws, kBatchClusters, kBatchMembers };

inline uint64_t stream_of(Tag tag, uint64_t epoch) { return (static_cast<uint64_t>(tag) << 48) + epoch; }

// What (seed, epoch, tag) fixes.
struct Keys {
  uint64_t slot_tweak, tweak[3], multiplier[kRounds];

  Keys(uint64_t seed, uint64_t epoch, Tag tag) {
    uint64_t u[6 + kRounds];
    for (uint64_t i = 0; i < 3 + kRounds / 2; ++i) {
      const PhiloxWords w = philox(seed, stream_of(tag, epoch), i);
      u[2 * i] = static_cast<uint64_t>(w.word[0]) << 32 | w.word[1];
      u[2 * i + 1] = static_cast<uint64_t>(w.word[2]) << 32 | w.word[3];
    }
    slot_tweak = u[1];
    tweak[0] = u[2] | 1, tweak[1] = u[3] | 1, tweak[2] = u[4];
    for (int r = 0; r < kRounds; ++r) multiplier[r] = u[5 + r] | 1;
  }
};

template <class W>
inline W mixed(W z) {
  z = (z ^ z >> 32) * kMix;
  z = (z ^ z >> 29) * kMixAgain;
  return z ^ z >> 32;
}

// One word for each (cluster, pass).
template <class W>
inline W tweak_of(W cluster, W pass, const Keys& key) {
  return mixed<W>(cluster * key.tweak[0] + pass * key.tweak[1] + key.tweak[2]);
}

template <class W>
inline W word_of(W x, W t, uint64_t multiplier) {
  const W z = (x + t) * multiplier;
  return (z ^ high_half(z)) * kMix;
}

// The last shift of a permutation. n may pass 2^31, so the product comes in two parts.
template <class W>
inline W turned(W y, W t, W n) {
  const W word = high_half(t);
  return wrapped(y + low_product(word, high_half(n)) + high_half(low_product(word, n)), n);
}

// How many of the words of [0, n) are below that of x, as signed numbers.
inline uint64_t rank_of(uint64_t x, uint64_t n, uint64_t t, const Keys& key) {
  const auto signed_word = [&](uint64_t y) { return static_cast<int64_t>(word_of(y, t, key.multiplier[0])); };
  const int64_t own = signed_word(x);
  uint64_t rank = 0;
  for (uint64_t y = 0; y < n; ++y) rank += signed_word(y) < own;
  return rank;
}

// Numbers x of [0, n), the word t that names each one's permutation, and the images; [0, a) x [0, b) has n cells or
// a few more.
struct Block {
  alignas(64) uint64_t x[kBlock] = {}, n[kBlock] = {}, t[kBlock] = {}, a[kBlock] = {}, b[kBlock] = {},
      image[kBlock] = {};
};

// Cells for n < kExact: a = ceil(sqrt(n)), b = ceil(n / a), which is a or a - 1.
inline void shape_cells(Block& block, int count) {
  for (int i = 0; i < count; i += kLanes) {
    const Words n = load_words<Words>(block.n + i);
    Words a = root(n);
    a += (a * a - n) >> 63;
    store_words(a, block.a + i);
    store_words<Words>(a - ((n - (a * (a - 1) + 1)) >> 63), block.b + i);
  }
}

// One pass of the Feistel network on [0, a) x [0, b): from[i] .. to block.image[i] .., kSide words side by side.
template <int kSide, class W>
inline void feistel(const uint64_t* from, Block& block, int i, const Keys& key) {
  constexpr int lanes = sizeof(W) / sizeof(uint64_t);
  W left[kSide], right[kSide];
  const auto load = [&](const uint64_t* p, int v) { return load_words<W>(p + i + v * lanes); };
  for (int v = 0; v < kSide; ++v) {
    const W x = load(from, v), b = load(block.b, v);
    left[v] = quotient(x, b), right[v] = x - low_product(left[v], b);
  }
  for (int r = 0; r < kRounds; r += 2) {
    for (int v = 0; v < kSide; ++v) {
      const W a = load(block.a, v), word = word_of(right[v], load(block.t, v), key.multiplier[r]);
      left[v] = wrapped(left[v] + high_half(low_product(high_half(word), a)), a);
    }
    for (int v = 0; v < kSide; ++v) {
      const W b = load(block.b, v), word = word_of(left[v], load(block.t, v), key.multiplier[r + 1]);
      right[v] = wrapped(right[v] + high_half(low_product(high_half(word), b)), b);
    }
  }
  for (int v = 0; v < kSide; ++v) {
    store_words<W>(low_product(left[v], load(block.b, v)) + right[v], block.image + i + v * lanes);
  }
}

template <class W>
void permute_as(Block& block, int count, const Keys& key) {
  constexpr int lanes = sizeof(W) / sizeof(uint64_t), side = lanes > 1 ? kSideBySide : 1;
  for (int i = 0; i < count; i += side * lanes) feistel<side, W>(block.x, block, i, key);
  int outside[kBlock], found = 0;
  for (int i = 0; i < count; ++i) {
    outside[found] = i;
    found += block.image[i] >= block.n[i] && block.n[i] > kRanked;
  }
  for (int k = 0; k < found; ++k) {
    const int i = outside[k];
    do feistel<1, uint64_t>(block.image, block, i, key);
    while (block.image[i] >= block.n[i]);
  }
  for (int i = 0; i < count; i += lanes) {
    const auto load = [&](const uint64_t* p) { return load_words<W>(p + i); };
    store_words(turned<W>(load(block.image), load(block.t), load(block.n)), block.image + i);
  }
  for (int i = 0; i < count; ++i) {
    if (block.n[i] <= kRanked) block.image[i] = rank_of(block.x[i], block.n[i], block.t[i], key);
  }
}

// Images of the first `count` numbers; all n are at most `largest`.
inline void permute(Block& block, int count, uint64_t largest, const Keys& key) {
  largest < kExact ? permute_as<Words>(block, count, key) : permute_as<uint64_t>(block, count, key);
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
