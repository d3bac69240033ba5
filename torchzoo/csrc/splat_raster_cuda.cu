// splat_raster on CUDA: the images, from each tile's list of splats.
//
// A block has a tile's 16 × 16 pixels, a thread a pixel. The block brings the list's splats to shared
// memory, up to 256 at a time, each with its features, and its threads go through them front to back
// until all their pixels are opaque. Up to 32 channels are summed at once; for more the list is gone
// through again. Traffic: some 50 bytes a splat of a list and each time it is gone through, and every
// pixel once. Limits: 2³¹ − 1 tiles over all cameras, and as many splats.
#include "splat_raster_cuda.h"

namespace torchzoo::splat {
namespace {

template <class T>
struct Images {
  T *image, *alpha, *final_t, *median_depth;
  int* last;
  const T* depths;
  const bool* mask;
};

template <class T, Kernel kernel, int F>
__global__ void __launch_bounds__(THREADS)
    raster_kernel(Scene<T> scene, Tiling tiling, T t_stop, bool strict, Images<T> to) {
  using Held = Batch<T, kernel, F>;
  __shared__ Held batch;
  const Spot spot(scene, tiling);
  const T centre_x = T(spot.x) + T(0.5), centre_y = T(spot.y) + T(0.5);
  bool done = !spot.inside || (to.mask && !to.mask[spot.index]);
  T rest = T(1), sum[F] = {};
  int last = 0, median = -1;
  for (int first = 0; first < spot.count; first += Held::SIZE) {
    if (__syncthreads_count(done) == THREADS) break;  // the last batch has been read, too
    const int count = min(Held::SIZE, spot.count - first);
    batch.load(scene, spot.camera, spot.start + first, count);
    __syncthreads();
    for (int i = 0; i < count && !done; ++i) {
      const Footprint<T, kernel>& splat = batch.splats[i];
      const T w = splat.weight(splat.x - centre_x, splat.y - centre_y, scene.pixel);
      const T seen = splat.opacity * w, alpha = min(seen, scene.alpha_max);
      if (!(seen >= scene.alpha_min)) continue;
      const T next = rest * (1 - alpha), share = rest * alpha;
      done = strict ? next < t_stop : next <= t_stop;
      if (done) break;
#pragma unroll
      for (int channel = 0; channel < F; ++channel) sum[channel] += share * batch.features[i].value[channel];
      if (rest >= T(0.5) && next < T(0.5)) median = batch.ids[i];
      rest = next;
      last = first + i + 1;
    }
  }
  if (!spot.inside) return;
  const int64_t at = scene.first_channel;
#pragma unroll
  for (int channel = 0; channel < F; ++channel)
    if (at + channel < scene.channels) {
      const T behind = scene.backgrounds ? scene.backgrounds[spot.camera * scene.channels + at + channel] : T(0);
      to.image[spot.index * scene.channels + at + channel] = sum[channel] + rest * behind;
    }
  if (at) return;
  to.alpha[spot.index] = 1 - rest;
  to.final_t[spot.index] = rest;
  to.last[spot.index] = last;
  to.median_depth[spot.index] = median < 0 ? T(0) : to.depths[spot.camera * scene.splats + median];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> splat_raster(
    const Tensor& means2d, const Tensor& shape2d, const Tensor& opacities, const Tensor& features,
    const std::optional<Tensor>& beta, const std::optional<Tensor>& backgrounds, const Tensor& depths,
    const std::optional<Tensor>& pixel_mask, const Tensor& tile_offsets, const Tensor& ids, int64_t width,
    int64_t height, int64_t tile_size, int64_t kernel, double pixel, double alpha_min, double alpha_max,
    double t_stop, bool inria) {
  const Tiling tiling(means2d.size(0), width, height, tile_size);
  const DeviceGuard guard(means2d.get_device_index());
  const Drawn all = drawn(means2d, shape2d, opacities, features, beta, backgrounds, tile_offsets, ids, tiling,
                          kernel, pixel, alpha_min, alpha_max);
  const int64_t C = all.cameras;
  check_devices("splat_raster", {means2d, depths});
  const Tensor z = dense("depths", depths, all.means.scalar_type(), {C, all.splats});
  std::optional<Tensor> mask;
  if (pixel_mask) {
    check_devices("splat_raster", {means2d, *pixel_mask});
    mask = dense("pixel_mask", *pixel_mask, ScalarType::Bool, {C, height, width});
  }
  Tensor image = torch::stable::new_empty(all.features, {C, height, width, all.channels}),
         alpha = torch::stable::new_empty(all.means, {C, height, width}),
         final_t = torch::stable::empty_like(alpha), median_depth = torch::stable::empty_like(alpha),
         last = torch::stable::new_empty(all.means, {C, height, width}, ScalarType::Int);
  if (!tiling.count()) return {image, alpha, final_t, last, median_depth};
  with_type(all.means, [&]<class T>() {
    const Images<T> to{write<T>(image), write<T>(alpha), write<T>(final_t), write<T>(median_depth),
                       write<int>(last), read<T>(z), mask ? read<bool>(*mask) : nullptr};
    with_kernel(kernel, [&]<Kernel k>() {
      int64_t first = 0;
      do {
        with_channels<T>(all.channels - first, [&]<int F>() {
          raster_kernel<T, k, F><<<blocks_of(tiling), THREADS, 0, stream(all.means)>>>(
              all.scene<T>(first), tiling, static_cast<T>(t_stop), inria, to);
        });
        check_launch("raster_kernel");
        first += MOST_CHANNELS;
      } while (first < all.channels);
    });
  });
  return {image, alpha, final_t, last, median_depth};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) { m.impl("splat_raster", TORCH_BOX(&splat_raster)); }

}  // namespace torchzoo::splat
