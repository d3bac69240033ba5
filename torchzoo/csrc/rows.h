// Products with chosen rows of a matrix on the CPU: dot products with them, and weighted sums of them.
//
// The order of additions is fixed: within a dot product it depends on the length alone, within a sum
// it is that of the rows, so neither the number of threads nor what else is computed beside a token
// changes a bit of its result. Half-precision rows are widened as they are read.
#pragma once

#include <atomic>
#include <span>
#include <type_traits>

#include "gemm.h"

namespace torchzoo {

constexpr int ROWS = 4;         // rows read side by side
constexpr int64_t AHEAD = 16;   // rows whose first lines are asked for beforehand
constexpr int64_t RUNS = 8;     // stretches of work a thread
constexpr int64_t SPAN = 1024;  // elements of a row that stay in L1

// acc[0 : n] += Σ_r coefficient[r]·rows[r][0 : n].
template <int bytes, int count, class T, class W>
TZ_INLINE void add_rows(const T* coefficient, const W* const* rows, T* __restrict acc, int64_t n) {
  const W* w[count];
  T c[count];
  for (int r = 0; r < count; ++r) w[r] = rows[r], c[r] = coefficient[r];
  for (int64_t o = 0; o < n; ++o) {
    T sum = acc[o];
    for (int r = 0; r < count; ++r) sum += c[r] * static_cast<T>(w[r][o]);
    acc[o] = sum;
  }
}

// acc[0 : n] += Σ_j coefficient[j]·(row `index[j]` of weight)[0 : n], in the order of j.
template <int bytes, class T, class W>
TZ_INLINE void accumulate_body(const T* coefficient, const int64_t* index, int64_t count,
                               const W* weight, int64_t stride, T* acc, int64_t n) {
  const W* rows[ROWS];
  int64_t j = 0, asked = 0;
  for (; j + ROWS <= count; j += ROWS) {
    for (; asked < std::min(count, j + AHEAD); ++asked)  // each row is on a page of its own
      for (int line = 0; line < 4; ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(weight + index[asked] * stride) + 64 * line);
    for (int r = 0; r < ROWS; ++r) rows[r] = weight + index[j + r] * stride;
    add_rows<bytes, ROWS>(coefficient + j, rows, acc, n);
  }
  for (; j < count; ++j) {
    rows[0] = weight + index[j] * stride;
    add_rows<bytes, 1>(coefficient + j, rows, acc, n);
  }
}
TZ_ISA(accumulate, accumulate_body)

// sums[r·stride + t] += w[r][0 : n]·x[t][0 : n], each by the same steps whatever is beside it.
template <int bytes, int rows, int tokens, class T>
TZ_INLINE void dot_span(const T* const* w, const T* const* x, int64_t n, T* sums, int64_t stride) {
  using Vec = typename Tile<bytes, T>::Vec;
  using Loose = typename Tile<bytes, T>::Loose;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  constexpr int ways = 2;
  Vec partial[rows][tokens][ways] = {};
  int64_t k = 0;
  for (; k + ways * lanes <= n; k += ways * lanes)
    for (int v = 0; v < ways; ++v)
      for (int r = 0; r < rows; ++r)
        for (int t = 0; t < tokens; ++t)
          partial[r][t][v] += *reinterpret_cast<const Loose*>(w[r] + k + v * lanes) *
                              *reinterpret_cast<const Loose*>(x[t] + k + v * lanes);
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < tokens; ++t) {
      const Vec both = partial[r][t][0] + partial[r][t][1];
      T sum = 0;
      for (int64_t l = 0; l < lanes; ++l) sum += both[l];
      for (int64_t j = k; j < n; ++j) sum += w[r][j] * x[t][j];
      sums[r * stride + t] += sum;
    }
  }
}

// sums[r·count + t] = row[r][0 : n]·(row `tokens[t]` of x)[0 : n].
//
// Several rows are read side by side, as one stream alone does not fill the memory's bandwidth.
template <int bytes, int rows, class T, class W>
TZ_INLINE void dots_of(const W* const* row, const T* x, const int64_t* tokens, int64_t count,
                       int64_t n, T* sums) {
  constexpr int together = ROWS / rows;
  T wide[rows][SPAN];
  const T *w[rows], *columns[together];
  std::fill_n(sums, rows * count, T(0));
  for (int64_t k = 0; k < n; k += SPAN) {
    const int64_t length = std::min(SPAN, n - k);
    for (int r = 0; r < rows; ++r) {
      if constexpr (std::is_same_v<T, W>) {
        w[r] = row[r] + k;
      } else {
        for (int64_t j = 0; j < length; ++j) wide[r][j] = static_cast<T>(row[r][k + j]);
        w[r] = wide[r];
      }
    }
    int64_t t = 0;
    for (; t + together <= count; t += together) {
      for (int c = 0; c < together; ++c) columns[c] = x + tokens[t + c] * n + k;
      dot_span<bytes, rows, together>(w, columns, length, sums + t, count);
    }
    for (; t < count; ++t) {
      columns[0] = x + tokens[t] * n + k;
      dot_span<bytes, rows, 1>(w, columns, length, sums + t, count);
    }
  }
}

template <int bytes, class T, class W>
TZ_INLINE void dots_body(const W* const* row, int64_t rows, const T* x, const int64_t* tokens,
                         int64_t count, int64_t n, T* sums) {
  if (rows == ROWS) return dots_of<bytes, ROWS>(row, x, tokens, count, n, sums);
  for (int64_t r = 0; r < rows; ++r)
    dots_of<bytes, 1>(row + r, x, tokens, count, n, sums + r * count);
}
TZ_ISA(dots, dots_body)

// Which pairs (token, neuron) count, seen from one side: `of(i)` are the partners of i, in order.
struct Pairs {
  std::vector<int64_t> starts, partners;
  bool all = false;  // every i has all `partners`
  std::span<const int64_t> of(int64_t i) const {
    if (all) return partners;
    return std::span(partners).subspan(starts[i], starts[i + 1] - starts[i]);
  }
  bool alike(int64_t i, int64_t j) const {
    return all || std::ranges::equal(of(i), of(j));
  }
  int64_t before(int64_t i) const { return all ? i * static_cast<int64_t>(partners.size()) : starts[i]; }
};

inline Pairs all_pairs(int64_t partners) {
  Pairs pairs{{}, std::vector<int64_t>(partners), true};
  for (int64_t j = 0; j < partners; ++j) pairs.partners[j] = j;
  return pairs;
}

// Calls visit(row, column) for each true entry, row by row.
template <class Visit>
void for_true(const bool* active, int64_t rows, int64_t columns, const Visit& visit) {
  for (int64_t i = 0; i < rows; ++i, active += columns) {
    int64_t j = 0;
    for (uint64_t eight; j + 8 <= columns; j += 8) {
      std::memcpy(&eight, active + j, 8);
      if (!eight) continue;
      for (int64_t c = j; c < j + 8; ++c)
        if (active[c]) visit(i, c);
    }
    for (; j < columns; ++j)
      if (active[j]) visit(i, j);
  }
}

inline Pairs pairs_by_row(const bool* active, int64_t rows, int64_t columns) {
  Pairs pairs{std::vector<int64_t>(rows + 1, 0), {}};
  for_true(active, rows, columns, [&](int64_t i, int64_t j) {
    pairs.partners.push_back(j);
    ++pairs.starts[i + 1];
  });
  for (int64_t i = 0; i < rows; ++i) pairs.starts[i + 1] += pairs.starts[i];
  return pairs;
}

inline Pairs pairs_by_column(const bool* active, int64_t rows, int64_t columns) {
  Pairs pairs{std::vector<int64_t>(columns + 2, 0), {}};
  for_true(active, rows, columns, [&](int64_t, int64_t j) { ++pairs.starts[j + 2]; });
  for (int64_t j = 0; j < columns; ++j) pairs.starts[j + 2] += pairs.starts[j + 1];
  pairs.partners.resize(pairs.starts.back());
  for_true(active, rows, columns,
           [&](int64_t i, int64_t j) { pairs.partners[pairs.starts[j + 1]++] = i; });
  pairs.starts.pop_back();
  return pairs;
}

// Calls run(task) for every task; threads take the next one as they get free, so that one that is
// held up holds up one task.
template <class Run>
void for_tasks(int64_t tasks, const Run& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next++) < tasks;) run(task);
  });
}

// Calls run(first, last) for stretches of [0, count) with about equally many pairs.
template <class Run>
void for_equal_runs(const Pairs& pairs, int64_t count, const Run& run) {
  const int64_t runs = std::min<int64_t>(RUNS * torch::stable::get_num_threads(), count);
  auto cost = [&](int64_t i) { return static_cast<double>(pairs.before(i)) + 0.05 * static_cast<double>(i); };
  auto first = [&](int64_t t) {
    if (t == runs) return count;
    const double share = cost(count) * static_cast<double>(t) / static_cast<double>(runs);
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < share) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  for_tasks(runs, [&](int64_t task) { run(first(task), first(task + 1)); });
}

}  // namespace torchzoo
