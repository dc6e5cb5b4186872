// Sums over all pairs of rows on Hopper's tensor cores: contrastive_sm90.cu.
#pragma once

#include "contrastive_rows.h"

namespace clustops::cuda {

// Whether wgmma serves these operands, and pays for this many anchors.
bool sm90_suits(const Prepared& rows, int64_t anchors);

// How rows and columns are split: `sums` of the tasks are [splits, units() / splits * rows, ...] with so many rows a block.
constexpr int kForwardRows90 = 256, kBackwardRows90 = 128;
Split forward_split_sm90(const Prepared& rows, int64_t first, int64_t last);
Split backward_split_sm90(const Prepared& rows, int64_t first, int64_t last);  // features of `sums`: chunks kChunk

void forward_sm90(const ForwardTask& task, void* stream);
void backward_sm90(const BackwardTask& task, void* stream);

}  // namespace clustops::cuda
