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

#include <atomic>
#include <memory>

namespace torchzoo {
namespace {

constexpr int64_t PIECES = 2;  // strips of a product for each thread
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
    if (n == LANES) std::memcpy(b.part, from, sizeof(b.part));  // of a size the compiler knows
    else std::memcpy(b.part, from, n * sizeof(T));
    return b;
  }
  inline __attribute__((always_inline)) void store(T* to, int64_t n) const {
    if (n == LANES) std::memcpy(to, part, sizeof(part));
    else std::memcpy(to, part, n * sizeof(T));
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

// a(m, n) holds da and becomes weight · act; dh = weight · da · act'; dots = <da, act> of each row and NARROW
// columns, `most` rows apart.
template <int bytes, class T>
TZ_INLINE void activate_back_body(const T* h, int64_t width, int64_t up, int64_t m, int64_t n, T* a,
                                  int64_t lda, T* dh, const T* weights, T* dots, int64_t most) {
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
      if ((j + LANES) % NARROW && j + LANES < n) continue;
      T& dot = dots[j / NARROW * most + i];
      dot = 0;
      for (int64_t l = 0; l < LANES; ++l) dot += sums.part[l / B::lanes][l % B::lanes];
      sums = {};
    }
  }
}
TZ_ISA(activate_back, activate_back_body)

template <int bytes, class T>
TZ_INLINE void flip_body(const T* in, int64_t ldi, int64_t m, int64_t n, T* out, int64_t ldo) {
  transpose<bytes>(in, ldi, m, n, out, ldo);
}
TZ_ISA(flip, flip_body)

template <class T>
void gather(const T* rows, const int64_t* src, int64_t count, int64_t dim, T* out) {
  parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) std::copy_n(rows + src[n] * dim, dim, out + n * dim);
  });
}

// Rows become columns: out(dim, count), whose own rows are `most` apart.
template <class T>
void gather_across(const T* rows, const int64_t* src, int64_t count, int64_t dim, T* out, int64_t most) {
  parallel_for(0, (count + NARROW - 1) / NARROW, 1, [&](int64_t begin, int64_t end) {
    T square[NARROW * NARROW];
    for (int64_t n = begin * NARROW; n < std::min(end * NARROW, count); n += NARROW)
      for (int64_t j = 0; j < dim; j += NARROW) {
        const int64_t high = std::min(NARROW, count - n), wide = std::min(NARROW, dim - j);
        for (int64_t i = 0; i < high; ++i) std::copy_n(rows + src[n + i] * dim + j, wide, square + i * NARROW);
        flip(static_cast<const T*>(square), NARROW, high, wide, out + j * most + n, most);
      }
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

// Runs the strips of one expert's products, each of so many columns and the dearest first. Whichever thread is
// free takes the next: two cores are seldom equally fast.
template <class T, class Run>
void for_products(std::initializer_list<int64_t> products, const Run& run) {
  std::vector<Strip> strips;
  const int64_t threads = torch::stable::get_num_threads(), pieces = PIECES * threads;
  int product = 0;
  for (const int64_t n : products) {
    const int64_t width = std::clamp((n + pieces * NARROW - 1) / (pieces * NARROW) * NARROW, NARROW, STRIP);
    for (int64_t j = 0; j < n; j += width) strips.push_back({product, j, std::min(width, n - j)});
    ++product;
  }
  std::atomic<size_t> next{0};
  parallel_for(0, std::min<int64_t>(threads, strips.size()), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[gemm_scratch(STRIP)]);
    for (int64_t worker = begin; worker < end; ++worker)
      for (size_t s; (s = next++) < strips.size();) run(strips[s], scratch.get());
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
  const Workspace<T> memory(most * (dim + hidden));
  T *rows = memory.get(), *act = rows + most * dim;
  for (size_t e = 0; e + 1 < ends.at.size(); ++e) {
    const int64_t start = ends.at[e], m = ends.rows(e);
    if (!m) continue;
    const int64_t* src = layer.src + start;
    const Matrix<T> inputs{rows, dim, 1}, acts{act, hidden, 1};
    gather(layer.x, src, m, dim, rows);
    for_products<T>({hidden}, [&](const Strip& strip, T* scratch) {
      const auto [_, j, columns] = strip;
      T* out = h + start * width + j;
      const Done activated = [&](int64_t i, int64_t count) {
        activate<const T*>(out + i * width, width, up, count, columns, act + i * hidden + j, hidden);
      };
      if (up) gemm(inputs, layer.in(e).from(0, up + j), out + up, width, m, columns, dim, scratch, Done());
      gemm(inputs, layer.in(e).from(0, j), out, width, m, columns, dim, scratch, activated);
    });
    for_products<T>({dim}, [&](const Strip& strip, T* scratch) {
      const auto [_, j, columns] = strip;
      T* out = rows + j;  // the inputs are not needed any more
      const Done added = [&](int64_t i, int64_t count) {
        scatter(out + i * dim, src + i, layer.weights + start + i, count, dim, columns, y + j);
      };
      gemm(acts, layer.out(e).from(0, j), out, dim, m, columns, hidden, scratch, added);
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
  const Workspace<T> memory(most * (3 * dim + 2 * hidden + width + blocks));
  T *across = memory.get(), *g = across + most * dim, *dx = g + most * dim, *act = dx + most * dim,
    *act_across = act + most * hidden, *dh = act_across + most * hidden, *dots = dh + most * width;
  for (size_t e = 0; e + 1 < ends.at.size(); ++e) {
    const int64_t start = ends.at[e], m = ends.rows(e);
    if (!m) {
      if (to.w_in) zero(to.w_in + e * dim * width, dim, width, width);
      if (to.w_out) zero(to.w_out + e * hidden * dim, hidden, dim, dim);
      continue;
    }
    const int64_t* src = layer.src + start;
    const T* weights = layer.weights + start;
    gather(dy, src, m, dim, g);
    if (to.w_in) gather_across(layer.x, src, m, dim, across, most);
    for_products<T>({hidden}, [&](const Strip& strip, T* scratch) {
      const auto [_, j, columns] = strip;
      const Done activated = [&](int64_t i, int64_t count) {
        T* a = act + i * hidden + j;
        activate_back(h + (start + i) * width + j, width, up, count, columns, a, hidden, dh + i * width + j,
                      weights + i, dots + j / NARROW * most + i, most);
        if (to.w_out) flip<const T*>(a, hidden, count, columns, act_across + j * most + i, most);
      };
      gemm(Matrix<T>{g, dim, 1}, transposed(layer.out(e)).from(0, j), act + j, hidden, m, columns, dim, scratch,
           activated);
    });
    for (int64_t n = 0; n < m; ++n) {
      to.weights[start + n] = 0;
      for (int64_t b = 0; b < blocks; ++b) to.weights[start + n] += dots[b * most + n];
    }
    for_products<T>(
        {to.x ? dim : 0, to.w_in ? width : 0, to.w_out ? dim : 0},
        [&](const Strip& strip, T* scratch) {
          const auto [product, j, columns] = strip;
          const Done added = [&](int64_t i, int64_t count) {
            scatter<T>(dx + i * dim + j, src + i, nullptr, count, dim, columns, to.x + j);
          };
          if (product == 0)
            gemm(Matrix<T>{dh, width, 1}, transposed(layer.in(e)).from(0, j), dx + j, dim, m, columns, width,
                 scratch, added);
          else if (product == 1)
            gemm(Matrix<T>{across, most, 1}, Matrix<T>{dh + j, width, 1}, to.w_in + e * dim * width + j, width,
                 dim, columns, m, scratch, Done());
          else
            gemm(Matrix<T>{act_across, most, 1}, Matrix<T>{g + j, dim, 1}, to.w_out + e * hidden * dim + j, dim,
                 hidden, columns, m, scratch, Done());
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
