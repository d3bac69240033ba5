// sparse_ffn and the three products that it and its derivatives are made of, on the CPU.
//
// Traffic for one token: each row of the first matrix that the mask lets through, then the rows of
// the active neurons, once each, whole rows at a time. Dot products are shared out by neurons, in runs of
// equal work, sums by pieces of the tokens' lists of neurons. Where the caller allows it (`dense_above` < 1) a product whose
// active share is above that is a plain matrix product that reads every row.
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <array>

#include "rows.h"
#include "sparse_ffn.h"

namespace torchzoo {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t TILE = 4096;  // features of a sum that stay in L1
constexpr int64_t PARTS = 8;    // pieces of a token's neurons, added up in order at the end
constexpr int64_t BLOCK = 16;   // tokens summed together

// New memory that reads as zero. What malloc takes from the system for a large block are pages that
// do so till they are written; dropping whatever a page held costs little, so rows of zeros that are
// never written cost nothing.
Tensor zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  Tensor out = fresh(like, sizes, type);
  const int64_t size = out.numel() * static_cast<int64_t>(out.element_size());
  if (!size) return out;
  char* data = static_cast<char*>(out.mutable_data_ptr());
  char *from = data, *to = data;
#ifdef __linux__
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  if (size >= int64_t(1) << 20) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(data);
    char* first = data + (page - start % page) % page;
    char* last = data + size - (start + size) % page;
    if (!madvise(first, last - first, MADV_DONTNEED)) from = first, to = last;
  }
#endif
  std::memset(data, 0, from - data);
  std::memset(to, 0, data + size - to);
  return out;
}

// A matrix product that autocast leaves alone.
Tensor mm(const Tensor& a, const Tensor& b) {
  Tensor out = fresh(a, {a.size(0), b.size(1)});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor as(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor
                                                                : torch::stable::to(tensor, type));
}

Tensor transposed(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

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

ScalarType wide(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether a product of tokens and neurons is better done for all pairs.
bool dense(const bool* active, int64_t pairs, double dense_above) {
  if (dense_above >= 1) return false;
  const int64_t count = active ? std::count(active, active + pairs, true) : pairs;
  return static_cast<double>(count) > dense_above * static_cast<double>(pairs);
}

// out[n, i] = x_n·w_i where active (all, if null), else 0.
template <class T, class Acc>
Tensor dot(const Tensor& x, const Tensor& w, const bool* active, double dense_above) {
  const int64_t tokens = x.size(0), features = x.size(1), neurons = w.size(0);
  const ScalarType type = w.scalar_type(), sums = wide(type);
  if (dense(active, tokens * neurons, dense_above)) {
    Tensor out = as(mm(as(x, type), transposed(w)), sums);
    Acc* values = out.mutable_data_ptr<Acc>();
    for (int64_t p = 0; active && p < tokens * neurons; ++p)
      if (!active[p]) values[p] = 0;
    return out;
  }
  Tensor out = zeros(x, {tokens, neurons}, sums);
  const Tensor wide_x = as(x, sums);
  const Acc* columns = wide_x.const_data_ptr<Acc>();
  const T* rows = w.const_data_ptr<T>();
  Acc* values = out.mutable_data_ptr<Acc>();
  const Pairs pairs = active ? pairs_by_column(active, tokens, neurons) : all_pairs(tokens);
  for_equal_runs(pairs, neurons, [&](int64_t first, int64_t last) {
    std::vector<Acc> found(ROWS * tokens);
    int64_t i = first, group[ROWS];
    const T* row[ROWS];
    while (i < last) {
      int64_t size = 0;  // neurons that the same tokens ask for
      for (; i < last && size < ROWS; ++i) {
        if (pairs.of(i).empty()) continue;
        if (size && !pairs.alike(group[0], i)) break;
        row[size] = rows + i * features;
        group[size++] = i;
      }
      if (!size) break;
      const auto of = pairs.of(group[0]);
      const int64_t count = static_cast<int64_t>(of.size());
      dots(row, size, columns, of.data(), count, features, found.data());
      for (int64_t r = 0; r < size; ++r)
        for (int64_t t = 0; t < count; ++t) values[of[t] * neurons + group[r]] = found[r * count + t];
    }
  });
  return out;
}

// y_n = Σ_i h_ni w_i over the active i, in their order.
template <class T, class Acc>
Tensor sum(const Tensor& h, const Tensor& w, const bool* active, double dense_above) {
  const int64_t tokens = h.size(0), neurons = w.size(0), features = w.size(1);
  const ScalarType type = w.scalar_type();
  const Acc* values = h.const_data_ptr<Acc>();
  if (dense(active, tokens * neurons, dense_above)) {
    Tensor kept = fresh(h);
    Acc* out = kept.mutable_data_ptr<Acc>();
    for (int64_t p = 0; p < tokens * neurons; ++p) out[p] = active[p] ? values[p] : Acc(0);
    return as(mm(as(kept, type), w), wide(type));
  }
  Tensor y = zeros(h, {tokens, features}, wide(type));
  Acc* out = y.mutable_data_ptr<Acc>();
  const T* rows = w.const_data_ptr<T>();
  const Pairs pairs = pairs_by_row(active, tokens, neurons);
  std::vector<Acc> coefficient(pairs.partners.size());
  for (int64_t n = 0; n < tokens; ++n)
    for (int64_t p = pairs.starts[n]; p < pairs.starts[n + 1]; ++p)
      coefficient[p] = values[n * neurons + pairs.partners[p]];
  const int64_t block = std::min(BLOCK, tokens);
  std::vector<Acc> parts(block * PARTS * features);
  for (int64_t start = 0; start < tokens; start += block) {
    const int64_t size = std::min(block, tokens - start);
    for_tasks(size * PARTS, [&](int64_t task) {
      const int64_t n = start + task % size, part = task / size;
      const int64_t first = pairs.starts[n], count = pairs.starts[n + 1] - first;
      const int64_t from = first + count * part / PARTS, to = first + count * (part + 1) / PARTS;
      Acc* total = parts.data() + (part * block + task % size) * features;
      std::fill_n(total, features, Acc(0));
      for (int64_t o = 0; o < features; o += TILE)
        accumulate(coefficient.data() + from, pairs.partners.data() + from, to - from, rows + o,
                   features, total + o, std::min(TILE, features - o));
    });
    parallel_for(0, size * features, TILE, [&](int64_t begin, int64_t end) {
      for (int64_t part = 0; part < PARTS; ++part) {
        const Acc* total = parts.data() + part * block * features;
        for (int64_t o = begin; o < end; ++o) out[start * features + o] += total[o];
      }
    });
  }
  return y;
}

// out[i] = Σ_n h_ni x_n over the active n, in their order.
template <class T, class Acc>
Tensor outer(const Tensor& h, const Tensor& x, const bool* active, double dense_above) {
  const int64_t tokens = h.size(0), neurons = h.size(1), features = x.size(1);
  const Acc* values = h.const_data_ptr<Acc>();
  if (dense(active, tokens * neurons, dense_above)) {
    Tensor kept = fresh(h);
    Acc* out = kept.mutable_data_ptr<Acc>();
    for (int64_t p = 0; p < tokens * neurons; ++p) out[p] = active[p] ? values[p] : Acc(0);
    return mm(transposed(as(kept, x.scalar_type())), x);
  }
  Tensor result = zeros(x, {neurons, features}, x.scalar_type());
  T* out = result.mutable_data_ptr<T>();
  const T* rows = x.const_data_ptr<T>();
  const Pairs pairs = pairs_by_column(active, tokens, neurons);
  for_equal_runs(pairs, neurons, [&](int64_t first, int64_t last) {
    std::vector<Acc> coefficient(tokens), total(TILE);
    for (int64_t i = first; i < last; ++i) {
      const auto of = pairs.of(i);
      const int64_t count = static_cast<int64_t>(of.size());
      for (int64_t t = 0; t < count; ++t) coefficient[t] = values[of[t] * neurons + i];
      for (int64_t o = 0; count && o < features; o += TILE) {
        const int64_t n = std::min(TILE, features - o);
        std::fill_n(total.data(), n, Acc(0));
        accumulate(coefficient.data(), of.data(), count, rows + o, features, total.data(), n);
        for (int64_t j = 0; j < n; ++j) out[i * features + o + j] = static_cast<T>(total[j]);
      }
    }
  });
  return result;
}

const bool* bits(const std::optional<Tensor>& active) {
  return active ? active->const_data_ptr<bool>() : nullptr;
}

void check_active(const Tensor& active, int64_t tokens, int64_t neurons) {
  STD_TORCH_CHECK(active.scalar_type() == ScalarType::Bool && active.dim() == 2 &&
                      active.size(0) == tokens && active.size(1) == neurons,
                  "active: expected bool of shape (", tokens, ", ", neurons, ")");
}

Tensor rows_dot(const Tensor& x, const Tensor& w, std::optional<Tensor> active, double dense_above) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1),
                  "rows_dot: expected x (N, D) and w (H, D)");
  if (active) check_active(*active, x.size(0), w.size(0));
  if (active) active = torch::stable::contiguous(*active);
  const Tensor rows = torch::stable::contiguous(w);
  return with_types(w.scalar_type(), [&]<class T, class Acc>() {
    return dot<T, Acc>(x, rows, bits(active), dense_above);
  });
}

Tensor rows_sum(const Tensor& h, const Tensor& w, const Tensor& active, double dense_above) {
  STD_TORCH_CHECK(h.dim() == 2 && w.dim() == 2 && h.size(1) == w.size(0),
                  "rows_sum: expected h (N, H) and w (H, D)");
  check_active(active, h.size(0), h.size(1));
  const Tensor rows = torch::stable::contiguous(w), on = torch::stable::contiguous(active);
  return with_types(w.scalar_type(), [&]<class T, class Acc>() {
    return sum<T, Acc>(as(h, wide(w.scalar_type())), rows, on.const_data_ptr<bool>(), dense_above);
  });
}

Tensor rows_outer(const Tensor& h, const Tensor& x, const Tensor& active, double dense_above) {
  STD_TORCH_CHECK(h.dim() == 2 && x.dim() == 2 && h.size(0) == x.size(0),
                  "rows_outer: expected h (N, H) and x (N, D)");
  check_active(active, h.size(0), h.size(1));
  const Tensor rows = torch::stable::contiguous(x), on = torch::stable::contiguous(active);
  return with_types(x.scalar_type(), [&]<class T, class Acc>() {
    return outer<T, Acc>(as(h, wide(x.scalar_type())), rows, on.const_data_ptr<bool>(), dense_above);
  });
}

// values[n, i] += bias[i] for every row.
template <class Acc>
void add_bias(const std::optional<Tensor>& bias, Tensor& values) {
  if (!bias) return;
  const Tensor row = as(*bias, values.scalar_type());
  const Acc* b = row.const_data_ptr<Acc>();
  Acc* v = values.mutable_data_ptr<Acc>();
  const int64_t rows = values.size(0), columns = values.size(1);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < columns; ++i) v[n * columns + i] += b[i];
}

struct Rule {  // which neurons count
  Activation activation;
  double shift, threshold;
  bool on_product;
};

// The whole forward: y, z, u (empty if there is no gate) and which pairs count.
template <class T, class Acc>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& w_up, const Tensor& w_down_t, const std::optional<Tensor>& w_gate,
    const std::optional<Tensor>& b_up, const std::optional<Tensor>& b_gate,
    const std::optional<Tensor>& b_down, const std::optional<Tensor>& thresholds,
    const std::optional<Tensor>& mask, const Rule& rule, double dense_above) {
  const int64_t tokens = x.size(0), neurons = w_up.size(0), pairs = tokens * neurons;
  Tensor z = dot<T, Acc>(x, w_gate ? *w_gate : w_up, bits(mask), dense_above);
  add_bias<Acc>(w_gate ? b_gate : b_up, z);
  const Tensor limits = thresholds ? as(*thresholds, z.scalar_type()) : z;
  const Acc* limit = thresholds ? limits.const_data_ptr<Acc>() : nullptr;
  const Acc shift = static_cast<Acc>(rule.shift), threshold = static_cast<Acc>(rule.threshold);
  auto above = [&](Acc value, int64_t p) { return counts(value, limit ? limit[p % neurons] : threshold); };
  Tensor h = fresh(z);
  Tensor active = fresh(z, {tokens, neurons}, ScalarType::Bool);
  Acc *pre = z.mutable_data_ptr<Acc>(), *value = h.mutable_data_ptr<Acc>();
  bool* on = active.mutable_data_ptr<bool>();
  const bool* allowed = bits(mask);
  for (int64_t p = 0; p < pairs; ++p) {
    if (allowed && !allowed[p]) pre[p] = 0;
    value[p] = activate(rule.activation, pre[p], shift);
    on[p] = (!allowed || allowed[p]) && (rule.on_product || above(value[p], p));
  }
  Tensor u = w_gate ? dot<T, Acc>(x, w_up, on, dense_above) : fresh(z, {0});
  if (w_gate) {
    add_bias<Acc>(b_up, u);
    Acc* up = u.mutable_data_ptr<Acc>();
    for (int64_t p = 0; p < pairs; ++p) {
      if (!on[p]) up[p] = 0;
      value[p] *= up[p];
    }
  }
  for (int64_t p = 0; rule.on_product && p < pairs; ++p) on[p] = on[p] && above(value[p], p);
  Tensor y = sum<T, Acc>(h, w_down_t, on, dense_above);
  add_bias<Acc>(b_down, y);
  return {as(y, x.scalar_type()), z, u, active};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_ffn(
    const Tensor& x, const Tensor& w_up, const Tensor& w_down_t, std::optional<Tensor> w_gate,
    std::optional<Tensor> b_up, std::optional<Tensor> b_gate, std::optional<Tensor> b_down,
    std::optional<Tensor> thresholds, std::optional<Tensor> mask, double threshold,
    std::string activation, double shift, bool on_product, double dense_above) {
  using torch::stable::contiguous;
  const Rule rule{activation_of(activation), shift, threshold, on_product};
  STD_TORCH_CHECK(rule.activation != Activation::unknown, "activation: unknown name ", activation);
  STD_TORCH_CHECK(x.dim() == 2 && w_up.dim() == 2 && x.size(1) == w_up.size(1),
                  "sparse_ffn: expected x (N, D) and w_up (H, D)");
  const int64_t neurons = w_up.size(0), features = w_up.size(1);
  const ScalarType type = w_up.scalar_type();
  for (const Tensor& w : {w_down_t, w_gate.value_or(w_up)})
    STD_TORCH_CHECK(w.dim() == 2 && w.size(0) == neurons && w.size(1) == features &&
                        w.scalar_type() == type,
                    "sparse_ffn: weights must have one shape and type");
  for (const auto& row : {b_up, b_gate, thresholds})
    STD_TORCH_CHECK(!row || row->numel() == neurons, "sparse_ffn: expected one value a neuron");
  STD_TORCH_CHECK(!b_down || b_down->numel() == features, "b_down: expected one value a feature");
  if (mask) check_active(*mask, x.size(0), neurons);
  if (mask) mask = contiguous(*mask);
  if (w_gate) w_gate = contiguous(*w_gate);
  const Tensor up = contiguous(w_up), down = contiguous(w_down_t);
  return with_types(type, [&]<class T, class Acc>() {
    return forward<T, Acc>(x, up, down, w_gate, b_up, b_gate, b_down, thresholds, mask, rule,
                           dense_above);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("rows_dot", TORCH_BOX(&rows_dot));
  m.impl("rows_sum", TORCH_BOX(&rows_sum));
  m.impl("rows_outer", TORCH_BOX(&rows_outer));
  m.impl("sparse_ffn", TORCH_BOX(&sparse_ffn));
}

}  // namespace torchzoo
