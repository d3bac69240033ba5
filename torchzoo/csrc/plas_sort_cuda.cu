// Passes of Parallel Linear Assignment Sorting on CUDA: groups of four cells exchange their items.
//
// A thread has a group. Sums are whole numbers, so that the order of their additions changes nothing.
// Whether a pass gained enough to go on is found on the device: the host queues all passes, and those
// after the last return at once. Traffic: 2 rows and 40 bytes a cell and pass. Limits: 2³¹ − 1 blocks of
// threads; indices out of range are left alone.
#include "cuda.h"
#include "plas_sort.h"

namespace torchzoo::plas {
namespace {

constexpr int THREADS = 128;

struct State {  // what the caller gets, and what the pass under way gained
  int64_t distance, ran, moved, going, gained;
};

struct Problem {
  Sizes size;
  const int32_t *items, *target;
  const int64_t *cells, *draws;
  int64_t* order;
  State* state;
};

// Adds up over a warp, all of whose threads come here.
__device__ __forceinline__ void add(int64_t* to, int64_t value) {
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0 && value)
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

__device__ __forceinline__ bool within(int64_t index, int64_t limit) { return index >= 0 && index < limit; }

__global__ void start_kernel(State* state) { *state = {0, 0, 0, 1, 0}; }

__global__ void __launch_bounds__(THREADS) distance_kernel(Problem p) {
  const int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  int64_t sum = 0;
  if (n < p.size.blocks * p.size.block) {
    const int64_t cell = p.cells[n], held = within(cell, p.size.cells) ? p.order[cell] : -1;
    if (within(held, p.size.cells))
      for (int64_t d = 0; d < p.size.features; ++d) {
        const int64_t apart = p.items[held * p.size.features + d] - p.target[cell * p.size.features + d];
        sum += apart * apart;
      }
  }
  add(&p.state->distance, sum);
}

__device__ __forceinline__ void exchange(const Problem& p, const int64_t* cells, const int64_t* draw, int64_t* gained,
                                         int64_t* moved) {
  int64_t cell[4], held[4];
  const int32_t *item[4], *target[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    cell[k] = within(draw[k], p.size.block) ? cells[draw[k]] : -1;
    held[k] = within(cell[k], p.size.cells) ? p.order[cell[k]] : -1;
    if (!within(held[k], p.size.cells)) return;
    item[k] = p.items + held[k] * p.size.features, target[k] = p.target + cell[k] * p.size.features;
  }
  int64_t like[3][3] = {};
  for (int64_t d = 0; d < p.size.features; ++d) {
    const int32_t x0 = item[0][d], t0 = target[0][d];
    const int32_t x[3] = {item[1][d] - x0, item[2][d] - x0, item[3][d] - x0};
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const int32_t t = target[c + 1][d] - t0;
#pragma unroll
      for (int i = 0; i < 3; ++i) like[c][i] += static_cast<int64_t>(t) * x[i];
    }
  }
  int64_t gain;
  Order order;
  if (!best_order(like, &gain, &order)) return;
  *gained = 2 * gain;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    int64_t found = held[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) found = order.item[k] == i ? held[i] : found;
    p.order[cell[k]] = found, *moved += order.item[k] != k;
  }
}

__global__ void __launch_bounds__(THREADS) pass_kernel(Problem p, int64_t pass) {
  if (!p.state->going) return;
  const int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  int64_t gained = 0, moved = 0;
  if (n < p.size.blocks * p.size.groups) {
    const int64_t block = n / p.size.groups, group = n - block * p.size.groups;
    exchange(p, p.cells + block * p.size.block, p.draws + pass * p.size.block + 4 * group, &gained, &moved);
  }
  add(&p.state->gained, gained);
  add(&p.state->moved, moved);
}

__global__ void after_pass_kernel(State* state, double improvement_break) {
  if (!state->going) return;
  const int64_t gain = state->gained;
  state->going = gain > 0 && static_cast<double>(gain) >= improvement_break * static_cast<double>(state->distance);
  state->distance -= gain, state->ran += 1, state->gained = 0;
}

unsigned grid(int64_t threads) {
  const int64_t blocks = (threads + THREADS - 1) / THREADS;
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "plas_passes: got ", threads, " cells, which is too many");
  return static_cast<unsigned>(blocks);
}

std::tuple<Tensor, Tensor> passes(const Tensor& items, const Tensor& target, const Tensor& order, const Tensor& cells,
                                  const Tensor& draws, double improvement_break) {
  check_devices("plas_passes", {items, target, order, cells, draws});
  const DeviceGuard guard(items.get_device_index());
  const Sizes size = sizes_of(items, target, order, cells, draws);
  const cudaStream_t queue = stream(items);
  Tensor result = torch::stable::clone(order), state = torch::stable::new_empty(order, {5});
  const Problem problem{size,
                        items.const_data_ptr<int32_t>(),
                        target.const_data_ptr<int32_t>(),
                        cells.const_data_ptr<int64_t>(),
                        draws.const_data_ptr<int64_t>(),
                        result.mutable_data_ptr<int64_t>(),
                        reinterpret_cast<State*>(state.mutable_data_ptr<int64_t>())};
  start_kernel<<<1, 1, 0, queue>>>(problem.state);
  check_launch("start_kernel");
  if (const int64_t count = size.blocks * size.block) {
    distance_kernel<<<grid(count), THREADS, 0, queue>>>(problem);
    check_launch("distance_kernel");
  }
  for (int64_t pass = 0; pass < size.passes; ++pass) {
    if (const int64_t count = size.blocks * size.groups) {
      pass_kernel<<<grid(count), THREADS, 0, queue>>>(problem, pass);
      check_launch("pass_kernel");
    }
    after_pass_kernel<<<1, 1, 0, queue>>>(problem.state, improvement_break);
    check_launch("after_pass_kernel");
  }
  return {result, torch::stable::narrow(state, 0, 0, 4)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) { m.impl("plas_passes", TORCH_BOX(&passes)); }

}  // namespace torchzoo::plas
