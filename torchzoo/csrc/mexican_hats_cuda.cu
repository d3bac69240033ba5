// mexican_hats and mexican_hats_backward on CUDA: a thread reads an input once and writes its K wavelets,
// or reads their gradients. For the gradients of shift and rate a thread owns a wavelet of an input and
// walks over a stretch of rows; sums are added up in their order, the same bits at every run.
#include "elementwise_cuda.h"
#include "mexican_hats.h"

namespace torchzoo {
namespace {

using basis::Hat;

template <class A>
__global__ void __launch_bounds__(THREADS)
    hats_kernel(const A* __restrict__ x, const A* __restrict__ shift, const A* __restrict__ rate,
                int64_t size, int64_t inputs, int64_t count, A* __restrict__ out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; e < size; e += stride) {
    const int64_t i = e % inputs;
    A* to = out + e / inputs * count * inputs;
    for (int64_t at = i; at < count * inputs; at += inputs)
      to[at] = Hat<A, A>((x[e] - shift[at]) * rate[at]).value();
  }
}

template <class A>
__global__ void __launch_bounds__(THREADS)
    hat_slopes_kernel(const A* __restrict__ grad, const A* __restrict__ x, const A* __restrict__ shift,
                      const A* __restrict__ rate, int64_t size, int64_t inputs, int64_t count,
                      A* __restrict__ dx) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; e < size; e += stride) {
    const A* above = grad + e / inputs * count * inputs;
    A total = 0;
    for (int64_t at = e % inputs; at < count * inputs; at += inputs)
      total += above[at] * Hat<A, A>((x[e] - shift[at]) * rate[at]).slope() * rate[at];
    dx[e] = total;
  }
}

// For each stretch of rows the sums of what goes to the shifts and to the rates: (2, stretches, K D).
template <class A>
__global__ void __launch_bounds__(THREADS)
    parameter_slopes_kernel(const A* __restrict__ grad, const A* __restrict__ x,
                            const A* __restrict__ shift, const A* __restrict__ rate, int64_t rows,
                            int64_t inputs, int64_t parameters, int64_t stretch, A* __restrict__ sums) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (j >= parameters) return;
  const A s = shift[j], r = rate[j];
  A to_shift = 0, to_rate = 0;
  const int64_t first = blockIdx.y * stretch, last = min(first + stretch, rows);
  for (int64_t row = first; row < last; ++row) {
    const A offset = x[row * inputs + j % inputs] - s;
    const A each = grad[row * parameters + j] * Hat<A, A>(offset * r).slope();
    to_shift -= each * r;
    to_rate += each * offset;
  }
  sums[blockIdx.y * parameters + j] = to_shift;
  sums[(static_cast<int64_t>(gridDim.y) + blockIdx.y) * parameters + j] = to_rate;
}

Tensor mexican_hats(const Tensor& x, const Tensor& shift, const Tensor& rate) {
  check_devices("mexican_hats", {x, shift, rate});
  basis::check_hats("mexican_hats", x, shift, rate);
  const DeviceGuard guard(x.get_device_index());
  const Tensor in = torch::stable::contiguous(x), shifts = torch::stable::contiguous(shift);
  const Tensor rates = torch::stable::contiguous(rate);
  const int64_t size = x.numel(), inputs = x.size(1), count = shift.size(0);
  Tensor out = torch::stable::new_empty(x, {x.size(0), count, inputs});
  basis::for_inputs("mexican_hats", x, [&](auto zero) {
    using A = decltype(zero);
    if (!size) return;
    hats_kernel<<<blocks_for(size, MOST_BLOCKS), THREADS, 0, stream(x)>>>(
        in.const_data_ptr<A>(), shifts.const_data_ptr<A>(), rates.const_data_ptr<A>(), size, inputs,
        count, out.mutable_data_ptr<A>());
    check_launch("mexican_hats");
  });
  return out;
}

template <class A>
void launch_parameter_slopes(const Tensor& x, const A* grad, const A* from, const A* shift,
                             const A* rate, int64_t count, A* dshift, A* drate) {
  const int64_t rows = x.size(0), inputs = x.size(1), parameters = count * inputs;
  const int64_t most = std::min(MOST_SUMS, (rows + STRETCH - 1) / STRETCH);
  const int64_t stretch = (rows + most - 1) / most, stretches = (rows + stretch - 1) / stretch;
  const Tensor sums = new_sums<A>(x, {2, stretches, parameters});
  A* partial = sums.mutable_data_ptr<A>();
  const int64_t columns = (parameters + THREADS - 1) / THREADS;
  STD_TORCH_CHECK(columns <= INT32_MAX, "mexican_hats_backward: too many parameters");
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(stretches));
  parameter_slopes_kernel<<<grid, THREADS, 0, stream(x)>>>(grad, from, shift, rate, rows, inputs,
                                                           parameters, stretch, partial);
  check_launch("mexican_hats_backward");
  for (A* total : {dshift, drate}) {
    add_up_kernel<<<grid.x, THREADS, 0, stream(x)>>>(static_cast<const A*>(partial), stretches,
                                                     parameters, total);
    check_launch("mexican_hats_backward");
    partial += stretches * parameters;
  }
}

std::tuple<Tensor, Tensor, Tensor> mexican_hats_backward(const Tensor& grad, const Tensor& x,
                                                         const Tensor& shift, const Tensor& rate) {
  const char* op = "mexican_hats_backward";
  check_devices(op, {grad, x, shift, rate});
  basis::check_hats(op, x, shift, rate);
  const int64_t size = x.numel(), inputs = x.size(1), count = shift.size(0);
  basis::check_features(op, grad, x, count);
  const DeviceGuard guard(x.get_device_index());
  const Tensor above = torch::stable::contiguous(grad), in = torch::stable::contiguous(x);
  const Tensor shifts = torch::stable::contiguous(shift), rates = torch::stable::contiguous(rate);
  Tensor dx = torch::stable::empty_like(in), dshift = torch::stable::empty_like(shifts);
  Tensor drate = torch::stable::empty_like(rates);
  if (!size || !count) {
    for (Tensor* gradient : {&dx, &dshift, &drate}) torch::stable::zero_(*gradient);
    return {dx, dshift, drate};
  }
  basis::for_inputs(op, x, [&](auto zero) {
    using A = decltype(zero);
    const A *g = above.const_data_ptr<A>(), *from = in.const_data_ptr<A>();
    const A *s = shifts.const_data_ptr<A>(), *r = rates.const_data_ptr<A>();
    hat_slopes_kernel<<<blocks_for(size, MOST_BLOCKS), THREADS, 0, stream(x)>>>(
        g, from, s, r, size, inputs, count, dx.mutable_data_ptr<A>());
    check_launch(op);
    launch_parameter_slopes(x, g, from, s, r, count, dshift.mutable_data_ptr<A>(),
                            drate.mutable_data_ptr<A>());
  });
  return {dx, dshift, drate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("mexican_hats", TORCH_BOX(&mexican_hats));
  m.impl("mexican_hats_backward", TORCH_BOX(&mexican_hats_backward));
}

}  // namespace torchzoo
