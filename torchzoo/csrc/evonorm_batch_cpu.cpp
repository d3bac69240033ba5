// evonorm_batch and evonorm_batch_backward on the CPU. A task is a run of planes, each the space of a channel
// of a sample. Forward reads x for its statistics and again for the result; backward reads x and the gradient
// for the sums over planes, and again for dx. Moments are those of tiles in two passes over the cache, joined
// in doubles; planes are joined in the order of their samples, so that no result depends on the number of
// threads.
#include "elementwise_cpu.h"
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

template <int bytes, class A, class T>
TZ_INLINE void measure_body(const T* x, int64_t space, A, Moments* all) {
  alignas(64) A wide[TILE];
  for (int64_t begin = 0; begin < space; begin += TILE) {
    const int64_t count = std::min(TILE, space - begin);
    const double size = static_cast<double>(count);
    const A* in = widened(x + begin, count, wide);
    const A near = tile_sum<bytes, false>(in, count, A(0)) / static_cast<A>(count);
    const double rest = static_cast<double>(tile_sum<bytes, false>(in, count, near)) / size;
    const double squares = static_cast<double>(tile_sum<bytes, true>(in, count, near)) - size * rest * rest;
    // rounding must not make less than 0 of it; NaN stays
    evonorm::join(*all, {size, static_cast<double>(near) + rest, std::max(squares, 0.0)});
  }
}
TZ_ISA(measure, measure_body)

template <int bytes, class T, class A>
TZ_INLINE void values_body(const T* x, A gamma, A beta, Divisor<A> d, int64_t space, T* y) {
  alignas(64) A wide[TILE], result[TILE];
  for (int64_t begin = 0; begin < space; begin += TILE) {
    const int64_t count = std::min(TILE, space - begin);
    const A* in = widened(x + begin, count, wide);
    A* __restrict out = result;
    if constexpr (std::is_same_v<A, T>) out = y + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = in[i] / d.at(in[i]) * gamma + beta;
    narrow(result, count, y + begin);
  }
}
TZ_ISA(values, values_body)

template <int bytes, class T, class A>
TZ_INLINE void add_body(const T* grad, const T* x, Divisor<A> d, int64_t space, PlaneSums* sums) {
  alignas(64) A wide_grad[TILE], wide[TILE], to_gamma[TILE], to_other[TILE], to_slope[TILE], to_batch[TILE];
  *sums = {};
  for (int64_t begin = 0; begin < space; begin += TILE) {
    const int64_t count = std::min(TILE, space - begin);
    const A* in = widened(x + begin, count, wide);
    const A* g = widened(grad + begin, count, wide_grad);
    for (int64_t i = 0; i < count; ++i) {
      const DivisorSlopes<A> each = divisor_slopes(g[i], in[i], d);
      to_gamma[i] = each.gamma;
      to_other[i] = each.other;
      to_slope[i] = each.other * in[i];
      to_batch[i] = each.batch;
    }
    sums->gamma += static_cast<double>(tile_sum<bytes, false>(to_gamma, count, A(0)));
    sums->beta += static_cast<double>(tile_sum<bytes, false>(g, count, A(0)));
    sums->other += static_cast<double>(tile_sum<bytes, false>(to_other, count, A(0)));
    sums->other_x += static_cast<double>(tile_sum<bytes, false>(to_slope, count, A(0)));
    sums->batch += static_cast<double>(tile_sum<bytes, false>(to_batch, count, A(0)));
  }
}
TZ_ISA(add, add_body)

template <int bytes, class T, class A>
TZ_INLINE void slopes_body(const T* grad, const T* x, A gamma, Divisor<A> d, Pull<A> p, int64_t space,
                           T* dx) {
  alignas(64) A wide_grad[TILE], wide[TILE], result[TILE];
  for (int64_t begin = 0; begin < space; begin += TILE) {
    const int64_t count = std::min(TILE, space - begin);
    const A* in = widened(x + begin, count, wide);
    const A* g = widened(grad + begin, count, wide_grad);
    A* __restrict out = result;
    if constexpr (std::is_same_v<A, T>) out = dx + begin;
    for (int64_t i = 0; i < count; ++i)
      out[i] = gamma * divisor_slopes(g[i], in[i], d).x + p.at(in[i]);
    narrow(result, count, dx + begin);
  }
}
TZ_ISA(slopes, slopes_body)

// Calls run(plane) for each, in runs that are worth a task.
template <class Run>
void for_planes(const Sizes& s, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, s.space));
  parallel_for(0, s.samples * s.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) run(plane);
  });
}

// `batch` (2, channels) and `instance` (2, samples, channels), mean and moment of each.
template <class T, class A>
void statistics(const T* x, const Sizes& s, const A* given, bool centred, A* batch, A* instance) {
  const int64_t planes = s.samples * s.channels;
  std::vector<Moments> found(planes);
  for_planes(s, [&](int64_t plane) {
    Moments& m = found[plane];
    measure(x + plane * s.space, s.space, A(), &m);
    const double var = m.squares / m.count;
    instance[plane] = centred ? static_cast<A>(m.mean) : A(0);
    instance[planes + plane] = static_cast<A>(centred ? var : var + m.mean * m.mean);
  });
  for (int64_t c = 0; c < s.channels; ++c) {
    Moments all;
    if (!given)
      for (int64_t n = 0; n < s.samples; ++n) evonorm::join(all, found[n * s.channels + c]);
    batch[c] = static_cast<A>(all.mean);
    batch[s.channels + c] = given ? given[c] : static_cast<A>(all.squares / all.count);
  }
}

std::tuple<Tensor, Tensor, Tensor> evonorm_batch(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                 std::optional<Tensor> v, std::optional<Tensor> var,
                                                 double eps, bool centred) {
  const Sizes s =
      check_sizes("evonorm_batch", x, {weight, bias, v.value_or(weight), var.value_or(weight)}, 1);
  Tensor y = fresh(x), batch = fresh(weight, {2, s.channels});
  Tensor instance = fresh(weight, {2, s.samples, s.channels});
  for_type("evonorm_batch", x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T* from = x.const_data_ptr<T>();
    const A *gamma = weight.const_data_ptr<A>(), *beta = bias.const_data_ptr<A>();
    const A* slope = data_or_null<A>(v);
    T* to = y.mutable_data_ptr<T>();
    A *whole = batch.mutable_data_ptr<A>(), *own = instance.mutable_data_ptr<A>();
    statistics(from, s, data_or_null<A>(var), centred, whole, own);
    for_planes(s, [&](int64_t plane) {
      const int64_t c = plane % s.channels, at = plane * s.space;
      const Divisor<A> d =
          evonorm::divisor(whole[s.channels + c], own[s.samples * s.channels + plane], slope, c, eps);
      values(from + at, gamma[c], beta[c], d, s.space, to + at);
    });
  });
  return {y, batch, instance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> evonorm_batch_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, std::optional<Tensor> v, const Tensor& batch,
    const Tensor& instance, double eps, bool measured) {
  const Sizes s = check_sizes("evonorm_batch_backward", x, {weight, v.value_or(weight)}, 1);
  check_gradient("evonorm_batch_backward", grad, x);
  evonorm::check_statistics(s, weight, batch, instance);
  Tensor dx = fresh(x), dweight = fresh(weight), dbias = fresh(weight);
  Tensor dv = fresh(weight), dvar = fresh(weight);
  const Tensor above = in_order_of(grad, dx);
  for_type("evonorm_batch_backward", x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T *from = x.const_data_ptr<T>(), *down = above.const_data_ptr<T>();
    const A *gamma = weight.const_data_ptr<A>(), *slope = data_or_null<A>(v);
    const A *mean = batch.const_data_ptr<A>(), *var = mean + s.channels;
    const int64_t planes = s.samples * s.channels;
    const A *centre = instance.const_data_ptr<A>(), *moment = centre + planes;
    T* to = dx.mutable_data_ptr<T>();
    std::vector<PlaneSums> sums(planes), totals(s.channels);
    for_planes(s, [&](int64_t plane) {
      const int64_t c = plane % s.channels, at = plane * s.space;
      const Divisor<A> d = evonorm::divisor(var[c], moment[plane], slope, c, eps);
      add(down + at, from + at, d, s.space, &sums[plane]);
    });
    for (int64_t plane = 0; plane < planes; ++plane)
      evonorm::add_sums(totals[plane % s.channels], sums[plane]);
    A *to_gamma = dweight.mutable_data_ptr<A>(), *to_beta = dbias.mutable_data_ptr<A>();
    A *to_v = dv.mutable_data_ptr<A>(), *to_var = dvar.mutable_data_ptr<A>();
    for (int64_t c = 0; c < s.channels; ++c) {
      const auto each = evonorm::channel_slopes(totals[c], gamma[c], var[c], eps);
      to_gamma[c] = each.gamma;
      to_beta[c] = each.beta;
      to_v[c] = each.v;
      to_var[c] = each.var;
    }
    const double values = static_cast<double>(s.samples * s.space);
    for_planes(s, [&](int64_t plane) {
      const int64_t c = plane % s.channels, at = plane * s.space;
      const Divisor<A> d = evonorm::divisor(var[c], moment[plane], slope, c, eps);
      const Pull<A> p = evonorm::pull(sums[plane], d, !slope, gamma[c], centre[plane], mean[c],
                                      measured ? totals[c].batch / values : 0.0, s.space);
      slopes(down + at, from + at, gamma[c], d, p, s.space, to + at);
    });
  });
  return {dx, dweight, dbias, dv, dvar};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("evonorm_batch", TORCH_BOX(&evonorm_batch));
  m.impl("evonorm_batch_backward", TORCH_BOX(&evonorm_batch_backward));
}

}  // namespace torchzoo
