// splat_raster: splats blended front to back, a tile of the image at a time.
//
// A pixel that has stopped keeps its transmittance with its sign turned: it stays below any stop.
#include "splat_tile.h"

namespace torchzoo::splat {
namespace {

struct Output {
  void *image, *alpha, *final_t, *median_depth;
  int32_t* last;
  const void* depths;
  const bool* mask;  // may be null
  double t_stop;
};

// The tiles that the queue hands out.
template <int width, class V, class T = typename V::T>
TZ_INLINE void raster_body(V, const Scene* scene, const Packed<T>* packed, const Output* output,
                           const int32_t* order, int64_t camera, Queue* queue) {
  constexpr int bytes = std::min(width, 32), channels = V::channels;  // wider: few lanes of use in a row
  constexpr Kernel kernel = V::kernel;
  using L = Lanes<bytes, T>;
  using Vec = typename L::Vec;
  using Int = typename L::Int;
  using Whole = typename L::Whole;
  const Scene& of = *scene;
  const Packed<T>& splats = *packed;
  const int64_t count = channels ? channels : of.features;
  Tile<bytes, T> tile(of.tile);
  const int64_t plane = tile.plane;
  Block<T> reals((1 + count) * plane);
  Block<Whole> wholes(2 * plane);
  T *left = reals.get(), *sums = left + plane;
  Whole *last = wholes.get(), *median = last + plane;
  const T margin = kernel == ANALYTIC ? T(GROWN * of.pixel) : T(0);
  const Vec zero = {}, ramp = L::ramp();
  const Vec alpha_min = zero + std::max(T(of.alpha_min), std::numeric_limits<T>::denorm_min());
  const Vec alpha_max = zero + std::min(T(of.alpha_max), T(1) - std::numeric_limits<T>::epsilon() / 2);
  const Vec stop = zero + T(output->t_stop);
  const Int sign = Int{} + std::numeric_limits<Whole>::min();
  const T* backgrounds = of.with_backgrounds ? of.backgrounds.template const_data_ptr<T>() + camera * count : nullptr;
  const int64_t* offsets = of.offsets.template const_data_ptr<int64_t>() + camera * of.tiles();
  for (int64_t taken; (taken = queue->next()) < of.tiles();) {
    const int64_t t = order[taken], length = offsets[t + 1] - offsets[t];
    const int32_t* ids = of.ids.template const_data_ptr<int32_t>() + offsets[t];
    tile.place(of, t);
    std::fill_n(left, plane, T(-1));
    std::fill_n(sums, count * plane, T(0));
    std::fill_n(last, plane, Whole(0));
    std::fill_n(median, plane, Whole(-1));
    for (int64_t r = 0; r < tile.high; ++r) {
      const int64_t at = (camera * of.height + tile.y + r) * of.width + tile.x;
      for (int64_t c = 0; c < tile.wide; ++c)
        if (!output->mask || output->mask[at + c]) left[r * tile.stride + c] = 1;
      tile.low[r] = 0, tile.high_column[r] = T(tile.wide);
    }
    for (int64_t j = 0; j < length; ++j) {
      if (j % REFRESH == 0) {
        bool open = false;
        for (int64_t r = 0; r < tile.high; ++r) {
          const T* row = left + r * tile.stride;
          int64_t a = int64_t(tile.low[r]), b = int64_t(tile.high_column[r]);
          while (a < b && row[a] < 0) ++a;
          while (a < b && row[b - 1] < 0) --b;
          tile.low[r] = T(a), tile.high_column[r] = T(b);
          open |= a < b;
        }
        if (!open) break;
      }
      if (j + AHEAD < length) splats.ask_for(ids[j + AHEAD]);
      const Splat<T>& s = splats[ids[j]];
      const int64_t items = tile.template spans<kernel>(s, margin);
      if (!items) continue;
      const Shading<bytes, T, kernel> shading(s, tile, of.pixel);
      const T* f = s.features();
      Vec feature[channels ? channels : 1];
      for (int ch = 0; ch < channels; ++ch) feature[ch] = zero + f[ch];
      const Int place = (Int{} + static_cast<Whole>(j + 1));
      const Vec opacity = zero + s.opacity;
      for (int64_t i = 0; i < items; ++i) {
        const Item<T>& item = tile.items[i];
        const Vec seen = opacity * shading.weight(item.dx - ramp, item.row);
        const Vec alpha = least(seen, alpha_max);
        T* at = left + item.offset;
        const Vec before = L::load(at), after = before - before * alpha;
        const Int counts = seen >= alpha_min, blends = counts & (after > stop);
        L::store(at, blends ? after : (counts ? (Vec)((Int)before | sign) : before));
        const Vec share = (Vec)((Int)(before * alpha) & blends);
        T* sum = sums + item.offset;
        if constexpr (channels) {
          for (int ch = 0; ch < channels; ++ch, sum += plane) L::store(sum, L::load(sum) + share * feature[ch]);
        } else {
          for (int64_t ch = 0; ch < count; ++ch, sum += plane) L::store(sum, L::load(sum) + share * f[ch]);
        }
        L::store(last + item.offset, blends ? place : L::load(last + item.offset));
        const Int crosses = blends & (before >= T(0.5)) & (after < T(0.5));
        if (L::any(crosses))
          L::store(median + item.offset,
                   crosses ? Int{} + static_cast<Whole>(ids[j]) : L::load(median + item.offset));
      }
    }
    T *image = static_cast<T*>(output->image), *covered = static_cast<T*>(output->alpha),
      *final_t = static_cast<T*>(output->final_t), *median_depth = static_cast<T*>(output->median_depth);
    const T* depths = static_cast<const T*>(output->depths) + camera * of.splats;
    for (int64_t r = 0; r < tile.high; ++r) {
      const int64_t at = (camera * of.height + tile.y + r) * of.width + tile.x;
      for (int64_t c = 0; c < tile.wide; ++c) {
        const int64_t from = r * tile.stride + c;
        const T rest = left[from] < 0 ? -left[from] : left[from];
        covered[at + c] = 1 - rest;
        final_t[at + c] = rest;
        output->last[at + c] = static_cast<int32_t>(last[from]);
        median_depth[at + c] = median[from] < 0 ? T(0) : depths[median[from]];
        T* pixel = image + (at + c) * count;
        for (int64_t ch = 0; ch < count; ++ch)
          pixel[ch] = sums[ch * plane + from] + (backgrounds ? rest * backgrounds[ch] : T(0));
      }
    }
  }
}

TZ_ISA(raster_tiles, raster_body)

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> splat_raster(
    const Tensor& means2d, const Tensor& shape2d, const Tensor& opacities, const Tensor& features,
    std::optional<Tensor> beta, std::optional<Tensor> backgrounds, const Tensor& depths,
    std::optional<Tensor> pixel_mask, const Tensor& tile_offsets, const Tensor& ids, int64_t width,
    int64_t height, int64_t tile_size, int64_t kernel, double pixel, double alpha_min, double alpha_max,
    double t_stop, bool inria) {
  const Scene of("splat_raster", means2d, shape2d, opacities, features, beta, backgrounds, tile_offsets,
                 ids, width, height, tile_size, kernel, pixel, alpha_min, alpha_max);
  const int64_t c = of.cameras;
  const Tensor z = dense(depths), mask = dense(pixel_mask);
  STD_TORCH_CHECK(z.numel() == c * of.splats && z.scalar_type() == of.type,
                  "splat_raster: depths has an unexpected size or dtype");
  Tensor image = fresh(means2d, {c, height, width, of.features}), alpha = fresh(means2d, {c, height, width}),
         final_t = fresh(means2d, {c, height, width}), median_depth = fresh(means2d, {c, height, width}),
         last = fresh(means2d, {c, height, width}, ScalarType::Int);
  Output to{image.mutable_data_ptr(), alpha.mutable_data_ptr(), final_t.mutable_data_ptr(),
            median_depth.mutable_data_ptr(), last.mutable_data_ptr<int32_t>(), z.const_data_ptr(), nullptr, t_stop};
  if (pixel_mask) {
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.numel() == c * height * width,
                    "splat_raster: pixel_mask has an unexpected size or dtype");
    to.mask = mask.const_data_ptr<bool>();
  }
  with_variant(of, [&]<class V>(V variant) {
    using T = typename V::T;
    // It goes on where T' > t_stop, or where T' >= t_stop, which is T' > the number below.
    if (inria) to.t_stop = std::nextafter(T(t_stop), -std::numeric_limits<T>::infinity());
    const Packed<T> splats(of);
    for (int64_t camera = 0; camera < c; ++camera) {
      const int64_t* offsets = of.offsets.template const_data_ptr<int64_t>() + camera * of.tiles();
      if (offsets[0] < offsets[of.tiles()]) pack(of, camera, splats);
      const std::vector<int32_t> order = longest_first(offsets, of.tiles());
      Queue queue(of.tiles());
      queue.share_out([&] { raster_tiles(variant, &of, &splats, &to, order.data(), camera, &queue); });
    }
  });
  return {image, alpha, final_t, last, median_depth};
}

}  // namespace
}  // namespace torchzoo::splat

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("splat_raster", TORCH_BOX(&torchzoo::splat::splat_raster));
}
