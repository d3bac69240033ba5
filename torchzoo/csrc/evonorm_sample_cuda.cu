// evonorm_sample and evonorm_sample_backward on CUDA: a block for each group of channels of a sample,
// which it reads for its mean, for its variance and for the result, the latter times out of the L2 cache
// as a rule. What goes to γ, β and v is summed by a warp for each channel of each sample, and then over
// the samples in their order: no atomics, the same bits at every run.
#include "elementwise_cuda.h"
#include "evonorm_sample.h"

namespace torchzoo {
namespace {

using evonorm::check_sizes;
using evonorm::gate_slopes;
using evonorm::GateSlopes;
using evonorm::Sizes;

template <class A>
struct Moments {
  A mean, rstd;
};

// Of a group, by the block; without `centred` the mean is taken for 0. Sums are in doubles.
template <class A, class T>
__device__ __forceinline__ Moments<A> moments(const T* x, int size, double eps, bool centred) {
  A mean = 0;
  if (centred) {
    double sum = 0;
    for (int i = threadIdx.x; i < size; i += THREADS) sum += static_cast<double>(static_cast<A>(x[i]));
    mean = static_cast<A>(block_sum(sum) / static_cast<double>(size));
  }
  double squares = 0;
  for (int i = threadIdx.x; i < size; i += THREADS) {
    const A offset = static_cast<A>(x[i]) - mean;
    squares += static_cast<double>(offset * offset);
  }
  const double var = block_sum(squares) / static_cast<double>(size);
  return {mean, static_cast<A>(1 / sqrt(var + eps))};
}

template <class T, class A>
__global__ void __launch_bounds__(THREADS)
    group_values_kernel(const T* __restrict__ x, const A* __restrict__ gamma, const A* __restrict__ beta,
                  const A* __restrict__ v, Sizes s, double eps, bool centred, T* __restrict__ y) {
  const int size = static_cast<int>(s.group()), space = static_cast<int>(s.space);
  const int64_t channels = s.channels / s.groups;
  const int64_t all = s.samples * s.groups;
  for (int64_t g = blockIdx.x; g < all; g += gridDim.x) {
    const int64_t at = g * size, first = g % s.groups * channels;
    const Moments<A> m = moments<A>(x + at, size, eps, centred);
    for (int i = threadIdx.x; i < size; i += THREADS) {
      const int64_t c = first + i / space;
      const A in = static_cast<A>(x[at + i]);
      y[at + i] = static_cast<T>(in * evonorm::gate(v[c] * in).open * (m.rstd * gamma[c]) + beta[c]);
    }
  }
}

// dx, and for each channel of each sample what goes to γ, β and v: sums (3, samples, channels).
template <class T, class A>
__global__ void __launch_bounds__(THREADS)
    group_slopes_kernel(const T* __restrict__ grad, const T* __restrict__ x, const A* __restrict__ gamma,
                  const A* __restrict__ v, Sizes s, double eps, bool centred, T* __restrict__ dx,
                  A* __restrict__ sums) {
  const int size = static_cast<int>(s.group()), space = static_cast<int>(s.space);
  const int64_t channels = s.channels / s.groups, rows = s.samples * s.channels;
  const int64_t all = s.samples * s.groups;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  for (int64_t g = blockIdx.x; g < all; g += gridDim.x) {
    const int64_t at = g * size, first = g % s.groups * channels;
    const Moments<A> m = moments<A>(x + at, size, eps, centred);
    double to_std = 0;  // Σ grad γ x σ(v x), over this warp's channels
    for (int c = warp; c < channels; c += THREADS / WARP) {
      const A scale = gamma[first + c], slope = v[first + c];
      A gammas = 0, betas = 0, slopes = 0;
      for (int i = lane; i < space; i += WARP) {
        const int64_t j = at + c * space + i;
        const A above = static_cast<A>(grad[j]);
        const GateSlopes<A> each = gate_slopes(above, static_cast<A>(x[j]), slope);
        gammas += each.gamma;
        betas += above;
        slopes += each.v;
      }
      gammas = warp_sum(gammas);
      betas = warp_sum(betas);
      slopes = warp_sum(slopes);
      if (lane == 0) {
        A* own = sums + g * channels + c;
        own[0] = m.rstd * gammas;
        own[rows] = betas;
        own[2 * rows] = m.rstd * scale * slopes;
        to_std += static_cast<double>(scale) * static_cast<double>(gammas);
      }
    }
    const double rstd = static_cast<double>(m.rstd);
    const A pull =
        static_cast<A>(rstd * rstd * rstd * block_sum(to_std) / static_cast<double>(size));
    for (int i = threadIdx.x; i < size; i += THREADS) {
      const int64_t c = first + i / space;
      const A in = static_cast<A>(x[at + i]);
      const GateSlopes<A> each = gate_slopes(static_cast<A>(grad[at + i]), in, v[c]);
      dx[at + i] = static_cast<T>(m.rstd * gamma[c] * each.x - pull * (in - m.mean));
    }
  }
}

inline unsigned blocks_of(const Sizes& s) {
  STD_TORCH_CHECK(s.group() <= INT32_MAX, "evonorm_sample: a group of more than 2^31 - 1 values");
  return static_cast<unsigned>(std::min<int64_t>(s.samples * s.groups, INT32_MAX));
}

Tensor evonorm_sample(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& v,
                      int64_t groups, double eps, bool centred) {
  check_devices("evonorm_sample", {x, weight, bias, v});
  const Sizes s = check_sizes("evonorm_sample", x, {weight, bias, v}, groups);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  if (!x.numel()) return y;
  for_type("evonorm_sample", x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    group_values_kernel<<<blocks_of(s), THREADS, 0, stream(x)>>>(
        x.const_data_ptr<T>(), weight.const_data_ptr<A>(), bias.const_data_ptr<A>(),
        v.const_data_ptr<A>(), s, eps, centred, y.mutable_data_ptr<T>());
    check_launch("evonorm_sample");
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> evonorm_sample_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& v, int64_t groups,
    double eps, bool centred) {
  check_devices("evonorm_sample_backward", {grad, x, weight, v});
  const Sizes s = check_sizes("evonorm_sample_backward", x, {weight, v}, groups);
  check_gradient("evonorm_sample_backward", grad, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x), dweight = torch::stable::empty_like(weight);
  Tensor dbias = torch::stable::empty_like(weight), dv = torch::stable::empty_like(weight);
  const Tensor above = in_order_of(grad, dx);
  if (!x.numel()) {
    for (Tensor* vector : {&dweight, &dbias, &dv}) torch::stable::zero_(*vector);
    return {dx, dweight, dbias, dv};
  }
  for_type("evonorm_sample_backward", x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const Tensor sums = new_sums<A>(x, {3, s.samples, s.channels});
    A* partial = sums.mutable_data_ptr<A>();
    group_slopes_kernel<<<blocks_of(s), THREADS, 0, stream(x)>>>(
        above.const_data_ptr<T>(), x.const_data_ptr<T>(), weight.const_data_ptr<A>(),
        v.const_data_ptr<A>(), s, eps, centred, dx.mutable_data_ptr<T>(), partial);
    check_launch("evonorm_sample_backward");
    const auto blocks = static_cast<unsigned>((s.channels + THREADS - 1) / THREADS);
    for (Tensor* vector : {&dweight, &dbias, &dv}) {
      add_up_kernel<<<blocks, THREADS, 0, stream(x)>>>(
          static_cast<const A*>(partial), s.samples, s.channels, vector->mutable_data_ptr<A>());
      check_launch("evonorm_sample_backward");
      partial += s.samples * s.channels;
    }
  });
  return {dx, dweight, dbias, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("evonorm_sample", TORCH_BOX(&evonorm_sample));
  m.impl("evonorm_sample_backward", TORCH_BOX(&evonorm_sample_backward));
}

}  // namespace torchzoo
