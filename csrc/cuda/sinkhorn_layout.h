// How Sinkhorn kernels divide rows and columns, and where their workspace lies: known to host and device.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../common/sinkhorn.h"

namespace clustops::cuda {

#ifdef CLUSTOPS_SIMT  // small, so that tests meet several of each
constexpr int64_t kPassBlocks = 5, kSplitFrom = 300, kScoresOfMember = 100;
#else
constexpr int64_t kPassBlocks = 528;  // CTAs of a pass over all rows: four for each multiprocessor of an H200
constexpr int64_t kSplitFrom = 1 << 16;    // scores of a problem from which on more CTAs pay for their barriers
constexpr int64_t kScoresOfMember = 4096;  // at least, of each of these
#endif
constexpr int64_t kChunkStep = 8;  // the rows of a CTA are a multiple of this
constexpr int kPassThreads = 128;  // at least, of a CTA that has the masses of all columns in registers
constexpr int kMostThreads = 512;
constexpr int kMostColumns = 32 * kMostThreads;  // whose masses the threads of one CTA can hold

CLUSTOPS_HOST_DEVICE inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
CLUSTOPS_HOST_DEVICE inline int64_t round_up(int64_t a, int64_t to) { return divide_up(a, to) * to; }

// Rows of a problem, in parts of one CTA each: a function of the shape alone, so that sums are the same on every GPU.
struct Chunks {
  int64_t rows, count;
};

inline Chunks chunks_of(int64_t problems, int64_t rows) {
  if (rows < 1 || problems < 1) return {kChunkStep, 0};
  const int64_t most = divide_up(rows, kChunkStep), share = kPassBlocks / problems;
  const int64_t wanted = share < 1 ? 1 : share < most ? share : most;
  const int64_t size = round_up(divide_up(rows, wanted), kChunkStep);
  return {size, divide_up(rows, size)};
}

// The threads of a block as `count` teams that take rows in turn; a thread has `width` fellows for the columns of a row.
// A team is a power of two within a warp, or a whole number of warps; a block is a whole number of warps.
struct Teams {
  int width, count;
  CLUSTOPS_HOST_DEVICE int threads() const { return width * count; }
};

inline Teams teams_of(int64_t columns, int per_thread, int threads) {
  const int64_t wanted = divide_up(columns, per_thread);
  int width = 1;
  while (width < 32 && width < wanted) width *= 2;
  if (wanted > 32) width = static_cast<int>(wanted > kMostThreads ? kMostThreads : round_up(wanted, 32));
  return {width, width < threads ? threads / width : 1};
}

// Masses of all columns in registers, 8 or 32 of them a thread.
inline int columns_per_thread(int64_t all) { return all <= 8 * kMostThreads ? 8 : 32; }

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
inline bool in_registers(DType dtype, int64_t all) { return dtype != DType::f64 && all <= kMostColumns; }

// Whether rows of `length` elements one after the other start at multiples of 16 bytes.
inline bool is_wide(const void* data, int64_t length, int64_t element) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && length * element % 16 == 0;
}

inline bool wide_rows(const SinkhornRows& a) {
  const int64_t size = element_size(a.dtype);
  return is_wide(a.scores, a.row_stride, size) && a.problem_stride * size % 16 == 0 &&
         (!a.queue || (is_wide(a.queue, a.queue_row_stride, size) && a.queue_problem_stride * size % 16 == 0));
}

// Partial masses and offsets of rows of a pass, then what a solver keeps between passes; in elements of the potentials.
struct PassWorkspace {
  int64_t partials, offsets, log_mass, stopped, elements;

  PassWorkspace(const SinkhornRows& rows, int64_t all) {
    const int64_t n = rows.rows + rows.queued;
    partials = 0;
    offsets = partials + rows.problems * chunks_of(rows.problems, n).count * all;
    log_mass = offsets + rows.problems * n;
    stopped = log_mass + rows.problems * all;
    elements = stopped + rows.problems;
  }
};

}  // namespace clustops::cuda
