// Vectors of complex numbers, Re and Im interleaved.
#pragma once

#include "cpu.h"

namespace torchzoo {

template <int bytes, class T>
struct Pairs {
  typedef T Vec __attribute__((vector_size(bytes)));
  typedef T Loose __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
};

template <class Vec, size_t... lane>
TZ_INLINE void swap_lanes(Vec& x, std::index_sequence<lane...>) {  // exchanges Re and Im
  x = __builtin_shufflevector(x, x, (lane ^ 1)...);
}

}  // namespace torchzoo
