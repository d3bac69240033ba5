// What the back ends of plas_passes share: its sizes, and the best order of four items.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#if defined(__CUDACC__)
#define TZ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TZ_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace torchzoo::plas {

struct Sizes {
  int64_t cells, features, blocks, block, groups, passes;  // groups: of four cells, in a block
};

// items, target (N, D) int32, order (N,), cells (B, S) and draws (P, S) int64, all contiguous
inline Sizes sizes_of(const torch::stable::Tensor& items, const torch::stable::Tensor& target,
                      const torch::stable::Tensor& order, const torch::stable::Tensor& cells,
                      const torch::stable::Tensor& draws) {
  using torch::headeronly::ScalarType;
  for (const torch::stable::Tensor* rows : {&items, &target})
    STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Int && rows->dim() == 2 && rows->is_contiguous() &&
                        rows->size(0) == order.numel() && rows->size(1) == items.size(1),
                    "plas_passes: expected contiguous int32 items and target with a row for each cell");
  for (const torch::stable::Tensor* indices : {&order, &cells, &draws})
    STD_TORCH_CHECK(indices->scalar_type() == ScalarType::Long && indices->dim() == (indices == &order ? 1 : 2) &&
                        indices->is_contiguous(),
                    "plas_passes: expected contiguous int64 order (N,), cells (B, S) and draws (P, S)");
  STD_TORCH_CHECK(draws.size(1) == cells.size(1) && cells.size(1) % 4 == 0,
                  "plas_passes: expected draws of as many cells as a block has, a multiple of four");
  return {order.numel(), items.size(1), cells.size(0), cells.size(1), cells.size(1) / 4, draws.size(0)};
}

// Which of items 0 to 3 each of four cells gets.
struct Order {
  int item[4];
};

// The nth of the 24 orders, lexicographically.
TZ_HOST_DEVICE Order nth_order(int n) {
  const int a = n / 6, b = n / 2 % 3 + (n / 2 % 3 >= a);
  const int low = a && b ? 0 : a != 1 && b != 1 ? 1 : 2, high = 6 - a - b - low;
  return n % 2 ? Order{{a, b, high, low}} : Order{{a, b, low, high}};
}

// The first of the best orders if it is better than the one there is, and by how much. All that orders
// differ in is like[c - 1][i - 1] = (target c - target 0) . (item i - item 0), for item i in cell c.
template <class T>
TZ_HOST_DEVICE bool best_order(const T (&like)[3][3], T* gain, Order* found) {
  const T kept = like[0][0] + like[1][1] + like[2][2];
  T best = kept;
  for (int c = 0; c < 3; ++c)
    for (int i = 0; i < 3; ++i) {  // the better of the two orders of the other two items in the other two cells
      const int a = c == 0, b = 3 - c - a, j = i == 0, k = 3 - i - j;
      const T one = like[a][j] + like[b][k], other = like[a][k] + like[b][j];
      const T rest = one < other ? other : one;
      if (best < rest) best = rest;  // with item 0 in cell c + 1 and item i + 1 in cell 0
      if (c == 0 && best < like[0][i] + rest) best = like[0][i] + rest;  // with item 0 in cell 0
    }
  *gain = best - kept;
  if (best == kept) return false;
  T all[4][4] = {};
  for (int c = 0; c < 3; ++c)
    for (int i = 0; i < 3; ++i) all[c + 1][i + 1] = like[c][i];
  for (int n = 1; n < 24; ++n) {
    *found = nth_order(n);
    const int* item = found->item;
    if (all[1][item[1]] + all[2][item[2]] + all[3][item[3]] == best) break;
  }
  return true;
}

}  // namespace torchzoo::plas
