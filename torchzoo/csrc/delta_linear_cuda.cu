// delta_linear_step on CUDA: acc' = acc + Σ_{j: Δ_j ≠ 0} Δ_j weight_t[j], x_ref' = x_ref + Δ.
//
// Inputs are cut into parts. A block has a stream, a tile of outputs and a part: it compares the
// part's inputs with their references, THREADS at a time, compacts those that changed into a list
// in shared memory, in their order, and adds their rows of weights, a thread's outputs by one load
// of 16 bytes. Where streams and tiles alone don't fill the device, each part has a block of its
// own and `finish_kernel` adds up the parts; else a block goes through all of them. Either way a
// part is summed by itself and parts are added in order, so that a stream's result does not depend
// on its batch. No atomics, and counts stay on the device: a step can be captured in a graph.
// Traffic: the changed rows, once for each stream (streams that share rows run together and find
// them in L2), x and x_ref once for each tile, and the parts of acc twice. Limit: 2³¹ − 1 blocks.
#include "cuda.h"
#include "delta_linear.h"
#include "delta_linear_tensors.h"

namespace torchzoo {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int THREADS = 128;
constexpr int64_t SPAN = 2 * THREADS;  // inputs of a part, where that makes no more than PARTS
constexpr int64_t PARTS = 64;
constexpr int64_t ENOUGH = 512;  // blocks that fill the device

template <class T>
struct Inputs {
  const T *x, *ref, *quantum;
  bool per_input;
  T threshold;
  int64_t streams, size, span, parts;

  // Input j of a stream: its change, and its new reference.
  __device__ T change_of(int64_t stream, int64_t j, T* new_ref) const {
    const int64_t at = stream * size + j;
    const T sent = quantum ? quantised(x[at], quantum[per_input ? j : 0]) : x[at];
    return change(sent, ref[at], threshold, new_ref);
  }
};

// Finds the changed inputs of the THREADS from j0 on and adds their rows, for outputs o and on.
// Every thread of the block takes part; `new_ref` is null but in one of the blocks of a stream.
template <int pack, class T, class W>
__device__ __forceinline__ void add_changed(const Inputs<T>& inputs, int64_t stream, int64_t j0,
                                            const W* __restrict__ weight, int64_t outputs,
                                            int64_t o, T* new_ref, T* sum) {
  __shared__ int list[THREADS];
  __shared__ T deltas[THREADS];
  const int64_t j = j0 + threadIdx.x;
  T delta = T(0), ref;
  if (j < inputs.size) {
    delta = inputs.change_of(stream, j, &ref);
    if (new_ref) new_ref[stream * inputs.size + j] = ref;
  }
  const bool changed = delta != T(0);  // a NaN is a change
  int count;
  const int place = block_sum_before<THREADS>(static_cast<int>(changed), &count);
  if (changed) {
    list[place] = threadIdx.x;
    deltas[place] = delta;
  }
  __syncthreads();
  if (o >= outputs) return;
  constexpr int AHEAD = pack * sizeof(T) > 32 ? 4 : 8;  // loads that a thread has under way
  const W* rows = weight + j0 * outputs + o;
  for (int r = 0; r < count; r += AHEAD) {
    Pack<W, pack> row[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      const int at = min(r + u, count - 1);  // the last row again: no branch delays a load
      row[u] = *reinterpret_cast<const Pack<W, pack>*>(rows + list[at] * outputs);
    }
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
      if (r + u < count)
#pragma unroll
        for (int v = 0; v < pack; ++v) sum[v] += deltas[r + u] * static_cast<T>(row[u].value[v]);
  }
}

// Blocks: streams, parts (one block for all of them where `parts` is null), tiles of outputs.
template <int pack, class T, class W>
__global__ void __launch_bounds__(THREADS, 4)
    step_kernel(Inputs<T> inputs, const W* __restrict__ weight, int64_t outputs,
                const T* __restrict__ acc, T* new_ref, T* new_acc, T* parts) {
  const unsigned streams = inputs.streams, count = inputs.parts;  // no more than there are blocks
  const unsigned rest = blockIdx.x / streams, first = parts ? rest % count : 0;
  const int64_t stream = blockIdx.x % streams, tile = parts ? rest / count : rest;
  const int64_t last = parts ? first + 1 : count;
  const int64_t o = (tile * THREADS + threadIdx.x) * pack, at = stream * outputs + o;
  Pack<T, pack> total{};
  if (!parts && o < outputs)
#pragma unroll
    for (int v = 0; v < pack; ++v) total.value[v] = acc[at + v];
  for (int64_t part = first; part < last; ++part) {
    T sum[pack] = {};
    const int64_t end = min((part + 1) * inputs.span, inputs.size);
    for (int64_t j = part * inputs.span; j < end; j += THREADS)
      add_changed<pack>(inputs, stream, j, weight, outputs, o, tile ? nullptr : new_ref, sum);
#pragma unroll
    for (int v = 0; v < pack; ++v) total.value[v] += sum[v];
  }
  if (o >= outputs) return;
  T* to = parts ? parts + first * inputs.streams * outputs + at : new_acc + at;
  *reinterpret_cast<Pack<T, pack>*>(to) = total;
}

// new_acc = acc + Σ_part parts[part], for `size` numbers of all streams.
template <class T>
__global__ void __launch_bounds__(THREADS)
    finish_kernel(const T* __restrict__ acc, const T* __restrict__ parts, int64_t count,
                  int64_t size, T* __restrict__ new_acc) {
  const int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= size) return;
  T total = acc[at];
#pragma unroll 8
  for (int64_t part = 0; part < count; ++part) total += parts[part * size + at];
  new_acc[at] = total;
}

unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "delta_linear_step: too many blocks: ", blocks);
  return static_cast<unsigned>(blocks);
}

template <int pack, class T, class W>
void launch(const Inputs<T>& inputs, const Tensor& acc, const Tensor& weight_t, Tensor& new_acc,
            Tensor& new_ref) {
  const int64_t outputs = weight_t.size(1), size = inputs.streams * outputs, width = THREADS * pack;
  const int64_t blocks = inputs.streams * std::max<int64_t>(1, (outputs + width - 1) / width);
  const bool split = blocks < ENOUGH && inputs.parts > 1 && outputs > 0;
  std::optional<Tensor> scratch;
  if (split) scratch = torch::stable::new_empty(acc, {inputs.parts * size});
  T* parts = split ? scratch->mutable_data_ptr<T>() : nullptr;
  const T* old = acc.const_data_ptr<T>();
  T* to = new_acc.mutable_data_ptr<T>();
  step_kernel<pack><<<grid(split ? blocks * inputs.parts : blocks), THREADS, 0, stream(acc)>>>(
      inputs, weight_t.const_data_ptr<W>(), outputs, old, new_ref.mutable_data_ptr<T>(), to, parts);
  check_launch("step_kernel");
  if (!split) return;
  finish_kernel<<<grid((size + THREADS - 1) / THREADS), THREADS, 0, stream(acc)>>>(
      old, static_cast<const T*>(parts), inputs.parts, size, to);
  check_launch("finish_kernel");
}

template <class T, class W>
void step(const Inputs<T>& inputs, const Tensor& acc, const Tensor& weight_t, Tensor& new_acc,
          Tensor& new_ref) {
  constexpr int pack = 16 / sizeof(W);
  if (weight_t.size(1) % pack == 0 && aligned(weight_t.const_data_ptr<W>()))
    launch<pack, T, W>(inputs, acc, weight_t, new_acc, new_ref);
  else
    launch<1, T, W>(inputs, acc, weight_t, new_acc, new_ref);
}

template <class T>
void with_weights(const Tensor& x, const Tensor& x_ref, const std::optional<Tensor>& quantum,
                  double threshold, int64_t streams, const Tensor& acc, const Tensor& weight_t,
                  Tensor& new_acc, Tensor& new_ref) {
  const int64_t size = weight_t.size(0), even = (size + PARTS - 1) / PARTS;
  const int64_t span = std::max(SPAN, (even + THREADS - 1) / THREADS * THREADS);
  const Inputs<T> inputs{x.const_data_ptr<T>(),
                         x_ref.const_data_ptr<T>(),
                         quantum ? quantum->const_data_ptr<T>() : nullptr,
                         quantum && quantum->numel() > 1,
                         static_cast<T>(threshold),
                         streams,
                         size,
                         span,
                         (size + span - 1) / span};
  switch (weight_t.scalar_type()) {
    case ScalarType::BFloat16: return step<T, BFloat16>(inputs, acc, weight_t, new_acc, new_ref);
    case ScalarType::Half: return step<T, Half>(inputs, acc, weight_t, new_acc, new_ref);
    default: return step<T, T>(inputs, acc, weight_t, new_acc, new_ref);
  }
}

std::tuple<Tensor, Tensor> delta_linear_step(const Tensor& x, const Tensor& x_ref,
                                             const Tensor& acc, const Tensor& weight_t,
                                             std::optional<Tensor> quantum, double threshold) {
  using torch::stable::contiguous;
  check_step(x, x_ref, acc, weight_t, quantum, threshold);
  const int64_t inputs = weight_t.size(0), outputs = weight_t.size(1);
  check_devices("delta_linear_step", {x, x_ref, acc, weight_t, quantum.value_or(x)});
  const DeviceGuard guard(weight_t.get_device_index());
  if (quantum) quantum = contiguous(*quantum);
  const Tensor now = contiguous(x), dense = contiguous(acc), ref = contiguous(x_ref);
  const Tensor weight = contiguous(weight_t);
  Tensor new_acc = torch::stable::empty_like(dense), new_ref = torch::stable::empty_like(ref);
  const int64_t streams = outputs ? acc.numel() / outputs : inputs ? x.numel() / inputs : 0;
  if (!streams) return {new_acc, new_ref};
  if (acc.scalar_type() == ScalarType::Double)
    with_weights<double>(now, ref, quantum, threshold, streams, dense, weight, new_acc, new_ref);
  else
    with_weights<float>(now, ref, quantum, threshold, streams, dense, weight, new_acc, new_ref);
  return {new_acc, new_ref};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("delta_linear_step", TORCH_BOX(&delta_linear_step));
  m.impl("delta_linear_step_plain", TORCH_BOX(&delta_linear_step));
}

}  // namespace torchzoo
