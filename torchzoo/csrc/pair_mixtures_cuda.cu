// pair_mixtures and pair_mixtures_backward on CUDA: a thread computes all functions of an input and keeps
// none, with an exponential for each SiLU, as arithmetic is cheap beside memory here.
//
// Forward, a block takes a row. Backward, a warp takes a stretch of a row, and the sums over its lanes of
// what goes to each shift and weight are added up in a place of its own; the number of warps depends on
// the shape alone, and their sums are added in their order: no atomics, the same bits at every run.
#include "elementwise_cuda.h"
#include "pair_mixtures.h"

namespace torchzoo {
namespace {

using mixtures::Apart;
using mixtures::check_gradients;
using mixtures::check_sizes;
using mixtures::End;
using mixtures::PairSlopes;
using mixtures::Sizes;

constexpr int ITEMS = 4;             // inputs of a lane
constexpr int64_t MOST_WARPS = 4096;  // whose sums are added up

template <class T>
struct Functions {
  const T *low, *high, *weight;
  __device__ mixtures::Function<T> operator[](int64_t k) const { return {low[k], high[k], T(0), T(0)}; }
};

// The end of the whole block, right in thread 0.
template <class T>
__device__ __forceinline__ End<T> block_end(End<T> end) {
  __shared__ End<T> warps[THREADS / WARP];
#pragma unroll
  for (int lanes = WARP / 2; lanes; lanes /= 2) {
    const T key = __shfl_xor_sync(ALL_LANES, end.key, lanes);
    const int64_t place = __shfl_xor_sync(ALL_LANES, end.place, lanes);
    end.take(key, place);
  }
  __syncthreads();  // the ends of the last call have been read
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = end;
  __syncthreads();
  for (const End<T>& other : warps) end.take(other.key, other.place);
  return end;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    mix_kernel(const T* __restrict__ x, Functions<T> f, Sizes s, T* __restrict__ mixed,
               T* __restrict__ ends, int64_t* __restrict__ places) {
  constexpr T infinity = T(__builtin_huge_val());
  for (int64_t row = blockIdx.x; row < s.rows; row += gridDim.x) {
    End<T> end[2] = {{infinity, s.inputs}, {infinity, s.inputs}};
    bool nan = false;
    for (int64_t m = 0; m < s.mixtures; m += 2) {
      const bool two = m + 1 < s.mixtures;
      const T* weight = f.weight + m * s.functions;
      for (int64_t i = threadIdx.x; i < s.inputs; i += THREADS) {
        const Apart<T, T> at(x[row * s.inputs + i]);
        T sum[2] = {}, least = infinity, most = -infinity;
        bool bad = false;
        for (int64_t k = 0; k < s.functions; ++k) {
          const T phi = at.value(f[k]);
          sum[0] += phi * weight[k];
          if (two) sum[1] += phi * weight[s.functions + k];
          least = phi < least ? phi : least;
          most = phi > most ? phi : most;
          bad |= phi != phi;
        }
        T* to = mixed + (row * s.mixtures + m) * s.inputs + i;
        to[0] = sum[0];
        if (two) to[s.inputs] = sum[1];
        end[0].take(bad ? -infinity : least, i);
        end[1].take(bad ? -infinity : -most, i);
        nan |= bad;
      }
    }
    const bool any = __syncthreads_or(nan);
    for (int e = 0; e < 2; ++e) {
      const End<T> whole = block_end(end[e]);
      if (threadIdx.x) continue;
      const T value = e ? -whole.key : whole.key;
      ends[2 * row + e] = any ? infinity - infinity : value;
      places[2 * row + e] = whole.place;
    }
  }
}

// Adds the warp's sum of `value` to a place that no other warp writes to.
template <class T>
__device__ __forceinline__ void add_lanes(T value, T* own) {
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0) *own += value;
}

// dx, and what goes to l, u and the weights: sums (functions · (2 + M), count), of which each warp adds to
// a column.
template <class T>
__global__ void __launch_bounds__(THREADS)
    unmix_kernel(const T* __restrict__ grad, const T* __restrict__ x, Functions<T> f, Sizes s,
                 int64_t warps, int64_t count, T* __restrict__ dx, T* __restrict__ sums) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / WARP;
  if (warp >= warps) return;
  const int64_t stretches = (s.inputs + WARP * ITEMS - 1) / (WARP * ITEMS);
  for (int64_t tile = warp; tile < s.rows * stretches; tile += warps) {
    const int64_t row = tile / stretches;
    const int64_t first = tile % stretches * (WARP * ITEMS) + threadIdx.x % WARP;
    const T* above = grad + row * s.mixtures * s.inputs;
    T in[ITEMS], to_x[ITEMS], phi[ITEMS];
#pragma unroll
    for (int v = 0; v < ITEMS; ++v) {
      const int64_t i = first + v * WARP;
      in[v] = i < s.inputs ? x[row * s.inputs + i] : T(0);
      to_x[v] = T(0);
    }
    for (int64_t k = 0; k < s.functions; ++k) {
      T to_low = 0, to_high = 0, *own = sums + k * count + warp;
#pragma unroll
      for (int v = 0; v < ITEMS; ++v) {
        const int64_t i = first + v * WARP;
        T g = 0;
        for (int64_t m = 0; i < s.inputs && m < s.mixtures; ++m)
          g += above[m * s.inputs + i] * f.weight[m * s.functions + k];
        const PairSlopes<T> d = Apart<T, T>(in[v]).slopes(f[k]);
        to_low += g * d.low;
        to_high += g * d.high;
        to_x[v] -= g * d.low + g * d.high;
        phi[v] = d.phi;
      }
      add_lanes(to_low, own);
      add_lanes(to_high, own += s.functions * count);
      for (int64_t m = 0; m < s.mixtures; ++m) {
        T to_weight = 0;
#pragma unroll
        for (int v = 0; v < ITEMS; ++v) {
          const int64_t i = first + v * WARP;
          if (i < s.inputs) to_weight += above[m * s.inputs + i] * phi[v];
        }
        add_lanes(to_weight, own += s.functions * count);
      }
    }
#pragma unroll
    for (int v = 0; v < ITEMS; ++v) {
      const int64_t i = first + v * WARP;
      if (i < s.inputs) dx[row * s.inputs + i] = to_x[v];
    }
  }
}

// Not inlined: equal functions are found by comparing values, which have to be rounded alike.
template <class T>
__device__ __noinline__ T value_at(T x, T low, T high) {
  return Apart<T, T>(x).value({low, high, T(0), T(0)});
}

// What goes to the ends: a thread takes a row, and adds to the dx that is there.
template <class T>
__global__ void __launch_bounds__(THREADS)
    unmix_ends_kernel(const T* __restrict__ grad, const int64_t* __restrict__ places,
                      const T* __restrict__ x, Functions<T> f, Sizes s, int64_t warps, int64_t count,
                      T* __restrict__ dx, T* __restrict__ sums) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (row / WARP * WARP >= s.rows) return;  // whole warps
  for (int e = 0; e < 2; ++e) {
    const int64_t place = row < s.rows ? places[2 * row + e] : -1;
    const bool live = place >= 0 && place < s.inputs;
    const int64_t at = live ? row * s.inputs + place : 0;
    const T in = x[at], g = live ? grad[2 * row + e] : T(0);
    T end = value_at(in, f.low[0], f.high[0]), to_x = 0;
    int64_t ties = 0;  // none where all functions are NaN, whose shares are NaN then
    for (int64_t k = 1; k < s.functions; ++k) {
      const T phi = value_at(in, f.low[k], f.high[k]);
      end = (e ? phi > end : phi < end) ? phi : end;
    }
    for (int64_t k = 0; k < s.functions; ++k) ties += value_at(in, f.low[k], f.high[k]) == end;
    for (int64_t k = 0; k < s.functions; ++k) {
      const bool tied = value_at(in, f.low[k], f.high[k]) == end;
      const T share = live ? (tied ? g : T(0)) / static_cast<T>(ties) : T(0);
      const PairSlopes<T> d = Apart<T, T>(in).slopes(f[k]);
      const T low = live ? share * d.low : T(0), high = live ? share * d.high : T(0);
      to_x -= low + high;
      T* own = sums + k * count + warps + row / WARP;
      add_lanes(low, own);
      add_lanes(high, own + s.functions * count);
    }
    if (live) dx[at] += to_x;
  }
}

std::tuple<Tensor, Tensor, Tensor> pair_mixtures(const Tensor& x_, const Tensor& low_,
                                                 const Tensor& high_, const Tensor& weight_) {
  check_devices("pair_mixtures", {x_, low_, high_, weight_});
  const Sizes s = check_sizes("pair_mixtures", x_, low_, high_, weight_);
  const DeviceGuard guard(x_.get_device_index());
  using torch::stable::contiguous;
  const Tensor x = contiguous(x_), low = contiguous(low_), high = contiguous(high_);
  const Tensor weight = contiguous(weight_);
  Tensor mixed = torch::stable::new_empty(x, {s.rows, s.mixtures, s.inputs});
  Tensor ends = torch::stable::new_empty(x, {s.rows, 2});
  Tensor places = torch::stable::new_empty(x, {s.rows, 2}, ScalarType::Long);
  if (!s.rows) return {mixed, ends, places};
  for_type("pair_mixtures", x, [&](auto zero) {
    using T = Wide<decltype(zero)>;
    const Functions<T> f{low.const_data_ptr<T>(), high.const_data_ptr<T>(), weight.const_data_ptr<T>()};
    mix_kernel<<<static_cast<unsigned>(std::min<int64_t>(s.rows, INT32_MAX)), THREADS, 0, stream(x)>>>(
        x.const_data_ptr<T>(), f, s, mixed.mutable_data_ptr<T>(), ends.mutable_data_ptr<T>(),
        places.mutable_data_ptr<int64_t>());
    check_launch("pair_mixtures");
  });
  return {mixed, ends, places};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_mixtures_backward(
    const Tensor& grad_, const Tensor& grad_ends_, const Tensor& x_, const Tensor& low_,
    const Tensor& high_, const Tensor& weight_, const Tensor& places_) {
  const char* op = "pair_mixtures_backward";
  check_devices(op, {grad_, grad_ends_, x_, low_, high_, weight_, places_});
  const Sizes s = check_sizes(op, x_, low_, high_, weight_);
  check_gradients(op, s, x_, grad_, grad_ends_, places_);
  const DeviceGuard guard(x_.get_device_index());
  using torch::stable::contiguous;
  const Tensor x = contiguous(x_), low = contiguous(low_), high = contiguous(high_);
  const Tensor weight = contiguous(weight_), grad = contiguous(grad_);
  const Tensor grad_ends = contiguous(grad_ends_), places = contiguous(places_);
  Tensor dx = torch::stable::empty_like(x), dlow = torch::stable::empty_like(low);
  Tensor dhigh = torch::stable::empty_like(high), dweight = torch::stable::empty_like(weight);
  if (!s.rows) {
    for (Tensor* t : {&dlow, &dhigh, &dweight}) torch::stable::zero_(*t);
    return {dx, dlow, dhigh, dweight};
  }
  const int64_t stretches = (s.inputs + WARP * ITEMS - 1) / (WARP * ITEMS);
  const int64_t warps = std::min(MOST_WARPS, s.rows * stretches);
  const int64_t count = warps + (s.rows + WARP - 1) / WARP;
  for_type(op, x, [&](auto zero) {
    using T = Wide<decltype(zero)>;
    const Functions<T> f{low.const_data_ptr<T>(), high.const_data_ptr<T>(), weight.const_data_ptr<T>()};
    Tensor sums = new_sums<T>(x, {s.sums(), count});
    torch::stable::zero_(sums);
    T *partial = sums.mutable_data_ptr<T>(), *to_x = dx.mutable_data_ptr<T>();
    const T* in = x.const_data_ptr<T>();
    unmix_kernel<<<blocks_for(warps * WARP, INT32_MAX), THREADS, 0, stream(x)>>>(
        grad.const_data_ptr<T>(), in, f, s, warps, count, to_x, partial);
    check_launch(op);
    unmix_ends_kernel<<<blocks_for(s.rows, INT32_MAX), THREADS, 0, stream(x)>>>(
        grad_ends.const_data_ptr<T>(), places.const_data_ptr<int64_t>(), in, f, s, warps, count, to_x,
        partial);
    check_launch(op);
    for (Tensor* t : {&dlow, &dhigh, &dweight}) {
      add_up_each_kernel<<<static_cast<unsigned>(t->numel()), THREADS, 0, stream(x)>>>(
          static_cast<const T*>(partial), count, t->mutable_data_ptr<T>());
      check_launch(op);
      partial += t->numel() * count;
    }
  });
  return {dx, dlow, dhigh, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("pair_mixtures", TORCH_BOX(&pair_mixtures));
  m.impl("pair_mixtures_backward", TORCH_BOX(&pair_mixtures_backward));
}

}  // namespace torchzoo
