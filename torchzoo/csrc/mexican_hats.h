// Mexican hats (1 − u²) exp(−u²/2) 2 / (√3 π^¼) of u = (x − shift) rate, wavelets of norm 1, of which
// each input has K with shifts and rates (K, D) of their own: what the CPU and the CUDA kernels share.
// Included after cpu.h or cuda.h.
#pragma once

#include "basis_functions.h"

namespace torchzoo::basis {

template <class A, class V>
struct Hat {
  V u, square, bell;

  TZ_BASIS explicit Hat(const V& u) : u(u), square(u * u), bell(square * A(-0.5)) {
    exponentiate_normal(bell);
    bell *= A(0.86732507058407751832);
  }
  TZ_BASIS V value() const { return bell - square * bell; }
  TZ_BASIS V slope() const { return u * bell * (square - A(3)); }
};

inline void check_hats(const char* op, const Tensor& x, const Tensor& shift, const Tensor& rate) {
  for (const Tensor* one : {&shift, &rate})
    STD_TORCH_CHECK(one->dim() == 2 && x.dim() == 2 && one->size(1) == x.size(1) &&
                        one->size(0) == shift.size(0) && one->scalar_type() == x.scalar_type(),
                    op, ": expected shift and rate of shape (K, D) and the type of x");
}

}  // namespace torchzoo::basis
