// The K functions of a basis at x, and Σ_k g_k B_k'(x) for gradients g_k: what the CPU and the CUDA
// kernels share. V is a number of type A on CUDA and a vector of them on the CPU. Included after cpu.h
// or cuda.h.
//
// x is (n, D), features and their gradients are (n, K, D): for each function the inputs side by side.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TZ_BASIS __device__ __forceinline__
#else
#include "tanh.h"
#define TZ_BASIS inline __attribute__((always_inline))
// Vectors are handed from one inlined function to another, so that no calling convention is met.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#ifdef __CUDACC__
namespace torchzoo {

template <class V>
TZ_BASIS void exponentiate_normal(V& x) { x = ::exp(x); }
template <class V>
TZ_BASIS void hyperbolic_tangent(V& x) { x = ::tanh(x); }

}  // namespace torchzoo
#endif

namespace torchzoo::basis {

// B-splines of order n on knots of spacing 1: Σ_j (−1)^j C(n + 1, j) / n! relu((n + 1)/2 − j − |s|)^n,
// s the distance from the centre; and their slopes, of one power less.
constexpr int MOST_ORDER = 31;

// `fixed` is the order where the compiler shall know it, else 0.
template <class A, int fixed>
struct Splines {
  int given, terms;
  A low, rate, half, weight[MOST_ORDER / 2 + 1];

  Splines(int64_t order, double low, double spacing)
      : given(static_cast<int>(order)),
        terms(given / 2 + 1),
        low(static_cast<A>(low)),
        rate(static_cast<A>(1 / spacing)),
        half(A(order + 1) / 2) {
    double coefficient = 1;
    for (int n = 2; n <= order; ++n) coefficient /= n;
    for (int j = 0; j < terms; ++j) {
      weight[j] = static_cast<A>(coefficient);
      coefficient *= -(given + 1.0 - j) / (j + 1.0);
    }
  }

  TZ_BASIS int order() const { return fixed ? fixed : given; }

  template <class V>
  TZ_BASIS V offset(const V& x, int64_t k) const {
    return (x - low) * rate - (static_cast<A>(k) + A(1) - half);
  }

  // Σ_j weight_j relu(inner − j)^power
  template <class V>
  TZ_BASIS V sum(const V& inner, int power) const {
    V total = {};
    for (int j = 0; j < (fixed ? fixed / 2 + 1 : terms); ++j) {
      const V t = inner - A(j), above = t < V{} ? V{} : t;
      V raised = power ? above : t > V{} ? V{} + A(1) : V{};
      for (int p = 1; p < power; ++p) raised *= above;
      total += weight[j] * raised;
    }
    return total;
  }

  template <class V, class Put>
  TZ_BASIS void values(const V& x, int64_t count, const Put& put) const {
    for (int64_t k = 0; k < count; ++k) {
      const V s = offset(x, k), distance = s < V{} ? -s : s;
      put(k, sum<V>(half - distance, order()));
    }
  }

  template <class V, class Get>
  TZ_BASIS V slope(const V& x, int64_t count, const Get& get) const {
    V total = {};
    for (int64_t k = 0; k < count; ++k) {
      const V s = offset(x, k), distance = s < V{} ? -s : s;
      const V rise = sum<V>(half - distance, order() - 1) * get(k), signed_rise = s > V{} ? -rise : rise;
      total += s == V{} ? V{} : signed_rise;
    }
    return total * (rate * A(order()));
  }
};

// exp(−(u − k)²), u = (x − low) / spacing.
template <class A>
struct Gaussians {
  A low, rate;

  Gaussians(double low, double spacing)
      : low(static_cast<A>(low)), rate(static_cast<A>(1 / spacing)) {}

  template <class V>
  TZ_BASIS V offset(const V& x, int64_t k) const {
    return (x - low) * rate - static_cast<A>(k);
  }

  template <class V>
  TZ_BASIS static V bell(const V& s) {
    V e = -s * s;
    exponentiate_normal(e);
    return e;
  }

  template <class V, class Put>
  TZ_BASIS void values(const V& x, int64_t count, const Put& put) const {
    for (int64_t k = 0; k < count; ++k) put(k, bell<V>(offset(x, k)));
  }

  template <class V, class Get>
  TZ_BASIS V slope(const V& x, int64_t count, const Get& get) const {
    V total = {};
    for (int64_t k = 0; k < count; ++k) {
      const V s = offset(x, k);
      total += get(k) * (s * bell<V>(s));
    }
    return total * (A(-2) * rate);
  }
};

// T_k(z), z = tanh x: T_(k+1) = 2 z T_k − T_(k−1); their slopes k U_(k−1)(z) (1 − z²) likewise.
template <class A>
struct Chebyshev {
  template <class V, class Put>
  TZ_BASIS void values(const V& x, int64_t count, const Put& put) const {
    V z = x;
    hyperbolic_tangent(z);
    V before = z, last = V{} + A(1);  // T_(-1) = T_1
    for (int64_t k = 0; k < count; ++k) {
      put(k, last);
      const V next = A(2) * z * last - before;
      before = last, last = next;
    }
  }

  template <class V, class Get>
  TZ_BASIS V slope(const V& x, int64_t count, const Get& get) const {
    V z = x;
    hyperbolic_tangent(z);
    V before = {}, last = V{} + A(1), total = {};
    for (int64_t k = 1; k < count; ++k) {
      total += get(k) * (static_cast<A>(k) * last);
      const V next = A(2) * z * last - before;
      before = last, last = next;
    }
    return total * (A(1) - z * z);
  }
};

enum class Family : int64_t { splines, gaussians, chebyshev };

// Calls run(family) for numbers of type A.
template <class A, class Run>
void for_family(const char* op, int64_t kind, int64_t order, double low, double spacing, const Run& run) {
  switch (static_cast<Family>(kind)) {
    case Family::splines:
      STD_TORCH_CHECK(order >= 1 && order <= MOST_ORDER, op, ": order must be from 1 to ", MOST_ORDER);
      if (order == 3) return run(Splines<A, 3>(order, low, spacing));
      return run(Splines<A, 0>(order, low, spacing));
    case Family::gaussians: return run(Gaussians<A>(low, spacing));
    case Family::chebyshev: return run(Chebyshev<A>());
    default: STD_TORCH_CHECK(false, op, ": an unknown family");
  }
}

// Calls run(A()) for the type A of x, (n, D).
template <class Run>
void for_inputs(const char* op, const Tensor& x, const Run& run) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": expected x of shape (n, D)");
  if (x.scalar_type() == ScalarType::Double) return run(double());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": expected float32 or float64");
  run(float());
}

// Of the features, or of gradients by them, of x.
inline void check_features(const char* op, const Tensor& grad, const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(grad.dim() == 3 && grad.scalar_type() == x.scalar_type() && x.dim() == 2 &&
                      grad.size(0) == x.size(0) && grad.size(1) == count && grad.size(2) == x.size(1),
                  op, ": expected a gradient of shape (n, K, D) and the type of x");
}

}  // namespace torchzoo::basis
