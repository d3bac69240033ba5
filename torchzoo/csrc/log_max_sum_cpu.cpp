// log_max_sum: values[b, o] = max_k a[b, k] + log_w[o, k] and the first k that reaches it.
//
// A task is a block of rows of a fold. Log-weights are packed k-major when a thread comes to their
// fold; a tile of ROWS rows and two vectors of sums keeps its maxima and their places in registers.
#include "gemm.h"

#include <limits>
#include <memory>

namespace torchzoo {
namespace {

constexpr int64_t BLOCK = 64;  // rows of a task
constexpr int ROWS = 2;        // of a tile

template <class T>
struct Terms {
  int64_t folds, batch, sums, count;
  const T *a, *log_w;
  T* values;
  int64_t* argmax;
};

// `rows` rows, at most ROWS, and `width` sums.
template <int bytes, class T>
TZ_INLINE void tile(const T* a, int64_t count, int64_t rows, const T* panel, int64_t sums, int64_t width,
                    T* values, int64_t* argmax) {
  using Vec = typename Tile<bytes, T>::Vec;
  using Loose = typename Tile<bytes, T>::Loose;
  using Int = decltype(Vec{} > Vec{});
  using Index = std::conditional_t<sizeof(T) == sizeof(float), int32_t, int64_t>;
  constexpr int64_t lanes = Tile<bytes, T>::lanes, nr = Tile<bytes, T>::nr;
  Vec most[ROWS][2];
  Int place[ROWS][2] = {};
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 2; ++v) most[r][v] = Vec{} - std::numeric_limits<T>::infinity();
  for (int64_t k = 0; k < count; ++k, panel += nr) {
    const Vec w[2] = {*reinterpret_cast<const Loose*>(panel),
                      *reinterpret_cast<const Loose*>(panel + lanes)};
    const Int here = Int{} + static_cast<Index>(k);
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Vec term = w[v] + a[std::min<int64_t>(r, rows - 1) * count + k];
        const Int larger = term > most[r][v];
        most[r][v] = larger ? term : most[r][v];
        place[r][v] = larger ? here : place[r][v];
      }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < width; ++j) {
      values[r * sums + j] = most[r][j / lanes][j % lanes];
      argmax[r * sums + j] = place[r][j / lanes][j % lanes];
    }
}

template <int bytes, class T>
TZ_INLINE void forward_body(const Terms<T>* terms, int64_t begin, int64_t end) {
  constexpr int64_t nr = Tile<bytes, T>::nr;
  const Terms<T>& n = *terms;
  const int64_t blocks = (n.batch + BLOCK - 1) / BLOCK, padded = (n.sums + nr - 1) / nr * nr;
  const std::unique_ptr<T[]> packed(new T[n.count * padded]);
  for (int64_t task = begin, at = -1; task < end; ++task) {
    const int64_t fold = task / blocks, first = task % blocks * BLOCK;
    const int64_t last = std::min(first + BLOCK, n.batch);
    if (fold != at) {
      at = fold;
      pack_b<bytes>(Matrix<T>{n.log_w + fold * n.sums * n.count, 1, n.count}, n.count, n.sums,
                    packed.get());
    }
    for (int64_t j = 0; j < n.sums; j += nr)
      for (int64_t b = first; b < last; b += ROWS) {
        const int64_t row = fold * n.batch + b, to = row * n.sums + j;
        tile<bytes>(n.a + row * n.count, n.count, std::min<int64_t>(ROWS, last - b),
                    packed.get() + j * n.count, n.sums, std::min(nr, n.sums - j), n.values + to,
                    n.argmax + to);
      }
  }
}
TZ_ISA(forward, forward_body)

template <class T>
void run(const Tensor& a, const Tensor& log_w, Tensor& values, Tensor& argmax) {
  const Terms<T> terms{a.size(0), a.size(1), log_w.size(1), a.size(2), a.const_data_ptr<T>(),
                       log_w.const_data_ptr<T>(), values.mutable_data_ptr<T>(),
                       argmax.mutable_data_ptr<int64_t>()};
  parallel_for(0, terms.folds * ((terms.batch + BLOCK - 1) / BLOCK), 1,
               [&](int64_t begin, int64_t end) { forward(&terms, begin, end); });
}

std::tuple<Tensor, Tensor> log_max_sum(const Tensor& a, const Tensor& log_w) {
  STD_TORCH_CHECK(a.dim() == 3 && log_w.dim() == 3 && a.size(0) == log_w.size(0) &&
                      a.size(2) == log_w.size(2) && a.scalar_type() == log_w.scalar_type(),
                  "log_max_sum: sizes or types that don't fit");
  STD_TORCH_CHECK(a.size(2) <= INT32_MAX, "log_max_sum: too many terms");
  const std::vector<int64_t> shape{a.size(0), a.size(1), log_w.size(1)};
  Tensor values = fresh(a, shape);
  Tensor argmax = fresh(a, shape, ScalarType::Long);
  const Tensor rows = torch::stable::contiguous(a), weights = torch::stable::contiguous(log_w);
  switch (a.scalar_type()) {
    case ScalarType::Double: run<double>(rows, weights, values, argmax); break;
    case ScalarType::Float: run<float>(rows, weights, values, argmax); break;
    default: STD_TORCH_CHECK(false, "log_max_sum: expected float32 or float64");
  }
  return {values, argmax};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("log_max_sum", TORCH_BOX(&log_max_sum));
}

}  // namespace torchzoo
