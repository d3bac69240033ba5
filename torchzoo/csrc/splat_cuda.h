// What the CUDA kernels of splats share: checks of what comes in, workspaces of CUB, the tiles of the
// images, and sums over a warp of many values at once.
#pragma once

#include <cmath>
#include <limits>

#include "cuda.h"

namespace torchzoo::splat {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "splats: ", cudaGetErrorString(error));
}

// Runs a routine of CUB, which is asked for the size of its workspace first.
template <class Routine>
void with_workspace(const Tensor& like, const Routine& routine) {
  size_t bytes = 0;
  check(routine(nullptr, bytes));
  Tensor space = torch::stable::new_empty(like, {static_cast<int64_t>(std::max<size_t>(bytes, 1))},
                                          ScalarType::Byte);
  check(routine(space.mutable_data_ptr(), bytes));
}

// How many bits the numbers up to `most` have.
inline int bits_of(int64_t most) {
  int bits = 0;
  while (bits < 63 && most >> bits) ++bits;
  return bits;
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid_of(const char* op, int64_t items, int64_t each) {
  const int64_t blocks = ceil_div(items, each);
  STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": too many blocks: ", blocks);
  return static_cast<unsigned>(blocks);
}

// `tensor` as a contiguous one that can be read by 16 bytes, after a check of its type and sizes.
inline Tensor dense(const char* name, const Tensor& tensor, ScalarType type,
                    std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == type;
  int64_t axis = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(axis++) == size;
  STD_TORCH_CHECK(fits, name, ": unexpected shape or type");
  const Tensor found = torch::stable::contiguous(tensor);
  return !found.numel() || aligned(found.const_data_ptr()) ? found : torch::stable::clone(found);
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class Op>
void with_type(const Tensor& tensor, const Op& op) {
  if (tensor.scalar_type() == ScalarType::Float) return op.template operator()<float>();
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "splats: expected float32 or float64");
  op.template operator()<double>();
}

// The images of `cameras` cameras, cut into tiles that are numbered camera by camera, row by row.
struct Tiling {
  int64_t cameras;
  int width, height, side, across, down;

  Tiling(int64_t cameras, int64_t width_, int64_t height_, int64_t side_) : cameras(cameras) {
    for (const int64_t size : {width_, height_, side_})
      STD_TORCH_CHECK(size > 0 && size <= 1 << 24, "splats: an image or tile of ", size, " pixels");
    width = static_cast<int>(width_), height = static_cast<int>(height_);
    side = static_cast<int>(side_);
    across = static_cast<int>(ceil_div(width, side)), down = static_cast<int>(ceil_div(height, side));
    STD_TORCH_CHECK(int64_t(across) * down <= INT32_MAX && count() <= INT32_MAX,
                    "splats: too many tiles");
  }
  __host__ __device__ int of_camera() const { return across * down; }
  __host__ __device__ int64_t count() const { return cameras * of_camera(); }
};

// Sums of `count` values over the warp by about `count` exchanges: while there are several, the upper
// half of the lanes keeps the upper half of them. A lane ends up with LEFT of the sums, in `value`.
template <int count>
struct WarpSums {
  static constexpr int LEFT = (count + WARP - 1) / WARP;

  template <class T, int size = count, int lanes = WARP / 2>
  static __device__ __forceinline__ void sum(T* value) {
    if constexpr (lanes > 0 && size == 1) {
      value[0] += __shfl_xor_sync(ALL_LANES, value[0], lanes);
      sum<T, size, lanes / 2>(value);
    } else if constexpr (lanes > 0) {
      constexpr int half = (size + 1) / 2;
      const bool upper = threadIdx.x & lanes;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const T low = value[i], high = i + half < size ? value[i + half] : T(0);
        value[i] = (upper ? high : low) + __shfl_xor_sync(ALL_LANES, upper ? low : high, lanes);
      }
      sum<T, half, lanes / 2>(value);
    }
  }

  // The number of the value whose sum is in this lane's value[k]; -1 if none or another lane's too.
  static __device__ __forceinline__ int place(int k) {
    int first = 0, held = count, size = count;
    for (int lanes = WARP / 2; lanes; lanes /= 2) {
      const bool upper = threadIdx.x & lanes;
      if (size == 1) {
        held = upper ? 0 : held;
        continue;
      }
      const int half = (size + 1) / 2;
      first += upper ? half : 0;
      held = upper ? max(held - half, 0) : min(held, half);
      size = half;
    }
    return k < held ? first + k : -1;
  }
};

}  // namespace torchzoo::splat
