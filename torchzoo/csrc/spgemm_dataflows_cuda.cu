// The two dataflows that row-wise merging is measured against, on CUDA: see spgemm_dataflows_cpu.cpp.
//
// `inner`: a thread merges a row of A with a column of B, both sorted. `esc`: all terms are stored, sorted
// by their place in C, and each place's terms summed by a thread. The order of additions is fixed.
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "spgemm_cuda.h"

namespace torchzoo {
namespace {

// Row · width + column of each entry, or column · width + row, and the entries' numbers.
template <class I>
__global__ void __launch_bounds__(THREADS) place_entries(const I* start, const I* col, int64_t rows, int64_t count,
                                                         int64_t width, bool transposed, int64_t* key, int64_t* entry) {
  for (int64_t p = int64_t(blockIdx.x) * THREADS + threadIdx.x; p < count; p += int64_t(gridDim.x) * THREADS) {
    const int64_t i = row_of(start, rows, p);
    key[p] = transposed ? col[p] * width + i : i * width + col[p];
    entry[p] = p;
  }
}

struct Lines {  // rows of A or columns of B: sorted line · width + place, and whose value it is
  const int64_t *key, *entry;
  int64_t count, width;
};

// Counts the entries of each row of C or, where `col` is given, writes them: a block a row.
template <class I, class T>
__global__ void __launch_bounds__(THREADS)
    merge_lines(Lines a, Lines b, int64_t rows, int64_t columns, const T* x, const T* y, int64_t* count,
                const int64_t* start, I* col, T* out) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t first = lower_bound(a.key, a.count, i * a.width), last = lower_bound(a.key, a.count, (i + 1) * a.width);
    int64_t total = 0;
    for (int64_t from = 0; from < columns; from += THREADS) {  // the same for the whole block
      const int64_t j = from + threadIdx.x;
      T sum = T(0);
      int met = 0;
      if (j < columns) {
        int64_t p = first, q = lower_bound(b.key, b.count, j * b.width);
        while (p < last && q < b.count && b.key[q] < (j + 1) * b.width) {
          const int64_t u = a.key[p] - i * a.width, v = b.key[q] - j * b.width;
          if (u == v) sum += x[a.entry[p]] * y[b.entry[q]], met = 1;
          p += u <= v;
          q += v <= u;
        }
      }
      int all;
      const int before = block_sum_before<THREADS>(met, &all);
      if (col && met) {
        col[start[i] + total + before] = static_cast<I>(j);
        out[start[i] + total + before] = sum;
      }
      total += all;
    }
    if (!col && threadIdx.x == 0) count[i] = total;
  }
}

template <class I>
__global__ void __launch_bounds__(THREADS) count_terms_of_entries(Factors<I> f, int64_t* count) {
  for (int64_t p = int64_t(blockIdx.x) * THREADS + threadIdx.x; p < f.a_entries; p += int64_t(gridDim.x) * THREADS)
    count[p] = f.b_start[f.a_col[p] + 1] - f.b_start[f.a_col[p]];
}

// Stores all terms, those of entry p of A from end[p - 1] on: a warp an entry.
template <class I, class T>
__global__ void __launch_bounds__(THREADS)
    expand(Factors<I> f, const T* x, const T* y, const int64_t* end, int64_t* key, T* term) {
  for (int64_t p = int64_t(blockIdx.x) * WARPS + warp(); p < f.a_entries; p += int64_t(gridDim.x) * WARPS) {
    const int64_t i = row_of(f.a_start, f.rows, p), k = f.a_col[p], first = f.b_start[k];
    const int64_t n = f.b_start[k + 1] - first, at = end[p] - n;
    for (int64_t t = lane(); t < n; t += WARP) {
      key[at + t] = i * f.columns + f.b_col[first + t];
      term[at + t] = x[p] * y[first + t];
    }
  }
}

__global__ void __launch_bounds__(THREADS) mark_first_terms(int64_t terms, const int64_t* key, int64_t* first) {
  for (int64_t t = int64_t(blockIdx.x) * THREADS + threadIdx.x; t < terms; t += int64_t(gridDim.x) * THREADS)
    first[t] = t == 0 || key[t] != key[t - 1];
}

// Sums the terms of each place; `number` counts the places up to each term.
template <class I, class T>
__global__ void __launch_bounds__(THREADS) compress(int64_t terms, int64_t columns, const int64_t* key, const T* term,
                                                    const int64_t* number, I* col, T* out) {
  for (int64_t t = int64_t(blockIdx.x) * THREADS + threadIdx.x; t < terms; t += int64_t(gridDim.x) * THREADS) {
    if (t && key[t] == key[t - 1]) continue;
    T sum = term[t];
    for (int64_t next = t + 1; next < terms && key[next] == key[t]; ++next) sum += term[next];
    col[number[t] - 1] = static_cast<I>(key[t] % columns);
    out[number[t] - 1] = sum;
  }
}

// Where each row of C starts, from the sorted places of the terms.
__global__ void __launch_bounds__(THREADS)
    start_rows(int64_t rows, int64_t columns, int64_t terms, const int64_t* key, const int64_t* number, int64_t* start) {
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i <= rows; i += int64_t(gridDim.x) * THREADS) {
    const int64_t t = lower_bound(key, terms, i * columns);
    start[i] = t < terms ? number[t] - 1 : terms ? number[terms - 1] : 0;
  }
}

Tensor numbers(const Tensor& like, int64_t count) { return torch::stable::new_empty(like, {count}, ScalarType::Long); }
int64_t* data(Tensor& t) { return t.mutable_data_ptr<int64_t>(); }

int64_t bytes_of(std::initializer_list<Tensor> tensors) {
  int64_t bytes = 0;
  for (const Tensor& t : tensors) bytes += t.numel() * t.element_size();
  return bytes;
}

void add_up(const Tensor& like, int64_t* count, int64_t n, cudaStream_t on) {
  with_workspace(like, [&](void* space, size_t& bytes) {
    return cub::DeviceScan::InclusiveSum(space, bytes, count, count, n, on);
  });
}

int64_t fetch(const int64_t* at, cudaStream_t on) {
  int64_t value = 0;
  check(cudaMemcpyAsync(&value, at, sizeof(value), cudaMemcpyDeviceToHost, on));
  check(cudaStreamSynchronize(on));
  return value;
}

template <class V>
void sort_by(const Tensor& key, Tensor& sorted, const V* from, V* to, int64_t most, cudaStream_t on) {
  with_workspace(key, [&](void* space, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(space, bytes, key.const_data_ptr<int64_t>(), data(sorted), from, to,
                                           key.numel(), 0, std::max(bit_length(most), 1), on);
  });
}

struct Product {
  Tensor crow, col, values;  // crow is int64
  int64_t bytes;             // of intermediates
};

int64_t places(int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows == 0 || columns <= std::numeric_limits<int64_t>::max() / 2 / rows, "spgemm: too many places, ",
                  rows, " x ", columns);
  return rows * columns;
}

template <class I>
void check_count(int64_t nnz) {
  STD_TORCH_CHECK(nnz <= std::numeric_limits<I>::max(), "the result has ", nnz,
                  " entries, more than int32 indices can count: use int64 indices");
}

template <class I, class T>
Product inner(const Pattern& pattern, const Tensor& x, const Tensor& y, int64_t columns, cudaStream_t on) {
  const Factors<I> f = factors<I>(pattern, columns);
  auto sorted = [&](const I* start, const I* col, int64_t rows, int64_t count, int64_t width, bool transposed, int64_t most) {
    Tensor key = numbers(x, count), entry = numbers(x, count), keys = numbers(x, count), entries = numbers(x, count);
    if (!count) return std::pair{keys, entries};
    place_entries<I><<<blocks(count, THREADS), THREADS, 0, on>>>(start, col, rows, count, width, transposed, data(key), data(entry));
    check_launch("place_entries");
    sort_by<int64_t>(key, keys, data(entry), data(entries), most, on);
    return std::pair{keys, entries};
  };
  auto [a_key, a_entry] = sorted(f.a_start, f.a_col, f.rows, f.a_entries, f.inner, false, places(f.rows, f.inner));
  auto [b_key, b_entry] = sorted(f.b_start, f.b_col, f.inner, f.b_entries, f.inner, true, places(f.columns, f.inner));
  const Lines a{data(a_key), data(a_entry), f.a_entries, f.inner}, b{data(b_key), data(b_entry), f.b_entries, f.inner};
  Product c{torch::stable::new_zeros(x, {f.rows + 1}, ScalarType::Long), {}, {}, bytes_of({a_key, a_entry, b_key, b_entry})};
  auto merge = [&](int64_t* count, I* col, T* out) {
    merge_lines<I, T><<<blocks(f.rows), THREADS, 0, on>>>(a, b, f.rows, columns, x.const_data_ptr<T>(), y.const_data_ptr<T>(),
                                                          count, data(c.crow), col, out);
    check_launch("merge_lines");
  };
  int64_t nnz = 0;
  if (f.rows && columns) {
    merge(data(c.crow) + 1, nullptr, nullptr);
    add_up(x, data(c.crow) + 1, f.rows, on);
    nnz = fetch(data(c.crow) + f.rows, on);
  }
  check_count<I>(nnz);
  c.col = torch::stable::new_empty(pattern[0], {nnz});
  c.values = torch::stable::new_empty(x, {nnz});
  if (nnz) merge(nullptr, c.col.mutable_data_ptr<I>(), c.values.mutable_data_ptr<T>());
  return c;
}

template <class I, class T>
Product esc(const Pattern& pattern, const Tensor& x, const Tensor& y, int64_t columns, cudaStream_t on) {
  const Factors<I> f = factors<I>(pattern, columns);
  Product c{torch::stable::new_zeros(x, {f.rows + 1}, ScalarType::Long), torch::stable::new_empty(pattern[0], {0}),
            torch::stable::new_empty(x, {0}), 0};
  Tensor end = numbers(x, f.a_entries);
  int64_t terms = 0;
  if (f.a_entries) {
    count_terms_of_entries<I><<<blocks(f.a_entries, THREADS), THREADS, 0, on>>>(f, data(end));
    check_launch("count_terms_of_entries");
    add_up(x, data(end), f.a_entries, on);
    terms = fetch(data(end) + f.a_entries - 1, on);
  }
  if (!terms) return c;
  Tensor key = numbers(x, terms), keys = numbers(x, terms), number = numbers(x, terms);
  Tensor term = torch::stable::new_empty(x, {terms}), sorted = torch::stable::new_empty(x, {terms});
  c.bytes = bytes_of({end, key, keys, number, term, sorted});
  expand<I, T><<<blocks(f.a_entries, WARPS), THREADS, 0, on>>>(f, x.const_data_ptr<T>(), y.const_data_ptr<T>(), data(end),
                                                               data(key), term.mutable_data_ptr<T>());
  check_launch("expand");
  sort_by<T>(key, keys, term.const_data_ptr<T>(), sorted.mutable_data_ptr<T>(), places(f.rows, columns), on);
  mark_first_terms<<<blocks(terms, THREADS), THREADS, 0, on>>>(terms, data(keys), data(number));
  check_launch("mark_first_terms");
  add_up(x, data(number), terms, on);
  const int64_t nnz = fetch(data(number) + terms - 1, on);
  check_count<I>(nnz);
  c.col = torch::stable::new_empty(pattern[0], {nnz});
  c.values = torch::stable::new_empty(x, {nnz});
  compress<I, T><<<blocks(terms, THREADS), THREADS, 0, on>>>(terms, columns, data(keys), sorted.const_data_ptr<T>(), data(number),
                                                             c.col.mutable_data_ptr<I>(), c.values.mutable_data_ptr<T>());
  check_launch("compress");
  start_rows<<<blocks(f.rows + 1, THREADS), THREADS, 0, on>>>(f.rows, columns, terms, data(keys), data(number), data(c.crow));
  check_launch("start_rows");
  return c;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spgemm_dataflow(Pattern pattern, const Tensor& a, const Tensor& b,
                                                           int64_t columns, std::string method) {
  STD_TORCH_CHECK(method == "inner" || method == "esc", "method: expected inner or esc");
  check_pattern(pattern, 4);
  const Tensor x = checked("a", a, a, pattern[1]), y = checked("b", b, a, pattern[3]);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t on = stream(x);
  Product c;
  with_types(pattern, x, [&]<class I, class T>() {
    c = method == "esc" ? esc<I, T>(pattern, x, y, columns, on) : inner<I, T>(pattern, x, y, columns, on);
  });
  Tensor bytes = torch::stable::fill_(numbers(x, 1), static_cast<double>(c.bytes));
  return {torch::stable::to(c.crow, pattern[0].scalar_type()), c.col, c.values, bytes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) { m.impl("spgemm_dataflow", TORCH_BOX(&spgemm_dataflow)); }

}  // namespace torchzoo
