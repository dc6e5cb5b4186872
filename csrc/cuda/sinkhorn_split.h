// Column masses of rows too long for one CTA: those of a group have a slice of the columns each, and read it once.
#pragma once

#include "sinkhorn_layout.h"

namespace clustops::cuda {

struct SplitPass {
  SinkhornRows rows;
  const float* potentials;  // [problems, all]
  const float* stopped;     // [problems], or null: none
  void* workspace;
  int64_t all;
  float scale;  // log2(e) / epsilon
  bool look;    // whether scores may be infinite
};

struct SplitMasses {
  const float* partials;  // log2, [problems, chunks, all]
  const float* failed;    // not 0 if numbers were out of range, and the partials say nothing
  Chunks chunks;
};

// In floats; 0 where this way is not for such rows, or not for the current device.
int64_t split_workspace(const SinkhornRows& rows, int64_t all);
SplitMasses split_masses(const SplitPass& pass, void* stream);

}  // namespace clustops::cuda
