// categorical_log_prob: out[f, b] = l[f, x_fb] - log Σ_c exp(l[f, c]) for every unit, and its gradient
// dl[f, c] = Σ_(b: x_fb = c) g[f, b] - softmax(l)[f, c] Σ_b g[f, b].
//
// A task is a stripe of a fold's units, one cache line wide: it takes the maximum and the sum over all
// values, then looks its rows up. The normalised table is never held, and no two tasks write to the
// same place, so that the bits don't depend on threads.
#include "exp.h"
#include "log.h"

#include <limits>

namespace torchzoo {
namespace {

struct Sizes {  // logits (folds, values, units), x (folds, batch)
  int64_t folds, values, units, batch;
};

template <int bytes, class T>
struct Stripe {
  typedef T Vec __attribute__((vector_size(bytes)));
  typedef T Loose __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
  static constexpr int vectors = 64 / bytes, units = 64 / sizeof(T);
  Vec v[vectors];
};

// The first `count` units of a stripe, all of them where `whole`; zeros beyond.
template <int bytes, bool whole, class T>
TZ_INLINE Stripe<bytes, T> load(const T* from, int64_t count) {
  using S = Stripe<bytes, T>;
  S s{};
  if constexpr (whole)
    for (int i = 0; i < S::vectors; ++i)
      s.v[i] = reinterpret_cast<const typename S::Loose*>(from)[i];
  else
    std::memcpy(s.v, from, count * sizeof(T));
  return s;
}

template <int bytes, bool whole, class T>
TZ_INLINE void store(const Stripe<bytes, T>& s, T* to, int64_t count) {
  using S = Stripe<bytes, T>;
  if constexpr (whole)
    for (int i = 0; i < S::vectors; ++i) reinterpret_cast<typename S::Loose*>(to)[i] = s.v[i];
  else
    std::memcpy(to, s.v, count * sizeof(T));
}

// Σ_c exp(l_c - most) with the largest l_c; the exponentials too, stripe by stripe, unless null.
template <int bytes, bool whole, class T>
TZ_INLINE Stripe<bytes, T> sum_up(const T* logits, const Sizes& n, int64_t count,
                                  Stripe<bytes, T>& most, T* exponentials) {
  using S = Stripe<bytes, T>;
  S sum{};
  for (auto& v : most.v) v = typename S::Vec{} - std::numeric_limits<T>::infinity();
  for (int64_t c = 0; c < n.values; ++c) {
    const S l = load<bytes, whole>(logits + c * n.units, count);
    for (int i = 0; i < S::vectors; ++i) most.v[i] = l.v[i] > most.v[i] ? l.v[i] : most.v[i];
  }
  for (int64_t c = 0; c < n.values; ++c) {
    S l = load<bytes, whole>(logits + c * n.units, count);
    for (int i = 0; i < S::vectors; ++i) {
      l.v[i] -= most.v[i];
      exponentiate(l.v[i]);
      sum.v[i] += l.v[i];
    }
    if (exponentials) store<bytes, true>(l, exponentials + c * S::units, count);
  }
  return sum;
}

template <int bytes, bool whole, class T>
TZ_INLINE void look_up(const T* logits, const int64_t* x, const Sizes& n, int64_t count, T* out) {
  using S = Stripe<bytes, T>;
  S most, log_sum = sum_up<bytes, whole>(logits, n, count, most, static_cast<T*>(nullptr));
  for (auto& v : log_sum.v) logarithm(v);
  for (int64_t b = 0; b < n.batch; ++b) {
    S row = load<bytes, whole>(logits + x[b] * n.units, count);
    for (int i = 0; i < S::vectors; ++i) row.v[i] = (row.v[i] - most.v[i]) - log_sum.v[i];
    store<bytes, whole>(row, out + b * n.units, count);
  }
}

template <int bytes, bool whole, class T>
TZ_INLINE void add_slopes(const T* grad, const T* logits, const int64_t* x, const Sizes& n,
                          int64_t count, T* exponentials, T* out) {
  using S = Stripe<bytes, T>;
  for (int64_t c = 0; c < n.values; ++c) store<bytes, whole>(S{}, out + c * n.units, count);
  for (int64_t b = 0; b < n.batch; ++b) {
    T* place = out + x[b] * n.units;
    S sum = load<bytes, whole>(place, count);
    const S g = load<bytes, whole>(grad + b * n.units, count);
    for (int i = 0; i < S::vectors; ++i) sum.v[i] += g.v[i];
    store<bytes, whole>(sum, place, count);
  }
  S most, share{};
  const S sum = sum_up<bytes, whole>(logits, n, count, most, exponentials);
  for (int64_t c = 0; c < n.values; ++c) {
    const S g = load<bytes, whole>(out + c * n.units, count);
    for (int i = 0; i < S::vectors; ++i) share.v[i] += g.v[i];
  }
  for (int i = 0; i < S::vectors; ++i) share.v[i] /= sum.v[i];
  for (int64_t c = 0; c < n.values; ++c) {
    S g = load<bytes, whole>(out + c * n.units, count);
    const S e = load<bytes, true>(exponentials + c * S::units, count);
    for (int i = 0; i < S::vectors; ++i) g.v[i] -= e.v[i] * share.v[i];
    store<bytes, whole>(g, out + c * n.units, count);
  }
}

struct Task {  // a stripe of a fold
  int64_t fold, unit, count;
};

template <class T>
inline Task task_of(const Sizes& n, int64_t number) {
  constexpr int64_t units = Stripe<64, T>::units;
  const int64_t stripes = (n.units + units - 1) / units, unit = number % stripes * units;
  return {number / stripes, unit, std::min(units, n.units - unit)};
}

template <int bytes, class T>
TZ_INLINE void forward_body(const T* logits, const int64_t* x, const Sizes* sizes, T* out,
                            int64_t begin, int64_t end) {
  const Sizes& n = *sizes;
  for (int64_t number = begin; number < end; ++number) {
    const Task t = task_of<T>(n, number);
    const T* from = logits + t.fold * n.values * n.units + t.unit;
    T* to = out + t.fold * n.batch * n.units + t.unit;
    const int64_t* at = x + t.fold * n.batch;
    if (t.count == Stripe<bytes, T>::units) look_up<bytes, true>(from, at, n, t.count, to);
    else look_up<bytes, false>(from, at, n, t.count, to);
  }
}
TZ_ISA(forward, forward_body)

template <int bytes, class T>
TZ_INLINE void backward_body(const T* grad, const T* logits, const int64_t* x, const Sizes* sizes,
                             T* out, int64_t begin, int64_t end) {
  const Sizes& n = *sizes;
  std::vector<T> held(n.values * Stripe<bytes, T>::units);
  for (int64_t number = begin; number < end; ++number) {
    const Task t = task_of<T>(n, number);
    const int64_t table = t.fold * n.values * n.units + t.unit;
    const T* from = grad + t.fold * n.batch * n.units + t.unit;
    const int64_t* at = x + t.fold * n.batch;
    if (t.count == Stripe<bytes, T>::units)
      add_slopes<bytes, true>(from, logits + table, at, n, t.count, held.data(), out + table);
    else
      add_slopes<bytes, false>(from, logits + table, at, n, t.count, held.data(), out + table);
  }
}
TZ_ISA(backward, backward_body)

Sizes check(const char* op, const Tensor& logits, const Tensor& x) {
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(logits.dim() == 3 && x.dim() == 2 && logits.size(0) == x.size(0), op,
                  ": sizes that don't fit");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": expected float32 or float64");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, op, ": x must be int64");
  return {logits.size(0), logits.size(1), logits.size(2), x.size(1)};
}

const int64_t* check_values(const char* op, const Tensor& x, const Sizes& n) {
  const int64_t* at = x.const_data_ptr<int64_t>();
  int64_t low = 0, high = -1;
  for (int64_t i = 0; i < n.folds * n.batch; ++i) low = std::min(low, at[i]), high = std::max(high, at[i]);
  STD_TORCH_CHECK(low >= 0 && high < n.values, op, ": x holds values outside 0 to ", n.values - 1);
  return at;
}

template <class T>
int64_t tasks(const Sizes& n) {
  constexpr int64_t units = Stripe<64, T>::units;
  return n.folds * ((n.units + units - 1) / units);
}

template <class T>
void run(const Sizes& n, const Tensor& logits, const int64_t* x, Tensor& out) {
  const T* from = logits.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  parallel_for(0, tasks<T>(n), 1,
               [&](int64_t begin, int64_t end) { forward(from, x, &n, to, begin, end); });
}

template <class T>
void run_back(const Sizes& n, const Tensor& grad, const Tensor& logits, const int64_t* x, Tensor& out) {
  const T *above = grad.const_data_ptr<T>(), *from = logits.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  parallel_for(0, tasks<T>(n), 1,
               [&](int64_t begin, int64_t end) { backward(above, from, x, &n, to, begin, end); });
}

Tensor categorical_log_prob(const Tensor& logits, const Tensor& x) {
  const Sizes n = check("categorical_log_prob", logits, x);
  const Tensor table = torch::stable::contiguous(logits), values = torch::stable::contiguous(x);
  const int64_t* at = check_values("categorical_log_prob", values, n);
  Tensor out = fresh(logits, {n.folds, n.batch, n.units});
  if (logits.scalar_type() == ScalarType::Double) run<double>(n, table, at, out);
  else run<float>(n, table, at, out);
  return out;
}

Tensor categorical_log_prob_backward(const Tensor& grad, const Tensor& logits, const Tensor& x) {
  const char* op = "categorical_log_prob_backward";
  const Sizes n = check(op, logits, x);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == n.folds && grad.size(1) == n.batch &&
                      grad.size(2) == n.units && grad.scalar_type() == logits.scalar_type(),
                  op, ": gradient must have the shape and type of the output");
  const Tensor table = torch::stable::contiguous(logits), values = torch::stable::contiguous(x);
  const Tensor above = torch::stable::contiguous(grad);
  const int64_t* at = check_values(op, values, n);
  Tensor out = fresh(logits, {n.folds, n.values, n.units});
  if (logits.scalar_type() == ScalarType::Double) run_back<double>(n, above, table, at, out);
  else run_back<float>(n, above, table, at, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("categorical_log_prob", TORCH_BOX(&categorical_log_prob));
  m.impl("categorical_log_prob_backward", TORCH_BOX(&categorical_log_prob_backward));
}

}  // namespace torchzoo
