// log_einsum_exp and its backward: tiles of 64 × 64 results a block, terms through shared memory.
//
// A first pass takes the largest value of each row and the largest weight of each sum, (folds, batch)
// and (folds, sums) numbers; then exponentials are computed where a tile needs them, and never stored.
// Forward tiles are rows × sums; backward rows × terms for the operands, sums × terms for the weights,
// where rows are cut into stretches with sums of their own, added up in order. No atomics: every
// element has one thread, which adds in an order that depends on the shapes only; an element of the
// output on the number of terms only. Traffic: operands and weights once for each row of tiles.
#include "tile_cuda.h"

#include "log_einsum_exp.h"

namespace torchzoo {
namespace {

constexpr int64_t ENOUGH = 512;   // blocks
constexpr int64_t STRETCH = 256;  // rows of a part, at the least

template <class T>
struct Problem {
  Sizes n;
  const T *left, *right, *w;           // left may be null
  const T *peak_left, *peak, *limits;  // of rows of left and of right; logarithms below which s is too small

  __device__ int terms() const { return static_cast<int>(n.k1 * n.k2); }
  __device__ T pair(int64_t row, int t) const {
    if (!left) return right[row * n.k2 + t];
    const int k2 = static_cast<int>(n.k2);
    return left[row * n.k1 + t / k2] + right[row * k2 + t % k2];
  }
  __device__ T m(int64_t row) const { return left ? peak_left[row] + peak[row] : peak[row]; }
  __device__ T product(int64_t row, int t) const {  // p_i q_j
    if (!left) return exp(right[row * n.k2 + t] - peak[row]);
    const int k2 = static_cast<int>(n.k2);
    return exp(left[row * n.k1 + t / k2] - peak_left[row] + (right[row * k2 + t % k2] - peak[row]));
  }
  __device__ const T* weights(int64_t fold, int64_t o) const {
    return w + (fold * n.sums + o) * n.k1 * n.k2;
  }
};

// The largest of each row of x, by a warp; 0 for minus infinity, or log max(1, largest) + log SMALLEST.
template <bool weights, class T>
__global__ void __launch_bounds__(THREADS)
    peaks_kernel(const T* __restrict__ x, int64_t rows, int64_t size, T* __restrict__ peaks) {
  const int64_t row = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / WARP;
  if (row >= rows) return;
  T most = weights ? T(1) : NOTHING<T>;
  for (int64_t k = threadIdx.x % WARP; k < size; k += WARP) {
    const T value = x[row * size + k];
    most = value > most ? value : most;
  }
#pragma unroll
  for (int lanes = WARP / 2; lanes; lanes /= 2) {
    const T other = __shfl_xor_sync(ALL_LANES, most, lanes);
    most = other > most ? other : most;
  }
  if (threadIdx.x % WARP) return;
  if (weights) peaks[row] = log(T(SMALLEST) * most);
  else peaks[row] = most == NOTHING<T> ? T(0) : most;
}

// log Σ w exp(left + right) about the largest of its terms.
template <class T>
__device__ __noinline__ T careful(const Problem<T>& of, int64_t fold, int64_t row, int64_t o) {
  const T* w = of.weights(fold, o);
  T most = NOTHING<T>, sum = 0;
  for (int t = 0; t < of.terms(); ++t) {
    const T term = of.pair(row, t) + log(w[t]);
    most = term > most ? term : most;
  }
  if (most == NOTHING<T>) return most;
  for (int t = 0; t < of.terms(); ++t) sum += exp(of.pair(row, t) + log(w[t]) - most);
  return most + log(sum);
}

// Blocks: tiles of rows of all folds; tiles of sums.
template <class T>
__global__ void __launch_bounds__(THREADS) forward_kernel(Problem<T> of, T* __restrict__ out) {
  __shared__ Strip<T> x, y;
  const Sizes& n = of.n;
  const int64_t row_tiles = (n.batch + SIDE - 1) / SIDE, fold = blockIdx.x / row_tiles;
  const int64_t first = blockIdx.x % row_tiles * SIDE, o0 = int64_t(blockIdx.y) * SIDE;
  T sums[EACH][EACH] = {};
  for (int t0 = 0; t0 < of.terms(); t0 += DEPTH) {
    fill<T>(x, [&](int r, int t) {
      const bool inside = first + r < n.batch && t0 + t < of.terms();
      return inside ? of.product(fold * n.batch + first + r, t0 + t) : T(0);
    });
    fill<T>(y, [&](int r, int t) {
      return o0 + r < n.sums && t0 + t < of.terms() ? of.weights(fold, o0 + r)[t0 + t] : T(0);
    });
    __syncthreads();
    add_products<T>(x, y, sums);
    __syncthreads();
  }
  for_each([&](int i, int j, int r, int c) {
    if (first + r >= n.batch || o0 + c >= n.sums) return;
    const int64_t row = fold * n.batch + first + r, o = o0 + c;
    const T log_s = log(sums[i][j]);
    const bool small = log_s < of.limits[fold * n.sums + o];
    out[row * n.sums + o] = small ? careful(of, fold, row, o) : of.m(row) + log_s;
  });
}

template <class T>
struct Upstream {
  const T *grad, *out;
};

// Whether the gradients of an element have to be taken with care.
template <class T>
__device__ __forceinline__ bool steep(const Problem<T>& of, T out, int64_t fold, int64_t row, int64_t o) {
  return out - of.m(row) < of.limits[fold * of.n.sums + o] && out != NOTHING<T>;
}

// h, 0 where it would be too large; `*any` is set where that is not because out is minus infinity.
template <class T>
__device__ __forceinline__ T share(const Problem<T>& of, const Upstream<T>& up, int64_t fold,
                                   int64_t row, int64_t o, int* any) {
  const T out = up.out[row * of.n.sums + o];
  if (out == NOTHING<T>) return T(0);
  if (steep(of, out, fold, row, o)) {
    *any = 1;
    return T(0);
  }
  return up.grad[row * of.n.sums + o] * exp(of.m(row) - out);
}

// Gradients of the operands. Blocks: tiles of rows of all folds; tiles of terms, which one block takes
// one after the other where there is a left, as several meet in an element.
template <class T>
__global__ void __launch_bounds__(THREADS)
    operands_kernel(Problem<T> of, Upstream<T> up, T* __restrict__ left, T* __restrict__ right) {
  __shared__ union {
    Strip<T> strips[2];
    T flows[SIDE][SIDE + 1];
  } shared;
  __shared__ int any;
  const Sizes& n = of.n;
  const int64_t row_tiles = (n.batch + SIDE - 1) / SIDE, fold = blockIdx.x / row_tiles;
  const int64_t first = blockIdx.x % row_tiles * SIDE, top = fold * n.batch + first;
  const int rows = static_cast<int>(min(int64_t(SIDE), n.batch - first)), k2 = static_cast<int>(n.k2);
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  for (int t0 = blockIdx.y * SIDE; t0 < of.terms(); t0 += gridDim.y * SIDE) {
    const int width = min(SIDE, of.terms() - t0);
    T sums[EACH][EACH] = {};
    for (int64_t o0 = 0; o0 < n.sums; o0 += DEPTH) {
      fill<T>(shared.strips[0], [&](int r, int o) {
        return r < rows && o0 + o < n.sums ? share(of, up, fold, top + r, o0 + o, &any) : T(0);
      });
      fill_across<T>(shared.strips[1], [&](int t, int o) {
        return t < width && o0 + o < n.sums ? of.weights(fold, o0 + o)[t0 + t] : T(0);
      });
      __syncthreads();
      add_products<T>(shared.strips[0], shared.strips[1], sums);
      __syncthreads();
    }
    for_each([&](int i, int j, int r, int c) {
      if (r >= rows || c >= width) return;
      T flow = sums[i][j] * of.product(top + r, t0 + c);
      if (any)
        for (int64_t o = 0; o < n.sums; ++o) {
          const T out = up.out[(top + r) * n.sums + o];
          if (steep(of, out, fold, top + r, o))
            flow += up.grad[(top + r) * n.sums + o] *
                    exp(of.pair(top + r, t0 + c) + log(of.weights(fold, o)[t0 + c]) - out);
        }
      shared.flows[r][c] = flow;
    });
    __syncthreads();
    const int i0 = t0 / k2, i1 = (t0 + width - 1) / k2, count = i1 - i0 + 1;
    if (right) {
      const int j0 = count > 1 ? 0 : t0 - i0 * k2, length = count > 1 ? k2 : width;
      for (int at = threadIdx.x; at < rows * length; at += THREADS) {
        const int r = at / length, j = j0 + at % length;
        T sum = 0;
        for (int i = i0; i <= i1; ++i) {
          const int c = i * k2 + j - t0;
          if (c >= 0 && c < width) sum += shared.flows[r][c];
        }
        T& to = right[(top + r) * k2 + j];
        to = of.left ? to + sum : sum;
      }
    }
    if (left)
      for (int at = threadIdx.x; at < rows * count; at += THREADS) {
        const int r = at / count, i = i0 + at % count;
        T sum = 0;
        for (int c = max(0, i * k2 - t0); c < min(width, (i + 1) * k2 - t0); ++c) sum += shared.flows[r][c];
        left[(top + r) * n.k1 + i] += sum;
      }
    __syncthreads();
  }
}

// Gradients of the weights. Blocks: parts of all folds; tiles of sums; tiles of terms.
template <class T>
__global__ void __launch_bounds__(THREADS)
    weights_kernel(Problem<T> of, Upstream<T> up, int64_t parts, int64_t stretch, T* __restrict__ dw) {
  __shared__ Strip<T> x, y;
  __shared__ int any;
  const Sizes& n = of.n;
  const int64_t fold = blockIdx.x / parts, start = blockIdx.x % parts * stretch;
  const int64_t stop = min(start + stretch, n.batch), o0 = int64_t(blockIdx.y) * SIDE;
  const int t0 = blockIdx.z * SIDE;
  T sums[EACH][EACH] = {};
  for (int64_t first = start; first < stop; first += DEPTH) {
    const int64_t top = fold * n.batch + first;
    const int rows = static_cast<int>(min(int64_t(DEPTH), stop - first));
    if (threadIdx.x == 0) any = 0;
    __syncthreads();
    fill_across<T>(x, [&](int o, int r) {
      return r < rows && o0 + o < n.sums ? share(of, up, fold, top + r, o0 + o, &any) : T(0);
    });
    fill_across<T>(y, [&](int t, int r) {
      return r < rows && t0 + t < of.terms() ? of.product(top + r, t0 + t) : T(0);
    });
    __syncthreads();
    add_products<T>(x, y, sums);
    if (any)
      for_each([&](int i, int j, int o, int t) {
        if (o0 + o >= n.sums || t0 + t >= of.terms()) return;
        for (int r = 0; r < rows; ++r) {
          const int64_t at = (top + r) * n.sums + o0 + o;
          if (!steep(of, up.out[at], fold, top + r, o0 + o)) continue;
          const T slope = of.pair(top + r, t0 + t) - up.out[at];
          sums[i][j] += up.grad[at] * exp(slope > STEEPEST<T> ? STEEPEST<T> : slope);
        }
      });
    __syncthreads();
  }
  T* to = dw + blockIdx.x * n.sums * of.terms();
  for_each([&](int i, int j, int o, int t) {
    if (o0 + o < n.sums && t0 + t < of.terms()) to[(o0 + o) * of.terms() + t0 + t] = sums[i][j];
  });
}

// dw = Σ parts, in order.
template <class T>
__global__ void __launch_bounds__(THREADS)
    add_up_kernel(const T* __restrict__ partial, int64_t parts, int64_t size, int64_t all, T* dw) {
  const int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= all) return;
  const T* from = partial + at / size * parts * size + at % size;
  T sum = from[0];
  for (int64_t part = 1; part < parts; ++part) sum += from[part * size];
  dw[at] = sum;
}

// The operands, contiguous, with the peaks that the kernels need.
template <class T>
class Prepared {
  std::optional<Tensor> left, peaks_left;
  Tensor right, w, peaks, limits;

  template <bool weights>
  static void take(const Tensor& x, int64_t rows, int64_t size, Tensor& peaks) {
    const int64_t count = (rows + THREADS / WARP - 1) / (THREADS / WARP);
    peaks_kernel<weights><<<blocks("log_einsum_exp", count), THREADS, 0, stream(x)>>>(
        x.const_data_ptr<T>(), rows, size, peaks.mutable_data_ptr<T>());
    check_launch("peaks_kernel");
  }

 public:
  Problem<T> problem;

  Prepared(const Sizes& n, const std::optional<Tensor>& a, const Tensor& b, const Tensor& weights)
      : right(torch::stable::contiguous(b)),
        w(torch::stable::contiguous(weights)),
        peaks(torch::stable::new_empty(b, {n.folds, n.batch})),
        limits(torch::stable::new_empty(b, {n.folds, n.sums})) {
    STD_TORCH_CHECK(n.terms() <= INT32_MAX / 2, "log_einsum_exp: too many terms");
    if (a) {
      left = torch::stable::contiguous(*a);
      peaks_left = torch::stable::new_empty(b, {n.folds, n.batch});
      take<false>(*left, n.folds * n.batch, n.k1, *peaks_left);
    }
    take<false>(right, n.folds * n.batch, n.k2, peaks);
    take<true>(w, n.folds * n.sums, n.terms(), limits);
    problem = {n,
               left ? left->const_data_ptr<T>() : nullptr,
               right.const_data_ptr<T>(),
               w.const_data_ptr<T>(),
               left ? peaks_left->const_data_ptr<T>() : nullptr,
               peaks.const_data_ptr<T>(),
               limits.const_data_ptr<T>()};
  }
};

template <class T>
void forward(const Sizes& n, const std::optional<Tensor>& left, const Tensor& right, const Tensor& w,
             Tensor& out) {
  const Prepared<T> of(n, left, right, w);
  const dim3 grid(blocks("log_einsum_exp", n.folds * tiles(n.batch)),
                  blocks("log_einsum_exp", tiles(n.sums), UINT16_MAX));
  forward_kernel<<<grid, THREADS, 0, stream(right)>>>(of.problem, out.mutable_data_ptr<T>());
  check_launch("forward_kernel");
}

template <class T>
void backward_weights(const Problem<T>& of, const Upstream<T>& up, Tensor& dw) {
  const char* op = "log_einsum_exp_backward";
  const Sizes& n = of.n;
  const int64_t per_part = n.folds * tiles(n.sums) * tiles(n.terms());
  const int64_t most = std::min((ENOUGH + per_part - 1) / per_part, (n.batch + STRETCH - 1) / STRETCH);
  const int64_t even = (n.batch + most - 1) / most, stretch = (even + DEPTH - 1) / DEPTH * DEPTH;
  const int64_t parts = (n.batch + stretch - 1) / stretch, size = n.sums * n.terms();
  std::optional<Tensor> partial;
  if (parts > 1) partial = torch::stable::new_empty(dw, {n.folds * parts * size});
  T* to = (partial ? *partial : dw).template mutable_data_ptr<T>();
  const dim3 grid(blocks(op, n.folds * parts), blocks(op, tiles(n.sums), UINT16_MAX),
                  blocks(op, tiles(n.terms()), UINT16_MAX));
  weights_kernel<<<grid, THREADS, 0, stream(dw)>>>(of, up, parts, stretch, to);
  check_launch("weights_kernel");
  if (!partial) return;
  const int64_t all = n.folds * size;
  add_up_kernel<<<blocks(op, (all + THREADS - 1) / THREADS), THREADS, 0, stream(dw)>>>(
      static_cast<const T*>(to), parts, size, all, dw.mutable_data_ptr<T>());
  check_launch("add_up_kernel");
}

template <class T>
void backward(const Sizes& n, const Tensor& grad, const std::optional<Tensor>& left, const Tensor& right,
              const Tensor& w, const Tensor& out, Tensor* dleft, Tensor* dright, Tensor* dw) {
  const Prepared<T> of(n, left, right, w);
  const Upstream<T> up{grad.const_data_ptr<T>(), out.const_data_ptr<T>()};
  if (dleft || dright) {
    if (dleft) torch::stable::zero_(*dleft);
    if (dright && left) torch::stable::zero_(*dright);
    const dim3 grid(blocks("log_einsum_exp_backward", n.folds * tiles(n.batch)),
                    left ? 1 : static_cast<unsigned>(std::min<int64_t>(tiles(n.terms()), UINT16_MAX)));
    operands_kernel<<<grid, THREADS, 0, stream(grad)>>>(
        of.problem, up, dleft ? dleft->mutable_data_ptr<T>() : nullptr,
        dright ? dright->mutable_data_ptr<T>() : nullptr);
    check_launch("operands_kernel");
  }
  if (dw) backward_weights(of.problem, up, *dw);
}

// Sums are always in a fixed order here, asked for or not.
Tensor log_einsum_exp(std::optional<Tensor> left, const Tensor& right, const Tensor& w, bool) {
  const Sizes n = check_operands("log_einsum_exp", left, right, w);
  check_devices("log_einsum_exp", {right, w, left.value_or(right)});
  const DeviceGuard guard(right.get_device_index());
  Tensor out = torch::stable::new_empty(right, {n.folds, n.batch, n.sums});
  if (n.nothing()) return torch::stable::fill_(out, -std::numeric_limits<double>::infinity());
  if (right.scalar_type() == ScalarType::Double) forward<double>(n, left, right, w, out);
  else forward<float>(n, left, right, w, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> log_einsum_exp_backward(
    const Tensor& grad, std::optional<Tensor> left, const Tensor& right, const Tensor& w,
    const Tensor& out, bool for_left, bool for_right, bool for_w) {
  const Sizes n = check_operands("log_einsum_exp_backward", left, right, w);
  check_result("log_einsum_exp_backward", grad, right, n);
  check_result("log_einsum_exp_backward", out, right, n);
  check_devices("log_einsum_exp_backward", {right, w, grad, out, left.value_or(right)});
  const DeviceGuard guard(right.get_device_index());
  const Tensor first = left.value_or(right);
  Tensor dleft = torch::stable::new_empty(first, {for_left ? n.folds : 0, n.batch, first.size(2)});
  Tensor dright = torch::stable::new_empty(right, {for_right ? n.folds : 0, n.batch, n.k2});
  Tensor dw = torch::stable::new_empty(w, {for_w ? n.folds : 0, n.sums, n.k1, n.k2});
  if (n.nothing())
    return {torch::stable::zero_(dleft), torch::stable::zero_(dright), torch::stable::zero_(dw)};
  const Tensor above = torch::stable::contiguous(grad), values = torch::stable::contiguous(out);
  Tensor *to_left = left && for_left ? &dleft : nullptr, *to_right = for_right ? &dright : nullptr;
  Tensor* to_w = for_w ? &dw : nullptr;
  if (right.scalar_type() == ScalarType::Double)
    backward<double>(n, above, left, right, w, values, to_left, to_right, to_w);
  else
    backward<float>(n, above, left, right, w, values, to_left, to_right, to_w);
  return {dleft, dright, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("log_einsum_exp", TORCH_BOX(&log_einsum_exp));
  m.impl("log_einsum_exp_backward", TORCH_BOX(&log_einsum_exp_backward));
}

}  // namespace torchzoo
