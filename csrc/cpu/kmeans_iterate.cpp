// Whole iterations of k-means, one entry after the other: its rows stay in a cache from one iteration to the next.
// The kernels are those of single iterations, and so are the bits.
#include "../common/kmeans_iterate.h"

#include <algorithm>
#include <vector>

#include "../common/kmeans_split.h"
#include "../common/parallel.h"
#include "../common/philox.h"
#include "kernels.h"
#include "kmeans_rows.h"

namespace clustops::cpu::CLUSTOPS_ISA {

int64_t kmeans_assign_workspace(int64_t problems, int64_t clusters, int64_t features, DType dtype, int threads);
void kmeans_assign(const KMeansAssign& problem, int threads);
void kmeans_sums(const KMeansSums& problem, int threads);
void kmeans_means(const KMeansMeans& problem, int threads);

namespace {

class Entry {
 public:
  Entry(const KMeansIterate& a, int64_t e, float* workspace)
      : a_(a),
        e_(e),
        b_(e / (a.entries / a.rows.problems)),
        k_(a.clusters),
        d_(a.rows.features),
        rows_(a.rows),
        workspace_(workspace),
        now_(a.centroids + e * k_ * d_, a.centroids + (e + 1) * k_ * d_),
        next_(k_ * d_),
        distances_(a.rows.rows),
        labels_(a.rows.rows),
        summed_(a.rows.rows),
        counts_(k_),
        sums_(2 * k_ * (d_ + 1)),
        partial_(kmeans_means_blocks(k_ * d_)) {
    rows_.problems = 1;
    rows_.x = static_cast<const char*>(a.rows.x) + b_ * a.rows.problem_stride * (is_half(a.rows.dtype) ? 2 : 4);
    rows_.weights = a.rows.weights + b_ * a.rows.weight_problem_stride;
  }

  void run() {
    int64_t repaired = 0;
    bool still = false;
    for (int64_t i = 0; i < a_.iterations; ++i) {
      assign();
      sum(i == 0);
      average();
      const int64_t splits = a_.split && std::count(counts_.begin(), counts_.end(), 0) > 0 ? split(i) : 0;
      repaired += splits;
      still = next_ == now_;
      std::swap(now_, next_);
      if (still && splits == 0) break;  // what is left would repeat this iteration
    }
    std::copy(now_.begin(), now_.end(), a_.result + e_ * k_ * d_);
    std::copy(summed_.begin(), summed_.end(), a_.labels + e_ * a_.rows.rows);
    a_.repaired[e_] = repaired;
    a_.still[e_] = still;
  }

 private:
  void assign() {
    const KMeansRows& r = rows_;
    kmeans_assign({r.x, now_.data(), labels_.data(), distances_.data(), workspace_, 1, r.rows, k_, d_, 0, r.row_stride,
                   r.dtype},
                  1);
  }

  // Sums of the new labels, from those of the old ones after the first time.
  void sum(bool first) {
    const int64_t* before = first ? nullptr : summed_.data();
    kmeans_sums({rows_, labels_.data(), before, a_.grid + b_ * 2 * (d_ + 1), sums_.data(), counts_.data(), k_}, 1);
    std::swap(labels_, summed_);
  }

  void average() {
    double shift;
    kmeans_means({sums_.data(), now_.data(), next_.data(), &shift, partial_.data(), 1, k_, d_, DType::f32}, 1);
  }

  // Empty clusters split off others, as reference/kmeans_split.py has it; how many.
  int64_t split(int64_t iteration) {
    std::vector<int64_t> farthest(k_, -1), tickets(k_), child(k_, k_);
    for (int64_t n = 0; n < rows_.rows; ++n) {
      int64_t& at = farthest[summed_[n]];
      if (rows_.weight(0, n) > 0 && (at < 0 || distances_[n] > distances_[at])) at = n;
    }
    std::vector<float> wide(d_);
    int64_t total = 0;
    for (int64_t k = 0; k < k_; ++k) {
      if (counts_[k] > 1) {
        const float* row = row_as<float>(rows_, 0, farthest[k], 0, d_, wide.data());
        if (!std::equal(row, row + d_, mean(k))) total += counts_[k] - 1;
      }
      tickets[k] = total;
    }
    if (total == 0) return 0;
    const uint64_t stream = split_stream(e_ % (a_.entries / a_.rows.problems), iteration);
    for (int64_t k = k_ - 1; k >= 0; --k) {
      if (counts_[k] != 0) continue;
      const double drawn = philox_uniform(a_.seed, stream, static_cast<uint64_t>(k)) * static_cast<double>(total);
      const int64_t target = std::min(static_cast<int64_t>(drawn), total - 1);
      child[std::upper_bound(tickets.begin(), tickets.end(), target) - tickets.begin()] = k;
    }
    int64_t splits = 0;
    for (int64_t donor = 0; donor < k_; ++donor) {
      if (child[donor] == k_) continue;
      move_apart(mean(donor), mean(child[donor]), row_as<float>(rows_, 0, farthest[donor], 0, d_, wide.data()));
      ++splits;
    }
    return splits;
  }

  // Donor and child on either side of the donor's mean, towards its farthest row and away from it.
  void move_apart(float* donor, float* child, const float* row) const {
    bool apart = false;
    for (int64_t d = 0; d < d_; ++d) {
      const float step = kSplitStep * (row[d] - donor[d]);
      apart |= donor[d] + step != donor[d] - step;
    }
    for (int64_t d = 0; d < d_; ++d) {
      const float way = row[d] - donor[d], m = donor[d];
      child[d] = apart ? m + kSplitStep * way : m + way;  // the whole way where the step is lost in rounding
      donor[d] = apart ? m - kSplitStep * way : m;
    }
  }

  float* mean(int64_t k) { return next_.data() + k * d_; }

  const KMeansIterate& a_;
  const int64_t e_, b_, k_, d_;
  KMeansRows rows_;  // of this entry's problem alone
  float* const workspace_;
  std::vector<float> now_, next_, distances_;
  std::vector<int64_t> labels_, summed_, counts_;
  std::vector<double> sums_, partial_;
};

}  // namespace

void kmeans_iterate(const KMeansIterate& a, int threads) {
  const int64_t size = kmeans_assign_workspace(1, a.clusters, a.rows.features, a.rows.dtype, 1);
  const int64_t stride = (size + 15) / 16 * 16;
  std::vector<float> workspace(threads * stride + 16);
  float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
  parallel_for(a.entries, threads, [&](int64_t e, int thread) { Entry(a, e, aligned + thread * stride).run(); });
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
