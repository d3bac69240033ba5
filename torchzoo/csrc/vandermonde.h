// What the Vandermonde kernels of both devices share: powers of x = exp(log_x), in double precision.
//
// Lags are cut into blocks: l = BLOCK · i + j, so that y_l = Σ_n (v_n x_n^(BLOCK i)) x_n^j. Products
// of powers are right to about l · 2⁻⁵³, which the phase l · Im(log_x) itself, rounded, would not be.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TZ_BOTH __host__ __device__ __forceinline__
#else
#define TZ_BOTH inline
#endif

namespace torchzoo {

constexpr int BLOCK = 64;        // lags of a block
constexpr int BLOCK_DOUBLES = 6;  // BLOCK = 2^BLOCK_DOUBLES

struct Power {
  double re, im;
};

TZ_BOTH Power times(Power a, Power b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

TZ_BOTH Power exponential(double re, double im) {
  const double size = std::exp(re);
  return {size * std::cos(im), size * std::sin(im)};
}

TZ_BOTH Power block_power(Power x) {
  for (int k = 0; k < BLOCK_DOUBLES; ++k) x = times(x, x);
  return x;
}

TZ_BOTH Power raised(Power x, int64_t exponent) {
  Power result{1, 0};
  for (; exponent; exponent >>= 1, x = times(x, x))
    if (exponent & 1) result = times(result, x);
  return result;
}

TZ_BOTH int64_t blocks_of(int64_t lags) { return (lags + BLOCK - 1) / BLOCK; }

}  // namespace torchzoo
