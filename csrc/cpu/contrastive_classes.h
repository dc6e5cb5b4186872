// What pulls rows together. Weights are separable, w = q_i q_j within a class and o_i between the views of a sample, so
// sums over classes replace the pairs.
#pragma once

#include <algorithm>

#include "contrastive_rows.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

struct Classes {
  std::vector<double> q, own;     // of each sample
  std::vector<double> total;      // sum of q over the rows of its class
  std::vector<int64_t> order;     // samples, class by class; one without a class is alone
  std::vector<int64_t> begin;     // of each class in that order, and the end
  bool good = true;               // whether confidences are in [0, 1]

  Classes(const ContrastiveClasses& a, int64_t samples, int64_t views);

  double weight(int64_t i, int64_t views) const { return q[i] * (total[i] - q[i] * views) + own[i] * (views - 1); }

 private:
  void read_confidence(const ContrastiveClasses& a, int64_t samples);
};

// Numbers of any dtype as double.
inline void widen(DType dtype, const void* from, int64_t n, double* to) {
  if (dtype == DType::f64) {
    std::copy_n(static_cast<const double*>(from), n, to);
    return;
  }
  with_elements<float>(dtype, from, [&](auto* p) {
    float lanes[Vec::kWidth];
    for (int64_t i = 0; i < n; i += Vec::kWidth) {
      const int64_t count = std::min<int64_t>(n - i, Vec::kWidth);
      read_first(p + i, count).store(lanes);
      std::copy_n(lanes, count, to + i);
    }
  });
}

// As a number of that dtype.
inline double rounded_to(DType dtype, double value) {
  if (dtype == DType::f64) return value;
  const Vec x = Vec::set1(static_cast<float>(value));
  uint16_t bits[Vec::kWidth];
  float lanes[Vec::kWidth];
  x.store(lanes);
  if (dtype == DType::bf16) narrow_bf16(x, bits), widen_bf16(bits).store(lanes);
  if (dtype == DType::f16) narrow_f16(x, bits), widen_f16(bits).store(lanes);
  return lanes[0];
}

inline void Classes::read_confidence(const ContrastiveClasses& a, int64_t samples) {
  if (a.confidence) widen(a.confidence_dtype, a.confidence, samples, q.data());
  const double threshold = rounded_to(a.confidence_dtype, a.threshold);
  for (int64_t i = 0; i < samples; ++i) {
    const double p = q[i];
    good = good && p >= 0 && p <= 1;
    if (a.own_confidence && a.reweight) own[i] = p * p;
    const bool in_class = a.labels && a.labels[i] >= 0 && p >= threshold;
    q[i] = !in_class ? 0 : a.reweight ? p : 1;
  }
}

inline Classes::Classes(const ContrastiveClasses& a, int64_t samples, int64_t views)
    : q(samples, 1.0), own(samples, 1.0), total(samples, 0.0) {
  read_confidence(a, samples);
  struct Member {
    int64_t label, sample;
  };
  std::vector<Member> members;
  for (int64_t i = 0; i < samples; ++i) {
    if (!(q[i] > 0)) begin.push_back(static_cast<int64_t>(order.size())), order.push_back(i);
  }
  for (int64_t i = 0; i < samples; ++i) {
    if (q[i] > 0) members.push_back({a.labels[i], i});
  }
  std::sort(members.begin(), members.end(), [](const Member& x, const Member& y) {
    return x.label != y.label ? x.label < y.label : x.sample < y.sample;
  });
  for (std::size_t first = 0, last; first < members.size(); first = last) {
    double sum = 0;
    begin.push_back(static_cast<int64_t>(order.size()));
    for (last = first; last < members.size() && members[last].label == members[first].label; ++last) {
      sum += q[members[last].sample] * static_cast<double>(views);
      order.push_back(members[last].sample);
    }
    for (std::size_t i = first; i < last; ++i) total[members[i].sample] = sum;
  }
  begin.push_back(samples);
}

// Classes in units of work of at least this many samples.
constexpr int64_t kUnit = 64;

// work(class, thread) for each class.
template <class Work>
void over_classes(const Classes& classes, int threads, const Work& work) {
  std::vector<int64_t> units{0};
  const int64_t end = static_cast<int64_t>(classes.begin.size()) - 1;
  for (int64_t c = 1; c <= end; ++c) {
    if (c == end || classes.begin[c] - classes.begin[units.back()] >= kUnit) units.push_back(c);
  }
  parallel_for(static_cast<int64_t>(units.size()) - 1, threads, [&](int64_t u, int thread) {
    for (int64_t c = units[u]; c < units[u + 1]; ++c) work(c, thread);
  });
}

// step(feature, z) for each vector of a row.
template <class T, class Step>
CLUSTOPS_INLINE inline void over_features(const Rows<T>& rows, int64_t slot, const Step& step) {
  for (int64_t c = 0; c < rows.chunks; ++c) {
    const T* z = rows.chunk(c, slot);
    for (int64_t k = 0; k < kSide<T>; k += VecD::kWidth) step(c * kSide<T> + k, load_wide(z + k));
  }
}

// step(feature, sum, weighted) with the sums of z and of share z over the views of a sample, the first in `slot`.
template <bool kWeighted, class T, class Step>
CLUSTOPS_INLINE inline void over_sums(const Rows<T>& rows, int64_t slot, int64_t views, const double* share,
                                      const Step& step) {
  for (int64_t c = 0; c < rows.chunks; ++c) {
    for (int64_t k = 0; k < kSide<T>; k += VecD::kWidth) {
      const T* z = rows.chunk(c, slot) + k;
      VecD sum = load_wide(z), weighted = kWeighted ? sum * VecD::set1(share[0]) : sum;
      for (int64_t v = 1; v < views; ++v) {
        const VecD x = load_wide(z + v * kSide<T>);
        sum = sum + x;
        if (kWeighted) weighted = fma(x, VecD::set1(share[v]), weighted);
      }
      step(c * kSide<T> + k, sum, weighted);
    }
  }
}

// What pulls at the rows of a class, in fp64: sums over it, and for a sample, without the row itself,
//   pull = q (sum - q own) + o own,  push likewise of rows times their share.
template <class T>
class Positives {
 public:
  Positives(const ContrastiveRows& a, const Rows<T>& rows, const Classes& classes, const double* share, int threads)
      : a(a),
        rows(rows),
        classes(classes),
        wide_(rows.chunks * kSide<T>),
        share_(share),
        sums_(threads * 4 * wide_) {}

  // work(sample, slot of its first row) for each sample of a class that is an anchor, with pull of it, and push if asked.
  template <bool kPush, class Work>
  void over_anchors(int64_t c, int thread, const Work& work) const;

  double* pull(int thread) const { return sums_.data() + thread * 4 * wide_; }
  double* push(int thread) const { return pull(thread) + wide_; }

  const ContrastiveRows& a;
  const Rows<T>& rows;
  const Classes& classes;

 private:
  const int64_t wide_;         // features, filled up
  const double* const share_;  // [slots], null where there is no push
  const Numbers<double> sums_;
};

template <class T>
template <bool kPush, class Work>
void Positives<T>::over_anchors(int64_t c, int thread, const Work& work) const {
  double *pulls = pull(thread), *pushes = push(thread), *sum = pushes + wide_, *shared = sum + wide_;
  std::fill_n(sum, 2 * wide_, 0.0);
  const int64_t begin = classes.begin[c], end = classes.begin[c + 1];
  for (int64_t m = begin; m < end && end - begin > 1; ++m) {
    const int64_t i = classes.order[m], slot = rows.slots.slot_of(i * a.views);
    const VecD q = VecD::set1(classes.q[i]);
    over_sums<kPush>(rows, slot, a.views, kPush ? share_ + slot : nullptr, [&](int64_t d, VecD own, VecD weighted) CLUSTOPS_INLINE {
      store(fma(q, own, VecD::load(sum + d)), sum + d);
      if (kPush) store(fma(q, weighted, VecD::load(shared + d)), shared + d);
    });
  }
  for (int64_t m = begin; m < end; ++m) {
    const int64_t i = classes.order[m], slot = rows.slots.slot_of(i * a.views);
    if (i < a.first || i >= a.first + a.count) continue;
    const VecD q = VecD::set1(end - begin > 1 ? classes.q[i] : 0), o = VecD::set1(classes.own[i]);
    over_sums<kPush>(rows, slot, a.views, kPush ? share_ + slot : nullptr, [&](int64_t d, VecD own, VecD weighted) CLUSTOPS_INLINE {
      store(fma(o, own, q * (VecD::load(sum + d) - q * own)), pulls + d);
      if (kPush) store(fma(o, weighted, q * (VecD::load(shared + d) - q * weighted)), pushes + d);
    });
    work(i, slot);
  }
}

}  // namespace
}  // namespace clustops::cpu::CLUSTOPS_ISA
