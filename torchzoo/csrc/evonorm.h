// The sizes of EvoNorm's inputs, for the CPU and the CUDA kernels. Included after cpu.h or cuda.h.
#pragma once

#include "elementwise_tensors.h"

namespace torchzoo::evonorm {

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
