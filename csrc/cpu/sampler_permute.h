// The permutations behind the samplers' order, a block of numbers at a time. clustops/reference/sampler.py defines them.
#pragma once

#include "../common/philox.h"
#include "../common/simd_words.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

constexpr int kBlock = 512;  // numbers at a time: what a block needs of memory stays in the level 1 cache
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

// One word for each (cluster, pass).
template <class W>
inline W tweak_of(W cluster, W pass, const Keys& key) {
  W z = cluster * key.tweak[0] + pass * key.tweak[1] + key.tweak[2];
  z = (z ^ z >> 32) * kMix;
  z = (z ^ z >> 29) * kMixAgain;
  return z ^ z >> 32;
}

template <class W>
inline W word_of(W x, W t, uint64_t multiplier) {
  const W z = (x + t) * multiplier;
  return (z ^ z >> 32) * kMix;
}

// x mod n for x in [0, 2 n).
template <class W>
inline W wrapped(W x, W n) {
  const W d = x - n;
  return d + (n & -(d >> 63));
}

// One pass of the Feistel network on [0, a) x [0, b).
template <class W>
inline W feistel(W x, W a, W b, W t, const Keys& key) {
  W left = quotient(x, b), right = x - low_product(left, b);
  for (int i = 0; i < kRounds; i += 2) {
    left = wrapped<W>(left + (low_product(word_of(right, t, key.multiplier[i]) >> 32, a) >> 32), a);
    right = wrapped<W>(right + (low_product(word_of(left, t, key.multiplier[i + 1]) >> 32, b) >> 32), b);
  }
  return low_product(left, b) + right;
}

// The last shift of a permutation. n may pass 2^31, so the product comes in two parts.
template <class W>
inline W turned(W y, W t, W n) {
  const W word = t >> 32;
  return wrapped<W>(y + low_product(word, n >> 32) + (low_product(word, n) >> 32), n);
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

template <class W>
void permute_as(Block& block, int count, const Keys& key) {
  constexpr int lanes = sizeof(W) / sizeof(uint64_t);
  const auto pass = [&](auto type, const uint64_t* from, int i) {
    using V = decltype(type);
    const auto load = [&](const uint64_t* p) { return load_words<V>(p + i); };
    store_words(feistel<V>(load(from), load(block.a), load(block.b), load(block.t), key), block.image + i);
  };
  for (int i = 0; i < count; i += lanes) pass(W(), block.x, i);
  int outside[kBlock], found = 0;
  for (int i = 0; i < count; ++i) {
    outside[found] = i;
    found += block.image[i] >= block.n[i] && block.n[i] > kRanked;
  }
  for (int k = 0; k < found; ++k) {
    const int i = outside[k];
    do pass(uint64_t(), block.image, i);
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
