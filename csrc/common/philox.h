// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011), the function of clustops/reference/philox.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace clustops {

struct PhiloxWords {
  uint32_t word[4];
};

// Four random words for a position of a stream.
CLUSTOPS_HOST_DEVICE inline PhiloxWords philox(uint64_t seed, uint64_t stream, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    const uint32_t h0 = static_cast<uint32_t>(p0 >> 32), h1 = static_cast<uint32_t>(p1 >> 32);
    c0 = h1 ^ c1 ^ low, c1 = static_cast<uint32_t>(p1), c2 = h0 ^ c3 ^ high, c3 = static_cast<uint32_t>(p0);
    low += 0x9E3779B9u, high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A uniform number in [0, 1) with 53 random bits for a position of a stream.
CLUSTOPS_HOST_DEVICE inline double philox_uniform(uint64_t seed, uint64_t stream, uint64_t position) {
  const PhiloxWords w = philox(seed, stream, position);
  const uint64_t bits = static_cast<uint64_t>(w.word[0] >> 5) * 67108864u + (w.word[1] >> 6);
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace clustops
