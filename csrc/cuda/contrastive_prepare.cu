// Rows and samples of the class losses as their other kernels take them: unit rows in the operands' dtype, and for each
// sample its class, its weights and, on the way back, what its gradients need.
#include "contrastive_mma.h"
#include "contrastive_rows.h"

namespace clustops::cuda {
namespace {

constexpr int kThreads = 32 * kPrepareWarps;
#ifdef CLUSTOPS_SIMT
constexpr int kStaged = 64;
#else
constexpr int kStaged = 1024;  // samples whose class and weight a CTA has in shared memory
#endif

struct PrepareTask {
  Prepared p;
  ContrastiveClasses classes;
  const void* features;  // [rows, width]
  DType dtype;
  int64_t samples;
  bool normalize;
  const float *upstream, *lse;  // [samples, views], the first at these strides; null on the way forward
  int64_t upstream_sample_stride, upstream_view_stride;
  float scale;  // log2(e) / temperature
  unsigned* tickets;
  int64_t count;  // of them
};

// Eight features from `d` on, zero past the end.
template <class T>
__device__ void load8(const T* row, int64_t d, int64_t width, bool wide, float (&value)[8]) {
  T element[8];
  if (wide && d + 8 <= width) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
      reinterpret_cast<uint4*>(element)[i] = *reinterpret_cast<const uint4*>(row + d + i * (16 / sizeof(T)));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = value_of(element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = d + i < width ? value_of(row[d + i]) : 0.0f;
  }
}

// Stores eight numbers as operands, 16 bytes at a time.
__device__ inline void store8(const Prepared& p, int64_t row, int group, const float (&z)[8]) {
  if (bytes_of(p.operand) == 2) {
    if (group >= 8 * p.chunks) return;
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = p.operand == Operand::bf16 ? pack_bf16(z[2 * i], z[2 * i + 1]) : pack_f16(z[2 * i], z[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(p.operands + p.at(row, group)) = uint4{word[0], word[1], word[2], word[3]};
    return;
  }
  if (2 * group >= 8 * p.chunks) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = z[4 * half + i];
      word[i] = p.operand == Operand::tf32 ? to_tf32(value) : bits_of(value);
    }
    *reinterpret_cast<uint4*>(p.operands + p.at(row, 2 * group + half)) = uint4{word[0], word[1], word[2], word[3]};
  }
}

// One warp per row, of which a lane takes eight features: at most 256.
template <class T>
__device__ void prepare_row(const PrepareTask& t, int64_t row, bool wide, Summary& summary) {
  const Prepared& p = t.p;
  const int lane = threadIdx.x % 32;
  float z[8] = {};
  if (row < p.rows) {
    load8(static_cast<const T*>(t.features) + row * p.width, lane * 8, p.width, wide, z);
    double square = 0;  // of any fp32 without overflow
#pragma unroll
    for (int i = 0; i < 8; ++i) square += static_cast<double>(z[i]) * z[i];
#pragma unroll
    for (int by = 16; by > 0; by /= 2) square += __shfl_xor_sync(kAllLanes, square, by);
    const double norm = sqrt(square);
    float inverse = 1;
    if (t.normalize) {
      inverse = static_cast<float>(1 / norm);
      if (inverse > -Numbers<float>::lowest) inverse = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) z[i] *= inverse;
    }
    const float length = static_cast<float>(norm);
    if (!(square < Numbers<double>::infinity)) summary.bad = 1;
    if (norm > 0 && length < summary.least) summary.least = length;
    if (length > summary.greatest) summary.greatest = length;
    if (lane == 0) p.inverse[row] = inverse;
  } else if (lane == 0) {
    p.number[row] = -1;
    p.q[row] = p.own[row] = p.weight[row] = p.inverse[row] = 0;
    if (t.upstream) {
      p.upstream[row] = p.share[row] = p.strength[row] = 0;
      p.log_partition[row] = Numbers<float>::infinity;
    }
  }
  store8(p, row, lane, z);
}

__device__ inline double number_at(const void* from, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(from)[i];
    case DType::bf16: return value_of(static_cast<const Bf16*>(from)[i]);
    case DType::f16: return value_of(static_cast<const F16*>(from)[i]);
    default: return static_cast<const float*>(from)[i];
  }
}

// The threshold in the dtype of the confidence.
__device__ inline double threshold_of(const ContrastiveClasses& c) {
  const float near = static_cast<float>(c.threshold);
  if (!c.confidence || c.confidence_dtype == DType::f64) return c.threshold;
  if (c.confidence_dtype == DType::f32) return near;
  if (c.confidence_dtype == DType::bf16) {
    Bf16 rounded;
    assign(rounded, near);
    return value_of(rounded);
  }
  F16 rounded;
  assign(rounded, near);
  return value_of(rounded);
}

struct Member {
  int64_t label;  // -1: of no class
  float q, own;
  bool bad;
};

__device__ inline Member member(const ContrastiveClasses& c, double threshold, int64_t i) {
  const double p = c.confidence ? number_at(c.confidence, c.confidence_dtype, i) : 1.0;
  const int64_t label = c.labels ? c.labels[i] : -1;
  const float weight = c.reweight ? static_cast<float>(p) : 1.0f;
  return {label < 0 ? -1 : label, label >= 0 && p >= threshold ? weight : 0.0f, c.own_confidence ? weight * weight : 1.0f,
          !(p >= 0 && p <= 1)};
}

constexpr int64_t kLargeLabel = int64_t{1} << 31;  // from here on a label does not fit a class number

struct Staged {
  int64_t label[kStaged];
  int32_t number[kStaged];  // the label, -2 if it is large
  float q[kStaged];
};

// Per warp kWarpSamples samples against all: the weight of each one's class without itself, and the first of its label,
// which is looked for if one is large.
__device__ void sum_classes(const PrepareTask& t, double threshold, int64_t first, const Member (&mine)[kWarpSamples],
                            Staged& staged, float (&sum)[kWarpSamples], int64_t (&least)[kWarpSamples]) {
  const int lane = threadIdx.x % 32;
  bool large = false;
  int32_t number[kWarpSamples];
#pragma unroll
  for (int s = 0; s < kWarpSamples; ++s) {
    sum[s] = 0, least[s] = t.samples, number[s] = static_cast<int32_t>(mine[s].label);
    large |= mine[s].label >= kLargeLabel;
  }
  for (int64_t j0 = 0; j0 < t.samples; j0 += kStaged) {
    const int count = t.samples - j0 < kStaged ? static_cast<int>(t.samples - j0) : kStaged;
    __syncthreads();  // all have left what is overwritten
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Member other = member(t.classes, threshold, j0 + i);
      staged.label[i] = other.label, staged.q[i] = other.q;
      staged.number[i] = other.label < kLargeLabel ? static_cast<int32_t>(other.label) : -2;
    }
    __syncthreads();
    if (!large && (first >= j0 + count || first + kWarpSamples <= j0)) {
      for (int i = lane; i < count; i += 32) {
        const int32_t other = staged.number[i];
        const float q = staged.q[i];
#pragma unroll
        for (int s = 0; s < kWarpSamples; ++s) {
          if (other == number[s]) sum[s] += q;
        }
      }
      continue;
    }
    for (int i = lane; i < count; i += 32) {
#pragma unroll
      for (int s = 0; s < kWarpSamples; ++s) {
        if (staged.label[i] != mine[s].label) continue;
        if (j0 + i != first + s) sum[s] += staged.q[i];
        if (j0 + i < least[s]) least[s] = j0 + i;
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kWarpSamples; ++s) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
      sum[s] += __shfl_xor_sync(kAllLanes, sum[s], by);
      const int64_t other = __shfl_xor_sync(kAllLanes, least[s], by);
      least[s] = other < least[s] ? other : least[s];
    }
  }
}

// Writes what is known of the rows of sample i.
__device__ void write_sample(const PrepareTask& t, int64_t i, const Member& mine, float sum, int64_t least,
                             Summary& summary) {
  const Prepared& p = t.p;
  const float views = static_cast<float>(p.views), weight = mine.q * views * sum + (views - 1) * mine.own;
  const int32_t number = mine.label < kLargeLabel ? static_cast<int32_t>(mine.label) : static_cast<int32_t>(-2 - least);
  if (mine.bad) summary.bad = 1;
  for (int64_t v = threadIdx.x % 32; v < p.views; v += 32) {
    const int64_t row = i * p.views + v;
    p.number[row] = number, p.q[row] = mine.q, p.own[row] = mine.own, p.weight[row] = weight;
    if (!t.upstream) continue;
    const float given = t.upstream[i * t.upstream_sample_stride + v * t.upstream_view_stride];
    const float g = weight > 0 ? given : 0.0f, log_partition = t.lse[row] * static_cast<float>(kLog2E);
    p.upstream[row] = g, p.log_partition[row] = log_partition;
    p.share[row] = weight > 0 ? g / weight : 0.0f;
    p.strength[row] = g * power_of_two(t.scale - log_partition);
    if (fabsf(g) > summary.upstream) summary.upstream = fabsf(g);
  }
}

// The first row_blocks CTAs take rows, one per warp; the others samples, kWarpSamples per warp, each against all.
// Limit: reading and writing rows once; from some ten thousand samples on the comparison of labels, two instructions
// a pair of samples.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare_all(PrepareTask t) {
  __shared__ Staged staged;
  __shared__ Summary room[kPrepareWarps];
  const int warp = threadIdx.x / 32;
  Summary summary{Numbers<float>::infinity, 0, 0, 0};
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < t.count; i += int64_t{gridDim.x} * kThreads) {
    t.tickets[i] = 0;
  }
  const int64_t blocks = t.p.summaries();
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    summary = {Numbers<float>::infinity, 0, 0, 0};
    if (block < t.p.row_blocks) {
      const bool wide = reinterpret_cast<uintptr_t>(t.features) % 16 == 0 && t.p.width * sizeof(T) % 16 == 0;
      for (int64_t row = block * kPrepareWarps + warp; row < t.p.padded; row += int64_t{t.p.row_blocks} * kPrepareWarps) {
        prepare_row<T>(t, row, wide, summary);
      }
    } else {
      const double threshold = threshold_of(t.classes);
      constexpr int64_t kUnit = kPrepareWarps * kWarpSamples;
      for (int64_t unit = (block - t.p.row_blocks) * kUnit; unit < t.samples; unit += t.p.sample_blocks * kUnit) {
        const int64_t first = unit + warp * kWarpSamples;
        Member mine[kWarpSamples];
        float sum[kWarpSamples] = {};
        int64_t least[kWarpSamples] = {};
#pragma unroll
        for (int s = 0; s < kWarpSamples; ++s) {
          mine[s] = first + s < t.samples ? member(t.classes, threshold, first + s) : Member{-1, 0, 0, false};
        }
        if (t.classes.labels) sum_classes(t, threshold, first, mine, staged, sum, least);
#pragma unroll
        for (int s = 0; s < kWarpSamples; ++s) {
          if (first + s < t.samples) write_sample(t, first + s, mine[s], sum[s], least[s], summary);
        }
      }
    }
    summary = all_of<kThreads>(summary, room);
    if (threadIdx.x == 0) t.p.summary[block] = summary;
  }
}

void queue(const PrepareTask& t, void* stream) {
  with_element(t.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < 8) launch(prepare_all<T>, grid_for(t.p.summaries()), kThreads, 0, stream, t);
  });
}

PrepareTask task_of(const ContrastiveRows& rows, const ContrastiveClasses& classes, const Prepared& p, unsigned* tickets,
                    int64_t count) {
  PrepareTask t{};
  t.p = p, t.classes = classes, t.features = rows.features, t.dtype = rows.dtype, t.samples = rows.samples;
  t.normalize = rows.normalize, t.scale = static_cast<float>(kLog2E / rows.temperature);
  t.tickets = tickets, t.count = count;
  return t;
}

}  // namespace

void prepare(const ContrastiveForward& problem, const Prepared& p, unsigned* tickets, int64_t count, void* stream) {
  queue(task_of(problem.rows, problem.classes, p, tickets, count), stream);
}

void prepare(const ContrastiveBackward& problem, const Prepared& p, unsigned* tickets, int64_t count, void* stream) {
  PrepareTask t = task_of(problem.rows, problem.classes, p, tickets, count);
  t.upstream = static_cast<const float*>(problem.upstream), t.lse = static_cast<const float*>(problem.lse);
  t.upstream_sample_stride = problem.upstream_sample_stride, t.upstream_view_stride = problem.upstream_view_stride;
  queue(t, stream);
}

}  // namespace clustops::cuda
