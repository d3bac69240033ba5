// delta_linear_step: acc' = acc + Σ_{j: Δ_j ≠ 0} Δ_j weight_t[j], x_ref' = x_ref + Δ.
//
// One pass over x finds the changed inputs of each stream; then threads share (stream, tile of
// outputs) tasks and add the rows of weight_t, ROWS at a time, so that a tile of acc is read and
// written once for ROWS rows. Traffic: the changed rows, once. The order of additions is that of the
// inputs, whatever the number of threads.
#include "delta_encode.h"
#include "delta_linear_tensors.h"
#include "rows.h"

namespace torchzoo {
namespace {

constexpr int64_t TILE = 2048;
constexpr int64_t ALONE = 1 << 18;  // numbers that a thread adds before another has woken up

template <class T>
struct Changed {  // of all streams: those of stream s are at starts[s] .. starts[s + 1]
  std::vector<int64_t> starts, inputs;
  std::vector<T> deltas;
};

template <class T>
Changed<T> find_changed(const T* x, const T* ref, const T* quantum, bool per_input, T threshold,
                        int64_t streams, int64_t inputs, T* new_ref) {
  Changed<T> found;
  std::vector<T> delta(inputs);
  found.starts.push_back(0);
  for (int64_t s = 0; s < streams; ++s) {
    const int64_t at = s * inputs;
    encode(x + at, ref + at, quantum, per_input, threshold, inputs, new_ref + at, delta.data());
    for (int64_t j = 0; j < inputs; ++j) {
      if (delta[j] != T(0)) {  // a NaN is a change
        found.inputs.push_back(j);
        found.deltas.push_back(delta[j]);
      }
    }
    found.starts.push_back(static_cast<int64_t>(found.inputs.size()));
  }
  return found;
}

template <class T, class W>
void add_changed(const Changed<T>& changed, const Tensor& weight_t, const T* acc, T* new_acc) {
  const int64_t streams = static_cast<int64_t>(changed.starts.size()) - 1;
  const int64_t outputs = weight_t.size(1), tiles = (outputs + TILE - 1) / TILE;
  const W* weight = weight_t.const_data_ptr<W>();
  const int64_t rows = static_cast<int64_t>(changed.inputs.size()) / streams + 1;
  const int64_t grain = ALONE / (rows * std::min(TILE, outputs + 1)) + 1;
  parallel_for(0, streams * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t s = task / tiles, o = task % tiles * TILE, n = std::min(TILE, outputs - o);
      const int64_t first = changed.starts[s], count = changed.starts[s + 1] - first;
      T* out = new_acc + s * outputs + o;
      std::copy_n(acc + s * outputs + o, n, out);
      accumulate(changed.deltas.data() + first, changed.inputs.data() + first, count, weight + o,
                 outputs, out, n);
    }
  });
}

template <class T>
void step(const Tensor& x, const Tensor& x_ref, const Tensor& acc, const Tensor& weight_t,
          const std::optional<Tensor>& quantum, double threshold, Tensor& new_acc, Tensor& new_ref) {
  const int64_t inputs = weight_t.size(0);
  const int64_t streams = inputs ? x.numel() / inputs : 0;
  const T* a = acc.const_data_ptr<T>();
  T* out = new_acc.mutable_data_ptr<T>();
  if (!streams) return void(std::copy_n(a, acc.numel(), out));
  const Changed<T> changed = find_changed(
      x.const_data_ptr<T>(), x_ref.const_data_ptr<T>(),
      quantum ? quantum->const_data_ptr<T>() : nullptr, quantum && quantum->numel() > 1,
      static_cast<T>(threshold), streams, inputs, new_ref.mutable_data_ptr<T>());
  switch (weight_t.scalar_type()) {
    case ScalarType::BFloat16:
      return add_changed<T, torch::headeronly::BFloat16>(changed, weight_t, a, out);
    case ScalarType::Half:
      return add_changed<T, torch::headeronly::Half>(changed, weight_t, a, out);
    default: return add_changed<T, T>(changed, weight_t, a, out);
  }
}

std::tuple<Tensor, Tensor> delta_linear_step(const Tensor& x, const Tensor& x_ref, const Tensor& acc,
                                             const Tensor& weight_t, std::optional<Tensor> quantum,
                                             double threshold) {
  check_step(x, x_ref, acc, weight_t, quantum, threshold);
  if (quantum) quantum = dense(*quantum);
  const Tensor sums = dense(acc), ref = dense(x_ref);
  Tensor new_acc = fresh(sums), new_ref = fresh(ref);
  with_type(sums, [&]<class T>() {
    step<T>(dense(x), ref, sums, dense(weight_t), quantum, threshold, new_acc, new_ref);
  });
  return {new_acc, new_ref};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("delta_linear_step", TORCH_BOX(&delta_linear_step));
  m.impl("delta_linear_step_plain", TORCH_BOX(&delta_linear_step));
}

}  // namespace torchzoo
