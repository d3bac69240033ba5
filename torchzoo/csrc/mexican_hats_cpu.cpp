// mexican_hats and mexican_hats_backward on the CPU, in tasks of a stretch of rows and a block of inputs
// whose parameters stay in L1. Gradients of parameters are summed within a task and then over the tasks
// in their order; tasks are cut by the shape alone, so that no result depends on the number of threads.
#include "basis_functions_cpu.h"
#include "mexican_hats.h"

namespace torchzoo {
namespace {

using basis::Hat;
using basis::Lanes;

constexpr int64_t WIDTH = 128;  // inputs of a block
constexpr int64_t ROWS = 64;    // rows of a stretch, at the least

template <class A>
struct Hats {  // shift and rate of a block's first input; the next function is `inputs` further on
  const A *shift, *rate;
  int64_t count, inputs;
};

// x (rows, inputs) and out (rows, count, inputs), of which n inputs are computed.
template <int bytes, class A>
TZ_INLINE void hats_body(const Hats<A>* h, const A* x, int64_t rows, int64_t n, A* out) {
  using L = Lanes<bytes, A>;
  using Vec = typename L::Vec;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; i += L::count) {
      const int64_t some = std::min(L::count, n - i);
      const Vec v = L::load(x + row * h->inputs + i, some);
      for (int64_t k = 0; k < h->count; ++k) {
        const int64_t at = k * h->inputs + i;
        const Vec u = (v - L::load(h->shift + at, some)) * L::load(h->rate + at, some);
        L::store(out + row * h->count * h->inputs + at, Hat<A, Vec>(u).value(), some);
      }
    }
}
TZ_ISA(hats, hats_body)

// dx, and added to the sums what goes to shift and rate.
template <int bytes, class A>
TZ_INLINE void hat_slopes_body(const Hats<A>* h, const A* grad, const A* x, int64_t rows, int64_t n,
                               A* dx, A* to_shift, A* to_rate) {
  using L = Lanes<bytes, A>;
  using Vec = typename L::Vec;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; i += L::count) {
      const int64_t some = std::min(L::count, n - i);
      const Vec v = L::load(x + row * h->inputs + i, some);
      Vec total = {};
      for (int64_t k = 0; k < h->count; ++k) {
        const int64_t at = k * h->inputs + i;
        const Vec offset = v - L::load(h->shift + at, some), rate = L::load(h->rate + at, some);
        const Vec above = L::load(grad + row * h->count * h->inputs + at, some);
        const Vec each = above * Hat<A, Vec>(offset * rate).slope();
        total += each * rate;
        L::store(to_shift + at, L::load(to_shift + at, some) - each * rate, some);
        L::store(to_rate + at, L::load(to_rate + at, some) + each * offset, some);
      }
      L::store(dx + row * h->inputs + i, total, some);
    }
}
TZ_ISA(hat_slopes, hat_slopes_body)

// Calls run(stretch, first row, rows, first input, inputs) for each task.
template <class Run>
void for_tasks(int64_t rows, int64_t inputs, int64_t stretches, const Run& run) {
  const int64_t blocks = (inputs + WIDTH - 1) / WIDTH;
  parallel_for(0, stretches * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t s = task / blocks, first = task % blocks * WIDTH;
      const int64_t row = s * rows / stretches, last = (s + 1) * rows / stretches;
      run(s, row, last - row, first, std::min(WIDTH, inputs - first));
    }
  });
}

int64_t stretches_of(int64_t rows) { return std::clamp<int64_t>(rows / ROWS, 1, MOST_PARTS); }

// total[j] = Σ_p parts[p · size + j], p < count.
template <class A>
void add_up(const A* parts, int64_t count, int64_t size, A* total) {
  for (int64_t j = 0; j < size; ++j) {
    double sum = 0;
    for (int64_t p = 0; p < count; ++p) sum += static_cast<double>(parts[p * size + j]);
    total[j] = static_cast<A>(sum);
  }
}

Tensor mexican_hats(const Tensor& x, const Tensor& shift, const Tensor& rate) {
  basis::check_hats("mexican_hats", x, shift, rate);
  const Tensor in = dense(x), shifts = dense(shift), rates = dense(rate);
  const int64_t rows = x.size(0), inputs = x.size(1), count = shift.size(0);
  Tensor out = torch::stable::new_empty(x, {rows, count, inputs});
  basis::for_inputs("mexican_hats", x, [&](auto zero) {
    using A = decltype(zero);
    const A *from = in.const_data_ptr<A>(), *s = shifts.const_data_ptr<A>();
    const A* r = rates.const_data_ptr<A>();
    A* to = out.mutable_data_ptr<A>();
    for_tasks(rows, inputs, stretches_of(rows), [&](int64_t, int64_t row, int64_t some, int64_t i, int64_t n) {
      const Hats<A> h{s + i, r + i, count, inputs};
      hats(&h, from + row * inputs + i, some, n, to + row * count * inputs + i);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> mexican_hats_backward(const Tensor& grad, const Tensor& x,
                                                         const Tensor& shift, const Tensor& rate) {
  const int64_t rows = x.size(0), inputs = x.size(1), count = shift.size(0), size = count * inputs;
  basis::check_hats("mexican_hats_backward", x, shift, rate);
  basis::check_features("mexican_hats_backward", grad, x, count);
  const Tensor above = dense(grad), in = dense(x), shifts = dense(shift), rates = dense(rate);
  Tensor dx = fresh(in), dshift = fresh(shifts), drate = fresh(rates);
  basis::for_inputs("mexican_hats_backward", x, [&](auto zero) {
    using A = decltype(zero);
    const A *g = above.const_data_ptr<A>(), *from = in.const_data_ptr<A>();
    const A *s = shifts.const_data_ptr<A>(), *r = rates.const_data_ptr<A>();
    A* to = dx.mutable_data_ptr<A>();
    const int64_t stretches = stretches_of(rows);
    std::vector<A> parts(2 * stretches * size, A(0));
    for_tasks(rows, inputs, stretches, [&](int64_t part, int64_t row, int64_t some, int64_t i, int64_t n) {
      const Hats<A> h{s + i, r + i, count, inputs};
      A* sums = parts.data() + part * size + i;
      hat_slopes(&h, g + row * count * inputs + i, from + row * inputs + i, some, n, to + row * inputs + i,
                 sums, sums + stretches * size);
    });
    add_up(parts.data(), stretches, size, dshift.mutable_data_ptr<A>());
    add_up(parts.data() + stretches * size, stretches, size, drate.mutable_data_ptr<A>());
  });
  return {dx, dshift, drate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("mexican_hats", TORCH_BOX(&mexican_hats));
  m.impl("mexican_hats_backward", TORCH_BOX(&mexican_hats_backward));
}

}  // namespace torchzoo
