// EvoNorm on batches, y = x / max(b, a x + s) γ + β, b the deviation of a channel and s the deviation or the
// root mean square of a plane, which is the space of a channel of one sample: what the CPU and the CUDA
// kernels share. Included after cpu.h or cuda.h.
#pragma once

#include "evonorm.h"

#include <cmath>
#include <optional>

namespace torchzoo::evonorm {

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares of offsets from the mean
};

TZ_HOST_DEVICE void join(Moments& all, const Moments& more) {
  const double count = all.count + more.count, apart = more.mean - all.mean;
  all.mean += apart * (more.count / count);
  all.squares += more.squares + apart * apart * (all.count * more.count / count);
  all.count = count;
}

// What a plane is divided by, max(batch, slope x + instance).
template <class A>
struct Divisor {
  A batch, slope, instance;
  TZ_HOST_DEVICE A other(A x) const { return slope * x + instance; }
  TZ_HOST_DEVICE A at(A x) const {
    const A rest = other(x);
    return select(batch >= rest, batch, rest);
  }
};

// Of a channel's variance, a plane's moment, and a slope; without `v` the slope is the plane's deviation.
template <class A>
TZ_HOST_DEVICE Divisor<A> divisor(A var, A moment, const A* v, int64_t channel, double eps) {
  const A batch = static_cast<A>(sqrt(static_cast<double>(var) + eps));
  const A root = static_cast<A>(sqrt(static_cast<double>(moment) + eps));
  // NaN anywhere in a channel is NaN in all of it, which comparisons would lose
  const A instance = batch == batch ? root : batch;
  return {batch, v ? v[channel] : instance, instance};
}

// What a gradient g of f = x / d gives: to x, not through the statistics; to γ; and with the sign turned to
// slope x + instance and to the batch's deviation, each the half where they are equal.
template <class A>
struct DivisorSlopes {
  A x, gamma, other, batch;
};

template <class A>
TZ_HOST_DEVICE DivisorSlopes<A> divisor_slopes(A g, A x, const Divisor<A>& d) {
  const A rest = d.other(x), each = A(1) / d.at(x);
  const A share = select(rest > d.batch, A(1), select(rest == d.batch, A(0.5), A(0)));
  const A down = g * each, all = down * (x * each), to_other = share * all;
  return {down - d.slope * to_other, g * (x * each), to_other, all - to_other};
}

// The sums of these over a plane, the third also times x.
struct PlaneSums {
  double gamma, beta, other, other_x, batch;
};

TZ_HOST_DEVICE void add_sums(PlaneSums& all, const PlaneSums& more) {
  all.gamma += more.gamma;
  all.beta += more.beta;
  all.other += more.other;
  all.other_x += more.other_x;
  all.batch += more.batch;
}

// The gradients of a channel's γ, β, slope and variance.
template <class A>
struct ChannelSlopes {
  A gamma, beta, v, var;
};

template <class A>
TZ_HOST_DEVICE ChannelSlopes<A> channel_slopes(const PlaneSums& sums, A gamma, A var, double eps) {
  const double scale = static_cast<double>(gamma), root = sqrt(static_cast<double>(var) + eps);
  return {static_cast<A>(sums.gamma), static_cast<A>(sums.beta), static_cast<A>(-scale * sums.other_x),
          static_cast<A>(-scale * sums.batch / (2 * root))};
}

// What the statistics add to dx.
template <class A>
struct Pull {
  A scale, centre, shift;
  TZ_HOST_DEVICE A at(A x) const { return scale * (x - centre) + shift; }
};

// For a plane of `space` values around `centre`; `to_batch` is what goes to the deviation of its channel,
// over the number of values that this is the deviation of.
template <class A>
TZ_HOST_DEVICE Pull<A> pull(const PlaneSums& sums, const Divisor<A>& d, bool own_slope, A gamma, A centre,
                            A channel_mean, double to_batch, int64_t space) {
  const double scale = static_cast<double>(gamma);
  const double to_instance = (sums.other + (own_slope ? sums.other_x : 0.0)) / static_cast<double>(space);
  const double inner = -scale * to_instance / static_cast<double>(d.instance);
  const double outer = -scale * to_batch / static_cast<double>(d.batch);
  const double apart = static_cast<double>(centre) - static_cast<double>(channel_mean);
  return {static_cast<A>(inner + outer), centre, static_cast<A>(outer * apart)};
}

template <class A>
const A* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<A>() : nullptr;
}

// Checks what memory safety rests on, as `check_sizes` does: means and moments as forward returned them.
inline void check_statistics(const Sizes& s, const Tensor& weight, const Tensor& batch,
                             const Tensor& instance) {
  for (const Tensor& each : {batch, instance})
    STD_TORCH_CHECK(each.is_contiguous() && each.scalar_type() == weight.scalar_type(),
                    "evonorm_batch_backward: expected the statistics of the forward");
  STD_TORCH_CHECK(batch.numel() == 2 * s.channels && instance.numel() == 2 * s.samples * s.channels,
                  "evonorm_batch_backward: expected the statistics of the forward");
}

}  // namespace torchzoo::evonorm
