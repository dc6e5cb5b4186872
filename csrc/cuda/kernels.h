// Every CUDA kernel. All run on the given stream of the current device and never wait for it.
#pragma once

#include "../common/contrastive.h"
#include "../common/contrastive_chunked.h"
#include "../common/contrastive_weighted.h"
#include "../common/kmeans_cuda.h"
#include "../common/kmeans_iterate.h"
#include "../common/kmeans_seeding.h"
#include "../common/kmeans_split.h"
#include "../common/kmeans_update.h"
#include "../common/sinkhorn.h"
#include "../common/sinkhorn_loss.h"
#include "../common/sinkhorn_matrix.h"

namespace clustops::cuda {

void kmeans_assign(const KMeansAssignCuda& problem, void* stream);
void kmeans_bounds(const KMeansBounds& problem, void* stream);
void kmeans_sums(const KMeansSums& problem, void* stream);
void kmeans_counts(const KMeansCounts& problem, void* stream);
void kmeans_means(const KMeansMeans& problem, void* stream);
void kmeans_iterate(const KMeansIterate& problem, void* stream);
bool kmeans_iterate_fits(int64_t rows, int64_t features, int64_t clusters, DType dtype);  // on the current device
void kmeans_members(const KMeansMembers& problem, void* stream);
void kmeans_split(const KMeansSplit& problem, void* stream);
void kmeans_potentials(const KMeansPotentials& problem, void* stream);
void kmeans_closest(const KMeansClosest& problem, void* stream);
void kmeans_seed(const KMeansSeed& problem, void* stream);
int64_t kmeans_seed_workspace(int64_t entries, int64_t rows, int64_t features, int64_t trials);  // in 64-bit words

// Workspaces in 64-bit words.
int64_t sinkhorn_mass_workspace(const SinkhornRows& rows, bool virtual_column);   // on the current device
int64_t sinkhorn_solve_workspace(const SinkhornRows& rows, bool virtual_column);  // likewise
void sinkhorn_column_mass(const SinkhornMass& problem, void* stream);
void sinkhorn_solve(const SinkhornSolve& problem, void* stream);  // at least one update
void sinkhorn_assign(const SinkhornAssign& problem, void* stream);

void soft_cross_entropy(const SoftCrossEntropy& problem, void* workspace, void* stream);
int64_t soft_cross_entropy_workspace(int64_t pairs, bool listed, int64_t rows, int64_t columns);  // in numbers of the losses' dtype
void soft_cross_entropy_backward(const SoftCrossEntropyBackward& problem, void* stream);
void sinkhorn_matrix(const SinkhornMatrix& problem, void* stream);


// Class losses of rows that fit the current device, on tensor cores; `exact`: fp32 products as accurate as fp32. Workspaces
// in bytes.
bool contrastive_fits(int64_t width, DType dtype);
int64_t contrastive_workspace(const ContrastiveRows& rows, bool exact);
int64_t contrastive_backward_workspace(const ContrastiveRows& rows, bool exact);
void contrastive_rows(const ContrastiveForward& problem, void* workspace, bool exact, void* stream);
void contrastive_rows_backward(const ContrastiveBackward& problem, void* workspace, bool exact, void* stream);

// The same for rows of any width, with matrix products in between that the caller makes. Rows are prepared as z
// [rows to a multiple of 128, width], of the dtype of the features. Forward: sums of each block of scores; the last ends
// its rows. Backward: gradients of scores, of the dtype of the features, for each block; then from the sums of these
// times z, float32 [rows from `row` on, width], the result.
int64_t contrastive_chunked_workspace(const ContrastiveRows& rows, bool backward);  // bytes
void contrastive_chunked_prepare(const ContrastiveForward& problem, void* workspace, void* z, void* stream);
void contrastive_chunked_prepare(const ContrastiveBackward& problem, void* workspace, void* z, void* stream);
void contrastive_chunked_sums(const ContrastiveForward& problem, void* workspace, const ContrastiveBlock& block,
                              void* stream);
void contrastive_chunked_turn(const ContrastiveBackward& problem, void* workspace, const ContrastiveBlock& block,
                              void* gradients, void* stream);
void contrastive_chunked_end(const ContrastiveBackward& problem, void* workspace, const float* sums, int64_t row,
                             void* stream);

void weighted_sums(const WeightedSums& problem, void* stream);
void weighted_gradient(const WeightedGradient& problem, DType dtype, void* gradients, void* stream);

}  // namespace clustops::cuda
