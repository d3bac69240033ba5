// hyper_condition for one item: mean - L11^-T L21^T (z - mu), and its gradients, in T, float or
// double. Factors are read as they come: raw_l11 (m (m + 1) / 2) by rows with the logarithms of its
// diagonal, l21 (d, m). MOST bounds the arrays that threads keep of m numbers.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define TZ_ITEM __host__ __device__ __forceinline__
#else
#define TZ_ITEM inline __attribute__((always_inline))
#endif

namespace torchzoo::hyper {

constexpr int MOST = 64;

struct Sizes {
  int64_t samples, items, latents;
  int outputs;
  bool shared;  // one latent for all items

  TZ_ITEM int64_t factors() const { return int64_t(outputs) * (outputs + 1) / 2; }
};

template <class T>
struct Inputs {
  const T *z, *mean_out, *mean_latent, *raw, *l21;
};

template <class T>
struct Gradients {
  T *offset, *out, *latent, *raw, *l21;
};

// z (B, N or 1, d), mean_latent (N, d), raw (N, m (m + 1) / 2), l21 (N, d, m), all of one type;
// `like`, a tensor (..., N, m), says what m is.
inline Sizes sizes(const torch::stable::Tensor& z, const torch::stable::Tensor& mean_latent,
                   const torch::stable::Tensor& raw, const torch::stable::Tensor& l21,
                   const torch::stable::Tensor& like) {
  using torch::headeronly::ScalarType;
  const ScalarType type = z.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "hyper_condition: expected float32 or float64");
  for (const torch::stable::Tensor* other : {&mean_latent, &raw, &l21, &like})
    STD_TORCH_CHECK(other->scalar_type() == type, "hyper_condition: expected one type");
  STD_TORCH_CHECK(z.dim() == 3 && mean_latent.dim() == 2 && raw.dim() == 2 && l21.dim() == 3 && like.dim() >= 2,
                  "hyper_condition: shapes that don't fit together");
  const int64_t m = like.size(-1);
  STD_TORCH_CHECK(m >= 1 && m <= MOST, "hyper_condition: expected 1 to 64 components, got ", m);
  const Sizes s{z.size(0), mean_latent.size(0), mean_latent.size(1), static_cast<int>(m),
                z.size(1) != mean_latent.size(0)};
  STD_TORCH_CHECK(z.size(2) == s.latents && (!s.shared || z.size(1) == 1) && raw.size(0) == s.items &&
                      raw.size(1) == s.factors() && l21.size(0) == s.items && l21.size(1) == s.latents &&
                      l21.size(2) == m && like.size(-2) == s.items,
                  "hyper_condition: shapes that don't fit together");
  return s;
}

// x <- L11^-T x, from the last component to the first.
template <int M, class T>
TZ_ITEM void solve_upper(const T* raw, int outputs, T* x) {
  const int m = M ? M : outputs;
  for (int k = m - 1; k >= 0; --k) {
    const T* row = raw + k * (k + 1) / 2;
    x[k] *= exp(-row[k]);
    for (int i = 0; i < k; ++i) x[i] -= row[i] * x[k];
  }
}

// s <- L11^-1 s, from the first component to the last.
template <int M, class T>
TZ_ITEM void solve_lower(const T* raw, int outputs, T* s) {
  const int m = M ? M : outputs;
  for (int k = 0; k < m; ++k) {
    const T* row = raw + k * (k + 1) / 2;
    for (int i = 0; i < k; ++i) s[k] -= row[i] * s[i];
    s[k] *= exp(-row[k]);
  }
}

}  // namespace torchzoo::hyper
