// C = AB of sparse matrices on the CPU, row by row, in two passes: how many entries each row has, then
// their columns and sums.
//
// Rows go to threads as tokens of about equal numbers of terms, so a hub row doesn't hold up the rest.
// Counting costs less than keeping the columns would, as fresh memory is dear, so that besides C a row
// takes a number, and a thread what it needs for one row. Where hardly any terms meet, their number is
// known well enough beforehand, and up to two threads do without counting: from the row where half of the
// work is done, one goes up and the other down, and what they write lies side by side. The terms of an
// entry are added in the order of A's row, so that bits depend neither on threads nor on the way chosen.
#include "spgemm_problem.h"
#include "spgemm_sort.h"
#include "spgemm_table.h"

namespace torchzoo {
namespace {

struct How {
  bool table, high, sort;
};

template <int bytes, class I, class T>
TZ_INLINE void count_rows_body(const Factors<I>* f, int64_t begin, int64_t end, Row<I, T>* row, int64_t* count) {
  for (int64_t i = begin; i < end; ++i) count[i] = count_row<bytes>(*f, i, *row);
}
TZ_ISA(count_rows, count_rows_body)

// Where each row of C starts.
template <class T, class I, class O>
std::vector<int64_t> start_rows(const Problem<I, O>& problem, How how) {
  std::vector<int64_t> start(problem.f.rows + 1);
  share_out(problem.work, [&](const auto& next) {
    Row<I, T> row(how.table ? 0 : problem.f.columns, false);
    Table<I, T> table(problem.f.columns, how.high);
    Meeting<I> meeting;
    int64_t begin, end;
    while (next(begin, end)) {
      const Factors<I> f = meeting.of(problem.f, begin, end);
      if (!how.table) count_rows(&f, begin, end, &row, start.data() + 1);
      for (int64_t i = begin; how.table && i < end; ++i)
        start[i + 1] = count_by_table(f, i, problem.terms(i), table);
    }
  });
  for (int64_t i = 0; i < problem.f.rows; ++i) start[i + 1] += start[i];
  return start;
}

struct Place {  // where rows of C go: to their starts, where these are known, else next to the last one
  const int64_t* start;
  int64_t* count;
  int64_t at;
  bool down;
  int64_t operator()(int64_t i, int64_t n) {
    if (start) return start[i];
    count[i] = n;
    at += down ? -n : n;
    return down ? at : at - n;
  }
};

// Writes the columns of rows of C and, where x is given, their values.
template <int bytes, class I, class T, class O>
TZ_INLINE void fill_rows_body(const Factors<I>* f, Place* place, int64_t begin, int64_t end, const T* x,
                              const Packed<I, T>* y, Row<I, T>* row, O* __restrict col, T* __restrict out) {
  const I* __restrict list = row->list.get();
  T* __restrict sum = row->sum.data();
  Terms<T> terms;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t i = place->down ? begin + end - 1 - r : r;
    const Span span = span_of(*f, i);
    if (span.solid) {
      const int64_t n = span.high - span.low + 1, at = (*place)(i, n);
      for (int64_t t = 0; t < n; ++t) col[at + t] = span.low + t;
      if (!x) continue;
      go_through_row<bytes, Marks::none, true>(*f, i, x, y, *row);
      std::copy_n(sum + span.low, n, out + at);
      std::fill_n(sum + span.low, n, T(0));
      continue;
    }
    if (x && span.terms <= FEW && !span.dense()) {
      const int64_t n = sort_terms<bytes>(*f, i, x, *y, terms), at = (*place)(i, n);
      add_sorted<bytes>(terms, span.terms, col + at, out + at);
      continue;
    }
    if (x && !span.dense()) {
      const int64_t n = rank_row<bytes>(*f, i, span, *y, *row), at = (*place)(i, n);
      fill_ranked<bytes>(*f, i, span, x, *y, n, place->down ? -n : n, *row, col + at, out + at);
      continue;
    }
    const int64_t n = x ? merge_row<bytes, true>(*f, i, span, x, y, *row) : merge_row<bytes, false>(*f, i, span, x, y, *row);
    const int64_t at = (*place)(i, n);
    for (int64_t t = 0; t < n; ++t) col[at + t] = list[t];
    for (int64_t t = 0; x && t < n; ++t) {
      out[at + t] = sum[list[t]];
      sum[list[t]] = 0;
    }
  }
}
TZ_ISA(fill_rows, fill_rows_body)

// The same by hash tables.
template <int bytes, class I, class T, class O>
TZ_INLINE void fill_rows_by_table_body(const Factors<I>* f, const int64_t* start, int64_t begin, int64_t end, const T* x,
                                       const T* y, Table<I, T>* table, bool sort, O* __restrict col, T* __restrict out) {
  std::vector<I> list, spare;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = start[i], n = start[i + 1] - at;
    list.resize(std::max<size_t>(list.size(), n));
    if (x) merge_by_table<bytes, true>(*f, i, n, x, y, *table, sort, spare, list.data());
    else merge_by_table<bytes, false>(*f, i, n, x, y, *table, sort, spare, list.data());
    for (int64_t t = 0; t < n; ++t) {
      col[at + t] = list[t];
      if (x) out[at + t] = table->at(list[t]);
    }
  }
}
TZ_ISA(fill_rows_by_table, fill_rows_by_table_body)

// out = the sums of rows of C whose columns are known.
template <int bytes, class I, class T, class O>
TZ_INLINE void sum_rows_body(const Factors<I>* f, const O* start, const O* list, int64_t begin, int64_t end,
                             const T* x, const Packed<I, T>* y, Row<I, T>* row, T* __restrict out) {
  T* __restrict sum = row->sum.data();
  const uint64_t last = row->sum.size() - 1;  // keeps a wrong list inside the array
  for (int64_t i = begin; i < end; ++i) {
    go_through_row<bytes, Marks::none, true>(*f, i, x, y, *row);
    for (int64_t t = start[i]; t < start[i + 1]; ++t) {
      const uint64_t j = std::min<uint64_t>(list[t], last);
      out[t] = sum[j];
      sum[j] = 0;
    }
  }
}
TZ_ISA(sum_rows, sum_rows_body)

template <int bytes, class I, class T, class O>
TZ_INLINE void sum_rows_by_table_body(const Factors<I>* f, const O* start, const O* list, int64_t begin, int64_t end,
                                      const T* x, const T* y, Table<I, T>* table, T* out) {
  for (int64_t i = begin; i < end; ++i) {
    table->open(list + start[i], start[i + 1] - start[i]);
    for (I p = f->a_begin(i); p < f->a_end(i); ++p) {
      prefetch(*f, p, y);
      const RowOf<I>& row = f->met(p);
      for (I q = row.start; q < row.start + row.length; ++q) {
        T& sum = table->at(f->b_col[q]);
        sum = add_product<bytes>(sum, x[p], y[q]);
      }
    }
    for (int64_t t = start[i]; t < start[i + 1]; ++t) out[t] = table->at(list[t]);
  }
}
TZ_ISA(sum_rows_by_table, sum_rows_by_table_body)

// Whether nearly every term is an entry of its own, going by some rows.
template <class T, class I, class O>
bool hardly_merges(const Problem<I, O>& problem) {
  constexpr int64_t SAMPLE = 64;
  const int64_t rows = problem.f.rows, step = std::max<int64_t>(1, rows / SAMPLE);
  Row<I, T> row(problem.f.columns, false);
  Meeting<I> meeting;
  int64_t terms = 0, entries = 0;
  for (int64_t i = step / 2; i < rows; i += step) {
    const Factors<I> f = meeting.of(problem.f, i, i + 1);
    entries += count_row<16>(f, i, row);
    terms += problem.terms(i);
  }
  return terms && entries >= terms / 10 * 9;
}

template <class T>
struct Product {  // columns and values of C, not yet there
  Tensor col, out;
  Product(const Pattern& pattern, const Tensor& like, int64_t nnz, bool summed)
      : col(fresh(pattern[0], {nnz})),
        out(fresh(like, {summed ? nnz : 0})) {}
  void keep(int64_t begin, int64_t length) {
    col = torch::stable::narrow(col, 0, begin, length);
    if (out.numel()) out = torch::stable::narrow(out, 0, begin, length);
  }
};

// All rows in one pass; writes how many entries each has. There is room for a column a term.
template <class T, class I, class O>
void fill_unmerged(const Problem<I, O>& problem, int64_t threads, const T* x, const Packed<I, T>& y, int64_t* count,
                   Product<T>& c) {
  const int64_t rows = problem.f.rows, all = problem.work.back(), half = threads == 1 ? 0 : row_at(problem.work, all / 2);
  int64_t below = 0;
  for (int64_t i = 0; i < half; ++i) below += problem.terms(i);
  O* col = c.col.template mutable_data_ptr<O>();
  T* out = c.out.template mutable_data_ptr<T>();
  Place places[2] = {{nullptr, count, below, false}, {nullptr, count, below, true}};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Row<I, T> row(problem.f.columns, x);
      Meeting<I> meeting;
      for (int64_t at = half, next; at != (t ? 0 : rows); at = next) {
        const int64_t done = problem.work[at];
        next = t ? std::min(at - 1, row_at(problem.work, done - TOKEN)) : std::max(at + 1, row_at(problem.work, done + TOKEN));
        const int64_t low = std::min(at, next), high = std::max(at, next);
        const Factors<I> f = meeting.of(problem.f, low, high);
        fill_rows(&f, &places[t], low, high, x, &y, &row, col, out);
      }
    }
  });
  c.keep(places[1].at, places[0].at - places[1].at);
}

// The pattern of C, and its values where a and b are given.
std::tuple<Tensor, Tensor, Tensor> multiply(const Pattern& pattern, const Tensor& like, const Tensor* a,
                                            const Tensor* b, int64_t columns, How how) {
  Tensor crow = fresh(pattern[0], {pattern[0].numel()}), col, out;
  how.table |= columns > WIDE;
  with_indices(pattern, columns, [&]<class O, class I>() {
    const Problem<I, O> problem(pattern, columns);
    with_values(like, [&]<class T>() {
      const int64_t rows = problem.f.rows, threads = threads_for(problem.work);
      const T *x = a ? a->const_data_ptr<T>() : nullptr, *y = b ? b->const_data_ptr<T>() : nullptr;
      const Packed<I, T> packed(problem.f, problem.inner, pattern[3].numel(), how.table ? nullptr : y);
      std::vector<int64_t> start(rows + 1);
      int64_t terms = 0;
      for (int64_t i = 0; i < rows; ++i) terms += problem.terms(i);
      const bool one_pass = !how.table && threads <= 2 && terms <= std::numeric_limits<O>::max() && hardly_merges<T>(problem);
      if (!one_pass) start = start_rows<T>(problem, how);
      const int64_t nnz = one_pass ? terms : start.back();
      STD_TORCH_CHECK(nnz <= std::numeric_limits<O>::max(), "the result has ", nnz,
                      " entries, more than int32 indices can count: use int64 indices");
      Product<T> c(pattern, like, nnz, a);
      if (one_pass) {
        fill_unmerged(problem, threads, x, packed, start.data() + 1, c);
        for (int64_t i = 0; i < rows; ++i) start[i + 1] += start[i];
      } else {
        O* cols = c.col.template mutable_data_ptr<O>();
        T* sums = c.out.template mutable_data_ptr<T>();
        share_out(problem.work, [&](const auto& next) {
          Row<I, T> row(how.table ? 0 : columns, a);
          Table<I, T> table(columns, how.high);
          Place place{start.data(), nullptr, 0, false};
          Meeting<I> meeting;
          int64_t begin, end;
          while (next(begin, end)) {
            const Factors<I> f = meeting.of(problem.f, begin, end);
            if (how.table) fill_rows_by_table(&f, start.data(), begin, end, x, y, &table, how.sort, cols, sums);
            else fill_rows(&f, &place, begin, end, x, &packed, &row, cols, sums);
          }
        });
      }
      std::copy(start.begin(), start.end(), crow.mutable_data_ptr<O>());
      col = c.col, out = c.out;
    });
  });
  return {crow, col, out};
}

std::tuple<Tensor, Tensor, Tensor> spgemm(Pattern pattern, const Tensor& a, const Tensor& b, int64_t columns,
                                          bool table, bool high, bool sort) {
  STD_TORCH_CHECK(pattern.size() == 4, "pattern: expected 4 tensors");
  const Tensor x = checked("a", a, a, pattern[1]), y = checked("b", b, a, pattern[3]);
  return multiply(pattern, x, &x, &y, columns, {table, high, sort});
}

std::tuple<Tensor, Tensor> spgemm_pattern(Pattern pattern, int64_t columns) {
  STD_TORCH_CHECK(pattern.size() == 4, "pattern: expected 4 tensors");
  const Tensor like = fresh(pattern[0], {0}, ScalarType::Float);
  auto [crow, col, none] = multiply(pattern, like, nullptr, nullptr, columns, {false, false, true});
  return {crow, col};
}

Tensor spgemm_values(Pattern pattern, const Tensor& a, const Tensor& b, int64_t columns) {
  const Tensor x = checked("a", a, a, pattern.at(1)), y = checked("b", b, a, pattern.at(3));
  Tensor out;
  on_pattern(pattern, x, columns, [&]<class O, class I, class T>(const auto& problem, const O* start, const O* list) {
    const T *xs = x.const_data_ptr<T>(), *ys = y.const_data_ptr<T>();
    out = fresh(x, {pattern[5].numel()});
    T* sums = out.mutable_data_ptr<T>();
    const bool wide = columns > WIDE;
    const Packed<I, T> packed(problem.f, problem.inner, pattern[3].numel(), wide ? nullptr : ys);
    share_out(problem.work, [&](const auto& next) {
      Row<I, T> row(wide ? 0 : columns, true);
      Table<I, T> table(columns, false);
      Meeting<I> meeting;
      int64_t begin, end;
      while (next(begin, end)) {
        const Factors<I> f = meeting.of(problem.f, begin, end);
        if (wide) sum_rows_by_table(&f, start, list, begin, end, xs, ys, &table, sums);
        else sum_rows(&f, start, list, begin, end, xs, &packed, &row, sums);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("spgemm", TORCH_BOX(&spgemm));
  m.impl("spgemm_pattern", TORCH_BOX(&spgemm_pattern));
  m.impl("spgemm_values", TORCH_BOX(&spgemm_values));
}

}  // namespace torchzoo
