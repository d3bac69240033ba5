// The mathematics of splats, shared by the CPU and the CUDA kernels: projection and its gradients,
// how far a splat can be seen, its weight at a pixel, and spherical harmonics.
//
// Everything is for one splat and works in T, float or double. Matrices are row-major. A symmetric
// matrix of gradients G goes with numbers (xx, xy, yy) as (G00, 2 G01, G11), as autograd has it.
#pragma once

#include <cmath>
#include <cstdint>

#ifndef TZ_HOST_DEVICE
#ifdef __CUDACC__
#define TZ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TZ_HOST_DEVICE inline __attribute__((always_inline))
#endif
#endif

namespace torchzoo::projection {

enum Kernel : int { GAUSSIAN = 0, GENERALIZED = 1, ANALYTIC = 2 };
enum Camera : int { PINHOLE = 0, ORTHOGRAPHIC = 1, FISHEYE = 2 };

// Names and values as in _splat_kernels.py and _splat_project.py.
constexpr double SMALLEST_Q = 1e-8, SMALLEST_VARIANCE = 1e-6, ROUND = 1e-6, GROWN = 0.71;
constexpr double EXCESS = 1.017, ROUNDING = 1e-6, SMALLEST_COMPENSATION = 0.005;
constexpr double LARGEST_RADIUS = 1073741824.0, SERIES_BELOW = 0.1;
constexpr int SERIES_TERMS = 16;

template <class T>
TZ_HOST_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
TZ_HOST_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

// ---- Ellipses ------------------------------------------------------------------------------------

// Axes of a covariance: variances, the first axis' direction, and what the gradients need: the
// difference of the variances, 0 for a circle, and whether each is above its floor.
template <class T>
struct Frame {
  T longer, shorter, cos, sin, gap;
  bool longer_free, shorter_free;
};

template <class T>
TZ_HOST_DEVICE Frame<T> eigenframe(T xx, T xy, T yy) {
  const T floor = T(SMALLEST_VARIANCE), middle = (xx + yy) / 2, half = (xx - yy) / 2;
  const T radius = std::sqrt(half * half + xy * xy);
  Frame<T> frame;
  T l1 = xx, l2 = yy;
  frame.cos = 1;
  frame.sin = 0;
  frame.gap = 0;
  if (!(2 * radius < T(ROUND) * (middle + radius))) {
    // Half the angle of (half, xy) / radius; the larger component by its root.
    const T cos2 = half / radius, sin2 = xy / radius;
    const T large = std::sqrt((1 + std::fabs(cos2)) / 2), small = sin2 / (2 * large);
    frame.cos = cos2 >= 0 ? large : (sin2 < 0 ? -small : small);
    frame.sin = cos2 >= 0 ? small : (sin2 < 0 ? -large : large);
    frame.gap = 2 * radius;
    l1 = middle + radius;
    l2 = middle - radius;
  }
  frame.longer_free = l1 >= floor;
  frame.shorter_free = l2 >= floor;
  frame.longer = larger(l1, floor);
  frame.shorter = larger(l2, floor);
  return frame;
}

// From the gradients of the variances and of the angle, which may be sums over pixels, to those of
// (xx, xy, yy), which are added to.
template <class T>
TZ_HOST_DEVICE void eigenframe_backward(const Frame<T>& frame, T g_longer, T g_shorter, T g_angle,
                                        T* g_cov) {
  const T c = frame.cos, s = frame.sin;
  const T first = frame.longer_free ? g_longer : T(0), second = frame.shorter_free ? g_shorter : T(0);
  const T turn = frame.gap > 0 ? g_angle / frame.gap : T(0);
  g_cov[0] += first * c * c + second * s * s - turn * c * s;
  g_cov[1] += 2 * (first - second) * c * s + turn * (c * c - s * s);
  g_cov[2] += first * s * s + second * c * c + turn * c * s;
}

// The inverse covariance (a, b, c).
template <class T>
TZ_HOST_DEVICE void conic_of_frame(const Frame<T>& frame, T* conic) {
  const T c = frame.cos, s = frame.sin, p = 1 / frame.longer, r = 1 / frame.shorter;
  conic[0] = c * c * p + s * s * r;
  conic[1] = c * s * (p - r);
  conic[2] = s * s * p + c * c * r;
}

// ---- Weights: d = mean2d - pixel centre ----------------------------------------------------------

template <class T>
TZ_HOST_DEVICE T quadratic(const T* conic, T dx, T dy) {
  return conic[0] * dx * dx + 2 * conic[1] * dx * dy + conic[2] * dy * dy;
}

// w of the first two kernels, by q.
template <class T>
TZ_HOST_DEVICE T weight(int kernel, T q, T beta) {
  if (kernel == GENERALIZED) return std::exp(-std::pow(larger(q, T(SMALLEST_Q)), beta / 2) / 2);
  return std::exp(-larger(q, T(0)) / 2);
}

// g_q, and g_beta, from g_w. Below its floor q is constant.
template <class T>
TZ_HOST_DEVICE void weight_backward(int kernel, T q, T beta, T w, T g_w, T* g_q, T* g_beta) {
  if (kernel == GENERALIZED) {
    const T held = larger(q, T(SMALLEST_Q)), power = std::pow(held, beta / 2);
    *g_q = q >= T(SMALLEST_Q) ? -w * g_w * (beta / 4) * power / held : T(0);
    *g_beta = -w * g_w * power * std::log(held) / 4;
  } else {
    *g_q = q >= 0 ? -w * g_w / 2 : T(0);
    *g_beta = 0;
  }
}

// S(x) = 1 / (1 + exp(-(1.6 x + 0.07 x^3))) and its slope.
template <class T>
TZ_HOST_DEVICE void logistic(T x, T* value, T* slope) {
  const T z = x * (T(1.6) + T(0.07) * x * x);
  const T e = std::exp(-smaller(std::fabs(z), T(30))), part = 1 / (1 + e);
  *value = z >= 0 ? part : e * part;
  *slope = std::fabs(z) <= 30 ? (T(1.6) + T(0.21) * x * x) * e * part * part : T(0);
}

// I(u) = s (S((u + window/2) / s) - S((u - window/2) / s)) with its slopes by u and by s^2.
template <class T>
TZ_HOST_DEVICE T window_integral(T u, T variance, T window, T* by_u, T* by_variance) {
  const T s = std::sqrt(variance), p = (u + window / 2) / s, r = (u - window / 2) / s;
  T at_p, at_r, slope_p, slope_r;
  logistic(p, &at_p, &slope_p);
  logistic(r, &at_r, &slope_r);
  *by_u = slope_p - slope_r;
  *by_variance = ((at_p - at_r) - (p * slope_p - r * slope_r)) / (2 * s);
  return s * (at_p - at_r);
}

// w = 2 pi I_u I_v / pixel^2, the mean over the pixel's window: `pixel` is its side in the units of
// d. (u, v) is -d along the axes: the integrals are even, so that d itself may stand for it.
template <class T>
TZ_HOST_DEVICE T analytic_weight(const Frame<T>& frame, T dx, T dy, T pixel) {
  T unused[2];
  const T u = frame.cos * dx + frame.sin * dy, v = frame.cos * dy - frame.sin * dx;
  return T(6.283185307179586) / (pixel * pixel) *
         window_integral(u, frame.longer, pixel, unused, unused + 1) *
         window_integral(v, frame.shorter, pixel, unused, unused + 1);
}

// Adds to the gradients of d (which are those of mean2d), of the variances and of the angle.
template <class T>
TZ_HOST_DEVICE void analytic_weight_backward(const Frame<T>& frame, T dx, T dy, T pixel, T g_w,
                                             T* g_d, T* g_longer, T* g_shorter, T* g_angle) {
  const T u = frame.cos * dx + frame.sin * dy, v = frame.cos * dy - frame.sin * dx;
  T by_u, by_longer, by_v, by_shorter;
  const T along = window_integral(u, frame.longer, pixel, &by_u, &by_longer);
  const T across = window_integral(v, frame.shorter, pixel, &by_v, &by_shorter);
  const T scale = g_w * T(6.283185307179586) / (pixel * pixel);
  const T g_u = scale * across * by_u, g_v = scale * along * by_v;
  g_d[0] += g_u * frame.cos - g_v * frame.sin;
  g_d[1] += g_u * frame.sin + g_v * frame.cos;
  *g_longer += scale * across * by_longer;
  *g_shorter += scale * along * by_shorter;
  *g_angle += g_u * v - g_v * u;
}

// ---- Where a splat can be seen -------------------------------------------------------------------

// The largest q at which alpha reaches alpha_min, infinity where that is 0; below 0 or NaN: nowhere.
template <class T>
TZ_HOST_DEVICE T support(int kernel, T opacity, T beta, double alpha_min) {
  if (!(opacity >= 0) || (kernel == GENERALIZED && !(beta > 0))) return -1;
  if (alpha_min == 0) return T(INFINITY);
  const T reach = 2 * std::log(opacity * T((kernel == ANALYTIC ? EXCESS : 1.0) / alpha_min));
  if (!(reach >= 0)) return -1;
  return kernel == GENERALIZED ? std::pow(reach, 2 / beta) : reach;
}

// The least q in the rectangle [x0, x1] x [y0, y1], seen from the mean; slightly less, for rounding.
template <class T>
TZ_HOST_DEVICE T least_q(const T* conic, T x0, T y0, T x1, T y1) {
  if (x0 <= 0 && y0 <= 0 && x1 >= 0 && y1 >= 0) return 0;
  const T a = conic[0], b = conic[1], c = conic[2], less = T(1 - ROUNDING);
  T least = T(INFINITY);
  for (int side = 0; side < 2; ++side) {
    const T x = side ? x1 : x0, y = larger(y0, smaller(y1, -b * x / c));
    least = smaller(less * (a * x * x + c * y * y) + 2 * b * x * y, least);
    const T level = side ? y1 : y0, best = larger(x0, smaller(x1, -b * level / a));
    least = smaller(less * (a * best * best + c * level * level) + 2 * b * best * level, least);
  }
  return least;
}

// Whether a splat can be seen at some centre of the pixels [column, column_end) x [row, row_end).
// The conic is that of conic_of_frame for the analytic kernel; `reach` is what support() gives.
template <class T>
TZ_HOST_DEVICE bool meets(int kernel, const T* mean, const T* conic, T reach, T pixel, int64_t column,
                          int64_t row, int64_t column_end, int64_t row_end) {
  const T grown = kernel == ANALYTIC ? T(GROWN) * pixel : T(0);
  return !(least_q(conic, T(column) + T(0.5) - mean[0] - grown, T(row) + T(0.5) - mean[1] - grown,
                   T(column_end) - T(0.5) - mean[0] + grown,
                   T(row_end) - T(0.5) - mean[1] + grown) > reach);
}

// The tiles first <= tile < end along one axis that the box mean +- radius meets.
template <class T>
TZ_HOST_DEVICE void tile_range(T mean, int32_t radius, int64_t tile_size, int64_t tiles,
                               int64_t* first, int64_t* end) {
  const T low = std::floor((mean - T(radius)) / T(tile_size));
  const T high = std::ceil((mean + T(radius)) / T(tile_size));
  *first = low > 0 ? (low < T(tiles) ? int64_t(low) : tiles) : 0;
  *end = high < T(tiles) ? (high > 0 ? int64_t(high) : 0) : tiles;
  if (*end < *first) *end = *first;
}

// ---- Projection ----------------------------------------------------------------------------------

template <class T>
struct View {
  T R[9], t[3], fx, fy, cx, cy;
  T low[2], high[2];  // x / z and y / z are held between these in the derivative
};

template <class T>
TZ_HOST_DEVICE View<T> make_view(const T* viewmat, const T* K, int64_t width, int64_t height,
                                 bool inria) {
  View<T> view;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) view.R[3 * i + j] = viewmat[4 * i + j];
    view.t[i] = viewmat[4 * i + 3];
  }
  view.fx = K[0];
  view.fy = K[4];
  view.cx = K[2];
  view.cy = K[5];
  for (int axis = 0; axis < 2; ++axis) {
    const T focal = axis ? view.fy : view.fx, centre = axis ? view.cy : view.cx;
    const T size = T(axis ? height : width), margin = T(0.15) * size / focal;
    view.high[axis] = inria ? T(0.65) * size / focal : (size - centre) / focal + margin;
    view.low[axis] = inria ? -view.high[axis] : -centre / focal - margin;
  }
  return view;
}

struct Options {
  int64_t width, height;
  int kernel, camera;
  double eps2d, near, far, radius_clip, alpha_min;
  bool antialiased, inria;
};

// The columns of R_q are the splat's axes; diag(s) is not in it.
template <class T>
TZ_HOST_DEVICE void rotation(const T* quat, T* R) {
  const T length = std::sqrt(quat[0] * quat[0] + quat[1] * quat[1] + quat[2] * quat[2] +
                             quat[3] * quat[3]);
  const T w = quat[0] / length, x = quat[1] / length, y = quat[2] / length, z = quat[3] / length;
  R[0] = 1 - 2 * (y * y + z * z);
  R[1] = 2 * (x * y - w * z);
  R[2] = 2 * (x * z + w * y);
  R[3] = 2 * (x * y + w * z);
  R[4] = 1 - 2 * (x * x + z * z);
  R[5] = 2 * (y * z - w * x);
  R[6] = 2 * (x * z - w * y);
  R[7] = 2 * (y * z + w * x);
  R[8] = 1 - 2 * (x * x + y * y);
}

// Of the fisheye: h = theta / rho, p = (dh/drho) / rho and, where `s` is given, (dp/drho) / rho.
template <class T>
TZ_HOST_DEVICE void angle_per_radius(T square, T z, T* h, T* p, T* s) {
  if (square < T(SERIES_BELOW) * z * z && z > 0) {
    const T ratio = square / (z * z);
    T of_h = 0, of_p = 0, of_s = 0;
    for (int k = SERIES_TERMS; k > 0; --k) {
      const T sign = k % 2 ? T(-1) : T(1), part = sign / T(2 * k + 1);
      of_h = part + ratio * of_h;
      of_p = part * T(2 * k) + ratio * of_p;
      if (k > 1) of_s = part * T(2 * k) * T(2 * k - 2) + ratio * of_s;
    }
    *h = (1 + ratio * of_h) / z;
    *p = of_p / (z * z * z);
    if (s) *s = of_s / (z * z * z * z * z);
    return;
  }
  const T rho = std::sqrt(square), whole = square + z * z;
  *h = std::atan2(rho, z) / rho;
  *p = (z / whole - *h) / square;
  if (s) *s = (-2 * z / (whole * whole) - 3 * *p) / square;
}

// Where t = (x, y, z) is on the image, and the derivative J (2 x 3) that carries the covariance.
template <class T>
TZ_HOST_DEVICE void to_image(int camera, const View<T>& view, const T* t, T* mean2d, T* J) {
  if (camera == PINHOLE) {
    const T inverse = 1 / t[2];
    for (int axis = 0; axis < 2; ++axis) {
      const T focal = axis ? view.fy : view.fx, slope = t[axis] * inverse;
      mean2d[axis] = focal * slope + (axis ? view.cy : view.cx);
      J[3 * axis + axis] = focal * inverse;
      J[3 * axis + 1 - axis] = 0;
      J[3 * axis + 2] = -focal * larger(view.low[axis], smaller(view.high[axis], slope)) * inverse;
    }
  } else if (camera == ORTHOGRAPHIC) {
    mean2d[0] = view.fx * t[0] + view.cx;
    mean2d[1] = view.fy * t[1] + view.cy;
    J[0] = view.fx;
    J[4] = view.fy;
    J[1] = J[2] = J[3] = J[5] = 0;
  } else {
    const T x = t[0], y = t[1], square = x * x + y * y, by_z = -1 / (square + t[2] * t[2]);
    T h, p;
    angle_per_radius(square, t[2], &h, &p, static_cast<T*>(nullptr));
    mean2d[0] = view.fx * x * h + view.cx;
    mean2d[1] = view.fy * y * h + view.cy;
    J[0] = view.fx * (h + x * x * p);
    J[1] = view.fx * x * y * p;
    J[2] = view.fx * x * by_z;
    J[3] = view.fy * x * y * p;
    J[4] = view.fy * (h + y * y * p);
    J[5] = view.fy * y * by_z;
  }
}

// Adds to g_t from the gradients of mean2d and of J, J being what to_image gave.
template <class T>
TZ_HOST_DEVICE void to_image_backward(int camera, const View<T>& view, const T* t, const T* J,
                                      const T* g_mean2d, const T* g_J, T* g_t) {
  if (camera == PINHOLE) {
    const T inverse = 1 / t[2];
    for (int axis = 0; axis < 2; ++axis) {
      const T focal = axis ? view.fy : view.fx, slope = t[axis] * inverse;
      const T step = focal * inverse, outer = step * inverse * g_J[3 * axis + 2];
      const bool free = slope >= view.low[axis] && slope <= view.high[axis];
      const T held = larger(view.low[axis], smaller(view.high[axis], slope));
      g_t[axis] += step * g_mean2d[axis] - (free ? outer : T(0));
      g_t[2] += outer * held * (free ? T(2) : T(1)) - step * slope * g_mean2d[axis] -
                step * inverse * g_J[3 * axis + axis];
    }
  } else if (camera == ORTHOGRAPHIC) {
    g_t[0] += view.fx * g_mean2d[0];
    g_t[1] += view.fy * g_mean2d[1];
  } else {
    for (int j = 0; j < 3; ++j) g_t[j] += J[j] * g_mean2d[0] + J[3 + j] * g_mean2d[1];
    const T x = t[0], y = t[1], z = t[2], square = x * x + y * y, whole = square + z * z;
    T h, p, s;
    angle_per_radius(square, z, &h, &p, &s);
    const T bend = 2 / (whole * whole), by_z = -1 / whole;  // d by_z = bend (x, y, z)
    const T a = view.fx * g_J[0], b = view.fx * g_J[1] + view.fy * g_J[3], c = view.fx * g_J[2];
    const T d = view.fy * g_J[4], e = view.fy * g_J[5];
    // h + x x p, x y p and h + y y p by their p and h; then c x by_z + e y by_z.
    const T all_h = a + d, all_p = a * x * x + b * x * y + d * y * y, all_z = c * x + e * y;
    g_t[0] += all_h * p * x + all_p * s * x + (2 * a * x + b * y) * p + all_z * bend * x + c * by_z;
    g_t[1] += all_h * p * y + all_p * s * y + (2 * d * y + b * x) * p + all_z * bend * y + e * by_z;
    g_t[2] += all_h * by_z + all_p * bend + all_z * bend * z;
  }
}

template <class T>
struct Screen {
  T mean[2], depth, conic[3], cov[3], compensation;
  int32_t radius[2];
};

// H = J R R_q diag(s), (2 x 3), and M = J R.
template <class T>
TZ_HOST_DEVICE void half_covariance(const T* J, const T* R, const T* axes, const T* scale, T* M, T* H) {
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j)
      M[3 * i + j] = J[3 * i] * R[j] + J[3 * i + 1] * R[3 + j] + J[3 * i + 2] * R[6 + j];
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 3; ++k)
      H[3 * i + k] = (M[3 * i] * axes[k] + M[3 * i + 1] * axes[3 + k] + M[3 * i + 2] * axes[6 + k]) *
                     scale[k];
}

// Half-sides of the box in which a splat can be seen, where it can; NaN stays what it is.
template <class T>
TZ_HOST_DEVICE void box(const Options& options, const T* cov, T det, T reach, T* side) {
  if (options.inria) {
    const T middle = (cov[0] + cov[2]) / 2;
    side[0] = side[1] = 3 * std::sqrt(middle + std::sqrt(larger(middle * middle - det, T(0.1))));
  } else {
    const bool window = options.kernel == ANALYTIC;
    const T least = window ? T(SMALLEST_VARIANCE) : T(0), grown = window ? T(GROWN) : T(0);
    side[0] = std::sqrt(reach * (cov[0] + least)) + grown;
    side[1] = std::sqrt(reach * (cov[2] + least)) + grown;
  }
  for (int axis = 0; axis < 2; ++axis)
    side[axis] = larger(T(1), smaller(T(LARGEST_RADIUS), std::ceil(side[axis])));
}

template <class T>
TZ_HOST_DEVICE bool finite(const T* values, int count) {
  T sum = 0;
  for (int i = 0; i < count; ++i) sum += values[i] * 0;
  return sum == 0;
}

// Whether the camera sees the splat; all of `out` is 0 where it doesn't.
template <class T>
TZ_HOST_DEVICE bool project(const Options& options, const View<T>& view, const T* mean,
                            const T* quat, const T* scale, T opacity, T beta, Screen<T>& out) {
  const T *R = view.R;
  T t[3], axes[9], J[6], M[6], H[6], side[2];
  for (int i = 0; i < 3; ++i)
    t[i] = R[3 * i] * mean[0] + R[3 * i + 1] * mean[1] + R[3 * i + 2] * mean[2] + view.t[i];
  rotation(quat, axes);
  to_image(options.camera, view, t, out.mean, J);
  half_covariance(J, R, axes, scale, M, H);
  const bool window = options.kernel == ANALYTIC;
  const T blur = window ? T(0) : T(options.eps2d);
  const T xx = H[0] * H[0] + H[1] * H[1] + H[2] * H[2];
  const T xy = H[0] * H[3] + H[1] * H[4] + H[2] * H[5];
  const T yy = H[3] * H[3] + H[4] * H[4] + H[5] * H[5];
  const T m0 = H[1] * H[5] - H[2] * H[4], m1 = H[2] * H[3] - H[0] * H[5], m2 = H[0] * H[4] - H[1] * H[3];
  const T det = m0 * m0 + m1 * m1 + m2 * m2;
  const T blurred = det + blur * (xx + yy) + blur * blur;
  out.depth = t[2];
  out.cov[0] = xx + blur;
  out.cov[1] = xy;
  out.cov[2] = yy + blur;
  out.conic[0] = window ? T(0) : out.cov[2] / blurred;
  out.conic[1] = window ? T(0) : -xy / blurred;
  out.conic[2] = window ? T(0) : out.cov[0] / blurred;
  out.compensation = 1;
  if (options.antialiased && blur > 0)
    out.compensation = std::sqrt(
        larger(det / blurred, T(SMALLEST_COMPENSATION) * T(SMALLEST_COMPENSATION)));
  const T reach = support(options.kernel, opacity * out.compensation, beta, options.alpha_min);
  box(options, out.cov, blurred, reach, side);
  bool seen = reach >= 0 && t[2] >= T(options.near) && t[2] <= T(options.far);
  seen = seen && (options.camera != PINHOLE || t[2] > 0) && (window || blurred > 0);
  seen = seen && finite(out.mean, 2) && finite(out.conic, 3) && finite(out.cov, 3);
  seen = seen && finite(side, 2);
  seen = seen && (side[0] > T(options.radius_clip) || side[1] > T(options.radius_clip));
  for (int axis = 0; axis < 2; ++axis) {
    const T size = T(axis ? options.height : options.width);
    seen = seen && out.mean[axis] + side[axis] > 0 && out.mean[axis] - side[axis] < size;
    out.radius[axis] = seen ? int32_t(side[axis]) : 0;
  }
  if (!seen) {
    out.radius[0] = 0;
    out.mean[0] = out.mean[1] = out.depth = out.compensation = 0;
    for (int k = 0; k < 3; ++k) out.conic[k] = out.cov[k] = 0;
  }
  return seen;
}

// Gradients that come in for a splat on one image.
template <class T>
struct ScreenGrad {
  T mean[2], depth, conic[3], cov[3], compensation;
};

// Adds to the gradients of the mean, of the axes R_q diag(s) (3 x 3), and of the first three rows of
// the view matrix (3 x 4). `conic` and `compensation` are what project() gave.
template <class T>
TZ_HOST_DEVICE void project_backward(const Options& options, const View<T>& view, const T* mean,
                                     const T* quat, const T* scale, const T* conic, T compensation,
                                     const ScreenGrad<T>& above, T* g_mean, T* g_axes, T* g_view) {
  const T *R = view.R, *A = conic;
  T t[3], axes[9], J[6], M[6], H[6], mean2d[2];
  for (int i = 0; i < 3; ++i)
    t[i] = R[3 * i] * mean[0] + R[3 * i + 1] * mean[1] + R[3 * i + 2] * mean[2] + view.t[i];
  rotation(quat, axes);
  to_image(options.camera, view, t, mean2d, J);
  half_covariance(J, R, axes, scale, M, H);
  // G_S = G of the covariance - A G_A A, where A is the conic
  const T a = above.conic[0], b = above.conic[1] / 2, c = above.conic[2];
  const T left0 = A[0] * a + A[1] * b, left1 = A[0] * b + A[1] * c;
  const T left2 = A[1] * a + A[2] * b, left3 = A[1] * b + A[2] * c;
  T xx = above.cov[0] - (left0 * A[0] + left1 * A[1]);
  T xy = above.cov[1] / 2 - (left0 * A[1] + left1 * A[2]);
  T yy = above.cov[2] - (left2 * A[1] + left3 * A[2]);
  if (options.antialiased && options.kernel != ANALYTIC && options.eps2d > 0 &&
      compensation > T(SMALLEST_COMPENSATION)) {
    // of k = sqrt(det S0 / det S): ((1 - k^2) A - eps det(A) I) / (2 k)
    const T slope = above.compensation / (2 * compensation), less = 1 - compensation * compensation;
    const T spread = T(options.eps2d) * (A[0] * A[2] - A[1] * A[1]);
    xx += slope * (less * A[0] - spread);
    xy += slope * less * A[1];
    yy += slope * (less * A[2] - spread);
  }
  T g_H[6], g_M[6], g_J[6], g_t[3] = {0, 0, above.depth};
  for (int k = 0; k < 3; ++k) {
    g_H[k] = 2 * (xx * H[k] + xy * H[3 + k]);
    g_H[3 + k] = 2 * (xy * H[k] + yy * H[3 + k]);
  }
  for (int i = 0; i < 3; ++i) {
    g_M[i] = g_M[3 + i] = 0;
    for (int k = 0; k < 3; ++k) {
      const T axis = axes[3 * i + k] * scale[k];
      g_axes[3 * i + k] += M[i] * g_H[k] + M[3 + i] * g_H[3 + k];
      g_M[i] += g_H[k] * axis;
      g_M[3 + i] += g_H[3 + k] * axis;
    }
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j)
      g_J[3 * i + j] = g_M[3 * i] * R[3 * j] + g_M[3 * i + 1] * R[3 * j + 1] + g_M[3 * i + 2] * R[3 * j + 2];
  to_image_backward(options.camera, view, t, J, above.mean, g_J, g_t);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      g_mean[j] += R[3 * i + j] * g_t[i];
      g_view[4 * i + j] += g_t[i] * mean[j] + J[i] * g_M[j] + J[3 + i] * g_M[3 + j];
    }
    g_view[4 * i + 3] += g_t[i];
  }
}

// From the gradient of the axes R_q diag(s) to those of the quaternion and of the scales.
template <class T>
TZ_HOST_DEVICE void axes_backward(const T* quat, const T* scale, const T* g_axes, T* g_quat, T* g_scale) {
  T R[9], G[9];
  rotation(quat, R);
  for (int k = 0; k < 3; ++k) {
    g_scale[k] = R[k] * g_axes[k] + R[3 + k] * g_axes[3 + k] + R[6 + k] * g_axes[6 + k];
    for (int i = 0; i < 3; ++i) G[3 * i + k] = g_axes[3 * i + k] * scale[k];
  }
  const T length = std::sqrt(quat[0] * quat[0] + quat[1] * quat[1] + quat[2] * quat[2] +
                             quat[3] * quat[3]);
  const T w = quat[0] / length, x = quat[1] / length, y = quat[2] / length, z = quat[3] / length;
  const T gw = 2 * (x * (G[7] - G[5]) + y * (G[2] - G[6]) + z * (G[3] - G[1]));
  const T gx = 2 * (w * (G[7] - G[5]) + y * (G[1] + G[3]) + z * (G[2] + G[6]) - 2 * x * (G[4] + G[8]));
  const T gy = 2 * (w * (G[2] - G[6]) + x * (G[1] + G[3]) + z * (G[5] + G[7]) - 2 * y * (G[0] + G[8]));
  const T gz = 2 * (w * (G[3] - G[1]) + x * (G[2] + G[6]) + y * (G[5] + G[7]) - 2 * z * (G[0] + G[4]));
  const T along = w * gw + x * gx + y * gy + z * gz;
  g_quat[0] = (gw - w * along) / length;
  g_quat[1] = (gx - x * along) / length;
  g_quat[2] = (gy - y * along) / length;
  g_quat[3] = (gz - z * along) / length;
}

// ---- Spherical harmonics -------------------------------------------------------------------------

constexpr double SH0 = 0.28209479177387814, SH1 = 0.4886025119029199, SH2 = 1.0925484305920792,
                 SH3 = 0.31539156525252005, SH4 = 0.5462742152960396, SH5 = 0.5900435899266435,
                 SH6 = 2.890611442640554, SH7 = 0.4570457994644658, SH8 = 0.3731763325901154,
                 SH9 = 1.445305721320277;

// The direction divided by its length; the null vector stays what it is, with `inverse` 0.
template <class T>
TZ_HOST_DEVICE void normalise(const T* dir, T* unit, T* inverse) {
  const T square = dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2];
  *inverse = square == 0 ? T(0) : 1 / std::sqrt(square);
  for (int i = 0; i < 3; ++i) unit[i] = dir[i] * *inverse;
}

// The (degree + 1)^2 functions at a unit vector.
template <class T>
TZ_HOST_DEVICE void sh_basis(int degree, const T* unit, T* B) {
  const T x = unit[0], y = unit[1], z = unit[2], xx = x * x, yy = y * y, zz = z * z;
  B[0] = T(SH0);
  if (degree > 0) {
    B[1] = T(-SH1) * y;
    B[2] = T(SH1) * z;
    B[3] = T(-SH1) * x;
  }
  if (degree > 1) {
    B[4] = T(SH2) * x * y;
    B[5] = T(-SH2) * y * z;
    B[6] = T(SH3) * (2 * zz - xx - yy);
    B[7] = T(-SH2) * x * z;
    B[8] = T(SH4) * (xx - yy);
  }
  if (degree > 2) {
    B[9] = T(-SH5) * y * (3 * xx - yy);
    B[10] = T(SH6) * x * y * z;
    B[11] = T(-SH7) * y * (4 * zz - xx - yy);
    B[12] = T(SH8) * z * (2 * zz - 3 * xx - 3 * yy);
    B[13] = T(-SH7) * x * (4 * zz - xx - yy);
    B[14] = T(SH9) * z * (xx - yy);
    B[15] = T(-SH5) * x * (xx - 3 * yy);
  }
}

// g (3) = sum_k w_k dB_k/d unit.
template <class T>
TZ_HOST_DEVICE void sh_basis_backward(int degree, const T* unit, const T* w, T* g) {
  const T x = unit[0], y = unit[1], z = unit[2], xx = x * x, yy = y * y, zz = z * z;
  g[0] = g[1] = g[2] = 0;
  if (degree > 0) {
    g[0] = T(-SH1) * w[3];
    g[1] = T(-SH1) * w[1];
    g[2] = T(SH1) * w[2];
  }
  if (degree > 1) {
    const T e = T(SH3) * w[6], f = T(SH4) * w[8];
    g[0] += T(SH2) * (y * w[4] - z * w[7]) + 2 * x * (f - e);
    g[1] += T(SH2) * (x * w[4] - z * w[5]) - 2 * y * (f + e);
    g[2] += T(SH2) * (-y * w[5] - x * w[7]) + 4 * z * e;
  }
  if (degree > 2) {
    const T a = T(-SH5) * w[9], b = T(SH6) * w[10], c = T(-SH7) * w[11], d = T(SH8) * w[12];
    const T e = T(-SH7) * w[13], f = T(SH9) * w[14], h = T(-SH5) * w[15];
    g[0] += 6 * a * x * y + b * y * z - 2 * c * x * y - 6 * d * x * z + e * (4 * zz - 3 * xx - yy) +
            2 * f * x * z + 3 * h * (xx - yy);
    g[1] += 3 * a * (xx - yy) + b * x * z + c * (4 * zz - xx - 3 * yy) - 6 * d * y * z -
            2 * e * x * y - 2 * f * y * z - 6 * h * x * y;
    g[2] += b * x * y + 8 * c * y * z + d * (6 * zz - 3 * xx - 3 * yy) + 8 * e * x * z +
            f * (xx - yy);
  }
}

// From the gradient of the unit vector to that of the direction.
template <class T>
TZ_HOST_DEVICE void normalise_backward(const T* unit, T inverse, const T* g_unit, T* g_dir) {
  const T along = unit[0] * g_unit[0] + unit[1] * g_unit[1] + unit[2] * g_unit[2];
  for (int i = 0; i < 3; ++i) g_dir[i] = inverse * (g_unit[i] - unit[i] * along);
}

}  // namespace torchzoo::projection
