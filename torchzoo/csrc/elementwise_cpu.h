// Elementwise functions of x and a parameter on the CPU: x is read once and y written once.
//
// The parameter is one number, or has the trailing shape of x: `features` numbers, repeated over
// rows. Work is cut into tasks by the shape alone, and gradients of the parameter are summed within
// a task and then over the tasks in their order, so that no result depends on the number of threads.
// Half precision is widened TILE elements at a time.
#pragma once

#include "cpu.h"
#include "elementwise_tensors.h"

namespace torchzoo {

constexpr int64_t TILE = 512;       // elements that stay in L1
constexpr int64_t BLOCK = 16384;    // elements of a task
constexpr int64_t MOST_PARTS = 64;  // stretches of rows whose gradients are summed by themselves

inline Tensor fresh_result(const Tensor& x, const Tensor& p) {  // as `empty_result`
  return p.dim() ? fresh(x, x.sizes()) : fresh(x);
}

template <class A, class T>
TZ_INLINE const A* widened(const T* from, int64_t n, A* buffer) {
  if constexpr (std::is_same_v<A, T>) return from;
  else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<A>(from[i]);
    return buffer;
  }
}

template <class T, class A>
TZ_INLINE void narrow(const A* from, int64_t n, T* to) {
  if constexpr (!std::is_same_v<A, T>)
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

// Σ (in[i] − mean), or with `squares` Σ (in[i] − mean)². The sums side by side are as many for every
// instruction set, in vectors that it has: larger ones would go through memory.
template <int bytes, bool squares, class A>
TZ_INLINE A tile_sum(const A* in, int64_t n, A mean) {
  using Vec __attribute__((vector_size(bytes))) = A;
  constexpr int64_t lanes = bytes / sizeof(A), vectors = 64 / bytes;
  Vec sums[vectors] = {};
  int64_t i = 0;
  for (; i + vectors * lanes <= n; i += vectors * lanes)
    for (int64_t k = 0; k < vectors; ++k) {
      Vec v;
      std::memcpy(&v, in + i + k * lanes, sizeof(v));
      v -= mean;
      sums[k] += squares ? v * v : v;
    }
  A total = 0;
  for (const Vec& sum : sums)
    for (int64_t l = 0; l < lanes; ++l) total += sum[l];
  for (; i < n; ++i) total += squares ? (in[i] - mean) * (in[i] - mean) : in[i] - mean;
  return total;
}

// y[0 : n] = f(x[0 : n], p), p one number or n of them.
template <int bytes, bool one, class F, class T, class A>
TZ_INLINE void values_body(F f, const T* x, const A* p, int64_t n, T* y) {
  alignas(64) A wide[TILE], result[TILE];
  for (int64_t begin = 0; begin < n; begin += TILE) {
    const int64_t count = std::min(TILE, n - begin);
    const A* in = widened(x + begin, count, wide);
    const A* q = one ? p : p + begin;
    A* __restrict out = result;
    if constexpr (std::is_same_v<A, T>) out = y + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = f.value(in[i], q[one ? 0 : i]);
    narrow(result, count, y + begin);
  }
}

// dx[0 : n], and what goes to p: added to `dp` where it has features, else its sum is put there.
template <int bytes, bool one, class F, class T, class A>
TZ_INLINE void slopes_body(F f, const T* grad, const T* x, const A* p, int64_t n, T* dx, A* dp) {
  alignas(64) A wide_grad[TILE], wide[TILE], to_x[TILE], to_p[TILE];
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += TILE) {
    const int64_t count = std::min(TILE, n - begin);
    const A* in = widened(x + begin, count, wide);
    const A* g = widened(grad + begin, count, wide_grad);
    const A* q = one ? p : p + begin;
    A* __restrict out = to_x;
    if constexpr (std::is_same_v<A, T>) out = dx + begin;
    for (int64_t i = 0; i < count; ++i) {
      const Slopes<A> both = f.slopes(g[i], in[i], q[one ? 0 : i]);
      out[i] = both.x;
      to_p[i] = both.p;
    }
    narrow(to_x, count, dx + begin);
    if constexpr (one) {
      sum += static_cast<double>(tile_sum<bytes, false>(to_p, count, A(0)));
    } else {
      for (int64_t i = 0; i < count; ++i) dp[begin + i] += to_p[i];
    }
  }
  if constexpr (one) *dp = static_cast<A>(sum);
}

template <int bytes, class F, class T, class A>
TZ_INLINE void values_one_body(F f, const T* x, const A* p, int64_t n, T* y) {
  values_body<bytes, true>(f, x, p, n, y);
}
TZ_ISA(values_one, values_one_body)

template <int bytes, class F, class T, class A>
TZ_INLINE void values_many_body(F f, const T* x, const A* p, int64_t n, T* y) {
  values_body<bytes, false>(f, x, p, n, y);
}
TZ_ISA(values_many, values_many_body)

template <int bytes, class F, class T, class A>
TZ_INLINE void slopes_one_body(F f, const T* grad, const T* x, const A* p, int64_t n, T* dx, A* dp) {
  slopes_body<bytes, true>(f, grad, x, p, n, dx, dp);
}
TZ_ISA(slopes_one, slopes_one_body)

template <int bytes, class F, class T, class A>
TZ_INLINE void slopes_many_body(F f, const T* grad, const T* x, const A* p, int64_t n, T* dx, A* dp) {
  slopes_body<bytes, false>(f, grad, x, p, n, dx, dp);
}
TZ_ISA(slopes_many, slopes_many_body)

// Calls run(first, count) for stretches of one row after another, or of all x where p is one number.
template <class Run>
void for_stretches(int64_t size, int64_t features, const Run& run) {
  const int64_t blocks = (features + BLOCK - 1) / BLOCK, rows = features ? size / features : 0;
  const int64_t grain = std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, features));
  parallel_for(0, rows * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * BLOCK;
      run(task / blocks * features + first, first, std::min(BLOCK, features - first));
    }
  });
}

// `make(A())` gives the function for the type that is computed in.
template <class Make>
Tensor elementwise(const char* op, const Tensor& x, const Tensor& p, const Make& make) {
  check_parameter(op, x, p);
  Tensor y = fresh_result(x, p);
  const Tensor in = in_order_of(x, y);
  const int64_t size = x.numel();
  for_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const auto f = make(A());
    const T* from = in.const_data_ptr<T>();
    const A* q = p.const_data_ptr<A>();
    T* to = y.mutable_data_ptr<T>();
    for_stretches(size, p.dim() ? p.numel() : size, [&](int64_t at, int64_t feature, int64_t n) {
      if (p.dim()) values_many(f, from + at, q + feature, n, to + at);
      else values_one(f, from + at, q, n, to + at);
    });
  });
  return y;
}

template <class F, class T, class A>
void slopes_of_one(const F& f, const T* grad, const T* x, const A* p, int64_t size, T* dx, A* dp) {
  std::vector<A> parts((size + BLOCK - 1) / BLOCK);
  for_stretches(size, size, [&](int64_t at, int64_t, int64_t n) {
    slopes_one(f, grad + at, x + at, p, n, dx + at, parts.data() + at / BLOCK);
  });
  double total = 0;
  for (const A part : parts) total += static_cast<double>(part);
  *dp = static_cast<A>(total);
}

// Tasks are a stretch of rows and a block of features; each adds up its rows.
template <class F, class T, class A>
void slopes_of_many(const F& f, const T* grad, const T* x, const A* p, int64_t rows,
                    int64_t features, T* dx, A* dp) {
  const int64_t blocks = (features + TILE - 1) / TILE;
  const int64_t count = std::clamp<int64_t>(rows / 16, 1, MOST_PARTS);
  std::vector<A> parts(count * features, A(0));
  parallel_for(0, count * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / blocks, first = task % blocks * TILE;
      const int64_t n = std::min(TILE, features - first);
      for (int64_t row = part * rows / count; row < (part + 1) * rows / count; ++row) {
        const int64_t at = row * features + first;
        slopes_many(f, grad + at, x + at, p + first, n, dx + at, parts.data() + part * features + first);
      }
    }
  });
  for (int64_t j = 0; j < features; ++j) {
    double total = 0;
    for (int64_t part = 0; part < count; ++part) total += static_cast<double>(parts[part * features + j]);
    dp[j] = static_cast<A>(total);
  }
}

template <class Make>
std::tuple<Tensor, Tensor> elementwise_backward(const char* op, const Tensor& grad, const Tensor& x,
                                                const Tensor& p, const Make& make) {
  check_parameter(op, x, p);
  check_gradient(op, grad, x);
  Tensor dx = fresh_result(x, p), dp = fresh(p);
  const Tensor in = in_order_of(x, dx), g = in_order_of(grad, dx);
  for_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const auto f = make(A());
    const T *from = in.const_data_ptr<T>(), *above = g.const_data_ptr<T>();
    const A* q = p.const_data_ptr<A>();
    T* to = dx.mutable_data_ptr<T>();
    A* to_p = dp.mutable_data_ptr<A>();
    const int64_t features = p.numel();
    if (!p.dim()) slopes_of_one(f, above, from, q, x.numel(), to, to_p);
    else if (features) slopes_of_many(f, above, from, q, x.numel() / features, features, to, to_p);
  });
  return {dx, dp};
}

}  // namespace torchzoo
