// delta_conv2d_step on CUDA: acc' = acc + conv2d(Δ, weight), x_ref' = x_ref + Δ, channels last.
//
// `encode_kernel` gives each pixel a warp, which lists the channels that changed, in their order.
// `tile_kernel` gives each (frame, tile of SIDE x SIDE outputs, WARP·pack output channels) a block, a
// warp for each of its rows. A tile without a changed pixel in its halo is copied; else a warp adds,
// output by output and tap by tap, the rows of weight_t that the pixel's list names, a lane's
// outputs by one load; warps of a block take the same taps at about the same time and find each
// other's rows in L1. No atomics, sums in the order of taps and channels, and counts stay on the
// device: a step can be captured in a graph. Limits: 65535 blocks of output channels, 2³¹ − 1 input
// channels.
#include "cuda.h"
#include "delta_conv2d.h"

namespace torchzoo {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int THREADS = SIDE * WARP;
constexpr int64_t BLOCKS = 0x7fffffff;  // in a grid; the rest is done in turns

template <class T>
struct Inputs {
  const T *x, *ref, *quantum;
  bool per_channel;
  T threshold;
  int64_t pixels, channels;
};

struct Lists {  // the changed channels of pixel p are the first counts[p] from p * channels on
  int* counts;
  int* channel;
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    encode_kernel(Inputs<T> in, T* __restrict__ new_ref, Lists lists, T* __restrict__ delta) {
  const int lane = threadIdx.x % WARP;
  const int64_t warps = int64_t(gridDim.x) * (THREADS / WARP);
  int64_t pixel = int64_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
  for (; pixel < in.pixels; pixel += warps) {
    const int64_t first = pixel * in.channels;
    int count = 0;
    for (int64_t c0 = 0; c0 < in.channels; c0 += WARP) {
      const int64_t c = c0 + lane, at = first + c;
      T change_here = T(0);
      if (c < in.channels) {
        T ref;
        const T sent = in.quantum ? quantised(in.x[at], in.quantum[in.per_channel ? c : 0]) : in.x[at];
        change_here = change(sent, in.ref[at], in.threshold, &ref);
        new_ref[at] = ref;
      }
      const bool changed = change_here != T(0);  // a NaN is a change
      const unsigned ballot = __ballot_sync(ALL_LANES, changed);
      if (changed) {
        const int64_t place = first + count + __popc(ballot & ((1u << lane) - 1));
        lists.channel[place] = static_cast<int>(c);
        delta[place] = change_here;
      }
      count += __popc(ballot);
    }
    if (lane == 0) lists.counts[pixel] = count;
  }
}

template <class T, class W>
struct Problem {
  Axis rows, columns;
  int64_t frames, channels, outputs;
  const int* counts;
  const int* channel;
  const T* delta;
  const W* weight;  // (channels, taps, outputs)
  const T* acc;
  T* new_acc;
};

// sum += Σ_j delta[j]·(row `channel[j]` of weight), for `pack` outputs a lane, where `on`.
template <int pack, class T, class W>
__device__ __forceinline__ void add_list(const T* delta, const int* channel, int count,
                                         const W* weight, int64_t stride, bool on, T* sum) {
  const int lane = threadIdx.x % WARP;
  for (int first = 0; first < count; first += WARP) {
    const int here = min(count - first, WARP);
    const int c = lane < here ? channel[first + lane] : 0;
    const T d = lane < here ? delta[first + lane] : T(0);
#pragma unroll 4
    for (int j = 0; j < here; ++j) {
      const int64_t row = __shfl_sync(ALL_LANES, c, j);
      const T scale = __shfl_sync(ALL_LANES, d, j);
      if (!on) continue;
      const Pack<W, pack> values = *reinterpret_cast<const Pack<W, pack>*>(weight + row * stride);
#pragma unroll
      for (int v = 0; v < pack; ++v) sum[v] += scale * static_cast<T>(values.value[v]);
    }
  }
}

// One output (y, x) of a frame: all lanes of the warp take part, `on` says whose outputs exist.
template <int pack, class T, class W>
__device__ __forceinline__ void add_taps(const Problem<T, W>& p, int64_t frame, int64_t y, int64_t x,
                                         int64_t o, bool on, T* sum) {
  const int64_t stride = p.rows.kernel * p.columns.kernel * p.outputs;
  for (int64_t k = 0; k < p.rows.kernel; ++k) {
    const int64_t i = p.rows.input(y, k);
    if (!p.rows.inside(i)) continue;
    for (int64_t l = 0; l < p.columns.kernel; ++l) {
      const int64_t j = p.columns.input(x, l);
      if (!p.columns.inside(j)) continue;
      const int64_t pixel = (frame * p.rows.in + i) * p.columns.in + j, at = pixel * p.channels;
      const W* weight = p.weight + (k * p.columns.kernel + l) * p.outputs + o;
      add_list<pack>(p.delta + at, p.channel + at, p.counts[pixel], weight, stride, on, sum);
    }
  }
}

template <int pack, class T, class W>
__global__ void __launch_bounds__(THREADS) tile_kernel(Problem<T, W> p) {
  const int64_t across = p.columns.tiles(), down = p.rows.tiles(), tasks = p.frames * down * across;
  const int64_t o = (int64_t(blockIdx.y) * WARP + threadIdx.x % WARP) * pack;
  const bool on = o < p.outputs;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t frame = task / across / down;
    const Span rows = outputs_of(p.rows, task / across % down);
    const Span columns = outputs_of(p.columns, task % across);
    const Span high = halo_of(p.rows, rows), wide = halo_of(p.columns, columns);
    const int64_t width = wide.last - wide.first, size = width * (high.last - high.first);
    bool any = false;
    for (int64_t t = threadIdx.x; t < size; t += THREADS) {
      const int64_t i = high.first + t / width, j = wide.first + t % width;
      any = any || p.counts[(frame * p.rows.in + i) * p.columns.in + j] != 0;
    }
    any = __syncthreads_or(any);
    const int64_t y = rows.first + threadIdx.x / WARP;
    if (y >= rows.last) continue;  // the whole warp, until the block's next task
    for (int64_t x = columns.first; x < columns.last; ++x) {
      const int64_t at = ((frame * p.rows.out + y) * p.columns.out + x) * p.outputs + o;
      Pack<T, pack> sum{};
      if (on) sum = *reinterpret_cast<const Pack<T, pack>*>(p.acc + at);
      if (any) add_taps<pack>(p, frame, y, x, o, on, sum.value);
      if (on) *reinterpret_cast<Pack<T, pack>*>(p.new_acc + at) = sum;
    }
  }
}

template <int pack, class T, class W>
void launch_tiles(const Problem<T, W>& problem, cudaStream_t queue) {
  const int64_t tasks = problem.frames * problem.rows.tiles() * problem.columns.tiles();
  const int64_t blocks = (problem.outputs + WARP * pack - 1) / (WARP * pack);
  STD_TORCH_CHECK(blocks <= 65535, "delta_conv2d_step: too many output channels: ", problem.outputs);
  const dim3 grid(static_cast<unsigned>(std::min(tasks, BLOCKS)), static_cast<unsigned>(blocks));
  tile_kernel<pack><<<grid, THREADS, 0, queue>>>(problem);
  check_launch("tile_kernel");
}

template <class T, class W>
void add_changed(const Problem<T, W>& problem, cudaStream_t queue) {
  const bool even = aligned(problem.weight) && aligned(problem.acc) && aligned(problem.new_acc);
  auto fits = [&](int pack) { return even && problem.outputs % pack == 0 && problem.outputs >= pack * WARP; };
  if (fits(4)) launch_tiles<4>(problem, queue);
  else if (fits(2)) launch_tiles<2>(problem, queue);
  else launch_tiles<1>(problem, queue);
}

template <class T>
void step(const Tensor& x, const Tensor& x_ref, const Tensor& acc, const Tensor& weight_t,
          const std::optional<Tensor>& quantum, double threshold, const Axis& rows,
          const Axis& columns, Tensor& new_acc, Tensor& new_ref) {
  const int64_t channels = weight_t.size(0), outputs = weight_t.size(3), pixels = x.numel() / channels;
  STD_TORCH_CHECK(channels <= 0x7fffffff, "delta_conv2d_step: too many channels: ", channels);
  const cudaStream_t queue = stream(x);
  Tensor counts = torch::stable::new_empty(x, {pixels}, ScalarType::Int);
  Tensor channel = torch::stable::new_empty(x, {x.numel()}, ScalarType::Int);
  Tensor delta = torch::stable::new_empty(x, {x.numel()});
  const Lists lists{counts.mutable_data_ptr<int>(), channel.mutable_data_ptr<int>()};
  const Inputs<T> inputs{x.const_data_ptr<T>(),
                         x_ref.const_data_ptr<T>(),
                         quantum ? quantum->const_data_ptr<T>() : nullptr,
                         quantum && quantum->numel() > 1,
                         static_cast<T>(threshold),
                         pixels,
                         channels};
  const int64_t warps = THREADS / WARP;
  encode_kernel<<<static_cast<unsigned>(std::min((pixels + warps - 1) / warps, BLOCKS)), THREADS, 0,
                  queue>>>(inputs, new_ref.mutable_data_ptr<T>(), lists, delta.mutable_data_ptr<T>());
  check_launch("encode_kernel");
  auto add = [&]<class W>(const W* weight) {
    add_changed(Problem<T, W>{rows, columns, pixels / (rows.in * columns.in), channels, outputs,
                              lists.counts, lists.channel, delta.const_data_ptr<T>(), weight,
                              acc.const_data_ptr<T>(), new_acc.mutable_data_ptr<T>()},
                queue);
  };
  switch (weight_t.scalar_type()) {
    case ScalarType::BFloat16: return add(weight_t.const_data_ptr<BFloat16>());
    case ScalarType::Half: return add(weight_t.const_data_ptr<Half>());
    default: return add(weight_t.const_data_ptr<T>());
  }
}

std::tuple<Tensor, Tensor> delta_conv2d_step(const Tensor& x, const Tensor& x_ref, const Tensor& acc,
                                             const Tensor& weight_t, std::optional<Tensor> quantum,
                                             double threshold, std::vector<int64_t> stride,
                                             std::vector<int64_t> padding,
                                             std::vector<int64_t> dilation) {
  using torch::stable::contiguous;
  const auto [rows, columns] = axes(x, x_ref, acc, weight_t, quantum, stride, padding, dilation);
  const DeviceGuard guard(weight_t.get_device_index());
  if (quantum) quantum = contiguous(*quantum);
  const Tensor now = contiguous(x), ref = contiguous(x_ref), dense = contiguous(acc);
  const Tensor weight = contiguous(weight_t);
  Tensor new_acc = torch::stable::empty_like(dense), new_ref = torch::stable::empty_like(ref);
  if (x.numel() == 0) return {new_acc, new_ref};
  if (acc.scalar_type() == ScalarType::Double)
    step<double>(now, ref, dense, weight, quantum, threshold, rows, columns, new_acc, new_ref);
  else
    step<float>(now, ref, dense, weight, quantum, threshold, rows, columns, new_acc, new_ref);
  return {new_acc, new_ref};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("delta_conv2d_step", TORCH_BOX(&delta_conv2d_step));
}

}  // namespace torchzoo
