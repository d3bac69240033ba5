// What the back ends of s3im_groups share: the windows of a virtual image, and for one window and channel
// the similarity of two sets of pixels, from their moments in T, float or double, with its slope.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TZ_WINDOW __host__ __device__ __forceinline__
#else
#define TZ_WINDOW inline __attribute__((always_inline))
#endif

namespace torchzoo::s3im {

constexpr int MOST = 32;  // the longest side of a window

struct Layout {
  int64_t pixels, channels, height, width;  // of the sets, and of the image
  int64_t rows, columns, stride, margin;    // rows and columns: of windows
  int kernel;
  double c1, c2, weights[MOST];  // weights: along a side, of sum 1

  TZ_WINDOW int64_t windows() const { return rows * columns; }
};

// src, tar (N, C), all of one type, indices (H, W) int64
inline Layout layout_of(const torch::stable::Tensor& src, const torch::stable::Tensor& tar,
                        const torch::stable::Tensor& indices, int64_t kernel, int64_t stride, int64_t margin,
                        double sigma, double data_range) {
  using torch::headeronly::ScalarType;
  const ScalarType type = src.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "s3im_groups: expected float32 or float64");
  STD_TORCH_CHECK(src.dim() == 2 && tar.dim() == 2 && tar.scalar_type() == type && tar.size(0) == src.size(0) &&
                      tar.size(1) == src.size(1),
                  "s3im_groups: expected src and tar of one shape (N, C) and type");
  STD_TORCH_CHECK(indices.dim() == 2 && indices.scalar_type() == ScalarType::Long,
                  "s3im_groups: expected indices (H, W) of int64");
  STD_TORCH_CHECK(kernel >= 1 && kernel <= MOST && stride >= 1 && stride <= INT32_MAX && margin >= 0 &&
                      margin < kernel,
                  "s3im_groups: kernel_size ", kernel, ", stride ", stride, " or margin ", margin,
                  " out of range");
  Layout s{src.size(0), src.size(1), indices.size(0), indices.size(1)};
  STD_TORCH_CHECK(s.height + 2 * margin >= kernel && s.width + 2 * margin >= kernel,
                  "s3im_groups: a window larger than the image");
  s.rows = (s.height + 2 * margin - kernel) / stride + 1, s.columns = (s.width + 2 * margin - kernel) / stride + 1;
  s.stride = stride, s.margin = margin, s.kernel = static_cast<int>(kernel);
  s.c1 = 1e-4 * data_range * data_range, s.c2 = 9e-4 * data_range * data_range;
  double total = 0;
  for (int k = 0; k < s.kernel; ++k) {
    const double offset = (k - s.kernel / 2) / sigma;
    total += s.weights[k] = std::exp(-0.5 * offset * offset);
  }
  for (int k = 0; k < s.kernel; ++k) s.weights[k] /= total;
  return s;
}

// With x of the first set, y of the second, and w the weights:
// mx = sum w x,   my = sum w y,   spread = sum w ((x - mx)^2 + (y - my)^2),   covariance = sum w (x - mx) (y - my)
template <class V>
struct Moments {
  V mx, my, spread, covariance;
};

// The slope by pixel k of the first set is w_k (pull + across (y_k - my) - along (x_k - mx)).
template <class V>
struct Slope {
  V mx, my, pull, across, along;
};

// V: T, or a vector of it.
template <class V, class T>
TZ_WINDOW V similarity(const Moments<V>& m, T c1, T c2) {
  const V luminance = (T(2) * m.mx * m.my + c1) / (m.mx * m.mx + m.my * m.my + c1);
  return luminance * (T(2) * m.covariance + c2) / (m.spread + c2);
}

template <class V, class T>
TZ_WINDOW Slope<V> slope(const Moments<V>& m, T c1, T c2, const V& g) {
  const V squares = m.mx * m.mx + m.my * m.my + c1;
  const V luminance = (T(2) * m.mx * m.my + c1) / squares;
  const V spread = m.spread + c2, contrast = (T(2) * m.covariance + c2) / spread;
  const V across = T(2) * g * luminance / spread;
  return {m.mx, m.my, T(2) * g * contrast * (m.my - luminance * m.mx) / squares, across, across * contrast};
}

}  // namespace torchzoo::s3im
