// What the rasteriser's CUDA kernels share: splats as a block holds them, their weights at pixels, and
// which pixel a thread has.
//
// Forward and backward must agree to the bit on which splats a pixel blends, though compilers fuse
// products and sums where they see fit: so what decides is spelt out in fused operations, or is a
// function that is called and not inlined.
#pragma once

#include "splat_cuda.h"
#include "splat_kernels.h"

namespace torchzoo::splat {

constexpr int PART = 16;  // side of the square of pixels that a block has; a larger tile has several
constexpr int THREADS = PART * PART;
constexpr int WARPS = THREADS / WARP;
constexpr int MOST_CHANNELS = 32;  // at once

template <class T>
struct Scene {
  const T *means, *shapes, *opacities, *features, *beta, *backgrounds;  // beta, backgrounds: or null
  const int64_t* offsets;
  const int* ids;
  int64_t splats, entries, channels, first_channel;
  bool of_all;  // the features are those of all cameras
  T pixel, alpha_min, alpha_max;
};

struct Functions {
  static __device__ __forceinline__ float exp2(float x) {  // a weight below 2^-126 is 0
#ifdef __CUDA_ARCH__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return exp2f(x);
#endif
  }
  static __device__ __forceinline__ float log2(float x) { return log2f(x); }
  static __device__ __forceinline__ float expm1(float x) { return expm1f(x); }
  static __device__ __forceinline__ double exp2(double x) { return ::exp2(x); }
  static __device__ __forceinline__ double log2(double x) { return ::log2(x); }
  static __device__ __forceinline__ double expm1(double x) { return ::expm1(x); }
};

__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.f, x); }
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// A weight's slopes times a given factor: by the offset, by the three numbers of the shape, by beta.
template <class T>
struct Slopes {
  T x, y, shape[3], beta;
};

// A splat as the pixels of a tile see it, at offsets d = mean - pixel.
template <class T, Kernel kernel>
struct Footprint;

// The form of (a, b, c) at d, and half its gradient.
template <class T>
__device__ __forceinline__ T quadratic(T a, T b, T c, T dx, T dy, T& along_x, T& along_y) {
  along_x = fma(a, dx, b * dy);
  along_y = fma(b, dx, c * dy);
  return fma(dx, along_x, dy * along_y);
}

template <class T>
struct alignas(16) Footprint<T, GAUSSIAN> {
  T x, y, a, b, c, opacity, unused[2];  // (a, b, c): of -q/2 in units of ln 2

  __device__ void set(T xx, T xy, T yy, T, T, T) {
    a = xx * T(-LOG2_E / 2), b = xy * T(-LOG2_E / 2), c = yy * T(-LOG2_E / 2);
  }
  __device__ __forceinline__ T weight(T dx, T dy, T) const {
    T along_x, along_y;
    return gaussian<Functions>(quadratic(a, b, c, dx, dy, along_x, along_y));
  }
  __device__ __forceinline__ Slopes<T> slopes(T dx, T dy, T, T w, T factor) const {
    T along_x, along_y;
    quadratic(a, b, c, dx, dy, along_x, along_y);
    const T by_form = w * factor, scale = by_form * T(2 * LN_2), by_q = by_form * T(-0.5);
    return {scale * along_x, scale * along_y, {by_q * dx * dx, 2 * by_q * dx * dy, by_q * dy * dy}, T(0)};
  }
};

template <class T>
struct alignas(16) Footprint<T, GENERALIZED_EXPONENTIAL> {
  T x, y, a, b, c, opacity, half_beta, most;  // beyond `most` no pixel counts

  __device__ void set(T xx, T xy, T yy, T beta, T alpha_min, T) {
    a = xx, b = xy, c = yy, half_beta = beta / 2;
    most = pow(2 * (log(opacity / alpha_min) + T(SLACK)), 2 / beta) * T(1 + 10 * SLACK);
  }
  __device__ __forceinline__ T weight(T dx, T dy, T) const {
    T along_x, along_y;
    const T q = quadratic(a, b, c, dx, dy, along_x, along_y);
    return q > most ? T(0) : generalized_exponential<Functions>(q, half_beta).weight;
  }
  __device__ __forceinline__ Slopes<T> slopes(T dx, T dy, T, T w, T factor) const {
    T along_x, along_y;
    const T q = quadratic(a, b, c, dx, dy, along_x, along_y);
    const Exponential<T> of = generalized_exponential<Functions>(q, half_beta);
    const T by_q = T(-0.5) * w * factor * of.rate;
    return {2 * by_q * along_x, 2 * by_q * along_y, {by_q * dx * dx, 2 * by_q * dx * dy, by_q * dy * dy},
            T(-0.25) * w * factor * of.beta};
  }
};

template <class T>
__device__ __noinline__ Frame<T> axes_of(T xx, T xy, T yy) {
  return frame(xx, xy, yy);
}

template <class T>
__device__ __noinline__ T window(T u, T v, T s1, T s2, T inverse1, T inverse2, T half) {
  return integral<Functions>(u, s1, inverse1, half).value *
         integral<Functions>(v, s2, inverse2, half).value;
}

template <class T>
struct alignas(16) Footprint<T, ANALYTIC> {
  T x, y, cos, sin;
  T s1, s2, inverse1, inverse2;  // deviations
  T opacity, reach1, reach2;     // beyond a reach, along its axis, no pixel counts
  T by_variance1, by_variance2;  // slopes of the deviations
  T by_angle, unused[2];         // 1 / (difference of the variances)

  __device__ void set(T xx, T xy, T yy, T, T alpha_min, T pixel) {
    const Frame<T> axes = axes_of(xx, xy, yy);
    const T most = 2 * log(opacity * T(EXCESS) / alpha_min);
    cos = axes.cos, sin = axes.sin, s1 = axes.s1, s2 = axes.s2;
    inverse1 = 1 / s1, inverse2 = 1 / s2;
    reach1 = sqrt(most) * s1 + T(GROWN) * pixel, reach2 = sqrt(most) * s2 + T(GROWN) * pixel;
    by_variance1 = axes.free1 ? inverse1 / 2 : T(0), by_variance2 = axes.free2 ? inverse2 / 2 : T(0);
    by_angle = axes.gap > 0 ? 1 / axes.gap : T(0);
  }
  __device__ __forceinline__ void turn(T dx, T dy, T& u, T& v) const {
    u = fma(cos, dx, sin * dy);
    v = fma(cos, dy, -(sin * dx));
  }
  static __device__ __forceinline__ T per_area(T pixel) { return T(2 * PI) / (pixel * pixel); }

  __device__ __forceinline__ T weight(T dx, T dy, T pixel) const {
    T u, v;
    turn(dx, dy, u, v);
    if (abs(u) > reach1 || abs(v) > reach2) return T(0);
    return per_area(pixel) * window(u, v, s1, s2, inverse1, inverse2, pixel / 2);
  }
  __device__ __forceinline__ Slopes<T> slopes(T dx, T dy, T pixel, T, T factor) const {
    T u, v;
    turn(dx, dy, u, v);
    const Integral<T> first = integral<Functions>(u, s1, inverse1, pixel / 2);
    const Integral<T> second = integral<Functions>(v, s2, inverse2, pixel / 2);
    const T by_first = factor * per_area(pixel) * second.value;
    const T by_second = factor * per_area(pixel) * first.value;
    const T by_u = by_first * first.along, by_v = by_second * second.along;
    const T by_l1 = by_first * first.width * by_variance1, by_l2 = by_second * second.width * by_variance2;
    const T angle = (by_u * v - by_v * u) * by_angle;
    const T cc = cos * cos, cs = cos * sin, ss = sin * sin;
    return {by_u * cos - by_v * sin, by_u * sin + by_v * cos,
            {by_l1 * cc + by_l2 * ss - angle * cs, 2 * (by_l1 - by_l2) * cs + angle * (cc - ss),
             by_l1 * ss + by_l2 * cc + angle * cs},
            T(0)};
  }
};

// What a block holds of a list at once.
template <class T, Kernel kernel, int F>
struct Batch {
  static constexpr int SIZE = F <= 4 ? 256 : F == 8 ? 128 : 64;
  static constexpr int WIDTH = F == 3 ? 4 : F;

  Footprint<T, kernel> splats[SIZE];
  Pack<T, WIDTH> features[SIZE];
  int ids[SIZE];

  // Entries from `start` on; barriers have to come before and after. What is no splat is read as one
  // that is, so that a list from elsewhere does no harm.
  __device__ __forceinline__ void load(const Scene<T>& scene, int64_t camera, int64_t start, int count) {
    const auto id_at = [&](int i) {
      return static_cast<int>(min(max(int64_t(scene.ids[start + i]), int64_t(0)), scene.splats - 1));
    };
    for (int i = threadIdx.x; i < count; i += THREADS) {
      const int id = id_at(i);
      const int64_t item = camera * scene.splats + id;
      const Pack<T, 2> mean = reinterpret_cast<const Pack<T, 2>*>(scene.means)[item];
      const T* shape = scene.shapes + 3 * item;
      const T beta = kernel == GENERALIZED_EXPONENTIAL ? scene.beta[id] : T(0);
      Footprint<T, kernel>& splat = splats[i];
      splat.x = mean.value[0], splat.y = mean.value[1], splat.opacity = scene.opacities[item];
      splat.set(shape[0], shape[1], shape[2], beta, scene.alpha_min, scene.pixel);
      ids[i] = id;
    }
    const int64_t base = scene.of_all ? 0 : camera * scene.splats;
    for (int i = threadIdx.x; i < count * F; i += THREADS) {
      const int channel = i % F;
      const int64_t at = scene.first_channel + channel, item = base + id_at(i / F);
      features[i / F].value[channel] =
          at < scene.channels ? scene.features[item * scene.channels + at] : T(0);
    }
  }
};

// The pixel of a thread, and the list of its tile. A warp has 8 × 4 pixels, so that it can pass over
// what lies elsewhere in the tile.
struct Spot {
  int64_t camera, start, index;  // `index` counts pixels over all images
  int count, x, y;
  bool inside;

  template <class T>
  __device__ __forceinline__ Spot(const Scene<T>& scene, const Tiling& tiling) {
    const int parts = (tiling.side + PART - 1) / PART;
    const int part = blockIdx.x % (parts * parts), tile = blockIdx.x / (parts * parts);
    camera = tile / tiling.of_camera();
    const int place = tile % tiling.of_camera();
    start = min(max(scene.offsets[tile], int64_t(0)), scene.entries);
    count = static_cast<int>(min(max(scene.offsets[tile + 1], start), scene.entries) - start);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = part % parts * PART + warp % 2 * 8 + lane % 8;
    const int row = part / parts * PART + warp / 2 * 4 + lane / 8;
    x = place % tiling.across * tiling.side + column;
    y = place / tiling.across * tiling.side + row;
    inside = column < tiling.side && row < tiling.side && x < tiling.width && y < tiling.height;
    index = (camera * tiling.height + y) * tiling.width + x;
  }
};

inline unsigned blocks_of(const Tiling& tiling) {
  const int64_t parts = ceil_div(tiling.side, PART);
  return grid_of("splat_raster", tiling.count() * parts * parts, 1);
}

// The arguments that forward and backward have in common, checked; `tiling` is known by then.
struct Drawn {
  Tensor means, shapes, opacities, features;
  std::optional<Tensor> beta, backgrounds;
  Tensor offsets, ids;
  int64_t cameras, splats, channels;
  double pixel, alpha_min, alpha_max;

  template <class T>
  Scene<T> scene(int64_t first_channel) const {
    return {read<T>(means), read<T>(shapes), read<T>(opacities), read<T>(features),
            beta ? read<T>(*beta) : nullptr, backgrounds ? read<T>(*backgrounds) : nullptr,
            read<int64_t>(offsets), read<int>(ids), splats, splats ? ids.numel() : 0, channels, first_channel,
            features.size(0) != cameras || cameras == 1, static_cast<T>(pixel),
            std::max(static_cast<T>(alpha_min), std::numeric_limits<T>::denorm_min()),
            std::min(static_cast<T>(alpha_max), T(1) - std::numeric_limits<T>::epsilon() / 2)};
  }
};

inline Drawn drawn(const Tensor& means2d, const Tensor& shape2d, const Tensor& opacities,
                   const Tensor& features, const std::optional<Tensor>& beta,
                   const std::optional<Tensor>& backgrounds, const Tensor& tile_offsets, const Tensor& ids,
                   const Tiling& tiling, int64_t kernel, double pixel, double alpha_min, double alpha_max) {
  STD_TORCH_CHECK(features.dim() == 3 && means2d.dim() == 3, "splat_raster: unexpected shapes");
  check_devices("splat_raster", {means2d, shape2d, opacities, features, tile_offsets, ids});
  const int64_t C = tiling.cameras, N = means2d.size(1), F = features.size(2);
  const ScalarType type = means2d.scalar_type();
  STD_TORCH_CHECK(F <= INT32_MAX, "splat_raster: ", F, " channels");
  STD_TORCH_CHECK(C * N <= INT32_MAX, "splat_raster: ", C * N, " splats over all cameras");
  STD_TORCH_CHECK(kernel != GENERALIZED_EXPONENTIAL || beta, "beta: needed by the generalized_exponential kernel");
  Drawn all{dense("means2d", means2d, type, {C, N, 2}), dense("shape2d", shape2d, type, {C, N, 3}),
            dense("opacities", opacities, type, {C, N}),
            dense("features", features, type, {features.size(0) == 1 ? 1 : C, N, F}), {}, {},
            dense("tile_offsets", tile_offsets, ScalarType::Long, {tiling.count() + 1}),
            dense("ids", ids, ScalarType::Int, {ids.numel()}), C, N, F, pixel, alpha_min, alpha_max};
  if (beta) all.beta = dense("beta", *beta, type, {N});
  if (backgrounds) all.backgrounds = dense("backgrounds", *backgrounds, type, {C, F});
  for (const auto& given : {all.beta, all.backgrounds})
    if (given) check_devices("splat_raster", {means2d, *given});
  return all;
}

// Calls run with how many channels are taken at once. Double precision is for checks, and has fewer widths.
template <class T, class Run>
void with_channels(int64_t channels, const Run& run) {
  if constexpr (sizeof(T) == 4) {
    if (channels <= 1) return run.template operator()<1>();
    if (channels == 2) return run.template operator()<2>();
    if (channels == 3) return run.template operator()<3>();
    if (channels > 4 && channels <= 8) return run.template operator()<8>();
    if (channels > 8 && channels <= 16) return run.template operator()<16>();
  }
  if (channels <= 4) return run.template operator()<4>();
  run.template operator()<MOST_CHANNELS>();
}

template <class Run>
void with_kernel(int64_t kernel, const Run& run) {
  STD_TORCH_CHECK(kernel >= GAUSSIAN && kernel <= ANALYTIC, "kernel: unknown code ", kernel);
  if (kernel == GAUSSIAN) return run.template operator()<GAUSSIAN>();
  if (kernel == GENERALIZED_EXPONENTIAL) return run.template operator()<GENERALIZED_EXPONENTIAL>();
  run.template operator()<ANALYTIC>();
}

}  // namespace torchzoo::splat
