// hyrelu and hyrelu_backward: y = max(0, x) σ(κ (λ − x)).
#include "elementwise_cpu.h"

namespace torchzoo {
namespace {

struct Make {
  double sharpness;
  bool nan_to_zero;
  template <class A>
  HyReLU<A> operator()(A) const { return {static_cast<A>(sharpness), !nan_to_zero}; }
};

Tensor hyrelu(const Tensor& x, const Tensor& bound, double sharpness, bool nan_to_zero) {
  return elementwise("hyrelu", x, bound, Make{sharpness, nan_to_zero});
}

std::tuple<Tensor, Tensor> hyrelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bound,
                                           double sharpness, bool nan_to_zero) {
  return elementwise_backward("hyrelu_backward", grad, x, bound, Make{sharpness, nan_to_zero});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("hyrelu", TORCH_BOX(&hyrelu));
  m.impl("hyrelu_backward", TORCH_BOX(&hyrelu_backward));
}

}  // namespace torchzoo
