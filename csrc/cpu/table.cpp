// Compiled once for each instruction set, as the kernels are: the table that dispatch.cpp chooses from.
#include "kernels.h"

namespace clustops::cpu::CLUSTOPS_ISA {

int64_t kmeans_assign_workspace(int64_t problems, int64_t clusters, int64_t features, DType dtype, int threads);
void kmeans_assign(const KMeansAssign& problem, int threads);
void kmeans_nearest(const KMeansAssign& problem, int64_t top, int threads);
void kmeans_iterate(const KMeansIterate& problem, int threads);
void kmeans_bounds(const KMeansBounds& problem, int threads);
void kmeans_sums(const KMeansSums& problem, int threads);
void kmeans_means(const KMeansMeans& problem, int threads);
void kmeans_counts(const KMeansCounts& problem, int threads);
void kmeans_draws(const KMeansDraws& problem, int threads);
void kmeans_potentials(const KMeansPotentials& problem, int threads);
void kmeans_closest(const KMeansClosest& problem, int threads);
int64_t kmeans_seed_workspace(const KMeansRows& rows, int64_t entries, int64_t clusters, int64_t trials, int threads);
void kmeans_seed(const KMeansSeed& problem, int threads);
int64_t sinkhorn_workspace(const SinkhornRows& rows, int threads);
void sinkhorn_solve(const SinkhornSolve& problem, int threads);
void sinkhorn_column_mass(const SinkhornMass& problem, int threads);
int64_t sinkhorn_assign_workspace(const SinkhornRows& rows, int threads);
void sinkhorn_assign(const SinkhornAssign& problem, int threads);
void soft_cross_entropy(const SoftCrossEntropy& problem, int threads);
void soft_cross_entropy_backward(const SoftCrossEntropyBackward& problem, int threads);
void sinkhorn_matrix(const SinkhornMatrix& problem, int threads);
void contrastive_rows(const ContrastiveForward& problem, int threads);
void contrastive_rows_backward(const ContrastiveBackward& problem, int threads);
void weighted_sums(const WeightedSums& problem, int threads);
void weighted_gradient(const WeightedGradient& problem, int threads);
int64_t largest_label(const Labels& labels, int threads);
int64_t fingerprint(const Labels& numbers, int threads);
void count_members(const ClusterMembers& problem, int threads);
void place_members(const ClusterMembers& problem, int threads);
void sampler_order(const SamplerOrder& problem, int threads);
void sampler_batches(const SamplerBatches& problem, int threads);
double measure_fma(double seconds, int threads);
double measure_matmul(double seconds, int threads);
double measure_exp(double seconds, int threads);
double measure_stream(int64_t bytes, double seconds, int threads);

extern const Kernels table;
const Kernels table = {kmeans_assign_workspace,
                       kmeans_assign,
                       kmeans_nearest, kmeans_iterate,
                       kmeans_bounds,
                       kmeans_sums,
                       kmeans_means,
                       kmeans_counts,
                       kmeans_draws,
                       kmeans_potentials,
                       kmeans_closest,
                       kmeans_seed_workspace,
                       kmeans_seed,
                       sinkhorn_workspace,
                       sinkhorn_solve,
                       sinkhorn_column_mass,
                       sinkhorn_assign_workspace,
                       sinkhorn_assign,
                       soft_cross_entropy,
                       soft_cross_entropy_backward,
                       sinkhorn_matrix,
                       contrastive_rows,
                       contrastive_rows_backward,
                       weighted_sums,
                       weighted_gradient,
                       largest_label,
                       fingerprint,
                       count_members,
                       place_members,
                       sampler_order,
                       sampler_batches,
                       measure_fma, measure_matmul,
                       measure_exp,
                       measure_stream};

}  // namespace clustops::cpu::CLUSTOPS_ISA
