// scaled_softmax and scaled_softmax_backward on the CPU. A row, which as a rule stays in the cache, is
// read from memory once: for its largest number, for its exponentials and for their quotients by their
// sum. Threads take runs of rows, so that no result depends on how many there are.
#include "elementwise_cpu.h"
#include "scaled_softmax.h"

#include <limits>
#include <optional>

namespace torchzoo {
namespace {

// max factor·in[i]; NaN is passed over, minus infinity where there is nothing else.
template <int bytes, class A>
TZ_INLINE A largest(const A* in, int64_t n, A factor) {
  using Vec __attribute__((vector_size(bytes))) = A;
  constexpr int64_t lanes = bytes / sizeof(A), vectors = 4;
  const A least = -std::numeric_limits<A>::infinity();
  Vec best[vectors];
  for (Vec& v : best) v = Vec{} + least;
  int64_t i = 0;
  for (; i + vectors * lanes <= n; i += vectors * lanes)
    for (int64_t k = 0; k < vectors; ++k) {
      Vec v;
      std::memcpy(&v, in + i + k * lanes, sizeof(v));
      v *= factor;
      best[k] = v > best[k] ? v : best[k];
    }
  A most = least;
  for (const Vec& v : best)
    for (int64_t l = 0; l < lanes; ++l) most = v[l] > most ? v[l] : most;
  for (; i < n; ++i) most = factor * in[i] > most ? factor * in[i] : most;
  return most;
}

// y[0 : n] = softmax(s z[0 : n]); `wide` has room for n numbers, unless y itself is of type A.
template <int bytes, class T, class A>
TZ_INLINE void row_values(const T* z, A s, int64_t n, T* y, A* wide) {
  alignas(64) A buffer[TILE];
  const RowScale<A> scale(s);
  A peak = -std::numeric_limits<A>::infinity();
  for (int64_t begin = 0; begin < n; begin += TILE) {
    const int64_t count = std::min(TILE, n - begin);
    peak = std::max(peak, largest<bytes>(widened(z + begin, count, buffer), count, scale.half));
  }
  if constexpr (std::is_same_v<A, T>) wide = y;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += TILE) {
    const int64_t count = std::min(TILE, n - begin);
    const A* in = widened(z + begin, count, buffer);
    A* __restrict out = wide + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = scale.exponential(in[i], peak);
    sum += static_cast<double>(tile_sum<bytes, false>(out, count, A(0)));
  }
  const A share = static_cast<A>(1 / sum);
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(wide[i] * share);
}

template <int bytes, class T, class A>
TZ_INLINE void values_body(const T* z, const A* s, int64_t begin, int64_t end, int64_t n, T* y,
                           A* wide) {
  for (int64_t row = begin; row < end; ++row)
    row_values<bytes>(z + row * n, s[row], n, y + row * n, wide);
}
TZ_ISA(values, values_body)

// dz[i] = s y[i] (g[i] − t), t = Σ g[i] y[i], and Σ z[i] y[i] (g[i] − t) with `of_scale`, else 0.
template <int bytes, bool of_scale, class T, class A>
TZ_INLINE A row_slopes(const T* g, const T* y, A s, const T* z, int64_t n, T* dz) {
  alignas(64) A wide_g[TILE], wide_y[TILE], wide_z[TILE], terms[TILE];
  double sum = 0, slope = 0;
  for (int64_t begin = 0; begin < n; begin += TILE) {
    const int64_t count = std::min(TILE, n - begin);
    const A *above = widened(g + begin, count, wide_g), *p = widened(y + begin, count, wide_y);
    for (int64_t i = 0; i < count; ++i) terms[i] = above[i] * p[i];
    sum += static_cast<double>(tile_sum<bytes, false>(terms, count, A(0)));
  }
  const A t = static_cast<A>(sum);
  for (int64_t begin = 0; begin < n; begin += TILE) {
    const int64_t count = std::min(TILE, n - begin);
    const A *above = widened(g + begin, count, wide_g), *p = widened(y + begin, count, wide_y);
    T* __restrict out = dz + begin;
    if constexpr (of_scale) {
      const A* in = widened(z + begin, count, wide_z);
      for (int64_t i = 0; i < count; ++i) terms[i] = in[i] * (p[i] * (above[i] - t));
      slope += static_cast<double>(tile_sum<bytes, false>(terms, count, A(0)));
    }
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(s * (p[i] * (above[i] - t)));
  }
  return static_cast<A>(slope);
}

template <int bytes, class T, class A>
TZ_INLINE void slopes_body(const T* g, const T* y, const A* s, const T* z, int64_t begin, int64_t end,
                           int64_t n, T* dz, A* ds) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * n;
    if (z) ds[row] = row_slopes<bytes, true>(g + at, y + at, s[row], z + at, n, dz + at);
    else ds[row] = row_slopes<bytes, false>(g + at, y + at, s[row], z, n, dz + at);
  }
}
TZ_ISA(slopes, slopes_body)

// Calls run(first row, one past the last) for runs of rows that are worth a task.
template <class Run>
void for_rows(const RowSizes& size, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, size.columns));
  parallel_for(0, size.rows, grain, run);
}

Tensor scaled_softmax(const Tensor& z, const Tensor& scale) {
  const RowSizes size = check_rows("scaled_softmax", z, scale);
  const Tensor in = dense(z), s = dense(scale);
  Tensor y = fresh(z, z.sizes());
  for_type("scaled_softmax", z, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T* from = in.const_data_ptr<T>();
    const A* scales = s.const_data_ptr<A>();
    T* to = y.mutable_data_ptr<T>();
    for_rows(size, [&](int64_t begin, int64_t end) {
      std::vector<A> wide(std::is_same_v<A, T> ? 0 : size.columns);
      values(from, scales, begin, end, size.columns, to, wide.data());
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> scaled_softmax_backward(const Tensor& grad, const Tensor& y,
                                                   const Tensor& scale, std::optional<Tensor> z) {
  const char* op = "scaled_softmax_backward";
  const RowSizes size = check_rows(op, y, scale);
  check_gradient(op, grad, y);
  if (z) check_gradient(op, *z, y);
  const Tensor above = dense(grad), shares = dense(y), s = dense(scale);
  const std::optional<Tensor> in = z ? std::optional(dense(*z)) : z;
  Tensor dz = fresh(y, y.sizes()), ds = fresh(scale, scale.sizes());
  for_type(op, y, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T *g = above.const_data_ptr<T>(), *p = shares.const_data_ptr<T>();
    const T* from = in ? in->const_data_ptr<T>() : nullptr;
    const A* scales = s.const_data_ptr<A>();
    T* to = dz.mutable_data_ptr<T>();
    A* to_scale = ds.mutable_data_ptr<A>();
    for_rows(size, [&](int64_t begin, int64_t end) {
      slopes(g, p, scales, from, begin, end, size.columns, to, to_scale);
    });
  });
  return {dz, ds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("scaled_softmax", TORCH_BOX(&scaled_softmax));
  m.impl("scaled_softmax_backward", TORCH_BOX(&scaled_softmax_backward));
}

}  // namespace torchzoo
