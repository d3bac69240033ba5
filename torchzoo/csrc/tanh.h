// tanh of a vector of floats, without a branch or a call.
#pragma once

#include "exp.h"

namespace torchzoo {

// Within 3 units in the last place for floats; libm's, one by one, for doubles.
template <class Vec>
TZ_INLINE void hyperbolic_tangent(Vec& x) {
  if constexpr (sizeof(x[0]) == 8) {
    for (size_t l = 0; l < sizeof(Vec) / 8; ++l) x[l] = std::tanh(x[l]);
  } else {
    const Vec zero = {}, size = x < zero ? -x : x, square = x * x;
    Vec e = size * -2.f;
    exponentiate_normal(e);
    const Vec large = 1.f - 2.f * e / (1.f + e);
    Vec p = zero + 1.7241491e-2f;  // the odd polynomial that is nearest where 1 - tanh would cancel
    p = p * square - 5.3045494e-2f;
    p = p * square + 1.3325879e-1f;
    p = p * square - 3.3333144e-1f;
    const Vec small = x + x * square * p;
    x = size < 0.5f ? small : x < zero ? -large : large;
  }
}

}  // namespace torchzoo
