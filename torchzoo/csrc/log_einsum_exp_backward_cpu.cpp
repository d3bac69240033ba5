// log_einsum_exp_backward: with h = grad exp(m - out), dleft, dright and dw from h·w and hᵀ·(p q).
//
// A task is a stretch of rows of a fold, taken in blocks that stay in cache: exponentials are computed
// anew, and nothing between inputs and gradients goes through memory. A fold's weights have one
// accumulator; where there are few folds, stretches of rows have their own, which are added up in
// order. How rows are cut depends on the shapes only, so the bits don't depend on threads.
#include "log_einsum_exp_cpu.h"

namespace torchzoo {
namespace {

constexpr int64_t TASKS = 64;  // as many there are at least, if the rows suffice

template <class T>
struct Slopes {
  Operands<T> of;
  const T *grad, *out;
  T *left, *right, *w;  // null where nobody asks
  int64_t parts, stretch;  // of rows
};

// Logarithms m - out of h / grad for a row of sums, minus infinity where h would be too large and in
// the padding; whether there is such a one.
template <int bytes, class T>
TZ_INLINE bool shares(const T* __restrict out, const T* __restrict limit, T m, int64_t sums,
                      T* __restrict h, int64_t padded) {
  using Vec = typename Tile<bytes, T>::Vec;
  using Loose = typename Tile<bytes, T>::Loose;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  auto large = Vec{} > Vec{};
  bool found = false;
  int64_t o = 0;
  for (; o + lanes <= sums; o += lanes) {
    const Vec less = m - *reinterpret_cast<const Loose*>(out + o);
    const auto over = -less < *reinterpret_cast<const Vec*>(limit + o);
    *reinterpret_cast<Vec*>(h + o) = over ? Vec{} + nothing : less;
    large |= over;
  }
  for (; o < sums; ++o) {
    const bool over = out[o] - m < limit[o];
    h[o] = over ? nothing : m - out[o];
    found |= over;
  }
  for (; o < padded; ++o) h[o] = nothing;
  return found || any<bytes>(large);
}

// row *= by.
template <int bytes, class T>
TZ_INLINE void multiply(const T* __restrict by, int64_t size, T* __restrict row) {
  using Loose = typename Tile<bytes, T>::Loose;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    *reinterpret_cast<Loose*>(row + i) *= *reinterpret_cast<const Loose*>(by + i);
  for (; i < size; ++i) row[i] *= by[i];
}

// dright += p_i T_ij and dleft += T_ij q_j for a row of a chunk of T = h·w.
template <int bytes, class T>
TZ_INLINE void add_chunk(const T* t, const Chunk& chunk, int64_t k2, const T* p, const T* q, T* left,
                         T* right) {
  using Vec = typename Tile<bytes, T>::Vec;
  using Loose = typename Tile<bytes, T>::Loose;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  const int64_t first = chunk.first % k2, length = std::min(k2, chunk.count);
  q += first, right += first;
  for (int64_t i = chunk.first / k2, at = 0; at < chunk.count; ++i, at += length) {
    Vec sums = {};
    T sum = 0;
    int64_t j = 0;
    for (; j + lanes <= length; j += lanes) {
      const Vec v = *reinterpret_cast<const Loose*>(t + at + j);
      sums += v * *reinterpret_cast<const Loose*>(q + j);
      *reinterpret_cast<Loose*>(right + j) += v * p[i];
    }
    for (; j < length; ++j) {
      sum += t[at + j] * q[j];
      right[j] += t[at + j] * p[i];
    }
    for (int64_t l = 0; l < lanes; ++l) sum += sums[l];
    left[i] += sum;
  }
}

// The gradients of one element whose h would be too large, from exp(left + right - out) itself.
template <int bytes, class T>
TZ_INLINE void careful(const Slopes<T>& s, const Chunks& chunks, int64_t row, int64_t o, const T* w,
                       T* terms, T* flows, T* dw, int64_t sums) {
  using Vec = typename Tile<bytes, T>::Vec;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  const Sizes& n = s.of.n;
  const int64_t padded = round_up(n.terms(), lanes);
  const T grad = s.grad[row * n.sums + o], out = s.out[row * n.sums + o];
  log_weights<bytes>(w, n.terms(), flows);
  std::fill_n(terms, padded, -out);
  add_pairs(s.of.left_row(row), s.of.right_row(row), n, terms);
  for (int64_t t = 0; t < padded; t += lanes) {
    Vec& slope = *reinterpret_cast<Vec*>(terms + t);
    Vec& flow = *reinterpret_cast<Vec*>(flows + t);
    flow += slope;
    exponentiate(flow);
    flow *= grad;
    slope = slope > STEEPEST<T> ? Vec{} + STEEPEST<T> : slope;
    exponentiate(slope);
    slope *= grad;
  }
  if (s.w)
    for (const Chunk& c : chunks.list)
      for (int64_t t = 0; t < c.count; ++t) dw[c.at * sums + o * c.width + t] += terms[c.first + t];
  for (int64_t i = 0; i < n.k1; ++i)
    for (int64_t j = 0; j < n.k2; ++j) {
      if (s.right) s.right[row * n.k2 + j] += flows[i * n.k2 + j];
      if (s.left) s.left[row * n.k1 + i] += flows[i * n.k2 + j];
    }
}

template <int bytes, class T>
TZ_INLINE void backward_body(const Slopes<T>* slopes, int64_t begin, int64_t end) {
  constexpr int64_t nr = Tile<bytes, T>::nr;
  const Slopes<T>& s = *slopes;
  const Operands<T>& of = s.of;
  const Sizes& n = of.n;
  const Chunks chunks(n, nr);
  const bool for_operands = s.left || s.right;
  const int64_t sums = round_up(n.sums, MR), ldh = round_up(n.sums, nr);
  const int64_t ldt = round_up(std::min(n.terms(), CHUNK), nr), k1 = round_up(n.k1, nr);
  Scratch<T> scratch;
  const Block<bytes, T> block(of, scratch);
  T *weights = scratch.take(chunks.width * n.sums), *dw = scratch.take(chunks.width * sums);
  T *h = scratch.take(of.rows * ldh + MR), *t = scratch.take(of.rows * ldt);
  T* limit = scratch.take(ldh);
  T *left = scratch.take(of.rows * k1), *right = scratch.take(of.rows * block.ldq);
  T *terms = scratch.take(round_up(n.terms(), nr)), *flows = scratch.take(round_up(n.terms(), nr));
  std::vector<char> steep(of.rows);
  for (int64_t task = begin, packed = -1; task < end; ++task) {
    const int64_t fold = task / s.parts, start = task % s.parts * s.stretch;
    const int64_t stop = std::min(start + s.stretch, n.batch);
    if (fold != packed) {
      packed = fold;
      for (const Chunk& c : chunks.list)
        for (int64_t o = 0; o < n.sums; ++o)
          std::memcpy(weights + c.at * n.sums + o * c.width, of.w_row(fold, o) + c.first,
                      c.count * sizeof(T));
      for (int64_t o = 0; o < n.sums; ++o)
        limit[o] = log_limit(of.w_row(fold, o), n.terms());
    }
    if (s.w) std::fill_n(dw, chunks.width * sums, T(0));
    for (int64_t first = start; first < stop; first += of.rows) {
      const int64_t count = std::min(of.rows, stop - first), at = fold * n.batch + first;
      load<bytes>(of, at, count, block);
      for (int64_t r = 0; r < count; ++r)
        steep[r] = shares<bytes>(s.out + (at + r) * n.sums, limit, block.m[r], n.sums, h + r * ldh, ldh);
      exponentials<bytes>(h, count * ldh);
      for (int64_t r = 0; r < count; ++r)
        multiply<bytes>(s.grad + (at + r) * n.sums, n.sums, h + r * ldh);
      if (of.left) {
        std::fill_n(left, of.rows * k1, T(0));
        std::fill_n(right, of.rows * block.ldq, T(0));
      }
      for (const Chunk& c : chunks.list) {
        if (s.w) {
          const T* x = products<bytes>(of, c, count, block);
          for (int64_t o = 0; o < n.sums; o += MR)
            for (int64_t j = 0; j < c.width; j += nr)
              micro<bytes, MR>(Matrix<T>{h + o, 1, ldh}, x + j, block.ldx, count,
                               dw + c.at * sums + o * c.width + j, c.width, MR, nr, false);
        }
        if (!for_operands) continue;
        T* to = of.left ? t : right + c.first;
        const int64_t ld = of.left ? ldt : block.ldq;
        for (int64_t j = 0; j < c.width; j += nr)
          for (int64_t i = 0; i < count; i += MR)
            micro<bytes, MR>(Matrix<T>{h + i * ldh, ldh, 1}, weights + c.at * n.sums + j, c.width,
                             n.sums, to + i * ld + j, ld, MR, nr, true);
        if (of.left)
          for (int64_t r = 0; r < count; ++r)
            add_chunk<bytes>(t + r * ldt, c, n.k2, block.p + r * block.ldp, block.q + r * block.ldq,
                             left + r * k1, right + r * block.ldq);
      }
      for (int64_t r = 0; r < count; ++r) {
        const T *p = block.p + r * block.ldp, *q = block.q + r * block.ldq;
        if (s.right)
          for (int64_t j = 0; j < n.k2; ++j)
            s.right[(at + r) * n.k2 + j] = right[r * block.ldq + j] * q[j];
        if (s.left)
          for (int64_t i = 0; i < n.k1; ++i) s.left[(at + r) * n.k1 + i] = left[r * k1 + i] * p[i];
        if (!steep[r]) continue;
        for (int64_t o = 0; o < n.sums; ++o) {
          const T value = s.out[(at + r) * n.sums + o];
          if (value - block.m[r] < limit[o] && value != -std::numeric_limits<T>::infinity())
            careful<bytes>(s, chunks, at + r, o, of.w_row(fold, o), terms, flows, dw, sums);
        }
      }
    }
    if (!s.w) continue;
    for (const Chunk& c : chunks.list)
      for (int64_t o = 0; o < n.sums; ++o)
        std::memcpy(s.w + (task * n.sums + o) * n.terms() + c.first, dw + c.at * sums + o * c.width,
                    c.count * sizeof(T));
  }
}
TZ_ISA(backward, backward_body)

// dw = Σ parts, in order.
template <class T>
void add_up(const T* partial, int64_t parts, int64_t size, T* dw, int64_t folds) {
  parallel_for(0, folds, 1, [&](int64_t begin, int64_t end) {
    for (int64_t fold = begin; fold < end; ++fold) {
      T* to = dw + fold * size;
      std::memcpy(to, partial + fold * parts * size, size * sizeof(T));
      for (int64_t part = 1; part < parts; ++part) {
        const T* from = partial + (fold * parts + part) * size;
        for (int64_t t = 0; t < size; ++t) to[t] += from[t];
      }
    }
  });
}

Tensor wanted(const Tensor& like, bool on) {
  return fresh(like, {on ? like.size(0) : 0, like.size(1), like.size(2)});
}

template <class T>
void run(const Sizes& n, const Tensor& grad, const std::optional<Tensor>& left, const Tensor& right,
         const Tensor& w, const Tensor& out, Tensor* dleft, Tensor* dright, Tensor* dw) {
  const Operands<T> of{n, left ? left->const_data_ptr<T>() : nullptr, right.const_data_ptr<T>(),
                       w.const_data_ptr<T>(), rows_of_block(n)};
  const int64_t blocks = (n.batch + of.rows - 1) / of.rows;
  const int64_t most = (TASKS + n.folds - 1) / n.folds, each = (blocks + most - 1) / most;
  const int64_t parts = (blocks + each - 1) / each, size = n.sums * n.terms();
  const bool split = dw && parts > 1;
  std::optional<Tensor> partial;
  if (split) partial = fresh(w, {n.folds * parts * size});
  const Slopes<T> slopes{of, grad.const_data_ptr<T>(), out.const_data_ptr<T>(),
                         dleft ? dleft->mutable_data_ptr<T>() : nullptr,
                         dright ? dright->mutable_data_ptr<T>() : nullptr,
                         split ? partial->mutable_data_ptr<T>() : dw ? dw->mutable_data_ptr<T>() : nullptr,
                         parts, each * of.rows};
  parallel_for(0, n.folds * parts, 1, [&](int64_t begin, int64_t end) { backward(&slopes, begin, end); });
  if (split) add_up(partial->const_data_ptr<T>(), parts, size, dw->mutable_data_ptr<T>(), n.folds);
}

std::tuple<Tensor, Tensor, Tensor> log_einsum_exp_backward(
    const Tensor& grad, std::optional<Tensor> left, const Tensor& right, const Tensor& w,
    const Tensor& out, bool for_left, bool for_right, bool for_w) {
  using torch::stable::contiguous;
  const Sizes n = check_operands("log_einsum_exp_backward", left, right, w);
  check_result("log_einsum_exp_backward", grad, right, n);
  check_result("log_einsum_exp_backward", out, right, n);
  Tensor dleft = wanted(left.value_or(right), for_left), dright = wanted(right, for_right);
  Tensor dw = fresh(w, {for_w ? n.folds : 0, n.sums, n.k1, n.k2});
  if (n.nothing())
    return {torch::stable::zero_(dleft), torch::stable::zero_(dright), torch::stable::zero_(dw)};
  if (left) left = contiguous(*left);
  const Tensor rows = contiguous(right), weights = contiguous(w), above = contiguous(grad);
  const Tensor values = contiguous(out);
  Tensor *to_left = left && for_left ? &dleft : nullptr, *to_right = for_right ? &dright : nullptr;
  Tensor* to_w = for_w ? &dw : nullptr;
  if (right.scalar_type() == ScalarType::Double)
    run<double>(n, above, left, rows, weights, values, to_left, to_right, to_w);
  else
    run<float>(n, above, left, rows, weights, values, to_left, to_right, to_w);
  return {dleft, dright, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("log_einsum_exp_backward", TORCH_BOX(&log_einsum_exp_backward));
}

}  // namespace torchzoo
