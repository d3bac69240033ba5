// splat_project and its backward: N splats on the images of C cameras.
//
// A task is a run of splats, seen by all cameras in turn, so that the sums over cameras have one
// order. The gradients of a camera are sums over all splats: over BLOCK of them at a time, and then
// over the blocks in their order, whatever the number of threads.
#include "cpu.h"
#include "splat_math.h"

#include <optional>

namespace torchzoo {
namespace {

using projection::Options;

constexpr int64_t BLOCK = 256;

struct Sizes {
  int64_t cameras, splats;

  int64_t blocks() const { return (splats + BLOCK - 1) / BLOCK; }

  // Runs work(block, first splat, end).
  template <class Work>
  void for_blocks(const Work& work) const {
    parallel_for(0, blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        work(block, block * BLOCK, std::min(splats, (block + 1) * BLOCK));
    });
  }
};

void expect(const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType type,
            const char* name) {
  bool fits = tensor.dim() == int64_t(shape.size()) && tensor.scalar_type() == type;
  int64_t dim = 0;
  for (int64_t size : shape) fits = fits && tensor.size(dim++) == size;
  STD_TORCH_CHECK(fits, "splat_project: ", name, " has a wrong shape or dtype");
}

Sizes sizes_of(const Tensor& means, const Tensor& quats, const Tensor& scales,
               const Tensor& viewmats, const Tensor& Ks) {
  const ScalarType type = means.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "splat_project: expected float32 or float64");
  STD_TORCH_CHECK(means.dim() == 2 && viewmats.dim() == 3,
                  "splat_project: means or viewmats have a wrong shape");
  const Sizes sizes{viewmats.size(0), means.size(0)};
  expect(means, {sizes.splats, 3}, type, "means");
  expect(quats, {sizes.splats, 4}, type, "quats");
  expect(scales, {sizes.splats, 3}, type, "scales");
  expect(viewmats, {sizes.cameras, 4, 4}, type, "viewmats");
  expect(Ks, {sizes.cameras, 3, 3}, type, "Ks");
  return sizes;
}

template <class T>
std::vector<projection::View<T>> views_of(Sizes sizes, const Tensor& viewmats, const Tensor& Ks,
                                     const Options& options) {
  const T *views = viewmats.const_data_ptr<T>(), *K = Ks.const_data_ptr<T>();
  std::vector<projection::View<T>> found;
  for (int64_t c = 0; c < sizes.cameras; ++c)
    found.push_back(projection::make_view(views + 16 * c, K + 9 * c, options.width, options.height,
                                     options.inria));
  return found;
}

template <class T>
struct Splats {
  const T *means, *quats, *scales;
};

template <class T>
struct Images {
  int32_t* radii;
  T *means, *depths, *conics, *covs, *compensations;
};

template <int bytes, class T>
TZ_INLINE void project_body(const Options* options, const projection::View<T>* view, Splats<T> in,
                            const T* opacities, const T* beta, int64_t begin, int64_t end,
                            Images<T> out) {
  for (int64_t n = begin; n < end; ++n) {
    projection::Screen<T> screen;
    projection::project(*options, *view, in.means + 3 * n, in.quats + 4 * n, in.scales + 3 * n,
                   opacities[n], beta ? beta[n] : T(2), screen);
    std::copy_n(screen.radius, 2, out.radii + 2 * n);
    std::copy_n(screen.mean, 2, out.means + 2 * n);
    std::copy_n(screen.conic, 3, out.conics + 3 * n);
    std::copy_n(screen.cov, 3, out.covs + 3 * n);
    out.depths[n] = screen.depth;
    out.compensations[n] = screen.compensation;
  }
}
TZ_ISA(project_run, project_body)

template <class T>
void project_all(Sizes sizes, const Options& options, const Tensor& means, const Tensor& quats,
                 const Tensor& scales, const Tensor& opacities, const std::optional<Tensor>& beta,
                 const Tensor& viewmats, const Tensor& Ks, std::vector<Tensor>& outputs) {
  const auto views = views_of<T>(sizes, viewmats, Ks, options);
  const Splats<T> in{means.const_data_ptr<T>(), quats.const_data_ptr<T>(),
                     scales.const_data_ptr<T>()};
  const T* opacity = opacities.const_data_ptr<T>();
  const T* exponents = beta ? beta->const_data_ptr<T>() : nullptr;
  const Images<T> out{outputs[0].mutable_data_ptr<int32_t>(), outputs[1].mutable_data_ptr<T>(),
                      outputs[2].mutable_data_ptr<T>(), outputs[3].mutable_data_ptr<T>(),
                      outputs[4].mutable_data_ptr<T>(), outputs[5].mutable_data_ptr<T>()};
  sizes.for_blocks([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t c = 0; c < sizes.cameras; ++c) {
      const int64_t at = c * sizes.splats;
      const Images<T> here{out.radii + 2 * at,  out.means + 2 * at, out.depths + at,
                           out.conics + 3 * at, out.covs + 3 * at,  out.compensations + at};
      project_run(&options, &views[c], in, opacity + at, exponents, begin, end, here);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> splat_project(
    const Tensor& means_, const Tensor& quats_, const Tensor& scales_, const Tensor& opacities_,
    const std::optional<Tensor>& beta_, const Tensor& viewmats_, const Tensor& Ks_, int64_t width,
    int64_t height, int64_t kernel, int64_t camera, double eps2d, double near, double far,
    double radius_clip, double alpha_min, bool antialiased, bool inria) {
  const Tensor means = dense(means_), quats = dense(quats_), scales = dense(scales_);
  const Tensor opacities = dense(opacities_), viewmats = dense(viewmats_), Ks = dense(Ks_);
  std::optional<Tensor> beta;
  if (beta_) beta = dense(*beta_);
  const Sizes sizes = sizes_of(means, quats, scales, viewmats, Ks);
  const ScalarType type = means.scalar_type();
  expect(opacities, {sizes.cameras, sizes.splats}, type, "opacities");
  if (beta) expect(*beta, {sizes.splats}, type, "beta");
  STD_TORCH_CHECK(kernel != projection::GENERALIZED || beta, "splat_project: beta is missing");
  const Options options{width, height, int(kernel), int(camera), eps2d,       near,
                        far,   radius_clip, alpha_min, antialiased, inria};
  std::vector<Tensor> out;
  const int64_t C = sizes.cameras, N = sizes.splats;
  out.push_back(fresh(means, {C, N, 2}, ScalarType::Int));
  out.push_back(fresh(means, {C, N, 2}));
  out.push_back(fresh(means, {C, N}));
  out.push_back(fresh(means, {C, N, 3}));
  out.push_back(fresh(means, {C, N, 3}));
  out.push_back(fresh(means, {C, N}));
  if (type == ScalarType::Float)
    project_all<float>(sizes, options, means, quats, scales, opacities, beta, viewmats, Ks, out);
  else
    project_all<double>(sizes, options, means, quats, scales, opacities, beta, viewmats, Ks, out);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

using MaybeTensor = std::optional<Tensor>;

template <class T>
struct Above {
  const int32_t* radii;
  const T *conics, *compensations;
  const T *means, *depths, *by_conics, *covs, *by_compensations;  // null: all 0
};

template <class T, int count>
TZ_INLINE void load(const T* from, int64_t n, T* to) {
  for (int k = 0; k < count; ++k) to[k] = from ? from[count * n + k] : T(0);
}

// Adds up to BLOCK splats seen by one camera; `view` sums in double precision.
template <int bytes, class T>
TZ_INLINE void back_body(const Options* options, const projection::View<T>* view, Splats<T> in,
                         Above<T> above, int64_t begin, int64_t end, T* g_means, T* g_axes,
                         double* g_view) {
  for (int64_t n = begin; n < end; ++n) {
    if (above.radii[2 * n] <= 0 || above.radii[2 * n + 1] <= 0) continue;
    projection::ScreenGrad<T> grad;
    load<T, 2>(above.means, n, grad.mean);
    load<T, 1>(above.depths, n, &grad.depth);
    load<T, 3>(above.by_conics, n, grad.conic);
    load<T, 3>(above.covs, n, grad.cov);
    load<T, 1>(above.by_compensations, n, &grad.compensation);
    T part[12] = {};
    projection::project_backward(*options, *view, in.means + 3 * n, in.quats + 4 * n, in.scales + 3 * n,
                            above.conics + 3 * n, above.compensations[n], grad, g_means + 3 * n,
                            g_axes + 9 * (n - begin), part);
    for (int k = 0; k < 12; ++k) g_view[k] += part[k];
  }
}
TZ_ISA(back_run, back_body)

template <class T>
void back_all(Sizes sizes, const Options& options, const Tensor& means, const Tensor& quats,
              const Tensor& scales, const Tensor& viewmats, const Tensor& Ks, const Above<T>& above,
              Tensor& g_means, Tensor& g_quats, Tensor& g_scales, Tensor& g_viewmats) {
  const auto views = views_of<T>(sizes, viewmats, Ks, options);
  const Splats<T> in{means.const_data_ptr<T>(), quats.const_data_ptr<T>(),
                     scales.const_data_ptr<T>()};
  T *to_means = g_means.mutable_data_ptr<T>(), *to_quats = g_quats.mutable_data_ptr<T>();
  T *to_scales = g_scales.mutable_data_ptr<T>(), *to_views = g_viewmats.mutable_data_ptr<T>();
  const int64_t C = sizes.cameras;
  std::vector<double> parts(12 * C * sizes.blocks());
  sizes.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
    T axes[9 * BLOCK] = {};
    std::fill(to_means + 3 * begin, to_means + 3 * end, T(0));
    std::fill(to_quats + 4 * begin, to_quats + 4 * end, T(0));
    std::fill(to_scales + 3 * begin, to_scales + 3 * end, T(0));
    bool seen[BLOCK] = {};
    for (int64_t c = 0; c < C; ++c) {
      const int64_t at = c * sizes.splats;
      const auto from = [&](const T* values, int64_t width) { return values ? values + width * at : nullptr; };
      const Above<T> here{above.radii + 2 * at,        above.conics + 3 * at,
                          above.compensations + at,    from(above.means, 2),
                          from(above.depths, 1),       from(above.by_conics, 3),
                          from(above.covs, 3),         from(above.by_compensations, 1)};
      back_run(&options, &views[c], in, here, begin, end, to_means, axes,
               parts.data() + 12 * (block * C + c));
      for (int64_t n = begin; n < end; ++n) seen[n - begin] |= here.radii[2 * n] > 0;
    }
    for (int64_t n = begin; n < end; ++n)
      if (seen[n - begin])  // the others may have a quaternion that is not a rotation
        projection::axes_backward(in.quats + 4 * n, in.scales + 3 * n, axes + 9 * (n - begin),
                             to_quats + 4 * n, to_scales + 3 * n);
  });
  for (int64_t c = 0; c < C; ++c) {
    double sum[12] = {};
    for (int64_t block = 0; block < sizes.blocks(); ++block)
      for (int k = 0; k < 12; ++k) sum[k] += parts[12 * (block * C + c) + k];
    for (int k = 0; k < 16; ++k) to_views[16 * c + k] = k < 12 ? T(sum[k]) : T(0);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> splat_project_backward(
    const Tensor& means_, const Tensor& quats_, const Tensor& scales_, const Tensor& viewmats_,
    const Tensor& Ks_, int64_t width, int64_t height, int64_t kernel, int64_t camera, double eps2d,
    bool antialiased, bool inria, const Tensor& radii_, const Tensor& conics_,
    const Tensor& compensations_, const MaybeTensor& g_means2d, const MaybeTensor& g_depths, const MaybeTensor& g_conics,
    const MaybeTensor& g_covs2d, const MaybeTensor& g_compensations) {
  const Tensor means = dense(means_), quats = dense(quats_), scales = dense(scales_);
  const Tensor viewmats = dense(viewmats_), Ks = dense(Ks_), radii = dense(radii_);
  const Tensor conics = dense(conics_), compensations = dense(compensations_);
  const Sizes sizes = sizes_of(means, quats, scales, viewmats, Ks);
  const ScalarType type = means.scalar_type();
  const int64_t C = sizes.cameras, N = sizes.splats;
  expect(radii, {C, N, 2}, ScalarType::Int, "radii");
  expect(conics, {C, N, 3}, type, "conics");
  expect(compensations, {C, N}, type, "compensations");
  const auto given = [&](const MaybeTensor& g, std::initializer_list<int64_t> shape, const char* name) {
    if (g) expect(*g, shape, type, name);
    return g ? MaybeTensor(dense(*g)) : MaybeTensor();
  };
  const MaybeTensor by_means = given(g_means2d, {C, N, 2}, "g_means2d"), by_depths = given(g_depths, {C, N}, "g_depths");
  const MaybeTensor by_conics = given(g_conics, {C, N, 3}, "g_conics"), by_covs = given(g_covs2d, {C, N, 3}, "g_covs2d");
  const MaybeTensor by_compensations = given(g_compensations, {C, N}, "g_compensations");
  const Options options{width, height, int(kernel), int(camera), eps2d, 0, 0, 0, 0, antialiased,
                        inria};
  Tensor g_means = fresh(means, {N, 3});
  Tensor g_quats = fresh(means, {N, 4});
  Tensor g_scales = fresh(means, {N, 3});
  Tensor g_viewmats = fresh(means, {C, 4, 4});
  const auto run = [&]<class T>(T) {
    const auto data = [](const MaybeTensor& g) { return g ? g->const_data_ptr<T>() : nullptr; };
    const Above<T> above{radii.const_data_ptr<int32_t>(),
                         conics.const_data_ptr<T>(),
                         compensations.const_data_ptr<T>(),
                         data(by_means),
                         data(by_depths),
                         data(by_conics),
                         data(by_covs),
                         data(by_compensations)};
    back_all<T>(sizes, options, means, quats, scales, viewmats, Ks, above, g_means, g_quats, g_scales,
                g_viewmats);
  };
  type == ScalarType::Float ? run(float()) : run(double());
  return {g_means, g_quats, g_scales, g_viewmats};
}

}  // namespace
}  // namespace torchzoo

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("splat_project", TORCH_BOX(&torchzoo::splat_project));
  m.impl("splat_project_backward", TORCH_BOX(&torchzoo::splat_project_backward));
}
