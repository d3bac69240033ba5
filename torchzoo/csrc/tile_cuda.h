// A block's tile of a matrix product, or of one with a maximum for the sum: SIDE × SIDE results,
// EACH × EACH a thread, from chunks of DEPTH terms that lie term by term in shared memory.
#pragma once

#include "cuda.h"

#include <limits>

namespace torchzoo {

constexpr int THREADS = 256;
constexpr int SIDE = 64;
constexpr int DEPTH = 32;
constexpr int EACH = 4;
constexpr int STEP = SIDE / EACH;  // between a thread's rows, and between its columns

template <class T>
constexpr T NOTHING = -std::numeric_limits<T>::infinity();  // as a log-value

template <class T>
using Strip = T[DEPTH][SIDE + 1];  // the odd width keeps threads out of each other's banks

// strip[t][r] = value(r, t), a warp along t, which is contiguous in memory.
template <class T, class Value>
__device__ __forceinline__ void fill(Strip<T>& strip, const Value& value) {
#pragma unroll 4
  for (int i = threadIdx.x; i < DEPTH * SIDE; i += THREADS) {
    const int t = i % DEPTH, r = i / DEPTH;
    strip[t][r] = value(r, t);
  }
}

// The same, a warp along r.
template <class T, class Value>
__device__ __forceinline__ void fill_across(Strip<T>& strip, const Value& value) {
#pragma unroll 4
  for (int i = threadIdx.x; i < DEPTH * SIDE; i += THREADS) {
    const int t = i / SIDE, r = i % SIDE;
    strip[t][r] = value(r, t);
  }
}

// sums[i][j] += Σ_t x[t][row i] y[t][column j], in order of t.
template <class T>
__device__ __forceinline__ void add_products(const Strip<T>& x, const Strip<T>& y,
                                             T (&sums)[EACH][EACH]) {
  const int row = threadIdx.x / STEP, column = threadIdx.x % STEP;
#pragma unroll 8
  for (int t = 0; t < DEPTH; ++t) {
    T a[EACH], b[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      a[i] = x[t][row + i * STEP];
      b[i] = y[t][column + i * STEP];
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i)
#pragma unroll
      for (int j = 0; j < EACH; ++j) sums[i][j] += a[i] * b[j];
  }
}

// Calls run(i, j, row, column) for what this thread holds of the tile.
template <class Run>
__device__ __forceinline__ void for_each(const Run& run) {
  const int row = threadIdx.x / STEP, column = threadIdx.x % STEP;
#pragma unroll
  for (int i = 0; i < EACH; ++i)
#pragma unroll
    for (int j = 0; j < EACH; ++j) run(i, j, row + i * STEP, column + j * STEP);
}

inline unsigned blocks(const char* op, int64_t count, int64_t most = INT32_MAX) {
  STD_TORCH_CHECK(count <= most, op, ": too many blocks: ", count);
  return static_cast<unsigned>(count);
}

inline int64_t tiles(int64_t size) { return (size + SIDE - 1) / SIDE; }

}  // namespace torchzoo
