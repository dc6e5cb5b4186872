// Compiled once for each instruction set, as the kernels are: the table that dispatch.cpp chooses from.
#include "kernels.h"

namespace clustops::cpu::CLUSTOPS_ISA {

int64_t kmeans_assign_workspace(int64_t problems, int64_t clusters, int64_t features, DType dtype, int threads);
void kmeans_assign(const KMeansAssign& problem, int threads);
double measure_fma(double seconds, int threads);
double measure_exp(double seconds, int threads);
double measure_stream(int64_t bytes, double seconds, int threads);

extern const Kernels table;
const Kernels table = {kmeans_assign_workspace, kmeans_assign, measure_fma, measure_exp, measure_stream};

}  // namespace clustops::cpu::CLUSTOPS_ISA
