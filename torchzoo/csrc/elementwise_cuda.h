// Elementwise functions of x and a parameter on CUDA: x is read once and y written once, by 16 bytes
// where the addresses allow it, in grid-stride loops with 64-bit indices.
//
// The gradient of a parameter is summed by blocks whose number depends on the shape alone, and then
// over the blocks in their order: no atomics, the same bits at every run. Where the parameter has
// features, a thread owns a feature and walks over a stretch of rows.
#pragma once

#include "cuda.h"
#include "elementwise_tensors.h"

namespace torchzoo {

constexpr int THREADS = 256;
constexpr int64_t MOST_BLOCKS = 4096;  // of a grid-stride loop
constexpr int64_t MOST_SUMS = 1024;    // blocks whose sums are added up by one
constexpr int64_t STRETCH = 32;        // rows that a thread walks over, at the least

// y = f(x, p) for `packs` packs; `features` is 0 where p is one number, else a multiple of `pack`.
template <int pack, class F, class T, class A>
__global__ void __launch_bounds__(THREADS)
    values_kernel(F f, const T* __restrict__ x, const A* __restrict__ p, int64_t packs,
                  int64_t features, T* __restrict__ y) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < packs; i += stride) {
    const int64_t at = i * pack;
    const A* q = features ? p + at % features : p;
    const Pack<T, pack> in = *reinterpret_cast<const Pack<T, pack>*>(x + at);
    Pack<T, pack> out;
#pragma unroll
    for (int v = 0; v < pack; ++v)
      out.value[v] = static_cast<T>(f.value(static_cast<A>(in.value[v]), q[features ? v : 0]));
    *reinterpret_cast<Pack<T, pack>*>(y + at) = out;
  }
}

// The sum of a value over the block, right in thread 0.
template <class A>
__device__ __forceinline__ A block_sum(A value) {
  __shared__ A warps[THREADS / WARP];
  value = warp_sum(value);
  __syncthreads();  // the sums of the last call have been read
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
  __syncthreads();
  A total = 0;
#pragma unroll
  for (int w = 0; w < THREADS / WARP; ++w) total += warps[w];
  return total;
}

// dx, and for each block the sum of what goes to p, which is one number.
template <int pack, class F, class T, class A>
__global__ void __launch_bounds__(THREADS)
    slopes_kernel(F f, const T* __restrict__ grad, const T* __restrict__ x, const A* __restrict__ p,
                  int64_t packs, T* __restrict__ dx, A* __restrict__ sums) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  const A q = *p;
  A sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < packs; i += stride) {
    const int64_t at = i * pack;
    const Pack<T, pack> in = *reinterpret_cast<const Pack<T, pack>*>(x + at);
    const Pack<T, pack> above = *reinterpret_cast<const Pack<T, pack>*>(grad + at);
    Pack<T, pack> out;
#pragma unroll
    for (int v = 0; v < pack; ++v) {
      const Slopes<A> both =
          f.slopes(static_cast<A>(above.value[v]), static_cast<A>(in.value[v]), q);
      out.value[v] = static_cast<T>(both.x);
      sum += both.p;
    }
    *reinterpret_cast<Pack<T, pack>*>(dx + at) = out;
  }
  const A total = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// dx and, for each stretch of rows, the sums of what goes to each feature of p.
template <class F, class T, class A>
__global__ void __launch_bounds__(THREADS)
    slopes_of_features_kernel(F f, const T* __restrict__ grad, const T* __restrict__ x,
                              const A* __restrict__ p, int64_t rows, int64_t features,
                              int64_t stretch, T* __restrict__ dx, A* __restrict__ sums) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (j >= features) return;
  const A q = p[j];
  A sum = 0;
  const int64_t first = blockIdx.y * stretch, last = min(first + stretch, rows);
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * features + j;
    const Slopes<A> both = f.slopes(static_cast<A>(grad[at]), static_cast<A>(x[at]), q);
    dx[at] = static_cast<T>(both.x);
    sum += both.p;
  }
  sums[blockIdx.y * features + j] = sum;
}

// total[j] = Σ_i sums[i·features + j], i < count, in their order.
template <class A>
__global__ void __launch_bounds__(THREADS)
    add_up_kernel(const A* __restrict__ sums, int64_t count, int64_t features, A* total) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (j >= features) return;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(sums[i * features + j]);
  total[j] = static_cast<A>(sum);
}

// total[j] = Σ_i sums[j·count + i], by a block each.
template <class A>
__global__ void __launch_bounds__(THREADS)
    add_up_each_kernel(const A* __restrict__ sums, int64_t count, A* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS)
    sum += static_cast<double>(sums[blockIdx.x * count + i]);
  const double all = block_sum(sum);
  if (threadIdx.x == 0) total[blockIdx.x] = static_cast<A>(all);
}

inline unsigned blocks_for(int64_t work, int64_t most) {
  return static_cast<unsigned>(std::min((work + THREADS - 1) / THREADS, most));
}

// Calls run(pack) with packs of 16 bytes where they fit, else of one element.
template <class T, class Run>
void for_pack(bool fits, int64_t size, int64_t features, const Run& run) {
  constexpr int whole = 16 / sizeof(T);
  if (fits && size % whole == 0 && features % whole == 0)
    run(std::integral_constant<int, whole>());
  else
    run(std::integral_constant<int, 1>());
}

template <class A>
Tensor new_sums(const Tensor& x, std::initializer_list<int64_t> size) {
  constexpr bool wide = std::is_same_v<A, double>;
  return torch::stable::new_empty(x, size, wide ? ScalarType::Double : ScalarType::Float);
}

// `make(A())` gives the function for the type that is computed in.
template <class Make>
Tensor elementwise(const char* op, const Tensor& x, const Tensor& p, const Make& make) {
  check_devices(op, {x, p});
  check_parameter(op, x, p);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty_result(x, p);
  const Tensor in = in_order_of(x, y);
  const int64_t size = x.numel(), features = p.dim() ? p.numel() : 0;
  if (!size) return y;
  for_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T* from = in.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    const auto f = make(A());
    for_pack<T>(aligned(from) && aligned(to), size, features, [&](auto pack) {
      const int64_t packs = size / pack;
      values_kernel<pack><<<blocks_for(packs, MOST_BLOCKS), THREADS, 0, stream(x)>>>(
          f, from, p.const_data_ptr<A>(), packs, features, to);
    });
    check_launch(op);
  });
  return y;
}

template <class F, class T, class A>
void launch_slopes(const char* op, const F& f, const Tensor& x, const T* grad, const T* from,
                   const A* p, T* dx, A* dp) {
  const int64_t size = x.numel();
  for_pack<T>(aligned(grad) && aligned(from) && aligned(dx), size, 0, [&](auto pack) {
    const int64_t packs = size / pack;
    const unsigned blocks = blocks_for(packs, MOST_SUMS);
    const Tensor sums = new_sums<A>(x, {static_cast<int64_t>(blocks)});
    A* partial = sums.mutable_data_ptr<A>();
    slopes_kernel<pack><<<blocks, THREADS, 0, stream(x)>>>(f, grad, from, p, packs, dx, partial);
    check_launch(op);
    add_up_each_kernel<<<1, THREADS, 0, stream(x)>>>(static_cast<const A*>(partial), blocks, dp);
    check_launch(op);
  });
}

template <class F, class T, class A>
void launch_slopes_of_features(const char* op, const F& f, const Tensor& x, const T* grad,
                               const T* from, const A* p, int64_t features, T* dx, A* dp) {
  const int64_t rows = x.numel() / features;
  const int64_t most = std::min(MOST_SUMS, (rows + STRETCH - 1) / STRETCH);
  const int64_t stretch = (rows + most - 1) / most, count = (rows + stretch - 1) / stretch;
  const Tensor sums = new_sums<A>(x, {count, features});
  A* partial = sums.mutable_data_ptr<A>();
  const int64_t columns = (features + THREADS - 1) / THREADS;
  STD_TORCH_CHECK(columns <= INT32_MAX, op, ": too many features");
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(count));
  slopes_of_features_kernel<<<grid, THREADS, 0, stream(x)>>>(f, grad, from, p, rows, features,
                                                             stretch, dx, partial);
  check_launch(op);
  add_up_kernel<<<static_cast<unsigned>(columns), THREADS, 0, stream(x)>>>(
      static_cast<const A*>(partial), count, features, dp);
  check_launch(op);
}

template <class Make>
std::tuple<Tensor, Tensor> elementwise_backward(const char* op, const Tensor& grad, const Tensor& x,
                                                const Tensor& p, const Make& make) {
  check_devices(op, {grad, x, p});
  check_parameter(op, x, p);
  check_gradient(op, grad, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = empty_result(x, p), dp = torch::stable::empty_like(p);
  const Tensor in = in_order_of(x, dx), above = in_order_of(grad, dx);
  if (!x.numel()) {
    torch::stable::zero_(dp);
    return {dx, dp};
  }
  for_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const T *from = in.const_data_ptr<T>(), *g = above.const_data_ptr<T>();
    const A* q = p.const_data_ptr<A>();
    T* to = dx.mutable_data_ptr<T>();
    A* to_p = dp.mutable_data_ptr<A>();
    if (p.dim()) launch_slopes_of_features(op, make(A()), x, g, from, q, p.numel(), to, to_p);
    else launch_slopes(op, make(A()), x, g, from, q, to, to_p);
  });
  return {dx, dp};
}

}  // namespace torchzoo
