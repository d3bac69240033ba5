// splat_project on CUDA, and its gradients.
//
// Forward, a thread has a splat and a camera; backward a splat, for which it goes through the cameras in
// their order. Gradients of the cameras are summed over a block, and then over blocks in their order, so
// that results don't change from run to run. Traffic: 40 bytes a splat in and 56 out for each camera;
// backward some 80 in for each camera that sees it. Limits: 2³¹ − 1 blocks of 256 threads.
#include "splat_cuda.h"
#include "splat_math.h"

namespace torchzoo::splat {
namespace {

using namespace projection;

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int VIEW = 12;  // the numbers of a view matrix that have gradients
constexpr int ROWS = 16;  // rows of them that are added side by side

template <class T>
struct Splats {
  const T *means, *quats, *scales, *opacities, *beta, *viewmats, *Ks;  // opacities, beta: or null
  int64_t splats, cameras;

  __device__ View<T> view(int64_t camera, const Options& options) const {
    return make_view(viewmats + 16 * camera, Ks + 9 * camera, options.width, options.height, options.inria);
  }
};

template <class T, int count>
__device__ __forceinline__ void load(const T* from, int64_t row, T* to) {
#pragma unroll
  for (int i = 0; i < count; ++i) to[i] = from ? from[count * row + i] : T(0);
}

template <int count, class T>
__device__ __forceinline__ void store(const T* from, T* to, int64_t row) {
#pragma unroll
  for (int i = 0; i < count; ++i) to[count * row + i] = from[i];
}

template <class T>
struct Screens {
  int* radii;
  T *means, *depths, *conics, *covs, *compensations;
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    project_kernel(Splats<T> splats, Options options, Screens<T> to) {
  const int64_t item = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (item >= splats.cameras * splats.splats) return;
  const int64_t camera = item / splats.splats, splat = item % splats.splats;
  T mean[3], quat[4], scale[3];
  load<T, 3>(splats.means, splat, mean);
  load<T, 4>(splats.quats, splat, quat);
  load<T, 3>(splats.scales, splat, scale);
  Screen<T> screen;
  project(options, splats.view(camera, options), mean, quat, scale, splats.opacities[item],
          splats.beta ? splats.beta[splat] : T(0), screen);
  store<2>(screen.radius, to.radii, item);
  store<2>(screen.mean, to.means, item);
  to.depths[item] = screen.depth;
  store<3>(screen.conic, to.conics, item);
  store<3>(screen.cov, to.covs, item);
  to.compensations[item] = screen.compensation;
}

using MaybeTensor = std::optional<Tensor>;

template <class T>
struct Above {
  const int* radii;
  const T *conics, *compensations;
  const T *g_means2d, *g_depths, *g_conics, *g_covs2d, *g_compensations;  // null: all 0
};

template <class T>
struct Gradients {
  T *means, *quats, *scales;
  T* views;  // (cameras, blocks, VIEW)
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    project_backward_kernel(Splats<T> splats, Options options, Above<T> from, Gradients<T> to) {
  __shared__ T parts[WARPS][VIEW];
  using Sums = WarpSums<VIEW>;
  const int64_t splat = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const bool there = splat < splats.splats;
  T mean[3] = {}, quat[4] = {}, scale[3] = {}, g_mean[3] = {}, g_axes[9] = {};
  if (there) {
    load<T, 3>(splats.means, splat, mean);
    load<T, 4>(splats.quats, splat, quat);
    load<T, 3>(splats.scales, splat, scale);
  }
  const int number = Sums::place(0);
  bool ever = false;
  for (int64_t camera = 0; camera < splats.cameras; ++camera) {
    const int64_t item = camera * splats.splats + splat;
    const bool seen = there && from.radii[2 * item] > 0 && from.radii[2 * item + 1] > 0;
    T* const total = to.views + (camera * gridDim.x + blockIdx.x) * VIEW;
    if (!__syncthreads_or(seen)) {  // also: the last camera's parts have been read
      if (threadIdx.x < VIEW) total[threadIdx.x] = T(0);
      continue;
    }
    T g_view[VIEW] = {};
    if (seen) {
      ever = true;
      ScreenGrad<T> above;
      T conic[3];
      load<T, 2>(from.g_means2d, item, above.mean);
      load<T, 1>(from.g_depths, item, &above.depth);
      load<T, 3>(from.g_conics, item, above.conic);
      load<T, 3>(from.g_covs2d, item, above.cov);
      load<T, 1>(from.g_compensations, item, &above.compensation);
      load<T, 3>(from.conics, item, conic);
      project_backward(options, splats.view(camera, options), mean, quat, scale, conic,
                       from.compensations[item], above, g_mean, g_axes, g_view);
    }
    Sums::sum(g_view);
    if (number >= 0) parts[threadIdx.x / WARP][number] = g_view[0];
    __syncthreads();
    if (threadIdx.x < VIEW) {
      T sum = T(0);
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) sum += parts[warp][threadIdx.x];
      total[threadIdx.x] = sum;
    }
  }
  if (!there) return;
  T g_quat[4] = {}, g_scale[3] = {};
  if (ever) axes_backward(quat, scale, g_axes, g_quat, g_scale);
  store<3>(g_mean, to.means, splat);
  store<4>(g_quat, to.quats, splat);
  store<3>(g_scale, to.scales, splat);
}

// g_viewmats of a camera, a block each, from its sums over blocks.
template <class T>
__global__ void __launch_bounds__(VIEW* ROWS)
    view_kernel(const T* __restrict__ parts, int64_t blocks, T* __restrict__ g_viewmats) {
  __shared__ double sums[ROWS][VIEW];
  const int number = threadIdx.x % VIEW, first = threadIdx.x / VIEW;
  const T* from = parts + int64_t(blockIdx.x) * blocks * VIEW;
  double sum = 0;
  for (int64_t row = first; row < blocks; row += ROWS) sum += from[row * VIEW + number];
  sums[first][number] = sum;
  __syncthreads();
  if (first) return;
  double total = 0;
  for (int row = 0; row < ROWS; ++row) total += sums[row][number];
  g_viewmats[int64_t(blockIdx.x) * 16 + number] = static_cast<T>(total);
}

// The arguments that forward and backward have in common.
struct Given {
  Tensor means, quats, scales, viewmats, Ks;
  int64_t splats, cameras;

  Given(const Tensor& means_, const Tensor& quats_, const Tensor& scales_, const Tensor& viewmats_, const Tensor& Ks_) {
    check_devices("splat_project", {means_, quats_, scales_, viewmats_, Ks_});
    STD_TORCH_CHECK(means_.dim() == 2 && viewmats_.dim() == 3, "splat_project: unexpected shapes");
    splats = means_.size(0), cameras = viewmats_.size(0);
    const ScalarType type = means_.scalar_type();
    means = dense("means", means_, type, {splats, 3}), quats = dense("quats", quats_, type, {splats, 4});
    scales = dense("scales", scales_, type, {splats, 3});
    viewmats = dense("viewmats", viewmats_, type, {cameras, 4, 4}), Ks = dense("Ks", Ks_, type, {cameras, 3, 3});
  }
  template <class T>
  Splats<T> of(const T* opacities, const T* beta) const {
    return {read<T>(means), read<T>(quats), read<T>(scales), opacities, beta,
            read<T>(viewmats), read<T>(Ks), splats, cameras};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> splat_project(
    const Tensor& means, const Tensor& quats, const Tensor& scales, const Tensor& opacities,
    const std::optional<Tensor>& beta, const Tensor& viewmats, const Tensor& Ks, int64_t width, int64_t height,
    int64_t kernel, int64_t camera, double eps2d, double near, double far, double radius_clip,
    double alpha_min, bool antialiased, bool inria) {
  const DeviceGuard guard(means.get_device_index());
  const Given given(means, quats, scales, viewmats, Ks);
  const int64_t C = given.cameras, N = given.splats;
  check_devices("splat_project", {means, opacities});
  STD_TORCH_CHECK(kernel != GENERALIZED || beta, "beta: needed by the generalized_exponential kernel");
  const Tensor alphas = dense("opacities", opacities, means.scalar_type(), {C, N});
  std::optional<Tensor> powers;
  if (beta) {
    check_devices("splat_project", {means, *beta});
    powers = dense("beta", *beta, means.scalar_type(), {N});
  }
  const Options options{width, height, static_cast<int>(kernel), static_cast<int>(camera), eps2d, near, far,
                        radius_clip, alpha_min, antialiased, inria};
  const auto empty = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(given.means, std::vector<int64_t>(sizes));
  };
  Tensor radii = torch::stable::new_empty(given.means, {C, N, 2}, ScalarType::Int), means2d = empty({C, N, 2}),
         depths = empty({C, N}), conics = empty({C, N, 3}), covs = empty({C, N, 3}), compensations = empty({C, N});
  if (C * N > 0)
    with_type(given.means, [&]<class T>() {
      const Screens<T> to{write<int>(radii),  write<T>(means2d), write<T>(depths),
                          write<T>(conics), write<T>(covs),    write<T>(compensations)};
      project_kernel<T><<<grid_of("splat_project", C * N, THREADS), THREADS, 0, stream(given.means)>>>(
          given.of<T>(read<T>(alphas), powers ? read<T>(*powers) : nullptr), options, to);
      check_launch("project_kernel");
    });
  return {radii, means2d, depths, conics, covs, compensations};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> splat_project_backward(
    const Tensor& means, const Tensor& quats, const Tensor& scales, const Tensor& viewmats, const Tensor& Ks,
    int64_t width, int64_t height, int64_t kernel, int64_t camera, double eps2d, bool antialiased, bool inria,
    const Tensor& radii, const Tensor& conics, const Tensor& compensations, const MaybeTensor& g_means2d,
    const MaybeTensor& g_depths, const MaybeTensor& g_conics, const MaybeTensor& g_covs2d,
    const MaybeTensor& g_compensations) {
  const DeviceGuard guard(means.get_device_index());
  const Given given(means, quats, scales, viewmats, Ks);
  const int64_t C = given.cameras, N = given.splats;
  check_devices("splat_project_backward", {means, radii, conics, compensations});
  const ScalarType type = means.scalar_type();
  const Tensor boxes = dense("radii", radii, ScalarType::Int, {C, N, 2}),
               shapes = dense("conics", conics, type, {C, N, 3}),
               factors = dense("compensations", compensations, type, {C, N});
  const auto above = [&](const char* name, const MaybeTensor& g, std::initializer_list<int64_t> sizes) {
    if (g) check_devices("splat_project_backward", {means, *g});
    return g ? MaybeTensor(dense(name, *g, type, sizes)) : MaybeTensor();
  };
  const MaybeTensor g_points = above("g_means2d", g_means2d, {C, N, 2}), g_z = above("g_depths", g_depths, {C, N}),
                    g_shapes = above("g_conics", g_conics, {C, N, 3}),
                    g_covs = above("g_covs2d", g_covs2d, {C, N, 3}),
                    g_factors = above("g_compensations", g_compensations, {C, N});
  const Options options{width, height, static_cast<int>(kernel), static_cast<int>(camera), eps2d, 0, 0, 0, 0,
                        antialiased, inria};
  Tensor g_means = torch::stable::empty_like(given.means), g_quats = torch::stable::empty_like(given.quats),
         g_scales = torch::stable::empty_like(given.scales),
         g_viewmats = torch::stable::new_zeros(given.viewmats, {C, int64_t(4), int64_t(4)});
  if (!N) return {g_means, g_quats, g_scales, g_viewmats};
  const unsigned blocks = grid_of("splat_project_backward", N, THREADS);
  Tensor views = torch::stable::new_empty(given.means, {C, int64_t(blocks), int64_t(VIEW)});
  with_type(given.means, [&]<class T>() {
    const auto data = [](const MaybeTensor& g) { return g ? read<T>(*g) : nullptr; };
    const Above<T> from{read<int>(boxes), read<T>(shapes), read<T>(factors), data(g_points),
                        data(g_z),        data(g_shapes),  data(g_covs),     data(g_factors)};
    const Gradients<T> to{write<T>(g_means), write<T>(g_quats), write<T>(g_scales), write<T>(views)};
    project_backward_kernel<T><<<blocks, THREADS, 0, stream(given.means)>>>(given.of<T>(nullptr, nullptr), options,
                                                                           from, to);
    check_launch("project_backward_kernel");
    if (!C) return;
    view_kernel<T><<<grid_of("splat_project_backward", C, 1), VIEW * ROWS, 0, stream(given.means)>>>(
        read<T>(views), blocks, write<T>(g_viewmats));
    check_launch("view_kernel");
  });
  return {g_means, g_quats, g_scales, g_viewmats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("splat_project", TORCH_BOX(&splat_project));
  m.impl("splat_project_backward", TORCH_BOX(&splat_project_backward));
}

}  // namespace torchzoo::splat
