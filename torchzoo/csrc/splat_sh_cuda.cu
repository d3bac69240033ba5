// splat_sh on CUDA: spherical harmonics at directions, and their gradients.
//
// A thread has a direction. A block's coefficients go through shared memory, so that the device's is
// read and written in whole lines; rows of an odd length keep threads out of each other's banks.
// Traffic at degree 3: 216 bytes a direction, backward 420. Limits: 2³¹ − 1 blocks.
#include "splat_cuda.h"
#include "splat_math.h"

namespace torchzoo::splat {
namespace {

using namespace projection;

template <class T>
constexpr int THREADS = sizeof(T) == 4 ? 128 : 64;

template <int degree>
struct Row {
  static constexpr int FUNCTIONS = (degree + 1) * (degree + 1), SIZE = 3 * FUNCTIONS, STRIDE = SIZE | 1;
};

// rows[r] = the first Row::SIZE of `width` numbers of row first + r.
template <int degree, class T>
__device__ __forceinline__ void load(const T* from, int64_t first, int rows, int width, T* to) {
  using R = Row<degree>;
  for (int i = threadIdx.x; i < rows * R::SIZE; i += THREADS<T>)
    to[i / R::SIZE * R::STRIDE + i % R::SIZE] = from[(first + i / R::SIZE) * width + i % R::SIZE];
}

template <class T, int degree>
__global__ void __launch_bounds__(THREADS<T>)
    sh_kernel(const T* __restrict__ dirs, const T* __restrict__ coeffs, int64_t count, int width,
              T* __restrict__ out) {
  using R = Row<degree>;
  __shared__ T rows[THREADS<T> * R::STRIDE];
  const int64_t first = int64_t(blockIdx.x) * THREADS<T>, at = first + threadIdx.x;
  load<degree>(coeffs, first, static_cast<int>(min(count - first, int64_t(THREADS<T>))), width, rows);
  __syncthreads();
  if (at >= count) return;
  const T dir[3] = {dirs[3 * at], dirs[3 * at + 1], dirs[3 * at + 2]};
  const T* mine = rows + threadIdx.x * R::STRIDE;
  T unit[3], inverse, basis[16], sum[3] = {};
  normalise(dir, unit, &inverse);
  sh_basis(degree, unit, basis);
#pragma unroll
  for (int k = 0; k < R::FUNCTIONS; ++k)
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) sum[channel] += basis[k] * mine[3 * k + channel];
#pragma unroll
  for (int channel = 0; channel < 3; ++channel) out[3 * at + channel] = sum[channel];
}

template <class T, int degree>
__global__ void __launch_bounds__(THREADS<T>)
    sh_backward_kernel(const T* __restrict__ dirs, const T* __restrict__ coeffs, const T* __restrict__ g,
                       int64_t count, int width, T* __restrict__ g_dirs, T* __restrict__ g_coeffs) {
  using R = Row<degree>;
  __shared__ T rows[THREADS<T> * R::STRIDE];
  const int64_t first = int64_t(blockIdx.x) * THREADS<T>, at = first + threadIdx.x;
  const int here = static_cast<int>(min(count - first, int64_t(THREADS<T>)));
  load<degree>(coeffs, first, here, width, rows);
  __syncthreads();
  if (at < count) {
    const T dir[3] = {dirs[3 * at], dirs[3 * at + 1], dirs[3 * at + 2]};
    const T above[3] = {g[3 * at], g[3 * at + 1], g[3 * at + 2]};
    T* mine = rows + threadIdx.x * R::STRIDE;
    T unit[3], inverse, basis[16], by_basis[16], by_unit[3], by_dir[3];
    normalise(dir, unit, &inverse);
    sh_basis(degree, unit, basis);
#pragma unroll
    for (int k = 0; k < R::FUNCTIONS; ++k) {
      by_basis[k] = above[0] * mine[3 * k] + above[1] * mine[3 * k + 1] + above[2] * mine[3 * k + 2];
#pragma unroll
      for (int channel = 0; channel < 3; ++channel) mine[3 * k + channel] = basis[k] * above[channel];
    }
    sh_basis_backward(degree, unit, by_basis, by_unit);
    normalise_backward(unit, inverse, by_unit, by_dir);
#pragma unroll
    for (int i = 0; i < 3; ++i) g_dirs[3 * at + i] = by_dir[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < here * width; i += THREADS<T>) {
    const int row = i / width, column = i - row * width;
    g_coeffs[first * width + i] = column < R::SIZE ? rows[row * R::STRIDE + column] : T(0);
  }
}

template <class Run>
void with_degree(int64_t degree, const Run& run) {
  STD_TORCH_CHECK(degree >= 0 && degree <= 3, "degree: expected 0 to 3, got ", degree);
  if (degree == 0) return run.template operator()<0>();
  if (degree == 1) return run.template operator()<1>();
  if (degree == 2) return run.template operator()<2>();
  run.template operator()<3>();
}

struct Given {
  Tensor dirs, coeffs;
  int64_t count, functions;

  Given(int64_t degree, const Tensor& dirs_, const Tensor& coeffs_) {
    check_devices("splat_sh", {dirs_, coeffs_});
    STD_TORCH_CHECK(dirs_.dim() == 2 && coeffs_.dim() == 3 && coeffs_.size(1) >= (degree + 1) * (degree + 1) &&
                        coeffs_.size(1) <= 1 << 16,
                    "splat_sh: expected dirs (M, 3) and coeffs (M, K, 3) with K >= (degree + 1)^2");
    count = dirs_.size(0), functions = coeffs_.size(1);
    dirs = dense("dirs", dirs_, dirs_.scalar_type(), {count, 3});
    coeffs = dense("coeffs", coeffs_, dirs_.scalar_type(), {count, functions, 3});
  }
};

Tensor splat_sh(int64_t degree, const Tensor& dirs, const Tensor& coeffs) {
  const DeviceGuard guard(dirs.get_device_index());
  const Given given(degree, dirs, coeffs);
  Tensor out = torch::stable::empty_like(given.dirs);
  if (!given.count) return out;
  with_type(given.dirs, [&]<class T>() {
    with_degree(degree, [&]<int d>() {
      sh_kernel<T, d><<<grid_of("splat_sh", given.count, THREADS<T>), THREADS<T>, 0, stream(given.dirs)>>>(
          read<T>(given.dirs), read<T>(given.coeffs), given.count, static_cast<int>(3 * given.functions),
          write<T>(out));
    });
  });
  check_launch("sh_kernel");
  return out;
}

std::tuple<Tensor, Tensor> splat_sh_backward(int64_t degree, const Tensor& dirs, const Tensor& coeffs,
                                             const Tensor& g) {
  const DeviceGuard guard(dirs.get_device_index());
  const Given given(degree, dirs, coeffs);
  check_devices("splat_sh_backward", {dirs, g});
  const Tensor above = dense("g", g, dirs.scalar_type(), {given.count, 3});
  Tensor g_dirs = torch::stable::empty_like(given.dirs), g_coeffs = torch::stable::empty_like(given.coeffs);
  if (!given.count) return {g_dirs, g_coeffs};
  with_type(given.dirs, [&]<class T>() {
    with_degree(degree, [&]<int d>() {
      sh_backward_kernel<T, d><<<grid_of("splat_sh_backward", given.count, THREADS<T>), THREADS<T>, 0, stream(given.dirs)>>>(
          read<T>(given.dirs), read<T>(given.coeffs), read<T>(above), given.count,
          static_cast<int>(3 * given.functions), write<T>(g_dirs), write<T>(g_coeffs));
    });
  });
  check_launch("sh_backward_kernel");
  return {g_dirs, g_coeffs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("splat_sh", TORCH_BOX(&splat_sh));
  m.impl("splat_sh_backward", TORCH_BOX(&splat_sh_backward));
}

}  // namespace torchzoo::splat
