// evonorm_sample and evonorm_sample_backward on the CPU. A task is a group of channels of one sample, which as
// a rule stays in the cache: it is read for its mean, for its variance and for the result, while memory
// is read once. What goes to γ, β and v is summed for each sample, and then over the samples in their
// order, so that no result depends on the number of threads.
#include "elementwise_cpu.h"
#include "evonorm_sample.h"

#include <cmath>

namespace torchzoo {
namespace {

using evonorm::check_sizes;
using evonorm::gate_slopes;
using evonorm::GateSlopes;
using evonorm::Sizes;

template <class A>
struct Moments {
  A mean, rstd;  // without centring the mean is taken for 0
};

template <int bytes, bool squares, class T, class A>
TZ_INLINE double sum(const T* x, int64_t n, A mean) {
  alignas(64) A wide[TILE];
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += TILE) {
    const int64_t count = std::min(TILE, n - begin);
    total += static_cast<double>(tile_sum<bytes, squares>(widened(x + begin, count, wide), count, mean));
  }
  return total;
}

template <int bytes, class A, class T>
TZ_INLINE Moments<A> moments(const T* x, int64_t n, double eps, bool centred) {
  const A mean = centred ? static_cast<A>(sum<bytes, false>(x, n, A(0)) / static_cast<double>(n)) : A(0);
  const double var = sum<bytes, true>(x, n, mean) / static_cast<double>(n);
  return {mean, static_cast<A>(1 / std::sqrt(var + eps))};
}

// A group: x, y (channels, space); γ, β, v (channels).
template <int bytes, class T, class A>
TZ_INLINE void values_body(const T* x, const A* gamma, const A* beta, const A* v, int64_t channels,
                           int64_t space, double eps, bool centred, T* y) {
  alignas(64) A wide[TILE], result[TILE];
  const Moments<A> m = moments<bytes, A>(x, channels * space, eps, centred);
  for (int64_t c = 0; c < channels; ++c) {
    const A scale = m.rstd * gamma[c], shift = beta[c], slope = v[c];
    for (int64_t begin = 0; begin < space; begin += TILE) {
      const int64_t count = std::min(TILE, space - begin), at = c * space + begin;
      const A* in = widened(x + at, count, wide);
      A* __restrict out = result;
      if constexpr (std::is_same_v<A, T>) out = y + at;
      for (int64_t i = 0; i < count; ++i)
        out[i] = in[i] * evonorm::gate(slope * in[i]).open * scale + shift;
      narrow(result, count, y + at);
    }
  }
}
TZ_ISA(values, values_body)

// A group: grad, x, dx (channels, space), γ, v and their gradients (channels). What goes to dx through
// σ is put down first, and what goes there through std is added when its sum is known; `partial` has
// room for it in the wide type, unless dx has that itself.
template <int bytes, class T, class A>
TZ_INLINE void slopes_body(const T* grad, const T* x, const A* gamma, const A* v, int64_t channels,
                           int64_t space, double eps, bool centred, T* dx, A* dgamma, A* dbeta, A* dv,
                           A* partial) {
  alignas(64) A wide_grad[TILE], wide[TILE], to_gamma[TILE], to_v[TILE];
  if constexpr (std::is_same_v<A, T>) partial = dx;
  const int64_t size = channels * space;
  const Moments<A> m = moments<bytes, A>(x, size, eps, centred);
  double to_std = 0;  // Σ grad γ f
  for (int64_t c = 0; c < channels; ++c) {
    const A scale = m.rstd * gamma[c], slope = v[c];
    double gammas = 0, betas = 0, slopes = 0;
    for (int64_t begin = 0; begin < space; begin += TILE) {
      const int64_t count = std::min(TILE, space - begin), at = c * space + begin;
      const A* in = widened(x + at, count, wide);
      const A* g = widened(grad + at, count, wide_grad);
      A* __restrict out = partial + at;
      for (int64_t i = 0; i < count; ++i) {
        const GateSlopes<A> s = gate_slopes(g[i], in[i], slope);
        out[i] = scale * s.x;
        to_gamma[i] = s.gamma;
        to_v[i] = s.v;
      }
      gammas += static_cast<double>(tile_sum<bytes, false>(to_gamma, count, A(0)));
      betas += static_cast<double>(tile_sum<bytes, false>(g, count, A(0)));
      slopes += static_cast<double>(tile_sum<bytes, false>(to_v, count, A(0)));
    }
    dgamma[c] = static_cast<A>(m.rstd * gammas);
    dbeta[c] = static_cast<A>(betas);
    dv[c] = static_cast<A>(scale * slopes);
    to_std += gamma[c] * gammas;
  }
  const double rstd = static_cast<double>(m.rstd);
  const A pull = static_cast<A>(rstd * rstd * rstd * to_std / static_cast<double>(size));
  for (int64_t begin = 0; begin < size; begin += TILE) {
    const int64_t count = std::min(TILE, size - begin);
    const A* in = widened(x + begin, count, wide);
    A* __restrict out = partial + begin;
    for (int64_t i = 0; i < count; ++i) out[i] -= pull * (in[i] - m.mean);
    narrow(out, count, dx + begin);
  }
}
TZ_ISA(slopes, slopes_body)

// Calls run(first group, one past the last) for runs of groups that are worth a task.
template <class Run>
void for_groups(const Sizes& s, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, s.group()));
  parallel_for(0, s.samples * s.groups, grain, run);
}

Tensor evonorm_sample(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& v,
                      int64_t groups, double eps, bool centred) {
  const Sizes s = check_sizes("evonorm_sample", x, {weight, bias, v}, groups);
  Tensor y = fresh(x);
  if (!x.numel()) return y;
  for_type("evonorm_sample", x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T* from = x.const_data_ptr<T>();
    const A *gamma = weight.const_data_ptr<A>(), *beta = bias.const_data_ptr<A>();
    const A* slope = v.const_data_ptr<A>();
    T* to = y.mutable_data_ptr<T>();
    const int64_t channels = s.channels / s.groups;
    for_groups(s, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g % s.groups * channels, at = g * s.group();
        values(from + at, gamma + first, beta + first, slope + first, channels, s.space, eps, centred,
               to + at);
      }
    });
  });
  return y;
}

// total[c] = Σ_n parts[n, c].
template <class A>
void add_up(const A* parts, const Sizes& s, A* total) {
  for (int64_t c = 0; c < s.channels; ++c) {
    double sum = 0;
    for (int64_t n = 0; n < s.samples; ++n) sum += static_cast<double>(parts[n * s.channels + c]);
    total[c] = static_cast<A>(sum);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> evonorm_sample_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& v, int64_t groups,
    double eps, bool centred) {
  const Sizes s = check_sizes("evonorm_sample_backward", x, {weight, v}, groups);
  check_gradient("evonorm_sample_backward", grad, x);
  Tensor dx = fresh(x), dweight = fresh(weight);
  Tensor dbias = fresh(weight), dv = fresh(weight);
  const Tensor above = in_order_of(grad, dx);
  for_type("evonorm_sample_backward", x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T *from = x.const_data_ptr<T>(), *down = above.const_data_ptr<T>();
    const A *gamma = weight.const_data_ptr<A>(), *slope = v.const_data_ptr<A>();
    T* to = dx.mutable_data_ptr<T>();
    const int64_t channels = s.channels / s.groups, rows = s.samples * s.channels;
    std::vector<A> parts(3 * rows, A(0));
    if (x.numel())
      for_groups(s, [&](int64_t begin, int64_t end) {
        std::vector<A> partial(std::is_same_v<A, T> ? 0 : s.group());
        for (int64_t g = begin; g < end; ++g) {
          const int64_t first = g % s.groups * channels, at = g * s.group();
          A* sums = parts.data() + g * channels;
          slopes(down + at, from + at, gamma + first, slope + first, channels, s.space, eps, centred,
                 to + at, sums, sums + rows, sums + 2 * rows, partial.data());
        }
      });
    add_up(parts.data(), s, dweight.mutable_data_ptr<A>());
    add_up(parts.data() + rows, s, dbias.mutable_data_ptr<A>());
    add_up(parts.data() + 2 * rows, s, dv.mutable_data_ptr<A>());
  });
  return {dx, dweight, dbias, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("evonorm_sample", TORCH_BOX(&evonorm_sample));
  m.impl("evonorm_sample_backward", TORCH_BOX(&evonorm_sample_backward));
}

}  // namespace torchzoo
