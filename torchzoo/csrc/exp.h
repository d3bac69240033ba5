// exp of a vector of floats, without a branch or a call.
#pragma once

#include "cpu.h"

#include <cmath>

namespace torchzoo {

// Within 2 units in the last place for floats; libm's, one by one, for doubles.
template <class Vec>
TZ_INLINE void exponentiate(Vec& x) {
  using Int = decltype(x > x);  // integers of the same size
  if constexpr (sizeof(x[0]) == 8) {
    for (size_t l = 0; l < sizeof(Vec) / 8; ++l) x[l] = std::exp(x[l]);
  } else {
    const Vec zero = {}, high = zero + 89.f, low = zero - 104.f;  // beyond: infinity and 0
    x = x > high ? high : x;                                      // NaN stays what it is
    x = x < low ? low : x;
    const Vec round = zero + 12582912.f;  // 1.5 · 2²³: what is added to it ends in the nearest integer
    const Vec shifted = x * 1.44269504089f + round;
    const Vec n = shifted - round;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, the first part exactly
    Vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    // 2ⁿ in two factors, neither of which overflows.
    const Int power = (Int)shifted - (Int)round, half = power >> 1;
    x = p * (Vec)((half + 127) << 23) * (Vec)((power - half + 127) << 23);
  }
}

// exp of numbers up to 88, or minus infinity. Results that are not normal numbers are 0, which is why
// this takes half the time of `exponentiate`.
template <class Vec>
TZ_INLINE void exponentiate_normal(Vec& x) {
  if constexpr (sizeof(x[0]) == 8) {
    exponentiate(x);
  } else {
    using Int = decltype(x > x);
    const Vec zero = {}, low = zero - 88.f;
    x = x < low ? low : x;
    // The sum ends in the integer nearest to x / ln 2, plus the bias of exponents.
    const Vec bias = zero + (12582912.f + 127.f);
    const Vec shifted = x * 1.44269504089f + bias;
    const Vec n = shifted - bias;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    x = p * (Vec)((Int)shifted << 23);  // 0 for n = -127
  }
}

}  // namespace torchzoo
