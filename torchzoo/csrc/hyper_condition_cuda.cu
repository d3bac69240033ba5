// hyper_condition, a warp an item: its lanes share the latents out and read the rows of l21 side by
// side; the few components are in every lane.
#include "cuda.h"
#include "hyper_condition.h"

namespace torchzoo {
namespace {

using hyper::Gradients;
using hyper::Inputs;
using hyper::MOST;
using hyper::Sizes;

constexpr int WARPS = 4;  // of a block
constexpr unsigned COLUMNS = 256;

// L11^-T L21^T (z - mean) in every lane.
template <int M, class T>
__device__ void deviation(const Sizes& s, const Inputs<T>& in, int64_t n, int64_t b, T* x) {
  const int m = M ? M : s.outputs, lane = threadIdx.x % WARP;
  const T* z = in.z + (s.shared ? b : b * s.items + n) * s.latents;
  const T *mean = in.mean_latent + n * s.latents, *l21 = in.l21 + n * s.latents * m;
  for (int k = 0; k < m; ++k) x[k] = T(0);
  for (int64_t j = lane; j < s.latents; j += WARP) {
    const T offset = z[j] - mean[j];
    for (int k = 0; k < m; ++k) x[k] += offset * l21[j * m + k];
  }
  for (int k = 0; k < m; ++k) x[k] = warp_sum(x[k]);
  hyper::solve_upper<M>(in.raw + n * s.factors(), m, x);
}

template <int M, class T>
__global__ void forward_kernel(const Sizes s, const Inputs<T> in, T* out) {
  const int64_t n = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (n >= s.items) return;  // whole warps
  const int m = M ? M : s.outputs, lane = threadIdx.x % WARP;
  for (int64_t b = 0; b < s.samples; ++b) {
    T x[M ? M : MOST];
    deviation<M>(s, in, n, b, x);
    if (lane) continue;
    for (int k = 0; k < m; ++k) out[(b * s.items + n) * m + k] = in.mean_out[n * m + k] - x[k];
  }
}

template <int M, class T>
__global__ void backward_kernel(const Sizes s, const Inputs<T> in, const T* g, const Gradients<T> to) {
  const int64_t n = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (n >= s.items) return;  // whole warps
  const int m = M ? M : s.outputs, lane = threadIdx.x % WARP;
  const int64_t d = s.latents, factors = s.factors();
  const T *mean = in.mean_latent + n * d, *l21 = in.l21 + n * d * m, *raw = in.raw + n * factors;
  T *g_raw = to.raw + n * factors, *g_l21 = to.l21 + n * d * m, *g_latent = to.latent + n * d;
  for (int64_t b = 0; b < s.samples; ++b) {  // a lane adds to what it wrote itself
    const bool first = !b;
    const T* z = in.z + (s.shared ? b : b * s.items + n) * d;
    const T* above = g + (b * s.items + n) * m;
    T x[M ? M : MOST], g_t[M ? M : MOST];
    deviation<M>(s, in, n, b, x);
    for (int k = 0; k < m; ++k) g_t[k] = -above[k];
    hyper::solve_lower<M>(raw, m, g_t);
    if (!lane)
      for (int k = 0; k < m; ++k) {
        T* mine = to.out + n * m + k;
        *mine = (first ? T(0) : *mine) + above[k];
        for (int i = 0; i <= k; ++i) {
          T* entry = g_raw + k * (k + 1) / 2 + i;
          *entry = (first ? T(0) : *entry) - x[k] * g_t[i];
        }
      }
    for (int64_t j = lane; j < d; j += WARP) {
      const T offset = z[j] - mean[j];
      T sum = T(0);
      for (int k = 0; k < m; ++k) {
        T* entry = g_l21 + j * m + k;
        *entry = (first ? T(0) : *entry) + offset * g_t[k];
        sum += g_t[k] * l21[j * m + k];
      }
      to.offset[(b * s.items + n) * d + j] = sum;
      g_latent[j] = (first ? T(0) : g_latent[j]) - sum;
    }
  }
  if (!lane)
    for (int k = 0; k < m; ++k) g_raw[k * (k + 3) / 2] *= exp(raw[k * (k + 3) / 2]);
}

// Sums over the items, a block a latent of a sample, in an order that depends on the sizes alone.
template <class T>
__global__ void sum_kernel(const Sizes s, const T* offset, T* to) {
  __shared__ double sums[COLUMNS];
  const int64_t b = blockIdx.x / s.latents, j = blockIdx.x % s.latents;
  double sum = 0;
  for (int64_t n = threadIdx.x; n < s.items; n += COLUMNS)
    sum += double(offset[(b * s.items + n) * s.latents + j]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned step = COLUMNS / 2; step; step /= 2) {
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  if (!threadIdx.x) to[blockIdx.x] = T(sums[0]);
}

unsigned blocks_of(int64_t count) {
  STD_TORCH_CHECK(count <= INT32_MAX, "hyper_condition: too many items");
  return static_cast<unsigned>(count);
}

template <class Run>
void with_outputs(int m, const Run& run) {
  if (m == 1) return run.template operator()<1>();
  if (m == 3) return run.template operator()<3>();
  if (m == 4) return run.template operator()<4>();
  run.template operator()<0>();
}

template <class Run>
void with_type(const Tensor& tensor, const Run& run) {
  if (tensor.scalar_type() == ScalarType::Double) return run.template operator()<double>();
  run.template operator()<float>();
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor hyper_condition(const Tensor& z_, const Tensor& mean_out_, const Tensor& mean_latent_,
                       const Tensor& raw_, const Tensor& l21_) {
  const Sizes s = hyper::sizes(z_, mean_latent_, raw_, l21_, mean_out_);
  check_devices("hyper_condition", {z_, mean_out_, mean_latent_, raw_, l21_});
  const DeviceGuard guard(z_.get_device_index());
  const Tensor z = dense(z_), mean_out = dense(mean_out_), mean_latent = dense(mean_latent_);
  const Tensor raw = dense(raw_), l21 = dense(l21_);
  Tensor out = torch::stable::new_empty(mean_out, {s.samples, s.items, s.outputs});
  if (!out.numel()) return out;
  with_type(z, [&]<class T>() {
    const Inputs<T> in{z.const_data_ptr<T>(), mean_out.const_data_ptr<T>(), mean_latent.const_data_ptr<T>(),
                       raw.const_data_ptr<T>(), l21.const_data_ptr<T>()};
    with_outputs(s.outputs, [&]<int M>() {
      forward_kernel<M><<<blocks_of((s.items + WARPS - 1) / WARPS), WARPS * WARP, 0, stream(z)>>>(
          s, in, out.mutable_data_ptr<T>());
    });
  });
  check_launch("hyper_condition");
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hyper_condition_backward(
    const Tensor& z_, const Tensor& mean_latent_, const Tensor& raw_, const Tensor& l21_, const Tensor& g_) {
  const Sizes s = hyper::sizes(z_, mean_latent_, raw_, l21_, g_);
  STD_TORCH_CHECK(g_.dim() == 3 && g_.size(0) == s.samples, "hyper_condition: shapes that don't fit together");
  check_devices("hyper_condition", {z_, mean_latent_, raw_, l21_, g_});
  const DeviceGuard guard(z_.get_device_index());
  const Tensor z = dense(z_), mean_latent = dense(mean_latent_), raw = dense(raw_), l21 = dense(l21_);
  const Tensor g = dense(g_);
  Tensor g_offset = torch::stable::new_empty(z, {s.samples, s.items, s.latents});
  Tensor g_out = torch::stable::new_zeros(z, {s.items, s.outputs});
  Tensor g_latent = torch::stable::new_zeros(z, {s.items, s.latents});
  Tensor g_raw = torch::stable::new_zeros(z, {s.items, s.factors()});
  Tensor g_l21 = torch::stable::new_zeros(z, {s.items, s.latents, s.outputs});
  Tensor g_z = s.shared ? torch::stable::new_zeros(z, {s.samples, 1, s.latents}) : g_offset;
  if (!s.samples || !s.items) return {g_z, g_out, g_latent, g_raw, g_l21};
  with_type(z, [&]<class T>() {
    const Inputs<T> in{z.const_data_ptr<T>(), nullptr, mean_latent.const_data_ptr<T>(),
                       raw.const_data_ptr<T>(), l21.const_data_ptr<T>()};
    const Gradients<T> to{g_offset.mutable_data_ptr<T>(), g_out.mutable_data_ptr<T>(),
                          g_latent.mutable_data_ptr<T>(), g_raw.mutable_data_ptr<T>(),
                          g_l21.mutable_data_ptr<T>()};
    with_outputs(s.outputs, [&]<int M>() {
      backward_kernel<M><<<blocks_of((s.items + WARPS - 1) / WARPS), WARPS * WARP, 0, stream(z)>>>(
          s, in, g.const_data_ptr<T>(), to);
    });
    check_launch("hyper_condition_backward");
    if (s.shared && s.latents)
      sum_kernel<<<blocks_of(s.samples * s.latents), COLUMNS, 0, stream(z)>>>(
          s, g_offset.const_data_ptr<T>(), g_z.mutable_data_ptr<T>());
  });
  check_launch("hyper_condition_backward");
  return {g_z, g_out, g_latent, g_raw, g_l21};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("hyper_condition", TORCH_BOX(&hyper_condition));
  m.impl("hyper_condition_backward", TORCH_BOX(&hyper_condition_backward));
}

}  // namespace torchzoo
