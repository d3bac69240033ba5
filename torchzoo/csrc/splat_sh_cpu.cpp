// splat_sh and its backward: sums of spherical harmonics at M directions, each with its own
// coefficients (K, 3). A task is a run of directions; every number is written once.
#include "cpu.h"
#include "splat_math.h"

namespace torchzoo {
namespace {

constexpr int64_t GRAIN = 512;

template <int degree, class T>
TZ_INLINE void sum_one(const T* dir, const T* coeffs, T* out) {
  constexpr int K = (degree + 1) * (degree + 1);
  T unit[3], B[K], inverse, sum[3] = {};
  projection::normalise(dir, unit, &inverse);
  projection::sh_basis(degree, unit, B);
  for (int k = 0; k < K; ++k)
    for (int c = 0; c < 3; ++c) sum[c] += B[k] * coeffs[3 * k + c];
  std::copy_n(sum, 3, out);
}

template <int bytes, class T>
TZ_INLINE void sum_body(int64_t degree, int64_t K, const T* dirs, const T* coeffs, int64_t begin,
                        int64_t end, T* out) {
  for (int64_t m = begin; m < end; ++m) {
    const T *dir = dirs + 3 * m, *own = coeffs + 3 * K * m;
    switch (degree) {
      case 0: sum_one<0>(dir, own, out + 3 * m); break;
      case 1: sum_one<1>(dir, own, out + 3 * m); break;
      case 2: sum_one<2>(dir, own, out + 3 * m); break;
      default: sum_one<3>(dir, own, out + 3 * m);
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
TZ_INLINE void back_body(int64_t degree, int64_t K, const T* dirs, const T* coeffs, const T* g,
                         int64_t begin, int64_t end, T* g_dirs, T* g_coeffs) {
  for (int64_t m = begin; m < end; ++m) {
    const T *dir = dirs + 3 * m, *own = coeffs + 3 * K * m, *above = g + 3 * m;
    T *to_dir = g_dirs + 3 * m, *to_own = g_coeffs + 3 * K * m;
    switch (degree) {
      case 0: back_one<0>(dir, own, above, K, to_dir, to_own); break;
      case 1: back_one<1>(dir, own, above, K, to_dir, to_own); break;
      case 2: back_one<2>(dir, own, above, K, to_dir, to_own); break;
      default: back_one<3>(dir, own, above, K, to_dir, to_own);
    }
  }
}
TZ_ISA(back_run, back_body)

void check(int64_t degree, const Tensor& dirs, const Tensor& coeffs) {
  const ScalarType type = dirs.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) &&
                      coeffs.scalar_type() == type,
                  "splat_sh: expected float32 or float64, one type");
  STD_TORCH_CHECK(degree >= 0 && degree <= 3 && dirs.dim() == 2 && coeffs.dim() == 3 &&
                      dirs.size(1) == 3 && coeffs.size(2) == 3 && coeffs.size(0) == dirs.size(0) &&
                      coeffs.size(1) >= (degree + 1) * (degree + 1),
                  "splat_sh: shapes or a degree that don't fit");
}

Tensor splat_sh(int64_t degree, const Tensor& dirs_, const Tensor& coeffs_) {
  const Tensor dirs = torch::stable::contiguous(dirs_), coeffs = torch::stable::contiguous(coeffs_);
  check(degree, dirs, coeffs);
  const int64_t M = dirs.size(0), K = coeffs.size(1);
  Tensor out = fresh(dirs, {M, 3});
  const auto run = [&]<class T>(T) {
    const T *at = dirs.const_data_ptr<T>(), *own = coeffs.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, M, GRAIN, [&](int64_t begin, int64_t end) {
      sum_run(degree, K, at, own, begin, end, to);
    });
  };
  dirs.scalar_type() == ScalarType::Float ? run(float()) : run(double());
  return out;
}

std::tuple<Tensor, Tensor> splat_sh_backward(int64_t degree, const Tensor& dirs_,
                                             const Tensor& coeffs_, const Tensor& g_) {
  const Tensor dirs = torch::stable::contiguous(dirs_), coeffs = torch::stable::contiguous(coeffs_);
  const Tensor g = torch::stable::contiguous(g_);
  check(degree, dirs, coeffs);
  const int64_t M = dirs.size(0), K = coeffs.size(1);
  STD_TORCH_CHECK(g.dim() == 2 && g.size(0) == M && g.size(1) == 3 &&
                      g.scalar_type() == dirs.scalar_type(),
                  "splat_sh_backward: g has a wrong shape or dtype");
  Tensor g_dirs = fresh(dirs, {M, 3});
  Tensor g_coeffs = fresh(dirs, {M, K, 3});
  const auto run = [&]<class T>(T) {
    const T *at = dirs.const_data_ptr<T>(), *own = coeffs.const_data_ptr<T>();
    const T* above = g.const_data_ptr<T>();
    T *to_dirs = g_dirs.mutable_data_ptr<T>(), *to_own = g_coeffs.mutable_data_ptr<T>();
    parallel_for(0, M, GRAIN, [&](int64_t begin, int64_t end) {
      back_run(degree, K, at, own, above, begin, end, to_dirs, to_own);
    });
  };
  dirs.scalar_type() == ScalarType::Float ? run(float()) : run(double());
  return {g_dirs, g_coeffs};
}

}  // namespace
}  // namespace torchzoo

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("splat_sh", TORCH_BOX(&torchzoo::splat_sh));
  m.impl("splat_sh_backward", TORCH_BOX(&torchzoo::splat_sh_backward));
}
