// hyper_condition: an item's factors are read once for all samples, and so are its gradients written.
#include "cpu.h"
#include "hyper_condition.h"

namespace torchzoo {
namespace {

using hyper::Gradients;
using hyper::Inputs;
using hyper::MOST;
using hyper::Sizes;

constexpr int64_t WORK = 1 << 15;  // multiplications of a thread, at the least

template <int M, class T>
TZ_INLINE void project(const T* z, const T* mean, const T* l21, int64_t latents, int m, T* t) {
  for (int k = 0; k < m; ++k) t[k] = T(0);
  for (int64_t j = 0; j < latents; ++j) {
    const T offset = z[j] - mean[j];
    for (int k = 0; k < (M ? M : m); ++k) t[k] += offset * l21[j * (M ? M : m) + k];
  }
}

template <int M, class T>
TZ_INLINE void items(const Sizes& s, const Inputs<T>& in, int64_t begin, int64_t end, T* out) {
  const int m = M ? M : s.outputs;
  const int64_t d = s.latents, factors = s.factors();
  for (int64_t n = begin; n < end; ++n)
    for (int64_t b = 0; b < s.samples; ++b) {
      T x[M ? M : MOST];
      const T* z = in.z + (s.shared ? b : b * s.items + n) * d;
      project<M>(z, in.mean_latent + n * d, in.l21 + n * d * m, d, m, x);
      hyper::solve_upper<M>(in.raw + n * factors, m, x);
      T* to = out + (b * s.items + n) * m;
      for (int k = 0; k < m; ++k) to[k] = in.mean_out[n * m + k] - x[k];
    }
}

template <int M, class T>
TZ_INLINE void items_backward(const Sizes& s, const Inputs<T>& in, const T* g, int64_t begin,
                              int64_t end, const Gradients<T>& to) {
  const int m = M ? M : s.outputs;
  const int64_t d = s.latents, factors = s.factors();
  for (int64_t n = begin; n < end; ++n) {
    const T *mean = in.mean_latent + n * d, *l21 = in.l21 + n * d * m, *raw = in.raw + n * factors;
    T *g_raw = to.raw + n * factors, *g_l21 = to.l21 + n * d * m, *g_latent = to.latent + n * d;
    T* g_out = to.out + n * m;
    std::fill(g_raw, g_raw + factors, T(0));
    std::fill(g_l21, g_l21 + d * m, T(0));
    std::fill(g_latent, g_latent + d, T(0));
    std::fill(g_out, g_out + m, T(0));
    for (int64_t b = 0; b < s.samples; ++b) {
      const T* z = in.z + (s.shared ? b : b * s.items + n) * d;
      const T* above = g + (b * s.items + n) * m;
      T* g_offset = to.offset + (b * s.items + n) * d;
      T x[M ? M : MOST], g_t[M ? M : MOST];
      project<M>(z, mean, l21, d, m, x);
      hyper::solve_upper<M>(raw, m, x);
      for (int k = 0; k < m; ++k) g_out[k] += above[k], g_t[k] = -above[k];
      hyper::solve_lower<M>(raw, m, g_t);
      for (int k = 0; k < m; ++k)
        for (int i = 0; i <= k; ++i) g_raw[k * (k + 1) / 2 + i] -= x[k] * g_t[i];
      for (int64_t j = 0; j < d; ++j) {
        const T offset = z[j] - mean[j];
        T sum = T(0);
        for (int k = 0; k < m; ++k) {
          g_l21[j * m + k] += offset * g_t[k];
          sum += g_t[k] * l21[j * m + k];
        }
        g_offset[j] = sum;
        g_latent[j] -= sum;
      }
    }
    for (int k = 0; k < m; ++k) g_raw[k * (k + 3) / 2] *= std::exp(raw[k * (k + 3) / 2]);
  }
}

template <int bytes, class T>
TZ_INLINE void forward_body(const Sizes* s, const Inputs<T>* in, int64_t begin, int64_t end, T* out) {
  switch (s->outputs) {
    case 1: return items<1>(*s, *in, begin, end, out);
    case 3: return items<3>(*s, *in, begin, end, out);
    case 4: return items<4>(*s, *in, begin, end, out);
    default: return items<0>(*s, *in, begin, end, out);
  }
}
TZ_ISA(forward, forward_body)

template <int bytes, class T>
TZ_INLINE void backward_body(const Sizes* s, const Inputs<T>* in, const T* g, int64_t begin, int64_t end,
                             const Gradients<T>* to) {
  switch (s->outputs) {
    case 1: return items_backward<1>(*s, *in, g, begin, end, *to);
    case 3: return items_backward<3>(*s, *in, g, begin, end, *to);
    case 4: return items_backward<4>(*s, *in, g, begin, end, *to);
    default: return items_backward<0>(*s, *in, g, begin, end, *to);
  }
}
TZ_ISA(backward, backward_body)

// Sums over the items, latent by latent in their order: the same for any number of threads.
template <class T>
void sum_items(const Sizes& s, const T* offset, T* to) {
  constexpr int64_t BLOCK = 16;
  const int64_t blocks = (s.latents + BLOCK - 1) / BLOCK;
  parallel_for(0, s.samples * blocks, std::max<int64_t>(1, WORK / std::max<int64_t>(1, s.items * BLOCK)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t at = begin; at < end; ++at) {
                   const int64_t b = at / blocks, low = at % blocks * BLOCK;
                   const int64_t width = std::min(BLOCK, s.latents - low);
                   double sums[BLOCK] = {};
                   for (int64_t n = 0; n < s.items; ++n)
                     for (int64_t j = 0; j < width; ++j)
                       sums[j] += double(offset[(b * s.items + n) * s.latents + low + j]);
                   for (int64_t j = 0; j < width; ++j) to[b * s.latents + low + j] = T(sums[j]);
                 }
               });
}

int64_t grain(const Sizes& s) {
  const int64_t each = s.samples * (s.latents + s.outputs) * s.outputs;
  return std::max<int64_t>(1, WORK / std::max<int64_t>(1, each));
}

Tensor hyper_condition(const Tensor& z_, const Tensor& mean_out_, const Tensor& mean_latent_,
                       const Tensor& raw_, const Tensor& l21_) {
  const Sizes s = hyper::sizes(z_, mean_latent_, raw_, l21_, mean_out_);
  const Tensor z = dense(z_), mean_out = dense(mean_out_), mean_latent = dense(mean_latent_);
  const Tensor raw = dense(raw_), l21 = dense(l21_);
  Tensor out = fresh(mean_out, {s.samples, s.items, s.outputs});
  with_type(z, [&]<class T>() {
    const Inputs<T> in{z.const_data_ptr<T>(), mean_out.const_data_ptr<T>(), mean_latent.const_data_ptr<T>(),
                       raw.const_data_ptr<T>(), l21.const_data_ptr<T>()};
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, s.items, grain(s),
                 [&](int64_t begin, int64_t end) { forward(&s, &in, begin, end, to); });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hyper_condition_backward(
    const Tensor& z_, const Tensor& mean_latent_, const Tensor& raw_, const Tensor& l21_, const Tensor& g_) {
  const Sizes s = hyper::sizes(z_, mean_latent_, raw_, l21_, g_);
  STD_TORCH_CHECK(g_.dim() == 3 && g_.size(0) == s.samples, "hyper_condition: shapes that don't fit together");
  const Tensor z = dense(z_), mean_latent = dense(mean_latent_), raw = dense(raw_), l21 = dense(l21_);
  const Tensor g = dense(g_);
  Tensor g_offset = fresh(z, {s.samples, s.items, s.latents});
  Tensor g_out = fresh(z, {s.items, s.outputs});
  Tensor g_latent = fresh(mean_latent), g_raw = fresh(raw);
  Tensor g_l21 = fresh(l21);
  Tensor g_z = s.shared ? fresh(z) : g_offset;
  with_type(z, [&]<class T>() {
    const Inputs<T> in{z.const_data_ptr<T>(), nullptr, mean_latent.const_data_ptr<T>(),
                       raw.const_data_ptr<T>(), l21.const_data_ptr<T>()};
    const Gradients<T> to{g_offset.mutable_data_ptr<T>(), g_out.mutable_data_ptr<T>(),
                          g_latent.mutable_data_ptr<T>(), g_raw.mutable_data_ptr<T>(),
                          g_l21.mutable_data_ptr<T>()};
    const T* above = g.const_data_ptr<T>();
    parallel_for(0, s.items, grain(s),
                 [&](int64_t begin, int64_t end) { backward(&s, &in, above, begin, end, &to); });
    if (s.shared) sum_items(s, g_offset.const_data_ptr<T>(), g_z.mutable_data_ptr<T>());
  });
  return {g_z, g_out, g_latent, g_raw, g_l21};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("hyper_condition", TORCH_BOX(&hyper_condition));
  m.impl("hyper_condition_backward", TORCH_BOX(&hyper_condition_backward));
}

}  // namespace torchzoo
