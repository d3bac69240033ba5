// What the two directions of log_einsum_exp do on a block of rows that stays in cache.
//
// A sum runs over the terms (i, j) of left and right, flattened, in chunks of CHUNK: a chunk's
// products p_i q_j are a small matrix (rows, terms), or q itself where there is no left. The order of
// additions depends on the number of terms only: not on threads, nor on where a row lies in a batch.
#pragma once

#include "exp.h"
#include "gemm.h"
#include "log.h"
#include "log_einsum_exp.h"

#include <limits>
#include <memory>
#include <new>

namespace torchzoo {

constexpr int64_t CHUNK = 256;        // terms of a sum that are added up at once
constexpr int64_t IN_CACHE = 16384;   // numbers of a block
constexpr int64_t MOST_ROWS = 96;     // a multiple of MR, as the fewest

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

inline int64_t rows_of_block(const Sizes& n) {
  const int64_t width = n.k1 + n.k2 + n.sums + std::min(CHUNK, n.terms());
  return std::clamp<int64_t>(IN_CACHE / width / MR * MR, 2 * MR, MOST_ROWS);
}

template <class T>
class Scratch {  // zeros, aligned to cache lines
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::vector<std::unique_ptr<T, Free>> held;

 public:
  T* take(int64_t size) {
    void* data = ::operator new(size * sizeof(T), std::align_val_t(64));
    std::memset(data, 0, size * sizeof(T));
    held.emplace_back(static_cast<T*>(data));
    return held.back().get();
  }
};

struct Chunk {  // terms first .. first + count, in `width` columns from `at` on
  int64_t first, count, width, at;
};

struct Chunks {
  std::vector<Chunk> list;
  int64_t width = 0;  // of all of them

  Chunks(const Sizes& n, int64_t step) {
    const int64_t most = n.k2 > CHUNK ? n.k2 : CHUNK / n.k2 * n.k2;
    for (int64_t first = 0; first < n.terms(); first += most)
      for (int64_t j = first; j < std::min(first + most, n.terms()); j += CHUNK) {
        const int64_t count = std::min({CHUNK, first + most - j, n.terms() - j});
        list.push_back({j, count, round_up(count, step), width});
        width += list.back().width;
      }
  }
};

template <class T>
struct Operands {
  Sizes n;
  const T *left, *right, *w;  // left may be null
  int64_t rows;               // of a block
  const T* left_row(int64_t row) const { return left ? left + row * n.k1 : nullptr; }
  const T* right_row(int64_t row) const { return right + row * n.k2; }
  const T* w_row(int64_t fold, int64_t sum) const { return w + (fold * n.sums + sum) * n.terms(); }
};

template <int bytes, class T>
TZ_INLINE T largest_of(const T* x, int64_t size) {
  using Vec = typename Tile<bytes, T>::Vec;
  using Loose = typename Tile<bytes, T>::Loose;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  T found = -std::numeric_limits<T>::infinity();
  int64_t i = 0;
  if (size >= lanes) {
    Vec most = *reinterpret_cast<const Loose*>(x);
    for (i = lanes; i + lanes <= size; i += lanes) {
      const Vec v = *reinterpret_cast<const Loose*>(x + i);
      most = v > most ? v : most;
    }
    for (int64_t l = 0; l < lanes; ++l) found = most[l] > found ? most[l] : found;
  }
  for (; i < size; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

template <int bytes, class T>
TZ_INLINE void exponentials(T* x, int64_t padded) {
  using Vec = typename Tile<bytes, T>::Vec;
#pragma GCC unroll 2
  for (int64_t i = 0; i < padded; i += Tile<bytes, T>::lanes)
    exponentiate_normal(*reinterpret_cast<Vec*>(x + i));
}

template <int bytes, bool normal, class T>
TZ_INLINE void logarithms(T* x, int64_t padded) {
  using Vec = typename Tile<bytes, T>::Vec;
#pragma GCC unroll 2
  for (int64_t i = 0; i < padded; i += Tile<bytes, T>::lanes)
    logarithm<normal>(*reinterpret_cast<Vec*>(x + i));
}

// Whether any lane of a comparison is true.
template <int bytes, class Mask>
TZ_INLINE bool any(const Mask& mask) {
  const auto words = (typename Tile<bytes, int64_t>::Vec)mask;
  int64_t found = 0;
  for (int l = 0; l < bytes / 8; ++l) found |= words[l];
  return found;
}

// to = x - m, minus infinity in the padding; m, the largest x, is 0 if that is minus infinity.
template <int bytes, class T>
TZ_INLINE T scaled(const T* __restrict x, int64_t size, T* __restrict to, int64_t padded) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  using Loose = typename Tile<bytes, T>::Loose;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  const T most = largest_of<bytes>(x, size), m = most == nothing ? T(0) : most;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    *reinterpret_cast<Loose*>(to + i) = *reinterpret_cast<const Loose*>(x + i) - m;
  for (; i < size; ++i) to[i] = x[i] - m;
  for (; i < padded; ++i) to[i] = nothing;
  return m;
}

template <int bytes, class T>
struct Block {  // p, q and m of some rows
  int64_t ldp, ldq, ldx;
  T *p, *q, *m, *x;

  Block(const Operands<T>& of, Scratch<T>& scratch) {
    constexpr int64_t nr = Tile<bytes, T>::nr;
    ldp = of.left ? round_up(of.n.k1, nr) : 0;
    ldq = round_up(of.n.k2, nr);
    ldx = of.left ? round_up(std::min(of.n.terms(), CHUNK), nr) : ldq;
    p = scratch.take(of.rows * ldp);
    q = scratch.take(of.rows * ldq);
    m = scratch.take(of.rows);
    x = of.left ? scratch.take(of.rows * ldx) : nullptr;
  }
};

template <int bytes, class T>
TZ_INLINE void load(const Operands<T>& of, int64_t first, int64_t count, const Block<bytes, T>& b) {
  for (int64_t r = 0; r < count; ++r) {
    b.m[r] = scaled<bytes>(of.right_row(first + r), of.n.k2, b.q + r * b.ldq, b.ldq);
    if (of.left) b.m[r] += scaled<bytes>(of.left_row(first + r), of.n.k1, b.p + r * b.ldp, b.ldp);
  }
  exponentials<bytes>(b.q, count * b.ldq);
  exponentials<bytes>(b.p, count * b.ldp);
}

// The products of a chunk, (count, chunk.count) with rows of ldx.
template <int bytes, class T>
TZ_INLINE const T* products(const Operands<T>& of, const Chunk& chunk, int64_t count,
                            const Block<bytes, T>& b) {
  if (!of.left) return b.q + chunk.first;
  const int64_t j = chunk.first % of.n.k2, length = std::min(of.n.k2, chunk.count);
  for (int64_t r = 0; r < count; ++r) {
    const T *p = b.p + r * b.ldp + chunk.first / of.n.k2, *q = b.q + r * b.ldq + j;
    T* __restrict to = b.x + r * b.ldx;
    for (int64_t at = 0; at < chunk.count; at += length, ++p)
      for (int64_t c = 0; c < length; ++c) to[at + c] = *p * q[c];
  }
  return b.x;
}

// The logarithm of what s must not be below, lest an element is computed with care.
template <class T>
inline T log_limit(const T* w, int64_t terms) {
  T most = 1;
  for (int64_t t = 0; t < terms; ++t) most = w[t] > most ? w[t] : most;
  return std::log(T(SMALLEST) * most);
}

// to = log w, minus infinity in the padding.
template <int bytes, class T>
TZ_INLINE void log_weights(const T* w, int64_t terms, T* to) {
  const int64_t padded = round_up(terms, Tile<bytes, T>::lanes);
  std::memcpy(to, w, terms * sizeof(T));
  std::fill(to + terms, to + padded, T(0));
  logarithms<bytes, false>(to, padded);
}

template <class T>
inline void add_pairs(const T* left, const T* right, const Sizes& n, T* terms) {
  for (int64_t i = 0; i < n.k1; ++i) {
    const T a = left ? left[i] : T(0);
    for (int64_t j = 0; j < n.k2; ++j) terms[i * n.k2 + j] += a + right[j];
  }
}

}  // namespace torchzoo
