// delta_conv2d_step: acc' = acc + conv2d(Δ, weight), x_ref' = x_ref + Δ, channels last.
//
// One pass over x lists the changed channels of each pixel. Then threads share (frame, tile of
// SIDE x SIDE outputs, block of output channels) tasks. A tile without a changed pixel in its halo is
// copied; in the others, tap by tap, each output adds the rows of weight_t that its pixel's list
// names, so that a tap's rows stay in L1 for the whole tile. The order of additions to an output is
// that of taps and channels, whatever the number of threads.
#include "delta_conv2d.h"
#include "delta_encode.h"
#include "rows.h"

#include <memory>

namespace torchzoo {
namespace {

constexpr int REGISTERS = 8;     // of sums, side by side
constexpr int64_t RUN = 1024;    // inputs encoded at once, which stay in L1
constexpr int64_t GRAIN = 8192;  // inputs that are worth a thread

template <class T>
struct Changed {  // the changed channels of pixel p are at starts[p] .. starts[p + 1]
  std::vector<int64_t> starts;
  std::unique_ptr<int64_t[]> channel;
  std::unique_ptr<T[]> delta;
};

// counts[p] = how many channels of pixel p are not zero; a NaN is a change.
template <int bytes, class T>
TZ_INLINE void count_body(const T* __restrict delta, int64_t pixels, int64_t channels,
                          int64_t* __restrict counts) {
  for (int64_t p = 0; p < pixels; ++p, delta += channels) {
    int count = 0;
    for (int64_t c = 0; c < channels; ++c) count += delta[c] != T(0);
    counts[p] = count;
  }
}
TZ_ISA(count_changed, count_body)

template <class T>
Changed<T> find_changed(const T* x, const T* ref, const T* quantum, bool per_channel, T threshold,
                        int64_t pixels, int64_t channels, T* new_ref) {
  Changed<T> found{std::vector<int64_t>(pixels + 1), nullptr, nullptr};
  auto encode_pixels = [&](int64_t p, int64_t count, T* delta) {
    const int64_t step = per_channel ? channels : count * channels;
    for (int64_t j = 0; j < count * channels; j += step) {
      const int64_t at = p * channels + j;
      encode(x + at, ref + at, quantum, per_channel, threshold, step, new_ref + at, delta + j);
    }
  };
  auto over_pixels = [&](int64_t run, const auto& visit) {
    const int64_t grain = std::max<int64_t>(GRAIN / channels, 1);
    parallel_for(0, pixels, grain, [&](int64_t begin, int64_t end) {
      std::vector<T> delta(run * channels);
      for (int64_t p = begin; p < end; p += run) visit(p, std::min(run, end - p), delta.data());
    });
  };
  over_pixels(std::max<int64_t>(RUN / channels, 1), [&](int64_t p, int64_t count, T* delta) {
    encode_pixels(p, count, delta);
    count_changed(delta, count, channels, found.starts.data() + p + 1);
  });
  for (int64_t p = 0; p < pixels; ++p) found.starts[p + 1] += found.starts[p];
  // Encoding the changed pixels once more is cheaper than to keep the changes of all.
  found.channel.reset(new int64_t[found.starts[pixels]]);
  found.delta.reset(new T[found.starts[pixels]]);
  over_pixels(1, [&](int64_t p, int64_t, T* delta) {
    int64_t at = found.starts[p];
    if (at == found.starts[p + 1]) return;
    encode_pixels(p, 1, delta);
    for (int64_t c = 0; c < channels; ++c) {
      if (delta[c] == T(0)) continue;
      found.channel[at] = c;
      found.delta[at++] = delta[c];
    }
  });
  return found;
}

// acc[0 : registers of lanes] += Σ_j delta[j]·(row `channel[j]` of weight), in the order of j.
template <int bytes, int registers, class T>
TZ_INLINE void add_list(const T* delta, const int64_t* channel, int64_t count, const T* weight,
                        int64_t stride, T* acc) {
  using Vec = typename Tile<bytes, T>::Vec;
  using Loose = typename Tile<bytes, T>::Loose;
  constexpr int64_t lanes = Tile<bytes, T>::lanes;
  Vec sum[registers];
#pragma GCC unroll 8
  for (int r = 0; r < registers; ++r) sum[r] = *reinterpret_cast<const Loose*>(acc + r * lanes);
  for (int64_t j = 0; j < count; ++j) {
    const T* row = weight + channel[j] * stride;
    const Vec d = delta[j] - Vec{};
#pragma GCC unroll 8
    for (int r = 0; r < registers; ++r)
      sum[r] += d * *reinterpret_cast<const Loose*>(row + r * lanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < registers; ++r) *reinterpret_cast<Loose*>(acc + r * lanes) = sum[r];
}

template <int bytes, class T, class W>
TZ_INLINE void add_changes(const T* delta, const int64_t* channel, int64_t count, const W* weight,
                           int64_t stride, T* acc, int64_t n) {
  int64_t o = 0;
  if constexpr (std::is_same_v<T, W>) {
    constexpr int64_t lanes = Tile<bytes, T>::lanes;
    for (; o + REGISTERS * lanes <= n; o += REGISTERS * lanes)
      add_list<bytes, REGISTERS>(delta, channel, count, weight + o, stride, acc + o);
    if (o + 4 * lanes <= n) {
      add_list<bytes, 4>(delta, channel, count, weight + o, stride, acc + o);
      o += 4 * lanes;
    }
    for (; o + lanes <= n; o += lanes)
      add_list<bytes, 1>(delta, channel, count, weight + o, stride, acc + o);
  }
  if (o < n) accumulate_body<bytes>(delta, channel, count, weight + o, stride, acc + o, n - o);
}

template <class T, class W>
struct Problem {
  Axis rows, columns;
  int64_t outputs;
  const int64_t* channel;
  const T* delta;
  const int64_t* starts;
  const W* weight;  // (channels, taps, outputs)
  const T* acc;
  T* new_acc;
};

// Outputs o .. o + n of one tile of one frame.
template <int bytes, class T, class W>
TZ_INLINE void tile_body(const Problem<T, W>* p, int64_t frame, int64_t tile_row, int64_t tile_column,
                         int64_t o, int64_t n) {
  const Axis rows = p->rows, columns = p->columns;
  const Span down = outputs_of(rows, tile_row), across = outputs_of(columns, tile_column);
  auto place = [&](int64_t y, int64_t x) {
    return ((frame * rows.out + y) * columns.out + x) * p->outputs + o;
  };
  const bool whole = n == p->outputs;  // then a row of the tile is one stretch of memory
  const int64_t stretch = whole ? across.last - across.first : 1;
  for (int64_t y = down.first; y < down.last; ++y)
    for (int64_t x = across.first; x < across.last; x += stretch)
      std::copy_n(p->acc + place(y, x), stretch * n, p->new_acc + place(y, x));
  const int64_t* starts = p->starts + frame * rows.in * columns.in;
  const Span high = halo_of(rows, down), wide = halo_of(columns, across);
  bool any = false;
  for (int64_t i = high.first; i < high.last && wide.first < wide.last; ++i)
    any |= starts[i * columns.in + wide.first] != starts[i * columns.in + wide.last];
  if (!any) return;
  const int64_t taps = rows.kernel * columns.kernel;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const W* weight = p->weight + tap * p->outputs + o;
    for (int64_t y = down.first; y < down.last; ++y) {
      const int64_t i = rows.input(y, tap / columns.kernel);
      if (!rows.inside(i)) continue;
      for (int64_t x = across.first; x < across.last; ++x) {
        const int64_t j = columns.input(x, tap % columns.kernel), pixel = i * columns.in + j;
        if (!columns.inside(j)) continue;
        const int64_t at = starts[pixel], count = starts[pixel + 1] - at;
        if (!count) continue;
        add_changes<bytes>(p->delta + at, p->channel + at, count, weight, taps * p->outputs,
                           p->new_acc + place(y, x), n);
      }
    }
  }
}
TZ_ISA(tile, tile_body)

template <class T, class W>
void add_changed(const Problem<T, W>& problem, int64_t frames) {
  const int64_t down = problem.rows.tiles(), across = problem.columns.tiles();
  const int64_t block = REGISTERS * (isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16) / sizeof(T);
  const int64_t blocks = (problem.outputs + block - 1) / block;
  for_tasks(frames * down * across * blocks, [&](int64_t task) {
    const int64_t o = task % blocks * block, column = task / blocks % across;
    const int64_t row = task / blocks / across % down, frame = task / blocks / across / down;
    tile(&problem, frame, row, column, o, std::min(block, problem.outputs - o));
  });
}

struct Inputs {
  Tensor x, x_ref, acc, weight_t;
  std::optional<Tensor> quantum;
  double threshold;
  Axis rows, columns;
};

template <class T>
void step(const Inputs& in, Tensor& new_acc, Tensor& new_ref) {
  const int64_t channels = in.weight_t.size(0), outputs = in.weight_t.size(3);
  const int64_t pixels = in.x.numel() / channels, frames = pixels / (in.rows.in * in.columns.in);
  const Changed<T> changed = find_changed(
      in.x.const_data_ptr<T>(), in.x_ref.const_data_ptr<T>(),
      in.quantum ? in.quantum->const_data_ptr<T>() : nullptr, in.quantum && in.quantum->numel() > 1,
      static_cast<T>(in.threshold), pixels, channels, new_ref.mutable_data_ptr<T>());
  auto add = [&]<class W>(const W* weight) {
    add_changed(Problem<T, W>{in.rows, in.columns, outputs, changed.channel.get(),
                              changed.delta.get(), changed.starts.data(), weight,
                              in.acc.const_data_ptr<T>(), new_acc.mutable_data_ptr<T>()},
                frames);
  };
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  switch (in.weight_t.scalar_type()) {
    case ScalarType::BFloat16: return add(in.weight_t.const_data_ptr<BFloat16>());
    case ScalarType::Half: return add(in.weight_t.const_data_ptr<Half>());
    default: return add(in.weight_t.const_data_ptr<T>());
  }
}

std::tuple<Tensor, Tensor> delta_conv2d_step(const Tensor& x, const Tensor& x_ref, const Tensor& acc,
                                             const Tensor& weight_t, std::optional<Tensor> quantum,
                                             double threshold, std::vector<int64_t> stride,
                                             std::vector<int64_t> padding,
                                             std::vector<int64_t> dilation) {
  using torch::stable::contiguous;
  const auto [rows, columns] = axes(x, x_ref, acc, weight_t, quantum, stride, padding, dilation);
  const Inputs in{contiguous(x),        contiguous(x_ref), contiguous(acc),
                  contiguous(weight_t), quantum ? std::optional(contiguous(*quantum)) : std::nullopt,
                  threshold,            rows,              columns};
  Tensor new_acc = fresh(in.acc), new_ref = fresh(in.x_ref);
  if (x.numel() == 0) return {new_acc, new_ref};
  if (acc.scalar_type() == ScalarType::Double) step<double>(in, new_acc, new_ref);
  else step<float>(in, new_acc, new_ref);
  return {new_acc, new_ref};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("delta_conv2d_step", TORCH_BOX(&delta_conv2d_step));
}

}  // namespace torchzoo
