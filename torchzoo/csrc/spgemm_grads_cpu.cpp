// Derivatives of C = AB for values on known patterns, and the best term of each entry, on the CPU.
#include "spgemm_problem.h"
#include "spgemm_table.h"

namespace torchzoo {
namespace {

// Calls row(i, find) for every row that `next` hands out; find(column) is its place in the row of C, or
// -1. The places are kept from row to row: `-1` only has to come out where reading would go astray.
template <class I, class O, class Next, class Row>
void with_places(const Problem<I, O>& problem, const O* start, const O* list, const Next& next, const Row& row) {
  const int64_t columns = problem.f.columns;
  const bool wide = columns > WIDE;
  std::vector<int64_t> place(wide ? 0 : columns + 1);
  Table<I, int64_t> table(columns, false);
  int64_t begin, end;
  while (next(begin, end)) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = start[i + 1] - start[i];
      const O* mine = list + start[i];
      if (wide) {
        table.open(mine, n);
        for (int64_t t = 0; t < n; ++t) table.at(mine[t]) = t;
        row(i, [&](I j) { return table.at(j) < n ? table.at(j) : -1; });
      } else {
        for (int64_t t = 0; t < n; ++t) place[std::min<uint64_t>(mine[t], columns)] = t;
        row(i, [&](I j) { return place[j] < n ? place[j] : -1; });
      }
    }
  }
}

// da_p = the sum over the row of B that p meets of b_q g_(p, q).
Tensor spgemm_grad_a(Pattern pattern, const Tensor& b, const Tensor& grad, int64_t columns) {
  const Tensor y = checked("b", b, b, pattern.at(3)), g = checked("grad", grad, b, pattern.at(5));
  Tensor out = fresh(y, {pattern.at(1).numel()});
  on_pattern(pattern, y, columns, [&]<class O, class I, class T>(const auto& problem, const O* start, const O* list) {
    const T *ys = y.const_data_ptr<T>(), *gs = g.const_data_ptr<T>();
    T* da = out.mutable_data_ptr<T>();
    const Factors<I>& f = problem.f;
    share_out(problem.work, [&](const auto& next) {
      with_places(problem, start, list, next, [&](int64_t i, const auto& find) {
        for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
          const RowOf<I>& row = f.b[f.a_col[p]];
          T sum = 0;
          for (I q = row.start; q < row.start + row.length; ++q)
            if (const int64_t t = find(f.b_col[q]); t >= 0) sum += ys[q] * gs[start[i] + t];
          da[p] = sum;
        }
      });
    });
  });
  return out;
}

// db_q = the sum over the rows of A that meet q of a_p g_(p, q). Each thread owns a run of rows of B and
// goes through A for them, so there are no atomics, and the sums are in the order of A's rows.
Tensor spgemm_grad_b(Pattern pattern, const Tensor& a, const Tensor& grad, int64_t columns) {
  const Tensor x = checked("a", a, a, pattern.at(1)), g = checked("grad", grad, a, pattern.at(5));
  Tensor out = torch::stable::new_zeros(x, {pattern.at(3).numel()});
  on_pattern(pattern, x, columns, [&]<class O, class I, class T>(const auto& problem, const O* start, const O* list) {
    const T *xs = x.const_data_ptr<T>(), *gs = g.const_data_ptr<T>();
    T* db = out.mutable_data_ptr<T>();
    const Factors<I>& f = problem.f;
    std::vector<int64_t> work(pattern[2].numel(), 0);
    for (int64_t p = 0; p < pattern[1].numel(); ++p) work[f.a_col[p] + 1] += f.b[f.a_col[p]].length;
    for (size_t k = 0; k + 1 < work.size(); ++k) work[k + 1] += work[k];
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), work.back() >> 16));
    auto owner = [&](int64_t t) -> int64_t {  // the first row of B of thread t
      if (t == threads) return work.size() - 1;
      return std::lower_bound(work.begin(), work.end(), work.back() / threads * t) - work.begin();
    };
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const int64_t low = owner(begin), high = owner(end);
      bool done = false;
      const auto all = [&](int64_t& from, int64_t& to) { from = 0, to = f.rows; return !std::exchange(done, true); };
      with_places(problem, start, list, all, [&](int64_t i, const auto& find) {
        for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
          if (f.a_col[p] < low || f.a_col[p] >= high) continue;
          const RowOf<I>& row = f.b[f.a_col[p]];
          for (I q = row.start; q < row.start + row.length; ++q)
            if (const int64_t t = find(f.b_col[q]); t >= 0) db[q] += xs[p] * gs[start[i] + t];
        }
      });
    });
  });
  return out;
}

// For each entry of C the term (p, q) with the least a_p + b_q or, where `product`, the greatest
// a_p b_q; NaN before all else, then the lowest inner index.
std::tuple<Tensor, Tensor> spgemm_select(Pattern pattern, const Tensor& a, const Tensor& b, int64_t columns,
                                         bool product) {
  const Tensor x = checked("a", a, a, pattern.at(1)), y = checked("b", b, a, pattern.at(3));
  Tensor from_a = torch::stable::new_zeros(x, {pattern.at(5).numel()}, ScalarType::Long);
  Tensor from_b = torch::stable::new_zeros(x, {pattern.at(5).numel()}, ScalarType::Long);
  on_pattern(pattern, x, columns, [&]<class O, class I, class T>(const auto& problem, const O* start, const O* list) {
    const T *xs = x.const_data_ptr<T>(), *ys = y.const_data_ptr<T>();
    int64_t *ps = from_a.mutable_data_ptr<int64_t>(), *qs = from_b.mutable_data_ptr<int64_t>();
    const Factors<I>& f = problem.f;
    auto value = [&](int64_t p, int64_t q) { return product ? -(xs[p] * ys[q]) : xs[p] + ys[q]; };
    share_out(problem.work, [&](const auto& next) {
      std::vector<uint8_t> met;
      with_places(problem, start, list, next, [&](int64_t i, const auto& find) {
        met.assign(start[i + 1] - start[i], 0);
        for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
          const RowOf<I>& row = f.b[f.a_col[p]];
          for (I q = row.start; q < row.start + row.length; ++q) {
            const int64_t t = find(f.b_col[q]);
            if (t < 0) continue;
            const int64_t at = start[i] + t;
            const T mine = value(p, q), best = value(ps[at], qs[at]);
            const bool same = mine == best || (mine != mine && best != best);
            const bool better = same ? f.a_col[p] < f.a_col[ps[at]] : mine < best || (mine != mine && best == best);
            if (met[t] && !better) continue;
            met[t] = 1, ps[at] = p, qs[at] = q;
          }
        }
      });
    });
  });
  return {from_a, from_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("spgemm_grad_a", TORCH_BOX(&spgemm_grad_a));
  m.impl("spgemm_grad_b", TORCH_BOX(&spgemm_grad_b));
  m.impl("spgemm_select", TORCH_BOX(&spgemm_select));
}

}  // namespace torchzoo
