// diagonal_step, a warp a feature of a sample: its lanes share the states out.
#include "cuda.h"
#include "diagonal_step.h"

namespace torchzoo {
namespace {

constexpr int WARPS = 4;  // of a block

template <class T>
struct Step {
  StepSizes s;
  const T *u, *x, *a, *b, *r;
  T *y, *next;
};

template <class T>
__global__ void step_kernel(const Step<T> p) {
  const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (row >= p.s.samples * p.s.features) return;  // whole warps
  const int64_t n = p.s.numbers, d = row % p.s.features, sample = row / p.s.features;
  const T *a = p.a + d * n, *b = p.b + d * n, *x = p.x + row * n;
  T* next = p.next + row * n;
  const T u = p.u[row];
  const int lane = threadIdx.x % WARP;
  for (int64_t k = 2 * lane; k < n; k += 2 * WARP) {
    next[k] = a[k] * x[k] - a[k + 1] * x[k + 1] + b[k] * u;
    next[k + 1] = a[k] * x[k + 1] + a[k + 1] * x[k] + b[k + 1] * u;
  }
  for (int64_t c = 0; c < p.s.channels; ++c) {  // each lane reads what it has written
    const T* r = p.r + (c * p.s.features + d) * n;
    T sum = T(0);
    for (int64_t k = 2 * lane; k < n; k += 2 * WARP) sum += r[k] * next[k] + r[k + 1] * next[k + 1];
    sum = warp_sum(sum);
    if (!lane) p.y[(sample * p.s.channels + c) * p.s.features + d] = sum;
  }
}

template <class T>
void run(StepSizes s, const Tensor& u, const Tensor& x, const Tensor& a, const Tensor& b,
         const Tensor& r, Tensor& y, Tensor& to) {
  const int64_t blocks = (s.samples * s.features + WARPS - 1) / WARPS;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "diagonal_step: too many features");
  const Step<T> step{s,
                     u.const_data_ptr<T>(),
                     x.const_data_ptr<T>(),
                     a.const_data_ptr<T>(),
                     b.const_data_ptr<T>(),
                     r.const_data_ptr<T>(),
                     y.mutable_data_ptr<T>(),
                     to.mutable_data_ptr<T>()};
  step_kernel<<<static_cast<unsigned>(blocks), WARPS * WARP, 0, stream(x)>>>(step);
  check_launch("step_kernel");
}

std::tuple<Tensor, Tensor> diagonal_step(const Tensor& u, const Tensor& x, const Tensor& a,
                                         const Tensor& b, const Tensor& r) {
  using torch::stable::contiguous;
  const StepSizes s = step_sizes(u, x, a, b, r);
  check_devices("diagonal_step", {x, u, a, b, r});
  const DeviceGuard guard(x.get_device_index());
  const Tensor state = contiguous(x);
  Tensor y = torch::stable::new_empty(u, {s.samples, s.channels, s.features});
  Tensor to = torch::stable::empty_like(state);
  if (!y.numel()) return {y, to};
  if (x.scalar_type() == ScalarType::Double)
    run<double>(s, contiguous(u), state, contiguous(a), contiguous(b), contiguous(r), y, to);
  else
    run<float>(s, contiguous(u), state, contiguous(a), contiguous(b), contiguous(r), y, to);
  return {y, to};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) { m.impl("diagonal_step", TORCH_BOX(&diagonal_step)); }

}  // namespace torchzoo
