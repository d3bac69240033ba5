// evonorm_batch and evonorm_batch_backward on CUDA. A warp takes a plane, the space of a channel of a sample:
// forward reads x for its mean, for its offsets from it and for the result, backward reads x and the gradient
// for sums and again for dx. A thread for each channel joins the planes in the order of their samples: no
// atomics, the same bits at every run.
#include "elementwise_cuda.h"
#include "evonorm_batch.h"

namespace torchzoo {
namespace {

using evonorm::check_sizes;
using evonorm::data_or_null;
using evonorm::Divisor;
using evonorm::divisor_slopes;
using evonorm::DivisorSlopes;
using evonorm::Moments;
using evonorm::PlaneSums;
using evonorm::Pull;
using evonorm::Sizes;

// Calls run(plane, lane) for the planes of this warp.
template <class Run>
__device__ __forceinline__ void for_planes(const Sizes& s, const Run& run) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (THREADS / WARP);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / WARP;
  for (int64_t plane = first; plane < s.samples * s.channels; plane += stride) run(plane);
}

// Moments (samples, channels) of planes, and `instance` (2, samples, channels) from them.
template <class T, class A>
__global__ void __launch_bounds__(THREADS)
    plane_moments_kernel(const T* __restrict__ x, Sizes s, bool centred, Moments* __restrict__ found,
                         A* __restrict__ instance) {
  const int lane = threadIdx.x % WARP;
  const int64_t planes = s.samples * s.channels;
  const double count = static_cast<double>(s.space);
  for_planes(s, [&](int64_t plane) {
    const T* in = x + plane * s.space;
    double sum = 0, squares = 0;
    for (int64_t i = lane; i < s.space; i += WARP) sum += static_cast<double>(static_cast<A>(in[i]));
    const double mean = warp_sum(sum) / count;
    for (int64_t i = lane; i < s.space; i += WARP) {
      const double offset = static_cast<double>(static_cast<A>(in[i])) - mean;
      squares += offset * offset;
    }
    squares = warp_sum(squares);
    if (lane) return;
    found[plane] = {count, mean, squares};
    instance[plane] = centred ? static_cast<A>(mean) : A(0);
    instance[planes + plane] = static_cast<A>(squares / count + (centred ? 0.0 : mean * mean));
  });
}

// `batch` (2, channels), mean and variance; `given` takes the variance's place where it is no null.
template <class A>
__global__ void __launch_bounds__(THREADS)
    channel_moments_kernel(const Moments* __restrict__ found, const A* __restrict__ given, Sizes s,
                           A* __restrict__ batch) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (c >= s.channels) return;
  Moments all = {};
  if (!given)
    for (int64_t n = 0; n < s.samples; ++n) evonorm::join(all, found[n * s.channels + c]);
  batch[c] = static_cast<A>(all.mean);
  batch[s.channels + c] = given ? given[c] : static_cast<A>(all.squares / all.count);
}

template <class T, class A>
__global__ void __launch_bounds__(THREADS)
    plane_values_kernel(const T* __restrict__ x, const A* __restrict__ gamma, const A* __restrict__ beta,
                        const A* __restrict__ v, const A* __restrict__ var, const A* __restrict__ moment,
                        Sizes s, double eps, T* __restrict__ y) {
  for_planes(s, [&](int64_t plane) {
    const int64_t c = plane % s.channels, at = plane * s.space;
    const Divisor<A> d = evonorm::divisor(var[c], moment[plane], v, c, eps);
    const A scale = gamma[c], shift = beta[c];
    for (int64_t i = at + threadIdx.x % WARP; i < at + s.space; i += WARP) {
      const A in = static_cast<A>(x[i]);
      y[i] = static_cast<T>(in / d.at(in) * scale + shift);
    }
  });
}

template <class T, class A>
__global__ void __launch_bounds__(THREADS)
    plane_sums_kernel(const T* __restrict__ grad, const T* __restrict__ x, const A* __restrict__ v,
                      const A* __restrict__ var, const A* __restrict__ moment, Sizes s, double eps,
                      PlaneSums* __restrict__ sums) {
  const int lane = threadIdx.x % WARP;
  for_planes(s, [&](int64_t plane) {
    const int64_t c = plane % s.channels, at = plane * s.space;
    const Divisor<A> d = evonorm::divisor(var[c], moment[plane], v, c, eps);
    A gamma = 0, beta = 0, other = 0, other_x = 0, batch = 0;
    for (int64_t i = at + lane; i < at + s.space; i += WARP) {
      const A above = static_cast<A>(grad[i]), in = static_cast<A>(x[i]);
      const DivisorSlopes<A> each = divisor_slopes(above, in, d);
      gamma += each.gamma;
      beta += above;
      other += each.other;
      other_x += each.other * in;
      batch += each.batch;
    }
    const PlaneSums all = {static_cast<double>(warp_sum(gamma)), static_cast<double>(warp_sum(beta)),
                           static_cast<double>(warp_sum(other)), static_cast<double>(warp_sum(other_x)),
                           static_cast<double>(warp_sum(batch))};
    if (lane == 0) sums[plane] = all;
  });
}

// What channels get, `to` (4, channels): γ, β, slope and variance; and their sums.
template <class A>
__global__ void __launch_bounds__(THREADS)
    channel_slopes_kernel(const PlaneSums* __restrict__ sums, const A* __restrict__ gamma,
                          const A* __restrict__ var, Sizes s, double eps, PlaneSums* __restrict__ totals,
                          A* __restrict__ dgamma, A* __restrict__ dbeta, A* __restrict__ dv,
                          A* __restrict__ dvar) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (c >= s.channels) return;
  PlaneSums all = {};
  for (int64_t n = 0; n < s.samples; ++n) evonorm::add_sums(all, sums[n * s.channels + c]);
  totals[c] = all;
  const evonorm::ChannelSlopes<A> each = evonorm::channel_slopes(all, gamma[c], var[c], eps);
  dgamma[c] = each.gamma;
  dbeta[c] = each.beta;
  dv[c] = each.v;
  dvar[c] = each.var;
}

template <class T, class A>
__global__ void __launch_bounds__(THREADS)
    plane_slopes_kernel(const T* __restrict__ grad, const T* __restrict__ x, const A* __restrict__ gamma,
                        const A* __restrict__ v, const A* __restrict__ batch, const A* __restrict__ instance,
                        const PlaneSums* __restrict__ sums, const PlaneSums* __restrict__ totals, Sizes s,
                        double eps, bool measured, T* __restrict__ dx) {
  const int64_t planes = s.samples * s.channels;
  const double values = static_cast<double>(s.samples * s.space);
  for_planes(s, [&](int64_t plane) {
    const int64_t c = plane % s.channels, at = plane * s.space;
    const A scale = gamma[c];
    const Divisor<A> d = evonorm::divisor(batch[s.channels + c], instance[planes + plane], v, c, eps);
    const Pull<A> p = evonorm::pull(sums[plane], d, !v, scale, instance[plane], batch[c],
                                    measured ? totals[c].batch / values : 0.0, s.space);
    for (int64_t i = at + threadIdx.x % WARP; i < at + s.space; i += WARP) {
      const A in = static_cast<A>(x[i]);
      const A direct = scale * divisor_slopes(static_cast<A>(grad[i]), in, d).x;
      dx[i] = static_cast<T>(direct + p.at(in));
    }
  });
}

inline unsigned blocks_of_planes(const Sizes& s) {
  constexpr int64_t planes = THREADS / WARP;
  const int64_t blocks = (s.samples * s.channels + planes - 1) / planes;
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, INT32_MAX));
}

inline unsigned blocks_of_channels(const Sizes& s) {
  return static_cast<unsigned>((s.channels + THREADS - 1) / THREADS);
}

// Room for `count` structs of doubles.
template <class Row>
Tensor new_rows(const Tensor& x, int64_t count) {
  return new_sums<double>(x, {count, static_cast<int64_t>(sizeof(Row) / sizeof(double))});
}

template <class Row>
Row* rows(const Tensor& tensor) {
  return reinterpret_cast<Row*>(tensor.mutable_data_ptr<double>());
}

std::tuple<Tensor, Tensor, Tensor> evonorm_batch(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                 std::optional<Tensor> v, std::optional<Tensor> var,
                                                 double eps, bool centred) {
  check_devices("evonorm_batch", {x, weight, bias, v.value_or(weight), var.value_or(weight)});
  const Sizes s =
      check_sizes("evonorm_batch", x, {weight, bias, v.value_or(weight), var.value_or(weight)}, 1);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x), batch = torch::stable::new_empty(weight, {2, s.channels});
  Tensor instance = torch::stable::new_empty(weight, {2, s.samples, s.channels});
  for_type("evonorm_batch", x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T* from = x.const_data_ptr<T>();
    A *whole = batch.mutable_data_ptr<A>(), *own = instance.mutable_data_ptr<A>();
    const Tensor found = new_rows<Moments>(x, s.samples * s.channels);
    plane_moments_kernel<<<blocks_of_planes(s), THREADS, 0, stream(x)>>>(from, s, centred,
                                                                         rows<Moments>(found), own);
    check_launch("evonorm_batch");
    channel_moments_kernel<<<blocks_of_channels(s), THREADS, 0, stream(x)>>>(
        rows<const Moments>(found), data_or_null<A>(var), s, whole);
    check_launch("evonorm_batch");
    plane_values_kernel<<<blocks_of_planes(s), THREADS, 0, stream(x)>>>(
        from, weight.const_data_ptr<A>(), bias.const_data_ptr<A>(), data_or_null<A>(v),
        static_cast<const A*>(whole + s.channels),
        static_cast<const A*>(own + s.samples * s.channels), s, eps, y.mutable_data_ptr<T>());
    check_launch("evonorm_batch");
  });
  return {y, batch, instance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> evonorm_batch_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, std::optional<Tensor> v, const Tensor& batch,
    const Tensor& instance, double eps, bool measured) {
  check_devices("evonorm_batch_backward", {grad, x, weight, v.value_or(weight), batch, instance});
  const Sizes s = check_sizes("evonorm_batch_backward", x, {weight, v.value_or(weight)}, 1);
  check_gradient("evonorm_batch_backward", grad, x);
  evonorm::check_statistics(s, weight, batch, instance);
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x), dweight = torch::stable::empty_like(weight);
  Tensor dbias = torch::stable::empty_like(weight), dv = torch::stable::empty_like(weight);
  Tensor dvar = torch::stable::empty_like(weight);
  const Tensor above = in_order_of(grad, dx);
  for_type("evonorm_batch_backward", x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T *from = x.const_data_ptr<T>(), *down = above.const_data_ptr<T>();
    const A *gamma = weight.const_data_ptr<A>(), *slope = data_or_null<A>(v);
    const A *whole = batch.const_data_ptr<A>(), *own = instance.const_data_ptr<A>();
    const Tensor sums = new_rows<PlaneSums>(x, s.samples * s.channels);
    const Tensor totals = new_rows<PlaneSums>(x, s.channels);
    plane_sums_kernel<<<blocks_of_planes(s), THREADS, 0, stream(x)>>>(
        down, from, slope, whole + s.channels, own + s.samples * s.channels, s, eps, rows<PlaneSums>(sums));
    check_launch("evonorm_batch_backward");
    channel_slopes_kernel<<<blocks_of_channels(s), THREADS, 0, stream(x)>>>(
        rows<const PlaneSums>(sums), gamma, whole + s.channels, s, eps, rows<PlaneSums>(totals),
        dweight.mutable_data_ptr<A>(), dbias.mutable_data_ptr<A>(), dv.mutable_data_ptr<A>(),
        dvar.mutable_data_ptr<A>());
    check_launch("evonorm_batch_backward");
    plane_slopes_kernel<<<blocks_of_planes(s), THREADS, 0, stream(x)>>>(
        down, from, gamma, slope, whole, own, rows<const PlaneSums>(sums), rows<const PlaneSums>(totals), s,
        eps, measured, dx.mutable_data_ptr<T>());
    check_launch("evonorm_batch_backward");
  });
  return {dx, dweight, dbias, dv, dvar};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("evonorm_batch", TORCH_BOX(&evonorm_batch));
  m.impl("evonorm_batch_backward", TORCH_BOX(&evonorm_batch_backward));
}

}  // namespace torchzoo
