// The three weights of a splat at a pixel, and their derivatives, for scalars and for vectors.
//
// d = (dx, dy) is the mean less the pixel's centre and q = a dx² + 2b dx dy + c dy² the conic's form.
//   gaussian                 w = exp(-q/2)
//   generalized_exponential  w = exp(-q^(β/2) / 2), with q not below 1e-8
//   analytic                 w = 2π I(u, s1) I(v, s2) / side², the mean over a pixel's window that is
//                            turned to the axes of the covariance, with u, v = d along them and s1, s2
//                            the deviations
// A pixel's opacity is o w, at most alpha_max, and counts from alpha_min on.
// What a caller doesn't use of a weight's derivatives its compiler leaves out.
//
// V is a float, a double, or on a CPU a vector of them; M gives exp2, log2 and expm1 of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define TZ_SPLAT __host__ __device__ __forceinline__
#else
#define TZ_SPLAT inline __attribute__((always_inline))
#endif

namespace torchzoo::splat {

enum Kernel : int64_t { GAUSSIAN = 0, GENERALIZED_EXPONENTIAL = 1, ANALYTIC = 2 };

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453, PI = 3.141592653589793;
constexpr double LEAST_FORM = 1e-8;        // of q, where it is raised to a power
constexpr double LEAST_EIGENVALUE = 1e-6;  // px²
constexpr double ISOTROPIC = 1e-6;         // eigenvalues that differ by less, of the larger, count as one
constexpr double SLACK = 1e-6;   // of the form's terms and of ln(o / alpha_min): rounding cuts off nothing
constexpr double EXCESS = 1.017;  // by which factor the logistic can be above the Gaussian, in two axes
constexpr double GROWN = 0.71;    // half the diagonal of a window of side 1

namespace detail {
template <class V, bool = std::is_arithmetic_v<V>>
struct Element {
  using type = V;
};
template <class V>
struct Element<V, false> {
  using type = std::remove_cvref_t<decltype(V{}[0])>;
};
}  // namespace detail
template <class V>
using Element = typename detail::Element<V>::type;

template <class V>
TZ_SPLAT V least(V x, V y) {
  return x < y ? x : y;
}
template <class V>
TZ_SPLAT V most(V x, V y) {
  return x > y ? x : y;
}

// --- gaussian: `form` is -q/2 in units of ln 2 -------------------------------------------------------

template <class M, class V>
TZ_SPLAT V gaussian(V form) {
  return M::exp2(least(form, V{}));
}

// --- generalized_exponential -------------------------------------------------------------------------

template <class V>
struct Exponential {
  V weight, rate, beta;  // ∂w/∂q = -½ w rate, ∂w/∂β = -¼ w beta
};

template <class M, class V>
TZ_SPLAT Exponential<V> generalized_exponential(V q, V half_beta) {
  using E = Element<V>;
  const auto centre = q < V{} + E(LEAST_FORM);
  q = centre ? V{} + E(LEAST_FORM) : q;
  const V logarithm = M::log2(q), raised = M::exp2(half_beta * logarithm);
  Exponential<V> of{M::exp2(raised * E(-LOG2_E / 2)), V{}, V{}};
  of.rate = centre ? V{} : half_beta * raised / q;
  of.beta = raised * logarithm * E(LN_2);
  return of;
}

// --- analytic ----------------------------------------------------------------------------------------

// The axes of a covariance: (cos, sin) and (-sin, cos), with deviations s1 and s2 of at least 1e-3 px.
template <class R>
struct Frame {
  R cos, sin, s1, s2;
  R gap;             // between the eigenvalues; 0 where they count as one
  bool free1, free2;  // whether the deviations are above the least
};

template <class R>
TZ_SPLAT Frame<R> frame(R xx, R xy, R yy) {
  const R mean = (xx + yy) / 2, half = (xx - yy) / 2, radius = sqrt(half * half + xy * xy);
  Frame<R> of{1, 0, 0, 0, 0, true, true};
  R first = xx, second = yy;
  if (2 * radius >= R(ISOTROPIC) * (mean + radius) && radius > 0) {
    const R major = sqrt((1 + std::abs(half) / radius) / 2), minor = std::abs(xy) / (2 * radius * major);
    const R sign = xy < 0 ? R(-1) : R(1);
    of.cos = half >= 0 ? major : minor * sign;
    of.sin = half >= 0 ? minor * sign : major;
    of.gap = 2 * radius;
    first = mean + radius, second = (xx * yy - xy * xy) / first;
  }
  of.free1 = first >= R(LEAST_EIGENVALUE), of.free2 = second >= R(LEAST_EIGENVALUE);
  of.s1 = sqrt(of.free1 ? first : R(LEAST_EIGENVALUE));
  of.s2 = sqrt(of.free2 ? second : R(LEAST_EIGENVALUE));
  return of;
}

// I = s [S((u + h)/s) - S((u - h)/s)] for the logistic S(x) = 1 / (1 + exp(-z)), z = 1.6x + 0.07x³
// within ±30.
template <class V>
struct Integral {
  V value, along, width;  // I, ∂I/∂u, ∂I/∂s
};

// It is even in u. With E = exp(-z) at both ends, S(p) - S(r) = E_p expm1(z_p - z_r) / ((1+E_p)(1+E_r)):
// no cancellation, neither far out nor where the window is short beside s.
template <class M, class V>
TZ_SPLAT Integral<V> integral(V u, V s, V inverse, V half) {
  using E = Element<V>;
  const V limit = V{} + E(30), away = most(u, -u);
  const V p = (away + half) * inverse, r = (away - half) * inverse;
  const V p2 = p * p, r2 = r * r;
  const V rise_p = p * (E(1.6) + E(0.07) * p2), rise_r = r * (E(1.6) + E(0.07) * r2);
  const V zp = least(rise_p, limit), zr = most(least(rise_r, limit), -limit);
  const auto in_p = rise_p < limit;
  const auto in_r = (rise_r < limit) & (rise_r > -limit);
  const V exact = E(2) * half * inverse * (E(1.6) + E(0.07) * (p2 + p * r + r2));
  const V step = in_p & in_r ? exact : zp - zr;
  const V ep = M::exp2(zp * E(-LOG2_E)), grown = M::expm1(step), er = ep + ep * grown;
  const V at_p = E(1) / (E(1) + ep), at_r = E(1) / (E(1) + er);
  const V share = ep * grown * at_p * at_r;
  Integral<V> of{s * share, V{}, V{}};
  const V dp = in_p ? (E(1.6) + E(0.21) * p2) * ep * at_p * at_p : V{};
  const V dr = in_r ? (E(1.6) + E(0.21) * r2) * er * at_r * at_r : V{};
  of.along = u < V{} ? dr - dp : dp - dr;
  of.width = share - (p * dp - r * dr);
  return of;
}

// --- where a splat can be seen -----------------------------------------------------------------------

// The ellipse in which o w >= alpha_min, about the mean; for the analytic weight it has to be grown
// by `margin`, half the diagonal of the window, on all sides.
//
// With y from the mean downwards, its points are those with |x + slope y| <= sqrt(h0 - h1 y²).
template <class R>
struct Region {
  R slope, h0, h1;
  R reach;   // |y| is not larger; negative where nothing is seen, infinite where all is
  R turn;    // the y at which x is largest
  R margin;
};

template <class R>
TZ_SPLAT Region<R> region(Kernel kernel, R a, R b, R c, R opacity, R beta, R pixel, R alpha_min) {
  const R infinity = R(INFINITY);
  const Region<R> all{0, infinity, 0, infinity, 0, 0}, none{0, 0, 0, -1, 0, 0};
  const R margin = kernel == ANALYTIC ? R(GROWN) * pixel : R(0);
  R above = R(SLACK);  // ln(o / alpha_min), and a little
  if (kernel == ANALYTIC) {
    const Frame<R> axes = frame(a, b, c);
    const R i1 = 1 / (axes.s1 * axes.s1), i2 = 1 / (axes.s2 * axes.s2);
    a = axes.cos * axes.cos * i1 + axes.sin * axes.sin * i2;
    b = axes.cos * axes.sin * (i1 - i2);
    c = axes.sin * axes.sin * i1 + axes.cos * axes.cos * i2;
    above += log(R(EXCESS));
  }
  a *= R(1 - SLACK), c *= R(1 - SLACK);
  if (!(alpha_min > 0)) return all;
  if (!(opacity > 0)) return none;
  above += log(opacity / alpha_min);
  if (!(above >= 0)) return none;
  const R form = kernel == GENERALIZED_EXPONENTIAL ? pow(2 * above, 2 / beta) : 2 * above;
  const R det = a * c - b * b;
  const Region<R> of{b / a, form / a, det / (a * a), sqrt(form * a / det),
                     -b * sqrt(form / (c * det)), margin};
  const bool sound = a > 0 && c > 0 && det > 0 && of.h0 < infinity && of.h1 < infinity &&
                     of.reach < infinity && of.turn - of.turn == 0 && of.slope - of.slope == 0;
  return sound ? of : all;
}

// How far the region reaches to both sides between y = top and y = bottom, from the mean; whether it does.
template <class R>
TZ_SPLAT bool extent(const Region<R>& of, R top, R bottom, R& left, R& right) {
  const R infinity = R(INFINITY);
  left = -infinity, right = infinity;
  if (of.reach == infinity) return true;
  top = most(top - of.margin, -of.reach), bottom = least(bottom + of.margin, of.reach);
  if (!(top <= bottom)) return false;
  const R at_right = least(most(of.turn, top), bottom), at_left = least(most(-of.turn, top), bottom);
  right = sqrt(most(of.h0 - of.h1 * at_right * at_right, R(0))) - of.slope * at_right + of.margin;
  left = -sqrt(most(of.h0 - of.h1 * at_left * at_left, R(0))) - of.slope * at_left - of.margin;
  return true;
}

}  // namespace torchzoo::splat
