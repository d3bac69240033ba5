// basis_functions and basis_functions_backward on CUDA: a thread reads an input once and writes its K
// functions, or reads their gradients, side by side with its neighbours'.
#include "elementwise_cuda.h"
#include "basis_functions.h"

namespace torchzoo {
namespace {

template <class F, class A>
__global__ void __launch_bounds__(THREADS)
    functions_kernel(F f, const A* __restrict__ x, int64_t size, int64_t inputs, int64_t count,
                     A* __restrict__ out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; e < size; e += stride) {
    A* to = out + e / inputs * count * inputs + e % inputs;
    f.values(x[e], count, [=](int64_t k, A value) { to[k * inputs] = value; });
  }
}

template <class F, class A>
__global__ void __launch_bounds__(THREADS)
    function_slopes_kernel(F f, const A* __restrict__ grad, const A* __restrict__ x, int64_t size,
                           int64_t inputs, int64_t count, A* __restrict__ dx) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; e < size; e += stride) {
    const A* above = grad + e / inputs * count * inputs + e % inputs;
    dx[e] = f.slope(x[e], count, [=](int64_t k) { return above[k * inputs]; });
  }
}

Tensor basis_functions(const Tensor& x, int64_t kind, int64_t count, int64_t order, double low,
                       double spacing) {
  const char* op = "basis_functions";
  check_devices(op, {x});
  const DeviceGuard guard(x.get_device_index());
  Tensor out;
  basis::for_inputs(op, x, [&](auto zero) {
    using A = decltype(zero);
    const Tensor in = torch::stable::contiguous(x);
    const int64_t size = x.numel(), inputs = x.size(1);
    out = torch::stable::new_empty(x, {x.size(0), count, inputs});
    basis::for_family<A>(op, kind, order, low, spacing, [&](const auto& family) {
      if (!size) return;
      functions_kernel<<<blocks_for(size, MOST_BLOCKS), THREADS, 0, stream(x)>>>(
          family, in.const_data_ptr<A>(), size, inputs, count, out.mutable_data_ptr<A>());
      check_launch(op);
    });
  });
  return out;
}

Tensor basis_functions_backward(const Tensor& grad, const Tensor& x, int64_t kind, int64_t count,
                                int64_t order, double low, double spacing) {
  const char* op = "basis_functions_backward";
  check_devices(op, {grad, x});
  basis::check_features(op, grad, x, count);
  const DeviceGuard guard(x.get_device_index());
  const Tensor in = torch::stable::contiguous(x), above = torch::stable::contiguous(grad);
  Tensor dx = torch::stable::empty_like(in);
  const int64_t size = x.numel(), inputs = x.size(1);
  basis::for_inputs(op, x, [&](auto zero) {
    using A = decltype(zero);
    basis::for_family<A>(op, kind, order, low, spacing, [&](const auto& family) {
      if (!size) return;
      function_slopes_kernel<<<blocks_for(size, MOST_BLOCKS), THREADS, 0, stream(x)>>>(
          family, above.const_data_ptr<A>(), in.const_data_ptr<A>(), size, inputs, count,
          dx.mutable_data_ptr<A>());
      check_launch(op);
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("basis_functions", TORCH_BOX(&basis_functions));
  m.impl("basis_functions_backward", TORCH_BOX(&basis_functions_backward));
}

}  // namespace torchzoo
