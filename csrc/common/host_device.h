// Marks what a kernel calls on either side.
#pragma once

#if defined(__CUDACC__)
#define CLUSTOPS_HOST_DEVICE __host__ __device__
#else
#define CLUSTOPS_HOST_DEVICE
#endif
