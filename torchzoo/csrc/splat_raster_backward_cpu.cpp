// splat_raster_backward: gradients of what was blended, back to front, a tile of the image at a time.
//
// A pixel keeps two numbers: T in front of the splat, restored by T / (1 - α), and the part of the
// gradient that comes from behind it, ρ = Σ (g·f_j) α_j T_j + T_end (g·background - g_A), A the image's
// alpha. Then g_α = T (g·f) - ρ / (1 - α).
//
// A tile writes the sums over its pixels to a row for each splat of its list; a second pass adds up the rows
// of each splat, in the order of the lists. No atomics, and always the same order: the result is the same, bit
// for bit, for any number of threads. The rows lie in the order of the lists, as those of one splat come from
// tiles side by side, which threads work on at the same time: they would share cache lines.
#include "splat_tile.h"

namespace torchzoo::splat {
namespace {

// A row: sums over pixels, with k = w g_α where α is below its maximum, and d = (dx, dy).
//   conics:    k, kq dx, kq dy, kq dx², kq dx dy, kq dy² for g_q = -½ o kq
//   analytic:  k, and for g_u = o k_u and so on: k_u, k_v, k_s1, k_s2, k_u v - k_v u
// then the features' gradients; k ∂w/∂β / w, up to its constant; the absolute gradients of the mean.
constexpr int64_t SHAPE = 6;

struct Gradients {
  const void *final_t, *g_image, *g_alpha;  // g_alpha may be null
  const int32_t* last;
  void* rows;
  int64_t width;  // of a row
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
    T* rows = static_cast<T*>(with.rows) + (offsets[t] - offsets[0]) * with.width;
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
        T sum = with.g_alpha ? -static_cast<const T*>(with.g_alpha)[at + c] : T(0);
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
    std::fill(rows + used * with.width, rows + length * with.width, T(0));
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
      T* out = rows + j * with.width;
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

// The entries of a camera's lists, those of each splat together, and where they begin (splats + 1). They are
// counted by parts, one a thread, and each part then knows where its own ones of a splat go.
struct Entries {
  std::vector<int32_t> first;
  Block<int32_t> all;

  Entries(const int32_t* ids, int64_t count, int64_t splats) : first(splats + 1), all(count) {
    STD_TORCH_CHECK(count <= INT32_MAX, "splat_raster_backward: ", count, " pairs of a splat and a tile");
    const int64_t threads = torch::stable::get_num_threads(), most = count / std::max<int64_t>(splats, 1);
    const int64_t parts = std::clamp<int64_t>(most, 1, threads);
    std::vector<std::vector<int32_t>> next(parts);
    const auto for_parts = [&](const auto& work) {
      parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) work(next[p], p * count / parts, (p + 1) * count / parts);
      });
    };
    for_parts([&](std::vector<int32_t>& counts, int64_t begin, int64_t end) {
      counts.assign(splats, 0);
      for (int64_t i = begin; i < end; ++i) ++counts[ids[i]];
    });
    int32_t before = 0;
    for (int64_t n = 0; n < splats; ++n) {
      first[n] = before;
      for (std::vector<int32_t>& counts : next) before += std::exchange(counts[n], before);
    }
    first[splats] = before;
    for_parts([&](std::vector<int32_t>& at, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) all.get()[at[ids[i]]++] = static_cast<int32_t>(i);
    });
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
void add_up(const Scene& of, int64_t camera, const Entries& entries, const T* rows, int64_t width, bool absolute,
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
    const auto clear = [&](T* numbers, int64_t each) { std::fill(numbers + begin * each, numbers + end * each, T(0)); };
    clear(g_means, 2), clear(g_shapes, 3), clear(g_opacities, 1);
    if (absolute) clear(g_abs, 2);
    if (!camera || !of.shared) clear(g_features, count);
    if (!camera && g_beta) clear(g_beta, 1);
    std::vector<T> sums(width);
    const int64_t all = entries.first[of.splats];
    const auto row = [&](int64_t r) { return rows + entries.all.get()[r] * width; };
    for (int64_t n = begin; n < end; ++n) {
      if (entries.first[n] == entries.first[n + 1]) continue;
      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t r = entries.first[n]; r < entries.first[n + 1]; ++r) {
        const T *own = row(r), *ahead = row(std::min(r + AHEAD, all - 1));
        __builtin_prefetch(ahead), __builtin_prefetch(ahead + width - 1);
        for (int64_t k = 0; k < width; ++k) sums[k] += own[k];
      }
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
    std::optional<Tensor> g_alpha, bool absgrad, bool) {
  const Scene of("splat_raster_backward", means2d, shape2d, opacities, features, beta, backgrounds,
                 tile_offsets, ids, width, height, tile_size, kernel, pixel, alpha_min, alpha_max);
  const int64_t pixels = of.cameras * height * width;
  const Tensor rest = dense(final_t), ends = dense(last), g = dense(g_image), by_alpha = dense(g_alpha);
  STD_TORCH_CHECK(rest.numel() == pixels && ends.numel() == pixels && g.numel() == pixels * of.features &&
                      rest.scalar_type() == of.type && g.scalar_type() == of.type &&
                      ends.scalar_type() == ScalarType::Int &&
                      (!g_alpha || (by_alpha.numel() == pixels && by_alpha.scalar_type() == of.type)),
                  "splat_raster_backward: what came from the forward pass has another size or dtype");
  const auto result = [&](const Tensor& like) {  // each camera writes or adds to it
    return of.cameras ? fresh(like) : torch::stable::fill_(fresh(like), 0);
  };
  const auto nothing = [&] { return fresh(means2d, {0}); };
  Results to{result(of.means2d), result(of.shape2d), result(of.opacities), result(of.feature),
             of.with_beta ? result(of.beta) : nothing(), absgrad ? result(of.means2d) : nothing()};
  Gradients with{rest.const_data_ptr(), g.const_data_ptr(), g_alpha ? by_alpha.const_data_ptr() : nullptr,
                 ends.const_data_ptr<int32_t>(), nullptr, 0, absgrad};
  with.width = SHAPE + of.features + (of.kernel == GENERALIZED_EXPONENTIAL) + 2 * absgrad;
  with_variant(of, [&]<class V>(V variant) {
    using T = typename V::T;
    const Packed<T> splats(of);
    for (int64_t camera = 0; camera < of.cameras; ++camera) {
      const int64_t* offsets = of.offsets.template const_data_ptr<int64_t>() + camera * of.tiles();
      const int64_t count = offsets[of.tiles()] - offsets[0];
      const Entries entries(of.ids.template const_data_ptr<int32_t>() + offsets[0], count, of.splats);
      const Block<T> rows(count * with.width);
      with.rows = rows.get();
      if (count) pack(of, camera, splats);
      const std::vector<int32_t> order = longest_first(offsets, of.tiles());
      Queue queue(of.tiles());
      queue.share_out([&] { gradient_tiles(variant, &of, &splats, &with, order.data(), camera, &queue); });
      add_up<T>(of, camera, entries, rows.get(), with.width, absgrad, to);
    }
  });
  return {to.means2d, to.shape2d, to.opacities, to.features, to.beta, to.absolute};
}

}  // namespace
}  // namespace torchzoo::splat

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("splat_raster_backward", TORCH_BOX(&torchzoo::splat::splat_raster_backward));
}
