// ordered_matmul: y = x·w in float64, every element summed in the order of k, no product fused with a
// sum. A tile of ROWS rows and two vectors of columns stays in registers while k goes by, so w is read
// once a tile of rows; which tile an element is in doesn't touch its bits.
#pragma GCC optimize("fp-contract=off")

#include "cpu.h"

namespace torchzoo {
namespace {

constexpr int64_t ROWS = 4, PRODUCTS = 1 << 15;  // of a tile; a thread's share, at least

template <int bytes>
struct Lanes {
  typedef double Vec __attribute__((vector_size(bytes)));
  typedef double Loose __attribute__((vector_size(bytes), aligned(8), may_alias));
  static constexpr int64_t count = bytes / sizeof(double);
};

template <int bytes, int rows>
TZ_INLINE void multiply_rows(const double* x, const double* w, double* y, int64_t inner, int64_t columns) {
  using Vec = typename Lanes<bytes>::Vec;
  using Loose = typename Lanes<bytes>::Loose;
  constexpr int64_t lanes = Lanes<bytes>::count;
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes) {
    Vec sum[rows][2] = {};
    for (int64_t k = 0; k < inner; ++k) {
      const Vec a = *reinterpret_cast<const Loose*>(w + k * columns + j);
      const Vec b = *reinterpret_cast<const Loose*>(w + k * columns + j + lanes);
      for (int r = 0; r < rows; ++r) {
        sum[r][0] += x[r * inner + k] * a;
        sum[r][1] += x[r * inner + k] * b;
      }
    }
    for (int r = 0; r < rows; ++r) {
      *reinterpret_cast<Loose*>(y + r * columns + j) = sum[r][0];
      *reinterpret_cast<Loose*>(y + r * columns + j + lanes) = sum[r][1];
    }
  }
  for (; j < columns; ++j) {
    double sum[rows] = {};
    for (int64_t k = 0; k < inner; ++k)
      for (int r = 0; r < rows; ++r) sum[r] += x[r * inner + k] * w[k * columns + j];
    for (int r = 0; r < rows; ++r) y[r * columns + j] = sum[r];
  }
}

template <int bytes>
TZ_INLINE void multiply_body(const double* x, const double* w, double* y, int64_t begin, int64_t end, int64_t inner, int64_t columns) {
  int64_t t = begin;
  for (; t + ROWS <= end; t += ROWS) multiply_rows<bytes, ROWS>(x + t * inner, w, y + t * columns, inner, columns);
  for (; t < end; ++t) multiply_rows<bytes, 1>(x + t * inner, w, y + t * columns, inner, columns);
}
TZ_ISA(multiply, multiply_body)

Tensor ordered_matmul(const Tensor& x, const Tensor& weight) {
  for (const Tensor* t : {&x, &weight})
    STD_TORCH_CHECK(t->dim() == 2 && t->scalar_type() == ScalarType::Double && t->is_contiguous(),
                    "ordered_matmul: expected contiguous float64 matrices");
  STD_TORCH_CHECK(x.size(1) == weight.size(0), "ordered_matmul: inner sizes differ");
  const int64_t rows = x.size(0), inner = x.size(1), columns = weight.size(1);
  Tensor out = fresh(x, {rows, columns});
  const double *a = x.const_data_ptr<double>(), *w = weight.const_data_ptr<double>();
  double* y = out.mutable_data_ptr<double>();
  const int64_t share = std::max<int64_t>(1, PRODUCTS / std::max<int64_t>(1, inner * columns));
  parallel_for(0, rows, share, [&](int64_t begin, int64_t end) { multiply(a, w, y, begin, end, inner, columns); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("ordered_matmul", TORCH_BOX(&ordered_matmul));
}

}  // namespace torchzoo
