// One tile of a matrix product for one block of threads: on the tensor cores for half precision,
// and with plain multiply-adds for float32 and float64, which so keep their whole precision.
//
// Traffic: a block reads the rows of A and the columns of B of its tile once, through shared
// memory, and writes its tile of C once. Half precision is copied asynchronously, DEPTH − 1 stages
// ahead of the products: 16 bytes at a time where a factor's rows start at multiples of that, else
// one by one. Past the ends of a matrix nothing is read and zeros take part. Sums run over k
// upwards, in float32 or float64. Launch limits: 256 threads and 82 KB of shared memory a block,
// so that each multiprocessor from sm_80 on holds two.
#pragma once

#include "cuda.h"

#include <cuda_pipeline_primitives.h>

#include <type_traits>

namespace torchzoo {

// Element (i, k) is data[i * outer + k * inner], where k is the dimension that is summed.
template <class T>
struct Factor {
  const T* data;
  int64_t outer, inner;
  bool aligned;  // one stride is 1, and what the other leads to starts at a multiple of 16 bytes
};

// The tile from (i, j) on of C (m, n) = A (m, k)·B (k, n); rows of C follow each other.
template <class T>
struct Task {
  Factor<T> a, b;
  T* c;
  int64_t m, n, k, i, j;
};

// How a panel of OUTER × INNER elements lies in shared memory: as in global memory, with rows of
// whichever dimension is contiguous there, padded so that 8 rows fall on different banks.
template <int outer, int inner, bool inner_rows>
struct Panel {
  static constexpr bool INNER_ROWS = inner_rows;
  static constexpr int ROWS = inner_rows ? outer : inner, COLUMNS = inner_rows ? inner : outer;
  static constexpr int PITCH = COLUMNS + 8, SIZE = ROWS * PITCH;
};

template <int most>
__device__ __forceinline__ int clamp(int64_t value) {
  return value <= 0 ? 0 : value < most ? static_cast<int>(value) : most;
}

// Starts to copy 16 bytes to shared memory: the first of them from `source`, the others are zeros.
__device__ __forceinline__ void copy_async(void* slot, const void* source, unsigned bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(slot))),
               "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}

// Starts to copy the panel at (i, k) of a factor that ends at (i_end, k_end).
template <class P, int threads, class T>
__device__ __forceinline__ void copy_panel(T* to, const Factor<T>& from, int64_t i, int64_t k,
                                           int64_t i_end, int64_t k_end) {
  constexpr int VECTOR = 16 / sizeof(T), VECTORS = P::COLUMNS / VECTOR, STEP = threads / VECTORS;
  static_assert(threads % VECTORS == 0 && P::ROWS % STEP == 0);
  const int r = threadIdx.x / VECTORS, c = threadIdx.x % VECTORS * VECTOR;
  const int64_t pitch = P::INNER_ROWS ? from.outer : from.inner;
  const int64_t row = (P::INNER_ROWS ? i : k) + r, column = (P::INNER_ROWS ? k : i) + c;
  const int rows = clamp<P::ROWS>((P::INNER_ROWS ? i_end : k_end) - row);
  const int columns = clamp<VECTOR>((P::INNER_ROWS ? k_end : i_end) - column);
  const T* start = from.data + row * pitch + column;
#pragma unroll
  for (int turn = 0; turn < P::ROWS / STEP; ++turn) {
    const int valid = turn * STEP < rows ? columns : 0;
    const T* source = valid ? start + turn * STEP * pitch : from.data;
    T* slot = to + (r + turn * STEP) * P::PITCH + c;
    if (from.aligned) {
      copy_async(slot, source, valid * sizeof(T));
    } else {
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) slot[v] = v < valid ? source[v] : T(0.0f);
    }
  }
}

// The 16×16 block at (i, k) of a panel as fragments of mma.m16n8k16: those of A, or (`columns`)
// those of two tiles of B beside each other. Lane 8q + r tells ldmatrix where row r of the q-th 8×8
// matrix is.
template <class P, bool columns, class T>
__device__ __forceinline__ void load_fragment(const T* panel, int i, int k, unsigned* out) {
  const int lane = threadIdx.x % WARP, q = lane / 8, r = lane % 8;
  i += 8 * (columns ? q / 2 : q % 2);
  k += 8 * (columns ? q % 2 : q / 2);
  const T* row = panel + (P::INNER_ROWS ? (i + r) * P::PITCH + k : (k + r) * P::PITCH + i);
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (P::INNER_ROWS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// sum (16×8) += a (16×16)·b (16×8) for a warp.
template <class T>
__device__ __forceinline__ void multiply_add(float* sum, const unsigned* a, const unsigned* b) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Half precision. `a_inner`, `b_inner`: k is the dimension in which that factor is contiguous.
template <class Element, int rows, int inner, int warps_m, int warps_n, bool a_inner, bool b_inner>
struct TensorTile {
  using T = Element;
  using A = Panel<rows, inner, a_inner>;
  using B = Panel<128, inner, b_inner>;
  static constexpr int M = rows, N = 128, K = inner, THREADS = WARP * warps_m * warps_n, DEPTH = 4;
  static constexpr int STAGE = A::SIZE + B::SIZE, BYTES = DEPTH * STAGE * sizeof(T);
  static constexpr int WARP_M = M / warps_m, WARP_N = N / warps_n;
  static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && K % 16 == 0);

  __device__ static void run(const Task<T>& task) {
    extern __shared__ __align__(16) unsigned char memory[];
    T* shared = reinterpret_cast<T*>(memory);
    const int warp = threadIdx.x / WARP, m = warp / warps_n * WARP_M, n = warp % warps_n * WARP_N;
    const int steps = static_cast<int>((task.k + K - 1) / K);
    const auto fetch = [&](int step) {
      if (step < steps) {
        T* stage = shared + step % DEPTH * STAGE;
        const int64_t k = int64_t(step) * K;
        copy_panel<A, THREADS>(stage, task.a, task.i, k, task.m, task.k);
        copy_panel<B, THREADS>(stage + A::SIZE, task.b, task.j, k, task.n, task.k);
      }
      __pipeline_commit();  // also where there is nothing to copy: waiting counts commits
    };
    float sum[WARP_M / 16][WARP_N / 8][4] = {};
#pragma unroll
    for (int step = 0; step < DEPTH - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
      __pipeline_wait_prior(DEPTH - 2);
      __syncthreads();  // this stage has come for all threads, and all have left the last one
      fetch(step + DEPTH - 1);
      const T* stage = shared + step % DEPTH * STAGE;
      multiply(stage, stage + A::SIZE, m, n, sum);
    }
    store(task, task.i + m, task.j + n, sum);
  }

 private:
  __device__ static void multiply(const T* a_panel, const T* b_panel, int m, int n,
                                  float (*sum)[WARP_N / 8][4]) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      unsigned a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i) load_fragment<A, false>(a_panel, m + 16 * i, k, a[i]);
#pragma unroll
      for (int j = 0; j < WARP_N / 16; ++j) load_fragment<B, true>(b_panel, n + 16 * j, k, b[j]);
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j) multiply_add<T>(sum[i][j], a[i], b[j / 2] + j % 2 * 2);
    }
  }

  // A lane holds (row, column), (row, column + 1) and the same 8 rows below, of each 16×8 tile.
  __device__ static void store(const Task<T>& task, int64_t row0, int64_t column0,
                               const float (*sum)[WARP_N / 8][4]) {
    const int lane = threadIdx.x % WARP;
    const bool pairs = task.n % 2 == 0;
#pragma unroll
    for (int i = 0; i < WARP_M / 8; ++i) {
      const int64_t row = row0 + 8 * i + lane / 4;
      if (row >= task.m) break;
#pragma unroll
      for (int j = 0; j < WARP_N / 8; ++j) {
        const int64_t column = column0 + 8 * j + lane % 4 * 2;
        const float* value = sum[i / 2][j] + i % 2 * 2;
        T* to = task.c + row * task.n + column;
        const Pack<T, 2> pair{{static_cast<T>(value[0]), static_cast<T>(value[1])}};
        if (pairs && column < task.n) {
          *reinterpret_cast<Pack<T, 2>*>(to) = pair;
        } else {
          if (column < task.n) to[0] = pair.value[0];
          if (column + 1 < task.n) to[1] = pair.value[1];
        }
      }
    }
  }
};

// float32 and float64: a thread computes `rows` × 4 elements. Factors may have any strides.
template <class Element, int rows>
struct ScalarTile {
  using T = Element;
  static constexpr int M = 16 * rows, N = 64, K = 64 / sizeof(T), THREADS = 256, BYTES = 0;

  __device__ static void run(const Task<T>& task) {
    __shared__ __align__(16) T a_panels[2][K][M + 4];
    __shared__ __align__(16) T b_panels[2][K][N + 4];
    const int m = threadIdx.x / 16 * rows, n = threadIdx.x % 16 * 4;
    const int steps = static_cast<int>((task.k + K - 1) / K);
    T a_next[(M * K + THREADS - 1) / THREADS], b_next[(N * K + THREADS - 1) / THREADS];
    T sum[rows][4] = {};
    if (steps) {
      load<M>(task.a, task.i, 0, task.m, task.k, a_next);
      load<N>(task.b, task.j, 0, task.n, task.k, b_next);
    }
    for (int step = 0; step < steps; ++step) {
      T(*a_panel)[M + 4] = a_panels[step % 2];
      T(*b_panel)[N + 4] = b_panels[step % 2];
      store<M>(a_panel, task.a, a_next);
      store<N>(b_panel, task.b, b_next);
      __syncthreads();  // these panels are whole, and all threads have left the last ones
      if (step + 1 < steps) {
        const int64_t k = int64_t(step + 1) * K;
        load<M>(task.a, task.i, k, task.m, task.k, a_next);
        load<N>(task.b, task.j, k, task.n, task.k, b_next);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const auto a = *reinterpret_cast<const Pack<T, rows>*>(a_panel[k] + m);
        const auto b = *reinterpret_cast<const Pack<T, 4>*>(b_panel[k] + n);
#pragma unroll
        for (int i = 0; i < rows; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += a.value[i] * b.value[j];
      }
    }
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t row = task.i + m + i, column = task.j + n + j;
        if (row < task.m && column < task.n) task.c[row * task.n + column] = sum[i][j];
      }
  }

 private:
  // The elements of a panel of `outer` × K that are the thread's: those at (i, k), (i + di, k + dk)
  // and so on, laid out so that threads read along memory.
  template <int outer>
  struct Walk {
    int i, k, di, dk;
    __device__ explicit Walk(bool along_k)
        : i(along_k ? threadIdx.x / K : threadIdx.x % outer),
          k(along_k ? threadIdx.x % K : threadIdx.x / outer),
          di(along_k ? THREADS / K : 0),
          dk(along_k ? 0 : THREADS / outer) {}
    __device__ void next() { i += di, k += dk; }
  };

  template <int outer, int count>
  __device__ static void load(const Factor<T>& from, int64_t i0, int64_t k0, int64_t i_end,
                              int64_t k_end, T (&values)[count]) {
    Walk<outer> at(from.inner == 1);
    const int rows_left = clamp<outer>(i_end - i0), k_left = clamp<K>(k_end - k0);
    const T* source = from.data + (i0 + at.i) * from.outer + (k0 + at.k) * from.inner;
    const int64_t jump = at.di * from.outer + at.dk * from.inner;
#pragma unroll
    for (int turn = 0; turn < count; ++turn, at.next(), source += jump)
      values[turn] = at.i < rows_left && at.k < k_left ? *source : T(0);
  }

  template <int outer, int count>
  __device__ static void store(T (*panel)[outer + 4], const Factor<T>& from,
                               const T (&values)[count]) {
    Walk<outer> at(from.inner == 1);
#pragma unroll
    for (int turn = 0; turn < count; ++turn, at.next())
      if (at.i < outer && at.k < K) panel[at.k][at.i] = values[turn];
  }
};

}  // namespace torchzoo
