// A product of sparse matrices as the CPU kernels take it: checked, described row by row, shared out.
#pragma once

#include <atomic>
#include <memory>
#include <type_traits>

#include "spgemm_rows.h"

namespace torchzoo {

constexpr int64_t WIDE = int64_t(1) << 20;  // columns above which rows go into hash tables

using Pattern = std::vector<Tensor>;  // crow and col of A, of B and, where it is known, of C

template <class O>
void check_rows(const char* name, const Tensor& crow, const Tensor& col) {
  const int64_t rows = crow.numel() - 1, nnz = col.numel();
  STD_TORCH_CHECK(rows >= 0 && crow.dim() == 1 && col.dim() == 1 && crow.is_contiguous() &&
                      col.is_contiguous() && col.scalar_type() == crow.scalar_type(),
                  name, ": expected contiguous row starts and columns of one type");
  const O* start = crow.const_data_ptr<O>();
  bool good = start[0] == 0 && start[rows] == nnz;
  for (int64_t i = 0; i < rows; ++i) good &= start[i] <= start[i + 1];
  STD_TORCH_CHECK(good, name, ": row starts decrease or don't span its ", nnz, " entries");
}

template <class I, class O>
struct Side {  // A or B: checked columns of type I, copied where the tensor's are wider, and its rows
  Array<I> copy;
  Array<RowOf<I>> rows;
  const I* col;

  Side(const char* name, const Tensor& crow, const Tensor& cols, int64_t limit) {
    check_rows<O>(name, crow, cols);
    const int64_t count = crow.numel() - 1, nnz = cols.numel();
    const O *start = crow.const_data_ptr<O>(), *from = cols.const_data_ptr<O>();
    if constexpr (std::is_same_v<I, O>) col = from;
    else copy = Array<I>(nnz), col = copy.get();
    rows = Array<RowOf<I>>(count);
    std::atomic<bool> good{true};
    parallel_for(0, count, std::max<int64_t>(1, (int64_t(1) << 16) * count / (nnz + 1)), [&](int64_t begin, int64_t end) {
      bool inside = true;
      for (int64_t k = begin; k < end; ++k) {
        O low = std::numeric_limits<O>::max(), high = -1;
        bool increasing = true;
        for (O q = start[k]; q < start[k + 1]; ++q) {
          if constexpr (!std::is_same_v<I, O>) copy.get()[q] = static_cast<I>(from[q]);
          increasing &= from[q] > high;
          low = std::min(low, from[q]);
          high = std::max(high, from[q]);
        }
        const I length = start[k + 1] - start[k];
        if (!length) low = high = 0;
        else inside &= low >= 0 && high < limit;
        if (!increasing && high - low + 1 == length) ++high;  // a wider bound, not taken for a run
        rows.get()[k] = {I(start[k]), length, I(low), I(high)};
      }
      if (!inside) good = false;
    });
    STD_TORCH_CHECK(good, name, ": columns outside [0, ", limit, ")");
  }
};

template <class I, class O>
struct Problem {
  std::unique_ptr<Side<I, O>> a, b;
  Factors<I> f;
  int64_t inner;
  std::vector<int64_t> work;  // running sum over rows of A of the terms and what else a row costs

  Problem(const Pattern& pattern, int64_t columns) : work(pattern[0].numel()) {
    const int64_t rows = pattern[0].numel() - 1;
    inner = pattern[2].numel() - 1;
    a = std::make_unique<Side<I, O>>("a", pattern[0], pattern[1], inner);
    const bool square = columns == inner && pattern[1].data_ptr() == pattern[3].data_ptr() &&
                        pattern[0].data_ptr() == pattern[2].data_ptr() && rows == inner;
    if (!square) b = std::make_unique<Side<I, O>>("b", pattern[2], pattern[3], columns);
    const Side<I, O>& right = square ? *a : *b;
    f = {a->rows.get(), a->col, right.rows.get(), right.col, rows, columns, nullptr, 0, 0};
    parallel_for(0, rows, 1 << 13, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t terms = extra(i);
        for (I p = f.a_begin(i); p < f.a_end(i); ++p) terms += f.b[f.a_col[p]].length;
        work[i + 1] = terms;
      }
    });
    for (int64_t i = 0; i < rows; ++i) work[i + 1] += work[i];
  }
  int64_t extra(int64_t i) const { return 4 + 2 * int64_t(f.a[i].length); }
  int64_t terms(int64_t i) const { return work[i + 1] - work[i] - extra(i); }
};

// How many threads work that is given as a running sum is worth.
inline int64_t threads_for(const std::vector<int64_t>& work) {
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), work.back() >> 16));
}

constexpr int64_t TOKEN = 1 << 17;  // work of a run of rows: what these need at once stays in the cache

// The row where a share of the work is done.
inline int64_t row_at(const std::vector<int64_t>& work, int64_t share) {
  return std::lower_bound(work.begin(), work.end() - 1, share) - work.begin();
}

// Runs `body(next)` on each thread; `next(begin, end)` hands out the next run of rows, of about equal
// work, until there are none.
template <class Body>
void share_out(const std::vector<int64_t>& work, const Body& body) {
  const int64_t rows = work.size() - 1;
  if (!rows) return;
  const int64_t threads = threads_for(work);
  const int64_t tokens = std::max(threads == 1 ? 1 : 16 * threads, work.back() / TOKEN);
  auto first = [&](int64_t token) -> int64_t {
    if (token == tokens) return rows;
    return row_at(work, static_cast<int64_t>(static_cast<double>(work.back()) / tokens * token));
  };
  std::atomic<int64_t> taken{0};
  auto next = [&](int64_t& begin, int64_t& end) {
    const int64_t token = taken.fetch_add(1);
    if (token >= tokens) return false;
    begin = first(token), end = first(token + 1);
    return true;
  };
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(next);
  });
}

// Calls op.operator()<O, I>(): the type of the pattern's indices, and one that holds all of them.
template <class Op>
void with_indices(const Pattern& pattern, int64_t columns, const Op& op) {
  for (const Tensor& t : pattern)
    STD_TORCH_CHECK(t.scalar_type() == pattern[0].scalar_type(), "expected indices of one type");
  STD_TORCH_CHECK(columns >= 0, "columns: expected a number >= 0, got ", columns);
  int64_t most = columns;
  for (int t = 0; t < 4; ++t) most = std::max(most, pattern[t].numel());
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() - SLACK;
  if (pattern[0].scalar_type() == ScalarType::Int) return op.template operator()<int32_t, int32_t>();
  STD_TORCH_CHECK(pattern[0].scalar_type() == ScalarType::Long, "expected int32 or int64 indices");
  if (most < limit) return op.template operator()<int64_t, int32_t>();
  op.template operator()<int64_t, int64_t>();
}

template <class Op>
void with_values(const Tensor& values, const Op& op) {
  if (values.scalar_type() == ScalarType::Float) return op.template operator()<float>();
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Double, "expected float32 or float64 values");
  op.template operator()<double>();
}

inline Tensor checked(const char* name, const Tensor& values, const Tensor& like, const Tensor& entries) {
  STD_TORCH_CHECK(values.dim() == 1 && values.numel() == entries.numel() &&
                      values.scalar_type() == like.scalar_type(),
                  name, ": expected one value an entry, all of one type");
  return torch::stable::contiguous(values);
}

// What the operators on a known pattern of C share: op.operator()<O, I, T>(problem, start of C's rows,
// columns of C's entries).
template <class Op>
void on_pattern(const Pattern& pattern, const Tensor& values, int64_t columns, const Op& op) {
  STD_TORCH_CHECK(pattern.size() == 6, "pattern: expected 6 tensors");
  STD_TORCH_CHECK(pattern[4].numel() == pattern[0].numel(), "c: expected as many rows as a");
  with_indices(pattern, columns, [&]<class O, class I>() {
    check_rows<O>("c", pattern[4], pattern[5]);
    const Problem<I, O> problem(pattern, columns);
    with_values(values, [&]<class T>() {
      op.template operator()<O, I, T>(problem, pattern[4].const_data_ptr<O>(), pattern[5].const_data_ptr<O>());
    });
  });
}

}  // namespace torchzoo
