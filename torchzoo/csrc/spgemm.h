// What the CPU and CUDA kernels of the sparse product share: the hash functions of the row tables.
//
// A table has 2^bits slots and is probed linearly. `low` mixes the column so that neighbours part:
// few collisions, no order. `high` keeps the column's leading bits: the table comes out nearly
// sorted, but columns that share leading bits collide.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TZ_HD __host__ __device__ inline
#else
#define TZ_HD inline
#endif

namespace torchzoo {

struct Hash {
  int bits;    // log2 of the number of slots
  int shift;   // `high`: the column's bits that are dropped; `low`: -1
};

// The number of bits that hold 0 ... count - 1.
TZ_HD int bit_length(uint64_t count) {
  int bits = 0;
  while (bits < 63 && (uint64_t(1) << bits) < count) ++bits;
  return bits;
}

// A table that `entries` distinct columns out of `columns` fill to half at most.
TZ_HD Hash table_for(uint64_t entries, uint64_t columns, bool high) {
  const int bits = bit_length(2 * entries + 2), width = bit_length(columns);
  return {bits, high ? (width > bits ? width - bits : 0) : -1};
}

TZ_HD uint64_t first_slot(Hash hash, uint64_t column) {
  if (hash.shift >= 0) return column >> hash.shift;
  return (column * 0x9E3779B97F4A7C15ull) >> (64 - hash.bits);
}

}  // namespace torchzoo
