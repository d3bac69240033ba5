// scaled_softmax and scaled_softmax_backward on CUDA: a warp for each row, which it reads from memory
// once and again, for the sum and for the result, out of the caches as a rule. The order of additions
// depends on the length of a row alone.
#include "elementwise_cuda.h"
#include "scaled_softmax.h"

namespace torchzoo {
namespace {

// Calls run(row, first column) in each lane of the warp that has the row.
template <class Run>
__device__ __forceinline__ void for_rows(int64_t rows, const Run& run) {
  constexpr int64_t warps = THREADS / WARP;
  for (int64_t row = blockIdx.x * warps + threadIdx.x / WARP; row < rows; row += gridDim.x * warps)
    run(row, static_cast<int>(threadIdx.x % WARP));
}

template <class T, class A>
__global__ void __launch_bounds__(THREADS)
    row_values_kernel(const T* __restrict__ z, const A* __restrict__ s, RowSizes size,
                      T* __restrict__ y) {
  for_rows(size.rows, [&](int64_t row, int lane) {
    const RowScale<A> scale(s[row]);
    const T* in = z + row * size.columns;
    T* out = y + row * size.columns;
    A peak = -A(__builtin_huge_val()), sum = 0;
    for (int64_t i = lane; i < size.columns; i += WARP)
      peak = max(peak, scale.half * static_cast<A>(in[i]));  // NaN is passed over
    peak = warp_max(peak);
    for (int64_t i = lane; i < size.columns; i += WARP)
      sum += scale.exponential(static_cast<A>(in[i]), peak);
    const A share = A(1) / warp_sum(sum);
    for (int64_t i = lane; i < size.columns; i += WARP)
      out[i] = static_cast<T>(scale.exponential(static_cast<A>(in[i]), peak) * share);
  });
}

template <class T, class A>
__global__ void __launch_bounds__(THREADS)
    row_slopes_kernel(const T* __restrict__ grad, const T* __restrict__ y, const A* __restrict__ s,
                      const T* __restrict__ z, RowSizes size, T* __restrict__ dz,
                      A* __restrict__ ds) {
  for_rows(size.rows, [&](int64_t row, int lane) {
    const int64_t at = row * size.columns;
    const A scale = s[row];
    A mean = 0, slope = 0;
    for (int64_t i = at + lane; i < at + size.columns; i += WARP)
      mean += static_cast<A>(grad[i]) * static_cast<A>(y[i]);
    mean = warp_sum(mean);
    for (int64_t i = at + lane; i < at + size.columns; i += WARP) {
      const A away = static_cast<A>(y[i]) * (static_cast<A>(grad[i]) - mean);
      dz[i] = static_cast<T>(scale * away);
      if (z) slope += static_cast<A>(z[i]) * away;
    }
    slope = warp_sum(slope);
    if (lane == 0) ds[row] = slope;
  });
}

inline unsigned blocks_of(const RowSizes& size) {
  constexpr int64_t warps = THREADS / WARP;
  return static_cast<unsigned>(std::min<int64_t>((size.rows + warps - 1) / warps, INT32_MAX));
}

Tensor scaled_softmax(const Tensor& z, const Tensor& scale) {
  const char* op = "scaled_softmax";
  check_devices(op, {z, scale});
  const RowSizes size = check_rows(op, z, scale);
  const DeviceGuard guard(z.get_device_index());
  const Tensor in = torch::stable::contiguous(z), s = torch::stable::contiguous(scale);
  Tensor y = torch::stable::new_empty(z, z.sizes());
  if (!size.rows) return y;
  for_type(op, z, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    row_values_kernel<<<blocks_of(size), THREADS, 0, stream(z)>>>(
        in.const_data_ptr<T>(), s.const_data_ptr<A>(), size, y.mutable_data_ptr<T>());
    check_launch(op);
  });
  return y;
}

std::tuple<Tensor, Tensor> scaled_softmax_backward(const Tensor& grad, const Tensor& y,
                                                   const Tensor& scale, std::optional<Tensor> z) {
  const char* op = "scaled_softmax_backward";
  check_devices(op, {grad, y, scale, z ? *z : y});
  const RowSizes size = check_rows(op, y, scale);
  check_gradient(op, grad, y);
  if (z) check_gradient(op, *z, y);
  const DeviceGuard guard(y.get_device_index());
  const Tensor above = torch::stable::contiguous(grad), shares = torch::stable::contiguous(y);
  const Tensor s = torch::stable::contiguous(scale);
  const std::optional<Tensor> in = z ? std::optional(torch::stable::contiguous(*z)) : z;
  Tensor dz = torch::stable::new_empty(y, y.sizes());
  Tensor ds = torch::stable::new_empty(scale, scale.sizes());
  if (!size.rows) return {dz, ds};
  for_type(op, y, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    row_slopes_kernel<<<blocks_of(size), THREADS, 0, stream(y)>>>(
        above.const_data_ptr<T>(), shares.const_data_ptr<T>(), s.const_data_ptr<A>(),
        in ? in->const_data_ptr<T>() : nullptr, size, dz.mutable_data_ptr<T>(),
        ds.mutable_data_ptr<A>());
    check_launch(op);
  });
  return {dz, ds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("scaled_softmax", TORCH_BOX(&scaled_softmax));
  m.impl("scaled_softmax_backward", TORCH_BOX(&scaled_softmax_backward));
}

}  // namespace torchzoo
