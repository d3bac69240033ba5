// Vectors of inputs, the last of a row only in part.
#pragma once

#include "elementwise_cpu.h"
#include "basis_functions.h"

namespace torchzoo::basis {

template <int bytes, class A>
struct Lanes {
  typedef A Vec __attribute__((vector_size(bytes)));
  static constexpr int64_t count = bytes / sizeof(A);

  TZ_INLINE Vec load(const A* from, int64_t n) {
    Vec v = {};
    if (n == count) std::memcpy(&v, from, sizeof(v));
    else std::memcpy(&v, from, n * sizeof(A));
    return v;
  }
  TZ_INLINE void store(A* to, const Vec& v, int64_t n) {
    if (n == count) std::memcpy(to, &v, sizeof(v));
    else std::memcpy(to, &v, n * sizeof(A));
  }
};

}  // namespace torchzoo::basis
