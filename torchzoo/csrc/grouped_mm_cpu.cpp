// grouped_mm: y[rows of e] = x[rows of e]·weight[e], and dweight[e] = x[rows of e]ᵀ·grad[rows of e].
//
// A task is a group and a strip of up to STRIP output columns. Tasks are cut into runs of equal cost,
// one run a thread, so that skewed groups don't leave a thread idle; how an element is summed does not
// depend on its strip, so results are the same for any number of threads. Each weight is read once.
#include "gemm.h"
#include "groups.h"

#include <memory>

namespace torchzoo {
namespace {

struct Product {  // one group: C(m, n) = A(m, k)·B(k, n)
  int64_t m, k;
};

// Calls run(group, first column, columns, scratch) for every group and strip.
template <class Acc, class Run>
void for_strips(const std::vector<Product>& groups, int64_t n, const Run& run) {
  const int64_t width = strip_width(static_cast<int64_t>(groups.size()), n);
  const int64_t strips = (n + width - 1) / width;
  std::vector<double> cost(1, 0.0);
  cost.reserve(groups.size() * strips + 1);
  for (const Product& g : groups)  // packing costs about as much as 8 rows of products
    for (int64_t s = 0; s < strips; ++s) cost.push_back(cost.back() + 1.0 + (g.m + 8.0) * (g.k + 1.0));
  for_runs(cost, [&](int64_t first, int64_t last) {
    const std::unique_ptr<Acc[]> scratch(new Acc[gemm_scratch(width)]);
    for (int64_t task = first; task < last; ++task) {
      const int64_t j = task % strips * width;
      run(task / strips, j, std::min(width, n - j), scratch.get());
    }
  });
}

template <class T, class Acc>
void forward(const Tensor& x, const Tensor& weight, const Ends& ends, Tensor& out) {
  const int64_t k = x.size(1), n = weight.size(2), last = ends.at.back();
  const T *a = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
  Acc* c = out.mutable_data_ptr<Acc>();
  std::vector<Product> groups;
  for (int64_t e = 0; e < weight.size(0); ++e) groups.push_back({ends.rows(e), ends.rows(e) ? k : 0});
  for_strips<Acc>(groups, n, [&](int64_t e, int64_t j, int64_t columns, Acc* scratch) {
    Acc* strip = c + ends.at[e] * n + j;
    if (!k) return zero(strip, ends.rows(e), columns, n);
    if (!ends.rows(e)) return;
    gemm(Matrix<T>{a + ends.at[e] * k, k, 1},
         Matrix<T>{w + e * weight.stride(0) + j * weight.stride(2), weight.stride(1), weight.stride(2)},
         strip, n, ends.rows(e), columns, k, scratch);
  });
  zero(c + last * n, x.size(0) - last, n, n);
}

template <class T, class Acc>
void backward_weight(const Tensor& x, const Tensor& grad, const Ends& ends, Tensor& out) {
  const int64_t k = x.size(1), n = grad.size(1), count = out.size(0);
  const T *a = x.const_data_ptr<T>(), *g = grad.const_data_ptr<T>();
  Acc* c = out.mutable_data_ptr<Acc>();
  std::vector<Product> groups;
  for (int64_t e = 0; e < count; ++e) groups.push_back({k, ends.rows(e)});
  for_strips<Acc>(groups, n, [&](int64_t e, int64_t j, int64_t columns, Acc* scratch) {
    Acc* strip = c + e * k * n + j;
    if (!ends.rows(e)) return zero(strip, k, columns, n);
    gemm(Matrix<T>{a + ends.at[e] * k, 1, k}, Matrix<T>{g + ends.at[e] * n + j, n, 1}, strip, n, k,
         columns, ends.rows(e), scratch);
  });
}

// Runs `op` with the element type and the type that sums are kept in; half sums are rounded once.
template <class Op>
Tensor with_types(const Tensor& like, std::vector<int64_t> shape, const Op& op) {
  const ScalarType type = like.scalar_type();
  const bool wide = type == ScalarType::Float || type == ScalarType::Double;
  Tensor out = fresh(like, shape, wide ? type : ScalarType::Float);
  switch (type) {
    case ScalarType::Float: op.template operator()<float, float>(out); break;
    case ScalarType::Double: op.template operator()<double, double>(out); break;
    case ScalarType::BFloat16: op.template operator()<torch::headeronly::BFloat16, float>(out); break;
    case ScalarType::Half: op.template operator()<torch::headeronly::Half, float>(out); break;
    default: STD_TORCH_CHECK(false, "grouped_mm: expected a floating-point type");
  }
  return wide ? out : torch::stable::to(out, type);
}

Tensor grouped_mm(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  const Ends ends(offsets, x.size(0));
  const Tensor rows = torch::stable::contiguous(x);
  return with_types(x, {x.size(0), weight.size(2)},
                    [&]<class T, class Acc>(Tensor& out) { forward<T, Acc>(rows, weight, ends, out); });
}

Tensor grouped_mm_dweight(const Tensor& x, const Tensor& grad, const Tensor& offsets) {
  const Ends ends(offsets, x.size(0));
  const Tensor rows = torch::stable::contiguous(x), upstream = torch::stable::contiguous(grad);
  return with_types(x, {offsets.numel(), x.size(1), grad.size(1)}, [&]<class T, class Acc>(Tensor& out) {
    backward_weight<T, Acc>(rows, upstream, ends, out);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("grouped_mm_dweight", TORCH_BOX(&grouped_mm_dweight));
}

}  // namespace torchzoo
