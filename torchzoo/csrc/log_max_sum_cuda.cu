// log_max_sum: values[b, o] = max_k a[b, k] + log_w[o, k] and the first k that reaches it.
//
// A block has a tile of 64 rows × 64 sums and takes terms through shared memory, in their order.
#include "tile_cuda.h"

namespace torchzoo {
namespace {

template <class T>
struct Terms {
  int64_t folds, batch, sums, count;
  const T *a, *log_w;
};

// Blocks: tiles of rows of all folds; tiles of sums.
template <class T>
__global__ void __launch_bounds__(THREADS)
    max_kernel(Terms<T> n, T* __restrict__ values, int64_t* __restrict__ argmax) {
  __shared__ Strip<T> x, y;
  const int64_t row_tiles = (n.batch + SIDE - 1) / SIDE, fold = blockIdx.x / row_tiles;
  const int64_t first = blockIdx.x % row_tiles * SIDE, o0 = int64_t(blockIdx.y) * SIDE;
  T most[EACH][EACH];
  int place[EACH][EACH] = {};
#pragma unroll
  for (int i = 0; i < EACH; ++i)
#pragma unroll
    for (int j = 0; j < EACH; ++j) most[i][j] = NOTHING<T>;
  for (int64_t k0 = 0; k0 < n.count; k0 += DEPTH) {
    fill<T>(x, [&](int r, int k) {
      const bool inside = first + r < n.batch && k0 + k < n.count;
      return inside ? n.a[(fold * n.batch + first + r) * n.count + k0 + k] : NOTHING<T>;
    });
    fill<T>(y, [&](int r, int k) {
      const bool inside = o0 + r < n.sums && k0 + k < n.count;
      return inside ? n.log_w[(fold * n.sums + o0 + r) * n.count + k0 + k] : NOTHING<T>;
    });
    __syncthreads();
    for (int k = 0; k < DEPTH; ++k)
      for_each([&](int i, int j, int r, int c) {
        const T term = x[k][r] + y[k][c];
        if (term > most[i][j]) {
          most[i][j] = term;
          place[i][j] = static_cast<int>(k0) + k;
        }
      });
    __syncthreads();
  }
  for_each([&](int i, int j, int r, int c) {
    if (first + r >= n.batch || o0 + c >= n.sums) return;
    const int64_t at = (fold * n.batch + first + r) * n.sums + o0 + c;
    values[at] = most[i][j];
    argmax[at] = place[i][j];
  });
}

template <class T>
void run(const Tensor& a, const Tensor& log_w, Tensor& values, Tensor& argmax) {
  const Terms<T> n{a.size(0),  a.size(1), log_w.size(1), a.size(2), a.const_data_ptr<T>(),
                   log_w.const_data_ptr<T>()};
  const dim3 grid(blocks("log_max_sum", n.folds * tiles(n.batch)),
                  blocks("log_max_sum", tiles(n.sums), UINT16_MAX));
  max_kernel<<<grid, THREADS, 0, stream(a)>>>(n, values.mutable_data_ptr<T>(),
                                              argmax.mutable_data_ptr<int64_t>());
  check_launch("max_kernel");
}

std::tuple<Tensor, Tensor> log_max_sum(const Tensor& a, const Tensor& log_w) {
  STD_TORCH_CHECK(a.dim() == 3 && log_w.dim() == 3 && a.size(0) == log_w.size(0) &&
                      a.size(2) == log_w.size(2) && a.scalar_type() == log_w.scalar_type(),
                  "log_max_sum: sizes or types that don't fit");
  STD_TORCH_CHECK(a.size(2) <= INT32_MAX, "log_max_sum: too many terms");
  check_devices("log_max_sum", {a, log_w});
  const DeviceGuard guard(a.get_device_index());
  const std::vector<int64_t> shape{a.size(0), a.size(1), log_w.size(1)};
  Tensor values = torch::stable::new_empty(a, shape);
  Tensor argmax = torch::stable::new_empty(a, shape, ScalarType::Long);
  if (!values.numel()) return {values, argmax};
  const Tensor rows = torch::stable::contiguous(a), weights = torch::stable::contiguous(log_w);
  switch (a.scalar_type()) {
    case ScalarType::Double: run<double>(rows, weights, values, argmax); break;
    case ScalarType::Float: run<float>(rows, weights, values, argmax); break;
    default: STD_TORCH_CHECK(false, "log_max_sum: expected float32 or float64");
  }
  return {values, argmax};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("log_max_sum", TORCH_BOX(&log_max_sum));
}

}  // namespace torchzoo
