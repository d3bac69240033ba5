// s3im_groups on CUDA, a thread a window and channel. For the gradient each of them leaves its slope; the
// places of the image are sorted stably by the number of their pixel, so that a thread a pixel and channel
// can add up over its places in their order: no atomics, and the same bits every time. Traffic: 40 bytes a
// place for the sort, two passes over the windows, each window's slope for each of its places. Limits:
// 2^31 - 1 pixels and places; an index out of range makes its windows NaN.
#include "s3im_groups.h"
#include "splat_cuda.h"

#include <cub/device/device_radix_sort.cuh>

namespace torchzoo {
namespace {

using s3im::Layout;
using s3im::Moments;
using s3im::Slope;
using splat::bits_of;
using splat::dense;
using splat::grid_of;
using splat::with_type;

constexpr int THREADS = 128;

template <class T>
struct Problem {
  Layout layout;
  const T *src, *tar;
  const int64_t* indices;
};

struct Window {
  int64_t top, left, channel;
};

__device__ __forceinline__ Window window_of(const Layout& s, int64_t number) {
  const int64_t window = number / s.channels;
  return {window / s.columns * s.stride - s.margin, window % s.columns * s.stride - s.margin,
          number % s.channels};
}

// Calls run(weight, x, y) for the window's pixels, row by row, with zeros beyond the image.
template <class T, class Run>
__device__ __forceinline__ void for_pixels(const Problem<T>& p, const Window& at, const Run& run) {
  const Layout& s = p.layout;
  for (int i = 0; i < s.kernel; ++i) {
    const int64_t row = at.top + i;
#pragma unroll 4
    for (int j = 0; j < s.kernel; ++j) {
      const int64_t column = at.left + j;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      const int64_t pixel = inside ? p.indices[row * s.width + column] : 0;
      const bool found = pixel >= 0 && pixel < s.pixels, read = inside && found;
      const T none = found || !inside ? T(0) : T(NAN);
      run(T(s.weights[i]) * T(s.weights[j]), read ? p.src[pixel * s.channels + at.channel] : none,
          read ? p.tar[pixel * s.channels + at.channel] : none);
    }
  }
}

template <class T>
__device__ __forceinline__ Moments<T> moments(const Problem<T>& p, const Window& at) {
  Moments<T> sums{};
  for_pixels(p, at, [&](T weight, T x, T y) { sums.mx += weight * x, sums.my += weight * y; });
  for_pixels(p, at, [&](T weight, T x, T y) {
    const T dx = x - sums.mx, dy = y - sums.my;
    sums.spread += weight * (dx * dx + dy * dy), sums.covariance += weight * dx * dy;
  });
  return sums;
}

template <class T>
__global__ void __launch_bounds__(THREADS) forward_kernel(const Problem<T> p, T* __restrict__ out) {
  const Layout& s = p.layout;
  const int64_t number = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (number >= s.windows() * s.channels) return;
  out[number] = s3im::similarity(moments(p, window_of(s, number)), T(s.c1), T(s.c2));
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    slope_kernel(const Problem<T> p, const T* __restrict__ g, Slope<T>* __restrict__ slopes) {
  const Layout& s = p.layout;
  const int64_t number = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (number >= s.windows() * s.channels) return;
  slopes[number] = s3im::slope(moments(p, window_of(s, number)), T(s.c1), T(s.c2), g[number]);
}

// The image's places, and the pixel of each; s.pixels for an index out of range.
__global__ void __launch_bounds__(THREADS)
    place_kernel(const int64_t* __restrict__ indices, int64_t count, int64_t pixels,
                 unsigned* __restrict__ numbers, int* __restrict__ places) {
  const int64_t place = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (place >= count) return;
  const int64_t pixel = indices[place];
  numbers[place] = static_cast<unsigned>(pixel >= 0 && pixel < pixels ? pixel : pixels);
  places[place] = static_cast<int>(place);
}

// The first window along a side that reaches place `at`, which counts from the margin's edge.
__device__ __forceinline__ int64_t first_window(const Layout& s, int64_t at) {
  return at < s.kernel ? 0 : (at - s.kernel) / s.stride + 1;
}

// numbers, ascending, and places: what place_kernel wrote, sorted.
template <class T>
__global__ void __launch_bounds__(THREADS)
    add_kernel(const Problem<T> p, const unsigned* __restrict__ numbers, const int* __restrict__ places,
               const Slope<T>* __restrict__ slopes, T* __restrict__ out) {
  const Layout& s = p.layout;
  const int64_t number = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (number >= s.pixels * s.channels) return;
  const int64_t pixel = number / s.channels, channel = number % s.channels, count = s.height * s.width;
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (numbers[middle] < pixel) low = middle + 1;
    else high = middle;
  }
  const T x = p.src[number], y = p.tar[number];
  T sum = T(0);
  for (; low < count && numbers[low] == pixel; ++low) {
    const int64_t row = places[low] / s.width + s.margin, column = places[low] % s.width + s.margin;
    for (int64_t a = first_window(s, row); a < s.rows && a * s.stride <= row; ++a)
      for (int64_t b = first_window(s, column); b < s.columns && b * s.stride <= column; ++b) {
        const Slope<T> at = slopes[(a * s.columns + b) * s.channels + channel];
        const T weight = T(s.weights[row - a * s.stride]) * T(s.weights[column - b * s.stride]);
        sum += weight * (at.pull + at.across * (y - at.my) - at.along * (x - at.mx));
      }
  }
  out[number] = sum;
}

template <class T>
Problem<T> problem_of(const Layout& s, const Tensor& src, const Tensor& tar, const Tensor& indices) {
  return {s, src.const_data_ptr<T>(), tar.const_data_ptr<T>(), indices.const_data_ptr<int64_t>()};
}

Tensor s3im_groups(const Tensor& src_, const Tensor& tar_, const Tensor& indices_, int64_t kernel, int64_t stride,
                   int64_t margin, double sigma, double data_range) {
  const Layout s = s3im::layout_of(src_, tar_, indices_, kernel, stride, margin, sigma, data_range);
  check_devices("s3im_groups", {src_, tar_, indices_});
  const DeviceGuard guard(src_.get_device_index());
  const Tensor src = dense("src", src_, src_.scalar_type(), {s.pixels, s.channels}),
               tar = dense("tar", tar_, src_.scalar_type(), {s.pixels, s.channels}),
               indices = dense("indices", indices_, ScalarType::Long, {s.height, s.width});
  Tensor out = torch::stable::new_empty(src, {s.rows, s.columns, s.channels});
  if (!out.numel()) return out;
  with_type(src, [&]<class T>() {
    forward_kernel<<<grid_of("s3im_groups", out.numel(), THREADS), THREADS, 0, stream(src)>>>(
        problem_of<T>(s, src, tar, indices), out.mutable_data_ptr<T>());
  });
  check_launch("s3im_groups");
  return out;
}

// By src.
Tensor s3im_groups_backward(const Tensor& g_, const Tensor& src_, const Tensor& tar_, const Tensor& indices_,
                            int64_t kernel, int64_t stride, int64_t margin, double sigma, double data_range) {
  const Layout s = s3im::layout_of(src_, tar_, indices_, kernel, stride, margin, sigma, data_range);
  check_devices("s3im_groups", {src_, g_, tar_, indices_});
  const DeviceGuard guard(src_.get_device_index());
  const ScalarType type = src_.scalar_type();
  const Tensor g = dense("g", g_, type, {s.rows, s.columns, s.channels}),
               src = dense("src", src_, type, {s.pixels, s.channels}),
               tar = dense("tar", tar_, type, {s.pixels, s.channels}),
               indices = dense("indices", indices_, ScalarType::Long, {s.height, s.width});
  Tensor out = torch::stable::new_empty(src, {s.pixels, s.channels});
  if (!out.numel()) return out;
  const int64_t places = s.height * s.width;
  STD_TORCH_CHECK(s.pixels < INT32_MAX && places <= INT32_MAX, "s3im_groups: too many pixels or places");
  const cudaStream_t on = stream(src);
  Tensor numbers = torch::stable::new_empty(src, {2, places}, ScalarType::Int);
  Tensor order = torch::stable::new_empty(src, {2, places}, ScalarType::Int);
  unsigned* keys = reinterpret_cast<unsigned*>(numbers.mutable_data_ptr<int>());
  int* values = order.mutable_data_ptr<int>();
  place_kernel<<<grid_of("s3im_groups", places, THREADS), THREADS, 0, on>>>(indices.const_data_ptr<int64_t>(), places,
                                                                           s.pixels, keys, values);
  check_launch("s3im_groups: place_kernel");
  splat::with_workspace(src, [&](void* space, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(space, bytes, keys, keys + places, values, values + places, places, 0,
                                           bits_of(s.pixels), on);
  });
  with_type(src, [&]<class T>() {
    const Problem<T> p = problem_of<T>(s, src, tar, indices);
    constexpr int64_t fields = sizeof(Slope<T>) / sizeof(T);
    Tensor space = torch::stable::new_empty(src, {g.numel(), fields});
    Slope<T>* slopes = reinterpret_cast<Slope<T>*>(space.mutable_data_ptr<T>());
    slope_kernel<<<grid_of("s3im_groups", g.numel(), THREADS), THREADS, 0, on>>>(p, g.const_data_ptr<T>(), slopes);
    check_launch("s3im_groups: slope_kernel");
    add_kernel<<<grid_of("s3im_groups", out.numel(), THREADS), THREADS, 0, on>>>(p, keys + places, values + places,
                                                                                slopes, out.mutable_data_ptr<T>());
    check_launch("s3im_groups: add_kernel");
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("s3im_groups", TORCH_BOX(&s3im_groups));
  m.impl("s3im_groups_backward", TORCH_BOX(&s3im_groups_backward));
}

}  // namespace torchzoo
