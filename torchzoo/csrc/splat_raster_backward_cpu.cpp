// splat_raster_backward: gradients of what was blended, back to front, a tile of the image at a time.
//
// A pixel keeps two numbers: T in front of the splat, restored by T / (1 - α), and the part of the
// gradient that comes from behind it, ρ = Σ (g·f_j) α_j T_j + T_end (g·background + g_T). Then
// g_α = T (g·f) - ρ / (1 - α).
//
// A tile writes the sums over its pixels to a row for each splat of its list, at a place where the rows
// of a splat lie one after the other; a second pass adds these up. No atomics, and always the same
// order: the result is the same, bit for bit, for any number of threads.
#include "splat_tile.h"

namespace torchzoo::splat {
namespace {

// A row: sums over pixels, with k = w g_α where α is below its maximum, and d = (dx, dy).
//   conics:    k, kq dx, kq dy, kq dx², kq dx dy, kq dy² for g_q = -½ o kq
//   analytic:  k, and for g_u = o k_u and so on: k_u, k_v, k_s1, k_s2, k_u v - k_v u
// then the features' gradients; k ∂w/∂β / w, up to its constant; the absolute gradients of the mean.
constexpr int64_t SHAPE = 6;

struct Gradients {
  const void *final_t, *g_image, *g_final_t;
  const int32_t* last;
  void* rows;
  const int64_t* places;  // of the rows, in the order of the lists
  int64_t width;          // of a row
  bool absolute;
};

template <int bytes, class T, Kernel kernel>
struct Sums {
  using L = Lanes<bytes, T>;
  using Vec = typename L::Vec;
  Vec shape[SHAPE] = {}, beta = {}, abs_x = {}, abs_y = {};

  // g_α in a vector of pixels; `counts` are those that α can change, and whose gradient it is.
  TZ_SPLAT void add(const Shading<bytes, T, kernel>& shading, Vec dx, int64_t row, Vec w, Vec g_alpha,
                    typename L::Int counts, bool absolute) {
    const Splat<T>& s = shading.s;
    const T dy = shading.tile.d[row];
    const Vec k = (Vec)((typename L::Int)(w * g_alpha) & counts);
    shape[0] += k;
    if constexpr (kernel == ANALYTIC) {
      const Vec u = shading.along(dx, row), v = shading.across(dx, row);
      const Integral<Vec> first = shading.first(u), second = shading.second(v);
      const Vec g = (Vec)((typename L::Int)(g_alpha * shading.scale) & counts);
      const Vec by_first = g * second.value, by_second = g * first.value;
      const Vec ku = by_first * first.along, kv = by_second * second.along;
      shape[1] += ku;
      shape[2] += kv;
      shape[3] += by_first * first.width;
      shape[4] += by_second * second.width;
      shape[5] += ku * v - kv * u;
      if (absolute) {
        const Vec gx = ku * s.a - kv * s.b, gy = ku * s.b + kv * s.a;
        abs_x += most(gx, -gx);
        abs_y += most(gy, -gy);
      }
    } else {
      Vec kq = k;
      if constexpr (kernel == GENERALIZED_EXPONENTIAL) {
        const Exponential<Vec> of = shading.exponential(shading.form(dx, row));
        kq = (Vec)((typename L::Int)(k * of.rate) & counts);
        beta += (Vec)((typename L::Int)(k * of.beta) & counts);
      }
      const Vec kx = kq * dx, ky = kq * dy;
      shape[1] += kx;
      shape[2] += ky;
      shape[3] += kx * dx;
      shape[4] += kx * dy;
      shape[5] += ky * dy;
      if (absolute) {
        const Vec gx = kx * s.a + ky * (s.b / 2), gy = kx * (s.b / 2) + ky * s.c;
        abs_x += most(gx, -gx);
        abs_y += most(gy, -gy);
      }
    }
  }
};

// The tiles that the queue hands out.
template <int width, class V, class T = typename V::T>
TZ_INLINE void gradient_body(V, const Scene* scene, const Packed<T>* packed, const Gradients* gradients,
                             const int32_t* order, int64_t camera, Queue* queue) {
  constexpr int bytes = std::min(width, 32), channels = V::channels;
  constexpr Kernel kernel = V::kernel;
  using L = Lanes<bytes, T>;
  using Vec = typename L::Vec;
  using Int = typename L::Int;
  using Whole = typename L::Whole;
  const Scene& of = *scene;
  const Gradients& with = *gradients;
  const Packed<T>& splats = *packed;
  const int64_t count = channels ? channels : of.features;
  Tile<bytes, T> tile(of.tile);
  const int64_t plane = tile.plane;
  Block<T> reals((2 + count) * plane), totals(channels ? 1 : count * L::count);
  Block<Whole> wholes(plane);
  T *left = reals.get(), *behind = left + plane, *upstream = behind + plane;
  Whole* last = wholes.get();
  const T margin = kernel == ANALYTIC ? T(GROWN * of.pixel) : T(0);
  const Vec zero = {}, one = zero + T(1), ramp = L::ramp();
  const Vec alpha_min = zero + std::max(T(of.alpha_min), std::numeric_limits<T>::denorm_min());
  const T most_alpha = std::min(T(of.alpha_max), T(1) - std::numeric_limits<T>::epsilon() / 2);
  const Vec alpha_max = zero + most_alpha;
  const T* backgrounds = of.with_backgrounds ? of.backgrounds.template const_data_ptr<T>() + camera * count : nullptr;
  const int64_t* offsets = of.offsets.template const_data_ptr<int64_t>() + camera * of.tiles();
  for (int64_t taken; (taken = queue->next()) < of.tiles();) {
    const int64_t t = order[taken], length = offsets[t + 1] - offsets[t];
    if (!length) continue;
    const int32_t* ids = of.ids.template const_data_ptr<int32_t>() + offsets[t];
    const int64_t* places = with.places + (offsets[t] - offsets[0]);
    tile.place(of, t);
    std::fill_n(left, plane, T(1));
    std::fill_n(behind, plane, T(0));
    std::fill_n(upstream, count * plane, T(0));
    std::fill_n(last, plane, Whole(0));
    int64_t used = 0;
    for (int64_t r = 0; r < tile.high; ++r) {
      const int64_t at = (camera * of.height + tile.y + r) * of.width + tile.x;
      for (int64_t c = 0; c < tile.wide; ++c) {
        const int64_t to = r * tile.stride + c;
        const T* g = static_cast<const T*>(with.g_image) + (at + c) * count;
        T sum = static_cast<const T*>(with.g_final_t)[at + c];
        for (int64_t ch = 0; ch < count; ++ch) {
          upstream[ch * plane + to] = g[ch];
          if (backgrounds) sum += g[ch] * backgrounds[ch];
        }
        left[to] = static_cast<const T*>(with.final_t)[at + c];
        behind[to] = left[to] * sum;
        last[to] = with.last[at + c];
        used = std::max<int64_t>(used, last[to]);
      }
    }
    used = std::min(used, length);
    for (int64_t j = used; j < length; ++j)
      std::fill_n(static_cast<T*>(with.rows) + places[j] * with.width, with.width, T(0));
    int64_t refresh = used;
    for (int64_t j = used - 1; j >= 0; --j) {
      if (j < refresh) {  // the columns that are open to some of the splats up to the next time
        refresh = std::max<int64_t>(0, j + 1 - REFRESH);
        for (int64_t r = 0; r < tile.high; ++r) {
          const Whole* row = last + r * tile.stride;
          int64_t a = 0, b = tile.wide;
          while (a < b && row[a] <= refresh) ++a;
          while (a < b && row[b - 1] <= refresh) --b;
          tile.low[r] = T(a), tile.high_column[r] = T(b);
        }
      }
      if (j >= AHEAD) splats.ask_for(ids[j - AHEAD]);
      const Splat<T>& s = splats[ids[j]];
      const int64_t items = tile.template spans<kernel>(s, margin);
      T* out = static_cast<T*>(with.rows) + places[j] * with.width;
      if (!items) {
        std::fill_n(out, with.width, T(0));
        continue;
      }
      const Shading<bytes, T, kernel> shading(s, tile, of.pixel);
      const T* f = s.features();
      Vec feature[channels ? channels : 1], g_feature[channels ? channels : 1] = {};
      for (int ch = 0; ch < channels; ++ch) feature[ch] = zero + f[ch];
      if constexpr (!channels) std::fill_n(totals.get(), count * L::count, T(0));
      Sums<bytes, T, kernel> sums;
      const Int place = Int{} + static_cast<Whole>(j);
      const Vec opacity = zero + s.opacity;
      for (int64_t i = 0; i < items; ++i) {
        const Item<T>& item = tile.items[i];
        const Vec dx = item.dx - ramp, w = opaque(shading.weight(dx, item.row)), seen = opacity * w;
        const Int blended = (seen >= alpha_min) & (L::load(last + item.offset) > place);
        const Vec alpha = (Vec)((Int)least(seen, alpha_max) & blended);
        const Vec inverse = one / (one - alpha);
        T* at = left + item.offset;
        const Vec before = L::load(at) * inverse, share = alpha * before;
        L::store(at, before);
        const T* g = upstream + item.offset;
        Vec product = zero;
        if constexpr (channels) {
          for (int ch = 0; ch < channels; ++ch, g += plane) {
            const Vec of_channel = L::load(g);
            product += of_channel * feature[ch];
            g_feature[ch] += of_channel * share;
          }
        } else {
          for (int64_t ch = 0; ch < count; ++ch, g += plane) {
            const Vec of_channel = L::load(g);
            product += of_channel * f[ch];
            T* total = totals.get() + ch * L::count;
            L::store(total, L::load(total) + of_channel * share);
          }
        }
        const Vec rest = L::load(behind + item.offset);
        L::store(behind + item.offset, rest + product * share);
        sums.add(shading, dx, item.row, w, before * product - rest * inverse,
                 blended & (seen <= alpha_max), with.absolute);
      }
      for (int64_t k = 0; k < SHAPE; ++k) *out++ = L::sum(sums.shape[k]);
      if constexpr (channels) {
        for (int ch = 0; ch < channels; ++ch) *out++ = L::sum(g_feature[ch]);
      } else {
        for (int64_t ch = 0; ch < count; ++ch) *out++ = L::sum(L::load(totals.get() + ch * L::count));
      }
      if constexpr (kernel == GENERALIZED_EXPONENTIAL) *out++ = L::sum(sums.beta);
      if (with.absolute) {
        // Of the packed conic: -½ log2 e of it for the Gaussian.
        const T unit = kernel == GAUSSIAN ? T(2 / LOG2_E) : T(1);
        *out++ = s.opacity * unit * L::sum(sums.abs_x);
        *out++ = s.opacity * unit * L::sum(sums.abs_y);
      }
    }
  }
}
TZ_ISA(gradient_tiles, gradient_body)

// Where the rows of each splat begin (splats + 1), and the place of each entry of a camera's lists.
struct Rows {
  std::vector<int64_t> first;
  Block<int64_t> places;

  Rows(const int32_t* ids, int64_t count, int64_t splats) : first(splats + 2), places(count) {
    for (int64_t i = 0; i < count; ++i) ++first[ids[i] + 2];
    for (int64_t n = 2; n < splats + 2; ++n) first[n] += first[n - 1];
    for (int64_t i = 0; i < count; ++i) places.get()[i] = first[ids[i] + 1]++;
  }
};

struct Results {
  Tensor means2d, shape2d, opacities, features, beta, absolute;
};

// The gradients of the conic or covariance and of the mean, from a splat's sums.
template <class T>
void finish(const Scene& of, const T* shape, T opacity, const T* sums, T* g_mean, T* g_shape) {
  if (of.kernel != ANALYTIC) {
    g_mean[0] = -opacity * (shape[0] * sums[1] + shape[1] * sums[2]);
    g_mean[1] = -opacity * (shape[1] * sums[1] + shape[2] * sums[2]);
    g_shape[0] = -opacity / 2 * sums[3];
    g_shape[1] = -opacity * sums[4];
    g_shape[2] = -opacity / 2 * sums[5];
    return;
  }
  const Frame<double> axes = frame<double>(shape[0], shape[1], shape[2]);
  const double cos = axes.cos, sin = axes.sin, o = opacity;
  g_mean[0] = T(o * (sums[1] * cos - sums[2] * sin));
  g_mean[1] = T(o * (sums[1] * sin + sums[2] * cos));
  const double g1 = axes.free1 ? o * sums[3] / (2 * axes.s1) : 0;
  const double g2 = axes.free2 ? o * sums[4] / (2 * axes.s2) : 0;
  const double turn = axes.gap > 0 ? o * sums[5] / axes.gap : 0;  // of the symmetric part, twice
  g_shape[0] = T(g1 * cos * cos + g2 * sin * sin - turn * cos * sin);
  g_shape[1] = T(2 * (g1 - g2) * cos * sin + turn * (cos * cos - sin * sin));
  g_shape[2] = T(g1 * sin * sin + g2 * cos * cos + turn * cos * sin);
}

template <class T>
void add_up(const Scene& of, int64_t camera, const Rows& rows, const T* from, int64_t width, bool absolute,
            Results& to) {
  const int64_t first = camera * of.splats, count = of.features;
  const T* shapes = of.shape2d.const_data_ptr<T>() + 3 * first;
  const T* opacities = of.opacities.const_data_ptr<T>() + first;
  T *g_means = to.means2d.mutable_data_ptr<T>() + 2 * first,
    *g_shapes = to.shape2d.mutable_data_ptr<T>() + 3 * first,
    *g_opacities = to.opacities.mutable_data_ptr<T>() + first,
    *g_features = to.features.mutable_data_ptr<T>() + of.feature_of(camera),
    *g_beta = of.with_beta ? to.beta.mutable_data_ptr<T>() : nullptr,
    *g_abs = absolute ? to.absolute.mutable_data_ptr<T>() + 2 * first : nullptr;
  parallel_for(0, of.splats, 256, [&](int64_t begin, int64_t end) {
    std::vector<T> sums(width);
    for (int64_t n = begin; n < end; ++n) {
      if (rows.first[n] == rows.first[n + 1]) continue;  // all are zeros already
      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t r = rows.first[n]; r < rows.first[n + 1]; ++r)
        for (int64_t k = 0; k < width; ++k) sums[k] += from[r * width + k];
      const T* s = sums.data();
      finish(of, shapes + 3 * n, opacities[n], s, g_means + 2 * n, g_shapes + 3 * n);
      g_opacities[n] = s[0];
      s += SHAPE;
      for (int64_t ch = 0; ch < count; ++ch) g_features[n * count + ch] += s[ch];
      s += count;
      if (of.kernel == GENERALIZED_EXPONENTIAL) g_beta[n] += opacities[n] * *s++ / -4;
      if (absolute) g_abs[2 * n] = s[0], g_abs[2 * n + 1] = s[1];
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> splat_raster_backward(
    const Tensor& means2d, const Tensor& shape2d, const Tensor& opacities, const Tensor& features,
    std::optional<Tensor> beta, std::optional<Tensor> backgrounds, const Tensor& tile_offsets,
    const Tensor& ids, int64_t width, int64_t height, int64_t tile_size, int64_t kernel, double pixel,
    double alpha_min, double alpha_max, const Tensor& final_t, const Tensor& last, const Tensor& g_image,
    const Tensor& g_final_t, bool absgrad, bool) {
  const Scene of("splat_raster_backward", means2d, shape2d, opacities, features, beta, backgrounds,
                 tile_offsets, ids, width, height, tile_size, kernel, pixel, alpha_min, alpha_max);
  const int64_t pixels = of.cameras * height * width;
  const Tensor rest = torch::stable::contiguous(final_t), ends = torch::stable::contiguous(last),
               g = torch::stable::contiguous(g_image), g_rest = torch::stable::contiguous(g_final_t);
  STD_TORCH_CHECK(rest.numel() == pixels && ends.numel() == pixels && g_rest.numel() == pixels &&
                      g.numel() == pixels * of.features && rest.scalar_type() == of.type &&
                      g.scalar_type() == of.type && g_rest.scalar_type() == of.type &&
                      ends.scalar_type() == ScalarType::Int,
                  "splat_raster_backward: what came from the forward pass has another size or dtype");
  const auto zeros = [&](const Tensor& like) { return torch::stable::fill_(fresh(like), 0); };
  const auto nothing = [&] { return fresh(means2d, {0}); };
  Results to{zeros(of.means2d), zeros(of.shape2d), zeros(of.opacities), zeros(of.feature),
             of.with_beta ? zeros(of.beta) : nothing(), absgrad ? zeros(of.means2d) : nothing()};
  Gradients with{rest.const_data_ptr(), g.const_data_ptr(), g_rest.const_data_ptr(),
                 ends.const_data_ptr<int32_t>(), nullptr, nullptr, 0, absgrad};
  with.width = SHAPE + of.features + (of.kernel == GENERALIZED_EXPONENTIAL) + 2 * absgrad;
  with_variant(of, [&]<class V>(V variant) {
    using T = typename V::T;
    const Packed<T> splats(of);
    for (int64_t camera = 0; camera < of.cameras; ++camera) {
      const int64_t* offsets = of.offsets.template const_data_ptr<int64_t>() + camera * of.tiles();
      const int64_t count = offsets[of.tiles()] - offsets[0];
      if (!count) continue;
      const Rows rows(of.ids.template const_data_ptr<int32_t>() + offsets[0], count, of.splats);
      const Block<T> sums(count * with.width);
      with.rows = sums.get(), with.places = rows.places.get();
      pack(of, camera, splats);
      const std::vector<int32_t> order = longest_first(offsets, of.tiles());
      Queue queue(of.tiles());
      queue.share_out([&] { gradient_tiles(variant, &of, &splats, &with, order.data(), camera, &queue); });
      add_up<T>(of, camera, rows, sums.get(), with.width, absgrad, to);
    }
  });
  return {to.means2d, to.shape2d, to.opacities, to.features, to.beta, to.absolute};
}

}  // namespace
}  // namespace torchzoo::splat

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("splat_raster_backward", TORCH_BOX(&torchzoo::splat::splat_raster_backward));
}
