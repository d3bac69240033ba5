// EvoNorm on samples, y = x σ(v x) γ / s + β, s the deviation or the root mean square over the space of
// a group of channels of one sample: what the CPU and the CUDA kernels share. Included after cpu.h or
// cuda.h.
#pragma once

#include "evonorm.h"

namespace torchzoo::evonorm {

// σ(t) and its slope σ(t) σ(−t).
template <class A>
struct Gate {
  A open, slope;
};

template <class A>
TZ_HOST_DEVICE Gate<A> gate(A t) {
  const A e = exp_nonpositive(select(t < A(0), t, -t)), whole = A(1) / (A(1) + e), less = e * whole;
  return {select(t < A(0), less, whole), less * whole};
}

// What a gradient g of f = x σ(v x) gives: to x, and before the factors that a channel shares to γ
// (g f) and to v. The two factors x of the latter are apart, as x² overflows before the slope is 0.
template <class A>
struct GateSlopes {
  A x, gamma, v;
};

template <class A>
TZ_HOST_DEVICE GateSlopes<A> gate_slopes(A g, A x, A v) {
  const A t = v * x;
  const Gate<A> s = gate(t);
  return {g * (s.open + t * s.slope), g * (x * s.open), g * x * s.slope * x};
}

}  // namespace torchzoo::evonorm
