// How a kernel is launched. With CLUSTOPS_SIMT the same source is plain C++ and runs on the CPU, thread by thread:
// that is how tests run it where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef CLUSTOPS_SIMT

#include "simt.h"

#define CLUSTOPS_MAX_GRID 2  // so that every block loops

#define CLUSTOPS_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), simt::launch(grid, block, [&] { kernel(__VA_ARGS__); }))

// The block's dynamic shared memory as an array of bytes.
#define CLUSTOPS_DYNAMIC_SHARED(name) unsigned char* const name = simt::dynamic_shared

namespace clustops::cuda {

inline void clear(void* data, std::size_t bytes, void*) {
  if (bytes > 0) std::memset(data, 0, bytes);
}

inline int64_t shared_limit = 160 << 10;
inline int64_t most_shared() { return shared_limit; }
inline bool is_hopper = false;
inline bool hopper() { return is_hopper; }
inline int64_t processors = 2;
inline int64_t multiprocessors() { return processors; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, std::size_t shared, void*,
            const Arguments&... arguments) {
  if (grid > 0) simt::launch(static_cast<unsigned>(grid), static_cast<unsigned>(block), shared, [&] { kernel(arguments...); });
}

template <class... Parameters, class... Arguments>
void launch_together(void (*kernel)(Parameters...), int64_t grid, int block, std::size_t shared, void*,
                     const Arguments&... arguments) {
  simt::launch_together(static_cast<unsigned>(grid), static_cast<unsigned>(block), shared, [&] { kernel(arguments...); });
}

}  // namespace clustops::cuda

#else

#include <cuda_runtime.h>

#define CLUSTOPS_MAX_GRID (1 << 20)  // blocks of one launch; the rest is their loop

#define CLUSTOPS_LAUNCH(kernel, grid, block, stream, ...)                          \
  do {                                                                             \
    kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);    \
    const cudaError_t error = cudaGetLastError();                                  \
    if (error != cudaSuccess) {                                                    \
      throw std::runtime_error(std::string(#kernel ": ") + cudaGetErrorString(error)); \
    }                                                                              \
  } while (false)

#define CLUSTOPS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace clustops::cuda {

inline void must(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline void clear(void* data, std::size_t bytes, void* stream) {
  if (bytes == 0) return;
  must(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

inline int64_t attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  must(cudaGetDevice(&device), "cudaGetDevice");
  must(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Of the current device: bytes of shared memory that one block may have, multiprocessors, whether its own kernels are here.
inline int64_t most_shared() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int64_t multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline bool hopper() {
#ifdef CLUSTOPS_HOPPER
  return attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#else
  return false;
#endif
}

// More than 48 KB of dynamic shared memory must be asked for.
template <class Kernel>
void ask_for_shared(Kernel kernel, std::size_t shared) {
  if (shared <= (48 << 10)) return;
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
       "cudaFuncSetAttribute");
}

// Nothing to do is no launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, std::size_t shared, void* stream,
            const Arguments&... arguments) {
  if (grid <= 0) return;
  ask_for_shared(kernel, shared);
  kernel<<<static_cast<unsigned>(grid), block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  must(cudaGetLastError(), "kernel launch");
}

// All blocks run at once, or it is an error.
template <class... Parameters, class... Arguments>
void launch_together(void (*kernel)(Parameters...), int64_t grid, int block, std::size_t shared, void* stream,
                     const Arguments&... arguments) {
  ask_for_shared(kernel, shared);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(grid);
  config.blockDim = static_cast<unsigned>(block);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &together;
  config.numAttrs = 1;
  must(cudaLaunchKernelEx(&config, kernel, arguments...), "cooperative kernel launch");
}

}  // namespace clustops::cuda

#endif

namespace clustops::cuda {

// Blocks for `units` of work over which they loop.
inline int64_t grid_for(int64_t units) { return units < CLUSTOPS_MAX_GRID ? units : CLUSTOPS_MAX_GRID; }

}  // namespace clustops::cuda
