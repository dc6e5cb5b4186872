// Contrastive losses over classes, and their gradient.
//
// Rows are read once, then blocks of them are multiplied with each other. On the way forward the exponentials of a tile
// of scores go to the sums of its rows and of its columns. On the way back scores are computed again and become weights
// G, of which a block of rows takes G z and the other one G' z. Where no score can be large nothing is shifted, and an
// exponential serves both rows of a pair.
#include "contrastive_classes.h"
#include "contrastive_products.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Exponentials of scores up to this, their sums and inverses are far from the ends of fp32.
constexpr double kPlain = 40;
// Likewise the upstream gradients, inside and outside of which they are.
constexpr double kLeastUpstream = 1e-12, kGreatestUpstream = 1e12;

template <class T>
Blocks blocks_of(const Rows<T>& rows) {
  // Enough pairs for some threads, but a small problem is one block.
  const int64_t slots = rows.slots.slots;
  return Blocks(rows.slots, slots > kMaxBlock && slots <= 4 * kMaxBlock ? kMaxBlock / 2 : kMaxBlock);
}

template <class T>
bool is_plain(const Rows<T>& rows, const ContrastiveRows& a) {
  return rows.bound(a.normalize) / a.temperature <= kPlain;
}

// Sums or maxima of two blocks that meet: of the rows of one in lanes, of the columns, which are rows of the other.
template <class T>
struct Found {
  using V = Vector<T>;
  Numbers<T> numbers{kMaxBlock * (V::kWidth + 1)};
  Products<T> products;

  Found(const Rows<T>& rows, bool tiles) : products(rows, tiles, false) {}

  void fill(T value) { std::fill_n(numbers.data(), kMaxBlock * (V::kWidth + 1), value); }
  T* row(int64_t i) const { return numbers.data() + i * V::kWidth; }
  T* columns() const { return row(kMaxBlock); }
};

// The exponentials of all pairs of two blocks are added to the sums of rows. `most` is null, or the largest product of
// each row.
template <class T>
void add_exponentials(const Rows<T>& rows, const Block& one, const Block& other, T scale, const T* most,
                      Found<T>& found, double* sums) {
  using V = Vector<T>;
  const V factor = V::set1(scale);
  found.fill(0);
  const auto over = [&](auto shifted) CLUSTOPS_INLINE {
    found.products.over(rows, one, other, [&](int64_t row, int64_t column, const Tile<T>& tile, bool both) CLUSTOPS_INLINE {
      V columns[2] = {V::set1(0), V::set1(0)};
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i) {
        T* sum = found.row(row - one.first + i);
        V total = V::load(sum);
        for (int j = 0; j < 2; ++j) {
          if constexpr (decltype(shifted)::value) {
            total = total + exp2((tile[i][j] - V::set1(most[row + i])) * factor);
            if (both) columns[j] = columns[j] + exp2((tile[i][j] - V::load(most + column + j * V::kWidth)) * factor);
          } else {
            const V e = exp2(tile[i][j] * factor);
            total = total + e;
            columns[j] = columns[j] + e;
          }
        }
        store(total, sum);
      }
      T* sum = found.columns() + column - other.first;
      for (int j = 0; j < 2 && both; ++j) store(V::load(sum + j * V::kWidth) + columns[j], sum + j * V::kWidth);
    });
  };
  most ? over(std::true_type()) : over(std::false_type());
  for (int64_t i = 0; i < one.rows - one.first; ++i) sums[one.first + i] += reduce_add(V::load(found.row(i)));
  if (!other.anchors) return;
  for (int64_t i = 0; i < other.rows - other.first; ++i) sums[other.first + i] += found.columns()[i];
}

// The largest product of each row.
template <class T>
void find_largest(const Rows<T>& rows, const Block& one, const Block& other, Found<T>& found, T* most) {
  using V = Vector<T>;
  found.fill(-kInfinity<T>);
  found.products.over(rows, one, other, [&](int64_t row, int64_t column, const Tile<T>& tile, bool both) CLUSTOPS_INLINE {
    T* columns = found.columns() + column - other.first;
    for (int i = 0; i < kGroup; ++i) {
      T* largest = found.row(row - one.first + i);
      store(max(V::load(largest), max(tile[i][0], tile[i][1])), largest);
      for (int j = 0; j < 2 && both; ++j) {
        store(max(V::load(columns + j * V::kWidth), tile[i][j]), columns + j * V::kWidth);
      }
    }
  });
  for (int64_t i = 0; i < one.rows - one.first; ++i) {
    most[one.first + i] = std::max(most[one.first + i], reduce_max(V::load(found.row(i))));
  }
  if (!other.anchors) return;
  for (int64_t i = 0; i < other.rows - other.first; ++i) {
    most[other.first + i] = std::max(most[other.first + i], found.columns()[i]);
  }
}

// log-sum-exp of the scores of each anchor, the lowest finite number where there are none.
template <class T>
void log_partition(const ContrastiveForward& problem, const Rows<T>& rows, int threads) {
  const ContrastiveRows& a = problem.rows;
  const Blocks blocks = blocks_of(rows);
  std::vector<Found<T>> found;
  for (int t = 0; t < threads; ++t) found.emplace_back(rows, is_plain(rows, a));
  std::vector<double> sums(rows.slots.slots, 0.0);
  std::vector<T> most;
  const T lowest = std::numeric_limits<T>::lowest();
  if (!is_plain(rows, a)) {
    most.assign(rows.slots.slots, lowest);
    over_pairs(blocks, threads, [&](const Block& one, const Block& other, int thread) {
      find_largest(rows, one, other, found[thread], most.data());
    });
  }
  const T scale = static_cast<T>(kLog2E / a.temperature);
  over_pairs(blocks, threads, [&](const Block& one, const Block& other, int thread) {
    add_exponentials(rows, one, other, scale, most.empty() ? nullptr : most.data(), found[thread], sums.data());
  });
  T* lse = static_cast<T*>(problem.lse);
  for (int64_t slot = 0; slot < rows.slots.anchors; ++slot) {
    const T shift = most.empty() ? T(0) : most[slot] / static_cast<T>(a.temperature);
    lse[slot] = sums[slot] == 0 ? lowest : static_cast<T>(std::log(sums[slot]) + static_cast<double>(shift));
  }
}

// The losses of the anchors of a class, from their log-sum-exp.
template <class T>
void losses_of_class(const ContrastiveForward& problem, const Positives<T>& p, int64_t c, int thread) {
  const ContrastiveRows& a = p.a;
  const double* pull = p.pull(thread);
  p.template over_anchors<false>(c, thread, [&](int64_t i, int64_t slot) {
    const VecD own = VecD::set1(-p.classes.own[i]);
    const double weight = static_cast<const T*>(problem.weight)[i - a.first];
    for (int64_t v = 0; v < a.views; ++v) {
      VecD dot = VecD::set1(0);
      over_features(p.rows, slot + v, [&](int64_t d, VecD z) CLUSTOPS_INLINE {
        dot = fma(z, fma(own, z, VecD::load(pull + d)), dot);
      });
      // Slots of anchors are numbered as their losses are.
      const double loss = static_cast<const T*>(problem.lse)[slot + v] - reduce_add(dot) / (a.temperature * weight);
      static_cast<T*>(problem.loss)[slot + v] = weight > 0 ? static_cast<T>(loss) : T(0);
    }
  });
}

template <class T>
void forward(const ContrastiveForward& problem, int threads) {
  const ContrastiveRows& a = problem.rows;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const Rows<T> rows(a, threads);
  const Classes classes(problem.classes, a.samples, a.views);
  for (int64_t i = 0; i < a.count; ++i) {
    static_cast<T*>(problem.weight)[i] = static_cast<T>(classes.weight(a.first + i, a.views));
  }
  const bool good = rows.finite && classes.good;
  static_cast<T*>(problem.norms)[0] = good ? static_cast<T>(rows.least) : nan;
  static_cast<T*>(problem.norms)[1] = good ? static_cast<T>(rows.greatest) : nan;
  if (!good) {
    std::fill_n(static_cast<T*>(problem.loss), rows.slots.anchors, nan);
    std::fill_n(static_cast<T*>(problem.lse), rows.slots.anchors, nan);
    return;
  }
  log_partition(problem, rows, threads);
  const Positives<T> positives(a, rows, classes, nullptr, threads);
  over_classes(classes, threads, [&](int64_t c, int thread) { losses_of_class(problem, positives, c, thread); });
}

// Upstream gradients of rows that have a positive, and what becomes of them.
template <class T>
struct Upstream {
  std::vector<double> share;  // [slots] of the positives
  Numbers<T> factor;          // [slots] g exp(-lse) where scores are plain, else g
  Numbers<T> lse;             // [slots], infinity where there is no g
  bool plain;

  Upstream(const ContrastiveBackward& problem, const Rows<T>& rows, const Classes& classes);
};

template <class T>
Upstream<T>::Upstream(const ContrastiveBackward& problem, const Rows<T>& rows, const Classes& classes)
    : share(rows.slots.slots, 0.0), factor(rows.slots.slots), lse(rows.slots.slots), plain(is_plain(rows, problem.rows)) {
  const ContrastiveRows& a = problem.rows;
  std::vector<double> upstream(rows.slots.slots, 0.0);
  for (int64_t i = 0; i < a.samples; ++i) {
    const double weight = static_cast<T>(classes.weight(i, a.views));
    if (!(weight > 0)) continue;
    for (int64_t v = 0; v < a.views; ++v) {
      const int64_t slot = rows.slots.slot_of(i * a.views + v);
      const double g = static_cast<const T*>(
          problem.upstream)[i * problem.upstream_sample_stride + v * problem.upstream_view_stride];
      upstream[slot] = g;
      share[slot] = g / weight;
      const double size = std::fabs(g);
      plain = plain && (size == 0 || (size >= kLeastUpstream && size <= kGreatestUpstream));
    }
  }
  for (int64_t slot = 0; slot < rows.slots.slots; ++slot) {
    const double g = upstream[slot];
    lse[slot] = g == 0 ? kInfinity<T> : static_cast<const T*>(problem.lse)[rows.slots.row_of(slot)];
    factor[slot] = static_cast<T>(plain && g != 0 ? g * std::exp(-static_cast<double>(lse[slot])) : g);
  }
}

// Weights G of a block of rows and columns.
template <class T>
struct Weights {
  static constexpr int64_t kStride = Products<T>::kStride;
  Numbers<T> numbers{kMaxBlock * kStride};
  Products<T> products;

  Weights(const Rows<T>& rows, bool tiles) : products(rows, tiles, true) {}
};

template <class T>
void find_weights(const Rows<T>& rows, const Block& one, const Block& other, const Upstream<T>& upstream,
                  double temperature, const Weights<T>& weights) {
  using V = Vector<T>;
  const T *g = upstream.factor.data(), *l = upstream.lse.data();
  const auto over = [&](auto weight) CLUSTOPS_INLINE {
    weights.products.over(rows, one, other, [&](int64_t row, int64_t column, const Tile<T>& tile, bool) CLUSTOPS_INLINE {
      T* out = weights.numbers.data() + (row - one.first) * Weights<T>::kStride + column - other.first;
      for (int i = 0; i < kGroup; ++i) {
        for (int j = 0; j < 2; ++j) {
          store(weight(tile[i][j], row + i, column + j * V::kWidth), out + i * Weights<T>::kStride + j * V::kWidth);
        }
      }
    });
  };
  if (upstream.plain) {
    const V factor = V::set1(static_cast<T>(kLog2E / temperature));
    over([&](V s, int64_t row, int64_t column) CLUSTOPS_INLINE {
      return exp2(s * factor) * (V::set1(g[row]) + V::load(g + column));
    });
  } else {
    // A score rounded as the largest was for log-sum-exp: of the difference of the two nothing is left then.
    const V divisor = V::set1(static_cast<T>(temperature)), to_base_2 = V::set1(static_cast<T>(kLog2E));
    over([&](V s, int64_t row, int64_t column) CLUSTOPS_INLINE {
      const V score = s / divisor;
      return fma(V::set1(g[row]), exp2((score - V::set1(l[row])) * to_base_2),
                 V::load(g + column) * exp2((score - V::load(l + column)) * to_base_2));
    });
  }
}

template <class S, class T>
void write_row(const T* x, int64_t width, S* out) {
  constexpr int kWidth = Vector<T>::kWidth;
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) write(Vector<T>::load(x + d), out + d);
  if (d < width) write_first(Vector<T>::load(x + d), out + d, width - d);
}

// The gradient of the anchors of a class. `repulsion` is sum_b G z_b; `row` is room for one.
template <class T>
void gradients_of_class(const ContrastiveBackward& problem, const Positives<T>& p, const Upstream<T>& upstream,
                        const T* repulsion, T* row, int64_t c, int thread) {
  const ContrastiveRows& a = p.a;
  const Rows<T>& rows = p.rows;
  const double *pull = p.pull(thread), *push = p.push(thread);
  p.template over_anchors<true>(c, thread, [&](int64_t i, int64_t slot) {
    for (const int64_t end = slot + a.views; slot < end; ++slot) {
      const double r = upstream.share[slot];
      const VecD share = VecD::set1(r), twice = VecD::set1(-2 * p.classes.own[i] * r);
      const VecD scale = VecD::set1(1 / a.temperature);
      VecD dot = VecD::set1(0);
      over_features(rows, slot, [&](int64_t d, VecD z) CLUSTOPS_INLINE {
        const T* repelled = repulsion + (rows.chunk(d / kSide<T>, slot) - rows.z.data()) + d % kSide<T>;
        const VecD attraction = fma(share, VecD::load(pull + d), fma(twice, z, VecD::load(push + d)));
        const VecD x = (load_wide(repelled) - attraction) * scale;
        dot = fma(x, z, dot);
        store(x, row + d);
      });
      if (a.normalize) {
        const VecD along = VecD::set1(-reduce_add(dot)), inverse = VecD::set1(rows.inverse[slot]);
        over_features(rows, slot, [&](int64_t d, VecD z) CLUSTOPS_INLINE {
          store(fma(along, z, load_wide(row + d)) * inverse, row + d);
        });
      }
      char* out = static_cast<char*>(problem.gradient) + slot * a.width * element_size(a.dtype);
      with_elements<T>(a.dtype, out, [&](auto* to) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(to)>>;
        write_row<S, T>(row, a.width, const_cast<S*>(to));
      });
    }
  });
}

template <class T>
void backward(const ContrastiveBackward& problem, int threads) {
  const ContrastiveRows& a = problem.rows;
  const Rows<T> rows(a, threads);
  const Classes classes(problem.classes, a.samples, a.views);
  const Upstream<T> upstream(problem, rows, classes);
  const Numbers<T> repulsion(rows.slots.slots * rows.chunks * kSide<T>);
  std::fill_n(repulsion.data(), rows.slots.slots * rows.chunks * kSide<T>, T(0));
  std::vector<Weights<T>> weights;
  for (int t = 0; t < threads; ++t) weights.emplace_back(rows, is_plain(rows, a));
  over_pairs(blocks_of(rows), threads, [&](const Block& one, const Block& other, int thread) {
    find_weights(rows, one, other, upstream, a.temperature, weights[thread]);
    weights[thread].products.add(rows, one, other, weights[thread].numbers.data(), repulsion.data());
  });
  const Numbers<T> results(threads * rows.chunks * kSide<T>);
  const Positives<T> positives(a, rows, classes, upstream.share.data(), threads);
  over_classes(classes, threads, [&](int64_t c, int thread) {
    T* row = results.data() + thread * rows.chunks * kSide<T>;
    gradients_of_class(problem, positives, upstream, repulsion.data(), row, c, thread);
  });
}

}  // namespace

void contrastive_rows(const ContrastiveForward& a, int threads) {
  (a.rows.dtype == DType::f64 ? forward<double> : forward<float>)(a, threads);
}

void contrastive_rows_backward(const ContrastiveBackward& a, int threads) {
  (a.rows.dtype == DType::f64 ? backward<double> : backward<float>)(a, threads);
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
