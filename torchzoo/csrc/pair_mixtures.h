// Sums of pairs of SiLUs, phi_k(x) = (p n)², p = silu(x − l_k), n = silu(u_k − x): what the CPU and the
// CUDA kernels share. V is a number, or on the CPU a vector of inputs. Included after cpu.h or cuda.h.
//
// A pair needs σ(x − l) and σ(u − x). `Apart` computes an exponential for each. `Together` computes one
// an input, as e^(l − x) = e^−x e^l and e^(x − u) = e^x e^−u, the second factors of which belong to the
// function. No product of these may leave the range of numbers: shifts must be within `reach` of 0, and
// inputs are cut at `far`, where what is left of a pair is below the smallest normal number.
#pragma once

#include <cmath>

#ifndef __CUDACC__
#include "exp.h"
// Vectors go by value into functions that are inlined, so that no convention of calls is at stake.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#include "elementwise.h"

namespace torchzoo::mixtures {

#ifdef __CUDACC__
template <class T>
TZ_HOST_DEVICE T exponential(T x) {
  return exp(x);
}
#else
template <class V>
TZ_HOST_DEVICE V exponential(const V& x) {
  V e = x;
  exponentiate(e);
  return e;
}
#endif

template <class T>
struct Function {
  T low, high;
  T e_low, e_high;  // e^l and e^−u; not read by `Apart`
};

// What a change of l and of u does to phi; one of x does the opposite of both.
template <class V>
struct PairSlopes {
  V phi, low, high;
};

// A SiLU's value and slope.
template <class V>
struct Silu {
  V value, slope;
};

template <class V>
TZ_HOST_DEVICE PairSlopes<V> pair_slopes(const Silu<V>& p, const Silu<V>& n) {
  const V root = p.value * n.value, twice = root + root;
  return {root * root, -(twice * n.value * p.slope), twice * p.value * n.slope};
}

template <class T, class V>
struct Apart {
  V x;
  TZ_HOST_DEVICE explicit Apart(const V& x) : x(x) {}

  // e^−abs(t), so that nothing overflows; σ(−t) is not the difference of σ(t) and 1, which cancels.
  TZ_HOST_DEVICE static Silu<V> silu(const V& t) {
    const V e = exponential(t < T(0) ? t : -t), whole = T(1) / (T(1) + e), less = e * whole;
    const V open = t < T(0) ? less : whole, shut = t < T(0) ? whole : less, value = t * open;
    return {value, open + value * shut};
  }
  TZ_HOST_DEVICE V value(const Function<T>& f) const {
    const V root = silu(x - f.low).value * silu(f.high - x).value;
    return root * root;
  }
  TZ_HOST_DEVICE PairSlopes<V> slopes(const Function<T>& f) const {
    return pair_slopes(silu(x - f.low), silu(f.high - x));
  }
};

template <class T>
struct Range {  // of float32
  static constexpr T reach = 16, far = 70;
};
template <>
struct Range<double> {
  static constexpr double reach = 100, far = 600;
};

template <class T, class V>
struct Together {
  static constexpr T reach = Range<T>::reach, far = Range<T>::far;
  V x, e, inverse;  // e^x and e^−x
  TZ_HOST_DEVICE explicit Together(const V& given) {
    x = given < -far ? given - given - far : given;  // the difference is NaN for infinity, as phi is
    x = x > far ? given - given + far : x;
    e = exponential(x);
    inverse = T(1) / e;
  }

  TZ_HOST_DEVICE V value(const Function<T>& f) const {
    const V both = (T(1) + inverse * f.e_low) * (T(1) + e * f.e_high);
    const V root = (x - f.low) * (f.high - x) / both;
    return root * root;
  }
  TZ_HOST_DEVICE PairSlopes<V> slopes(const Function<T>& f) const {
    const V a = inverse * f.e_low, b = e * f.e_high, one_a = T(1) + a, one_b = T(1) + b;
    const V r = T(1) / (one_a * one_b);
    const V open_p = r * one_b, open_n = r * one_a;
    const V p = (x - f.low) * open_p, n = (f.high - x) * open_n;
    return pair_slopes<V>({p, open_p * (T(1) + p * a)}, {n, open_n * (T(1) + n * b)});
  }
};

// The first place of the smallest key. Keys are phi or −phi, and −infinity for NaN, so that it is found.
template <class T>
struct End {
  T key;
  int64_t place;
  TZ_HOST_DEVICE void take(T other, int64_t at) {
    if (other < key || (other == key && at < place)) key = other, place = at;
  }
};

struct Sizes {
  int64_t rows, inputs, functions, mixtures;
  TZ_HOST_DEVICE int64_t sums() const { return functions * (2 + mixtures); }
};

// Checks what memory safety rests on: x (n, D), low, high (K), weight (M, K), of one type.
inline Sizes check_sizes(const char* op, const Tensor& x, const Tensor& low, const Tensor& high,
                         const Tensor& weight) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": expected float32 or float64");
  STD_TORCH_CHECK(low.scalar_type() == type && high.scalar_type() == type && weight.scalar_type() == type,
                  op, ": expected tensors of one type");
  STD_TORCH_CHECK(x.dim() == 2 && low.dim() == 1 && high.dim() == 1 && weight.dim() == 2 &&
                      low.size(0) == weight.size(1) && high.size(0) == weight.size(1),
                  op, ": sizes that don't fit");
  const Sizes s{x.size(0), x.size(1), weight.size(1), weight.size(0)};
  STD_TORCH_CHECK(s.inputs > 0 && s.functions > 0 && s.mixtures > 0, op,
                  ": expected an input, a function and a mixture at least");
  STD_TORCH_CHECK(s.inputs <= INT32_MAX, op, ": more than 2^31 - 1 inputs");  // of the CPU's places
  return s;
}

inline void check_gradients(const char* op, const Sizes& s, const Tensor& x, const Tensor& grad,
                            const Tensor& grad_ends, const Tensor& places) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == s.rows && grad.size(1) == s.mixtures &&
                      grad.size(2) == s.inputs && grad.scalar_type() == type,
                  op, ": the gradient must have the shape and type of the mixtures");
  STD_TORCH_CHECK(grad_ends.dim() == 2 && grad_ends.size(0) == s.rows && grad_ends.size(1) == 2 &&
                      grad_ends.scalar_type() == type,
                  op, ": the ends' gradient must have their shape and type");
  STD_TORCH_CHECK(places.dim() == 2 && places.size(0) == s.rows && places.size(1) == 2 &&
                      places.scalar_type() == ScalarType::Long,
                  op, ": places must be int64 (n, 2)");
}

}  // namespace torchzoo::mixtures
