// sparse_ffn and the three products that it and its derivatives are made of, on CUDA.
//
// `dot_kernel` gives each neuron a warp, which reads its row once for TOKENS tokens and skips it where
// none of them asks for it. `sum_kernel` gives each (tile of features, WINDOW neurons, token) a block,
// which compacts its active neurons in their order and adds their rows; `finish_kernel` adds up the
// windows, in order. No atomics and no wait for the host: every launch has a size that depends on
// shapes alone, so calls can be captured in a graph, and a token's result does not depend on its
// batch. Made for few tokens; further ones read rows again, from L2 at best.
#include "cuda.h"
#include "sparse_ffn.h"

namespace torchzoo {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int THREADS = 128;
constexpr int WINDOW = THREADS;  // neurons (or tokens) that a block compacts at once
constexpr int TOKENS = 4;        // dot products in one pass over a row
constexpr int64_t BLOCK = 16;    // tokens summed by one launch, which bounds the scratch memory

// done(token, neuron, dot product or 0, whether asked for) for every pair, by one thread each.
template <int pack, class T, class X, class Acc, class Done>
__global__ void __launch_bounds__(THREADS)
    dot_kernel(const X* x, const T* w, const bool* active, int64_t tokens, int64_t neurons,
               int64_t features, Done done) {
  const int lane = threadIdx.x % WARP;
  const int64_t warps = int64_t(gridDim.x) * (THREADS / WARP);
  for (int64_t i = int64_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP; i < neurons; i += warps) {
    const T* row = w + i * features;
    for (int64_t n = 0; n < tokens; n += TOKENS) {
      bool asked[TOKENS], any = false;
      Acc sum[TOKENS];
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        asked[t] = n + t < tokens && (!active || active[(n + t) * neurons + i]);
        any = any || asked[t];
        sum[t] = Acc(0);
      }
      if (any) {
#pragma unroll 4
        for (int64_t k = int64_t(lane) * pack; k < features; k += WARP * pack) {
          const Pack<T, pack> weight = *reinterpret_cast<const Pack<T, pack>*>(row + k);
#pragma unroll
          for (int t = 0; t < TOKENS; ++t) {
            if (!asked[t]) continue;
            const Pack<X, pack> input =
                *reinterpret_cast<const Pack<X, pack>*>(x + (n + t) * features + k);
#pragma unroll
            for (int v = 0; v < pack; ++v)
              sum[t] += static_cast<Acc>(weight.value[v]) * static_cast<Acc>(input.value[v]);
          }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) sum[t] = warp_sum(sum[t]);
      }
      __syncwarp();  // all lanes have read `active`, which done may write
      if (lane == 0) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t)
          if (n + t < tokens) done(n + t, i, sum[t], asked[t]);
      }
    }
  }
}

// Writes the places j < THREADS where `on` of thread j is true into `list`, in order; how many.
__device__ __forceinline__ int compact(bool on, int* list) {
  __shared__ int counts_of[THREADS / WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const unsigned ballot = __ballot_sync(ALL_LANES, on);
  __syncthreads();  // the last list and counts have been read
  if (lane == 0) counts_of[warp] = __popc(ballot);
  __syncthreads();
  int before = 0, total = 0;
#pragma unroll
  for (int other = 0; other < THREADS / WARP; ++other) {
    if (other < warp) before += counts_of[other];
    total += counts_of[other];
  }
  if (on) list[before + __popc(ballot & ((1u << lane) - 1))] = threadIdx.x;
  __syncthreads();
  return total;
}

// total += Σ over the active of WINDOW weights of weight·row, for this thread's features from o on.
// Weight j is h[j * stride], its row is rows + j * features.
template <int pack, class T, class Acc>
__device__ __forceinline__ void add_window(const Acc* h, const bool* active, int64_t stride,
                                           int64_t size, const T* rows, int64_t features, int64_t o,
                                           Acc* total) {
  __shared__ int list[WINDOW];
  __shared__ Acc weight[WINDOW];
  const int j = threadIdx.x;
  const bool on = j < size && active[j * stride];
  const int count = compact(on, list);
  if (on) weight[j] = h[j * stride];
  __syncthreads();
  if (o >= features) return;
#pragma unroll 4
  for (int r = 0; r < count; ++r) {
    const int at = list[r];
    const Pack<T, pack> row = *reinterpret_cast<const Pack<T, pack>*>(rows + at * features + o);
#pragma unroll
    for (int v = 0; v < pack; ++v) total[v] += weight[at] * static_cast<Acc>(row.value[v]);
  }
}

// parts[window, n] = Σ over the window's active neurons of h_ni w_i. Grid: tiles, windows, tokens.
template <int pack, class T, class Acc>
__global__ void __launch_bounds__(THREADS)
    sum_kernel(const Acc* h, const T* w, const bool* active, int64_t neurons, int64_t features,
               Acc* parts) {
  const int64_t n = blockIdx.z;
  const int64_t o = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * pack;
  for (int64_t window = blockIdx.y; window * WINDOW < neurons; window += gridDim.y) {
    const int64_t first = window * WINDOW, left = neurons - first, at = n * neurons + first;
    Acc total[pack] = {};
    add_window<pack>(h + at, active + at, 1, left < WINDOW ? left : WINDOW, w + first * features,
                     features, o, total);
    if (o >= features) continue;
    Acc* out = parts + (window * gridDim.z + n) * features + o;
#pragma unroll
    for (int v = 0; v < pack; ++v) out[v] = total[v];
  }
}

// y[n] = Σ_window parts[window, n] + bias, for `values` = tokens · features numbers.
template <class T, class Acc, class Out>
__global__ void __launch_bounds__(THREADS)
    finish_kernel(const Acc* parts, int64_t windows, int64_t values, int64_t features, const T* bias,
                  Out* y) {
  const int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= values) return;
  Acc total = bias ? static_cast<Acc>(bias[at % features]) : Acc(0);
#pragma unroll 8
  for (int64_t window = 0; window < windows; ++window) total += parts[window * values + at];
  y[at] = static_cast<Out>(total);
}

// out[i] = Σ_n h_ni x_n over the active n. Grid: neurons, tiles.
template <int pack, class T, class Acc>
__global__ void __launch_bounds__(THREADS)
    outer_kernel(const Acc* h, const T* x, const bool* active, int64_t tokens, int64_t neurons,
                 int64_t features, T* out) {
  const int64_t i = blockIdx.x;
  for (int64_t tile = blockIdx.y; tile * THREADS * pack < features; tile += gridDim.y) {
    const int64_t o = (tile * THREADS + threadIdx.x) * pack;
    Acc total[pack] = {};
    for (int64_t n = 0; n < tokens; n += WINDOW) {
      const int64_t at = n * neurons + i, left = tokens - n;
      add_window<pack>(h + at, active + at, neurons, left < WINDOW ? left : WINDOW, x + n * features,
                       features, o, total);
    }
    if (o >= features) continue;
    Pack<T, pack> row;
#pragma unroll
    for (int v = 0; v < pack; ++v) row.value[v] = static_cast<T>(total[v]);
    *reinterpret_cast<Pack<T, pack>*>(out + i * features + o) = row;
  }
}

template <class Acc>
struct Store {
  Acc* out;
  int64_t neurons;
  __device__ void operator()(int64_t n, int64_t i, Acc sum, bool) const { out[n * neurons + i] = sum; }
};

template <class T, class Acc>
struct Gate {  // z, h = act(z), and which pairs count so far
  const T* bias;
  const Acc* limits;
  Acc threshold, shift;
  Activation activation;
  bool on_product;
  int64_t neurons;
  Acc *z, *h;
  bool* active;
  __device__ void operator()(int64_t n, int64_t i, Acc sum, bool asked) const {
    const int64_t at = n * neurons + i;
    const Acc pre = !asked ? Acc(0) : bias ? sum + static_cast<Acc>(bias[i]) : sum;
    const Acc a = activate(activation, pre, shift);
    z[at] = pre;
    h[at] = a;
    active[at] = asked && (on_product || counts(a, limits ? limits[i] : threshold));
  }
};

template <class T, class Acc>
struct Up {  // u, h = a·u, and which pairs count if that is up to h
  const T* bias;
  const Acc* limits;
  Acc threshold;
  bool on_product;
  int64_t neurons;
  Acc *u, *h;
  bool* active;
  __device__ void operator()(int64_t n, int64_t i, Acc sum, bool asked) const {
    const int64_t at = n * neurons + i;
    const Acc up = !asked ? Acc(0) : bias ? sum + static_cast<Acc>(bias[i]) : sum;
    const Acc product = h[at] * up;
    u[at] = up;
    h[at] = product;
    if (on_product) active[at] = asked && counts(product, limits ? limits[i] : threshold);
  }
};

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Whether rows of `features` elements, from all of these on, can be read by 16 bytes.
template <class T>
bool vectors(int64_t features, std::initializer_list<const void*> starts) {
  return features % (16 / sizeof(T)) == 0 && std::all_of(starts.begin(), starts.end(), aligned);
}

template <class T, class X, class Acc, class Done>
void launch_dot(const Tensor& x, const Tensor& w, const bool* active, const Done& done) {
  const int64_t tokens = x.size(0), neurons = w.size(0), features = w.size(1);
  if (!tokens || !neurons) return;
  const int64_t warps = THREADS / WARP;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((neurons + warps - 1) / warps, 1 << 30)));
  const X* inputs = x.const_data_ptr<X>();
  const T* rows = w.const_data_ptr<T>();
  if (vectors<T>(features, {inputs, rows}))
    dot_kernel<16 / sizeof(T), T, X, Acc>
        <<<grid, THREADS, 0, stream(w)>>>(inputs, rows, active, tokens, neurons, features, done);
  else
    dot_kernel<1, T, X, Acc>
        <<<grid, THREADS, 0, stream(w)>>>(inputs, rows, active, tokens, neurons, features, done);
  check_launch("dot_kernel");
}

template <class T, class Acc, class Out>
void launch_sum(const Tensor& h, const Tensor& w, const bool* active, const T* bias, Tensor& y) {
  const int64_t tokens = h.size(0), neurons = w.size(0), features = w.size(1);
  if (!tokens || !features) return;
  const int64_t windows = (neurons + WINDOW - 1) / WINDOW, block = std::min(BLOCK, tokens);
  Tensor parts = torch::stable::new_empty(h, {windows * block * features});
  const Acc* values = h.const_data_ptr<Acc>();
  const T* rows = w.const_data_ptr<T>();
  const bool fast = vectors<T>(features, {rows});
  const int64_t tile = THREADS * (fast ? 16 / sizeof(T) : 1), tiles = (features + tile - 1) / tile;
  for (int64_t n = 0; n < tokens; n += block) {
    const int64_t size = std::min(block, tokens - n);
    Acc* scratch = parts.mutable_data_ptr<Acc>();
    if (windows) {
      const dim3 grid(static_cast<unsigned>(tiles),
                      static_cast<unsigned>(std::min<int64_t>(windows, 65535)),
                      static_cast<unsigned>(size));
      const Acc* from = values + n * neurons;
      const bool* on = active + n * neurons;
      if (fast)
        sum_kernel<16 / sizeof(T)>
            <<<grid, THREADS, 0, stream(w)>>>(from, rows, on, neurons, features, scratch);
      else
        sum_kernel<1><<<grid, THREADS, 0, stream(w)>>>(from, rows, on, neurons, features, scratch);
      check_launch("sum_kernel");
    }
    const int64_t count = size * features;
    finish_kernel<<<static_cast<unsigned>((count + THREADS - 1) / THREADS), THREADS, 0, stream(w)>>>(
        static_cast<const Acc*>(scratch), windows, count, features, bias,
        y.mutable_data_ptr<Out>() + n * features);
    check_launch("finish_kernel");
  }
}

template <class T, class Acc>
void launch_outer(const Tensor& h, const Tensor& x, const bool* active, Tensor& out) {
  const int64_t tokens = h.size(0), neurons = h.size(1), features = x.size(1);
  if (!neurons || !features) return;
  const Acc* values = h.const_data_ptr<Acc>();
  const T* rows = x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const bool fast = vectors<T>(features, {rows, to});
  const int64_t tile = THREADS * (fast ? 16 / sizeof(T) : 1), tiles = (features + tile - 1) / tile;
  const dim3 grid(static_cast<unsigned>(neurons),
                  static_cast<unsigned>(std::min<int64_t>(tiles, 65535)));
  if (fast)
    outer_kernel<16 / sizeof(T)>
        <<<grid, THREADS, 0, stream(x)>>>(values, rows, active, tokens, neurons, features, to);
  else
    outer_kernel<1><<<grid, THREADS, 0, stream(x)>>>(values, rows, active, tokens, neurons, features, to);
  check_launch("outer_kernel");
}

Tensor as(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor
                                                                : torch::stable::to(tensor, type));
}

std::optional<Tensor> as(const std::optional<Tensor>& tensor, ScalarType type) {
  return tensor ? std::optional(as(*tensor, type)) : std::nullopt;
}

ScalarType wide(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Runs op<T, Acc>() for the element type of a weight and the type that its sums are kept in.
template <class Op>
auto with_types(ScalarType type, const Op& op) {
  switch (type) {
    case ScalarType::Float: return op.template operator()<float, float>();
    case ScalarType::Double: return op.template operator()<double, double>();
    case ScalarType::BFloat16: return op.template operator()<BFloat16, float>();
    case ScalarType::Half: return op.template operator()<Half, float>();
    default: STD_TORCH_CHECK(false, "sparse_ffn: expected a floating-point type");
  }
}

void check_active(const Tensor& active, int64_t tokens, int64_t neurons) {
  STD_TORCH_CHECK(active.scalar_type() == ScalarType::Bool && active.dim() == 2 &&
                      active.size(0) == tokens && active.size(1) == neurons,
                  "active: expected bool of shape (", tokens, ", ", neurons, ")");
}

// On CUDA the caller decides by shapes between these and matrix products: the share is not looked at.
Tensor rows_dot(const Tensor& x, const Tensor& w, std::optional<Tensor> active, double) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1),
                  "rows_dot: expected x (N, D) and w (H, D)");
  if (active) check_active(*active, x.size(0), w.size(0));
  const DeviceGuard guard(w.get_device_index());
  const ScalarType type = w.scalar_type(), sums = wide(type);
  const Tensor rows = as(w, type);
  const Tensor inputs = as(x, x.scalar_type() == type ? type : sums);
  const std::optional<Tensor> on = as(active, ScalarType::Bool);
  Tensor out = torch::stable::new_empty(rows, {x.size(0), w.size(0)}, sums);
  with_types(type, [&]<class T, class Acc>() {
    const Store<Acc> done{out.mutable_data_ptr<Acc>(), w.size(0)};
    if (inputs.scalar_type() == type) launch_dot<T, T, Acc>(inputs, rows, data<bool>(on), done);
    else launch_dot<T, Acc, Acc>(inputs, rows, data<bool>(on), done);
  });
  return out;
}

Tensor rows_sum(const Tensor& h, const Tensor& w, const Tensor& active, double) {
  STD_TORCH_CHECK(h.dim() == 2 && w.dim() == 2 && h.size(1) == w.size(0),
                  "rows_sum: expected h (N, H) and w (H, D)");
  check_active(active, h.size(0), h.size(1));
  const DeviceGuard guard(w.get_device_index());
  const Tensor rows = as(w, w.scalar_type()), values = as(h, wide(w.scalar_type()));
  const Tensor on = as(active, ScalarType::Bool);
  Tensor y = torch::stable::new_empty(values, {h.size(0), w.size(1)});
  with_types(w.scalar_type(), [&]<class T, class Acc>() {
    launch_sum<T, Acc, Acc>(values, rows, on.const_data_ptr<bool>(), nullptr, y);
  });
  return y;
}

Tensor rows_outer(const Tensor& h, const Tensor& x, const Tensor& active, double) {
  STD_TORCH_CHECK(h.dim() == 2 && x.dim() == 2 && h.size(0) == x.size(0),
                  "rows_outer: expected h (N, H) and x (N, D)");
  check_active(active, h.size(0), h.size(1));
  const DeviceGuard guard(x.get_device_index());
  const Tensor rows = as(x, x.scalar_type()), values = as(h, wide(x.scalar_type()));
  const Tensor on = as(active, ScalarType::Bool);
  Tensor out = torch::stable::new_empty(rows, {h.size(1), x.size(1)});
  with_types(x.scalar_type(), [&]<class T, class Acc>() {
    launch_outer<T, Acc>(values, rows, on.const_data_ptr<bool>(), out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_ffn(
    const Tensor& x, const Tensor& w_up, const Tensor& w_down_t, std::optional<Tensor> w_gate,
    std::optional<Tensor> b_up, std::optional<Tensor> b_gate, std::optional<Tensor> b_down,
    std::optional<Tensor> thresholds, std::optional<Tensor> mask, double threshold,
    std::string activation, double shift, bool on_product, double) {
  const Activation act = activation_of(activation);
  STD_TORCH_CHECK(act != Activation::unknown, "activation: unknown name ", activation);
  STD_TORCH_CHECK(x.dim() == 2 && w_up.dim() == 2 && x.size(1) == w_up.size(1),
                  "sparse_ffn: expected x (N, D) and w_up (H, D)");
  const int64_t tokens = x.size(0), neurons = w_up.size(0), features = w_up.size(1);
  const ScalarType type = w_up.scalar_type(), sums = wide(type);
  for (const Tensor& w : {w_down_t, w_gate.value_or(w_up)})
    STD_TORCH_CHECK(w.dim() == 2 && w.size(0) == neurons && w.size(1) == features &&
                        w.scalar_type() == type,
                    "sparse_ffn: weights must have one shape and type");
  for (const auto& row : {b_up, b_gate, thresholds})
    STD_TORCH_CHECK(!row || row->numel() == neurons, "sparse_ffn: expected one value a neuron");
  STD_TORCH_CHECK(!b_down || b_down->numel() == features, "b_down: expected one value a feature");
  if (mask) check_active(*mask, tokens, neurons);
  const DeviceGuard guard(w_up.get_device_index());
  const Tensor input = as(x, type), up = as(w_up, type), down = as(w_down_t, type);
  const auto gate = as(w_gate, type), bias_up = as(b_up, type), bias_gate = as(b_gate, type);
  const auto bias_down = as(b_down, type), limits = as(thresholds, sums);
  const auto allowed = as(mask, ScalarType::Bool);
  Tensor z = torch::stable::new_empty(input, {tokens, neurons}, sums);
  Tensor h = torch::stable::empty_like(z), y = torch::stable::empty_like(input);
  Tensor u = gate ? torch::stable::empty_like(z) : torch::stable::new_empty(z, {0});
  Tensor active = torch::stable::new_empty(z, {tokens, neurons}, ScalarType::Bool);
  with_types(type, [&]<class T, class Acc>() {
    bool* on = active.mutable_data_ptr<bool>();
    Acc* product = h.mutable_data_ptr<Acc>();
    const Acc limit = static_cast<Acc>(threshold);
    const Gate<T, Acc> first{data<T>(gate ? bias_gate : bias_up), data<Acc>(limits), limit,
                             static_cast<Acc>(shift), act, on_product && gate, neurons,
                             z.mutable_data_ptr<Acc>(), product, on};
    launch_dot<T, T, Acc>(input, gate ? *gate : up, data<bool>(allowed), first);
    if (gate) {
      const Up<T, Acc> second{data<T>(bias_up), data<Acc>(limits), limit, on_product, neurons,
                              u.mutable_data_ptr<Acc>(), product, on};
      launch_dot<T, T, Acc>(input, up, on, second);
    }
    launch_sum<T, Acc, T>(h, down, on, data<T>(bias_down), y);
  });
  return {y, z, u, active};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("rows_dot", TORCH_BOX(&rows_dot));
  m.impl("rows_sum", TORCH_BOX(&rows_sum));
  m.impl("rows_outer", TORCH_BOX(&rows_outer));
  m.impl("sparse_ffn", TORCH_BOX(&sparse_ffn));
}

}  // namespace torchzoo
