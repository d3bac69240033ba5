// What the CPU and the CUDA kernels of log_einsum_exp share: sizes, limits, checks. Included after
// cpu.h or cuda.h.
#pragma once

#include <optional>

namespace torchzoo {

// Below this, times the largest weight if that is above 1, a sum has lost what matters.
constexpr double SMALLEST = 1e-30;

// Logarithm of the largest slope by a weight that is reported.
template <class T>
constexpr T STEEPEST = sizeof(T) == sizeof(float) ? T(85) : T(700);

struct Sizes {  // out (folds, batch, sums), left (folds, batch, k1), right (folds, batch, k2)
  int64_t folds, batch, sums, k1, k2;
  int64_t terms() const { return k1 * k2; }  // of a sum
  bool nothing() const { return !(folds && batch && sums && k1 && k2); }
};

inline Sizes check_operands(const char* op, const std::optional<Tensor>& left, const Tensor& right,
                            const Tensor& w) {
  const ScalarType type = right.scalar_type();
  STD_TORCH_CHECK(right.dim() == 3 && w.dim() == 4 && (!left || left->dim() == 3), op,
                  ": operands have 3 dimensions and weights 4");
  const Sizes n{right.size(0), right.size(1), w.size(1), w.size(2), w.size(3)};
  STD_TORCH_CHECK(w.size(0) == n.folds && right.size(2) == n.k2, op, ": sizes that don't fit");
  STD_TORCH_CHECK(left ? left->size(0) == n.folds && left->size(1) == n.batch && left->size(2) == n.k1
                       : n.k1 == 1,
                  op, ": sizes that don't fit");
  STD_TORCH_CHECK(w.scalar_type() == type && (!left || left->scalar_type() == type), op,
                  ": operands and weights must have one type");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": expected float32 or float64");
  return n;
}

inline void check_result(const char* op, const Tensor& result, const Tensor& right, const Sizes& n) {
  STD_TORCH_CHECK(result.dim() == 3 && result.size(0) == n.folds && result.size(1) == n.batch &&
                      result.size(2) == n.sums && result.scalar_type() == right.scalar_type(),
                  op, ": gradient and output must have the shape and type of the output");
}

}  // namespace torchzoo
