// diagonal_step: x = a x + b u and y_c = Σ_p <r_cp, x_p> for B samples of D features, whose states are
// P complex numbers each; <,> is the real scalar product of the pairs (Re, Im).
//
// One pass over the states of a feature: they are read and written once, and the outputs are summed
// on the way. A step of one sample is a few thousand states: threads start where there is more.
#include "diagonal_step.h"
#include "pairs.h"

namespace torchzoo {
namespace {

constexpr int64_t STATES = 16384;  // a thread's, at the least

template <class Vec, size_t... lane>
TZ_INLINE void turn(const Vec& a, const Vec& x, Vec& to, std::index_sequence<lane...>) {
  const Vec re = __builtin_shufflevector(a, a, (lane & ~size_t(1))...);
  const Vec im = __builtin_shufflevector(a, a, (lane | 1)...);
  const Vec crossed = __builtin_shufflevector(x, x, (lane ^ 1)...) * im;
  constexpr size_t n = sizeof...(lane);
  to = re * x + __builtin_shufflevector(-crossed, crossed, (lane + (lane & 1) * n)...);
}

// `count` numbers of one feature, two a state.
template <int bytes, class T>
TZ_INLINE T feature(const T* a, const T* b, const T* r, const T* x, T u, int64_t count, T* to) {
  using Vec = typename Pairs<bytes, T>::Vec;
  using Loose = typename Pairs<bytes, T>::Loose;
  constexpr int64_t lanes = bytes / sizeof(T);
  Vec sums = {};
  int64_t k = 0;
  for (; k + lanes <= count; k += lanes) {
    // loaded first: a reference to a Vec promises an alignment that the rows don't have
    const Vec factor = *reinterpret_cast<const Loose*>(a + k);
    const Vec state = *reinterpret_cast<const Loose*>(x + k);
    Vec next;
    turn<Vec>(factor, state, next, std::make_index_sequence<lanes>());
    next += *reinterpret_cast<const Loose*>(b + k) * u;
    *reinterpret_cast<Loose*>(to + k) = next;
    sums += *reinterpret_cast<const Loose*>(r + k) * next;
  }
  T sum = 0;
  for (; k < count; k += 2) {
    to[k] = a[k] * x[k] - a[k + 1] * x[k + 1] + b[k] * u;
    to[k + 1] = a[k] * x[k + 1] + a[k + 1] * x[k] + b[k + 1] * u;
    sum += r[k] * to[k] + r[k + 1] * to[k + 1];
  }
  for (int64_t lane = 0; lane < lanes; ++lane) sum += sums[lane];
  return sum;
}

template <class T>
TZ_INLINE T product(const T* r, const T* x, int64_t count) {
  T sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += r[k] * x[k];
  return sum;
}

// Features from `begin` to `end` of all samples, counted sample by sample.
template <int bytes, class T>
TZ_INLINE void step_body(const StepSizes* s, const T* u, const T* x, const T* a, const T* b, const T* r,
                         int64_t begin, int64_t end, T* y, T* to) {
  const int64_t n = s->numbers;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / s->features, d = row % s->features, at = d * n;
    T* outputs = y + sample * s->channels * s->features + d;
    *outputs = feature<bytes>(a + at, b + at, r + at, x + row * n, u[row], n, to + row * n);
    for (int64_t c = 1; c < s->channels; ++c)
      outputs[c * s->features] = product(r + (c * s->features + d) * n, to + row * n, n);
  }
}
TZ_ISA(step, step_body)

template <class T>
void run(StepSizes s, const Tensor& u, const Tensor& x, const Tensor& a, const Tensor& b,
         const Tensor& r, Tensor& y, Tensor& to) {
  const T *in = u.const_data_ptr<T>(), *state = x.const_data_ptr<T>();
  const T *turn = a.const_data_ptr<T>(), *drive = b.const_data_ptr<T>();
  const T* readout = r.const_data_ptr<T>();
  T *out = y.mutable_data_ptr<T>(), *next = to.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, 2 * STATES / std::max<int64_t>(1, s.numbers));
  parallel_for(0, s.samples * s.features, grain, [&](int64_t begin, int64_t end) {
    step(&s, in, state, turn, drive, readout, begin, end, out, next);
  });
}

std::tuple<Tensor, Tensor> diagonal_step(const Tensor& u, const Tensor& x, const Tensor& a,
                                         const Tensor& b, const Tensor& r) {
  const auto contiguous = [](const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);  // a step is short
  };
  const StepSizes s = step_sizes(u, x, a, b, r);
  const Tensor state = contiguous(x);
  Tensor y = fresh(u, {s.samples, s.channels, s.features});
  Tensor to = fresh(state);
  if (x.scalar_type() == ScalarType::Double)
    run<double>(s, contiguous(u), state, contiguous(a), contiguous(b), contiguous(r), y, to);
  else
    run<float>(s, contiguous(u), state, contiguous(a), contiguous(b), contiguous(r), y, to);
  return {y, to};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) { m.impl("diagonal_step", TORCH_BOX(&diagonal_step)); }

}  // namespace torchzoo
