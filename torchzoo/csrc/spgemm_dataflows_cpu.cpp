// The two dataflows that row-wise merging is measured against, on the same threads.
//
// `inner`: each entry of C by merging a row of A with a column of B, for every pair whose ranges meet;
// A and B are read once for each row and column of C. `esc` (expand, sort, compress): all terms are
// stored, sorted within rows, and summed; the terms take Σ u_i entries of memory. Sorting within rows
// is kinder to it than one sort over all terms would be.
#include "spgemm_problem.h"

namespace torchzoo {
namespace {

template <class I, class T>
struct Entry {
  I col;
  T value;
};

// Rows of entries sorted by column, from a matrix or its transpose.
template <class I, class T>
struct Sorted {
  std::vector<int64_t> start;
  std::vector<Entry<I, T>> entry;

  // Transposes; done twice, it sorts. `each(visit)` calls visit(row, col, value) in order of rows.
  template <class Each>
  Sorted(int64_t rows_out, int64_t entries, const Each& each) : start(rows_out + 1), entry(entries) {
    each([&](int64_t, int64_t col, T) { ++start[col + 1]; });
    for (int64_t j = 0; j < rows_out; ++j) start[j + 1] += start[j];
    std::vector<int64_t> at(start.begin(), start.end() - 1);
    each([&](int64_t row, int64_t col, T value) { entry[at[col]++] = {I(row), value}; });
  }
  auto each() const {
    return [this](const auto& visit) {
      for (size_t j = 0; j + 1 < start.size(); ++j)
        for (int64_t p = start[j]; p < start[j + 1]; ++p) visit(j, entry[p].col, entry[p].value);
    };
  }
  size_t bytes() const { return start.size() * sizeof(int64_t) + entry.size() * sizeof(entry[0]); }
};

template <class I, class T>
auto each_entry(const RowOf<I>* rows, int64_t count, const I* col, const T* value) {
  return [=](const auto& visit) {
    for (int64_t i = 0; i < count; ++i)
      for (I p = rows[i].start; p < rows[i].start + rows[i].length; ++p) visit(i, col[p], value[p]);
  };
}

template <class I, class T>
struct Rows {  // of C, where they were computed
  std::vector<const Entry<I, T>*> first;
  std::vector<int64_t> count;
  std::vector<std::vector<Entry<I, T>>> each;
  Array<Entry<I, T>> all;
  size_t bytes = 0;  // of intermediates
};

template <class I, class T, class O>
void inner(const Problem<I, O>& problem, int64_t a_entries, int64_t b_entries, const T* x, const T* y, Rows<I, T>& c) {
  const Factors<I>& f = problem.f;
  const int64_t k = problem.inner;
  c.each.resize(f.rows);
  const Sorted<I, T> at(k, a_entries, each_entry(f.a, f.rows, f.a_col, x));
  const Sorted<I, T> a(f.rows, a_entries, at.each());
  const Sorted<I, T> b(f.columns, b_entries, each_entry(f.b, k, f.b_col, y));  // columns of B
  share_out(problem.work, [&](const auto& next) {
    int64_t begin, end;
    while (next(begin, end)) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t a_end = a.start[i + 1];
        if (a.start[i] == a_end) continue;
        for (int64_t j = 0; j < f.columns; ++j) {
          int64_t p = a.start[i], q = b.start[j];
          const int64_t b_end = b.start[j + 1];
          if (q == b_end || a.entry[a_end - 1].col < b.entry[q].col || b.entry[b_end - 1].col < a.entry[p].col)
            continue;
          T sum = 0;
          bool met = false;
          while (p < a_end && q < b_end) {
            const I u = a.entry[p].col, v = b.entry[q].col;
            if (u == v) sum += a.entry[p].value * b.entry[q].value, met = true;
            p += u <= v;
            q += v <= u;
          }
          if (met) c.each[i].push_back({I(j), sum});
        }
        c.first[i] = c.each[i].data(), c.count[i] = c.each[i].size();
      }
    }
  });
  c.bytes = at.bytes() + a.bytes() + b.bytes();
}

template <class I, class T, class O>
void esc(const Problem<I, O>& problem, const T* x, const T* y, Rows<I, T>& c) {
  const Factors<I>& f = problem.f;
  std::vector<int64_t> start(f.rows + 1);
  for (int64_t i = 0; i < f.rows; ++i) start[i + 1] = start[i] + problem.terms(i);
  c.all = Array<Entry<I, T>>(start.back());
  c.bytes = start.back() * sizeof(Entry<I, T>);
  share_out(problem.work, [&](const auto& next) {
    int64_t begin, end;
    while (next(begin, end)) {
      Entry<I, T>* out = c.all.get() + start[begin];
      for (I p = f.a_begin(begin); p < (begin < end ? f.a_end(end - 1) : f.a_begin(begin)); ++p) {
        const RowOf<I>& row = f.b[f.a_col[p]];
        for (I q = row.start; q < row.start + row.length; ++q) *out++ = {f.b_col[q], x[p] * y[q]};
      }
    }
  });
  share_out(problem.work, [&](const auto& next) {
    int64_t begin, end;
    while (next(begin, end)) {
      for (int64_t i = begin; i < end; ++i) {
        Entry<I, T>*first = c.all.get() + start[i], *last = c.all.get() + start[i + 1];
        std::stable_sort(first, last, [](const auto& u, const auto& v) { return u.col < v.col; });
        Entry<I, T>* out = first;
        for (const Entry<I, T>* p = first; p < last; ++p) {
          if (p > first && out[-1].col == p->col) out[-1].value += p->value;
          else *out++ = *p;
        }
        c.first[i] = first, c.count[i] = out - first;
      }
    }
  });
}

// C, and the bytes of what was stored on the way to it.
std::tuple<Tensor, Tensor, Tensor, Tensor> spgemm_dataflow(Pattern pattern, const Tensor& a, const Tensor& b,
                                                           int64_t columns, std::string method) {
  STD_TORCH_CHECK(pattern.size() == 4, "pattern: expected 4 tensors");
  STD_TORCH_CHECK(method == "inner" || method == "esc", "method: expected inner or esc");
  const Tensor x = checked("a", a, a, pattern[1]), y = checked("b", b, a, pattern[3]);
  Tensor crow = fresh(pattern[0], {pattern[0].numel()}), col, out;
  Tensor bytes = fresh(pattern[0], {1}, ScalarType::Long);
  with_indices(pattern, columns, [&]<class O, class I>() {
    const Problem<I, O> problem(pattern, columns);
    with_values(x, [&]<class T>() {
      Rows<I, T> c;
      c.first.resize(problem.f.rows), c.count.resize(problem.f.rows);
      const T *xs = x.const_data_ptr<T>(), *ys = y.const_data_ptr<T>();
      if (method == "esc") esc(problem, xs, ys, c);
      else inner(problem, pattern[1].numel(), pattern[3].numel(), xs, ys, c);
      *bytes.mutable_data_ptr<int64_t>() = c.bytes;
      O* start = crow.mutable_data_ptr<O>();
      start[0] = 0;
      for (int64_t i = 0; i < problem.f.rows; ++i) start[i + 1] = start[i] + c.count[i];
      col = fresh(pattern[0], {start[problem.f.rows]});
      out = fresh(x, {start[problem.f.rows]});
      O* cols = col.mutable_data_ptr<O>();
      T* values = out.mutable_data_ptr<T>();
      share_out(problem.work, [&](const auto& next) {
        int64_t begin, end;
        while (next(begin, end))
          for (int64_t i = begin; i < end; ++i)
            for (int64_t t = 0; t < c.count[i]; ++t)
              cols[start[i] + t] = c.first[i][t].col, values[start[i] + t] = c.first[i][t].value;
      });
    });
  });
  return {crow, col, out, bytes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) { m.impl("spgemm_dataflow", TORCH_BOX(&spgemm_dataflow)); }

}  // namespace torchzoo
