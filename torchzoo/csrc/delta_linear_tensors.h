// What the CPU and the CUDA kernel ask of the tensors of a delta step.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace torchzoo {

// Nothing is converted or broadcast: whoever calls `delta_linear_step_plain` hears of it here.
inline void check_step(const torch::stable::Tensor& x, const torch::stable::Tensor& x_ref,
                       const torch::stable::Tensor& acc, const torch::stable::Tensor& weight_t,
                       const std::optional<torch::stable::Tensor>& quantum, double threshold) {
  using torch::headeronly::ScalarType;
  const ScalarType type = acc.scalar_type(), held = weight_t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "delta_linear_step: acc must be float32 or float64");
  STD_TORCH_CHECK(type == x.scalar_type() && type == x_ref.scalar_type() &&
                      (!quantum || quantum->scalar_type() == type),
                  "delta_linear_step: x, x_ref, acc and quantum must have one type");
  STD_TORCH_CHECK(held == type || held == ScalarType::BFloat16 || held == ScalarType::Half,
                  "delta_linear_step: weight_t must have the type of acc or a half one");
  const int64_t last = x.dim() - 1;
  bool fits = last >= 0 && weight_t.dim() == 2 && x_ref.dim() == x.dim() && acc.dim() == x.dim() &&
              x.size(last) == weight_t.size(0) && acc.size(last) == weight_t.size(1) &&
              (!quantum || quantum->numel() == 1 || quantum->numel() == weight_t.size(0));
  for (int64_t d = 0; fits && d <= last; ++d)
    fits = x_ref.size(d) == x.size(d) && (d == last || acc.size(d) == x.size(d));
  STD_TORCH_CHECK(fits, "delta_linear_step: shapes that don't fit together");
  STD_TORCH_CHECK(threshold >= 0, "delta_linear_step: a negative threshold");
}

}  // namespace torchzoo
