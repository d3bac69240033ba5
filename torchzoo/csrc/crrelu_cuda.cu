// crrelu and crrelu_backward: y = max(0, x) + ε x exp(−x²/2).
#include "elementwise_cuda.h"

namespace torchzoo {
namespace {

struct Make {
  template <class A>
  CRReLU<A> operator()(A) const { return {}; }
};

Tensor crrelu(const Tensor& x, const Tensor& eps) { return elementwise("crrelu", x, eps, Make()); }

std::tuple<Tensor, Tensor> crrelu_backward(const Tensor& grad, const Tensor& x, const Tensor& eps) {
  return elementwise_backward("crrelu_backward", grad, x, eps, Make());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("crrelu", TORCH_BOX(&crrelu));
  m.impl("crrelu_backward", TORCH_BOX(&crrelu_backward));
}

}  // namespace torchzoo
