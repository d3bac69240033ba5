// EvoNorm on samples, y = x σ(v x) γ / s + β, s the deviation or the root mean square over the space of
// a group of channels of one sample: what the CPU and the CUDA kernels share. Included after cpu.h or
// cuda.h.
#pragma once

#include "elementwise_tensors.h"

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

struct Sizes {
  int64_t samples, channels, space, groups;
  TZ_HOST_DEVICE int64_t group() const { return channels / groups * space; }  // elements of one
};

// Checks what memory safety rests on: x contiguous, (N, C, ...), and vectors (C,).
inline Sizes check_sizes(const char* op, const Tensor& x, std::initializer_list<Tensor> vectors,
                         int64_t groups) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.is_contiguous(), op, ": expected a contiguous x (N, C, ...)");
  const int64_t samples = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(groups > 0 && channels > 0 && channels % groups == 0, op,
                  ": groups must divide the channels");
  const bool is_double = x.scalar_type() == ScalarType::Double;
  for (const Tensor& vector : vectors)
    STD_TORCH_CHECK(
        vector.dim() == 1 && vector.size(0) == channels && vector.is_contiguous() &&
            vector.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
        op, ": expected a number for each channel, float64 for a float64 x, else float32");
  int64_t space = 1;
  for (int64_t d = 2; d < x.dim(); ++d) space *= x.size(d);
  return {samples, channels, space, groups};
}

}  // namespace torchzoo::evonorm
