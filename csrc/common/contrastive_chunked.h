// One block of scores of the class losses on its way between two matrix products.
#pragma once

#include "contrastive.h"

namespace clustops {

// Scores z_a.z_b of rows [row, row + rows) with columns [column, column + columns), all multiples of 128; rows and columns
// go on up to the next such multiple, and those beyond the last row are padding, of zeros. Lines of the block are
// `columns` numbers.
struct ContrastiveBlock {
  float* scores;
  int64_t row, rows, column, columns;
  bool first, last;  // of the blocks of these rows
};

}  // namespace clustops
