// splat_sh on CUDA: spherical harmonics at directions, and their gradients; with cameras the
// directions are those from each one's centre to each point, and the results are colours.
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

template <class T>
struct Rays {
  const T *points, *views;  // no views: the points are directions
  const int* radii;
  int64_t count;  // of points

  __device__ bool seen(int64_t m) const { return !views || (radii[2 * m] > 0 && radii[2 * m + 1] > 0); }

  __device__ void direction(int64_t m, T* dir) const {
    const T* point = points + 3 * (views ? m % count : m);
    const T* view = views ? views + 16 * (m / count) : nullptr;
    const bool there = seen(m);
#pragma unroll
    for (int i = 0; i < 3; ++i) {  // the camera's centre is -R^T t
      const T behind = view ? view[3] * view[i] + view[7] * view[4 + i] + view[11] * view[8 + i] : T(0);
      dir[i] = there ? point[i] + behind : T(0);
    }
  }
};

template <class T, int degree>
__global__ void __launch_bounds__(THREADS<T>)
    sh_kernel(Rays<T> rays, const T* __restrict__ coeffs, int64_t count, int width, T* __restrict__ out) {
  using R = Row<degree>;
  __shared__ T rows[THREADS<T> * R::STRIDE];
  const int64_t first = int64_t(blockIdx.x) * THREADS<T>, at = first + threadIdx.x;
  load<degree>(coeffs, first, static_cast<int>(min(count - first, int64_t(THREADS<T>))), width, rows);
  __syncthreads();
  if (at >= count) return;
  const T* mine = rows + threadIdx.x * R::STRIDE;
  T dir[3], unit[3], inverse, basis[16], sum[3] = {};
  rays.direction(at, dir);
  normalise(dir, unit, &inverse);
  sh_basis(degree, unit, basis);
#pragma unroll
  for (int k = 0; k < R::FUNCTIONS; ++k)
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) sum[channel] += basis[k] * mine[3 * k + channel];
#pragma unroll
  for (int channel = 0; channel < 3; ++channel) {
    const T shown = sum[channel] + T(0.5);
    out[3 * at + channel] = !rays.views ? sum[channel] : shown < 0 ? T(0) : shown;  // a NaN stays
  }
}

template <class T, int degree>
__global__ void __launch_bounds__(THREADS<T>)
    sh_backward_kernel(Rays<T> rays, const T* __restrict__ coeffs, const T* __restrict__ colors,
                       const T* __restrict__ g, int64_t count, int width, T* __restrict__ g_dirs,
                       T* __restrict__ g_coeffs) {
  using R = Row<degree>;
  __shared__ T rows[THREADS<T> * R::STRIDE];
  const int64_t first = int64_t(blockIdx.x) * THREADS<T>, at = first + threadIdx.x;
  const int here = static_cast<int>(min(count - first, int64_t(THREADS<T>)));
  load<degree>(coeffs, first, here, width, rows);
  __syncthreads();
  if (at < count) {
    T* mine = rows + threadIdx.x * R::STRIDE;
    T dir[3], above[3], unit[3], inverse, basis[16], by_basis[16], by_unit[3], by_dir[3];
    rays.direction(at, dir);
#pragma unroll
    for (int channel = 0; channel < 3; ++channel)
      above[channel] = colors && colors[3 * at + channel] <= 0 ? T(0) : g[3 * at + channel];
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
    for (int i = 0; i < 3; ++i) g_dirs[3 * at + i] = rays.seen(at) ? by_dir[i] : T(0);
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
  Tensor points, coeffs, viewmats, radii;
  int64_t rows, functions;
  bool from_cameras;

  Given(int64_t degree, const Tensor& points_, const Tensor& coeffs_, const std::optional<Tensor>& viewmats_,
        const std::optional<Tensor>& radii_)
      : from_cameras(viewmats_.has_value()) {
    check_devices("splat_sh", {points_, coeffs_});
    STD_TORCH_CHECK(points_.dim() == 2 && coeffs_.dim() == 3 && coeffs_.size(1) >= (degree + 1) * (degree + 1) &&
                        coeffs_.size(1) <= 1 << 16,
                    "splat_sh: expected points (M, 3) and coeffs (M, K, 3) with K >= (degree + 1)^2");
    STD_TORCH_CHECK(from_cameras == radii_.has_value(), "splat_sh: expected viewmats and radii, or none of them");
    const int64_t count = points_.size(0), cameras = from_cameras ? viewmats_->size(0) : 1;
    rows = count * cameras, functions = coeffs_.size(1);
    points = dense("points", points_, points_.scalar_type(), {count, 3});
    coeffs = dense("coeffs", coeffs_, points_.scalar_type(), {rows, functions, 3});
    if (!from_cameras) return;
    check_devices("splat_sh", {points_, *viewmats_, *radii_});
    viewmats = dense("viewmats", *viewmats_, points_.scalar_type(), {cameras, 4, 4});
    radii = dense("radii", *radii_, ScalarType::Int, {cameras, count, 2});
  }

  template <class T>
  Rays<T> rays() const {
    if (!from_cameras) return {read<T>(points), nullptr, nullptr, rows};
    return {read<T>(points), read<T>(viewmats), read<int>(radii), points.size(0)};
  }

  int width() const { return static_cast<int>(3 * functions); }
};

Tensor splat_sh(int64_t degree, const Tensor& points, const Tensor& coeffs, std::optional<Tensor> viewmats,
                std::optional<Tensor> radii) {
  const DeviceGuard guard(points.get_device_index());
  const Given given(degree, points, coeffs, viewmats, radii);
  Tensor out = torch::stable::new_empty(given.points, {given.rows, 3});
  if (!given.rows) return out;
  with_type(given.points, [&]<class T>() {
    with_degree(degree, [&]<int d>() {
      sh_kernel<T, d><<<grid_of("splat_sh", given.rows, THREADS<T>), THREADS<T>, 0, stream(given.points)>>>(
          given.rays<T>(), read<T>(given.coeffs), given.rows, given.width(), write<T>(out));
    });
  });
  check_launch("sh_kernel");
  return out;
}

std::tuple<Tensor, Tensor> splat_sh_backward(int64_t degree, const Tensor& points, const Tensor& coeffs,
                                             std::optional<Tensor> viewmats, std::optional<Tensor> radii,
                                             std::optional<Tensor> colors, const Tensor& g) {
  const DeviceGuard guard(points.get_device_index());
  const Given given(degree, points, coeffs, viewmats, radii);
  check_devices("splat_sh_backward", {points, g, colors ? *colors : g});
  const auto as_rows = [&](const char* name, const Tensor& t) {
    return dense(name, t, points.scalar_type(), {given.rows, 3});
  };
  const Tensor above = as_rows("g", g), shown = as_rows("colors", colors ? *colors : g);
  Tensor g_dirs = torch::stable::empty_like(above), g_coeffs = torch::stable::empty_like(given.coeffs);
  if (!given.rows) return {g_dirs, g_coeffs};
  with_type(given.points, [&]<class T>() {
    with_degree(degree, [&]<int d>() {
      sh_backward_kernel<T, d><<<grid_of("splat_sh_backward", given.rows, THREADS<T>), THREADS<T>, 0, stream(given.points)>>>(
          given.rays<T>(), read<T>(given.coeffs), colors ? read<T>(shown) : nullptr, read<T>(above),
          given.rows, given.width(), write<T>(g_dirs), write<T>(g_coeffs));
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
