// A product of sparse matrices as the CUDA kernels take it: its pattern, checks, and how to find things.
//
// Row starts and columns are trusted, as reading them back would wait for the device: Python checks
// them before they come here. A wrong pattern of C only leaves entries out.
#pragma once

#include <limits>

#include "cuda.h"
#include "spgemm.h"

namespace torchzoo {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

template <class I>
struct Factors {  // the patterns of A (rows, inner) and B (inner, columns)
  const I *a_start, *a_col, *b_start, *b_col;
  int64_t rows, inner, columns, a_entries, b_entries;
};

template <class I>
struct Result {
  const I *start, *col;
};

__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }

// The first of n sorted values that is not below `value`.
template <class I>
__device__ __forceinline__ int64_t lower_bound(const I* sorted, int64_t n, int64_t value) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The row of an entry.
template <class I>
__device__ __forceinline__ int64_t row_of(const I* start, int64_t rows, int64_t entry) {
  return lower_bound(start, rows + 1, entry + 1) - 1;
}

// The place of a column in sorted ones, or -1.
template <class I>
__device__ __forceinline__ int64_t place(const I* col, int64_t n, I column) {
  const int64_t low = lower_bound(col, n, column);
  return low < n && col[low] == column ? low : -1;
}

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "spgemm: ", cudaGetErrorString(error)); }

// Runs a routine of CUB, which is asked for the size of its workspace first.
template <class Routine>
void with_workspace(const Tensor& like, const Routine& routine) {
  size_t bytes = 0;
  check(routine(nullptr, bytes));
  Tensor space = torch::stable::new_empty(like, {static_cast<int64_t>(std::max<size_t>(bytes, 1))}, ScalarType::Byte);
  check(routine(space.mutable_data_ptr(), bytes));
}

using Pattern = std::vector<Tensor>;

// Blocks for kernels that stride over their grid, with so many items to a block.
inline unsigned blocks(int64_t items, int64_t each = 1) {
  return static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>((items + each - 1) / each, 1), 1 << 20));
}

inline void check_pattern(const Pattern& pattern, size_t size) {
  STD_TORCH_CHECK(pattern.size() == size, "pattern: expected ", size, " tensors");
  for (const Tensor& t : pattern) {
    check_devices("spgemm", {pattern[0], t});
    STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous() && t.scalar_type() == pattern[0].scalar_type(),
                    "pattern: expected contiguous vectors of one type");
  }
  for (size_t t = 0; t < size; t += 2) STD_TORCH_CHECK(pattern[t].numel() > 0, "pattern: no row starts");
  STD_TORCH_CHECK(size < 6 || pattern[4].numel() == pattern[0].numel(), "c: expected as many rows as a");
}

inline Tensor checked(const char* name, const Tensor& values, const Tensor& like, const Tensor& entries) {
  check_devices("spgemm", {entries, values});
  STD_TORCH_CHECK(values.dim() == 1 && values.numel() == entries.numel() &&
                      values.scalar_type() == like.scalar_type(),
                  name, ": expected one value an entry, all of one type");
  return torch::stable::contiguous(values);
}

template <class I>
Factors<I> factors(const Pattern& pattern, int64_t columns) {
  return {pattern[0].const_data_ptr<I>(), pattern[1].const_data_ptr<I>(), pattern[2].const_data_ptr<I>(),
          pattern[3].const_data_ptr<I>(), pattern[0].numel() - 1,         pattern[2].numel() - 1,
          columns,                            pattern[1].numel(),             pattern[3].numel()};
}

template <class I>
Result<I> result(const Pattern& pattern) {
  return {pattern[4].const_data_ptr<I>(), pattern[5].const_data_ptr<I>()};
}

template <class Op>
void with_indices(const Pattern& pattern, const Op& op) {
  if (pattern[0].scalar_type() == ScalarType::Int) return op.template operator()<int32_t>();
  STD_TORCH_CHECK(pattern[0].scalar_type() == ScalarType::Long, "expected int32 or int64 indices");
  op.template operator()<int64_t>();
}

template <class Op>
void with_types(const Pattern& pattern, const Tensor& values, const Op& op) {
  with_indices(pattern, [&]<class I>() {
    if (values.scalar_type() == ScalarType::Float) return op.template operator()<I, float>();
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Double, "expected float32 or float64 values");
    op.template operator()<I, double>();
  });
}

}  // namespace torchzoo
