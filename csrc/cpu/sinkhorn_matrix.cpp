// Small matrices made doubly stochastic, and the gradient of that: each lane of a vector is a matrix.
//
// A block of matrices lies as [n n][lanes] in a cache. With e = exp(m - the largest of its column), the result of each
// division is e_ij u_i v_j, so only the scalings u and v are iterated: y_p = 1 / sum_q e_pq x_q with rows and columns
// in turn. The backward pass keeps all scalings of a block and walks them in reverse. Matrices whose numbers lie too
// far apart for that go one by one through logarithms.
#include "../common/sinkhorn_matrix.h"

#include <cmath>
#include <limits>
#include <vector>

#include "../common/pages.h"
#include "../common/parallel.h"
#include "element.h"

namespace clustops::cpu::CLUSTOPS_ISA {
namespace {

// Vectors side by side for matrices of up to kSmall rows, to hide the latency of sums.
constexpr int kSideBySide = 4;
constexpr int64_t kSmall = 8;
// Blocks of a unit of work.
constexpr int64_t kBlocks = 4;

// log2 of the smallest e: products of it with squares of scalings stay normal numbers.
template <class T>
constexpr T kLeast = std::is_same_v<T, double> ? -300 : -40;

inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  // 14 bits from a table, then one step of Newton's method: a division takes many times as long.
  const __m512 r = _mm512_rcp14_ps(x.v);
  return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(x.v, r, _mm512_set1_ps(1.0f)), r)};
#elif defined(__AVX2__)
  return {_mm256_div_ps(_mm256_set1_ps(1.0f), x.v)};
#else
  return {1.0f / x.v};
#endif
}
inline VecD reciprocal(VecD x) { return VecD::set1(1) / x; }

// Four by four numbers of a transposed matrix; rows lie `from_row` and `to_row` apart.
template <class T>
void transpose_four(const T* from, int64_t from_row, T* to, int64_t to_row) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  Four row[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&row[i], from + i * from_row, sizeof(Four));
  const Four low02 = __builtin_shufflevector(row[0], row[2], 0, 4, 1, 5);
  const Four low13 = __builtin_shufflevector(row[1], row[3], 0, 4, 1, 5);
  const Four high02 = __builtin_shufflevector(row[0], row[2], 2, 6, 3, 7);
  const Four high13 = __builtin_shufflevector(row[1], row[3], 2, 6, 3, 7);
  const Four column[4] = {__builtin_shufflevector(low02, low13, 0, 4, 1, 5),
                          __builtin_shufflevector(low02, low13, 2, 6, 3, 7),
                          __builtin_shufflevector(high02, high13, 0, 4, 1, 5),
                          __builtin_shufflevector(high02, high13, 2, 6, 3, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_row, &column[i], sizeof(Four));
}

// [rows, columns] to [columns, rows].
template <class T>
void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t r = 0; r < whole_rows; r += 4) {
    for (int64_t c = 0; c < whole_columns; c += 4) transpose_four(from + r * columns + c, columns, to + c * rows + r, rows);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
  }
}

template <class V, int kVectors>
struct Pack {
  V part[kVectors];
};

// A block of matrices, and the scalings of its steps: step h has those of rows if h has the parity of the last one,
// those of columns otherwise; scaling 0 is 1.
template <class T, int kVectors>
class Block {
 public:
  using V = Vector<T>;
  static constexpr int kWidth = V::kWidth, kLanes = kWidth * kVectors;

  Block(int64_t n, int64_t n_iters, bool keeps)
      : n_(n),
        steps_(n_iters == 0 ? 1 : 2 * n_iters),
        kept_(keeps ? steps_ + 1 : 2),
        e_(n * n * kLanes),
        scalings_(kept_ * n * kLanes),
        g_(keeps ? n * n * kLanes : 0),
        bars_(keeps ? 3 * n * kLanes : 0) {}

  // m [kLanes, n, n]. Beyond the range, `wide` is set for a lane.
  void load(const T* m, bool (&wide)[kLanes]) {
    transpose(m, kLanes, n_ * n_, e_.data());
    for (int g = 0; g < kVectors; ++g) exponentials(e_.data() + g * kWidth, wide + g * kWidth);
    std::fill_n(scaling(0), n_ * kLanes, T(1));
    for (int64_t h = 1; h <= steps_; ++h) step(h);
  }

  void result(T* to) {
    const T *u = scaling(steps_), *v = scaling(steps_ - 1);
    over_elements([&](int64_t i, int64_t j, int64_t at, int64_t lane) {
      store(at_e(at) * V::load(u + i * kLanes + lane) * V::load(v + j * kLanes + lane), e_.data() + at);
    });
    transpose(e_.data(), n_ * n_, kLanes, to);
  }

  // upstream and to, [kLanes, n, n]
  void backward(const T* upstream, T* to) {
    transpose(upstream, kLanes, n_ * n_, g_.data());
    T *of_y = bars_.data(), *of_x = of_y + n_ * kLanes, *r = of_x + n_ * kLanes;
    start(of_y, of_x);
    for (int64_t h = steps_; h >= 1; --h) {
      step_back(h, of_y, of_x, r);
      std::swap(of_y, of_x);
      std::fill_n(of_x, n_ * kLanes, T(0));
    }
    over_elements([&](int64_t, int64_t, int64_t at, int64_t) { store(at_e(at) * V::load(g_.data() + at), g_.data() + at); });
    transpose(g_.data(), n_ * n_, kLanes, to);
  }

 private:
  T* scaling(int64_t h) { return scalings_.data() + h % kept_ * n_ * kLanes; }
  V at_e(int64_t at) const { return V::load(e_.data() + at); }

  // work(i, j, place of element (i, j) in some lanes, first of these lanes)
  template <class Work>
  void over_elements(const Work& work) {
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < n_; ++j) {
        for (int g = 0; g < kVectors; ++g) work(i, j, (i * n_ + j) * kLanes + g * kWidth, g * kWidth);
      }
    }
  }

  // Elements from one p to the next, and from one q to the next, where step h sums over q.
  int64_t stride_p(int64_t h) const { return ((steps_ - h) % 2 == 0 ? n_ : 1) * kLanes; }
  int64_t stride_q(int64_t h) const { return ((steps_ - h) % 2 == 0 ? 1 : n_) * kLanes; }

  // Of one vector of matrices at e: less the largest of what the first step sums over.
  void exponentials(T* e, bool* wide) {
    const int64_t to_p = stride_p(1), to_q = stride_q(1);
    V least = V::set1(0);
    for (int64_t p = 0; p < n_; ++p) {
      V most = V::load(e + p * to_p);
      for (int64_t q = 1; q < n_; ++q) most = max(most, V::load(e + p * to_p + q * to_q));
      for (int64_t q = 0; q < n_; ++q) {
        T* at = e + p * to_p + q * to_q;
        const V power = (V::load(at) - most) * V::set1(static_cast<T>(kLog2E));
        least = min(least, power);
        store(exp2(power), at);
      }
    }
    T lanes[kWidth];
    store(least, lanes);
    for (int i = 0; i < kWidth; ++i) wide[i] = steps_ > 1 && lanes[i] < kLeast<T>;
  }

  void step(int64_t h) {
    const int64_t to_p = stride_p(h), to_q = stride_q(h);
    const T* x = scaling(h - 1);
    T* y = scaling(h);
    for (int64_t p = 0; p < n_; ++p) {
      const T* e = e_.data() + p * to_p;
      Pack<V, kVectors> sum;
      for (int g = 0; g < kVectors; ++g) sum.part[g] = V::load(e + g * kWidth) * V::load(x + g * kWidth);
      for (int64_t q = 1; q < n_; ++q) {
        for (int g = 0; g < kVectors; ++g) {
          sum.part[g] = fma(V::load(e + q * to_q + g * kWidth), V::load(x + q * kLanes + g * kWidth), sum.part[g]);
        }
      }
      for (int g = 0; g < kVectors; ++g) store(reciprocal(sum.part[g]), y + p * kLanes + g * kWidth);
    }
  }

  // The gradients of the last two scalings, and g as that of e.
  void start(T* of_y, T* of_x) {
    const T *u = scaling(steps_), *v = scaling(steps_ - 1);
    std::fill_n(of_y, 2 * n_ * kLanes, T(0));
    over_elements([&](int64_t i, int64_t j, int64_t at, int64_t lane) {
      const V e = at_e(at), g = V::load(g_.data() + at), ge = g * e;
      const V ui = V::load(u + i * kLanes + lane), vj = V::load(v + j * kLanes + lane);
      T *y = of_y + i * kLanes + lane, *x = of_x + j * kLanes + lane;
      store(fma(ge, vj, V::load(y)), y);
      store(fma(ge, ui, V::load(x)), x);
      store(g * ui * vj, g_.data() + at);
    });
  }

  // Through y_p = 1 / sum_q e_pq x_q. r is room.
  void step_back(int64_t h, const T* of_y, T* of_x, T* r) {
    const int64_t to_p = stride_p(h), to_q = stride_q(h);
    const T *y = scaling(h), *x = scaling(h - 1);
    for (int64_t i = 0; i < n_ * kLanes; i += kWidth) {
      const V scaled = V::load(y + i);
      store(V::set1(0) - scaled * (scaled * V::load(of_y + i)), r + i);
    }
    for (int64_t q = 0; q < n_; ++q) {
      Pack<V, kVectors> sum;
      for (int g = 0; g < kVectors; ++g) sum.part[g] = V::load(of_x + q * kLanes + g * kWidth);
      for (int64_t p = 0; p < n_; ++p) {
        const int64_t at = p * to_p + q * to_q;
        for (int g = 0; g < kVectors; ++g) {
          const int64_t lane = g * kWidth;
          const V rp = V::load(r + p * kLanes + lane);
          sum.part[g] = fma(at_e(at + lane), rp, sum.part[g]);
          T* d = g_.data() + at + lane;
          store(fma(rp, V::load(x + q * kLanes + lane), V::load(d)), d);
        }
      }
      for (int g = 0; g < kVectors; ++g) store(sum.part[g], of_x + q * kLanes + g * kWidth);
    }
  }

  int64_t n_, steps_, kept_;
  std::vector<T> e_, scalings_;  // [n n][lanes], [kept][n][lanes]
  std::vector<T> g_, bars_;      // gradients: [n n][lanes], 3 of [n][lanes]
};

// One matrix by logarithms, as the reference does it: y = x - LSE(x) of columns and rows in turn, all kept.
class Logarithms {
 public:
  template <class T>
  Logarithms(const T* m, int64_t n, int64_t n_iters) : n_(n), steps_(2 * n_iters), y_((steps_ + 1) * n * n) {
    std::copy(m, m + n * n, y_.begin());
    for (int64_t h = 1; h <= steps_; ++h) {
      for (int64_t p = 0; p < n_; ++p) normalize(h, p);
    }
  }

  template <class T>
  void result(T* to) const {
    for (int64_t i = 0; i < n_ * n_; ++i) to[i] = static_cast<T>(std::exp(at(steps_)[i]));
  }

  template <class T>
  void backward(const T* upstream, T* to) const {
    std::vector<double> g(n_ * n_);
    for (int64_t i = 0; i < n_ * n_; ++i) g[i] = upstream[i] * std::exp(at(steps_)[i]);
    for (int64_t h = steps_; h >= 1; --h) {
      for (int64_t p = 0; p < n_; ++p) {
        double sum = 0;
        for (int64_t q = 0; q < n_; ++q) sum += g[place(h, p, q)];
        for (int64_t q = 0; q < n_; ++q) g[place(h, p, q)] -= std::exp(at(h)[place(h, p, q)]) * sum;
      }
    }
    for (int64_t i = 0; i < n_ * n_; ++i) to[i] = static_cast<T>(g[i]);
  }

 private:
  const double* at(int64_t h) const { return y_.data() + h * n_ * n_; }
  int64_t place(int64_t h, int64_t p, int64_t q) const { return h % 2 == 0 ? p * n_ + q : q * n_ + p; }

  void normalize(int64_t h, int64_t p) {
    const double* x = at(h - 1);
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t q = 0; q < n_; ++q) most = std::max(most, x[place(h, p, q)]);
    for (int64_t q = 0; q < n_; ++q) sum += std::exp(x[place(h, p, q)] - most);
    for (int64_t q = 0; q < n_; ++q) y_[h * n_ * n_ + place(h, p, q)] = x[place(h, p, q)] - most - std::log(sum);
  }

  int64_t n_, steps_;
  std::vector<double> y_;
};

template <class S, class T>
void widen(const S* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + Vector<T>::kWidth <= count; i += Vector<T>::kWidth) store(read(from + i), to + i);
  if (i < count) store_first(read_first(from + i, count - i), to + i, count - i);
}

template <class S, class T>
void narrow(const T* from, int64_t count, S* to) {
  int64_t i = 0;
  for (; i + Vector<T>::kWidth <= count; i += Vector<T>::kWidth) write(Vector<T>::load(from + i), to + i);
  if (i < count) write_first(Vector<T>::load_first(from + i, count - i), to + i, count - i);
}

// What a thread works with: the block, and room for its matrices one after the other.
template <class T, int kVectors>
struct Room {
  Block<T, kVectors> block;
  std::vector<T> m, gradient, result;

  Room(const SinkhornMatrix& a)
      : block(a.n, a.n_iters, a.gradient != nullptr),
        m(block.kLanes * a.n * a.n),
        gradient(a.gradient ? m.size() : 0),
        result(m.size()) {}
};

// Matrices [first, first + count) in the lanes of one block.
template <class S, class T, int kVectors>
void project(const SinkhornMatrix& a, int64_t first, int64_t count, Room<T, kVectors>& room) {
  const int64_t size = a.n * a.n;
  bool wide[Block<T, kVectors>::kLanes];
  const auto take = [&](const void* from, std::vector<T>& to) {
    widen(static_cast<const S*>(from) + first * size, count * size, to.data());
    std::fill(to.begin() + count * size, to.end(), T(0));
  };
  take(a.m, room.m);
  room.block.load(room.m.data(), wide);
  if (a.gradient) {
    take(a.gradient, room.gradient);
    room.block.backward(room.gradient.data(), room.result.data());
  } else {
    room.block.result(room.result.data());
  }
  for (int64_t i = 0; i < count; ++i) {
    if (!wide[i]) continue;
    const Logarithms one(room.m.data() + i * size, a.n, a.n_iters);
    T* to = room.result.data() + i * size;
    a.gradient ? one.backward(room.gradient.data() + i * size, to) : one.result(to);
  }
  narrow(room.result.data(), count * size, static_cast<S*>(a.result) + first * size);
}

template <class T, int kVectors>
void project_all(const SinkhornMatrix& a, int threads) {
  constexpr int64_t kLanes = Block<T, kVectors>::kLanes, kUnit = kBlocks * kLanes;
  const int64_t units = (a.matrices + kUnit - 1) / kUnit;
  std::vector<Room<T, kVectors>> rooms(std::min<int64_t>(threads, std::max<int64_t>(units, 1)), Room<T, kVectors>(a));
  parallel_for(units, static_cast<int>(rooms.size()), [&](int64_t unit, int thread) {
    const int64_t end = std::min(a.matrices, (unit + 1) * kUnit);
    for (int64_t first = unit * kUnit; first < end; first += kLanes) {
      with_elements<T>(a.dtype, a.m, [&](auto* m) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(m)>>;
        project<S>(a, first, std::min(kLanes, end - first), rooms[thread]);
      });
    }
  });
}

template <class T>
void project_any(const SinkhornMatrix& a, int threads) {
  a.n <= kSmall ? project_all<T, kSideBySide>(a, threads) : project_all<T, 1>(a, threads);
}

}  // namespace

void sinkhorn_matrix(const SinkhornMatrix& a, int threads) {
  wish_huge_pages(a.result, a.matrices * a.n * a.n * element_size(a.dtype));
  a.dtype == DType::f64 ? project_any<double>(a, threads) : project_any<float>(a, threads);
}

}  // namespace clustops::cpu::CLUSTOPS_ISA
