// A small packed matrix product, C += A·B, for one thread: the tile that the grouped product shares
// out among threads. Half precision is widened on packing, so sums are float32 (float64 for float64).
//
// Traffic: a block of A (MC×KC) is packed to stay in L2 and a panel of B (KC×NR) to stay in L1; each
// element of C is read and written once for each KC of the inner dimension. The order of additions
// to one element of C depends on its place in the matrices only, never on the number of threads.
#pragma once

#include "cpu.h"

namespace torchzoo {

constexpr int64_t KC = 256;
constexpr int64_t MC = 96;
constexpr int64_t MR = 6;

template <class T>
struct Matrix {  // a view: element (i, j) is at data[i * row + j * col]
  const T* data;
  int64_t row, col;
  const T& operator()(int64_t i, int64_t j) const { return data[i * row + j * col]; }
};

template <int bytes, class Acc>
struct Tile {
  typedef Acc Vec __attribute__((vector_size(bytes)));
  typedef Acc Loose __attribute__((vector_size(bytes), aligned(alignof(Acc)), may_alias));
  static constexpr int64_t lanes = bytes / sizeof(Acc);
  static constexpr int64_t nr = 2 * lanes;
};

// Copies B(k0 : k0 + kc, j0 : j0 + nc) as panels of nr columns, k-major, padded with zeros.
template <int64_t nr, class T, class Acc>
TZ_INLINE void pack_b(Matrix<T> b, int64_t kc, int64_t nc, Acc* __restrict out) {
  for (int64_t j = 0; j < nc; j += nr, out += kc * nr) {
    const int64_t width = std::min(nr, nc - j);
    if (b.col == 1 && width == nr) {
      for (int64_t k = 0; k < kc; ++k)
        for (int64_t c = 0; c < nr; ++c) out[k * nr + c] = Acc(b.data[k * b.row + j + c]);
    } else {
      for (int64_t c = 0; c < nr; ++c)
        for (int64_t k = 0; k < kc; ++k) out[k * nr + c] = c < width ? Acc(b(k, j + c)) : Acc(0);
    }
  }
}

// Copies A(0 : mc, 0 : kc) as panels of MR rows, k-major, padded with zeros.
template <class T, class Acc>
TZ_INLINE void pack_a(Matrix<T> a, int64_t mc, int64_t kc, Acc* __restrict out) {
  for (int64_t i = 0; i < mc; i += MR, out += kc * MR) {
    const int64_t height = std::min(MR, mc - i);
    for (int64_t r = 0; r < MR; ++r)
      for (int64_t k = 0; k < kc; ++k) out[k * MR + r] = r < height ? Acc(a(i + r, k)) : Acc(0);
  }
}

// acc(rows, nr) over kc, added to C (or written where `fresh`); only `height` rows, `width` columns.
template <int bytes, int rows, class Acc>
TZ_INLINE void micro(const Acc* __restrict a, const Acc* __restrict b, int64_t kc, Acc* c,
                     int64_t ldc, int64_t width, bool fresh) {
  using T = Tile<bytes, Acc>;
  using Vec = typename T::Vec;
  using Loose = typename T::Loose;
  Vec s[rows][2] = {};
  for (int64_t k = 0; k < kc; ++k, a += MR, b += T::nr) {
    const Vec b0 = *reinterpret_cast<const Loose*>(b);
    const Vec b1 = *reinterpret_cast<const Loose*>(b + T::lanes);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const Vec x = a[r] - Vec{};
      s[r][0] += x * b0;
      s[r][1] += x * b1;
    }
  }
  for (int r = 0; r < rows; ++r, c += ldc) {
    if (width == T::nr) {
      Loose* out = reinterpret_cast<Loose*>(c);
      Loose* out1 = reinterpret_cast<Loose*>(c + T::lanes);
      *out = fresh ? s[r][0] : *out + s[r][0];
      *out1 = fresh ? s[r][1] : *out1 + s[r][1];
    } else {
      for (int64_t j = 0; j < width; ++j) {
        const Acc v = s[r][j / T::lanes][j % T::lanes];
        c[j] = fresh ? v : c[j] + v;
      }
    }
  }
}

template <int bytes, class Acc>
TZ_INLINE void micro_rows(int64_t rows, const Acc* a, const Acc* b, int64_t kc, Acc* c, int64_t ldc,
                          int64_t width, bool fresh) {
  switch (rows) {
    case 1: return micro<bytes, 1>(a, b, kc, c, ldc, width, fresh);
    case 2: return micro<bytes, 2>(a, b, kc, c, ldc, width, fresh);
    case 3: return micro<bytes, 3>(a, b, kc, c, ldc, width, fresh);
    case 4: return micro<bytes, 4>(a, b, kc, c, ldc, width, fresh);
    case 5: return micro<bytes, 5>(a, b, kc, c, ldc, width, fresh);
    default: return micro<bytes, 6>(a, b, kc, c, ldc, width, fresh);
  }
}

// How much scratch `gemm` needs, in elements, for up to nc columns.
inline int64_t gemm_scratch(int64_t nc) { return KC * (nc + 64) + KC * (MC + MR); }

// C(m, n) = A(m, k)·B(k, n), C row-major with leading dimension ldc, k >= 1.
template <int bytes, class T, class Acc>
TZ_INLINE void gemm_body(Matrix<T> a, Matrix<T> b, Acc* c, int64_t ldc, int64_t m, int64_t n,
                         int64_t k, Acc* scratch) {
  constexpr int64_t nr = Tile<bytes, Acc>::nr;
  Acc* packed_b = scratch;
  Acc* packed_a = scratch + KC * ((n + nr - 1) / nr * nr);
  for (int64_t k0 = 0; k0 < k; k0 += KC) {
    const int64_t kc = std::min(KC, k - k0);
    pack_b<nr>(Matrix<T>{&b(k0, 0), b.row, b.col}, kc, n, packed_b);
    for (int64_t i0 = 0; i0 < m; i0 += MC) {
      const int64_t mc = std::min(MC, m - i0);
      pack_a(Matrix<T>{&a(i0, k0), a.row, a.col}, mc, kc, packed_a);
      for (int64_t j = 0; j < n; j += nr)
        for (int64_t i = 0; i < mc; i += MR)
          micro_rows<bytes>(std::min(MR, mc - i), packed_a + i * kc, packed_b + j * kc, kc,
                            c + (i0 + i) * ldc + j, ldc, std::min(nr, n - j), k0 == 0);
    }
  }
}
TZ_ISA(gemm, gemm_body)

}  // namespace torchzoo
