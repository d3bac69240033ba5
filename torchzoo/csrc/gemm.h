// A small matrix product, C = A·B, for one thread: the tile that the grouped product shares out
// among threads. Half precision is widened on packing, so sums are float32 (float64 for float64).
//
// Three ways, chosen by shape, all with the same tile of MR rows and two vectors of columns:
// - packed: panels of B (KC×NR) are copied to stay in L1; a block of A (MC×KC), which stays in L2, is copied
//   where its rows are not contiguous;
// - direct: few rows or a short inner dimension, where copying would cost as much as the product:
//   B streams past in rows, DEPTH of them at a time;
// - dots: few rows and B contiguous along the inner dimension.
// The order of additions to one element of C depends on the shapes only, never on the threads.
#pragma once

#include "cpu.h"

#include <functional>
#include <type_traits>

namespace torchzoo {

using Done = std::function<void(int64_t first, int64_t rows)>;  // these rows of C are complete, and in cache

constexpr int64_t KC = 256;    // inner dimension of a packed block
constexpr int64_t MC = 96;     // its rows, a multiple of MR
constexpr int64_t MR = 6;      // rows of a tile
constexpr int64_t DEPTH = 8;   // rows of B that stream at once
constexpr int64_t SHORT = 16;  // up to which packing doesn't pay

template <class T>
struct Matrix {  // a view: element (i, j) is at data[i * row + j * col]
  const T* data;
  int64_t row, col;
  const T& operator()(int64_t i, int64_t j) const { return data[i * row + j * col]; }
  Matrix from(int64_t i, int64_t j) const { return {&(*this)(i, j), row, col}; }
};

template <int bytes, class Acc>
struct Tile {
  typedef Acc Vec __attribute__((vector_size(bytes)));
  typedef Acc Loose __attribute__((vector_size(bytes), aligned(alignof(Acc)), may_alias));
  static constexpr int64_t lanes = bytes / sizeof(Acc);
  static constexpr int64_t nr = 2 * lanes;
};

template <int distance, class Vec, size_t... lane>
TZ_INLINE void exchange(Vec& a, Vec& b, std::index_sequence<lane...>) {
  constexpr size_t n = sizeof...(lane), s = distance;
  const Vec low = __builtin_shufflevector(a, b, (lane & s ? n + lane - s : lane)...);
  b = __builtin_shufflevector(a, b, (lane & s ? n + lane : lane + s)...);
  a = low;
}

template <int distance, int lanes, class Vec>
TZ_INLINE void transpose_from(Vec* rows) {
  if constexpr (distance < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (!(i & distance))
        exchange<distance>(rows[i], rows[i + distance], std::make_index_sequence<lanes>());
    transpose_from<2 * distance, lanes>(rows);
  }
}

// out[j * ldo + i] = in[i * ldi + j] for i < m, j < n.
template <int bytes, class T, class Acc>
TZ_INLINE void transpose(const T* in, int64_t ldi, int64_t m, int64_t n, Acc* out, int64_t ldo) {
  using Square = Tile<bytes < 32 ? bytes : 32, Acc>;  // larger ones would not fit in registers
  using Loose = typename Square::Loose;
  constexpr int64_t lanes = Square::lanes;
  int64_t whole = 0;
  if constexpr (std::is_same_v<T, Acc>) {
    for (; whole + lanes <= m; whole += lanes) {
      int64_t j = 0;
      for (; j + lanes <= n; j += lanes) {
        typename Square::Vec rows[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i)
          rows[i] = *reinterpret_cast<const Loose*>(in + (whole + i) * ldi + j);
        transpose_from<1, lanes>(rows);
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i)
          *reinterpret_cast<Loose*>(out + (j + i) * ldo + whole) = rows[i];
      }
      for (; j < n; ++j)
        for (int64_t i = whole; i < whole + lanes; ++i) out[j * ldo + i] = in[i * ldi + j];
    }
  }
  for (int64_t i = whole; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) out[j * ldo + i] = Acc(in[i * ldi + j]);
}

// Copies B(0 : kc, 0 : nc) as panels of nr columns, k-major, padded with zeros.
template <int bytes, class T, class Acc>
TZ_INLINE void pack_b(Matrix<T> b, int64_t kc, int64_t nc, Acc* __restrict out) {
  constexpr int64_t nr = Tile<bytes, Acc>::nr;
  const int64_t whole = nc / nr * nr;
  if (b.col == 1) {
    for (int64_t k = 0; k < kc; ++k) {  // along rows, as they lie in memory
      const T* row = b.data + k * b.row;
      for (int64_t j = 0; j < whole; j += nr) {
        __builtin_prefetch(row + 4 * b.row + j);
        for (int64_t c = 0; c < nr; ++c) out[j * kc + k * nr + c] = Acc(row[j + c]);
      }
    }
  } else {
    for (int64_t j = 0; j < whole; j += nr) {
      if (b.row == 1)
        transpose<bytes>(b.data + j * b.col, b.col, nr, kc, out + j * kc, nr);
      else
        for (int64_t k = 0; k < kc; ++k)
          for (int64_t c = 0; c < nr; ++c) out[j * kc + k * nr + c] = Acc(b(k, j + c));
    }
  }
  if (whole < nc)
    for (int64_t k = 0; k < kc; ++k)
      for (int64_t c = 0; c < nr; ++c)
        out[whole * kc + k * nr + c] = whole + c < nc ? Acc(b(k, whole + c)) : Acc(0);
}

// Copies A(0 : mc, 0 : kc) as rows of KC; the block has room for whole tiles.
template <int bytes, class T, class Acc>
TZ_INLINE void pack_a(Matrix<T> a, int64_t mc, int64_t kc, Acc* __restrict out) {
  if (a.row == 1 && a.col != 1) return transpose<bytes>(a.data, a.col, kc, mc, out, KC);
  for (int64_t i = 0; i < mc; ++i)
    for (int64_t k = 0; k < kc; ++k) out[i * KC + k] = Acc(a(i, k));
}

// C(height, width) (+)= A·B over kc, of `rows` rows of A and nr columns of B that are computed;
// written where `fresh`, else added.
template <int bytes, int rows, class Acc>
TZ_INLINE void micro(Matrix<Acc> a, const Acc* __restrict b, int64_t b_row, int64_t kc, Acc* c,
                     int64_t ldc, int64_t height, int64_t width, bool fresh) {
  using T = Tile<bytes, Acc>;
  using Vec = typename T::Vec;
  using Loose = typename T::Loose;
  for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(c + std::min(r, height - 1) * ldc, 1);
  Vec s[rows][2] = {};
  const Acc* x = a.data;
  for (int64_t k = 0; k < kc; ++k, x += a.col, b += b_row) {
    const Vec b0 = *reinterpret_cast<const Loose*>(b);
    const Vec b1 = *reinterpret_cast<const Loose*>(b + T::lanes);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const Vec v = x[r * a.row] - Vec{};
      s[r][0] += v * b0;
      s[r][1] += v * b1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r, c += ldc) {  // unrolled, so that the sums stay in registers
    if (r >= height) break;
    if (width == T::nr) {
      Loose* out = reinterpret_cast<Loose*>(c);
      Loose* out1 = reinterpret_cast<Loose*>(c + T::lanes);
      *out = fresh ? s[r][0] : *out + s[r][0];
      *out1 = fresh ? s[r][1] : *out1 + s[r][1];
    } else {
      const Vec sums[2] = {s[r][0], s[r][1]};
      for (int64_t j = 0; j < width; ++j) {
        const Acc v = sums[j / T::lanes][j % T::lanes];
        c[j] = fresh ? v : c[j] + v;
      }
    }
  }
}

// How much scratch `gemm` needs, in elements, for up to nc columns.
inline int64_t gemm_scratch(int64_t nc) { return KC * (nc + 64) + KC * MC; }

template <int bytes, class T, class Acc>
TZ_INLINE void gemm_packed(Matrix<T> a, Matrix<T> b, Acc* c, int64_t ldc, int64_t m, int64_t n,
                           int64_t k, Acc* scratch, const Done& done) {
  constexpr int64_t nr = Tile<bytes, Acc>::nr;
  Acc* packed_b = scratch;
  Acc* packed_a = scratch + KC * ((n + nr - 1) / nr * nr);
  const bool in_place = std::is_same_v<T, Acc> && a.col == 1;
  for (int64_t k0 = 0; k0 < k; k0 += KC) {
    const int64_t kc = std::min(KC, k - k0);
    pack_b<bytes>(b.from(k0, 0), kc, n, packed_b);
    for (int64_t i0 = 0; i0 < m; i0 += MC) {
      const int64_t mc = std::min(MC, m - i0), direct = in_place ? mc / MR * MR : 0;  // rows that are not copied
      pack_a<bytes>(a.from(i0 + direct, k0), mc - direct, kc, packed_a);
      const auto tile = [&](int64_t i) -> Matrix<Acc> {
        if constexpr (std::is_same_v<T, Acc>)
          if (i < direct) return a.from(i0 + i, k0);
        return {packed_a + (i - direct) * KC, KC, 1};
      };
      for (int64_t j = 0; j < n; j += nr)
        for (int64_t i = 0; i < mc; i += MR)
          micro<bytes, MR>(tile(i), packed_b + j * kc, nr, kc, c + (i0 + i) * ldc + j, ldc,
                           std::min(MR, mc - i), std::min(nr, n - j), k0 == 0);
      if (done && k0 + kc == k) done(i0, mc);
    }
  }
}

// A few rows of C over a few of B; the last columns of B come from `edge`, padded.
template <int bytes, int rows, class Acc>
TZ_INLINE void stripe(Matrix<Acc> a, Matrix<Acc> b, const Acc* edge, int64_t kc, Acc* c, int64_t ldc,
                      int64_t n, int64_t ahead, bool fresh) {
  constexpr int64_t nr = Tile<bytes, Acc>::nr;
  for (int64_t j = 0; j < n; j += nr) {
    const bool whole = j + nr <= n;
    for (int64_t k = 0; k < ahead; ++k) __builtin_prefetch(b.data + (kc + k) * b.row + j);
    micro<bytes, rows>(a, whole ? b.data + j : edge, whole ? b.row : nr, kc, c + j, ldc, rows,
                       std::min(nr, n - j), fresh);
  }
}

template <int bytes, class Acc>
TZ_INLINE void gemm_direct(Matrix<Acc> a, Matrix<Acc> b, Acc* c, int64_t ldc, int64_t m, int64_t n,
                           int64_t k, Acc* edge) {
  constexpr int64_t nr = Tile<bytes, Acc>::nr;
  const int64_t depth = k <= SHORT ? k : DEPTH, whole = n / nr * nr;
  for (int64_t k0 = 0; k0 < k; k0 += depth) {
    const int64_t kc = std::min(depth, k - k0);
    const Matrix<Acc> below = b.from(k0, 0);
    if (whole < n) pack_b<bytes>(b.from(k0, whole), kc, n - whole, edge);
    for (int64_t i = 0, height = 0; i < m; i += height) {
      const int64_t left = m - i;  // 8 rows are faster as 4 and 4 than as 6 and 2
      height = left == 8 || (left < MR && left >= 4) ? 4 : left >= MR ? MR : left >= 2 ? 2 : 1;
      const Matrix<Acc> rows = a.from(i, k0);
      Acc* out = c + i * ldc;
      const int64_t ahead = i ? 0 : std::min(depth, k - k0 - kc);  // rows of B to ask for
      switch (height) {
        case 1: stripe<bytes, 1>(rows, below, edge, kc, out, ldc, n, ahead, k0 == 0); break;
        case 2: stripe<bytes, 2>(rows, below, edge, kc, out, ldc, n, ahead, k0 == 0); break;
        case 4: stripe<bytes, 4>(rows, below, edge, kc, out, ldc, n, ahead, k0 == 0); break;
        default: stripe<bytes, MR>(rows, below, edge, kc, out, ldc, n, ahead, k0 == 0);
      }
    }
  }
}

// C(rows, columns) = dot products of contiguous rows of A and contiguous columns of B.
template <int bytes, int rows, int columns, class Acc>
TZ_INLINE void dots(const Acc* a, int64_t lda, const Acc* b, int64_t ldb, int64_t k, Acc* c,
                    int64_t ldc) {
  using Vec = typename Tile<bytes, Acc>::Vec;
  using Loose = typename Tile<bytes, Acc>::Loose;
  constexpr int64_t lanes = Tile<bytes, Acc>::lanes;
  Vec s[rows][columns] = {};
  int64_t p = 0;
  for (; p + lanes <= k; p += lanes) {
    Vec v[columns];
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) v[j] = *reinterpret_cast<const Loose*>(b + j * ldb + p);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const Vec x = *reinterpret_cast<const Loose*>(a + i * lda + p);
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) s[i][j] += x * v[j];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) {
      Acc sum = 0;
      for (int64_t q = 0; q < lanes; ++q) sum += s[i][j][q];
      for (int64_t q = p; q < k; ++q) sum += a[i * lda + q] * b[j * ldb + q];
      c[i * ldc + j] = sum;
    }
}

template <int bytes, class Acc>
TZ_INLINE void gemm_dots(Matrix<Acc> a, Matrix<Acc> b, Acc* c, int64_t ldc, int64_t m, int64_t n,
                         int64_t k) {
  constexpr int rows = 4, columns = 3;
  for (int64_t j = 0; j < n; j += columns)
    for (int64_t i = 0; i < m; i += rows) {
      const Acc *x = a.data + i * a.row, *w = b.data + j * b.col;
      Acc* out = c + i * ldc + j;
      if (i + rows <= m && j + columns <= n) {
        dots<bytes, rows, columns>(x, a.row, w, b.col, k, out, ldc);
        continue;
      }
      for (int64_t r = 0; r < std::min<int64_t>(rows, m - i); ++r)
        for (int64_t q = 0; q < std::min<int64_t>(columns, n - j); ++q)
          dots<bytes, 1, 1>(x + r * a.row, a.row, w + q * b.col, b.col, k, out + r * ldc + q, ldc);
    }
}

// C(m, n) = A(m, k)·B(k, n), C row-major with leading dimension ldc, k >= 1. `done` is called for all rows in
// turn, some at a time.
template <int bytes, class T, class Acc>
TZ_INLINE void gemm_body(Matrix<T> a, Matrix<T> b, Acc* c, int64_t ldc, int64_t m, int64_t n,
                         int64_t k, Acc* scratch, const Done& done = {}) {
  if constexpr (std::is_same_v<T, Acc>) {
    const bool direct = b.col == 1 && (m <= SHORT || k <= SHORT);
    const bool dots = !direct && b.row == 1 && a.col == 1 && m <= SHORT;
    if (direct) gemm_direct<bytes>(a, b, c, ldc, m, n, k, scratch);
    if (dots) gemm_dots<bytes>(a, b, c, ldc, m, n, k);
    if ((direct || dots) && done) done(0, m);
    if (direct || dots) return;
  }
  gemm_packed<bytes>(a, b, c, ldc, m, n, k, scratch, done);
}
TZ_ISA(gemm, gemm_body)

}  // namespace torchzoo
