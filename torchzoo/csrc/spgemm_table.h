// One row of C = AB on the CPU by a hash table: how many columns it has, which, and what they add up to.
#pragma once

#include "spgemm_rows.h"

namespace torchzoo {

// A hash table of a row's columns. A column that is not there finds a spare place.
template <class I, class V>
struct Table {
  struct Slot {
    I key;
    V value;
  };
  Hash hash{};
  int64_t columns;
  bool high;
  std::vector<Slot> slot;
  Table(int64_t columns, bool high) : columns(columns), high(high) {}

  void resize(int64_t entries) {  // and clear
    hash = table_for(entries, columns, high);
    const size_t slots = size_t(1) << hash.bits;
    slot.assign(slots + 1, Slot{I(-1), V(0)});
  }
  Slot& find(I column) {  // its slot, or the free one that it would take
    const uint64_t wrap = (uint64_t(1) << hash.bits) - 1;
    uint64_t at = first_slot(hash, column) & wrap;
    while (slot[at].key != column && slot[at].key != I(-1)) at = (at + 1) & wrap;
    return slot[at];
  }
  template <class L>
  void open(const L* list, int64_t n) {
    resize(n);
    for (int64_t t = 0; t < n; ++t) find(list[t]).key = list[t];
  }
  V& at(I column) {
    Slot& found = find(column);
    return found.key == column ? found.value : slot.back().value;
  }
};

// Sorts by columns, with eight bits a pass where there are enough of them.
template <class I>
void sort_columns(I* list, int64_t n, std::vector<I>& spare) {
  if (n < 200) return std::sort(list, list + n);
  I low = list[0], high = list[0];
  for (int64_t t = 1; t < n; ++t) low = std::min(low, list[t]), high = std::max(high, list[t]);
  spare.resize(std::max<size_t>(spare.size(), n));
  I *from = list, *to = spare.data();
  for (int shift = 0; uint64_t(high - low) >> shift; shift += 8, std::swap(from, to)) {
    int64_t place[257] = {};
    for (int64_t t = 0; t < n; ++t) ++place[((from[t] - low) >> shift & 255) + 1];
    for (int digit = 0; digit < 255; ++digit) place[digit + 1] += place[digit];
    for (int64_t t = 0; t < n; ++t) to[place[(from[t] - low) >> shift & 255]++] = from[t];
  }
  if (from != list) std::copy_n(from, n, list);
}

template <class I, class T>
int64_t count_by_table(const Factors<I>& f, int64_t i, int64_t terms, Table<I, T>& table) {
  table.resize(std::min(terms, f.columns));
  int64_t n = 0;
  for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
    prefetch<I, T>(f, p, nullptr);
    const RowOf<I>& row = f.met(p);
    for (I q = row.start; q < row.start + row.length; ++q) {
      I& key = table.find(f.b_col[q]).key;
      n += key == I(-1);
      key = f.b_col[q];
    }
  }
  return n;
}

// Lists the columns of row i, in order where `sort`, and adds up their terms in the table.
template <int bytes, bool summed, class I, class T>
TZ_INLINE void merge_by_table(const Factors<I>& f, int64_t i, int64_t count, const T* x, const T* y,
                              Table<I, T>& table, bool sort, std::vector<I>& spare, I* list) {
  table.resize(count);
  int64_t n = 0;
  for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
    prefetch(f, p, summed ? y : nullptr);
    const RowOf<I>& row = f.met(p);
    for (I q = row.start; q < row.start + row.length; ++q) {
      auto& slot = table.find(f.b_col[q]);
      if (slot.key == I(-1)) slot.key = list[n++] = f.b_col[q];
      if (summed) slot.value = add_product<bytes>(slot.value, x[p], y[q]);
    }
  }
  if (sort) sort_columns(list, n, spare);
}

}  // namespace torchzoo
