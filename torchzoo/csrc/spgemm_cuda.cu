// C = AB of sparse matrices on CUDA: its pattern, then its values.
//
// Pattern: a row of few terms is hashed by a warp into a table in shared memory, whose columns are then
// sorted in place; a longer row marks bits of a window of columns there, window by window, which also
// leaves its columns sorted. Values: a row that fits is summed in a table in shared memory, a longer one
// in C itself, where a column is found by bisection. In either the inner index goes one by one while
// lanes share the columns of a row of B, so that the order of additions is fixed. No term is stored; the
// host waits once, for the size of C.
#include <cub/device/device_scan.cuh>

#include "spgemm_cuda.h"

namespace torchzoo {
namespace {

constexpr int FEW = 512;                       // terms (then entries) of a row that a warp hashes
constexpr int SLOTS = 2 * FEW;
constexpr int WINDOW_WORDS = 8192;             // 32 kB of bits
constexpr int64_t WINDOW = 32 * WINDOW_WORDS;  // columns

template <class I>
__global__ void count_terms(Factors<I> f, int64_t* terms) {
  for (int64_t i = int64_t(blockIdx.x) * WARPS + warp(); i < f.rows; i += int64_t(gridDim.x) * WARPS) {
    int64_t sum = 0;
    for (int64_t p = f.a_start[i] + lane(); p < f.a_start[i + 1]; p += WARP)
      sum += f.b_start[f.a_col[p] + 1] - f.b_start[f.a_col[p]];
    sum = warp_sum(sum);
    if (lane() == 0) terms[i] = sum;
  }
}

__device__ __forceinline__ int compare_and_swap(int* at, int old, int value) {
  return atomicCAS(at, old, value);
}
__device__ __forceinline__ int64_t compare_and_swap(int64_t* at, int64_t old, int64_t value) {
  static_assert(sizeof(unsigned long long) == sizeof(int64_t));
  return static_cast<int64_t>(atomicCAS(reinterpret_cast<unsigned long long*>(at),
                                        static_cast<unsigned long long>(old),
                                        static_cast<unsigned long long>(value)));
}

// A warp's table of a row's columns, which they fill to half at most.
template <class I>
struct Table {
  I* key;
  Hash hash;
  int slots;

  __device__ __forceinline__ Table(I* key, int64_t entries) : key(key) {
    hash = {bit_length(2 * static_cast<uint64_t>(entries > 0 ? entries : 1)), -1};
    slots = 1 << hash.bits;
    for (int slot = lane(); slot < slots; slot += WARP) key[slot] = I(-1);
    __syncwarp();
  }
  __device__ __forceinline__ int first(I column) const {
    return static_cast<int>(first_slot(hash, static_cast<uint64_t>(column)));
  }
  // Puts a column in; true where it is new.
  __device__ __forceinline__ bool claim(I column) {
    for (int slot = first(column);; slot = (slot + 1) & (slots - 1)) {
      I found = *static_cast<volatile I*>(key + slot);
      if (found == I(-1)) found = compare_and_swap(key + slot, I(-1), column);
      if (found == I(-1)) return true;
      if (found == column) return false;
    }
  }
  // The slot of a column, or -1.
  __device__ __forceinline__ int find(I column) const {
    for (int slot = first(column);; slot = (slot + 1) & (slots - 1)) {
      if (key[slot] == column) return slot;
      if (key[slot] == I(-1)) return -1;
    }
  }
};

// Sorts the first n <= FEW numbers of a warp's table, in which there is room for as many again.
template <class I>
__device__ __forceinline__ void sort_by_warp(I* table, int n) {
  constexpr I most = sizeof(I) == 4 ? I(INT32_MAX) : I(INT64_MAX);
  int padded = 1;
  while (padded < n) padded *= 2;
  for (int t = n + lane(); t < padded; t += WARP) table[t] = most;
  for (int size = 2; size <= padded; size *= 2) {
    for (int stride = size / 2; stride; stride /= 2) {
      __syncwarp();
      for (int pair = lane(); pair < padded / 2; pair += WARP) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const bool rising = (low & size) == 0;
        const I first = table[low], second = table[high];
        if ((first > second) == rising) table[low] = second, table[high] = first;
      }
    }
  }
  __syncwarp();
}

// Rows of up to FEW terms: counts their columns or, where `col` is given, writes them in order.
template <class I>
__global__ void __launch_bounds__(THREADS)
    list_short_rows(Factors<I> f, const int64_t* terms, int64_t* count, const int64_t* start, I* col) {
  __shared__ I keys[WARPS][SLOTS];
  I* key = keys[warp()];
  for (int64_t i = int64_t(blockIdx.x) * WARPS + warp(); i < f.rows; i += int64_t(gridDim.x) * WARPS) {
    if (terms[i] > FEW) continue;  // the same for the whole warp
    Table<I> table(key, terms[i]);
    int64_t mine = 0;
    for (int64_t p = f.a_start[i]; p < f.a_start[i + 1]; ++p) {
      const I k = f.a_col[p];
      for (int64_t q = f.b_start[k] + lane(); q < f.b_start[k + 1]; q += WARP) mine += table.claim(f.b_col[q]);
    }
    __syncwarp();
    if (!col) {
      mine = warp_sum(mine);
      if (lane() == 0) count[i] = mine;
      continue;
    }
    int n = 0;
    for (int chunk = 0; chunk < table.slots; chunk += WARP) {  // moves columns to the front
      const I column = chunk + lane() < table.slots ? key[chunk + lane()] : I(-1);
      const unsigned full = __ballot_sync(ALL_LANES, column != I(-1));
      if (column != I(-1)) key[n + __popc(full & ((1u << lane()) - 1))] = column;
      n += __popc(full);
    }
    __syncwarp();
    sort_by_warp(key, n);
    for (int t = lane(); t < n; t += WARP) col[start[i] + t] = key[t];
    __syncwarp();  // the next row's table goes to the same place
  }
}

// Longer rows: counts their columns or, where `col` is given, writes them in order.
template <class I>
__global__ void __launch_bounds__(THREADS)
    list_long_rows(Factors<I> f, const int64_t* terms, int64_t* count, const int64_t* start, I* col) {
  __shared__ unsigned met[WINDOW_WORDS];
  for (int64_t i = blockIdx.x; i < f.rows; i += gridDim.x) {
    if (terms[i] <= FEW) continue;  // the same for the whole block
    int64_t total = 0;
    for (int64_t window = 0; window < f.columns; window += WINDOW) {
      __syncthreads();  // the last window has been read
      for (int word = threadIdx.x; word < WINDOW_WORDS; word += THREADS) met[word] = 0;
      __syncthreads();
      for (int64_t p = f.a_start[i] + warp(); p < f.a_start[i + 1]; p += WARPS) {
        const I k = f.a_col[p];
        for (int64_t q = f.b_start[k] + lane(); q < f.b_start[k + 1]; q += WARP) {
          const int64_t j = f.b_col[q] - window;
          if (j >= 0 && j < WINDOW) atomicOr(met + j / 32, 1u << (j % 32));
        }
      }
      __syncthreads();
      for (int word = 0; word < WINDOW_WORDS; word += THREADS) {
        unsigned bits = met[word + threadIdx.x];
        int all;
        const int before = block_sum_before<THREADS>(__popc(bits), &all);
        if (col) {
          int64_t at = start[i] + total + before;
          for (; bits; bits &= bits - 1)
            col[at++] = static_cast<I>(window + (word + int(threadIdx.x)) * 32 + __ffs(bits) - 1);
        }
        total += all;
      }
    }
    if (!col && threadIdx.x == 0) count[i] = total;
  }
}

// Rows of up to FEW entries, a warp each. Columns of a row of B are distinct, so that lanes add to
// slots of their own, and the atomics only guard against matrices where they are not.
template <class I, class T>
__global__ void __launch_bounds__(THREADS)
    sum_short_rows(Factors<I> f, Result<I> c, const T* x, const T* y, T* out) {
  extern __shared__ __align__(16) unsigned char shared[];
  T* sums = reinterpret_cast<T*>(shared) + warp() * SLOTS;
  I* key = reinterpret_cast<I*>(reinterpret_cast<T*>(shared) + WARPS * SLOTS) + warp() * SLOTS;
  for (int64_t i = int64_t(blockIdx.x) * WARPS + warp(); i < f.rows; i += int64_t(gridDim.x) * WARPS) {
    const int64_t begin = c.start[i], n = c.start[i + 1] - begin;
    if (n > FEW) continue;  // the same for the whole warp
    Table<I> table(key, n);
    for (int slot = lane(); slot < table.slots; slot += WARP) sums[slot] = T(0);
    for (int64_t t = lane(); t < n; t += WARP) table.claim(c.col[begin + t]);
    __syncwarp();
    for (int64_t p = f.a_start[i]; p < f.a_start[i + 1]; ++p) {
      const I k = f.a_col[p];
      for (int64_t q = f.b_start[k] + lane(); q < f.b_start[k + 1]; q += WARP) {
        const int slot = table.find(f.b_col[q]);
        if (slot >= 0) atomicAdd(sums + slot, x[p] * y[q]);
      }
      __syncwarp();  // the next inner index adds to what this one left
    }
    for (int64_t t = lane(); t < n; t += WARP) out[begin + t] = sums[table.find(c.col[begin + t])];
    __syncwarp();  // the next row's table goes to the same place
  }
}

// Longer rows, a block each, in C itself, which is zero at the start.
template <class I, class T>
__global__ void __launch_bounds__(THREADS)
    sum_long_rows(Factors<I> f, Result<I> c, const T* x, const T* y, T* out) {
  for (int64_t i = blockIdx.x; i < f.rows; i += gridDim.x) {
    const int64_t begin = c.start[i], n = c.start[i + 1] - begin;
    if (n <= FEW) continue;  // the same for the whole block
    for (int64_t p = f.a_start[i]; p < f.a_start[i + 1]; ++p) {
      const I k = f.a_col[p];
      for (int64_t q = f.b_start[k] + threadIdx.x; q < f.b_start[k + 1]; q += THREADS) {
        const int64_t t = place(c.col + begin, n, f.b_col[q]);
        if (t >= 0) atomicAdd(out + begin + t, x[p] * y[q]);
      }
      __syncthreads();
    }
  }
}

// Counts the columns of all rows or, where `col` is given, writes them.
template <class I>
void list_rows(Factors<I> f, const int64_t* terms, int64_t* count, const int64_t* start, I* col,
               cudaStream_t stream) {
  list_short_rows<<<blocks(f.rows, WARPS), THREADS, 0, stream>>>(f, terms, count, start, col);
  check_launch("list_short_rows");
  list_long_rows<<<blocks(f.rows), THREADS, 0, stream>>>(f, terms, count, start, col);
  check_launch("list_long_rows");
}

std::tuple<Tensor, Tensor> spgemm_pattern(Pattern pattern, int64_t columns) {
  check_pattern(pattern, 4);
  const DeviceGuard guard(pattern[0].get_device_index());
  const cudaStream_t on = stream(pattern[0]);
  const int64_t rows = pattern[0].numel() - 1;
  Tensor terms = torch::stable::new_empty(pattern[0], {rows}, ScalarType::Long);
  Tensor start = torch::stable::new_zeros(pattern[0], {rows + 1}, ScalarType::Long);
  Tensor col = torch::stable::new_empty(pattern[0], {0});
  if (!rows) return {torch::stable::to(start, pattern[0].scalar_type()), col};
  with_indices(pattern, [&]<class I>() {
    const Factors<I> f = factors<I>(pattern, columns);
    int64_t *u = terms.mutable_data_ptr<int64_t>(), *starts = start.mutable_data_ptr<int64_t>(), nnz = 0;
    count_terms<<<blocks(rows, WARPS), THREADS, 0, on>>>(f, u);
    check_launch("count_terms");
    list_rows<I>(f, u, starts + 1, nullptr, nullptr, on);
    with_workspace(pattern[0], [&](void* space, size_t& bytes) {
      return cub::DeviceScan::InclusiveSum(space, bytes, starts + 1, starts + 1, rows, on);
    });
    check(cudaMemcpyAsync(&nnz, starts + rows, sizeof(nnz), cudaMemcpyDeviceToHost, on));
    check(cudaStreamSynchronize(on));  // the size of C
    STD_TORCH_CHECK(nnz <= std::numeric_limits<I>::max(), "the result has ", nnz,
                    " entries, more than int32 indices can count: use int64 indices");
    col = torch::stable::new_empty(pattern[0], {nnz});
    if (!nnz) return;
    list_rows<I>(f, u, nullptr, starts, col.mutable_data_ptr<I>(), on);
  });
  return {torch::stable::to(start, pattern[0].scalar_type()), col};
}

Tensor spgemm_values(Pattern pattern, const Tensor& a, const Tensor& b, int64_t columns) {
  check_pattern(pattern, 6);
  const Tensor x = checked("a", a, a, pattern[1]), y = checked("b", b, a, pattern[3]);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t on = stream(x);
  Tensor out = torch::stable::new_zeros(x, {pattern[5].numel()});
  if (!out.numel()) return out;
  with_types(pattern, x, [&]<class I, class T>() {
    const Factors<I> f = factors<I>(pattern, columns);
    const T *xs = x.const_data_ptr<T>(), *ys = y.const_data_ptr<T>();
    T* sums = out.mutable_data_ptr<T>();
    constexpr int bytes = WARPS * SLOTS * (sizeof(I) + sizeof(T));
    check(cudaFuncSetAttribute(sum_short_rows<I, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    sum_short_rows<I, T><<<blocks(f.rows, WARPS), THREADS, bytes, on>>>(f, result<I>(pattern), xs, ys, sums);
    check_launch("sum_short_rows");
    sum_long_rows<I, T><<<blocks(f.rows), THREADS, 0, on>>>(f, result<I>(pattern), xs, ys, sums);
    check_launch("sum_long_rows");
  });
  return out;
}

// Tables hold short rows only, by the mixing hash, and rows always come sorted.
std::tuple<Tensor, Tensor, Tensor> spgemm(Pattern pattern, const Tensor& a, const Tensor& b, int64_t columns,
                                          bool, bool, bool) {
  auto [crow, col] = spgemm_pattern(pattern, columns);
  pattern.push_back(crow);
  pattern.push_back(col);
  return {crow, col, spgemm_values(pattern, a, b, columns)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("spgemm", TORCH_BOX(&spgemm));
  m.impl("spgemm_pattern", TORCH_BOX(&spgemm_pattern));
  m.impl("spgemm_values", TORCH_BOX(&spgemm_values));
}

}  // namespace torchzoo
