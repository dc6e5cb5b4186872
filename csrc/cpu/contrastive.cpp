// Contrastive losses over classes, and their gradient.
//
// Rows are read once, then blocks of them are multiplied with each other. On the way forward the exponentials of a tile
// of scores go to the sums of its rows and of its columns. On the way back scores are computed again and become weights
// G, of which a block of rows takes G z and the other one G' z. Where no score can be large nothing is shifted, and an
// exponential serves both rows of a pair.
#include "contrastive_classes.h"
#include "contrastive_pairs.h"

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
  const int64_t size = rows.slots.slots > 4096 ? kMaxBlock : kMaxBlock / 2;
  return Blocks(rows.slots, rows.slots.slots <= kMaxBlock ? kMaxBlock : size);
}

template <class T>
bool is_plain(const Rows<T>& rows, const ContrastiveRows& a) {
  return rows.bound(a.normalize) / a.temperature <= kPlain;
}

// Sums or maxima of the rows of a block while it meets another one, still in lanes.
template <class T>
struct Lanes {
  Numbers<T> rows{kMaxBlock * Vector<T>::kWidth};

  T* row(int64_t i) const { return rows.data() + i * Vector<T>::kWidth; }
  void fill(T value) { std::fill_n(rows.data(), kMaxBlock * Vector<T>::kWidth, value); }
};

// The exponentials of all pairs of two blocks, on their way to the sums of rows. `most` is null, or the largest product
// of each row.
template <class T>
void add_exponentials(const Rows<T>& rows, const Block& one, const Block& other, T scale, const T* most,
                      Lanes<T>& lanes, double* sums) {
  using V = Vector<T>;
  const V factor = V::set1(scale);
  lanes.fill(0);
  const auto step = [&](int64_t row, int64_t column, const Tile<T>& tile, bool both, auto shifted) CLUSTOPS_INLINE {
    V columns[2] = {V::set1(0), V::set1(0)};
    for (int i = 0; i < kGroup; ++i) {
      T* sum = lanes.row(row - one.first + i);
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
    if (!both) return;
    for (int j = 0; j < 2; ++j) {
      T part[V::kWidth];
      store(columns[j], part);
      for (int k = 0; k < V::kWidth; ++k) sums[column + j * V::kWidth + k] += part[k];
    }
  };
  if (most) {
    over_tiles(rows, one, other, [&](int64_t row, int64_t column, const Tile<T>& tile, bool both) CLUSTOPS_INLINE {
      step(row, column, tile, both, std::true_type());
    });
  } else {
    over_tiles(rows, one, other, [&](int64_t row, int64_t column, const Tile<T>& tile, bool both) CLUSTOPS_INLINE {
      step(row, column, tile, both, std::false_type());
    });
  }
  for (int64_t row = one.first; row < one.rows; ++row) sums[row] += reduce_add(V::load(lanes.row(row - one.first)));
}

// The largest product of each row.
template <class T>
void find_largest(const Rows<T>& rows, const Block& one, const Block& other, Lanes<T>& lanes, T* most) {
  using V = Vector<T>;
  lanes.fill(-kInfinity<T>);
  over_tiles(rows, one, other, [&](int64_t row, int64_t column, const Tile<T>& tile, bool both) CLUSTOPS_INLINE {
    V columns[2] = {V::set1(-kInfinity<T>), V::set1(-kInfinity<T>)};
    for (int i = 0; i < kGroup; ++i) {
      T* largest = lanes.row(row - one.first + i);
      store(max(V::load(largest), max(tile[i][0], tile[i][1])), largest);
      for (int j = 0; j < 2; ++j) columns[j] = max(columns[j], tile[i][j]);
    }
    if (!both) return;
    for (int j = 0; j < 2; ++j) {
      T* largest = most + column + j * V::kWidth;
      store(max(V::load(largest), columns[j]), largest);
    }
  });
  for (int64_t row = one.first; row < one.rows; ++row) {
    most[row] = std::max(most[row], reduce_max(V::load(lanes.row(row - one.first))));
  }
}

// log-sum-exp of the scores of each anchor, the lowest finite number where there are none.
template <class T>
void log_partition(const ContrastiveForward& problem, const Rows<T>& rows, int threads) {
  const ContrastiveRows& a = problem.rows;
  const Blocks blocks = blocks_of(rows);
  std::vector<Lanes<T>> lanes(threads);
  std::vector<double> sums(rows.slots.slots, 0.0);
  std::vector<T> most;
  const T lowest = std::numeric_limits<T>::lowest();
  if (!is_plain(rows, a)) {
    most.assign(rows.slots.slots, lowest);
    over_pairs(blocks, threads, [&](const Block& one, const Block& other, int thread) {
      find_largest(rows, one, other, lanes[thread], most.data());
    });
  }
  const T scale = static_cast<T>(kLog2E / a.temperature);
  over_pairs(blocks, threads, [&](const Block& one, const Block& other, int thread) {
    add_exponentials(rows, one, other, scale, most.empty() ? nullptr : most.data(), lanes[thread], sums.data());
  });
  T* lse = static_cast<T*>(problem.lse);
  for (int64_t slot = 0; slot < rows.slots.anchors; ++slot) {
    const double shift = most.empty() ? 0.0 : static_cast<double>(most[slot]) / a.temperature;
    lse[slot] = sums[slot] == 0 ? lowest : static_cast<T>(std::log(sums[slot]) + shift);
  }
}

// q (sum - q own) + o own, which without the row itself is what pulls at a row of sample i.
inline void pull_of(const Classes& classes, int64_t i, int64_t members, int64_t wide, const double* sum,
                    const double* own, double* pull) {
  const VecD q = VecD::set1(members > 1 ? classes.q[i] : 0), o = VecD::set1(classes.own[i]), zero = VecD::set1(0);
  for (int64_t d = 0; d < wide; d += VecD::kWidth) {
    const VecD x = VecD::load(own + d);
    const VecD rest = members > 1 ? q * (VecD::load(sum + d) - q * x) : zero;
    store(fma(o, x, rest), pull + d);
  }
}

template <class T>
struct Positives {
  const ContrastiveRows& a;
  const Rows<T>& rows;
  const Classes& classes;
  Sums sums;  // for each thread so many as a sample needs

  static constexpr int kSums = 6;

  Positives(const ContrastiveRows& a, const Rows<T>& rows, const Classes& classes, int threads)
      : a(a), rows(rows), classes(classes), sums(threads * kSums, rows.chunks * kSide<T>) {}

  double* buffer(int thread, int i) const { return sums[thread * kSums + i]; }
  void clear(double* sum) const { std::fill_n(sum, sums.wide, 0.0); }
  int64_t slot(int64_t i, int64_t v) const { return rows.slots.slot_of(i * a.views + v); }
  bool is_anchor(int64_t i) const { return i >= a.first && i < a.first + a.count; }
};

// The losses of the anchors of a class, from their log-sum-exp.
template <class T>
void losses_of_class(const ContrastiveForward& problem, const Positives<T>& p, int64_t c, int thread) {
  const ContrastiveRows& a = p.a;
  const Classes& classes = p.classes;
  const int64_t begin = classes.begin[c], end = classes.begin[c + 1], members = end - begin;
  double *sum = p.buffer(thread, 0), *own = p.buffer(thread, 1), *pull = p.buffer(thread, 2);
  p.clear(sum);
  for (int64_t m = begin; m < end && members > 1; ++m) {
    const int64_t i = classes.order[m];
    for (int64_t v = 0; v < a.views; ++v) add_row(p.rows, p.slot(i, v), classes.q[i], sum);
  }
  for (int64_t m = begin; m < end; ++m) {
    const int64_t i = classes.order[m];
    if (!p.is_anchor(i)) continue;
    p.clear(own);
    for (int64_t v = 0; v < a.views; ++v) add_row(p.rows, p.slot(i, v), 1.0, own);
    pull_of(classes, i, members, p.sums.wide, sum, own, pull);
    const double weight = static_cast<const T*>(problem.weight)[i - a.first];
    for (int64_t v = 0; v < a.views; ++v) {
      const VecD o = VecD::set1(0 - classes.own[i]);
      VecD dot = VecD::set1(0);
      over_features(p.rows, p.slot(i, v), [&](int64_t d, VecD z) CLUSTOPS_INLINE {
        dot = fma(z, fma(o, z, VecD::load(pull + d)), dot);
      });
      const int64_t row = (i - a.first) * a.views + v;
      const double loss = static_cast<const T*>(problem.lse)[row] - reduce_add(dot) / (a.temperature * weight);
      static_cast<T*>(problem.loss)[row] = weight > 0 ? static_cast<T>(loss) : T(0);
    }
  }
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
  const Positives<T> positives(a, rows, classes, threads);
  over_classes(classes, threads, [&](int64_t c, int thread) { losses_of_class(problem, positives, c, thread); });
}

// Upstream gradients of rows that have a positive, and what becomes of them.
template <class T>
struct Upstream {
  std::vector<double> share;  // [slots] of the positives
  Numbers<T> factor;          // [slots] g exp(-lse) where scores are plain, else g
  Numbers<T> exponent;        // [slots] lse in units of ln 2
  bool plain;

  Upstream(const ContrastiveBackward& problem, const Rows<T>& rows, const Classes& classes);
};

template <class T>
Upstream<T>::Upstream(const ContrastiveBackward& problem, const Rows<T>& rows, const Classes& classes)
    : share(rows.slots.slots, 0.0), factor(rows.slots.slots), exponent(rows.slots.slots), plain(is_plain(rows, problem.rows)) {
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
    const double lse = g == 0 ? kInfinity<double> : static_cast<const T*>(problem.lse)[rows.slots.row_of(slot)];
    factor[slot] = static_cast<T>(plain && g != 0 ? g * std::exp(-lse) : g);
    exponent[slot] = static_cast<T>(lse * kLog2E);
  }
}

// Weights G of a block of rows and columns.
template <class T>
struct Weights {
  static constexpr int64_t kStride = kMaxBlock + kSide<T>;  // not a power of 2, or columns would share a set of a cache
  Numbers<T> numbers{kMaxBlock * kStride};
};

template <class T>
void find_weights(const Rows<T>& rows, const Block& one, const Block& other, const Upstream<T>& upstream, T scale,
                  T* weights) {
  using V = Vector<T>;
  const V factor = V::set1(scale);
  const T *g = upstream.factor.data(), *l = upstream.exponent.data();
  const auto over = [&](auto weight) CLUSTOPS_INLINE {
    over_tiles(rows, one, other, [&](int64_t row, int64_t column, const Tile<T>& tile, bool) CLUSTOPS_INLINE {
      T* out = weights + (row - one.first) * Weights<T>::kStride + column - other.first;
      for (int i = 0; i < kGroup; ++i) {
        for (int j = 0; j < 2; ++j) {
          store(weight(tile[i][j], row + i, column + j * V::kWidth), out + i * Weights<T>::kStride + j * V::kWidth);
        }
      }
    });
  };
  if (upstream.plain) {
    over([&](V s, int64_t row, int64_t column) CLUSTOPS_INLINE {
      return exp2(s * factor) * (V::set1(g[row]) + V::load(g + column));
    });
  } else {
    over([&](V s, int64_t row, int64_t column) CLUSTOPS_INLINE {
      const V zero = V::set1(0);
      return fma(V::set1(g[row]), exp2(fma(s, factor, zero - V::set1(l[row]))),
                 V::load(g + column) * exp2(fma(s, factor, zero - V::load(l + column))));
    });
  }
}

// out += product of a and b, for kGroup rows of a chunk.
template <int64_t kRow, int64_t kStep, class T>
CLUSTOPS_INLINE inline void add_product(const T* a, const T* b, int64_t steps, T* out) {
  using V = Vector<T>;
  Tile<T> tile;
  for (int i = 0; i < kGroup; ++i) {
    for (int j = 0; j < 2; ++j) tile[i][j] = V::load(out + i * kSide<T> + j * V::kWidth);
  }
  multiply<kRow, kStep>(a, b, steps, tile);
  for (int i = 0; i < kGroup; ++i) {
    for (int j = 0; j < 2; ++j) store(tile[i][j], out + i * kSide<T> + j * V::kWidth);
  }
}

// result += G z for the rows of one block, and G' z for those of the other.
template <class T>
void add_products(const Rows<T>& rows, const Block& one, const Block& other, const T* weights, T* result) {
  constexpr int64_t kStride = Weights<T>::kStride;
  const bool same = one.first == other.first;
  for (int64_t c = 0; c < rows.chunks; ++c) {
    T* out = result + c * rows.slots.slots * kSide<T>;
    for (int64_t row = one.first; row < one.computed(); row += kGroup) {
      const int64_t begin = same ? row / kSide<T> * kSide<T> : other.first;
      add_product<kStride, 1>(weights + (row - one.first) * kStride + begin - other.first, rows.chunk(c, begin),
                              other.end - begin, out + row * kSide<T>);
    }
    if (!other.anchors) continue;
    for (int64_t column = other.first; column < other.computed(); column += kGroup) {
      const int64_t end = same ? column / kSide<T> * kSide<T> : one.computed();
      add_product<1, kStride>(weights + column - other.first, rows.chunk(c, one.first), end - one.first,
                              out + column * kSide<T>);
    }
  }
}

template <class S, class T>
void write_row(const double* x, const double* factor_of, int64_t width, S* out) {
  static_cast<void>(factor_of);
  constexpr int kWidth = Vector<T>::kWidth;
  for (int64_t d = 0; d < width; d += kWidth) {
    T numbers[kWidth];
    const int64_t count = std::min<int64_t>(kWidth, width - d);
    for (int k = 0; k < kWidth; k += VecD::kWidth) store(VecD::load(x + d + k), numbers + k);
    count == kWidth ? write(Vector<T>::load(numbers), out + d) : write_first(Vector<T>::load(numbers), out + d, count);
  }
}

// The gradient of the anchors of a class. `repulsion` is sum_b G z_b.
template <class T>
void gradients_of_class(const ContrastiveBackward& problem, const Positives<T>& p, const Upstream<T>& upstream,
                        const T* repulsion, int64_t c, int thread) {
  const ContrastiveRows& a = p.a;
  const Classes& classes = p.classes;
  const int64_t begin = classes.begin[c], end = classes.begin[c + 1], members = end - begin, wide = p.sums.wide;
  double *sum = p.buffer(thread, 0), *shared = p.buffer(thread, 1), *own = p.buffer(thread, 2);
  double *pull = p.buffer(thread, 3), *push = p.buffer(thread, 4), *dz = p.buffer(thread, 5);
  const auto add_rows_of = [&](int64_t i, double factor, double* plain, double* weighted) {
    for (int64_t v = 0; v < a.views; ++v) {
      add_row(p.rows, p.slot(i, v), factor, plain);
      add_row(p.rows, p.slot(i, v), factor * upstream.share[p.slot(i, v)], weighted);
    }
  };
  p.clear(sum), p.clear(shared);
  for (int64_t m = begin; m < end && members > 1; ++m) {
    add_rows_of(classes.order[m], classes.q[classes.order[m]], sum, shared);
  }
  for (int64_t m = begin; m < end; ++m) {
    const int64_t i = classes.order[m];
    if (!p.is_anchor(i)) continue;
    p.clear(own), p.clear(dz);
    add_rows_of(i, 1.0, own, dz);
    pull_of(classes, i, members, wide, sum, own, pull);
    pull_of(classes, i, members, wide, shared, dz, push);
    for (int64_t v = 0; v < a.views; ++v) {
      const int64_t slot = p.slot(i, v);
      const double r = upstream.share[slot];
      const VecD share = VecD::set1(r), twice = VecD::set1(-2 * classes.own[i] * r), per = VecD::set1(1 / a.temperature);
      VecD dot = VecD::set1(0);
      over_features(p.rows, slot, [&](int64_t d, VecD z) CLUSTOPS_INLINE {
        const T* out = repulsion + ((d / kSide<T>)*p.rows.slots.slots + slot) * kSide<T> + d % kSide<T>;
        const VecD attraction = fma(share, VecD::load(pull + d), fma(twice, z, VecD::load(push + d)));
        const VecD x = (load_wide(out) - attraction) * per;
        dot = fma(x, z, dot);
        store(x, dz + d);
      });
      if (a.normalize) {
        const VecD along = VecD::set1(-reduce_add(dot)), inverse = VecD::set1(p.rows.inverse[slot]);
        over_features(p.rows, slot, [&](int64_t d, VecD z) CLUSTOPS_INLINE {
          store(fma(along, z, VecD::load(dz + d)) * inverse, dz + d);
        });
      }
      char* out = static_cast<char*>(problem.gradient) + slot * a.width * element_size(a.dtype);
      with_elements<T>(a.dtype, out, [&](auto* to) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(to)>>;
        write_row<S, T>(dz, nullptr, a.width, const_cast<S*>(to));
      });
    }
  }
}

template <class T>
void backward(const ContrastiveBackward& problem, int threads) {
  const ContrastiveRows& a = problem.rows;
  const Rows<T> rows(a, threads);
  const Classes classes(problem.classes, a.samples, a.views);
  const Upstream<T> upstream(problem, rows, classes);
  const Numbers<T> repulsion(rows.slots.slots * rows.chunks * kSide<T>);
  std::fill_n(repulsion.data(), rows.slots.slots * rows.chunks * kSide<T>, T(0));
  std::vector<Weights<T>> weights(threads);
  const T scale = static_cast<T>(kLog2E / a.temperature);
  over_pairs(blocks_of(rows), threads, [&](const Block& one, const Block& other, int thread) {
    T* g = weights[thread].numbers.data();
    find_weights(rows, one, other, upstream, scale, g);
    add_products(rows, one, other, g, repulsion.data());
  });
  const Positives<T> positives(a, rows, classes, threads);
  over_classes(classes, threads, [&](int64_t c, int thread) {
    gradients_of_class(problem, positives, upstream, repulsion.data(), c, thread);
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
