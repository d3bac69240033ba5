// One row of C = AB on the CPU with few terms: these are sorted, in registers, by column and then by the
// order in which they are added up. Unlike masks and arrays of sums this touches nothing but the terms.
#pragma once

#include "gemm.h"
#include "spgemm_problem.h"
#include "spgemm_rows.h"

namespace torchzoo {

constexpr int64_t FEW = 128;  // terms
constexpr int FEW_BITS = 7;
static_assert(FEW == 1 << FEW_BITS && WIDE << FEW_BITS <= std::numeric_limits<int32_t>::max());

typedef int32_t Eight __attribute__((vector_size(32)));

TZ_INLINE void order(Eight& a, Eight& b) {
  const Eight low = a < b ? a : b;
  b = a < b ? b : a;
  a = low;
}

// Orders the lanes that are `distance` apart.
template <int distance, size_t... lane>
TZ_INLINE void order_lanes(Eight& v, std::index_sequence<lane...>) {
  Eight low = v, high = __builtin_shufflevector(v, v, (lane ^ distance)...);
  order(low, high);
  v = __builtin_shufflevector(low, high, (lane & distance ? 8 + lane : lane)...);
}

// Merges two sorted halves of n vectors, bitonically.
template <int n>
TZ_INLINE void merge_halves(Eight* v) {
  constexpr auto lanes = std::make_index_sequence<8>();
#pragma GCC unroll 8
  for (int i = 0; i < n / 2; ++i) v[n / 2 + i] = __builtin_shufflevector(v[n / 2 + i], v[n / 2 + i], 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int i = 0; i < n / 4; ++i) std::swap(v[n / 2 + i], v[n - 1 - i]);
#pragma GCC unroll 4
  for (int distance = n / 2; distance; distance /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if (!(i & distance)) order(v[i], v[i + distance]);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) order_lanes<4>(v[i], lanes), order_lanes<2>(v[i], lanes), order_lanes<1>(v[i], lanes);
}

// Sorts 64 keys.
TZ_INLINE void sort_block(Eight* v) {
  constexpr int pairs[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma GCC unroll 19
  for (int t = 0; t < 19; ++t) order(v[pairs[t][0]], v[pairs[t][1]]);
  transpose_from<1, 8>(v);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) merge_halves<2>(v + i);
  merge_halves<4>(v);
  merge_halves<4>(v + 4);
  merge_halves<8>(v);
}

template <class T>
struct Terms {  // of one row: column << FEW_BITS | place, and both factors by place
  alignas(32) int32_t key[FEW];
  T x[FEW], y[FEW];
};

// Lists the terms of row i, sorted; returns how many columns they have.
template <int bytes, class I, class T>
TZ_INLINE int64_t sort_terms(const Factors<I>& f, int64_t i, const T* x, const Packed<I, T>& y, Terms<T>& terms) {
  int32_t count = 0;
  for (I p = f.a_begin(i); p < f.a_end(i); ++p) {
    prefetch(f, p, y);
    const RowOf<I>& b = f.met(p);
    const typename Packed<I, T>::Column* __restrict col = y.columns(b);
    const typename Packed<I, T>::Value* __restrict value = y.values(b);
    for (I q = 0; q < b.length; ++q, ++count) {
      terms.key[count] = static_cast<int32_t>(col[q]) << FEW_BITS | count;
      terms.x[count] = x[p];
      terms.y[count] = value[q];
    }
  }
  const int blocks = count <= 64 ? 1 : 2;
  std::fill(terms.key + count, terms.key + 64 * blocks, std::numeric_limits<int32_t>::max());
  typedef Eight Keys __attribute__((may_alias));
  Keys* keys = reinterpret_cast<Keys*>(terms.key);
  Eight v[16];
  for (int block = 0; block < blocks; ++block) {
    std::copy_n(keys + 8 * block, 8, v);
    sort_block(v);
    std::copy_n(v, 8, keys + 8 * block);
  }
  if (blocks == 2) {
    std::copy_n(keys, 16, v);
    merge_halves<16>(v);
    std::copy_n(v, 16, keys);
  }
  int64_t columns = count > 0;
  for (int t = 1; t < count; ++t) columns += (terms.key[t] ^ terms.key[t - 1]) >> FEW_BITS != 0;
  return columns;
}

// Writes the columns of sorted terms and their sums.
template <int bytes, class T, class O>
TZ_INLINE void add_sorted(const Terms<T>& terms, int64_t count, O* __restrict columns, T* __restrict sums) {
  int32_t last = -1;
  int64_t n = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int32_t column = terms.key[t] >> FEW_BITS, place = terms.key[t] & (FEW - 1);
    const bool more = column == last;
    n += !more;
    columns[n - 1] = last = column;
    sums[n - 1] = add_product<bytes>(more ? sums[n - 1] : T(0), terms.x[place], terms.y[place]);
  }
}

}  // namespace torchzoo
