// Every CUDA kernel. All run on the given stream of the current device and never wait for it.
#pragma once

#include "../common/kmeans.h"

namespace clustops::cuda {

void kmeans_assign(const KMeansAssign& problem, void* stream);

}  // namespace clustops::cuda
