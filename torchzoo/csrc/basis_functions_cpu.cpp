// basis_functions and basis_functions_backward on the CPU: a vector of inputs is read once, its K
// functions are computed in registers, and each is written once, or its gradient read once.
#include "basis_functions_cpu.h"

namespace torchzoo {
namespace {

using basis::Lanes;

// The functions of x[0 : n], at out[k D : k D + n].
template <int bytes, class F, class A>
TZ_INLINE void functions_body(const F* f, const A* x, int64_t n, int64_t count, int64_t inputs, A* out) {
  using L = Lanes<bytes, A>;
  using Vec = typename L::Vec;
  for (int64_t i = 0; i < n; i += L::count) {
    const int64_t some = std::min(L::count, n - i);
    f->values(L::load(x + i, some), count, [=](int64_t k, const Vec& value)
              __attribute__((always_inline)) { L::store(out + k * inputs + i, value, some); });
  }
}
TZ_ISA(functions, functions_body)

template <int bytes, class F, class A>
TZ_INLINE void slopes_of_body(const F* f, const A* grad, const A* x, int64_t n, int64_t count,
                              int64_t inputs, A* dx) {
  using L = Lanes<bytes, A>;
  for (int64_t i = 0; i < n; i += L::count) {
    const int64_t some = std::min(L::count, n - i);
    const auto get = [=](int64_t k) __attribute__((always_inline)) {
      return L::load(grad + k * inputs + i, some);
    };
    L::store(dx + i, f->slope(L::load(x + i, some), count, get), some);
  }
}
TZ_ISA(slopes_of, slopes_of_body)

Tensor basis_functions(const Tensor& x, int64_t kind, int64_t count, int64_t order, double low,
                       double spacing) {
  Tensor out;
  basis::for_inputs("basis_functions", x, [&](auto zero) {
    using A = decltype(zero);
    const Tensor in = dense(x);
    const int64_t inputs = x.size(1);
    out = torch::stable::new_empty(x, {x.size(0), count, inputs});
    const A* from = in.const_data_ptr<A>();
    A* to = out.mutable_data_ptr<A>();
    basis::for_family<A>("basis_functions", kind, order, low, spacing, [&](const auto& family) {
      for_stretches(x.numel(), inputs, [&](int64_t at, int64_t first, int64_t n) {
        functions(&family, from + at, n, count, inputs, to + (at - first) * count + first);
      });
    });
  });
  return out;
}

Tensor basis_functions_backward(const Tensor& grad, const Tensor& x, int64_t kind, int64_t count,
                                int64_t order, double low, double spacing) {
  basis::check_features("basis_functions_backward", grad, x, count);
  const Tensor in = dense(x), above = dense(grad);
  Tensor dx = fresh(in);
  basis::for_inputs("basis_functions_backward", x, [&](auto zero) {
    using A = decltype(zero);
    const int64_t inputs = x.size(1);
    const A *from = in.const_data_ptr<A>(), *g = above.const_data_ptr<A>();
    A* to = dx.mutable_data_ptr<A>();
    basis::for_family<A>("basis_functions_backward", kind, order, low, spacing, [&](const auto& family) {
      for_stretches(x.numel(), inputs, [&](int64_t at, int64_t first, int64_t n) {
        slopes_of(&family, g + (at - first) * count + first, from + at, n, count, inputs, to + at);
      });
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("basis_functions", TORCH_BOX(&basis_functions));
  m.impl("basis_functions_backward", TORCH_BOX(&basis_functions_backward));
}

}  // namespace torchzoo
