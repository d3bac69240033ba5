// s3im_groups: as many windows at once as a vector has lanes. Pixels are read where they are, by the
// image's indices, and nothing is kept of a window but its similarity.
#include "cpu.h"

#include <atomic>

// Vectors are handed from one inlined function to another, so that no calling convention is met.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "s3im_groups.h"

namespace torchzoo {
namespace {

using s3im::Layout;
using s3im::Moments;
using s3im::Slope;

constexpr int64_t WORK = 1 << 14;  // numbers that a thread reads, at the least
constexpr int64_t PARTS = 16;      // of a gradient, at the most

template <class T>
struct Problem {
  Layout layout;
  const T *src, *tar;
  const int64_t* indices;
  std::atomic<bool>* misplaced;  // whether an index was out of range
};

// Windows side by side, a lane each: pixel k of lane l has the row pixels[k * lanes + l] of the sets, or is
// blank where that is -1, and in channel c the values x and y [(c * count + k) * lanes + l].
template <int lanes, class T>
struct Batch {
  std::vector<T> weights;  // of the pixels of a window
  int64_t count;
  std::vector<int64_t> pixels;
  std::vector<T> x, y;

  explicit Batch(const Layout& s)
      : weights(s.kernel * s.kernel), count(weights.size()), pixels(count * lanes),
        x(count * lanes * s.channels), y(x.size()) {
    for (int i = 0; i < s.kernel; ++i)
      for (int j = 0; j < s.kernel; ++j) weights[i * s.kernel + j] = T(s.weights[i]) * T(s.weights[j]);
  }
};

// Reads windows `first` to `last`; the lanes beyond are blank. C: the channels, or 0 for any number.
template <int C, int lanes, class T>
TZ_INLINE void read(const Problem<T>& p, int64_t first, int64_t last, Batch<lanes, T>& batch) {
  const Layout& s = p.layout;
  const int64_t channels = C ? C : s.channels, apart = batch.count * lanes, kernel = s.kernel;
  const int64_t height = s.height, width = s.width, count = s.pixels;
  const T *src = p.src, *tar = p.tar;
  int64_t* __restrict pixels = batch.pixels.data();
  T *__restrict x = batch.x.data(), *__restrict y = batch.y.data();
  bool fits = true;
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t window = first + lane;
    const int64_t top = window / s.columns * s.stride - s.margin, left = window % s.columns * s.stride - s.margin;
    int64_t at = lane;
    for (int64_t row = top; row < top + kernel; ++row) {
      const bool outside = window >= last || row < 0 || row >= height;
      const int64_t* indices = p.indices + row * width;
      for (int64_t column = left; column < left + kernel; ++column, at += lanes) {
        int64_t pixel = -1;
        if (!outside && column >= 0 && column < width) {
          pixel = indices[column];
          if (pixel < 0 || pixel >= count) fits = false, pixel = -1;
        }
        pixels[at] = pixel;
        if (pixel < 0) {
          for (int64_t c = 0; c < channels; ++c) x[c * apart + at] = y[c * apart + at] = T(0);
          continue;
        }
        const T *one = src + pixel * channels, *other = tar + pixel * channels;
        for (int64_t c = 0; c < channels; ++c) x[c * apart + at] = one[c], y[c * apart + at] = other[c];
      }
    }
  }
  if (!fits) p.misplaced->store(true, std::memory_order_relaxed);
}

template <int lanes, class T>
TZ_INLINE void read(const Problem<T>& p, int64_t first, int64_t last, Batch<lanes, T>& batch) {
  if (p.layout.channels == 3) return read<3>(p, first, last, batch);
  read<0>(p, first, last, batch);
}

template <int bytes, class T>
struct Lanes {
  typedef T Vec __attribute__((vector_size(bytes)));
  typedef T Loose __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
  static constexpr int count = bytes / sizeof(T);
};

// The moments of a channel, whose values begin at x and y.
template <int bytes, class T, class Vec = typename Lanes<bytes, T>::Vec>
TZ_INLINE Moments<Vec> moments(const std::vector<T>& weights, const T* x, const T* y) {
  using Loose = typename Lanes<bytes, T>::Loose;
  const Loose *xs = reinterpret_cast<const Loose*>(x), *ys = reinterpret_cast<const Loose*>(y);
  const int64_t count = weights.size();
  Moments<Vec> sums = {};
  for (int64_t k = 0; k < count; ++k) sums.mx += weights[k] * xs[k], sums.my += weights[k] * ys[k];
  for (int64_t k = 0; k < count; ++k) {
    const Vec dx = xs[k] - sums.mx, dy = ys[k] - sums.my;
    sums.spread += weights[k] * (dx * dx + dy * dy), sums.covariance += weights[k] * dx * dy;
  }
  return sums;
}

template <int bytes, class T>
TZ_INLINE void forward_body(const Problem<T>* p, int64_t begin, int64_t end, T* out) {
  using Vec = typename Lanes<bytes, T>::Vec;
  constexpr int lanes = Lanes<bytes, T>::count;
  const Layout& s = p->layout;
  const T c1 = T(s.c1), c2 = T(s.c2);
  Batch<lanes, T> batch(s);
  for (int64_t first = begin; first < end; first += lanes) {
    read(*p, first, end, batch);
    for (int64_t c = 0; c < s.channels; ++c) {
      const int64_t at = c * batch.count * lanes;
      const Vec found = s3im::similarity(
          moments<bytes>(batch.weights, batch.x.data() + at, batch.y.data() + at), c1, c2);
      for (int64_t lane = 0; lane < std::min<int64_t>(lanes, end - first); ++lane)
        out[(first + lane) * s.channels + c] = found[lane];
    }
  }
}
TZ_ISA(forward, forward_body)

// Adds to `to` window by window, whatever the lanes are.
template <int C, int lanes, class T>
TZ_INLINE void add(const Layout& s, const Batch<lanes, T>& batch, const T* x, int64_t used, T* to) {
  const int64_t channels = C ? C : s.channels, apart = batch.count * lanes;
  for (int64_t lane = 0; lane < used; ++lane)
    for (int64_t at = lane; at < apart; at += lanes)
      if (const int64_t pixel = batch.pixels[at]; pixel >= 0)
        for (int64_t c = 0; c < channels; ++c) to[pixel * channels + c] += x[c * apart + at];
}

template <int bytes, class T>
TZ_INLINE void backward_body(const Problem<T>* p, const T* g, int64_t begin, int64_t end, T* to) {
  using Vec = typename Lanes<bytes, T>::Vec;
  using Loose = typename Lanes<bytes, T>::Loose;
  constexpr int lanes = Lanes<bytes, T>::count;
  const Layout& s = p->layout;
  const T c1 = T(s.c1), c2 = T(s.c2);
  Batch<lanes, T> batch(s);
  for (int64_t first = begin; first < end; first += lanes) {
    const int64_t used = std::min<int64_t>(lanes, end - first);
    read(*p, first, end, batch);
    for (int64_t c = 0; c < s.channels; ++c) {
      const int64_t at = c * batch.count * lanes;
      Vec above = {};
      for (int64_t lane = 0; lane < used; ++lane) above[lane] = g[(first + lane) * s.channels + c];
      const Slope<Vec> slope =
          s3im::slope(moments<bytes>(batch.weights, batch.x.data() + at, batch.y.data() + at), c1, c2, above);
      Loose *xs = reinterpret_cast<Loose*>(batch.x.data() + at), *ys = reinterpret_cast<Loose*>(batch.y.data() + at);
      for (int64_t k = 0; k < batch.count; ++k)
        xs[k] = batch.weights[k] *
                (slope.pull + slope.across * (ys[k] - slope.my) - slope.along * (xs[k] - slope.mx));
    }
    if (s.channels == 3) add<3>(s, batch, batch.x.data(), used, to);
    else add<0>(s, batch, batch.x.data(), used, to);
  }
}
TZ_ISA(backward, backward_body)

int64_t reads_of_a_window(const Layout& s) { return std::max<int64_t>(1, 2 * s.kernel * s.kernel * s.channels); }

Tensor s3im_groups(const Tensor& src_, const Tensor& tar_, const Tensor& indices_, int64_t kernel, int64_t stride,
                   int64_t margin, double sigma, double data_range) {
  const Layout s = s3im::layout_of(src_, tar_, indices_, kernel, stride, margin, sigma, data_range);
  const Tensor src = dense(src_), tar = dense(tar_), indices = dense(indices_);
  Tensor out = fresh(src, {s.rows, s.columns, s.channels});
  std::atomic<bool> misplaced = false;
  with_type(src, [&]<class T>() {
    const Problem<T> p{s, src.const_data_ptr<T>(), tar.const_data_ptr<T>(), indices.const_data_ptr<int64_t>(),
                       &misplaced};
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, s.windows(), std::max<int64_t>(1, WORK / reads_of_a_window(s)),
                 [&](int64_t begin, int64_t end) { forward(&p, begin, end, to); });
  });
  STD_TORCH_CHECK(!misplaced, "s3im_groups: an index out of range for ", s.pixels, " pixels");
  return out;
}

// By src. Runs of windows have gradients of their own, which are added up in their order; there are as
// many runs for any number of threads.
Tensor s3im_groups_backward(const Tensor& g_, const Tensor& src_, const Tensor& tar_, const Tensor& indices_,
                            int64_t kernel, int64_t stride, int64_t margin, double sigma, double data_range) {
  const Layout s = s3im::layout_of(src_, tar_, indices_, kernel, stride, margin, sigma, data_range);
  STD_TORCH_CHECK(g_.scalar_type() == src_.scalar_type() && g_.dim() == 3 && g_.size(0) == s.rows &&
                      g_.size(1) == s.columns && g_.size(2) == s.channels,
                  "s3im_groups: a gradient that doesn't fit");
  const Tensor g = dense(g_), src = dense(src_), tar = dense(tar_), indices = dense(indices_);
  const int64_t numbers = s.pixels * s.channels, reads = s.windows() * reads_of_a_window(s);
  const int64_t parts = std::clamp<int64_t>(reads / std::max(WORK, 4 * numbers), 1, PARTS);
  Tensor out = torch::stable::new_zeros(src, {s.pixels, s.channels});
  Tensor others = torch::stable::new_zeros(src, {parts - 1, s.pixels, s.channels});
  std::atomic<bool> misplaced = false;
  with_type(src, [&]<class T>() {
    const Problem<T> p{s, src.const_data_ptr<T>(), tar.const_data_ptr<T>(), indices.const_data_ptr<int64_t>(),
                       &misplaced};
    const T* above = g.const_data_ptr<T>();
    T *to = out.mutable_data_ptr<T>(), *other = others.mutable_data_ptr<T>();
    parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        backward(&p, above, part * s.windows() / parts, (part + 1) * s.windows() / parts,
                 part ? other + (part - 1) * numbers : to);
    });
    parallel_for(0, parts > 1 ? numbers : 0, WORK, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t k = begin; k < end; ++k) to[k] += other[(part - 1) * numbers + k];
    });
  });
  STD_TORCH_CHECK(!misplaced, "s3im_groups: an index out of range for ", s.pixels, " pixels");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("s3im_groups", TORCH_BOX(&s3im_groups));
  m.impl("s3im_groups_backward", TORCH_BOX(&s3im_groups_backward));
}

}  // namespace torchzoo
