// Vectors of pixels: exp2, log2 and expm1 for them, and sums and tests over their lanes.
//
// The two passes over a tile must find the same weight at a pixel, to the last bit, though compilers
// fuse products and sums where they see fit: `opaque` hides from the one what else is made of a value.
#pragma once

#include "cpu.h"
#include "splat_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>  // declares the builtins of all instruction sets
#endif

// Vectors are handed from one inlined function to another, so that no calling convention is met.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace torchzoo::splat {

template <int bytes, class T>
struct Lanes {
  typedef T Vec __attribute__((vector_size(bytes)));
  typedef T Loose __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
  using Whole = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Whole Int __attribute__((vector_size(bytes)));
  typedef Whole LooseInt __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
  typedef long long Words __attribute__((vector_size(bytes)));
  static constexpr int count = bytes / sizeof(T);

  TZ_INLINE Vec load(const T* from) { return *reinterpret_cast<const Loose*>(from); }
  TZ_INLINE Int load(const Whole* from) { return *reinterpret_cast<const LooseInt*>(from); }
  TZ_INLINE void store(T* to, Vec x) { *reinterpret_cast<Loose*>(to) = x; }
  TZ_INLINE void store(Whole* to, Int x) { *reinterpret_cast<LooseInt*>(to) = x; }

  TZ_INLINE Vec ramp() {
    Vec x = {};
    for (int l = 0; l < count; ++l) x[l] = T(l);
    return x;
  }

  TZ_INLINE Vec sqrt(Vec x) {
#if defined(__x86_64__)
    if constexpr (bytes == 32 && sizeof(T) == 4) return __builtin_ia32_sqrtps256(x);
    else if constexpr (bytes == 32) return __builtin_ia32_sqrtpd256(x);
    else if constexpr (sizeof(T) == 4) return __builtin_ia32_sqrtps(x);
    else return __builtin_ia32_sqrtpd(x);
#else
    for (int l = 0; l < count; ++l) x[l] = std::sqrt(x[l]);
    return x;
#endif
  }

  TZ_INLINE bool any(Int mask) {
#if defined(__x86_64__)
    if constexpr (bytes == 32) return __builtin_ia32_movmskps256((typename Lanes<bytes, float>::Vec)mask);
    else return __builtin_ia32_movmskps((typename Lanes<bytes, float>::Vec)mask);
#else
    const Words words = (Words)mask;
    int64_t found = 0;
    for (int l = 0; l < bytes / 8; ++l) found |= words[l];
    return found != 0;
#endif
  }

  TZ_INLINE T sum(Vec x) {  // in pairs
    for (int half = count / 2; half; half /= 2)
      for (int l = 0; l < half; ++l) x[l] += x[l + half];
    return x[0];
  }
};

template <class Vec>
TZ_INLINE Vec opaque(Vec x) {
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

template <int bytes, class T>
struct Functions {
  using L = Lanes<bytes, T>;
  using Vec = typename L::Vec;
  using Int = typename L::Int;
  static constexpr bool wide = sizeof(T) == 8;
  static constexpr int mantissa = wide ? 52 : 23, bias = wide ? 1023 : 127;
  static constexpr T ROUND = wide ? T(6755399441055744.0) : T(12582912.0);  // 1.5 · 2^mantissa

  // x - n ln 2 times a power series: exp(x) - 1 for x within ±½ ln 2.
  TZ_INLINE Vec series(Vec x) {
    Vec p;
    if constexpr (wide) {
      p = Vec{} + 1.6059043836821613e-10;
      for (const double c : {2.08767569878681e-9, 2.505210838544172e-8, 2.755731922398589e-7,
                             2.755731922398589e-6, 2.48015873015873e-5, 1.984126984126984e-4,
                             1.388888888888889e-3, 8.333333333333333e-3, 4.1666666666666664e-2,
                             0.16666666666666666, 0.5})
        p = p * x + c;
    } else {
      p = Vec{} + 1.3981999507e-3f;
      p = p * x + 8.3334519073e-3f;
      p = p * x + 4.1665795894e-2f;
      p = p * x + 1.6666665459e-1f;
      p = p * x + 5.0000001201e-1f;
    }
    return p * (x * x) + x;
  }

  // 2ⁿ for the nearest n of what was added to ROUND; 0 for n = -bias.
  TZ_INLINE Vec scale(Vec shifted) {
    const Int n = (Int)shifted - (Int)(Vec{} + ROUND);
    return (Vec)((n + bias) << mantissa);
  }

  // 2ˣ for x <= bias; what is below the smallest normal number is 0.
  TZ_INLINE Vec exp2(Vec x) {
    x = x > T(-bias) ? x : Vec{} + T(-bias);
    const Vec shifted = x + ROUND, rest = x - (shifted - ROUND);
    Vec p;
    if constexpr (wide) {
      p = series(rest * T(LN_2)) + T(1);
    } else {  // the least largest relative error, 1.5e-7 with the rounding
      p = Vec{} + 1.326472731e-03f;
      p = p * rest + 9.671512991e-03f;
      p = p * rest + 5.550733581e-02f;
      p = p * rest + 2.402224243e-01f;
      p = p * rest + 6.931470037e-01f;
      p = p * rest + 1.f;
    }
    return p * scale(shifted);
  }

  TZ_INLINE Vec expm1(Vec x) {
    const Vec shifted = x * T(LOG2_E) + ROUND, n = shifted - ROUND;
    constexpr T high = wide ? T(6.93147180369123816490e-01) : T(0.693359375);
    constexpr T low = wide ? T(1.90821492927058770002e-10) : T(-2.12194440e-4);
    const Vec p = scale(shifted);
    return p * series((x - n * high) - n * low) + (p - T(1));
  }

  // For normal numbers above 0.
  TZ_INLINE Vec log2(Vec x) {
    constexpr auto root = wide ? int64_t(0x3fe6a09e667f3bcd) : int64_t(0x3f3504f3);  // the bits of √½
    using Whole = typename L::Whole;
    const Int bits = (Int)x, n = (bits - Whole(root)) >> mantissa;
    const Vec m = (Vec)(bits - (n << mantissa));
    const Vec s = (m - T(1)) / (m + T(1)), s2 = s * s;  // ln m = 2 artanh s, s within ±0.1716
    Vec p = Vec{} + T(wide ? 1.0 / 21 : 1.0 / 9);
    for (int k = wide ? 19 : 7; k >= 3; k -= 2) p = p * s2 + T(1) / T(k);
    Vec power;
    if constexpr (wide) power = __builtin_convertvector(n, Vec);
    else power = __builtin_convertvector(n, Vec);
    return power + (s + s * s2 * p) * T(2 * LOG2_E);
  }
};

}  // namespace torchzoo::splat
