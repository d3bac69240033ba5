// splat_sh and its backward: sums of spherical harmonics at M directions, each with its own
// coefficients (K, 3). A task is a run of directions; every number is written once.
//
// With cameras the directions are those from each one's centre to each of N points, 0 where a point
// cannot be seen, and the results are colours: 0.5 more, and not below 0.
#include "cpu.h"
#include "splat_math.h"

namespace torchzoo {
namespace {

constexpr int64_t GRAIN = 512;

template <class T>
struct Rays {
  const T *points, *centres;  // no centres: the points are directions
  const int32_t* radii;
  int64_t count;  // of points

  bool seen(int64_t m) const { return !centres || (radii[2 * m] > 0 && radii[2 * m + 1] > 0); }
};

template <class T>
TZ_INLINE void direction(const Rays<T>& rays, int64_t m, T* dir) {
  const T* point = rays.points + 3 * (rays.centres ? m % rays.count : m);
  const T* from = rays.centres ? rays.centres + 3 * (m / rays.count) : nullptr;
  const bool seen = rays.seen(m);
  for (int i = 0; i < 3; ++i) dir[i] = seen ? point[i] - (from ? from[i] : T(0)) : T(0);
}

template <int degree, class T>
TZ_INLINE void sum_one(const T* dir, const T* coeffs, bool colours, T* out) {
  constexpr int K = (degree + 1) * (degree + 1);
  T unit[3], B[K], inverse, sum[3] = {};
  projection::normalise(dir, unit, &inverse);
  projection::sh_basis(degree, unit, B);
  for (int k = 0; k < K; ++k)
    for (int c = 0; c < 3; ++c) sum[c] += B[k] * coeffs[3 * k + c];
  for (int c = 0; c < 3; ++c) {
    const T shown = sum[c] + T(0.5);
    out[c] = !colours ? sum[c] : shown < 0 ? T(0) : shown;  // a NaN stays
  }
}

template <int bytes, class T>
TZ_INLINE void sum_body(int64_t degree, int64_t K, Rays<T> rays, const T* coeffs, int64_t begin,
                        int64_t end, T* out) {
  const bool colours = rays.centres;
  for (int64_t m = begin; m < end; ++m) {
    const T* own = coeffs + 3 * K * m;
    T dir[3];
    direction(rays, m, dir);
    switch (degree) {
      case 0: sum_one<0>(dir, own, colours, out + 3 * m); break;
      case 1: sum_one<1>(dir, own, colours, out + 3 * m); break;
      case 2: sum_one<2>(dir, own, colours, out + 3 * m); break;
      default: sum_one<3>(dir, own, colours, out + 3 * m);
    }
  }
}
TZ_ISA(sum_run, sum_body)

template <int degree, class T>
TZ_INLINE void back_one(const T* dir, const T* coeffs, const T* g, int64_t K, T* g_dir, T* g_coeffs) {
  constexpr int used = (degree + 1) * (degree + 1);
  T unit[3], B[used], w[used], inverse, g_unit[3];
  projection::normalise(dir, unit, &inverse);
  projection::sh_basis(degree, unit, B);
  for (int k = 0; k < used; ++k) {
    w[k] = coeffs[3 * k] * g[0] + coeffs[3 * k + 1] * g[1] + coeffs[3 * k + 2] * g[2];
    for (int c = 0; c < 3; ++c) g_coeffs[3 * k + c] = B[k] * g[c];
  }
  std::fill(g_coeffs + 3 * used, g_coeffs + 3 * K, T(0));
  projection::sh_basis_backward(degree, unit, w, g_unit);
  projection::normalise_backward(unit, inverse, g_unit, g_dir);
}

template <int bytes, class T>
TZ_INLINE void back_body(int64_t degree, int64_t K, Rays<T> rays, const T* coeffs, const T* colours,
                         const T* g, int64_t begin, int64_t end, T* g_dirs, T* g_coeffs) {
  for (int64_t m = begin; m < end; ++m) {
    const T* own = coeffs + 3 * K * m;
    T *to_dir = g_dirs + 3 * m, *to_own = g_coeffs + 3 * K * m;
    T dir[3], above[3];
    direction(rays, m, dir);
    for (int c = 0; c < 3; ++c) above[c] = colours && colours[3 * m + c] <= 0 ? T(0) : g[3 * m + c];
    switch (degree) {
      case 0: back_one<0>(dir, own, above, K, to_dir, to_own); break;
      case 1: back_one<1>(dir, own, above, K, to_dir, to_own); break;
      case 2: back_one<2>(dir, own, above, K, to_dir, to_own); break;
      default: back_one<3>(dir, own, above, K, to_dir, to_own);
    }
    if (!rays.seen(m)) std::fill_n(to_dir, 3, T(0));
  }
}
TZ_ISA(back_run, back_body)

struct Given {
  Tensor points, coeffs, centres, radii;
  int64_t rows, functions;

  Given(int64_t degree, const Tensor& points_, const Tensor& coeffs_, const std::optional<Tensor>& viewmats,
        const std::optional<Tensor>& radii_)
      : points(dense(points_)), coeffs(dense(coeffs_)), rows(coeffs.size(0)), functions(coeffs.size(1)) {
    const ScalarType type = points.scalar_type();
    STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) &&
                        coeffs.scalar_type() == type && (!viewmats || viewmats->scalar_type() == type),
                    "splat_sh: expected float32 or float64, one type");
    STD_TORCH_CHECK(degree >= 0 && degree <= 3 && points.dim() == 2 && coeffs.dim() == 3 &&
                        points.size(1) == 3 && coeffs.size(2) == 3 &&
                        functions >= (degree + 1) * (degree + 1) && viewmats.has_value() == radii_.has_value() &&
                        rows == points.size(0) * (viewmats ? viewmats->size(0) : 1),
                    "splat_sh: shapes or a degree that don't fit");
    if (!viewmats) return;
    const Tensor views = dense(*viewmats);
    radii = dense(*radii_);
    STD_TORCH_CHECK(views.dim() == 3 && views.size(1) == 4 && views.size(2) == 4 && radii.numel() == 2 * rows &&
                        radii.scalar_type() == ScalarType::Int,
                    "splat_sh: expected viewmats (C, 4, 4) and radii (C, N, 2), int32");
    centres = fresh(points, {views.size(0), 3});
    with_type(points, [&]<class T>() {
      const T* view = views.const_data_ptr<T>();
      T* to = centres.mutable_data_ptr<T>();
      for (int64_t c = 0; c < views.size(0); ++c, view += 16, to += 3)
        for (int j = 0; j < 3; ++j) to[j] = -(view[3] * view[j] + view[7] * view[4 + j] + view[11] * view[8 + j]);
    });
  }

  template <class T>
  Rays<T> rays() const {
    const T* at = points.const_data_ptr<T>();
    if (!centres.defined()) return {at, nullptr, nullptr, rows};
    return {at, centres.const_data_ptr<T>(), radii.const_data_ptr<int32_t>(), points.size(0)};
  }
};

Tensor splat_sh(int64_t degree, const Tensor& points, const Tensor& coeffs, std::optional<Tensor> viewmats,
                std::optional<Tensor> radii) {
  const Given given(degree, points, coeffs, viewmats, radii);
  Tensor out = fresh(given.points, {given.rows, 3});
  with_type(out, [&]<class T>() {
    const Rays<T> rays = given.rays<T>();
    const T* own = given.coeffs.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, given.rows, GRAIN, [&](int64_t begin, int64_t end) {
      sum_run(degree, given.functions, rays, own, begin, end, to);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> splat_sh_backward(int64_t degree, const Tensor& points, const Tensor& coeffs,
                                             std::optional<Tensor> viewmats, std::optional<Tensor> radii,
                                             std::optional<Tensor> colours, const Tensor& g_) {
  const Given given(degree, points, coeffs, viewmats, radii);
  const Tensor g = dense(g_), shown = colours ? dense(*colours) : g;
  for (const Tensor& each : {g, shown})
    STD_TORCH_CHECK(each.dim() == 2 && each.size(0) == given.rows && each.size(1) == 3 &&
                        each.scalar_type() == given.points.scalar_type(),
                    "splat_sh_backward: g or colors have a wrong shape or dtype");
  Tensor g_dirs = fresh(given.points, {given.rows, 3}), g_coeffs = fresh(given.coeffs);
  with_type(g_dirs, [&]<class T>() {
    const Rays<T> rays = given.rays<T>();
    const T *own = given.coeffs.const_data_ptr<T>(), *above = g.const_data_ptr<T>();
    const T* seen = colours ? shown.const_data_ptr<T>() : nullptr;
    T *to_dirs = g_dirs.mutable_data_ptr<T>(), *to_own = g_coeffs.mutable_data_ptr<T>();
    parallel_for(0, given.rows, GRAIN, [&](int64_t begin, int64_t end) {
      back_run(degree, given.functions, rays, own, seen, above, begin, end, to_dirs, to_own);
    });
  });
  return {g_dirs, g_coeffs};
}

}  // namespace
}  // namespace torchzoo

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("splat_sh", TORCH_BOX(&torchzoo::splat_sh));
  m.impl("splat_sh_backward", TORCH_BOX(&torchzoo::splat_sh_backward));
}
