// Checks and layouts of fused elementwise functions, for the CPU and the CUDA kernels; included after
// cpu.h or cuda.h.
#pragma once

#include <type_traits>

#include "elementwise.h"

namespace torchzoo {

// What the kernels compute in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A tensor in the order of memory in which the result is: nothing to do where the strides agree.
inline Tensor in_order_of(const Tensor& tensor, const Tensor& result) {
  bool same = true;
  for (int64_t d = 0; d < result.dim(); ++d)
    same &= result.size(d) < 2 || tensor.stride(d) == result.stride(d);
  if (same) return tensor;
  Tensor copy = torch::stable::empty_like(result);
  return torch::stable::copy_(copy, tensor);
}

// In the memory format of x, or contiguous where the parameter has features.
inline Tensor empty_result(const Tensor& x, const Tensor& p) {
  return p.dim() ? torch::stable::new_empty(x, x.sizes()) : torch::stable::empty_like(x);
}

inline void check_parameter(const char* op, const Tensor& x, const Tensor& p) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(p.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float), op,
                  ": the parameter must be float64 for a float64 x, else float32");
  STD_TORCH_CHECK(p.is_contiguous() && p.dim() <= x.dim(), op, ": a parameter that does not fit x");
  for (int64_t d = 1; d <= p.dim(); ++d)
    STD_TORCH_CHECK(p.size(-d) == x.size(-d), op, ": a parameter that does not fit x");
}

inline void check_gradient(const char* op, const Tensor& grad, const Tensor& x) {
  bool same = grad.dim() == x.dim() && grad.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = grad.size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": the gradient must have shape and type of x");
}

// Calls run(T()) for the type of x.
template <class Run>
void for_type(const char* op, const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return run(double());
    case ScalarType::Float: return run(float());
    case ScalarType::BFloat16: return run(torch::headeronly::BFloat16());
    case ScalarType::Half: return run(torch::headeronly::Half());
    default: STD_TORCH_CHECK(false, op, ": expected floating-point numbers");
  }
}

}  // namespace torchzoo
