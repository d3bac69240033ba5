// log of a vector of floats, without a branch or a call.
#pragma once

#include "cpu.h"

#include <cmath>
#include <limits>

namespace torchzoo {

// Within 2 units in the last place for floats; libm's, one by one, for doubles. Where `normal`, what
// is below the smallest normal number, 0 included, gives some number below -87.
template <bool normal = false, class Vec>
TZ_INLINE void logarithm(Vec& x) {
  using Int = decltype(x > x);  // integers of the same size
  if constexpr (sizeof(x[0]) == 8) {
    for (size_t l = 0; l < sizeof(Vec) / 8; ++l) x[l] = std::log(x[l]);
  } else {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const Vec zero = {}, given = x;
    const Int small = x < zero + std::numeric_limits<float>::min();
    if constexpr (!normal) x = small ? x * 8388608.f : x;  // 2²³
    const Int bits = (Int)x;
    // x = 2ⁿ (1 + r) with 1 + r between √½ and √2; the bits of √½ are 0x3f3504f3.
    Int n = (bits - 0x3f3504f3) >> 23;
    const Vec r = (Vec)(bits - (n << 23)) - 1.f;
    if constexpr (!normal) n = small ? n - 23 : n;
    const Vec power = __builtin_convertvector(n, Vec);
    const Vec square = r * r;
    Vec p = zero + 7.0376836292e-2f;
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    // n ln 2 in two parts, the first of which is exact.
    const Vec rest = p * r * square - power * 2.12194440e-4f - square * 0.5f;
    x = r + rest + power * 0.693359375f;
    if constexpr (!normal) x = given == zero ? zero - infinity : x;
    x = given == zero + infinity ? given : x;
    x = given >= zero ? x : zero + std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace torchzoo
