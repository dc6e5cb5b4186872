// How the rows of the contrastive losses lie in a workspace: plain arithmetic for GPU and CPU.
//
// Row m is view m % views of sample m / views. Once a call rows are normalised (if asked), rounded to what the matrix
// units multiply, padded with zeros, and stored as those read them: for each tile of kTileRows rows its blocks
// [kTileRows, kChunkBytes], one after the other along the features, with the 128-byte swizzle. A block is 16 KB;
// its first 64 rows are its first half.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/tensor.h"
#include "kmeans_layout.h"

namespace clustops::cuda {

constexpr int kTileRows = 128;
constexpr int kBlockBytes = kTileRows * kChunkBytes;
constexpr int kPrepareWarps = 8;      // of a CTA that prepares rows or samples
constexpr int kWarpSamples = 4;       // that one of its warps takes at once
#ifdef CLUSTOPS_SIMT  // few, so that each meets more units of work
constexpr int64_t kMostPrepare = 3;
#else
constexpr int64_t kMostPrepare = 512;  // CTAs that prepare rows, and as many for samples at most
#endif

// What matrix products multiply: bf16, fp16, TF32, or fp32 as a sum of two TF32.
enum class Operand { bf16, f16, tf32, f32 };

inline Operand operand_of(DType dtype, bool exact) {
  if (dtype == DType::bf16) return Operand::bf16;
  if (dtype == DType::f16) return Operand::f16;
  return exact ? Operand::f32 : Operand::tf32;
}

CLUSTOPS_HOST_DEVICE constexpr int bytes_of(Operand operand) {
  return operand == Operand::bf16 || operand == Operand::f16 ? 2 : 4;
}

// work(operand) with an operand that is known when this is compiled.
template <class Work>
void with_operand(Operand operand, const Work& work) {
  switch (operand) {
    case Operand::bf16: return work(std::integral_constant<Operand, Operand::bf16>());
    case Operand::f16: return work(std::integral_constant<Operand, Operand::f16>());
    case Operand::tf32: return work(std::integral_constant<Operand, Operand::tf32>());
    case Operand::f32: return work(std::integral_constant<Operand, Operand::f32>());
  }
}

// What a CTA that prepares knows of its rows or samples.
struct alignas(16) Summary {
  float least, greatest;  // norms of given rows, the least above 0
  float upstream;         // largest magnitude of their upstream gradients
  int32_t bad;            // a feature is not finite or a confidence not in [0, 1]
};

// Sizes, and arrays in the workspace. Rows from `rows` on up to `padded` are padding: their operands are 0, as are
// q, share, strength and upstream; their number is -1, their log_partition +inf.
struct Prepared {
  int64_t rows, views, width;
  int64_t padded;  // rows, to a multiple of kTileRows
  int chunks;      // blocks of a tile
  Operand operand;
  int row_blocks, sample_blocks;  // CTAs that prepare

  unsigned char* operands;
  int32_t* number;   // [padded] equal just where labels are
  float* q;          // [padded] weight of a row within its class: w_ab = q_a q_b for equal numbers
  float* own;        // [padded] w_ab of views of one sample
  float* weight;     // [padded] W
  float* inverse;    // [padded] 1 / norm, or 1
  // Backward only. Of rows that are no anchors: 0, +inf, 0, 0.
  float* upstream;       // [padded] g, the gradient of the row's loss, 0 where W is 0
  float* log_partition;  // [padded] log2(e) LSE
  float* share;          // [padded] r = g / W
  float* strength;       // [padded] g exp(1 / temperature - LSE)
  Summary* summary;      // [summaries()]

  CLUSTOPS_HOST_DEVICE int summaries() const { return row_blocks + sample_blocks; }
  CLUSTOPS_HOST_DEVICE int64_t tiles() const { return padded / kTileRows; }
  CLUSTOPS_HOST_DEVICE int64_t tile_bytes() const { return static_cast<int64_t>(chunks) * kBlockBytes; }
  // Byte of 16 bytes number `piece` of a row.
  CLUSTOPS_HOST_DEVICE int64_t at(int64_t row, int piece) const {
    return row / kTileRows * tile_bytes() + piece / 8 * static_cast<int64_t>(kBlockBytes) +
           swizzled(static_cast<int>(row % kTileRows), piece % 8);
  }
};

// The arrays from `base` on, which is aligned to 16 bytes; *bytes is how many they take.
inline Prepared prepared_rows(int64_t samples, int64_t views, int64_t width, Operand operand, bool backward,
                              void* base, int64_t* bytes) {
  Prepared p{};
  p.rows = samples * views, p.views = views, p.width = width;
  p.padded = align_up(p.rows, kTileRows);
  p.chunks = static_cast<int>(divide_up(width * bytes_of(operand), kChunkBytes));
  p.operand = operand;
  const auto blocks_for = [](int64_t units) {
    return static_cast<int>(units < 1 ? 1 : units < kMostPrepare ? units : kMostPrepare);
  };
  p.row_blocks = blocks_for(divide_up(p.padded, kPrepareWarps));
  p.sample_blocks = blocks_for(divide_up(samples, kPrepareWarps * kWarpSamples));
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    void* const here = static_cast<unsigned char*>(base) + used;
    used += align_up(size, 1024);
    return here;
  };
  p.operands = static_cast<unsigned char*>(take(p.tiles() * p.tile_bytes()));
  p.number = static_cast<int32_t*>(take(p.padded * 4));
  for (float** array : {&p.q, &p.own, &p.weight, &p.inverse}) *array = static_cast<float*>(take(p.padded * 4));
  if (backward) {
    for (float** array : {&p.upstream, &p.log_partition, &p.share, &p.strength}) {
      *array = static_cast<float*>(take(p.padded * 4));
    }
  }
  p.summary = static_cast<Summary*>(take(p.summaries() * static_cast<int64_t>(sizeof(Summary))));
  *bytes = used;
  return p;
}

}  // namespace clustops::cuda
