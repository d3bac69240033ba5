// What products over groups of rows share: where groups end, and tasks shared out by cost.
#pragma once

#include "cpu.h"

namespace torchzoo {

struct Ends {  // offsets, checked: nobody checks them where the caller was traced
  std::vector<int64_t> at{0};
  Ends(const Tensor& offsets, int64_t rows) {
    const Tensor dense = torch::stable::contiguous(torch::stable::to(offsets, ScalarType::Long));
    const int64_t* ends = dense.const_data_ptr<int64_t>();
    for (int64_t e = 0; e < offsets.numel(); ++e) {
      STD_TORCH_CHECK(at.back() <= ends[e] && ends[e] <= rows,
                      "offsets: expected ends that don't decrease within [0, ", rows, "], got ",
                      ends[e], " after ", at.back());
      at.push_back(ends[e]);
    }
  }
  int64_t rows(int64_t e) const { return at[e + 1] - at[e]; }
};

constexpr int64_t STRIP = 512;
constexpr int64_t NARROW = 64;  // a multiple of every tile's width

// How wide strips of n columns are: as wide as lets every thread have a few, of `products` together.
inline int64_t strip_width(int64_t products, int64_t n) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t width = STRIP;
  while (width > NARROW && products * ((n + width - 1) / width) < 4 * threads) width /= 2;
  return width;
}

// Cuts tasks into runs of equal cost, one a thread, and calls run(first, last) for each; `cost` is the
// running sum of the tasks' costs and starts with 0.
template <class Run>
void for_runs(const std::vector<double>& cost, const Run& run) {
  const int64_t tasks = static_cast<int64_t>(cost.size()) - 1;
  const int64_t runs = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (!runs) return;
  auto first = [&](int64_t t) {
    const double share = cost.back() * static_cast<double>(t) / static_cast<double>(runs);
    return t == runs ? tasks : std::lower_bound(cost.begin(), cost.end(), share) - cost.begin();
  };
  parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) { run(first(begin), first(end)); });
}

template <class Acc>
void zero(Acc* out, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) std::fill_n(out + i * stride, columns, Acc(0));
}

}  // namespace torchzoo
