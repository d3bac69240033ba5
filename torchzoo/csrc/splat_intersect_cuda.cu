// splat_intersect on CUDA: each tile's splats, in order of depth.
//
// Splats are sorted by depth once, their tiles counted and listed in that order, and the list is sorted
// stably by the number of the tile alone, of which the bits in use are few. Tiles of a splat are those
// of its box that its ellipse meets, found row by row; one with many is shared out to a warp. The host
// waits once, for the length of the list. Traffic: two gathers of 40 bytes a splat, and two or three
// passes of 16 bytes over the list. Limits: 2³¹ − 1 splats over all cameras, and as many tiles; the list's length is 64-bit.
#include "splat_cuda.h"
#include "splat_kernels.h"

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

namespace torchzoo::splat {
namespace {

constexpr int THREADS = 256;
constexpr int MANY = 64;  // tiles of a box that a thread leaves to its warp

template <class T>
struct Splats {
  const T *means, *shapes, *opacities, *beta;  // beta: or null
  const int* radii;
  int64_t splats;
  Kernel kernel;
  double pixel, alpha_min;
  bool boxes;  // tiles of the boxes all count
};

// The tiles of a splat's box, and the ellipse about (x, y) in which it can be seen.
struct Reach {
  int left, top, right, bottom;
  bool whole;
  double x, y;
  Region<double> seen;

  __device__ int tiles() const { return (right - left) * (bottom - top); }
};

// NaN as 0.
__device__ __forceinline__ int within(double x, int limit) {
  return x > 0 ? (x < limit ? static_cast<int>(x) : limit) : 0;
}

// A call and not inlined, as the next one, so that what is counted and what is listed are one code: two
// copies might round differently. The box is in the tensors' own type, as everywhere, what comes after
// in double precision: of thin ellipses single precision would lose tiles.
template <class T>
__device__ __noinline__ void find(const Splats<T>& from, const Tiling& tiling, int64_t item, Reach& to) {
  const Pack<T, 2> mean = reinterpret_cast<const Pack<T, 2>*>(from.means)[item];
  const Pack<int, 2> radii = reinterpret_cast<const Pack<int, 2>*>(from.radii)[item];
  const T x = mean.value[0], y = mean.value[1], side = T(tiling.side);
  const T rx = T(radii.value[0]), ry = T(radii.value[1]);
  to = Reach{0, 0, 0, 0, true, x, y, {}};
  if (!(rx > 0 && ry > 0 && x - x == 0 && y - y == 0)) return;
  to.left = within(floor((x - rx) / side), tiling.across);
  to.right = max(within(ceil((x + rx) / side), tiling.across), to.left);
  to.top = within(floor((y - ry) / side), tiling.down);
  to.bottom = max(within(ceil((y + ry) / side), tiling.down), to.top);
  if (from.boxes || !to.tiles()) return;
  const T *shape = from.shapes + 3 * item, beta = from.beta ? from.beta[item % from.splats] : T(2);
  to.whole = false;
  to.seen = region<double>(from.kernel, shape[0], shape[1], shape[2], from.opacities[item], beta, from.pixel,
                           from.alpha_min);
}

struct Span {
  int first, last;
};

// The tiles of a row that the splat's box has and, unless all count, of which it meets the pixels' centres.
__device__ __noinline__ Span span_of(const Reach& reach, const Tiling& tiling, int row) {
  if (row >= reach.bottom) return {0, 0};
  if (reach.whole) return {reach.left, reach.right};
  const double top = double(row) * tiling.side + 0.5 - reach.y;
  const double bottom = min((row + 1.0) * tiling.side, double(tiling.height)) - 0.5 - reach.y;
  double low, high;
  if (!extent(reach.seen, top, bottom, low, high)) return {0, 0};
  low += reach.x, high += reach.x;
  if (low > tiling.width - 0.5) return {0, 0};
  const int first = max(reach.left, within(ceil((low + 0.5) / tiling.side) - 1, tiling.across));
  const int last = min(reach.right, within(floor((high - 0.5) / tiling.side) + 1, tiling.across));
  return {first, max(first, last)};
}

__global__ void __launch_bounds__(THREADS) number_kernel(int64_t items, int* __restrict__ order) {
  const int64_t item = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (item < items) order[item] = static_cast<int>(item);
}

// Goes through splats in order of depth: counts[j] = tiles of the j-th or, where `tiles` is given, lists
// them from starts[j] on.
template <class T>
__global__ void __launch_bounds__(THREADS)
    list_kernel(Splats<T> splats, Tiling tiling, const int* __restrict__ order, int64_t items,
                const int64_t* __restrict__ starts, int64_t* __restrict__ counts,
                unsigned* __restrict__ tiles, int* __restrict__ ids) {
  const int64_t j = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const int lane = threadIdx.x % WARP;
  const int mine = j < items ? order[j] : -1;
  const int64_t begin = tiles && mine >= 0 ? starts[j] : 0;
  int64_t at = begin;
  Reach reach{};
  if (mine >= 0) find(splats, tiling, mine, reach);
  const bool many = reach.tiles() >= MANY;
  if (!many) {
    const unsigned base = mine >= 0 ? mine / splats.splats * tiling.of_camera() : 0;
    for (int row = reach.top; row < reach.bottom; ++row) {
      const Span span = span_of(reach, tiling, row);
      if (tiles)
        for (int column = span.first; column < span.last; ++column) {
          const int64_t place = at + column - span.first;
          tiles[place] = base + row * tiling.across + column;
          ids[place] = static_cast<int>(mine % splats.splats);
        }
      at += span.last - span.first;
    }
  }
  for (unsigned left = __ballot_sync(ALL_LANES, many); left; left &= left - 1) {
    const int owner = __ffs(left) - 1;
    const int item = __shfl_sync(ALL_LANES, mine, owner);
    const int id = static_cast<int>(item % splats.splats);
    const unsigned base = item / splats.splats * tiling.of_camera();
    int64_t next = __shfl_sync(ALL_LANES, begin, owner);
    find(splats, tiling, item, reach);
    for (int first = reach.top; first < reach.bottom; first += WARP) {
      const Span span = span_of(reach, tiling, first + lane);
      if (!tiles) {
        next += warp_sum(span.last - span.first);
        continue;
      }
      for (int row = first; row < min(first + WARP, reach.bottom); ++row) {
        const int low = __shfl_sync(ALL_LANES, span.first, row - first);
        const int high = __shfl_sync(ALL_LANES, span.last, row - first);
        for (int column = low + lane; column < high; column += WARP) {
          tiles[next + column - low] = base + row * tiling.across + column;
          ids[next + column - low] = id;
        }
        next += high - low;
      }
    }
    if (lane == owner) at = next;
  }
  if (!tiles && mine >= 0) counts[j] = at;
}

// offsets[t] = entries of tiles before t.
__global__ void __launch_bounds__(THREADS)
    offsets_kernel(const unsigned* __restrict__ tiles, int64_t entries, int64_t count,
                   int64_t* __restrict__ offsets) {
  const int64_t tile = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (tile > count) return;
  int64_t low = 0, high = entries;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (tiles[middle] < tile) low = middle + 1;
    else high = middle;
  }
  offsets[tile] = low;
}

// Splats (numbered over all cameras) by depth, ties by number.
template <class T>
Tensor by_depth(const Tensor& depths, int64_t items) {
  const cudaStream_t on = stream(depths);
  Tensor numbers = torch::stable::new_empty(depths, {items}, ScalarType::Int);
  Tensor order = torch::stable::new_empty(depths, {items}, ScalarType::Int);
  Tensor sorted = torch::stable::new_empty(depths, {items});
  number_kernel<<<grid_of("splat_intersect", items, THREADS), THREADS, 0, on>>>(items, write<int>(numbers));
  check_launch("number_kernel");
  with_workspace(depths, [&](void* space, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(space, bytes, read<T>(depths), write<T>(sorted),
                                           read<int>(numbers), write<int>(order), items, 0,
                                           static_cast<int>(8 * sizeof(T)), on);
  });
  return order;
}

template <class T>
Tensor intersect(const Splats<T>& splats, const Tiling& tiling, const Tensor& depths, Tensor& offsets) {
  const cudaStream_t on = stream(depths);
  const int64_t items = tiling.cameras * splats.splats;
  const unsigned grid = grid_of("splat_intersect", items, THREADS);
  const Tensor order = by_depth<T>(depths, items);
  Tensor starts = torch::stable::new_zeros(depths, {items + 1}, ScalarType::Long);
  int64_t *ends = write<int64_t>(starts) + 1, entries = 0;
  list_kernel<<<grid, THREADS, 0, on>>>(splats, tiling, read<int>(order), items,
                                        static_cast<const int64_t*>(nullptr), ends,
                                        static_cast<unsigned*>(nullptr), static_cast<int*>(nullptr));
  check_launch("list_kernel");
  with_workspace(depths, [&](void* space, size_t& bytes) {
    return cub::DeviceScan::InclusiveSum(space, bytes, ends, ends, items, on);
  });
  check(cudaMemcpyAsync(&entries, ends + items - 1, sizeof(entries), cudaMemcpyDeviceToHost, on));
  check(cudaStreamSynchronize(on));  // the length of the list

  Tensor ids = torch::stable::new_empty(depths, {entries}, ScalarType::Int);
  if (!entries) return ids;
  Tensor tiles = torch::stable::new_empty(depths, {entries}, ScalarType::Int);
  Tensor other_ids = torch::stable::empty_like(ids), other_tiles = torch::stable::empty_like(tiles);
  list_kernel<<<grid, THREADS, 0, on>>>(splats, tiling, read<int>(order), items,
                                        read<int64_t>(starts), static_cast<int64_t*>(nullptr),
                                        write<unsigned>(tiles), write<int>(ids));
  check_launch("list_kernel");
  cub::DoubleBuffer<unsigned> keys(write<unsigned>(tiles), write<unsigned>(other_tiles));
  cub::DoubleBuffer<int> values(write<int>(ids), write<int>(other_ids));
  const int bits = bits_of(tiling.count() - 1);
  if (bits)
    with_workspace(depths, [&](void* space, size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(space, bytes, keys, values, entries, 0, bits, on);
    });
  offsets_kernel<<<grid_of("splat_intersect", tiling.count() + 1, THREADS), THREADS, 0, on>>>(
      keys.Current(), entries, tiling.count(), write<int64_t>(offsets));
  check_launch("offsets_kernel");
  return values.selector ? other_ids : ids;
}

std::tuple<Tensor, Tensor> splat_intersect(const Tensor& means2d, const Tensor& radii, const Tensor& depths,
                                           const Tensor& shape2d, const Tensor& opacities,
                                           const std::optional<Tensor>& beta, int64_t width, int64_t height,
                                           int64_t tile_size, int64_t kernel, double pixel,
                                           double alpha_min, bool inria) {
  STD_TORCH_CHECK(means2d.dim() == 3, "means2d: expected (C, N, 2)");
  check_devices("splat_intersect", {means2d, radii, depths, shape2d, opacities});
  const int64_t C = means2d.size(0), N = means2d.size(1);
  const ScalarType type = means2d.scalar_type();
  const Tiling tiling(C, width, height, tile_size);
  STD_TORCH_CHECK(C * N <= INT32_MAX, "splat_intersect: ", C * N, " splats over all cameras");
  const DeviceGuard guard(means2d.get_device_index());
  const Tensor means = dense("means2d", means2d, type, {C, N, 2}),
               boxes = dense("radii", radii, ScalarType::Int, {C, N, 2}),
               keys = dense("depths", depths, type, {C, N}),
               shapes = dense("shape2d", shape2d, type, {C, N, 3}),
               alphas = dense("opacities", opacities, type, {C, N});
  STD_TORCH_CHECK(kernel >= GAUSSIAN && kernel <= ANALYTIC, "kernel: unknown code ", kernel);
  STD_TORCH_CHECK(kernel != GENERALIZED_EXPONENTIAL || beta, "beta: needed by the generalized_exponential kernel");
  std::optional<Tensor> powers;
  if (beta) {
    check_devices("splat_intersect", {means2d, *beta});
    powers = dense("beta", *beta, type, {N});
  }
  Tensor offsets = torch::stable::new_zeros(means, {tiling.count() + 1}, ScalarType::Long);
  if (C * N == 0 || tiling.count() == 0)
    return {offsets, torch::stable::new_empty(means, {0}, ScalarType::Int)};
  Tensor ids;
  with_type(means, [&]<class T>() {
    const Splats<T> splats{read<T>(means), read<T>(shapes), read<T>(alphas), powers ? read<T>(*powers) : nullptr,
                           read<int>(boxes), N, static_cast<Kernel>(kernel), pixel, alpha_min, inria};
    ids = intersect<T>(splats, tiling, keys, offsets);
  });
  return {offsets, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) { m.impl("splat_intersect", TORCH_BOX(&splat_intersect)); }

}  // namespace torchzoo::splat
