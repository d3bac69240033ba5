// grouped_ffn: the experts of a mixture, from tokens to weighted sums of their outputs, and back.
//
//   h_n = x[src_n]·w_in[e],   a_n = act(h_n),   y[src_n] += weight_n · a_n·w_out[e]
//
// Experts are taken one after the other, and each is shared out among the threads by columns: tokens
// that several experts serve are summed without atomics, in the order of the experts, and results are
// the same for any number of threads. Only h is kept for all rows; whatever else a row needs lives in
// scratch that is as long as one expert's rows and serves the next one again, so that no pass over all
// rows goes through memory.
#include "exp.h"
#include "gemm.h"
#include "groups.h"

#include <memory>

namespace torchzoo {
namespace {

constexpr int64_t LANES = 16;  // partial sums of a dot product, the same for every instruction set

template <class T>
struct Layer {
  const T *x, *w_in, *w_out, *weights;
  const int64_t* src;
  int64_t in_strides[3], out_strides[3];
  int64_t dim, hidden, width;  // width of h: twice the hidden features where gated
  bool gated() const { return width != hidden; }
  Matrix<T> in(int64_t e) const { return {w_in + e * in_strides[0], in_strides[1], in_strides[2]}; }
  Matrix<T> out(int64_t e) const { return {w_out + e * out_strides[0], out_strides[1], out_strides[2]}; }
};

template <class T>
Matrix<T> transposed(Matrix<T> m) {
  return {m.data, m.col, m.row};
}

// LANES neighbours in as many vectors as they fill; fewer at the end of a row, padded with zeros.
template <int bytes, class T>
struct Block {
  using Vec = typename Tile<bytes, T>::Vec;
  static constexpr int64_t lanes = Tile<bytes, T>::lanes, count = LANES / lanes;
  Vec part[count];
  static inline __attribute__((always_inline)) Block load(const T* from, int64_t n) {
    Block b = {};
    std::memcpy(b.part, from, n == LANES ? sizeof(b.part) : n * sizeof(T));
    return b;
  }
  inline __attribute__((always_inline)) void store(T* to, int64_t n) const {
    std::memcpy(to, part, n == LANES ? sizeof(part) : n * sizeof(T));
  }
};

template <class Vec>
TZ_INLINE void to_sigmoid(Vec& x) {
  x = -x;
  exponentiate(x);
  x = 1 / (1 + x);
}

// a(m, n) = act of columns of h; gated: silu of them times those `up` columns further.
template <int bytes, class T>
TZ_INLINE void activate_body(const T* h, int64_t width, int64_t up, int64_t m, int64_t n, T* a,
                             int64_t lda) {
  using B = Block<bytes, T>;
  for (int64_t i = 0; i < m; ++i, h += width, a += lda)
    for (int64_t j = 0; j < n; j += LANES) {
      const int64_t count = std::min(LANES, n - j);
      B act = B::load(h + j, count), lifted = up ? B::load(h + up + j, count) : act;
      for (int64_t v = 0; v < B::count; ++v)
        if (up) {
          typename B::Vec sigmoid = act.part[v];
          to_sigmoid(sigmoid);
          act.part[v] *= sigmoid * lifted.part[v];
        } else {
          const typename B::Vec zero = {};
          act.part[v] = act.part[v] <= zero ? zero : act.part[v];
        }
      act.store(a + j, count);
    }
}
TZ_ISA(activate, activate_body)

// a(m, n) holds da and becomes weight · act; dh = weight · da · act'; dots = <da, act> of each row.
template <int bytes, class T>
TZ_INLINE void activate_back_body(const T* h, int64_t width, int64_t up, int64_t m, int64_t n, T* a,
                                  int64_t lda, T* dh, const T* weights, T* dots) {
  using B = Block<bytes, T>;
  using Vec = typename B::Vec;
  for (int64_t i = 0; i < m; ++i, h += width, dh += width, a += lda) {
    B sums = {};
    for (int64_t j = 0; j < n; j += LANES) {
      const int64_t count = std::min(LANES, n - j);
      B gate = B::load(h + j, count), lifted = up ? B::load(h + up + j, count) : gate;
      B act = B::load(a + j, count);
      for (int64_t v = 0; v < B::count; ++v) {
        const Vec zero = {}, g = gate.part[v], u = lifted.part[v], da = act.part[v];
        const Vec scaled = weights[i] * da;
        Vec value, sigmoid = g;
        if (up) {
          to_sigmoid(sigmoid);
          const Vec silu = g * sigmoid;
          value = silu * u;
          gate.part[v] = scaled * u * (sigmoid + silu * (1 - sigmoid));
          lifted.part[v] = scaled * silu;
        } else {
          value = g <= zero ? zero : g;
          gate.part[v] = g <= zero ? zero : scaled;
        }
        sums.part[v] += da * value;
        act.part[v] = weights[i] * value;
      }
      gate.store(dh + j, count);
      if (up) lifted.store(dh + up + j, count);
      act.store(a + j, count);
    }
    dots[i] = 0;
    for (int64_t l = 0; l < LANES; ++l) dots[i] += sums.part[l / B::lanes][l % B::lanes];
  }
}
TZ_ISA(activate_back, activate_back_body)

template <class T>
void gather(const T* rows, const int64_t* src, int64_t count, int64_t dim, T* out) {
  parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) std::copy_n(rows + src[n] * dim, dim, out + n * dim);
  });
}

// out[src_n] += scale_n · rows_n, of some columns.
template <class T>
void scatter(const T* rows, const int64_t* src, const T* scale, int64_t count, int64_t dim,
             int64_t columns, T* out) {
  for (int64_t n = 0; n < count; ++n) {
    T* to = out + src[n] * dim;
    const T s = scale ? scale[n] : T(1);
    for (int64_t j = 0; j < columns; ++j) to[j] += s * rows[n * dim + j];
  }
}

struct Strip {
  int product;
  int64_t first, columns;
};

// The strips of one expert's products, each (columns of the result, cost of a column), all at once: as
// wide as gives each thread one of each product, or two where several products can be shared out.
template <class T, class Run>
void for_products(const std::vector<std::pair<int64_t, double>>& products, const Run& run) {
  std::vector<Strip> strips;
  std::vector<double> cost(1, 0.0);
  const int64_t pieces = torch::stable::get_num_threads() * (products.size() > 1 ? 2 : 1);
  for (size_t p = 0; p < products.size(); ++p) {
    const auto [n, price] = products[p];
    const int64_t share = (n + pieces * NARROW - 1) / (pieces * NARROW) * NARROW;
    const int64_t width = std::min(STRIP, std::max(NARROW, share));
    for (int64_t j = 0; j < n; j += width) {
      strips.push_back({static_cast<int>(p), j, std::min(width, n - j)});
      cost.push_back(cost.back() + price * static_cast<double>(strips.back().columns));
    }
  }
  for_runs(cost, [&](int64_t first, int64_t last) {
    const std::unique_ptr<T[]> scratch(new T[gemm_scratch(STRIP)]);
    for (int64_t s = first; s < last; ++s) run(strips[s], scratch.get());
  });
}

int64_t longest(const Ends& ends) {
  int64_t rows = 0;
  for (size_t e = 0; e + 1 < ends.at.size(); ++e) rows = std::max(rows, ends.rows(e));
  return rows;
}

template <class T>
void forward(const Layer<T>& layer, const Ends& ends, T* y, T* h) {
  const auto [dim, hidden, width] = std::tuple(layer.dim, layer.hidden, layer.width);
  const int64_t most = longest(ends), up = width - hidden;
  const std::unique_ptr<T[]> rows(new T[most * dim]), act(new T[most * hidden]);
  for (size_t e = 0; e + 1 < ends.at.size(); ++e) {
    const int64_t start = ends.at[e], m = ends.rows(e);
    if (!m) continue;
    const int64_t* src = layer.src + start;
    gather(layer.x, src, m, dim, rows.get());
    for_products<T>({{hidden, 1.0}}, [&](const Strip& strip, T* scratch) {
      T* out = h + start * width + strip.first;
      for (int64_t part = 0; part <= up; part += hidden)
        gemm(Matrix<T>{rows.get(), dim, 1}, layer.in(e).from(0, part + strip.first), out + part, width, m,
             strip.columns, dim, scratch);
      activate(static_cast<const T*>(out), width, up, m, strip.columns, act.get() + strip.first, hidden);
    });
    for_products<T>({{dim, 1.0}}, [&](const Strip& strip, T* scratch) {
      T* out = rows.get() + strip.first;  // the inputs are not needed any more
      gemm(Matrix<T>{act.get(), hidden, 1}, layer.out(e).from(0, strip.first), out, dim, m, strip.columns,
           hidden, scratch);
      scatter(out, src, layer.weights + start, m, dim, strip.columns, y + strip.first);
    });
  }
}

template <class T>
struct Gradients {  // null where nobody asks
  T *x, *w_in, *w_out, *weights;
};

template <class T>
void backward(const Layer<T>& layer, const Ends& ends, const T* dy, const T* h, const Gradients<T>& to) {
  const auto [dim, hidden, width] = std::tuple(layer.dim, layer.hidden, layer.width);
  const int64_t most = longest(ends), up = width - hidden, blocks = (hidden + NARROW - 1) / NARROW;
  const std::unique_ptr<T[]> x(new T[most * dim]), g(new T[most * dim]), dx(new T[most * dim]),
      act(new T[most * hidden]), dh(new T[most * width]), dots(new T[most * blocks]);
  for (size_t e = 0; e + 1 < ends.at.size(); ++e) {
    const int64_t start = ends.at[e], m = ends.rows(e);
    if (!m) {
      if (to.w_in) zero(to.w_in + e * dim * width, dim, width, width);
      if (to.w_out) zero(to.w_out + e * hidden * dim, hidden, dim, dim);
      continue;
    }
    const int64_t* src = layer.src + start;
    const T* weights = layer.weights + start;
    gather(dy, src, m, dim, g.get());
    if (to.w_in) gather(layer.x, src, m, dim, x.get());
    for_products<T>({{hidden, 1.0}}, [&](const Strip& strip, T* scratch) {
      T* a = act.get() + strip.first;
      gemm(Matrix<T>{g.get(), dim, 1}, transposed(layer.out(e)).from(0, strip.first), a, hidden, m,
           strip.columns, dim, scratch);
      for (int64_t j = 0; j < strip.columns; j += NARROW) {
        const int64_t column = strip.first + j;
        T* sums = dots.get() + column / NARROW * most;
        activate_back(h + start * width + column, width, up, m, std::min(NARROW, strip.columns - j), a + j,
                      hidden, dh.get() + column, weights, sums);
      }
    });
    for (int64_t n = 0; n < m; ++n) {
      to.weights[start + n] = 0;
      for (int64_t b = 0; b < blocks; ++b) to.weights[start + n] += dots[b * most + n];
    }
    const double rows = static_cast<double>(m);
    for_products<T>(
        {{to.w_out ? dim : 0, rows * static_cast<double>(hidden)},
         {to.w_in ? width : 0, rows * static_cast<double>(dim)},
         {to.x ? dim : 0, rows * static_cast<double>(width)}},
        [&](const Strip& strip, T* scratch) {
          const auto [product, j, columns] = strip;
          if (product == 0) {
            gemm(Matrix<T>{act.get(), 1, hidden}, Matrix<T>{g.get() + j, dim, 1},
                 to.w_out + e * hidden * dim + j, dim, hidden, columns, m, scratch);
          } else if (product == 1) {
            gemm(Matrix<T>{x.get(), 1, dim}, Matrix<T>{dh.get() + j, width, 1}, to.w_in + e * dim * width + j,
                 width, dim, columns, m, scratch);
          } else {
            gemm(Matrix<T>{dh.get(), width, 1}, transposed(layer.in(e)).from(0, j), dx.get() + j, dim, m,
                 columns, width, scratch);
            scatter<T>(dx.get() + j, src, nullptr, m, dim, columns, to.x + j);
          }
        });
  }
}

// Half precision is computed in float32.
Tensor wide(const Tensor& t) {
  const bool half = t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
  return half ? torch::stable::to(t, ScalarType::Float) : t;
}

Tensor zeros(const Tensor& like, std::vector<int64_t> sizes) {
  Tensor out = fresh(like, sizes);
  if (out.numel()) std::memset(out.mutable_data_ptr(), 0, out.numel() * out.element_size());
  return out;
}

struct Inputs {
  Tensor x, w_in, w_out, src, weights;
  Inputs(const Tensor& x, const Tensor& w_in, const Tensor& w_out, const Tensor& src, const Tensor& weights)
      : x(torch::stable::contiguous(wide(x))), w_in(wide(w_in)), w_out(wide(w_out)),
        src(torch::stable::contiguous(src)), weights(torch::stable::contiguous(weights)) {
    const ScalarType type = this->x.scalar_type();
    for (const Tensor* t : {&this->x, &this->w_in, &this->w_out, &this->weights})
      STD_TORCH_CHECK(t->scalar_type() == type && (type == ScalarType::Float || type == ScalarType::Double),
                      "grouped_ffn: expected floating-point inputs of one type");
    const int64_t* rows = this->src.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < src.numel(); ++n)
      STD_TORCH_CHECK(rows[n] >= 0 && rows[n] < x.size(0), "src: expected rows of x, below ", x.size(0),
                      ", got ", rows[n]);
  }
  template <class T>
  Layer<T> layer() const {
    Layer<T> out{x.const_data_ptr<T>(), w_in.const_data_ptr<T>(), w_out.const_data_ptr<T>(),
                 weights.const_data_ptr<T>(), src.const_data_ptr<int64_t>(), {}, {},
                 x.size(1), w_out.size(1), w_in.size(2)};
    for (int d = 0; d < 3; ++d) out.in_strides[d] = w_in.stride(d), out.out_strides[d] = w_out.stride(d);
    return out;
  }
};

std::tuple<Tensor, Tensor> grouped_ffn(const Tensor& x, const Tensor& w_in, const Tensor& w_out,
                                       const Tensor& offsets, const Tensor& src, const Tensor& weights) {
  const int64_t count = src.numel(), width = w_in.size(2);
  const Ends ends(offsets, count);
  const Inputs in(x, w_in, w_out, src, weights);
  Tensor y = zeros(in.x, {x.size(0), x.size(1)}), h = fresh(in.x, {count, width});
  with_type(in.x, [&]<class T>() {
    T* hidden = h.mutable_data_ptr<T>();
    forward(in.layer<T>(), ends, y.mutable_data_ptr<T>(), hidden);
    zero(hidden + ends.at.back() * width, count - ends.at.back(), width, width);
  });
  return {torch::stable::to(y, x.scalar_type()), torch::stable::to(h, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_ffn_backward(
    const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& w_in, const Tensor& w_out,
    const Tensor& offsets, const Tensor& src, const Tensor& weights, bool for_x, bool for_in, bool for_out) {
  const Ends ends(offsets, src.numel());
  const Inputs in(x, w_in, w_out, src, weights);
  const Tensor dy = torch::stable::contiguous(wide(grad)), hidden = torch::stable::contiguous(wide(h));
  const int64_t experts = w_in.size(0);
  Tensor dx = zeros(in.x, {for_x ? x.size(0) : 0, x.size(1)}), dweights = zeros(weights, {weights.size(0)});
  Tensor dw_in = fresh(in.x, {for_in ? experts : 0, w_in.size(1), w_in.size(2)});
  Tensor dw_out = fresh(in.x, {for_out ? experts : 0, w_out.size(1), w_out.size(2)});
  with_type(in.x, [&]<class T>() {
    const Gradients<T> to{for_x ? dx.mutable_data_ptr<T>() : nullptr,
                          for_in ? dw_in.mutable_data_ptr<T>() : nullptr,
                          for_out ? dw_out.mutable_data_ptr<T>() : nullptr, dweights.mutable_data_ptr<T>()};
    backward(in.layer<T>(), ends, dy.const_data_ptr<T>(), hidden.const_data_ptr<T>(), to);
  });
  const ScalarType type = x.scalar_type();
  return {torch::stable::to(dx, type), torch::stable::to(dw_in, type), torch::stable::to(dw_out, type),
          dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("grouped_ffn", TORCH_BOX(&grouped_ffn));
  m.impl("grouped_ffn_backward", TORCH_BOX(&grouped_ffn_backward));
}

}  // namespace torchzoo
