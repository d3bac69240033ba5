// bounded_relu and bounded_relu_backward: rectifiers that compare with a bound.
#include "elementwise_cuda.h"
#include "bounded_relu.h"

namespace torchzoo {
namespace {

Tensor bounded_relu(const Tensor& x, const Tensor& bound, int64_t kind) {
  return for_kind("bounded_relu", kind,
                  [&](auto make) { return elementwise("bounded_relu", x, bound, make); });
}

std::tuple<Tensor, Tensor> bounded_relu_backward(const Tensor& grad, const Tensor& x,
                                                 const Tensor& bound, int64_t kind) {
  return for_kind("bounded_relu_backward", kind, [&](auto make) {
    return elementwise_backward("bounded_relu_backward", grad, x, bound, make);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("bounded_relu", TORCH_BOX(&bounded_relu));
  m.impl("bounded_relu_backward", TORCH_BOX(&bounded_relu_backward));
}

}  // namespace torchzoo
