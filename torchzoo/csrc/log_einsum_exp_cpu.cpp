// log_einsum_exp: out[b, o] = log Σ_ij w[o, i, j] exp(left[b, i] + right[b, j]), fold by fold.
//
// A task is a block of rows of a fold: maximum, exponentials, product and logarithm while it stays in
// cache, so that operands are read once and the output is written once. Weights are packed when a
// thread comes to their fold. Sums that have underflowed are taken again, term by term.
#include "log_einsum_exp_cpu.h"

namespace torchzoo {
namespace {

// log Σ w exp(left + right) about the largest of its terms.
template <int bytes, class T>
TZ_INLINE T careful(const T* left, const T* right, const T* w, const Sizes& n, T* terms) {
  using Vec = typename Tile<bytes, T>::Vec;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  const int64_t padded = round_up(n.terms(), lanes);
  log_weights<bytes>(w, n.terms(), terms);
  add_pairs(left, right, n, terms);
  const T most = largest_of<bytes>(terms, padded);
  if (most == -std::numeric_limits<T>::infinity()) return most;
  Vec sums = {};
  for (int64_t t = 0; t < padded; t += lanes) {
    Vec v = *reinterpret_cast<const Vec*>(terms + t) - most;
    exponentiate(v);
    sums += v;
  }
  T sum = 0;
  for (int64_t l = 0; l < lanes; ++l) sum += sums[l];
  return most + std::log(sum);
}

// out = m + log s for a row; whether some s is too small to be right.
template <int bytes, class T>
TZ_INLINE bool finish(const T* __restrict log_s, const T* __restrict limit, T m, int64_t sums,
                      T* __restrict out) {
  using Vec = typename Tile<bytes, T>::Vec;
  using Loose = typename Tile<bytes, T>::Loose;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  auto small = Vec{} > Vec{};
  bool found = false;
  int64_t o = 0;
  for (; o + lanes <= sums; o += lanes) {
    const Vec v = *reinterpret_cast<const Vec*>(log_s + o);
    small |= v < *reinterpret_cast<const Vec*>(limit + o);
    *reinterpret_cast<Loose*>(out + o) = v + m;
  }
  for (; o < sums; ++o) {
    found |= log_s[o] < limit[o];
    out[o] = log_s[o] + m;
  }
  return found || any<bytes>(small);
}

template <int bytes, class T>
TZ_INLINE void forward_body(const Operands<T>* operands, T* out, int64_t begin, int64_t end) {
  constexpr int64_t nr = Tile<bytes, T>::nr;
  const Operands<T>& of = *operands;
  const Sizes& n = of.n;
  const Chunks chunks(n, nr);
  const int64_t blocks = (n.batch + of.rows - 1) / of.rows, width = round_up(n.sums, nr);
  Scratch<T> scratch;
  const Block<bytes, T> block(of, scratch);
  T *weights = scratch.take(n.terms() * width), *s = scratch.take(of.rows * width);
  T *limit = scratch.take(width), *terms = scratch.take(round_up(n.terms(), nr));
  for (int64_t task = begin, packed = -1; task < end; ++task) {
    const int64_t fold = task / blocks, first = task % blocks * of.rows;
    const int64_t count = std::min(of.rows, n.batch - first), at = fold * n.batch + first;
    if (fold != packed) {
      packed = fold;
      for (const Chunk& c : chunks.list)
        pack_b<bytes>(Matrix<T>{of.w_row(fold, 0) + c.first, 1, n.terms()}, c.count, n.sums,
                      weights + c.first * width);
      for (int64_t o = 0; o < n.sums; ++o) limit[o] = log_limit(of.w_row(fold, o), n.terms());
    }
    load<bytes>(of, at, count, block);
    for (const Chunk& c : chunks.list) {
      const T* x = products<bytes>(of, c, count, block);
      for (int64_t j = 0; j < width; j += nr)
        for (int64_t i = 0; i < count; i += MR)
          micro<bytes, MR>(Matrix<T>{x + i * block.ldx, block.ldx, 1},
                           weights + c.first * width + j * c.count, nr, c.count, s + i * width + j,
                           width, MR, nr, c.first == 0);
    }
    logarithms<bytes, true>(s, count * width);
    for (int64_t r = 0; r < count; ++r) {
      T* to = out + (at + r) * n.sums;
      const T* log_s = s + r * width;
      if (!finish<bytes>(log_s, limit, block.m[r], n.sums, to)) continue;
      for (int64_t o = 0; o < n.sums; ++o)
        if (log_s[o] < limit[o])
          to[o] = careful<bytes>(of.left_row(at + r), of.right_row(at + r), of.w_row(fold, o), n, terms);
    }
  }
}
TZ_ISA(forward, forward_body)

template <class T>
void run(const Sizes& n, const std::optional<Tensor>& left, const Tensor& right, const Tensor& w,
         Tensor& out) {
  const Operands<T> of{n, left ? left->const_data_ptr<T>() : nullptr, right.const_data_ptr<T>(),
                       w.const_data_ptr<T>(), rows_of_block(n)};
  T* to = out.mutable_data_ptr<T>();
  parallel_for(0, n.folds * ((n.batch + of.rows - 1) / of.rows), 1,
               [&](int64_t begin, int64_t end) { forward(&of, to, begin, end); });
}

// Sums are always in a fixed order here, asked for or not.
Tensor log_einsum_exp(std::optional<Tensor> left, const Tensor& right, const Tensor& w, bool) {
  const Sizes n = check_operands("log_einsum_exp", left, right, w);
  Tensor out = fresh(right, {n.folds, n.batch, n.sums});
  if (n.nothing()) return torch::stable::fill_(out, -std::numeric_limits<double>::infinity());
  if (left) left = torch::stable::contiguous(*left);
  const Tensor rows = torch::stable::contiguous(right), weights = torch::stable::contiguous(w);
  if (right.scalar_type() == ScalarType::Double) run<double>(n, left, rows, weights, out);
  else run<float>(n, left, rows, weights, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("log_einsum_exp", TORCH_BOX(&log_einsum_exp));
}

}  // namespace torchzoo
