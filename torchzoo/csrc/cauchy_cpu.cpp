// cauchy: y_l = Σ_n v_n (z_l - w_n)^-p for each row of a batch.
//
// A task is a row and a stretch of nodes, held in vectors beside their sums while the states pass
// by: the terms never touch memory. An element is summed over n in order, whatever the threads.
#include "cpu.h"

namespace torchzoo {
namespace {

constexpr int64_t NODES = 256;  // of a task

template <int bytes, class T>
TZ_INLINE void nodes_body(const T* v, const T* z, const T* w, int64_t states, int64_t count,
                          int64_t power, T* y) {
  alignas(64) T re[NODES] = {}, im[NODES] = {}, sum_re[NODES] = {}, sum_im[NODES] = {};
  for (int64_t l = 0; l < count; ++l) re[l] = z[2 * l], im[l] = z[2 * l + 1];
  for (int64_t n = 0; n < states; ++n) {
    const T a = v[2 * n], b = v[2 * n + 1], pole_re = w[2 * n], pole_im = w[2 * n + 1];
#pragma GCC ivdep
    for (int64_t l = 0; l < count; ++l) {
      const T d_re = re[l] - pole_re, d_im = im[l] - pole_im;
      const T scale = T(1) / (d_re * d_re + d_im * d_im);
      const T r_re = d_re * scale, r_im = -d_im * scale;  // 1 / (z - w)
      T t_re = a * r_re - b * r_im, t_im = a * r_im + b * r_re;
      for (int64_t p = 1; p < power; ++p) {
        const T next = t_re * r_re - t_im * r_im;
        t_im = t_re * r_im + t_im * r_re;
        t_re = next;
      }
      sum_re[l] += t_re;
      sum_im[l] += t_im;
    }
  }
  for (int64_t l = 0; l < count; ++l) y[2 * l] = sum_re[l], y[2 * l + 1] = sum_im[l];
}

// The powers that gradients need are fixed here, so that the loop over nodes has none in it.
template <int bytes, class T>
TZ_INLINE void stretch_body(const T* v, const T* z, const T* w, int64_t states, int64_t count,
                            int64_t power, T* y) {
  if (power == 1) nodes_body<bytes>(v, z, w, states, count, 1, y);
  else if (power == 2) nodes_body<bytes>(v, z, w, states, count, 2, y);
  else nodes_body<bytes>(v, z, w, states, count, power, y);
}
TZ_ISA(stretch, stretch_body)

template <class T>
void run(const Tensor& v, const Tensor& z, const Tensor& w, int64_t power, Tensor& y) {
  const T *residues = v.const_data_ptr<T>(), *nodes = z.const_data_ptr<T>();
  const T* poles = w.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  const int64_t states = v.size(1), size = z.size(1), stretches = (size + NODES - 1) / NODES;
  parallel_for(0, v.size(0) * stretches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / stretches, l = task % stretches * NODES;
      const int64_t at = (row * size + l) * 2;
      stretch(residues + row * states * 2, nodes + at, poles + row * states * 2, states,
              std::min(NODES, size - l), power, out + at);
    }
  });
}

Tensor cauchy(const Tensor& v, const Tensor& z, const Tensor& w, int64_t power) {
  using torch::stable::contiguous;
  const ScalarType type = v.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) &&
                      z.scalar_type() == type && w.scalar_type() == type,
                  "cauchy: expected float32 or float64, one type");
  STD_TORCH_CHECK(v.dim() == 3 && z.dim() == 3 && w.dim() == 3 && v.size(2) == 2 &&
                      z.size(2) == 2 && w.size(2) == 2 && v.size(0) == z.size(0) &&
                      v.size(0) == w.size(0) && v.size(1) == w.size(1) && power >= 1,
                  "cauchy: shapes that don't fit together");
  const Tensor nodes = contiguous(z);
  Tensor y = fresh(nodes);
  if (type == ScalarType::Double) run<double>(contiguous(v), nodes, contiguous(w), power, y);
  else run<float>(contiguous(v), nodes, contiguous(w), power, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) { m.impl("cauchy", TORCH_BOX(&cauchy)); }

}  // namespace torchzoo
