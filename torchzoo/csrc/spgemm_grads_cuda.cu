// Derivatives of C = AB on CUDA, for values on known patterns, and the best term of each entry.
//
// Each sum of a derivative belongs to one warp or thread, so that its order is fixed. A column of C is
// found by bisection. The best terms are found in rounds of atomic minima, which have no order.
#include <cub/device/device_radix_sort.cuh>

#include "spgemm_cuda.h"

namespace torchzoo {
namespace {

// da_p = the sum over the row of B that p meets of b_q g, a warp each.
template <class I, class T>
__global__ void __launch_bounds__(THREADS)
    grad_a_kernel(Factors<I> f, Result<I> c, const T* y, const T* grad, T* da) {
  for (int64_t p = int64_t(blockIdx.x) * WARPS + warp(); p < f.a_entries; p += int64_t(gridDim.x) * WARPS) {
    const int64_t i = row_of(f.a_start, f.rows, p), begin = c.start[i], n = c.start[i + 1] - begin;
    const I k = f.a_col[p];
    T sum = T(0);
    for (int64_t q = f.b_start[k] + lane(); q < f.b_start[k + 1]; q += WARP) {
      const int64_t t = place(c.col + begin, n, f.b_col[q]);
      if (t >= 0) sum += y[q] * grad[begin + t];
    }
    sum = warp_sum(sum);
    if (lane() == 0) da[p] = sum;
  }
}

template <class I>
__global__ void __launch_bounds__(THREADS) number_entries(int64_t count, I* entry) {
  for (int64_t p = int64_t(blockIdx.x) * THREADS + threadIdx.x; p < count; p += int64_t(gridDim.x) * THREADS)
    entry[p] = static_cast<I>(p);
}

// db_q = the sum over the entries p of A that meet q's row of a_p g, in their order: a thread each.
// `col` are the columns of A sorted, `entry` the entries in that order.
template <class I, class T>
__global__ void __launch_bounds__(THREADS)
    grad_b_kernel(Factors<I> f, Result<I> c, const I* col, const I* entry, const T* x, const T* grad, T* db) {
  for (int64_t q = int64_t(blockIdx.x) * THREADS + threadIdx.x; q < f.b_entries; q += int64_t(gridDim.x) * THREADS) {
    const int64_t k = row_of(f.b_start, f.inner, q);
    T sum = T(0);
    for (int64_t e = lower_bound(col, f.a_entries, k); e < f.a_entries && col[e] == k; ++e) {
      const int64_t p = entry[e], i = row_of(f.a_start, f.rows, p), begin = c.start[i];
      const int64_t t = place(c.col + begin, c.start[i + 1] - begin, f.b_col[q]);
      if (t >= 0) sum += x[p] * grad[begin + t];
    }
    db[q] = sum;
  }
}

using Word = unsigned long long;
constexpr int NOT_YET = 0x7f;  // in every byte: above all indices
constexpr Word UNSET = 0x7f7f7f7f7f7f7f7full;

// Numbers in the order of what is best: NaN, then the least. Zeros of both signs are one.
__device__ __forceinline__ Word rank_of(double value) {
  if (isnan(value)) return 0;
  const Word bits = static_cast<Word>(__double_as_longlong(value == 0 ? 0.0 : value));
  return bits >> 63 ? ~bits : bits | Word(1) << 63;
}

// One round for each entry of C: its least rank, then the lowest inner index with that rank, then the
// first entry of A, then of B. `index` has the inner index, and at last the entry of B.
enum Round { RANK, INNER, FROM_A, FROM_B };

template <Round round, class I, class T>
__global__ void __launch_bounds__(THREADS)
    select_kernel(Factors<I> f, Result<I> c, const T* x, const T* y, bool product, Word* rank, Word* from_a, Word* index) {
  for (int64_t p = int64_t(blockIdx.x) * WARPS + warp(); p < f.a_entries; p += int64_t(gridDim.x) * WARPS) {
    const int64_t i = row_of(f.a_start, f.rows, p), begin = c.start[i], n = c.start[i + 1] - begin;
    const I k = f.a_col[p];
    for (int64_t q = f.b_start[k] + lane(); q < f.b_start[k + 1]; q += WARP) {
      int64_t t = place(c.col + begin, n, f.b_col[q]);
      if (t < 0) continue;
      t += begin;
      const Word mine = rank_of(product ? -(x[p] * y[q]) : x[p] + y[q]);
      if (round == RANK) {
        atomicMin(rank + t, mine);
      } else if (mine == rank[t]) {
        if (round == INNER) atomicMin(index + t, static_cast<Word>(k));
        if (round == FROM_A && index[t] == static_cast<Word>(k)) atomicMin(from_a + t, static_cast<Word>(p));
        if (round == FROM_B && from_a[t] == static_cast<Word>(p)) atomicMin(index + t, static_cast<Word>(q));
      }
    }
  }
}

// Entries that no term met, as there are where the pattern of C is not the product's, get term 0.
__global__ void __launch_bounds__(THREADS) settle(int64_t count, Word* from_a, Word* from_b) {
  for (int64_t t = int64_t(blockIdx.x) * THREADS + threadIdx.x; t < count; t += int64_t(gridDim.x) * THREADS)
    if (from_a[t] == UNSET) from_a[t] = from_b[t] = 0;
}

Tensor spgemm_grad_a(Pattern pattern, const Tensor& b, const Tensor& grad, int64_t columns) {
  check_pattern(pattern, 6);
  const Tensor y = checked("b", b, b, pattern[3]), g = checked("grad", grad, b, pattern[5]);
  const DeviceGuard guard(y.get_device_index());
  Tensor out = torch::stable::new_empty(y, {pattern[1].numel()});
  if (!out.numel()) return out;
  with_types(pattern, y, [&]<class I, class T>() {
    const Factors<I> f = factors<I>(pattern, columns);
    grad_a_kernel<I, T><<<blocks(f.a_entries, WARPS), THREADS, 0, stream(y)>>>(
        f, result<I>(pattern), y.const_data_ptr<T>(), g.const_data_ptr<T>(), out.mutable_data_ptr<T>());
    check_launch("grad_a_kernel");
  });
  return out;
}

Tensor spgemm_grad_b(Pattern pattern, const Tensor& a, const Tensor& grad, int64_t columns) {
  check_pattern(pattern, 6);
  const Tensor x = checked("a", a, a, pattern[1]), g = checked("grad", grad, a, pattern[5]);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t on = stream(x);
  Tensor out = torch::stable::new_zeros(x, {pattern[3].numel()});
  const int64_t entries = pattern[1].numel();
  if (!out.numel() || !entries) return out;
  with_types(pattern, x, [&]<class I, class T>() {
    const Factors<I> f = factors<I>(pattern, columns);
    Tensor entry = torch::stable::new_empty(pattern[1], {entries});
    Tensor col = torch::stable::new_empty(pattern[1], {entries}), order = torch::stable::new_empty(pattern[1], {entries});
    number_entries<I><<<blocks(entries, THREADS), THREADS, 0, on>>>(entries, entry.mutable_data_ptr<I>());
    check_launch("number_entries");
    with_workspace(x, [&](void* space, size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(space, bytes, f.a_col, col.mutable_data_ptr<I>(),
                                             entry.const_data_ptr<I>(), order.mutable_data_ptr<I>(), entries, 0,
                                             std::max(bit_length(f.inner), 1), on);
    });
    grad_b_kernel<I, T><<<blocks(f.b_entries, THREADS), THREADS, 0, on>>>(
        f, result<I>(pattern), col.const_data_ptr<I>(), order.const_data_ptr<I>(), x.const_data_ptr<T>(),
        g.const_data_ptr<T>(), out.mutable_data_ptr<T>());
    check_launch("grad_b_kernel");
  });
  return out;
}

std::tuple<Tensor, Tensor> spgemm_select(Pattern pattern, const Tensor& a, const Tensor& b, int64_t columns,
                                         bool product) {
  check_pattern(pattern, 6);
  const Tensor x = checked("a", a, a, pattern[1]), y = checked("b", b, a, pattern[3]);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t on = stream(x);
  const int64_t count = pattern[5].numel();
  Tensor from_a = torch::stable::new_empty(x, {count}, ScalarType::Long);
  Tensor from_b = torch::stable::new_empty(x, {count}, ScalarType::Long);
  if (!count) return {from_a, from_b};
  Tensor ranks = torch::stable::new_empty(x, {count}, ScalarType::Long);
  auto words = [](Tensor& t) { return reinterpret_cast<Word*>(t.mutable_data_ptr<int64_t>()); };
  Word *rank = words(ranks), *p = words(from_a), *q = words(from_b);
  auto reset = [&](Word* at, int byte) { check(cudaMemsetAsync(at, byte, count * sizeof(Word), on)); };
  with_types(pattern, x, [&]<class I, class T>() {
    const Factors<I> f = factors<I>(pattern, columns);
    auto run = [&](auto* kernel) {
      kernel<<<blocks(f.a_entries, WARPS), THREADS, 0, on>>>(f, result<I>(pattern), x.const_data_ptr<T>(),
                                                             y.const_data_ptr<T>(), product, rank, p, q);
      check_launch("select_kernel");
    };
    reset(rank, 0xff), reset(p, NOT_YET), reset(q, NOT_YET);
    run(select_kernel<RANK, I, T>);
    run(select_kernel<INNER, I, T>);
    run(select_kernel<FROM_A, I, T>);
    reset(q, NOT_YET);
    run(select_kernel<FROM_B, I, T>);
    settle<<<blocks(count, THREADS), THREADS, 0, on>>>(count, p, q);
    check_launch("settle");
  });
  return {from_a, from_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("spgemm_grad_a", TORCH_BOX(&spgemm_grad_a));
  m.impl("spgemm_grad_b", TORCH_BOX(&spgemm_grad_b));
  m.impl("spgemm_select", TORCH_BOX(&spgemm_select));
}

}  // namespace torchzoo
