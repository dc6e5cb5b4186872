// Every CUDA kernel. All run on the given stream of the current device and never wait for it.
#pragma once

#include "../common/kmeans.h"
#include "../common/kmeans_update.h"

namespace clustops::cuda {

void kmeans_assign(const KMeansAssign& problem, void* stream);
void kmeans_bounds(const KMeansBounds& problem, void* stream);
void kmeans_sums(const KMeansSums& problem, void* stream);
void kmeans_means(const KMeansMeans& problem, void* stream);

}  // namespace clustops::cuda
