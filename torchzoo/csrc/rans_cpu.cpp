// rANS on the CPU: coding and decoding streams by integer tables, and making the tables.
//
// Streams are independent, so threads take streams; within one, symbols follow each other. Tables use
// float64 products, one quotient and comparisons, in an order that is fixed. No product is fused with
// a sum, which would round differently from machine to machine.
#pragma GCC optimize("fp-contract=off")

#include "cpu.h"

#include <cmath>

namespace torchzoo {
namespace {

constexpr uint64_t LOW = uint64_t(1) << 31;
constexpr double SMALLEST = 1e-280;
constexpr int64_t SYMBOLS = 1 << 13;  // a thread's share, at least

const int64_t* longs(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == size,
                  name, ": expected ", size, " contiguous int64 values");
  return t.const_data_ptr<int64_t>();
}

const int32_t* ints(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), name, ": expected contiguous int32");
  return t.const_data_ptr<int32_t>();
}

// Where streams end among `total` symbols, checked.
const int64_t* checked_ends(const Tensor& ends, int64_t total) {
  const int64_t *end = longs(ends, ends.numel(), "ends"), streams = ends.numel();
  int64_t last = 0;
  for (int64_t s = 0; s < streams; last = end[s++])
    STD_TORCH_CHECK(end[s] >= last && end[s] <= total, "ends: expected numbers that don't decrease within [0, ", total, "]");
  STD_TORCH_CHECK(last == total, "ends: expected the last to be ", total);
  return end;
}

int64_t checked_lanes(const Tensor& state, int64_t streams) {
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == streams && state.size(1) > 0, "state: expected (", streams, ", lanes)");
  longs(state, state.numel(), "state");
  return state.size(1);
}

void check_precision(int64_t precision) {
  STD_TORCH_CHECK(precision >= 1 && precision <= 28, "precision: expected 1 to 28");
}

Tensor copy_of(const Tensor& t) {
  Tensor out = fresh(t, {t.sizes().begin(), t.sizes().end()});
  std::copy_n(t.const_data_ptr<int64_t>(), t.numel(), out.mutable_data_ptr<int64_t>());
  return out;
}

int64_t share(int64_t streams, int64_t symbols) {
  return std::max<int64_t>(1, SYMBOLS * streams / std::max<int64_t>(symbols, 1));
}

std::tuple<Tensor, Tensor, Tensor> encode(const Tensor& freq, const Tensor& start, const Tensor& ends, const Tensor& state,
                                          int64_t precision) {
  check_precision(precision);
  const int64_t total = freq.numel(), streams = ends.numel(), lanes = checked_lanes(state, streams);
  const int32_t *f = ints(freq, "freq"), *c = ints(start, "start");
  STD_TORCH_CHECK(start.numel() == total, "start: expected as many entries as freq");
  STD_TORCH_CHECK(std::all_of(f, f + total, [](int32_t value) { return value > 0; }), "freq: expected at least 1");
  const int64_t* end = checked_ends(ends, total);
  Tensor states = copy_of(state), counts = fresh(ends, {streams});
  int64_t *s = states.mutable_data_ptr<int64_t>(), *count = counts.mutable_data_ptr<int64_t>();
  std::vector<uint32_t> spilled(total);  // a symbol spills one word at most
  parallel_for(0, streams, share(streams, total), [&](int64_t low, int64_t high) {
    for (int64_t stream = low; stream < high; ++stream) {
      const int64_t first = stream ? end[stream - 1] : 0;
      uint32_t* out = spilled.data() + first;
      int64_t* lane = s + stream * lanes;
      for (int64_t i = end[stream] - 1; i >= first; --i) {
        int64_t& held = lane[lanes == 1 ? 0 : (i - first) % lanes];
        uint64_t x = held;
        const uint64_t width = f[i];
        if (x >= width << (63 - precision)) *out++ = static_cast<uint32_t>(x), x >>= 32;
        held = static_cast<int64_t>(((x / width) << precision) + x % width + c[i]);
      }
      count[stream] = out - (spilled.data() + first);
    }
  });
  int64_t words = 0;
  for (int64_t stream = 0; stream < streams; ++stream) words += count[stream];
  Tensor result = fresh(freq, {words});
  int32_t* to = result.mutable_data_ptr<int32_t>();
  for (int64_t stream = 0; stream < streams; to += count[stream++])
    if (count[stream]) std::memcpy(to, spilled.data() + (stream ? end[stream - 1] : 0), sizeof(uint32_t) * count[stream]);
  return {result, counts, states};
}

std::tuple<Tensor, Tensor, Tensor> decode(const Tensor& cdf, const Tensor& ends, const Tensor& words, const Tensor& position,
                                          const Tensor& limit, const Tensor& state, int64_t precision) {
  check_precision(precision);
  STD_TORCH_CHECK(cdf.dim() == 2 && cdf.size(1) >= 2, "cdf: expected (T, C + 1)");
  const int64_t total = cdf.size(0), width = cdf.size(1), streams = ends.numel(), lanes = checked_lanes(state, streams);
  const int32_t *tables = ints(cdf, "cdf"), *word = ints(words, "words");
  const int64_t *end = checked_ends(ends, total), *last = longs(limit, streams, "limit");
  for (int64_t s = 0; s < streams; ++s)
    STD_TORCH_CHECK(last[s] <= words.numel() && longs(position, streams, "position")[s] >= 0, "limit, position: outside the words");
  Tensor states = copy_of(state), positions = copy_of(position), symbols = fresh(ends, {total});
  int64_t *s = states.mutable_data_ptr<int64_t>(), *at = positions.mutable_data_ptr<int64_t>();
  int64_t* out = symbols.mutable_data_ptr<int64_t>();
  const uint64_t mask = (uint64_t(1) << precision) - 1;
  parallel_for(0, streams, share(streams, total), [&](int64_t low, int64_t high) {
    for (int64_t stream = low; stream < high; ++stream) {
      const int64_t first = stream ? end[stream - 1] : 0;
      int64_t* lane = s + stream * lanes;
      for (int64_t i = first; i < end[stream]; ++i) {
        int64_t& held = lane[lanes == 1 ? 0 : (i - first) % lanes];
        uint64_t x = held;
        const int32_t* row = tables + i * width;
        const int32_t r = static_cast<int32_t>(x & mask);
        // The last start that is not above r; the table's end, 2^n, always is.
        const int64_t symbol = std::upper_bound(row + 1, row + width - 1, r) - row - 1;
        x = static_cast<uint64_t>(row[symbol + 1] - row[symbol]) * (x >> precision) + r - row[symbol];
        if (x < LOW) {
          x = x << 32 | (at[stream] < last[stream] ? static_cast<uint32_t>(word[at[stream]]) : 0u);
          ++at[stream];
        }
        held = static_cast<int64_t>(x);
        out[i] = symbol;
      }
    }
  });
  return {symbols, positions, states};
}

// Tables of rows [begin, end). The floor is that of a number from 0 to 2^28, so truncation does it.
template <int bytes>
TZ_INLINE void fill_tables_body(const double* pmf, int64_t begin, int64_t end, int64_t categories, int64_t precision,
                                double* __restrict scaled, int32_t* __restrict cdf) {
  const int32_t whole = int32_t(1) << precision;
  for (int64_t row = begin; row < end; ++row) {
    const double* p = pmf + row * categories;
    int32_t* out = cdf + row * (categories + 1);
    double total = 0;
    for (int64_t c = 0; c < categories; ++c) total += p[c];
    const bool proper = total >= SMALLEST && std::isfinite(total);
    const double scale = (whole - categories) / (proper ? total : static_cast<double>(categories));
    for (int64_t c = 0; c < categories; ++c) scaled[c] = proper ? p[c] : 1.0;
    int64_t top = 0;
    for (int64_t c = 1; c < categories; ++c)
      if (scaled[c] > scaled[top]) top = c;
    for (int64_t c = 0; c < categories; ++c) out[c + 1] = 1 + static_cast<int32_t>(scaled[c] * scale);
    int32_t sum = 0;
    for (int64_t c = 0; c < categories; ++c) sum += out[c + 1];
    out[top + 1] += whole - sum;
    out[0] = 0;
    for (int64_t c = 0; c < categories; ++c) out[c + 1] += out[c];
  }
}
TZ_ISA(fill_tables, fill_tables_body)

Tensor tables(const Tensor& pmf, int64_t precision) {
  check_precision(precision);
  STD_TORCH_CHECK(pmf.dim() == 2 && pmf.scalar_type() == ScalarType::Double && pmf.is_contiguous(),
                  "pmf: expected contiguous float64 (T, C)");
  const int64_t rows = pmf.size(0), categories = pmf.size(1);
  STD_TORCH_CHECK(categories >= 1 && categories <= int64_t(1) << (precision - 1), "pmf: too many categories");
  Tensor cdf = fresh(pmf, {rows, categories + 1}, ScalarType::Int);
  const double* p = pmf.const_data_ptr<double>();
  int32_t* out = cdf.mutable_data_ptr<int32_t>();
  parallel_for(0, rows, std::max<int64_t>(1, SYMBOLS / categories), [&](int64_t begin, int64_t end) {
    std::vector<double> scaled(categories);
    fill_tables(p, begin, end, categories, precision, scaled.data(), out);
  });
  return cdf;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("rans_encode", TORCH_BOX(&encode));
  m.impl("rans_decode", TORCH_BOX(&decode));
  m.impl("rans_tables", TORCH_BOX(&tables));
}

}  // namespace torchzoo
