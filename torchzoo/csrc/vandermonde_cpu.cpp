// vandermonde: y_l = c Re Σ_n v_n x_n^l (or the complex sum), and its transposed product
// s_n = c Σ_l g_l conj(x_n^l), with x = exp(log_x), c = 2 for conjugate pairs and 1 else.
//
// A task is a row h of log_x with all channels of v. Lags are l = BLOCK · i + j. Forward is a small
// matrix product of [Re, -Im](v x^(BLOCK i)) with [Re, Im](x^j); transposed, blocks of g times x^j
// are summed with weights x^(BLOCK i), for as many n as a vector holds. The powers of one row stay
// in the caches, so that memory sees the inputs and the results only.
#include "gemm.h"
#include "vandermonde.h"

#include <memory>

namespace torchzoo {
namespace {

constexpr int64_t ROWS = 8 * MR;  // blocks of lags whose left factors are held at once

template <class T>
struct Sizes {
  int64_t channels, rows, states, lags;
  bool conj;
  int64_t parts() const { return conj ? 1 : 2; }  // numbers of a lag
  T twice() const { return conj ? T(2) : T(1); }
};

struct Powers {  // of all states of a row
  std::vector<double> re, im;
  explicit Powers(int64_t states) : re(states), im(states) {}
  Power at(int64_t n) const { return {re[n], im[n]}; }
  void put(int64_t n, Power x) { re[n] = x.re, im[n] = x.im; }
};

template <class T>
Power base_of(const T* log_x, int64_t n) {
  return exponential(double(log_x[2 * n]), double(log_x[2 * n + 1]));
}

// low: Re and Im of x_n^j as panels of nr lags, states first; step: x_n^BLOCK.
template <int bytes, class T>
TZ_INLINE void low_powers_body(const T* log_x, int64_t states, T* low, Powers* step) {
  constexpr int64_t nr = Tile<bytes, T>::nr;
  alignas(64) double re[BLOCK], im[BLOCK];
  for (int64_t n = 0; n < states; ++n) {
    Power x = base_of(log_x, n);
    re[0] = 1, im[0] = 0;
    for (int64_t m = 1; m < BLOCK; m *= 2) {  // x is the first one's m-th power
      for (int64_t j = 0; j < m; ++j) {
        re[m + j] = re[j] * x.re - im[j] * x.im;
        im[m + j] = re[j] * x.im + im[j] * x.re;
      }
      x = times(x, x);
    }
    step->put(n, x);
    for (int64_t j = 0; j < BLOCK; j += nr) {
      T* panel = low + j * 2 * states + n * nr;
      for (int64_t q = 0; q < nr; ++q) panel[q] = T(re[j + q]);
      for (int64_t q = 0; q < nr; ++q) panel[states * nr + q] = T(im[j + q]);
    }
  }
}
TZ_ISA(low_powers, low_powers_body)

// left[r] = c [Re, -Im](v · high) for some blocks, and [Im, Re] in `left_im` unless that is null;
// `high` goes on by `step` from block to block.
template <int bytes, class T>
TZ_INLINE void left_factors_body(const T* v, int64_t states, int64_t rows, T twice,
                                 const double* step_re, const double* step_im, double* high_re,
                                 double* high_im, T* left, T* left_im) {
  for (int64_t r = 0; r < rows; ++r) {
    T *re = left + r * 2 * states, *im = re + states;
    for (int64_t n = 0; n < states; ++n) {
      const double a = v[2 * n], b = v[2 * n + 1], p = high_re[n], q = high_im[n];
      re[n] = twice * T(a * p - b * q);
      im[n] = -twice * T(a * q + b * p);
      high_re[n] = p * step_re[n] - q * step_im[n];
      high_im[n] = p * step_im[n] + q * step_re[n];
    }
    if (!left_im) continue;
    T* other = left_im + r * 2 * states;
    for (int64_t n = 0; n < states; ++n) {
      other[n] = -im[n];
      other[states + n] = re[n];
    }
  }
}
TZ_ISA(left_factors, left_factors_body)

// out(rows, BLOCK) = left(rows, 2 states) · low, the last row only `last` wide.
template <int bytes, class T>
TZ_INLINE void blocks_body(const T* left, const T* low, int64_t states, int64_t rows, int64_t last,
                           T* out) {
  constexpr int64_t nr = Tile<bytes, T>::nr;
  const int64_t k = 2 * states, whole = last == BLOCK ? rows : rows - 1;
  for (int64_t j = 0; j < BLOCK; j += nr) {
    const T* panel = low + j * k;
    for (int64_t i = 0; i < whole; i += MR)
      micro<bytes, MR>(Matrix<T>{left + i * k, k, 1}, panel, nr, k, out + i * BLOCK + j, BLOCK,
                       std::min(MR, whole - i), nr, true);
    if (whole < rows && j < last)
      micro<bytes, 1>(Matrix<T>{left + whole * k, k, 1}, panel, nr, k, out + whole * BLOCK + j,
                      BLOCK, 1, std::min(nr, last - j), true);
  }
}
TZ_ISA(blocks, blocks_body)

template <class T>
struct Forward {
  Sizes<T> sizes;
  std::unique_ptr<T[]> low, left, part;
  Powers step, high;

  explicit Forward(Sizes<T> s)
      : sizes(s),
        low(new T[2 * BLOCK * s.states]),
        left(new T[4 * ROWS * s.states]()),
        part(new T[s.conj ? 0 : 2 * ROWS * BLOCK]),
        step(s.states),
        high(s.states) {}

  void row(const T* v, const T* log_x, T* out) {
    low_powers(log_x, sizes.states, low.get(), &step);
    for (int64_t c = 0; c < sizes.channels; ++c)
      channel(v + c * sizes.rows * sizes.states * 2, out + c * sizes.rows * sizes.lags * sizes.parts());
  }

  void channel(const T* v, T* out) {
    T* left_im = sizes.conj ? nullptr : left.get() + 2 * ROWS * sizes.states;
    for (int64_t n = 0; n < sizes.states; ++n) high.put(n, {1, 0});
    for (int64_t l = 0; l < sizes.lags; l += ROWS * BLOCK) {
      const int64_t lags = std::min(ROWS * BLOCK, sizes.lags - l), rows = blocks_of(lags);
      const int64_t last = lags - (rows - 1) * BLOCK;
      left_factors(v, sizes.states, rows, sizes.twice(), step.re.data(), step.im.data(),
                   high.re.data(), high.im.data(), left.get(), left_im);
      if (sizes.conj) {
        blocks(left.get(), low.get(), sizes.states, rows, last, out + l);
        continue;
      }
      T *re = part.get(), *im = re + ROWS * BLOCK;
      blocks(left.get(), low.get(), sizes.states, rows, last, re);
      blocks(left_im, low.get(), sizes.states, rows, last, im);
      for (int64_t q = 0; q < lags; ++q) {
        out[2 * (l + q)] = re[q];
        out[2 * (l + q) + 1] = im[q];
      }
    }
  }
};

// Σ over blocks of x^(BLOCK i) Σ_j g[i, j] x^j for some states together; g has whole tiles of rows.
template <int bytes, class T>
TZ_INLINE void lanes_body(const T* log_x, int64_t count, int64_t stretches, int64_t rows, const T* g,
                          T* sums) {
  constexpr int64_t lanes = Tile<bytes, T>::lanes, nr = 2 * lanes;
  alignas(64) double x_re[lanes] = {}, x_im[lanes] = {}, re[lanes], im[lanes];
  alignas(64) T panel[BLOCK * nr], tile[MR * nr];
  for (int64_t q = 0; q < count; ++q) {
    const Power x = base_of(log_x, q);
    x_re[q] = x.re, x_im[q] = x.im;
  }
  const auto restart = [&] {
    for (int64_t q = 0; q < lanes; ++q) re[q] = 1, im[q] = 0;
  };
  const auto advance = [&] {
    for (int64_t q = 0; q < lanes; ++q) {
      const double next = re[q] * x_re[q] - im[q] * x_im[q];
      im[q] = re[q] * x_im[q] + im[q] * x_re[q];
      re[q] = next;
    }
  };
  restart();
  for (int64_t j = 0; j < BLOCK; ++j, advance())
    for (int64_t q = 0; q < lanes; ++q) {
      panel[j * nr + q] = T(re[q]);
      panel[j * nr + lanes + q] = T(im[q]);
    }
  for (int64_t q = 0; q < lanes; ++q) {
    const Power step = block_power({x_re[q], x_im[q]});
    x_re[q] = step.re, x_im[q] = step.im;
  }
  for (int64_t s = 0; s < stretches; ++s, g += rows * BLOCK, sums += 2 * lanes) {
    alignas(64) T sum_re[lanes] = {}, sum_im[lanes] = {};
    restart();
    for (int64_t i = 0; i < rows; i += MR) {
      micro<bytes, MR>(Matrix<T>{g + i * BLOCK, BLOCK, 1}, panel, nr, BLOCK, tile, nr, MR, nr, true);
      for (int64_t r = 0; r < MR; ++r, advance())
        for (int64_t q = 0; q < lanes; ++q) {
          const T a = tile[r * nr + q], b = tile[r * nr + lanes + q], p = T(re[q]), w = T(im[q]);
          sum_re[q] += p * a - w * b;
          sum_im[q] += p * b + w * a;
        }
    }
    std::copy_n(sum_re, lanes, sums);
    std::copy_n(sum_im, lanes, sums + lanes);
  }
}

template <int bytes, class T>
TZ_INLINE void transposed_row_body(const T* log_x, int64_t states, int64_t stretches, int64_t rows,
                                   const T* g, T* sums, T* found) {
  // found[s][n] = Σ_l g_l x_n^l, interleaved, for each stretch s of real g
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  for (int64_t n = 0; n < states; n += lanes) {
    const int64_t count = std::min(lanes, states - n);
    lanes_body<bytes>(log_x + 2 * n, count, stretches, rows, g, sums);
    for (int64_t s = 0; s < stretches; ++s)
      for (int64_t q = 0; q < count; ++q) {
        found[(s * states + n + q) * 2] = sums[2 * lanes * s + q];
        found[(s * states + n + q) * 2 + 1] = sums[2 * lanes * s + lanes + q];
      }
  }
}
TZ_ISA(transposed_row, transposed_row_body)

constexpr int64_t MOST_LANES = 16;

template <class T>
struct Transposed {
  Sizes<T> sizes;
  int64_t stretches, padded;  // real sequences, and their blocks, rounded up to whole tiles
  std::unique_ptr<T[]> g, sums, found;

  explicit Transposed(Sizes<T> s)
      : sizes(s),
        stretches(s.channels * s.parts()),
        padded((blocks_of(s.lags) + MR - 1) / MR * MR),
        g(new T[stretches * padded * BLOCK]()),
        sums(new T[stretches * 2 * MOST_LANES]),
        found(new T[stretches * s.states * 2]) {}

  void row(const T* grad, const T* log_x, T* out) {
    const int64_t parts = sizes.parts(), states = sizes.states;
    for (int64_t s = 0; s < stretches; ++s) {
      const T* from = grad + s / parts * sizes.rows * sizes.lags * parts + s % parts;
      T* to = g.get() + s * padded * BLOCK;
      for (int64_t l = 0; l < sizes.lags; ++l) to[l] = from[l * parts];
    }
    transposed_row(log_x, states, stretches, padded, static_cast<const T*>(g.get()), sums.get(),
                   found.get());
    for (int64_t c = 0; c < sizes.channels; ++c) {
      const T* a = found.get() + c * parts * states * 2;
      T* to = out + c * sizes.rows * states * 2;
      for (int64_t n = 0; n < 2 * states; n += 2) {
        to[n] = sizes.twice() * a[n];
        to[n + 1] = -sizes.twice() * a[n + 1];
        if (parts == 1) continue;  // the imaginary part of g: i conj(b)
        const T* b = a + 2 * states;
        to[n] += b[n + 1];
        to[n + 1] += b[n];
      }
    }
  }
};

// Runs `Work` on every row h: in (C, H, per lag or state), log_x (H, N, 2), out (C, H, ...).
template <template <class> class Work, class T>
void for_rows(Sizes<T> sizes, const Tensor& in, int64_t in_row, const Tensor& log_x, Tensor& out,
              int64_t out_row) {
  const T *from = in.const_data_ptr<T>(), *bases = log_x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  if (!sizes.channels) return;
  parallel_for(0, sizes.rows, 1, [&](int64_t begin, int64_t end) {
    Work<T> work(sizes);
    for (int64_t h = begin; h < end; ++h)
      work.row(from + h * in_row, bases + h * sizes.states * 2, to + h * out_row);
  });
}

template <template <class> class Work>
void run(const Tensor& in, const Tensor& log_x, Tensor& out, int64_t lags, bool conj) {
  const auto with = [&]<class T>(T) {
    const Sizes<T> sizes{in.size(0), log_x.size(0), log_x.size(1), lags, conj};
    const int64_t states = 2 * sizes.states, sequence = lags * sizes.parts();
    const bool forward = std::is_same_v<Work<T>, Forward<T>>;
    for_rows<Work>(sizes, in, forward ? states : sequence, log_x, out, forward ? sequence : states);
  };
  if (log_x.scalar_type() == ScalarType::Double) with(double());
  else with(float());
}

void check(const Tensor& in, const Tensor& log_x, int64_t lags, bool pairs) {
  const ScalarType type = log_x.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) &&
                      in.scalar_type() == type,
                  "vandermonde: expected float32 or float64, one type");
  STD_TORCH_CHECK(log_x.dim() == 3 && log_x.size(2) == 2 && in.dim() == (pairs ? 4 : 3) &&
                      in.size(1) == log_x.size(0) && (!pairs || in.size(3) == 2) && lags >= 1,
                  "vandermonde: shapes that don't fit together");
}

Tensor vandermonde(const Tensor& v, const Tensor& log_x, int64_t lags, bool conj) {
  check(v, log_x, lags, true);
  STD_TORCH_CHECK(v.size(2) == log_x.size(1), "vandermonde: shapes that don't fit together");
  std::vector<int64_t> shape{v.size(0), v.size(1), lags};
  if (!conj) shape.push_back(2);
  Tensor out = fresh(v, shape);
  run<Forward>(torch::stable::contiguous(v), torch::stable::contiguous(log_x), out, lags, conj);
  return out;
}

Tensor vandermonde_transposed(const Tensor& grad, const Tensor& log_x, bool conj) {
  STD_TORCH_CHECK(grad.dim() >= 3, "vandermonde_transposed: shapes that don't fit together");
  check(grad, log_x, grad.size(2), !conj);
  Tensor out =
      fresh(grad, {grad.size(0), grad.size(1), log_x.size(1), int64_t(2)});
  run<Transposed>(torch::stable::contiguous(grad), torch::stable::contiguous(log_x), out,
                  grad.size(2), conj);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("vandermonde", TORCH_BOX(&vandermonde));
  m.impl("vandermonde_transposed", TORCH_BOX(&vandermonde_transposed));
}

}  // namespace torchzoo
