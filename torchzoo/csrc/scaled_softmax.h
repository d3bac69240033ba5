// scaled_softmax: softmax(s_r z_r) for rows r, what the CPU and the CUDA kernels share. Included after
// cpu.h or cuda.h.
#pragma once

#include "elementwise_tensors.h"

namespace torchzoo {

// s z − max_c s z_c as abs(2s) (±z/2 − max_c ±z_c/2) with the sign of s: exactly 0 at the largest, which
// s z − max, contracted to one operation, is not; and no difference of finite numbers overflows.
template <class A>
struct RowScale {
  A half, twice;
  TZ_HOST_DEVICE explicit RowScale(A s)
      : half(select(s < A(0), A(-0.5), A(0.5))), twice(A(4) * (s * half)) {}
  TZ_HOST_DEVICE A exponential(A z, A peak) const {
    return exp_nonpositive(twice * (half * z - peak));
  }
};

struct RowSizes {
  int64_t rows, columns;
};

// Checks what memory safety rests on: z (..., C) and s (...), of the type that is computed in.
inline RowSizes check_rows(const char* op, const Tensor& z, const Tensor& s) {
  bool fits = z.dim() >= 1 && s.dim() == z.dim() - 1;
  for (int64_t d = 0; fits && d < s.dim(); ++d) fits = s.size(d) == z.size(d);
  STD_TORCH_CHECK(fits, op, ": expected a scale for each row");
  const bool is_double = z.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(s.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float), op,
                  ": the scales must be float64 for float64 rows, else float32");
  return {s.numel(), z.size(-1)};
}

}  // namespace torchzoo
