// How a kernel is launched. With CLUSTOPS_SIMT the same source is plain C++ and runs on the CPU, thread by thread:
// that is how tests run it where there is no GPU.
#pragma once

#ifdef CLUSTOPS_SIMT

#include "simt.h"

#define CLUSTOPS_MAX_GRID 2  // so that every block loops

#define CLUSTOPS_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), simt::launch(grid, block, [&] { kernel(__VA_ARGS__); }))

#else

#include <cuda_runtime.h>

#define CLUSTOPS_MAX_GRID (1 << 20)  // blocks of one launch; the rest is their loop

#include <stdexcept>
#include <string>

#define CLUSTOPS_LAUNCH(kernel, grid, block, stream, ...)                          \
  do {                                                                             \
    kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);    \
    const cudaError_t error = cudaGetLastError();                                  \
    if (error != cudaSuccess) {                                                    \
      throw std::runtime_error(std::string(#kernel ": ") + cudaGetErrorString(error)); \
    }                                                                              \
  } while (false)

#endif
