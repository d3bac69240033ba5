// What the CUDA kernels share: the caller's stream, checks of launches, and vectors in memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace torchzoo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The stream that the caller has made current on the tensor's device.
inline cudaStream_t stream(const Tensor& tensor) {
  void* found = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &found));
  return static_cast<cudaStream_t>(found);
}

// A kernel that is handed an address of another device stops the whole process.
inline void check_devices(const char* op, std::initializer_list<Tensor> tensors) {
  const auto device = tensors.begin()->get_device_index();
  for (const Tensor& tensor : tensors)
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device,
                    op, ": expected tensors of one CUDA device");
}

// To be called after each launch: a bad configuration is reported here and not at a later call.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

// `count` elements that are read or written together, by 16 bytes where they fill as many.
template <class T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Pack {
  T value[count];
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lanes = WARP / 2; lanes; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
  return value;
}

// NaN is passed over.
template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int lanes = WARP / 2; lanes; lanes /= 2)
    value = max(value, __shfl_xor_sync(ALL_LANES, value, lanes));
  return value;
}

// The sum of `value` over the threads of the block before this one; in `total`, over all of them.
template <int threads, class T>
__device__ __forceinline__ T block_sum_before(T value, T* total) {
  __shared__ T warp_totals[threads / WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  T sum = value;  // over the warp, up to this lane
#pragma unroll
  for (int lanes = 1; lanes < WARP; lanes *= 2) {
    const T other = __shfl_up_sync(ALL_LANES, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  __syncthreads();  // the totals of the last call have been read
  if (lane == WARP - 1) warp_totals[warp] = sum;
  __syncthreads();
  T before = sum - value;
  *total = T(0);
#pragma unroll
  for (int other = 0; other < threads / WARP; ++other) {
    if (other < warp) before += warp_totals[other];
    *total += warp_totals[other];
  }
  return before;
}

}  // namespace torchzoo
