// Rectifiers that compare with a bound: x where it passes, else 0 or the bound. Included after cpu.h or
// cuda.h.
#pragma once

#include "elementwise_tensors.h"

namespace torchzoo {

enum class Bounded : int64_t {
  above,     // x unless x ≤ p, else 0; NaN passes
  below,     // x where 0 < x ≤ p, else 0
  saturate,  // min(max(x, 0), p), 0 for NaN
};

template <class T, Bounded kind>
struct BoundedReLU {
  TZ_HOST_DEVICE static bool passes(T x, T p) {
    if constexpr (kind == Bounded::above) return !(x <= p);
    else return (x > T(0)) & (x <= p);
  }
  TZ_HOST_DEVICE T value(T x, T p) const {
    const T rest = kind == Bounded::saturate ? select(x > p, p, T(0)) : T(0);
    return select(passes(x, p), x, rest);
  }
  TZ_HOST_DEVICE Slopes<T> slopes(T grad, T x, T p) const {
    const T to_p = kind == Bounded::saturate ? select(x > p, grad, T(0)) : T(0);
    return {select(passes(x, p), grad, T(0)), to_p};
  }
};

template <Bounded kind>
struct MakeBounded {
  template <class A>
  BoundedReLU<A, kind> operator()(A) const { return {}; }
};

// Calls run(MakeBounded<kind>()).
template <class Run>
auto for_kind(const char* op, int64_t kind, const Run& run) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, op, ": an unknown kind");
  switch (static_cast<Bounded>(kind)) {
    case Bounded::above: return run(MakeBounded<Bounded::above>());
    case Bounded::below: return run(MakeBounded<Bounded::below>());
    default: return run(MakeBounded<Bounded::saturate>());
  }
}

}  // namespace torchzoo
