// The elementwise part of a delta step over a run of inputs, for the CPU kernels.
#pragma once

#include "cpu.h"
#include "delta_linear.h"

namespace torchzoo {

// new_ref and delta of n inputs; `quantum` is one number, one an input, or null.
template <int bytes, class T>
TZ_INLINE void encode_body(const T* __restrict x, const T* __restrict ref, const T* quantum,
                           bool per_input, T threshold, int64_t n, T* __restrict new_ref,
                           T* __restrict delta) {
  if (!quantum) {
    for (int64_t j = 0; j < n; ++j) delta[j] = change(x[j], ref[j], threshold, new_ref + j);
  } else if (per_input) {
    for (int64_t j = 0; j < n; ++j)
      delta[j] = change(quantised(x[j], quantum[j]), ref[j], threshold, new_ref + j);
  } else {
    for (int64_t j = 0; j < n; ++j)
      delta[j] = change(quantised(x[j], *quantum), ref[j], threshold, new_ref + j);
  }
}
TZ_ISA(encode, encode_body)

}  // namespace torchzoo
