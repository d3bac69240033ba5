// The mathematics of fused elementwise functions, shared by the CPU and the CUDA kernels.
#pragma once

#include <cstdint>
#ifndef __CUDA_ARCH__
#include <bit>
#endif

#ifndef TZ_HOST_DEVICE
#ifdef __CUDACC__
#define TZ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TZ_HOST_DEVICE inline __attribute__((always_inline))
#endif
#endif

namespace torchzoo {

template <class T>
struct Binary;

template <>
struct Binary<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
  static constexpr float smallest = -87.0f;      // e to this is a normal number
  static constexpr float shift = 12582912.0f;    // 1.5·2^23: added, it rounds to an integer
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct Binary<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
  static constexpr double smallest = -708.0;
  static constexpr double shift = 6755399441055744.0;  // 1.5·2^52
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
};

template <class To, class From>
TZ_HOST_DEVICE To bits_as(From value) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(To) == 4 && sizeof(From) == 4) {
    if constexpr (To(0.5) == To(0)) return __float_as_uint(value);
    else return __uint_as_float(value);
  } else {
    if constexpr (To(0.5) == To(0)) return __double_as_longlong(value);
    else return __longlong_as_double(value);
  }
#else
  return std::bit_cast<To>(value);
#endif
}

// `condition ? a : b` by masks on the CPU: of a branch the compiler would make two paths, which it
// does not turn into vectors any more.
template <class T>
TZ_HOST_DEVICE T select(bool condition, T a, T b) {
#ifdef __CUDA_ARCH__
  return condition ? a : b;
#else
  using Bits = typename Binary<T>::Bits;
  const Bits mask = Bits(0) - static_cast<Bits>(condition);
  return bits_as<T>(static_cast<Bits>((bits_as<Bits>(a) & mask) | (bits_as<Bits>(b) & ~mask)));
#endif
}

// e^x for x ≤ 0, within two units in the last place; 0 where it would not be a normal number.
//
// x = n ln 2 + r with abs(r) ≤ ln 2 / 2, n ln 2 in two parts; then the Taylor polynomial of e^r, times
// 2^n. The integer n is in the low bits of the rounding sum, from where it is moved to the exponent.
template <class T>
TZ_HOST_DEVICE T exp_nonpositive(T x) {
  using B = Binary<T>;
  const T kept = select(x < B::smallest, B::smallest, x);
  const T rounding = kept * T(1.44269504088896340736) + B::shift;
  const T n = rounding - B::shift;
  const T r = (kept - n * B::ln2_high) - n * B::ln2_low;
  T inverse[B::degree + 1];  // 1 / k!
  inverse[0] = T(1);
  double factorial = 1;
  for (int k = 1; k <= B::degree; ++k) inverse[k] = T(1 / (factorial *= k));
  T sum = inverse[B::degree];
  for (int k = B::degree - 1; k >= 0; --k) sum = sum * r + inverse[k];
  const auto exponent = (bits_as<typename B::Bits>(rounding) + B::bias) << B::mantissa;
  const T value = sum * bits_as<T>(static_cast<typename B::Bits>(exponent));
  return select(x < B::smallest, T(0), value);
}

// A function of x and a parameter p: its value, and what of a gradient goes to x and to p.
template <class T>
struct Slopes {
  T x, p;
};

// max(0, x) + ε x exp(−x²/2); x is cut where the exponential is 0, as infinity times 0 would be NaN.
template <class T>
struct CRReLU {
  static constexpr T far = T(40);
  TZ_HOST_DEVICE static T near(T x) { return select(x < -far, -far, select(x > far, far, x)); }
  TZ_HOST_DEVICE T value(T x, T eps) const {
    const T v = near(x);
    return select(x < T(0), T(0), x) + eps * (v * exp_nonpositive(T(-0.5) * (v * v)));
  }
  TZ_HOST_DEVICE Slopes<T> slopes(T grad, T x, T eps) const {
    const T v = near(x), square = v * v, bell = exp_nonpositive(T(-0.5) * square);
    return {grad * (select(x > T(0), T(1), T(0)) + eps * ((T(1) - square) * bell)), grad * (v * bell)};
  }
};

// max(0, x) σ(κ (λ − x)) where x is finite, 0 elsewhere; NaN stays where it is asked to.
template <class T>
struct HyReLU {
  T sharpness;
  bool keep_nan;
  static constexpr T infinity = T(__builtin_huge_val());
  struct Gate {
    T passed, low, high;  // x or 0, σ(t), σ(−t)
  };
  TZ_HOST_DEVICE Gate gate(T x, T bound) const {
    const bool passes = ((x > T(0)) & (x < infinity)) | (keep_nan & (x != x));
    const T passed = select(passes, x, T(0));
    const T t = sharpness * (bound - passed);
    const T e = exp_nonpositive(select(t < T(0), t, -t)), whole = T(1) / (T(1) + e);
    const T less = e * whole;
    return {passed, select(t < T(0), less, whole), select(t < T(0), whole, less)};
  }
  TZ_HOST_DEVICE T value(T x, T bound) const {
    const Gate g = gate(x, bound);
    return g.passed * g.low;
  }
  TZ_HOST_DEVICE Slopes<T> slopes(T grad, T x, T bound) const {
    const Gate g = gate(x, bound);
    const T fall = sharpness * (g.passed * g.low * g.high);
    return {select(g.passed == T(0), T(0), grad * (g.low - fall)), grad * fall};
  }
};

}  // namespace torchzoo
