// The elementwise part of a sparse FFN, shared by the CPU and the CUDA kernel.
#pragma once

#include <cmath>
#include <string>

#ifndef TZ_HOST_DEVICE
#ifdef __CUDACC__
#define TZ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TZ_HOST_DEVICE inline __attribute__((always_inline))
#endif
#endif

namespace torchzoo {

enum class Activation { relu, relu2, shifted_relu, silu, unknown };

inline Activation activation_of(const std::string& name) {
  if (name == "relu" || name == "fatrelu") return Activation::relu;
  if (name == "relu2") return Activation::relu2;
  if (name == "shifted_relu") return Activation::shifted_relu;
  if (name == "silu") return Activation::silu;
  return Activation::unknown;
}

// max(z, 0), and NaN for NaN.
template <class T>
TZ_HOST_DEVICE T positive_part(T z) {
  return z <= T(0) ? T(0) : z;
}

template <class T>
TZ_HOST_DEVICE T activate(Activation activation, T z, T shift) {
  switch (activation) {
    case Activation::relu2: return positive_part(z) * positive_part(z);
    case Activation::shifted_relu: return positive_part(z - shift);
    case Activation::silu: return z / (T(1) + std::exp(-z));
    default: return positive_part(z);
  }
}

// A value counts where its size is strictly above the threshold; NaN counts, so that it is seen.
template <class T>
TZ_HOST_DEVICE bool counts(T value, T threshold) {
  return !(std::abs(value) <= threshold);
}

}  // namespace torchzoo
