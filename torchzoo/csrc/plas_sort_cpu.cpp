// Passes of Parallel Linear Assignment Sorting on the CPU: groups of four cells exchange their items.
//
// The items and targets of the blocks' cells are copied side by side, block after block, so that a cell
// is a line or two of memory whose address the draw alone gives. A pass cuts every block by the same
// permutation; its groups share no cell, so threads take runs of groups. Everything is exact: products of
// differences in sums below 2^53 are doubles without rounding, so the order of additions, fused or not,
// and the number of threads change nothing.
#include "cpu.h"
#include "plas_sort.h"

#include <atomic>
#include <memory>

// Vectors stay within inlined functions, so that no calling convention is met.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace torchzoo::plas {
namespace {

constexpr int64_t SHARE = 1024;  // groups of a thread, at least
constexpr int64_t AHEAD = 6;     // groups from a fetch to its use
constexpr int64_t LINE = 64 / sizeof(int32_t);

typedef double Four __attribute__((vector_size(32)));
typedef int32_t Whole __attribute__((vector_size(16), aligned(4), may_alias));

const int64_t* checked(const Tensor& t, int64_t limit, const char* name) {
  const int64_t* values = t.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(std::all_of(values, values + t.numel(), [=](int64_t v) { return v >= 0 && v < limit; }), name,
                  ": expected indices in [0, ", limit, ")");
  return values;
}

struct Local {
  Sizes size;
  int64_t width;   // of an item: features, padded with zeros
  int32_t* rows;   // (blocks * block, 2 width): what is in a cell, and its target
  int64_t* holds;  // (blocks * block,): which item that is
};

TZ_INLINE Whole load(const int32_t* from) { return *reinterpret_cast<const Whole*>(from); }
TZ_INLINE void store(int32_t* to, Whole x) { *reinterpret_cast<Whole*>(to) = x; }
TZ_INLINE Four wide(Whole x) { return __builtin_convertvector(x, Four); }

// The sum of each vector's lanes.
TZ_INLINE Four sums(Four a, Four b, Four c, Four d) {
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Cells [begin, end) of all blocks; the sum of the squared distances of items to targets.
template <int bytes>
TZ_INLINE void gather_body(const Local& local, const int32_t* items, const int32_t* target, const int64_t* order,
                           const int64_t* cells, int64_t begin, int64_t end, int64_t* distance) {
  const int64_t features = local.size.features, width = local.width;
  for (int64_t n = begin; n < end; ++n) {
    if (n + 2 * AHEAD < end) __builtin_prefetch(items + order[cells[n + 2 * AHEAD]] * features);
    const int64_t held = local.holds[n] = order[cells[n]];
    const int32_t *from = items + held * features, *to = target + cells[n] * features;
    int32_t *item = local.rows + 2 * width * n, *goal = item + width;
    Four sum = {};
    for (int64_t d = 0; d < width; d += 4) {
      Whole x = {}, t = {};
      if (d + 4 <= features)
        x = load(from + d), t = load(to + d);
      else
        for (int64_t l = 0; d + l < features; ++l) x[l] = from[d + l], t[l] = to[d + l];
      store(item + d, x), store(goal + d, t);
      const Four apart = wide(x - t);
      sum += apart * apart;
    }
    *distance += static_cast<int64_t>(sum[0] + sum[1] + sum[2] + sum[3]);
  }
}
TZ_ISA(gather, gather_body)

// Groups [begin, end) of one pass; by how much they gain and in how many cells items change.
template <int bytes>
TZ_INLINE void pass_body(const Local& local, const int64_t* draw, int64_t begin, int64_t end, int64_t* gained,
                         int64_t* moved) {
  const int64_t width = local.width, groups = local.size.groups;
  int64_t block = begin / groups * local.size.block, group = begin % groups;
  for (int64_t n = begin; n < end; ++n, ++group) {
    if (group == groups) group = 0, block += local.size.block;
    int32_t* const rows = local.rows + 2 * width * block;
    const int64_t* const at = draw + 4 * group;
    if (group + AHEAD < groups)
      for (int k = 0; k < 4; ++k) __builtin_prefetch(rows + 2 * width * at[4 * AHEAD + k]);
    int32_t* item[4];
    for (int k = 0; k < 4; ++k) item[k] = rows + 2 * width * at[k];
    Four sum[3][3] = {};
    for (int64_t d = 0; d < width; d += 4) {
      Four x[3];
      for (int i = 0; i < 3; ++i) x[i] = wide(load(item[i + 1] + d) - load(item[0] + d));
      for (int c = 0; c < 3; ++c) {
        const Four t = wide(load(item[c + 1] + width + d) - load(item[0] + width + d));
        for (int i = 0; i < 3; ++i) sum[c][i] += t * x[i];
      }
    }
    double like[3][3], gain;
    for (int c = 0; c < 3; ++c) {
      const Four all = sums(sum[c][0], sum[c][1], sum[c][2], sum[c][2]);
      for (int i = 0; i < 3; ++i) like[c][i] = all[i];
    }
    Order order;
    if (!best_order(like, &gain, &order)) continue;
    *gained += 2 * static_cast<int64_t>(gain);
    int64_t* const holds = local.holds + block;
    const int64_t held[4] = {holds[at[0]], holds[at[1]], holds[at[2]], holds[at[3]]};
    for (int k = 0; k < 4; ++k) holds[at[k]] = held[order.item[k]], *moved += order.item[k] != k;
    for (int64_t d = 0; d < width; d += 4) {
      Whole x[4];
      for (int k = 0; k < 4; ++k) x[k] = load(item[k] + d);
      for (int k = 0; k < 4; ++k) store(item[k] + d, x[order.item[k]]);
    }
  }
}
TZ_ISA(pass, pass_body)

std::tuple<Tensor, Tensor> passes(const Tensor& items, const Tensor& target, const Tensor& order, const Tensor& cells,
                                  const Tensor& draws, double improvement_break) {
  const Sizes size = sizes_of(items, target, order, cells, draws);
  const int64_t *old = checked(order, size.cells, "order"), *cell = checked(cells, size.cells, "cells");
  const int64_t* draw = checked(draws, size.block, "draws");
  const int32_t *x = items.const_data_ptr<int32_t>(), *t = target.const_data_ptr<int32_t>();
  const int64_t count = size.blocks * size.block, width = (size.features + 3) / 4 * 4;
  const std::unique_ptr<int32_t[]> rows(new int32_t[2 * width * count + LINE]);
  const std::unique_ptr<int64_t[]> holds(new int64_t[count]);
  const auto line = reinterpret_cast<uintptr_t>(rows.get()) / sizeof(int32_t) % LINE;
  const Local local{size, width, rows.get() + (LINE - line) % LINE, holds.get()};
  std::atomic<int64_t> total{0}, moved{0};
  parallel_for(0, count, 4 * SHARE, [&](int64_t begin, int64_t end) {
    int64_t sum = 0;
    gather(local, x, t, old, cell, begin, end, &sum);
    total += sum;
  });
  int64_t distance = total, ran = 0;
  bool going = true;
  for (; going && ran < size.passes; ++ran) {
    std::atomic<int64_t> gain{0};
    parallel_for(0, size.blocks * size.groups, SHARE, [&](int64_t begin, int64_t end) {
      int64_t gained = 0, changes = 0;
      pass(local, draw + ran * size.block, begin, end, &gained, &changes);
      gain += gained, moved += changes;
    });
    going = gain > 0 && static_cast<double>(gain) >= improvement_break * static_cast<double>(distance);
    distance -= gain;
  }
  Tensor result = fresh(order, {size.cells}), outcome = fresh(order, {4});
  int64_t *now = result.mutable_data_ptr<int64_t>(), *out = outcome.mutable_data_ptr<int64_t>();
  std::copy_n(old, size.cells, now);
  for (int64_t k = 0; k < count; ++k) now[cell[k]] = holds[k];
  out[0] = distance, out[1] = ran, out[2] = moved, out[3] = going;
  return {result, outcome};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) { m.impl("plas_passes", TORCH_BOX(&passes)); }

}  // namespace torchzoo::plas
