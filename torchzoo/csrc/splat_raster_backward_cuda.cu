// splat_raster_backward on CUDA: each tile's list again, back to front, with the transmittance restored.
//
// A thread has a pixel, for which S = T_end (<background, g> - g_A), A the image's alpha, + Σ <f, g> alpha T over the splats
// behind makes a splat's slope by its alpha T <f, g> - S / (1 - alpha). A splat's gradients are summed
// over a warp's pixels all at once, by about one exchange a number, after which each number is in a
// lane of its own and the lanes add theirs to memory in one instruction. A warp whose pixels don't see
// a splat passes over it. `deterministic` writes the sums of a block to a row for each entry of the
// lists instead; rows are then added splat by splat, in the order of the lists. Traffic: some 50 bytes
// an entry, the images once, and some 40 bytes of atomics for each warp that sees a splat. Channels
// beyond 32 have the lists gone through again. Limits: 2³¹ − 1 tiles over all cameras, and splats.
#include "splat_raster_cuda.h"

#include <cub/device/device_radix_sort.cuh>

namespace torchzoo::splat {
namespace {

template <class T>
struct Gradients {
  T *means, *shapes, *opacities, *features, *beta, *absolute;  // beta, absolute: or null
  T* rows;                                                     // or null
};

template <class T>
struct Images {
  const T *final_t, *g_image, *g_alpha;  // g_alpha: or null
  const int* last;
};

// The numbers that a splat gets from a pixel, in this order.
enum Number : int { MEAN = 0, SHAPE = 2, OPACITY = 5, ABSOLUTE = 6, BETA = 8 };

template <Kernel kernel, int F>
struct Numbers {
  static constexpr int FEATURES = kernel == GENERALIZED_EXPONENTIAL ? BETA + 1 : BETA;
  static constexpr int COUNT = FEATURES + F;
};

// Where a number of splat 0 of a camera goes, and how far apart splats are there.
template <class T>
struct Target {
  T* at;
  int each;
  bool of_camera;
};

template <class T, Kernel kernel, int F>
__device__ __forceinline__ Target<T> target(const Scene<T>& scene, const Gradients<T>& to, int number) {
  using N = Numbers<kernel, F>;
  if (number < 0) return {nullptr, 0, false};
  if (number < SHAPE) return {to.means + number, 2, true};
  if (number < OPACITY) return {to.shapes + number - SHAPE, 3, true};
  if (number == OPACITY) return {to.opacities, 1, true};
  if (number < BETA) return {to.absolute ? to.absolute + number - ABSOLUTE : nullptr, 2, true};
  if (number < N::FEATURES) return {to.beta, 1, false};
  const int64_t channel = scene.first_channel + number - N::FEATURES;
  return {channel < scene.channels ? to.features + channel : nullptr, static_cast<int>(scene.channels), !scene.of_all};
}

// What of the channels a launch takes for the slopes by alpha: its own, all, or none. Sizes of slopes
// don't add up over launches: where they are asked for, the first takes all.
enum class Share { OWN, ALL, NONE };

// Three blocks of the common ones fit a multiprocessor's registers.
template <class T, Kernel kernel, int F>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 1 : kernel != ANALYTIC && F <= 4 ? 3 : 2)
    raster_backward_kernel(Scene<T> scene, Tiling tiling, Images<T> from, Gradients<T> to, Share share) {
  using Held = Batch<T, kernel, F>;
  using N = Numbers<kernel, F>;
  using Sums = WarpSums<N::COUNT>;
  constexpr int SUMMED = sizeof(T) == 4 ? 16 : 8;  // entries whose rows a block sums at a time
  __shared__ Held batch;
  __shared__ T parts[WARPS][SUMMED][N::COUNT];
  const Spot spot(scene, tiling);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const T centre_x = T(spot.x) + T(0.5), centre_y = T(spot.y) + T(0.5);

  const int last = spot.inside ? min(max(from.last[spot.index], 0), spot.count) : 0;
  int warp_last = last;
#pragma unroll
  for (int lanes = WARP / 2; lanes; lanes /= 2)
    warp_last = max(warp_last, __shfl_xor_sync(ALL_LANES, warp_last, lanes));
  __shared__ int lasts[WARPS];
  if (lane == 0) lasts[warp] = warp_last;
  __syncthreads();
  int block_last = 0;
#pragma unroll
  for (int other = 0; other < WARPS; ++other) block_last = max(block_last, lasts[other]);

  T g[F] = {}, rest = T(0), behind = T(0);
  const T* g_pixel = from.g_image + spot.index * scene.channels;
  if (last) {
    rest = from.final_t[spot.index];
    const bool without = share == Share::NONE || (share == Share::OWN && scene.first_channel) || !from.g_alpha;
    T by_rest = without ? T(0) : -from.g_alpha[spot.index];
#pragma unroll
    for (int channel = 0; channel < F; ++channel)
      if (scene.first_channel + channel < scene.channels) g[channel] = g_pixel[scene.first_channel + channel];
    if (scene.backgrounds && share != Share::NONE) {
      const T* background = scene.backgrounds + spot.camera * scene.channels;
      const int64_t end = share == Share::ALL ? scene.channels : min(scene.channels, scene.first_channel + F);
      for (int64_t channel = scene.first_channel; channel < end; ++channel)
        by_rest += g_pixel[channel] * background[channel];
    }
    behind = rest * by_rest;
  }

  Target<T> targets[Sums::LEFT];
  int numbers[Sums::LEFT];
#pragma unroll
  for (int k = 0; k < Sums::LEFT; ++k) {
    numbers[k] = Sums::place(k);
    targets[k] = target<T, kernel, F>(scene, to, numbers[k]);
    if (targets[k].at && targets[k].of_camera) targets[k].at += spot.camera * scene.splats * targets[k].each;
  }

  const int step = to.rows ? SUMMED : Held::SIZE;
  for (int end = block_last; end > 0; end -= step) {
    const int begin = max(end - step, 0);
    __syncthreads();  // the last batch has been read
    batch.load(scene, spot.camera, spot.start + begin, end - begin);
    if (to.rows)
      for (int i = lane; i < SUMMED * N::COUNT; i += WARP) parts[warp][i / N::COUNT][i % N::COUNT] = T(0);
    __syncthreads();
    for (int i = min(end, warp_last) - 1; i >= begin; --i) {
      const Footprint<T, kernel>& splat = batch.splats[i - begin];
      const T dx = splat.x - centre_x, dy = splat.y - centre_y;
      T w = T(0), alpha = T(0);
      bool seen = i < last;
      if (seen) {
        w = splat.weight(dx, dy, scene.pixel);
        alpha = splat.opacity * w;
        seen = alpha >= scene.alpha_min;
      }
      if (!__any_sync(ALL_LANES, seen)) continue;

      T value[N::COUNT] = {};
      if (seen) {
        const bool held = alpha > scene.alpha_max;
        alpha = held ? scene.alpha_max : alpha;
        const T inverse = reciprocal(1 - alpha);
        rest *= inverse;
        const T part = alpha * rest;
        T along = T(0);
#pragma unroll
        for (int channel = 0; channel < F; ++channel) {
          along += g[channel] * batch.features[i - begin].value[channel];
          value[N::FEATURES + channel] = part * g[channel];
        }
        if (share == Share::ALL) {
          const T* feature = scene.features + ((scene.of_all ? 0 : spot.camera * scene.splats) +
                                               batch.ids[i - begin]) * scene.channels;
          for (int64_t channel = F; channel < scene.channels; ++channel)
            along += g_pixel[channel] * feature[channel];
        }
        if (share == Share::NONE) along = T(0);
        const T by_alpha = rest * along - behind * inverse;
        behind += along * part;
        if (!held) {
          const Slopes<T> by = splat.slopes(dx, dy, scene.pixel, w, splat.opacity * by_alpha);
          value[MEAN] = by.x, value[MEAN + 1] = by.y;
          value[SHAPE] = by.shape[0], value[SHAPE + 1] = by.shape[1], value[SHAPE + 2] = by.shape[2];
          value[OPACITY] = w * by_alpha;
          value[ABSOLUTE] = abs(by.x), value[ABSOLUTE + 1] = abs(by.y);
          if constexpr (kernel == GENERALIZED_EXPONENTIAL) value[BETA] = by.beta;
        }
      }
      Sums::sum(value);
#pragma unroll
      for (int k = 0; k < Sums::LEFT; ++k) {
        if (to.rows) {
          if (numbers[k] >= 0) parts[warp][i - begin][numbers[k]] = value[k];
        } else if (targets[k].at) {
          atomicAdd(targets[k].at + int64_t(batch.ids[i - begin]) * targets[k].each, value[k]);
        }
      }
    }
    if (!to.rows) continue;
    __syncthreads();
    const int64_t tile_parts = ceil_div(tiling.side, PART) * ceil_div(tiling.side, PART);
    for (int i = threadIdx.x; i < (end - begin) * N::COUNT; i += THREADS) {
      const int entry = i / N::COUNT, number = i % N::COUNT;
      T sum = T(0);
#pragma unroll
      for (int other = 0; other < WARPS; ++other) sum += parts[other][entry][number];
      const int64_t row = (spot.start + begin + entry) * tile_parts + blockIdx.x % tile_parts;
      to.rows[row * N::COUNT + number] = sum;
    }
  }
}

// The key of each entry, by which those of a splat come together and in it those of a camera.
__global__ void __launch_bounds__(THREADS)
    key_kernel(const int64_t* __restrict__ offsets, const int* __restrict__ ids, int64_t entries, Tiling tiling,
               int64_t splats, unsigned* __restrict__ keys, int64_t* __restrict__ numbers) {
  const int64_t entry = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (entry >= entries) return;
  int64_t low = 0, high = tiling.count();  // the first tile that ends after the entry
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle + 1] <= entry) low = middle + 1;
    else high = middle;
  }
  const int64_t camera = min(low / tiling.of_camera(), tiling.cameras - 1);
  const int64_t id = min(max(int64_t(ids[entry]), int64_t(0)), splats - 1);
  keys[entry] = static_cast<unsigned>(id * tiling.cameras + camera);
  numbers[entry] = entry;
}

// Adds rows up, a warp a splat and a lane a number of it.
template <class T, Kernel kernel, int F>
__global__ void __launch_bounds__(THREADS)
    add_rows_kernel(Scene<T> scene, Tiling tiling, const unsigned* __restrict__ keys,
                    const int64_t* __restrict__ numbers, int64_t entries, Gradients<T> to) {
  constexpr int COUNT = Numbers<kernel, F>::COUNT;
  const int64_t splat = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP, cameras = tiling.cameras;
  if (splat >= scene.splats) return;
  const int64_t parts = ceil_div(tiling.side, PART) * ceil_div(tiling.side, PART);
  int64_t first = 0;
  for (int64_t high = entries; first < high;) {
    const int64_t middle = (first + high) / 2;
    if (keys[middle] < splat * cameras) first = middle + 1;
    else high = middle;
  }
  for (int number = threadIdx.x % WARP; number < COUNT; number += WARP) {
    const Target<T> place = target<T, kernel, F>(scene, to, number);
    if (!place.at) continue;
    T* const at = place.at + splat * place.each;
    T sum = T(0);
    int64_t camera = -1;
    for (int64_t entry = first; entry < entries && keys[entry] < (splat + 1) * cameras; ++entry) {
      const int64_t now = keys[entry] - splat * cameras;
      if (place.of_camera && now != camera) {
        if (camera >= 0) at[camera * scene.splats * place.each] += sum;
        sum = T(0);
      }
      camera = now;
      for (int64_t part = 0; part < parts; ++part) sum += to.rows[(numbers[entry] * parts + part) * COUNT + number];
    }
    if (camera >= 0) at[place.of_camera ? camera * scene.splats * place.each : 0] += sum;
  }
}

// The entries of the lists, splat by splat.
struct Order {
  Tensor keys, numbers;

  Order(const Drawn& all, const Tiling& tiling) {
    const cudaStream_t on = stream(all.means);
    const int64_t entries = all.ids.numel();
    const Tensor first_keys = torch::stable::new_empty(all.ids, {entries}), first_numbers = whole(all, entries);
    keys = torch::stable::new_empty(all.ids, {entries}), numbers = whole(all, entries);
    Tensor from_keys = first_keys, from_numbers = first_numbers;
    key_kernel<<<grid_of("splat_raster_backward", entries, THREADS), THREADS, 0, on>>>(
        read<int64_t>(all.offsets), read<int>(all.ids), entries, tiling, all.splats, write<unsigned>(from_keys),
        write<int64_t>(from_numbers));
    check_launch("key_kernel");
    const int bits = bits_of(all.splats * all.cameras);
    with_workspace(all.means, [&](void* space, size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(space, bytes, read<unsigned>(first_keys), write<unsigned>(keys),
                                             read<int64_t>(first_numbers), write<int64_t>(numbers), entries, 0,
                                             bits, on);
    });
  }
  static Tensor whole(const Drawn& all, int64_t count) {
    return torch::stable::new_empty(all.ids, {count}, ScalarType::Long);
  }
};

template <class T, Kernel kernel, int F>
void launch(const Drawn& all, const Tiling& tiling, const Images<T>& from, Gradients<T> to,
            const Order* order, int64_t first_channel, Share share) {
  constexpr int COUNT = Numbers<kernel, F>::COUNT;
  const Scene<T> scene = all.scene<T>(first_channel);
  const cudaStream_t on = stream(all.means);
  std::optional<Tensor> rows;
  if (order) {
    const int64_t parts = ceil_div(tiling.side, PART) * ceil_div(tiling.side, PART);
    rows = torch::stable::new_zeros(all.means, {scene.entries * parts * COUNT});
    to.rows = write<T>(*rows);
  }
  raster_backward_kernel<T, kernel, F><<<blocks_of(tiling), THREADS, 0, on>>>(scene, tiling, from, to, share);
  check_launch("raster_backward_kernel");
  if (!order) return;
  add_rows_kernel<T, kernel, F><<<grid_of("splat_raster_backward", all.splats, WARPS), THREADS, 0, on>>>(
      scene, tiling, read<unsigned>(order->keys), read<int64_t>(order->numbers), scene.entries, to);
  check_launch("add_rows_kernel");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> splat_raster_backward(
    const Tensor& means2d, const Tensor& shape2d, const Tensor& opacities, const Tensor& features,
    const std::optional<Tensor>& beta, const std::optional<Tensor>& backgrounds, const Tensor& tile_offsets,
    const Tensor& ids, int64_t width, int64_t height, int64_t tile_size, int64_t kernel, double pixel,
    double alpha_min, double alpha_max, const Tensor& final_t, const Tensor& last, const Tensor& g_image,
    const std::optional<Tensor>& g_alpha, bool absgrad, bool deterministic) {
  const Tiling tiling(means2d.size(0), width, height, tile_size);
  check_devices("splat_raster_backward", {means2d, final_t, last, g_image});
  if (g_alpha) check_devices("splat_raster_backward", {means2d, *g_alpha});
  const DeviceGuard guard(means2d.get_device_index());
  const Drawn all = drawn(means2d, shape2d, opacities, features, beta, backgrounds, tile_offsets, ids, tiling,
                          kernel, pixel, alpha_min, alpha_max);
  const int64_t C = all.cameras, N = all.splats;
  const ScalarType type = all.means.scalar_type();
  const Tensor rests = dense("final_t", final_t, type, {C, height, width}),
               lasts = dense("last", last, ScalarType::Int, {C, height, width}),
               g_images = dense("g_image", g_image, type, {C, height, width, all.channels});
  std::optional<Tensor> g_alphas;
  if (g_alpha) g_alphas = dense("g_alpha", *g_alpha, type, {C, height, width});
  const auto zeros = [&](const Tensor& like, std::initializer_list<int64_t> sizes) {
    return torch::stable::new_zeros(like, std::vector<int64_t>(sizes));
  };
  Tensor g_means = zeros(all.means, {C, N, 2}), g_shapes = zeros(all.means, {C, N, 3}),
         g_opacities = zeros(all.means, {C, N}), g_features = zeros(all.means, {all.features.size(0), N, all.channels}),
         g_beta = zeros(all.means, {beta ? N : 0}),
         g_absolute = absgrad ? zeros(all.means, {C, N, 2}) : zeros(all.means, {0});
  if (tiling.count() && N && all.ids.numel()) {
    std::optional<Order> order;
    if (deterministic) order.emplace(all, tiling);
    with_type(all.means, [&]<class T>() {
      const Images<T> from{read<T>(rests), read<T>(g_images), g_alphas ? read<T>(*g_alphas) : nullptr,
                           read<int>(lasts)};
      Gradients<T> to{write<T>(g_means), write<T>(g_shapes), write<T>(g_opacities), write<T>(g_features),
                      write<T>(g_beta), nullptr, nullptr};
      if (absgrad) to.absolute = write<T>(g_absolute);
      with_kernel(kernel, [&]<Kernel k>() {
        int64_t first = 0;
        do {
          const bool whole = absgrad && all.channels > MOST_CHANNELS;
          const Share share = !whole ? Share::OWN : first ? Share::NONE : Share::ALL;
          with_channels<T>(all.channels - first, [&]<int F>() {
            launch<T, k, F>(all, tiling, from, to, order ? &*order : nullptr, first, share);
          });
          first += MOST_CHANNELS;
        } while (first < all.channels);
      });
    });
  }
  return {g_means, g_shapes, g_opacities, g_features, g_beta, g_absolute};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("splat_raster_backward", TORCH_BOX(&splat_raster_backward));
}

}  // namespace torchzoo::splat
