// The sizes of diagonal_step, which both back ends check.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace torchzoo {

struct StepSizes {
  int64_t samples, features, channels, numbers;  // numbers: of a feature's state, two a pair
};

// u (B, D), x (B, D, P, 2), a and b (D, P, 2), r (C, D, P, 2), all of one type
inline StepSizes step_sizes(const torch::stable::Tensor& u, const torch::stable::Tensor& x,
                            const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                            const torch::stable::Tensor& r) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "diagonal_step: expected float32 or float64");
  for (const torch::stable::Tensor* other : {&u, &a, &b, &r})
    STD_TORCH_CHECK(other->scalar_type() == type, "diagonal_step: expected one type");
  STD_TORCH_CHECK(u.dim() == 2 && x.dim() == 4 && a.dim() == 3 && b.dim() == 3 && r.dim() == 4,
                  "diagonal_step: shapes that don't fit together");
  const StepSizes s{x.size(0), x.size(1), r.size(0), 2 * x.size(2)};
  const bool pairs = x.size(3) == 2 && a.size(2) == 2 && b.size(2) == 2 && r.size(3) == 2;
  const bool features = u.size(1) == s.features && a.size(0) == s.features &&
                        b.size(0) == s.features && r.size(1) == s.features;
  STD_TORCH_CHECK(pairs && features && u.size(0) == s.samples && s.channels > 0 &&
                      2 * a.size(1) == s.numbers && 2 * b.size(1) == s.numbers &&
                      2 * r.size(2) == s.numbers,
                  "diagonal_step: shapes that don't fit together");
  return s;
}

}  // namespace torchzoo
