// What the two passes over the tiles of splat images share on a CPU.
//
// A camera's splats are packed once, a few cache lines each, with the ellipse in which they are seen.
// For a splat of a tile's list, every row of the tile gets the span of columns that lie in the ellipse
// and are still open; the spans, cut into vectors of pixels, are the only pixels that are looked at.
// Rows are padded by a vector, so that a vector begins at any column; what it covers beyond its span
// fails the test against alpha_min, or is padding that is closed from the start.
#pragma once

#include "splat_vector.h"

#include <atomic>
#include <bit>
#include <memory>
#include <new>

namespace torchzoo::splat {

constexpr int64_t LARGEST_TILE = 128;
constexpr int64_t REFRESH = 32;  // splats after which the open columns of the rows are looked up again
constexpr int64_t AHEAD = 6;     // splats of a list that are asked for beforehand

// Memory without a constructor, aligned to cache lines.
template <class T>
class Block {
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> held;

 public:
  explicit Block(int64_t size)
      : held(static_cast<T*>(::operator new(std::max<int64_t>(size, 1) * sizeof(T), std::align_val_t(64)))) {}
  T* get() const { return held.get(); }
};

// Hands out 0 … count - 1, each once, to the threads that ask; then count.
class Queue {
  std::atomic<int64_t> taken{0};
  const int64_t count;

 public:
  explicit Queue(int64_t size) : count(size) {}
  int64_t next() { return std::min(taken.fetch_add(1, std::memory_order_relaxed), count); }

  // Runs `work` on as many threads as can be busy.
  template <class Work>
  void share_out(const Work& work) {
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
    parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
  }
};

// The tensors of a call, checked as far as memory safety depends on them.
struct Scene {
  int64_t cameras, splats, features, width, height, tile, across, down;
  bool shared;  // the features, by all cameras
  Kernel kernel;
  double pixel, alpha_min, alpha_max;
  Tensor means2d, shape2d, opacities, feature, beta, backgrounds, offsets, ids;
  bool with_beta, with_backgrounds;
  ScalarType type;

  Scene(const char* op, const Tensor& means2d_, const Tensor& shape2d_, const Tensor& opacities_,
        const Tensor& features_, const std::optional<Tensor>& beta_,
        const std::optional<Tensor>& backgrounds_, const Tensor& tile_offsets, const Tensor& ids_,
        int64_t width_, int64_t height_, int64_t tile_size, int64_t kernel_, double pixel_,
        double alpha_min_, double alpha_max_)
      : cameras(means2d_.size(0)), splats(means2d_.size(1)), features(features_.size(2)),
        width(width_), height(height_), tile(tile_size), shared(features_.size(0) == 1),
        kernel(Kernel(kernel_)), pixel(pixel_), alpha_min(alpha_min_), alpha_max(alpha_max_),
        means2d(dense(means2d_)), shape2d(dense(shape2d_)), opacities(dense(opacities_)),
        feature(dense(features_)), beta(dense(beta_)), backgrounds(dense(backgrounds_)),
        offsets(dense(tile_offsets)), ids(dense(ids_)),
        with_beta(beta_), with_backgrounds(backgrounds_), type(means2d_.scalar_type()) {
    STD_TORCH_CHECK(width > 0 && height > 0 && width < (1 << 30) && height < (1 << 30),
                    op, ": width and height out of range");
    STD_TORCH_CHECK(tile > 0 && tile <= LARGEST_TILE, op, ": tile_size not in 1..", LARGEST_TILE);
    STD_TORCH_CHECK(kernel >= GAUSSIAN && kernel <= ANALYTIC, op, ": unknown kernel");
    STD_TORCH_CHECK(kernel != GENERALIZED_EXPONENTIAL || with_beta, op, ": no beta");
    across = (width + tile - 1) / tile, down = (height + tile - 1) / tile;
    const auto check = [&](const char* name, const Tensor& x, int64_t count, ScalarType wanted) {
      STD_TORCH_CHECK(x.numel() == count && x.scalar_type() == wanted, op, ": ", name,
                      " has an unexpected size or dtype");
    };
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                    ": expected float32 or float64");
    const int64_t all = cameras * splats;
    check("means2d", means2d, 2 * all, type);
    check("shape2d", shape2d, 3 * all, type);
    check("opacities", opacities, all, type);
    check("features", feature, (shared ? 1 : cameras) * splats * features, type);
    if (with_beta) check("beta", beta, splats, type);
    if (with_backgrounds) check("backgrounds", backgrounds, cameras * features, type);
    check("tile_offsets", offsets, cameras * across * down + 1, ScalarType::Long);
    check("ids", ids, ids.numel(), ScalarType::Int);
    const int64_t* at = offsets.const_data_ptr<int64_t>();
    const int64_t entries = ids.numel();
    bool sound = at[0] == 0 && at[cameras * across * down] == entries;
    for (int64_t t = 0; t < cameras * across * down; ++t) sound &= at[t] <= at[t + 1];
    STD_TORCH_CHECK(sound, op, ": tile_offsets do not cut up ids");
    const int32_t* id = ids.const_data_ptr<int32_t>();
    uint32_t largest = 0;
    for (int64_t i = 0; i < entries; ++i) largest = std::max(largest, static_cast<uint32_t>(id[i]));
    STD_TORCH_CHECK(!entries || largest < splats, op, ": ids out of range");
  }

  int64_t tiles() const { return across * down; }
  int64_t feature_of(int64_t camera) const { return shared ? 0 : camera * splats * features; }
};

// A packed splat; its features follow.
template <class T>
struct Splat {
  T x, y, opacity;
  T a, b, c;  // -½ log2 e times the conic (a, 2b, c); the conic (a, 2b, c) itself; cos, sin, s1
  T more;     // half of beta; s2
  T slope, h0, h1, reach, turn;
  T unused;

  const T* features() const { return reinterpret_cast<const T*>(this + 1); }
};

constexpr int64_t HEAD = 13;
static_assert(sizeof(Splat<float>) == HEAD * 4 && sizeof(Splat<double>) == HEAD * 8);

template <class T>
struct Packed {
  int64_t stride;
  Block<T> data;

  explicit Packed(const Scene& of)
      : stride((HEAD + of.features + 3) / 4 * 4), data(stride * of.splats) {}
  const Splat<T>& operator[](int64_t n) const {
    return *reinterpret_cast<const Splat<T>*>(data.get() + n * stride);
  }
  TZ_SPLAT void ask_for(int64_t n) const {
    __builtin_prefetch(data.get() + n * stride);
    __builtin_prefetch(data.get() + n * stride + 64 / sizeof(T));
  }
};

template <class T>
void pack(const Scene& of, int64_t camera, const Packed<T>& to) {
  const int64_t first = camera * of.splats;
  const T *means = of.means2d.const_data_ptr<T>() + 2 * first,
          *shapes = of.shape2d.const_data_ptr<T>() + 3 * first,
          *opacities = of.opacities.const_data_ptr<T>() + first,
          *features = of.feature.const_data_ptr<T>() + of.feature_of(camera),
          *betas = of.with_beta ? of.beta.const_data_ptr<T>() : nullptr;
  parallel_for(0, of.splats, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const double a = shapes[3 * n], b = shapes[3 * n + 1], c = shapes[3 * n + 2];
      const double beta = betas ? betas[n] : 2.0;
      const Region<double> seen =
          region<double>(of.kernel, a, b, c, opacities[n], beta, of.pixel, of.alpha_min);
      T* slot = to.data.get() + n * to.stride;
      Splat<T>& s = *reinterpret_cast<Splat<T>*>(slot);
      s = {means[2 * n], means[2 * n + 1], opacities[n], 0, 0, 0, 0, T(seen.slope), T(seen.h0),
           T(seen.h1), T(seen.reach), T(seen.turn), 0};
      if (of.kernel == ANALYTIC) {
        const Frame<double> axes = frame(a, b, c);
        s.a = T(axes.cos), s.b = T(axes.sin), s.c = T(axes.s1), s.more = T(axes.s2);
      } else {
        const double unit = of.kernel == GAUSSIAN ? -LOG2_E / 2 : 1.0;
        s.a = T(a * unit), s.b = T(2 * b * unit), s.c = T(c * unit), s.more = T(beta / 2);
      }
      std::copy_n(features + n * of.features, of.features, slot + HEAD);
    }
  });
}

// The tiles of a camera, those with the longest lists first: by the number of bits of their lengths.
inline std::vector<int32_t> longest_first(const int64_t* offsets, int64_t tiles) {
  int64_t counts[65] = {};
  const auto rank = [&](int64_t t) { return 64 - std::bit_width(uint64_t(offsets[t + 1] - offsets[t])); };
  for (int64_t t = 0; t < tiles; ++t) ++counts[rank(t)];
  int64_t before = 0;
  for (int64_t& count : counts) before += std::exchange(count, before);
  std::vector<int32_t> order(tiles);
  for (int64_t t = 0; t < tiles; ++t) order[counts[rank(t)]++] = static_cast<int32_t>(t);
  return order;
}

// A vector of pixels that a splat is blended into.
template <class T>
struct Item {
  int32_t offset, row;  // in a plane of the tile; its row
  T dx;                 // of the first pixel
};

// A tile's planes and its spans, for one thread.
template <int bytes, class T>
struct Tile {
  using L = Lanes<bytes, T>;
  using Vec = typename L::Vec;
  using Int = typename L::Int;
  using Whole = typename L::Whole;
  static constexpr int lanes = L::count;

  int64_t size, rows, stride, plane;
  int64_t x = 0, y = 0, wide = 0, high = 0;  // where it is, and how much of it is in the image
  T *low, *high_column;                      // the open columns of each row
  T *d, *by_x, *constant;                    // a splat's dy in each row, and what it makes of the form
  Whole *from, *to;
  Item<T>* items;
  Block<T> reals;
  Block<Whole> wholes;
  Block<Item<T>> listed;

  explicit Tile(int64_t tile)
      : size(tile), rows((tile + lanes - 1) / lanes * lanes),
        stride((tile + 2 * lanes - 1) / lanes * lanes), plane(rows * stride), reals(5 * rows),
        wholes(2 * rows), listed(tile * (tile / lanes + 1) + 1) {
    low = reals.get(), high_column = low + rows, d = low + 2 * rows, by_x = low + 3 * rows,
    constant = low + 4 * rows;
    from = wholes.get(), to = from + rows;
    items = listed.get();
  }

  TZ_SPLAT void place(const Scene& of, int64_t t) {
    x = t % of.across * size, y = t / of.across * size;
    wide = std::min(size, of.width - x), high = std::min(size, of.height - y);
    std::fill_n(low, 2 * rows, T(0));
  }

  // The vectors that the splat's spans make; how many there are.
  template <Kernel kernel>
  TZ_SPLAT int64_t spans(const Splat<T>& s, T margin) {
    const T sx = s.x - (T(x) + T(0.5)), sy = s.y - (T(y) + T(0.5));
    const T reach = s.reach + margin + T(0.02);
    // Rows with |row - sy| <= reach; NaN gives all of them.
    const T top = sy - reach, bottom = sy + reach;
    const int64_t first = top > 0 ? (top < T(high) ? int64_t(top) + 1 : high) : 0;
    const int64_t last = bottom < T(high) ? (bottom >= 0 ? int64_t(bottom) + 1 : 0) : high;
    const Vec zero = {}, slack = zero + (margin + T(0.02));
    for (int64_t r = first / lanes * lanes; r < last; r += lanes) {
      const Vec down = L::ramp() + (T(r) - sy);  // from the mean
      Vec at_right = down, at_left = down;
      if constexpr (kernel == ANALYTIC) {
        const Vec above = most(down - margin, zero - s.reach), below = least(down + margin, zero + s.reach);
        at_right = least(most(zero + s.turn, above), below);
        at_left = least(most(zero - s.turn, above), below);
      }
      Vec right = L::sqrt(most(s.h0 - s.h1 * (at_right * at_right), zero));
      Vec left = right;
      if constexpr (kernel == ANALYTIC) left = L::sqrt(most(s.h0 - s.h1 * (at_left * at_left), zero));
      right = (sx - s.slope * at_right) + right + slack + T(1);
      left = (sx - s.slope * at_left) - left - slack + T(1);
      const Vec open = L::load(low + r), closed = L::load(high_column + r);
      L::store(from + r, __builtin_convertvector(left > open ? (left < closed ? left : closed) : open, Int));
      L::store(to + r, __builtin_convertvector(right < closed ? (right > open ? right : open) : closed, Int));
      L::store(d + r, -down);
      if constexpr (kernel != ANALYTIC) {
        L::store(by_x + r, s.b * -down);
        L::store(constant + r, s.c * (down * down));
      } else {
        L::store(by_x + r, s.b * -down);      // of u
        L::store(constant + r, s.a * -down);  // of v
      }
    }
    int64_t count = 0;
    for (int64_t r = first; r < last; ++r)
      for (int64_t k = 0; k < size; k += lanes) {
        const int64_t column = from[r] + k;
        items[count] = {static_cast<int32_t>(r * stride + column), static_cast<int32_t>(r), sx - T(column)};
        count += column < to[r];
      }
    return count;
  }
};

// A splat's weights in a tile, a vector of pixels at a time.
template <int bytes, class T, Kernel kernel>
struct Shading {
  using F = Functions<bytes, T>;
  using Vec = typename F::Vec;

  const Splat<T>& s;
  const Tile<bytes, T>& tile;
  T half, scale, inverse1, inverse2;  // of the analytic window

  TZ_SPLAT Shading(const Splat<T>& splat, const Tile<bytes, T>& in, double pixel)
      : s(splat), tile(in), half(T(pixel / 2)), scale(T(2 * PI / (pixel * pixel))) {
    if constexpr (kernel == ANALYTIC) inverse1 = T(1) / s.c, inverse2 = T(1) / s.more;
  }

  TZ_SPLAT Vec form(Vec dx, int64_t row) const {
    dx = opaque(dx);
    return opaque((s.a * dx + tile.by_x[row]) * dx + tile.constant[row]);
  }
  TZ_SPLAT Vec along(Vec dx, int64_t row) const { return opaque(s.a * opaque(dx) + tile.by_x[row]); }
  TZ_SPLAT Vec across(Vec dx, int64_t row) const { return opaque(tile.constant[row] - s.b * opaque(dx)); }

  TZ_SPLAT Exponential<Vec> exponential(Vec form) const {
    return generalized_exponential<F>(form, Vec{} + s.more);
  }
  TZ_SPLAT Integral<Vec> first(Vec u) const {
    return integral<F>(u, Vec{} + s.c, Vec{} + inverse1, Vec{} + half);
  }
  TZ_SPLAT Integral<Vec> second(Vec v) const {
    return integral<F>(v, Vec{} + s.more, Vec{} + inverse2, Vec{} + half);
  }

  TZ_SPLAT Vec weight(Vec dx, int64_t row) const {
    if constexpr (kernel == GAUSSIAN) return gaussian<F>(form(dx, row));
    else if constexpr (kernel == GENERALIZED_EXPONENTIAL) return exponential(form(dx, row)).weight;
    else return first(along(dx, row)).value * second(across(dx, row)).value * scale;
  }
};

// What a pass is compiled for; `channels` is the number of features where that is known, else 0.
template <class T_, Kernel kernel_, int channels_>
struct Variant {
  using T = T_;
  static constexpr Kernel kernel = kernel_;
  static constexpr int channels = channels_;
};

template <Kernel kernel, class Op>
void with_channels(const Scene& of, const Op& op) {
  if (of.type == ScalarType::Double) return op(Variant<double, kernel, 0>{});
  switch (of.features) {
    case 1: return op(Variant<float, kernel, 1>{});
    case 3: return op(Variant<float, kernel, 3>{});
    case 4: return op(Variant<float, kernel, 4>{});
    default: return op(Variant<float, kernel, 0>{});
  }
}

template <class Op>
void with_variant(const Scene& of, const Op& op) {
  if (of.kernel == GAUSSIAN) return with_channels<GAUSSIAN>(of, op);
  if (of.kernel == ANALYTIC) return with_channels<ANALYTIC>(of, op);
  with_channels<GENERALIZED_EXPONENTIAL>(of, op);
}

}  // namespace torchzoo::splat
