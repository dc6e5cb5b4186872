// Every CPU kernel, once for each instruction set it is compiled for.
#pragma once

#include <string>
#include <vector>

#include "../common/contrastive.h"
#include "../common/contrastive_weighted.h"
#include "../common/kmeans.h"
#include "../common/kmeans_iterate.h"
#include "../common/kmeans_seeding.h"
#include "../common/kmeans_update.h"
#include "../common/sampler.h"
#include "../common/sinkhorn.h"
#include "../common/sinkhorn_loss.h"
#include "../common/sinkhorn_matrix.h"

namespace clustops::cpu {

struct Kernels {
  int64_t (*kmeans_assign_workspace)(int64_t problems, int64_t clusters, int64_t features, DType dtype, int threads);
  void (*kmeans_assign)(const KMeansAssign& problem, int threads);
  void (*kmeans_nearest)(const KMeansAssign& problem, int64_t top, int threads);
  void (*kmeans_iterate)(const KMeansIterate& problem, int threads);
  void (*kmeans_bounds)(const KMeansBounds& problem, int threads);
  void (*kmeans_sums)(const KMeansSums& problem, int threads);
  void (*kmeans_means)(const KMeansMeans& problem, int threads);
  void (*kmeans_counts)(const KMeansCounts& problem, int threads);
  void (*kmeans_draws)(const KMeansDraws& problem, int threads);
  void (*kmeans_potentials)(const KMeansPotentials& problem, int threads);
  void (*kmeans_closest)(const KMeansClosest& problem, int threads);
  int64_t (*kmeans_seed_workspace)(const KMeansRows& rows, int64_t entries, int64_t clusters, int64_t trials,
                                   int threads);  // of int64
  void (*kmeans_seed)(const KMeansSeed& problem, int threads);

  int64_t (*sinkhorn_workspace)(const SinkhornRows& rows, int threads);  // of float64
  void (*sinkhorn_solve)(const SinkhornSolve& problem, int threads);
  void (*sinkhorn_column_mass)(const SinkhornMass& problem, int threads);
  int64_t (*sinkhorn_assign_workspace)(const SinkhornRows& rows, int threads);  // of float64
  void (*sinkhorn_assign)(const SinkhornAssign& problem, int threads);
  void (*soft_cross_entropy)(const SoftCrossEntropy& problem, int threads);
  void (*soft_cross_entropy_backward)(const SoftCrossEntropyBackward& problem, int threads);
  void (*sinkhorn_matrix)(const SinkhornMatrix& problem, int threads);

  void (*contrastive_rows)(const ContrastiveForward& problem, int threads);
  void (*contrastive_rows_backward)(const ContrastiveBackward& problem, int threads);
  void (*weighted_sums)(const WeightedSums& problem, int threads);
  void (*weighted_gradient)(const WeightedGradient& problem, int threads);

  int64_t (*largest_label)(const Labels& labels, int threads);  // -1 where there is none
  int64_t (*fingerprint)(const Labels& numbers, int threads);   // contiguous
  void (*count_members)(const ClusterMembers& problem, int threads);
  void (*place_members)(const ClusterMembers& problem, int threads);
  void (*sampler_order)(const SamplerOrder& problem, int threads);
  void (*sampler_batches)(const SamplerBatches& problem, int threads);

  // Ceilings of this machine, against which benchmarks hold a kernel.
  double (*measure_fma)(double seconds, int threads);                    // GFLOP/s
  double (*measure_matmul)(double seconds, int threads);                 // GFLOP/s of bf16 tiles, 0 without them
  double (*measure_exp)(double seconds, int threads);                    // 1e9 exponentials a second
  double (*measure_stream)(int64_t bytes, double seconds, int threads);  // GB/s, read plus written
};

const Kernels& kernels();
std::string instruction_set();
std::vector<std::string> instruction_sets();  // those that this CPU can run, the best first
void use_instruction_set(const std::string& name);

}  // namespace clustops::cpu
