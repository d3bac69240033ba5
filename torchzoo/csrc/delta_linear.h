// The elementwise part of a delta step, shared by the CPU and the CUDA kernel.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define TZ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TZ_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace torchzoo {

// Q(x) = quantum·round(x / quantum), half to even.
template <class T>
TZ_HOST_DEVICE T quantised(T x, T quantum) {
  const T steps = nearbyint(x / quantum);
#ifdef __CUDA_ARCH__  // rounded by itself: nvcc would fuse it with the difference that `change` takes
  if constexpr (sizeof(T) == sizeof(float)) return __fmul_rn(quantum, steps);
  else return __dmul_rn(quantum, steps);
#else
  return quantum * steps;
#endif
}

// What is sent of level `sent` against the last `ref`: the new reference and the change, 0 if none.
template <class T>
TZ_HOST_DEVICE T change(T sent, T ref, T threshold, T* new_ref) {
  const T delta = sent - ref;
  const bool changed = threshold == T(0) || std::abs(delta) > threshold;
  *new_ref = changed ? sent : ref;
  return changed ? delta : T(0);
}

}  // namespace torchzoo
