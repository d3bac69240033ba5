// grouped_mm on CUDA: y[rows of e] = x[rows of e]·weight[e], and the gradient of weight,
// dweight[e] = x[rows of e]ᵀ·grad[rows of e].
//
// Where groups end is known on the device only, so a launch has as many blocks as any groups of
// that many rows could need; each looks in the ends for the tile that is its own, and those left
// over end. No wait for the host: calls can be captured in a graph. Within a group BAND tiles of
// rows share a strip of weights before the next strip, so that a weight comes from memory once for
// BAND tiles. Traffic besides: every block reads all the ends, which L2 holds. Ends that decrease
// or leave [0, T] can't be refused here; they give wrong values but never leave the tensors.
// Limits: 2³¹ − 1 blocks; transposed weights are read as they lie, those of other strides copied.
#include "gemm_cuda.h"

namespace torchzoo {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t BAND = 8;
constexpr int64_t FEW = 64;  // up to so many rows a group on average, tiles with few rows are used

struct Ends {
  const void* data;
  bool wide;  // int64, else int32
  int64_t groups, rows;

  // Where group e ends; group −1 ends at row 0, and after the last group come the rows of none.
  __device__ int64_t operator()(int64_t e) const {
    if (e < 0) return 0;
    if (e >= groups) return rows;
    const int64_t end =
        wide ? static_cast<const int64_t*>(data)[e] : static_cast<const int32_t*>(data)[e];
    return end < 0 ? 0 : end > rows ? rows : end;
  }
};

// The tile of this block: of group `group`, whose rows are start .. start + rows.
struct Found {
  int64_t group, start, rows, tile;
};

// Finds the block's tile where each group, and the rows of none, have ⌈rows / height⌉·strips tiles.
// A thread counts the tiles of a run of groups, and the one whose run holds the tile looks closer.
template <int threads>
__device__ bool find_tile(const Ends& ends, int height, int64_t strips, Found* result) {
  __shared__ Found found;
  const int64_t index = blockIdx.x, run = (ends.groups + threads) / threads;
  const int64_t first = threadIdx.x * run, last = min(first + run, ends.groups + 1);
  const auto tiles = [&](int64_t start, int64_t end) {
    return end > start ? (end - start + height - 1) / height * strips : 0;
  };
  if (threadIdx.x == 0) found.group = -1;
  int64_t own = 0, total;
  int64_t start = first < last ? ends(first - 1) : 0;
#pragma unroll 4
  for (int64_t e = first; e < last; ++e) {
    const int64_t end = ends(e);
    own += tiles(start, end);
    start = end;
  }
  int64_t left = index - block_sum_before<threads>(own, &total);
  if (0 <= left && left < own) {
    int64_t e = first, end = ends(e);
    start = ends(e - 1);
    while (left >= tiles(start, end)) {
      left -= tiles(start, end);
      start = end;
      end = ends(++e);
    }
    found = {e, start, end - start, left};
  }
  __syncthreads();
  *result = found;
  return found.group >= 0;
}

template <class T>
struct Weight {  // (E, K, N), of strides (group, factor.inner, factor.outer)
  Factor<T> factor;
  int64_t group, k, n;
};

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 2)
    forward_kernel(const typename Tile::T* x, bool aligned, Weight<typename Tile::T> weight,
                   Ends ends, typename Tile::T* out) {
  const int64_t strips = (weight.n + Tile::N - 1) / Tile::N;
  Found at;
  if (!find_tile<Tile::THREADS>(ends, Tile::M, strips, &at)) return;
  const int64_t tiles = (at.rows + Tile::M - 1) / Tile::M, band = at.tile / (BAND * strips) * BAND;
  const int64_t high = min(BAND, tiles - band), place = at.tile - band * strips;
  const bool grouped = at.group < ends.groups;
  Factor<typename Tile::T> b = weight.factor;
  if (grouped) b.data += at.group * weight.group;
  const int64_t k = grouped ? weight.k : 0;  // rows of no group are empty sums
  Tile::run({{x + at.start * weight.k, weight.k, 1, aligned},
             b,
             out + at.start * weight.n,
             at.rows,
             weight.n,
             k,
             (band + place % high) * Tile::M,
             place / high * Tile::N});
}

// C[e] (K, N) of a block is the sum over the group's rows, none of them for an empty group.
template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 2)
    dweight_kernel(const typename Tile::T* x, bool x_aligned, const typename Tile::T* grad,
                   bool grad_aligned, Ends ends, int64_t k, int64_t n, typename Tile::T* out) {
  const int64_t high = (k + Tile::M - 1) / Tile::M, strips = (n + Tile::N - 1) / Tile::N;
  const int64_t e = blockIdx.x / (high * strips), place = blockIdx.x % (high * strips);
  const int64_t start = ends(e - 1), rows = max(ends(e) - start, int64_t(0));
  Tile::run({{x + start * k, 1, k, x_aligned},
             {grad + start * n, 1, n, grad_aligned},
             out + e * k * n,
             k,
             n,
             rows,
             place % high * Tile::M,
             place / high * Tile::N});
}

// How many blocks, and that the kernel may have its shared memory.
template <class Tile, class Kernel>
unsigned prepare(Kernel kernel, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "grouped_mm: too many tiles for one launch: ", blocks);
  if constexpr (Tile::BYTES > 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::BYTES);
    STD_TORCH_CHECK(error == cudaSuccess, "grouped_mm: ", cudaGetErrorString(error));
  }
  return static_cast<unsigned>(blocks);
}

template <class T>
bool is_aligned(const T* start, int64_t stride) {
  return aligned(start) && stride * sizeof(T) % 16 == 0;
}

template <class Tile>
void launch_forward(const Tensor& x, const Weight<typename Tile::T>& weight, const Ends& ends,
                    Tensor& out) {
  using T = typename Tile::T;
  const int64_t segments = std::min(ends.groups + 1, ends.rows);  // at most so many that have rows
  const int64_t high = (ends.rows + segments * (Tile::M - 1)) / Tile::M;
  const unsigned blocks =
      prepare<Tile>(forward_kernel<Tile>, high * ((weight.n + Tile::N - 1) / Tile::N));
  const T* rows = x.const_data_ptr<T>();
  forward_kernel<Tile><<<blocks, Tile::THREADS, Tile::BYTES, stream(x)>>>(
      rows, is_aligned(rows, weight.k), weight, ends, out.mutable_data_ptr<T>());
  check_launch("forward_kernel");
}

template <class Tile>
void launch_dweight(const Tensor& x, const Tensor& grad, const Ends& ends, Tensor& out) {
  using T = typename Tile::T;
  const int64_t k = x.size(1), n = grad.size(1);
  const int64_t tiles = (k + Tile::M - 1) / Tile::M * ((n + Tile::N - 1) / Tile::N);
  const unsigned blocks = prepare<Tile>(dweight_kernel<Tile>, ends.groups * tiles);
  const T *rows = x.const_data_ptr<T>(), *upstream = grad.const_data_ptr<T>();
  dweight_kernel<Tile><<<blocks, Tile::THREADS, Tile::BYTES, stream(x)>>>(
      rows, is_aligned(rows, k), upstream, is_aligned(upstream, n), ends, k, n,
      out.mutable_data_ptr<T>());
  check_launch("dweight_kernel");
}

// Element type, rows, inner dimension and warps of a tile, and which factors lie along k.
template <class T, bool a_inner, bool b_inner>
using Large = TensorTile<T, 128, 32, 2, 4, a_inner, b_inner>;
template <class T, bool b_inner>
using Low = TensorTile<T, 32, 64, 1, 4, true, b_inner>;
template <class T>
using Square = ScalarTile<T, 32 / sizeof(T)>;

template <class T>
void forward(const Tensor& x, const Tensor& weight, const Ends& ends, Tensor& out) {
  const int64_t k = weight.size(1), n = weight.size(2);
  const bool few = ends.rows <= FEW * ends.groups, along_n = weight.stride(2) == 1;
  const bool along_k = !along_n && weight.stride(1) == 1;
  const Tensor held = along_n || along_k ? weight : torch::stable::contiguous(weight);
  const T* data = held.const_data_ptr<T>();
  Weight<T> view{{data, 1, n, false}, k * n, k, n};
  if (along_n || along_k)
    view = {{data, weight.stride(2), weight.stride(1), false}, weight.stride(0), k, n};
  const int64_t pitch = along_k ? view.factor.outer : view.factor.inner;
  view.factor.aligned = is_aligned(data, pitch) && is_aligned(data, view.group);
  if constexpr (sizeof(T) > 2) {
    if (few) launch_forward<ScalarTile<T, 1>>(x, view, ends, out);
    else launch_forward<Square<T>>(x, view, ends, out);
  } else if (along_k) {
    if (few) launch_forward<Low<T, true>>(x, view, ends, out);
    else launch_forward<Large<T, true, true>>(x, view, ends, out);
  } else {
    if (few) launch_forward<Low<T, false>>(x, view, ends, out);
    else launch_forward<Large<T, true, false>>(x, view, ends, out);
  }
}

template <class T>
void backward_weight(const Tensor& x, const Tensor& grad, const Ends& ends, Tensor& out) {
  if constexpr (sizeof(T) > 2) launch_dweight<Square<T>>(x, grad, ends, out);
  else launch_dweight<Large<T, false, false>>(x, grad, ends, out);
}

template <class Op>
void with_type(ScalarType type, const Op& op) {
  switch (type) {
    case ScalarType::Float: return op.template operator()<float>();
    case ScalarType::Double: return op.template operator()<double>();
    case ScalarType::BFloat16: return op.template operator()<BFloat16>();
    case ScalarType::Half: return op.template operator()<Half>();
    default: STD_TORCH_CHECK(false, "grouped_mm: expected a floating-point type");
  }
}

Ends ends_of(const Tensor& offsets, int64_t rows) {
  const bool wide = offsets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || offsets.scalar_type() == ScalarType::Int,
                  "offsets: expected int32 or int64");
  return {wide ? static_cast<const void*>(offsets.const_data_ptr<int64_t>())
               : static_cast<const void*>(offsets.const_data_ptr<int32_t>()),
          wide, offsets.numel(), rows};
}

Tensor grouped_mm(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3 && x.size(1) == weight.size(1) &&
                      x.scalar_type() == weight.scalar_type() && offsets.numel() == weight.size(0),
                  "grouped_mm: expected x (T, K), weight (E, K, N) of one type, offsets (E,)");
  check_devices("grouped_mm", {x, weight, offsets});
  const DeviceGuard guard(x.get_device_index());
  const Tensor rows = torch::stable::contiguous(x), dense = torch::stable::contiguous(offsets);
  Tensor out = torch::stable::new_empty(rows, {x.size(0), weight.size(2)});
  if (!out.numel()) return out;
  with_type(x.scalar_type(),
            [&]<class T>() { forward<T>(rows, weight, ends_of(dense, x.size(0)), out); });
  return out;
}

Tensor grouped_mm_dweight(const Tensor& x, const Tensor& grad, const Tensor& offsets) {
  STD_TORCH_CHECK(x.dim() == 2 && grad.dim() == 2 && x.size(0) == grad.size(0) &&
                      x.scalar_type() == grad.scalar_type(),
                  "grouped_mm_dweight: expected x (T, K) and grad (T, N) of one type");
  check_devices("grouped_mm_dweight", {x, grad, offsets});
  const DeviceGuard guard(x.get_device_index());
  const Tensor rows = torch::stable::contiguous(x), upstream = torch::stable::contiguous(grad);
  const Tensor dense = torch::stable::contiguous(offsets);
  Tensor out = torch::stable::new_empty(rows, {offsets.numel(), x.size(1), grad.size(1)});
  if (!out.numel()) return out;
  with_type(x.scalar_type(),
            [&]<class T>() { backward_weight<T>(rows, upstream, ends_of(dense, x.size(0)), out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("grouped_mm_dweight", TORCH_BOX(&grouped_mm_dweight));
}

}  // namespace torchzoo
