// One row of C = AB on the CPU, in a mask and an array of sums: how many columns it has, which, and what
// they add up to. A matrix so wide that both would leave the cache takes a hash table: spgemm_table.h.
//
// Columns are met as bits of a mask and read off in order, so sorting costs nothing extra; what a row
// leaves in the mask and in the sums is cleared as it is read, so neither is ever swept. The terms of an
// entry are added in the order of A's row.
#pragma once

#include <array>
#include <limits>
#include <memory>
#include <optional>

#include "cpu.h"
#include "spgemm.h"

namespace torchzoo {

template <class T>
struct Array {  // like a vector, but not filled
  std::unique_ptr<T[]> data;
  explicit Array(int64_t n = 0) : data(new T[n]) {}
  T* get() const { return data.get(); }
};

template <class I>
struct RowOf {
  I start, length;
  I low, high;  // bounds of its columns; high - low + 1 == length only if they are low, ..., high
  bool run() const { return high - low + 1 == length; }
};

template <class I>
struct Factors {  // the patterns of A (rows, k) and B (k, columns)
  const RowOf<I>* a;
  const I* a_col;
  const RowOf<I>* b;
  const I* b_col;
  int64_t rows, columns;
  const RowOf<I>* meeting;  // the rows of B that A's entries first ... last meet: read in order, unlike b
  I first, last;
  const RowOf<I>& met(I p) const { return meeting[p - first]; }
  I a_begin(int64_t i) const { return a[i].start; }
  I a_end(int64_t i) const { return a[i].start + a[i].length; }
};

template <class I>
struct Meeting {  // makes Factors for runs of rows, which are used before the next are made
  std::vector<RowOf<I>> rows;
  Factors<I> of(Factors<I> f, int64_t begin, int64_t end) {
    if (begin == end) return f;
    f.first = f.a_begin(begin), f.last = f.a_end(end - 1) - 1;
    rows.resize(std::max<size_t>(rows.size(), f.last - f.first + 1));
    for (I p = f.first; p <= f.last; ++p) rows[p - f.first] = f.b[f.a_col[p]];
    f.meeting = rows.data();
    return f;
  }
};

// sum + x y, rounded once where the instruction set of `bytes` can. Said outright: left to the compiler,
// one loop would round once and another twice, and tables and arrays would give different bits.
template <int bytes, class T>
TZ_INLINE T add_product(T sum, T x, T y) {
#if defined(__x86_64__)
  if constexpr (bytes == 16) return sum + x * y;
#endif
  if constexpr (sizeof(T) == 4) return __builtin_fmaf(x, y, sum);
  else return __builtin_fma(x, y, sum);
}

// B's entries row by row, each row's columns and then its values: a short row is one place in memory. Where
// most rows are runs, which need no columns and are met in order, they stay where they are.
template <class I, class T>
struct Packed {
  typedef T Value __attribute__((aligned(alignof(I) < alignof(T) ? alignof(I) : alignof(T)), may_alias));
  typedef I Column __attribute__((may_alias));
  static constexpr size_t size = sizeof(I) + sizeof(T);
  std::optional<Workspace<char>> data;
  const I* plain_columns;
  const T* plain_values;

  Packed(const Factors<I>& f, int64_t rows, int64_t entries, const T* y) : plain_columns(f.b_col), plain_values(y) {
    int64_t runs = 0;
    for (int64_t k = 0; y && k < rows; ++k) runs += f.b[k].run();
    if (!y || 2 * runs > rows) return;
    data.emplace(entries * size);
    parallel_for(0, rows, 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const RowOf<I>& row = f.b[k];
        if (!row.length) continue;
        std::memcpy(at(row), f.b_col + row.start, row.length * sizeof(I));
        std::memcpy(at(row) + row.length * sizeof(I), y + row.start, row.length * sizeof(T));
      }
    });
  }
  char* at(const RowOf<I>& row) const { return data->get() + row.start * size; }
  const Column* columns(const RowOf<I>& row) const {
    return data ? reinterpret_cast<const Column*>(at(row)) : plain_columns + row.start;
  }
  const Value* values(const RowOf<I>& row) const {
    return data ? reinterpret_cast<const Value*>(at(row) + row.length * sizeof(I)) : plain_values + row.start;
  }
};

// Asks for what is needed a few terms later, as rows of B are read in no order.
template <class I, class T>
TZ_INLINE void prefetch(const Factors<I>& f, I p, const Packed<I, T>& y) {
  if (!y.data) return;
  const char* row = y.at(f.met(std::min<I>(p + 6, f.last)));
  __builtin_prefetch(row);
  __builtin_prefetch(row + 64);
}

template <class I, class T>
TZ_INLINE void prefetch(const Factors<I>& f, I p, const T* y) {
  const I q = f.met(std::min<I>(p + 6, f.last)).start;
  __builtin_prefetch(f.b_col + q);
  __builtin_prefetch(f.b_col + q + 15);
  if (y) {
    __builtin_prefetch(y + q);
    __builtin_prefetch(y + q + 15);
  }
}

constexpr std::array<std::array<uint8_t, 8>, 256> places_of_bits() {
  std::array<std::array<uint8_t, 8>, 256> place{};
  for (int byte = 0; byte < 256; ++byte)
    for (int bit = 0, n = 0; bit < 8; ++bit)
      if (byte >> bit & 1) place[byte][n++] = bit;
  return place;
}
inline constexpr auto bit_places = places_of_bits();
constexpr int64_t SLACK = 64;  // `read_mask` may write this far past what it counts

// Writes the places of the bits of words first ... last in order, clears them, and counts them.
// The first `usual` bits of a word are written whether they are there or not: no branch to mispredict.
template <int bytes, int usual, class I>
TZ_INLINE int64_t read_mask(uint64_t* __restrict mask, int64_t first, int64_t last, bool dense,
                            I* __restrict out) {
  int64_t n = 0;
  for (int64_t word = first; word <= last; ++word) {
    uint64_t bits = mask[word];
    mask[word] = 0;
    I base = static_cast<I>(word << 6);
    if (dense) {
      typedef I Lanes __attribute__((vector_size(8 * sizeof(I))));
      typedef Lanes Loose __attribute__((aligned(sizeof(I)), may_alias));
      typedef uint8_t Places __attribute__((vector_size(8)));
      for (int part = 0; part < 64; part += 8, base += 8) {
        const uint8_t byte = bits >> part;
        Places places;
        std::memcpy(&places, bit_places[byte].data(), 8);
        *reinterpret_cast<Loose*>(out + n) = __builtin_convertvector(places, Lanes) + base;
        n += __builtin_popcount(byte);
      }
      continue;
    }
    const int count = __builtin_popcountll(bits);
    for (int t = 0; t < usual; ++t, bits &= bits - 1) out[n + t] = base + __builtin_ctzll(bits | uint64_t(1) << 63);
    for (int t = usual; t < count; ++t, bits &= bits - 1) out[n + t] = base + __builtin_ctzll(bits);
    n += count;
  }
  return n;
}

template <class I, class T>
struct Row {  // what a thread keeps for its rows; all clear between rows, but for the lists
  std::vector<uint64_t> met, words;  // a bit a column, and a bit a word of those
  std::vector<T> sum;                // of each column, and a spare one
  Array<I> touched, list;            // words, and columns, in order
  Array<I> before;                   // how many columns lie in words before, of each word
  int64_t touched_count = 0;
  Row(int64_t columns, bool summed)
      : met(columns / 64 + 2),
        words(columns / 4096 + 2),
        sum(summed ? columns + 1 : 0),
        touched(columns / 64 + 2 + SLACK),
        list(columns + SLACK),
        before(columns / 64 + 2) {}
};

struct Span {  // where the columns of a row of C lie
  int64_t low, high;    // no column is outside these
  int64_t first, last;  // words of the mask
  int64_t terms;
  bool solid;      // they are low, ..., high
  bool scattered;  // over many more words than there are terms
  bool dense() const { return terms > 6 * (last - first + 1); }
};

template <class I>
TZ_INLINE Span span_of(const Factors<I>& f, int64_t i) {
  int64_t low = std::numeric_limits<int64_t>::max(), high = 0, terms = 0;
  bool solid = true;
  for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
    const RowOf<I>& row = f.met(p);
    solid &= row.length && row.run() && (!terms || (row.low <= high + 1 && row.high >= low - 1));
    terms += row.length;
    low = std::min<int64_t>(low, row.low);
    high = std::max<int64_t>(high, row.high);
  }
  if (!terms) low = 0;
  const int64_t first = low >> 6, last = high >> 6;
  return {low, high, first, last, terms, solid && terms, last - first > 3 * terms};
}

template <class I>
TZ_INLINE void mark_run(uint64_t* __restrict met, I low, I high) {
  const I begin = low >> 6, end = high >> 6;
  const uint64_t head = ~uint64_t(0) << (low & 63), tail = ~uint64_t(0) >> (63 - (high & 63));
  met[begin] |= begin == end ? head & tail : head;
  for (I word = begin + 1; word < end; ++word) met[word] = ~uint64_t(0);
  if (end > begin) met[end] |= tail;
}

enum class Marks { none, columns, words };  // `words`: columns, and the words that these are in

// Marks the columns of row i and, where `summed`, adds up their terms.
template <int bytes, Marks marks, bool summed, class I, class T>
TZ_INLINE void go_through_row(const Factors<I>& f, int64_t i, const T* x, const Packed<I, T>* y, Row<I, T>& row) {
  uint64_t *__restrict met = row.met.data(), *__restrict words = row.words.data();
  T* __restrict sum = row.sum.data();
  for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
    if (y) prefetch(f, p, *y);
    else prefetch<I, T>(f, p, nullptr);
    const RowOf<I>& b = f.met(p);
    const typename Packed<I, T>::Column* __restrict col = y ? y->columns(b) : f.b_col + b.start;
    const typename Packed<I, T>::Value* __restrict value = summed ? y->values(b) : nullptr;
    if (marks != Marks::words && b.length && b.run()) {
      if (marks == Marks::columns) mark_run(met, b.low, b.high);
      if (summed)
        for (I q = 0; q < b.length; ++q) sum[b.low + q] = add_product<bytes>(sum[b.low + q], x[p], value[q]);
      continue;
    }
    for (I q = 0; q < b.length; ++q) {
      if (marks != Marks::none) met[col[q] >> 6] |= uint64_t(1) << (col[q] & 63);
      if (marks == Marks::words) words[col[q] >> 12] |= uint64_t(1) << ((col[q] >> 6) & 63);
      if (summed) sum[col[q]] = add_product<bytes>(sum[col[q]], x[p], value[q]);
    }
  }
}

// The number of columns of row i.
template <int bytes, class I, class T>
TZ_INLINE int64_t count_row(const Factors<I>& f, int64_t i, Row<I, T>& row) {
  uint64_t* __restrict met = row.met.data();
  const Span span = span_of(f, i);
  if (span.solid) return span.high - span.low + 1;
  int64_t n = 0;
  if (!span.scattered) {
    if (!span.terms) return 0;
    go_through_row<bytes, Marks::columns, false, I, T>(f, i, nullptr, nullptr, row);
    for (int64_t word = span.first; word <= span.last; ++word) n += __builtin_popcountll(met[word]), met[word] = 0;
    return n;
  }
  for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
    prefetch<I, T>(f, p, nullptr);
    const RowOf<I>& b = f.met(p);
    for (I q = b.start; q < b.start + b.length; ++q) {
      uint64_t& word = met[f.b_col[q] >> 6];
      n += ~(word >> (f.b_col[q] & 63)) & 1;
      word |= uint64_t(1) << (f.b_col[q] & 63);
    }
  }
  for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
    const RowOf<I>& b = f.met(p);
    for (I q = b.start; q < b.start + b.length; ++q) met[f.b_col[q] >> 6] = 0;
  }
  return n;
}

// Lists the columns of row i in `row.list` and, where `summed`, adds up their terms in `row.sum`.
template <int bytes, bool summed, class I, class T>
TZ_INLINE int64_t merge_row(const Factors<I>& f, int64_t i, const Span& span, const T* x, const Packed<I, T>* y,
                            Row<I, T>& row) {
  uint64_t *__restrict met = row.met.data(), *__restrict words = row.words.data();
  I *__restrict touched = row.touched.get(), *__restrict list = row.list.get();
  if (!span.terms) return 0;
  if (!span.scattered) {
    go_through_row<bytes, Marks::columns, summed>(f, i, x, y, row);
    return read_mask<bytes, 2>(met, span.first, span.last, span.dense(), list);
  }
  go_through_row<bytes, Marks::words, summed>(f, i, x, y, row);
  const int64_t count = read_mask<bytes, 4>(words, span.first >> 6, span.last >> 6, false, touched);
  int64_t n = 0;
  for (int64_t t = 0; t < count; ++t) n += read_mask<bytes, 1>(met, touched[t], touched[t], false, list + n);
  return n;
}

// Marks the columns of row i, and counts them up to each word that they are in: a column's place in the
// row is then that count and the number of bits below its own.
template <int bytes, class I, class T>
TZ_INLINE int64_t rank_row(const Factors<I>& f, int64_t i, const Span& span, const Packed<I, T>& y, Row<I, T>& row) {
  const uint64_t* __restrict met = row.met.data();
  I *__restrict before = row.before.get(), *__restrict touched = row.touched.get();
  int64_t n = 0;
  if (!span.scattered) {
    go_through_row<bytes, Marks::columns, false, I, T>(f, i, nullptr, &y, row);
    for (int64_t word = span.first; word <= span.last; ++word) before[word] = n, n += __builtin_popcountll(met[word]);
    return n;
  }
  go_through_row<bytes, Marks::words, false, I, T>(f, i, nullptr, &y, row);
  const int64_t count = read_mask<bytes, 4>(row.words.data(), span.first >> 6, span.last >> 6, false, touched);
  for (int64_t t = 0; t < count; ++t) before[touched[t]] = n, n += __builtin_popcountll(met[touched[t]]);
  row.touched_count = count;
  return n;
}

// Asks for n elements that will be written.
template <class T>
TZ_INLINE void ask_for(T* out, int64_t n) {
  for (int64_t t = 0; t < n; t += 64 / sizeof(T)) __builtin_prefetch(out + t, 1);
}

// Adds the terms of a row that `rank_row` went through right to their places in C, and clears the mask.
template <int bytes, class I, class T, class O>
TZ_INLINE void fill_ranked(const Factors<I>& f, int64_t i, const Span& span, const T* x, const Packed<I, T>& y,
                           int64_t n, int64_t ahead, Row<I, T>& row, O* __restrict columns, T* __restrict sums) {
  uint64_t* __restrict met = row.met.data();
  const I *__restrict before = row.before.get(), *__restrict touched = row.touched.get();
  ask_for(columns + ahead, n);
  ask_for(sums + ahead, n);
  std::fill_n(sums, n, T(0));
  for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
    const RowOf<I>& b = f.met(p);
    const typename Packed<I, T>::Column* __restrict col = y.columns(b);
    const typename Packed<I, T>::Value* __restrict value = y.values(b);
    for (I q = 0; q < b.length; ++q) {
      const I word = col[q] >> 6;
      const int64_t at = before[word] + __builtin_popcountll(met[word] & ((uint64_t(1) << (col[q] & 63)) - 1));
      columns[at] = col[q];
      sums[at] = add_product<bytes>(sums[at], x[p], value[q]);
    }
  }
  if (span.scattered)
    for (int64_t t = 0; t < row.touched_count; ++t) met[touched[t]] = 0;
  else
    std::fill(met + span.first, met + span.last + 1, 0);
}

}  // namespace torchzoo
