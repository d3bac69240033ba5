// lti_scan: x_l = a x_(l-1) + bu_l over l, for B sequences of M complex states, and its gradients
// G_l = dx_l + conj(a) G_(l+1), da = Σ_l G_l conj(x_(l-1)), dx0 = conj(a) G_0.
//
// A task is a sequence and a stretch of states, walked step by step: the input is read once and the
// states are written once, the last ones being found in the cache. da is summed over SPAN steps,
// then over those in double precision, then over the sequences in their order.
#include "pairs.h"

#include <memory>

namespace torchzoo {
namespace {

constexpr int64_t STATES = 256;  // of a task
constexpr int64_t SPAN = 64;

template <class T>
struct Factors {  // of a stretch: a x = re * x + im * (x with Re and Im exchanged)
  alignas(64) T re[2 * STATES];
  alignas(64) T im[2 * STATES];

  Factors(const T* a, int64_t states, bool conj) {
    for (int64_t m = 0; m < states; ++m) {
      const T imaginary = conj ? -a[2 * m + 1] : a[2 * m + 1];
      re[2 * m] = re[2 * m + 1] = a[2 * m];
      im[2 * m] = -imaginary;
      im[2 * m + 1] = imaginary;
    }
  }
};

// to = a * x + add, for `count` numbers; `add` may be null.
template <int bytes, class T>
TZ_INLINE void next(const T* re, const T* im, const T* x, const T* add, int64_t count, T* to) {
  using Vec = typename Pairs<bytes, T>::Vec;
  using Loose = typename Pairs<bytes, T>::Loose;
  constexpr int64_t lanes = bytes / sizeof(T);
  int64_t k = 0;
  for (; k + lanes <= count; k += lanes) {
    const Vec state = *reinterpret_cast<const Loose*>(x + k);
    Vec swapped = state;
    swap_lanes(swapped, std::make_index_sequence<lanes>());
    Vec sum = *reinterpret_cast<const Loose*>(re + k) * state;
    sum += *reinterpret_cast<const Loose*>(im + k) * swapped;
    if (add) sum += *reinterpret_cast<const Loose*>(add + k);
    *reinterpret_cast<Loose*>(to + k) = sum;
  }
  for (; k < count; k += 2) {
    const T a = x[k], b = x[k + 1];
    to[k] = re[k] * a + im[k] * b + (add ? add[k] : T(0));
    to[k + 1] = re[k + 1] * b + im[k + 1] * a + (add ? add[k + 1] : T(0));
  }
}

// direct += g * x, crossed += g * (x with Re and Im exchanged): what Re and Im of g conj(x) are summed from.
template <int bytes, class T>
TZ_INLINE void correlate(const T* g, const T* x, int64_t count, T* direct, T* crossed) {
  using Vec = typename Pairs<bytes, T>::Vec;
  using Loose = typename Pairs<bytes, T>::Loose;
  constexpr int64_t lanes = bytes / sizeof(T);
  int64_t k = 0;
  for (; k + lanes <= count; k += lanes) {
    const Vec a = *reinterpret_cast<const Loose*>(g + k);
    Vec b = *reinterpret_cast<const Loose*>(x + k);
    *reinterpret_cast<Loose*>(direct + k) += a * b;
    swap_lanes(b, std::make_index_sequence<lanes>());
    *reinterpret_cast<Loose*>(crossed + k) += a * b;
  }
  for (; k < count; ++k) {
    direct[k] += g[k] * x[k];
    crossed[k] += g[k] * x[k ^ 1];
  }
}

// A stretch of `count` numbers, rows `row` numbers apart.
template <int bytes, class T>
TZ_INLINE void walk_body(const Factors<T>* a, const T* bu, const T* x0, int64_t steps, int64_t row,
                         int64_t count, T* x) {
  const T* before = x0;
  for (int64_t l = 0; l < steps; ++l, bu += row, x += row) {
    next<bytes>(a->re, a->im, before, bu, count, x);
    before = x;
  }
}
TZ_ISA(walk, walk_body)

template <int bytes, class T>
TZ_INLINE void walk_back_body(const Factors<T>* conj_a, const T* grad, const T* x, const T* x0,
                              int64_t steps, int64_t row, int64_t count, T* dbu, T* dx0,
                              double* da) {
  alignas(64) T direct[2 * STATES], crossed[2 * STATES], zeros[2 * STATES] = {};
  std::fill_n(da, count, 0.0);
  const T* after = zeros;
  for (int64_t end = steps; end > 0; end -= SPAN) {
    std::fill_n(direct, count, T(0));
    std::fill_n(crossed, count, T(0));
    for (int64_t l = end - 1; l >= std::max<int64_t>(0, end - SPAN); --l) {
      T* here = dbu + l * row;
      next<bytes>(conj_a->re, conj_a->im, after, grad + l * row, count, here);
      correlate<bytes>(here, l ? x + (l - 1) * row : x0, count, direct, crossed);
      after = here;
    }
    for (int64_t k = 0; k < count; k += 2) {
      da[k] += double(direct[k]) + double(direct[k + 1]);
      da[k + 1] += double(crossed[k + 1]) - double(crossed[k]);
    }
  }
  next<bytes>(conj_a->re, conj_a->im, after, static_cast<const T*>(nullptr), count, dx0);
}
TZ_ISA(walk_back, walk_back_body)

struct Sizes {
  int64_t sequences, steps, states;

  // Runs work(sequence, first state, states) for every task.
  template <class Work>
  void for_stretches(const Work& work) const {
    const int64_t stretches = (states + STATES - 1) / STATES;
    parallel_for(0, sequences * stretches, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t m = task % stretches * STATES;
        work(task / stretches, m, std::min(STATES, states - m));
      }
    });
  }
};

template <class T>
void scan(Sizes sizes, const Tensor& a, const Tensor& bu, const Tensor& x0, Tensor& x) {
  const T *factors = a.const_data_ptr<T>(), *in = bu.const_data_ptr<T>();
  const T* start = x0.const_data_ptr<T>();
  T* out = x.mutable_data_ptr<T>();
  const int64_t row = 2 * sizes.states;
  sizes.for_stretches([&](int64_t b, int64_t m, int64_t count) {
    const Factors<T> stretch(factors + 2 * m, count, false);
    const int64_t at = b * sizes.steps * row + 2 * m;
    walk(&stretch, in + at, start + b * row + 2 * m, sizes.steps, row, 2 * count, out + at);
  });
}

template <class T>
void gradients(Sizes sizes, const Tensor& grad, const Tensor& a, const Tensor& x, const Tensor& x0,
               Tensor& dbu, Tensor& da, Tensor& dx0) {
  const T *g = grad.const_data_ptr<T>(), *factors = a.const_data_ptr<T>();
  const T *states = x.const_data_ptr<T>(), *start = x0.const_data_ptr<T>();
  T *to_bu = dbu.mutable_data_ptr<T>(), *to_x0 = dx0.mutable_data_ptr<T>();
  T* to_a = da.mutable_data_ptr<T>();
  const int64_t row = 2 * sizes.states;
  const std::unique_ptr<double[]> parts(new double[sizes.sequences * row]);
  sizes.for_stretches([&](int64_t b, int64_t m, int64_t count) {
    const Factors<T> stretch(factors + 2 * m, count, true);
    const int64_t at = b * sizes.steps * row + 2 * m, first = b * row + 2 * m;
    walk_back(&stretch, g + at, states + at, start + first, sizes.steps, row, 2 * count, to_bu + at,
              to_x0 + first, parts.get() + first);
  });
  for (int64_t k = 0; k < row; ++k) {
    double sum = 0;
    for (int64_t b = 0; b < sizes.sequences; ++b) sum += parts[b * row + k];
    to_a[k] = static_cast<T>(sum);
  }
}

// (B, L, M, 2) beside a (M, 2) and x0 (B, M, 2)
Sizes sizes_of(const Tensor& a, const Tensor& sequences, const Tensor& x0) {
  const ScalarType type = a.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) &&
                      sequences.scalar_type() == type && x0.scalar_type() == type,
                  "lti_scan: expected float32 or float64, one type");
  STD_TORCH_CHECK(a.dim() == 2 && sequences.dim() == 4 && x0.dim() == 3 && a.size(1) == 2 &&
                      sequences.size(3) == 2 && x0.size(2) == 2 && sequences.size(2) == a.size(0) &&
                      x0.size(1) == a.size(0) && x0.size(0) == sequences.size(0),
                  "lti_scan: shapes that don't fit together");
  return {sequences.size(0), sequences.size(1), a.size(0)};
}

Tensor lti_scan(const Tensor& a, const Tensor& bu, const Tensor& x0) {
  using torch::stable::contiguous;
  const Sizes sizes = sizes_of(a, bu, x0);
  const Tensor in = contiguous(bu);
  Tensor x = fresh(in);
  if (a.scalar_type() == ScalarType::Double)
    scan<double>(sizes, contiguous(a), in, contiguous(x0), x);
  else
    scan<float>(sizes, contiguous(a), in, contiguous(x0), x);
  return x;
}

std::tuple<Tensor, Tensor, Tensor> lti_scan_backward(const Tensor& grad, const Tensor& a,
                                                     const Tensor& x, const Tensor& x0) {
  using torch::stable::contiguous;
  const Sizes sizes = sizes_of(a, grad, x0);
  STD_TORCH_CHECK(x.numel() == grad.numel() && x.scalar_type() == grad.scalar_type(),
                  "lti_scan_backward: x must be as grad");
  const Tensor g = contiguous(grad), factors = contiguous(a), start = contiguous(x0);
  Tensor dbu = fresh(g), da = fresh(factors),
         dx0 = fresh(start);
  if (a.scalar_type() == ScalarType::Double)
    gradients<double>(sizes, g, factors, contiguous(x), start, dbu, da, dx0);
  else
    gradients<float>(sizes, g, factors, contiguous(x), start, dbu, da, dx0);
  return {dbu, da, dx0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("lti_scan", TORCH_BOX(&lti_scan));
  m.impl("lti_scan_backward", TORCH_BOX(&lti_scan_backward));
}

}  // namespace torchzoo
