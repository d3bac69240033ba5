// What the CPU kernels share: tensor checks, dispatch over dtypes, and over instruction sets.
//
// A kernel body is a function template marked TZ_INLINE that takes plain pointers and sizes.
// TZ_ISA(name, body) makes one copy of it for each instruction set, with the same source and so the
// same order of operations, and `isa()` says which to call. TORCHZOO_CPU_ISA=baseline|avx2|avx512
// forces one that the processor has.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "pool.h"

// Declared by torch's headers from 2.11 on only; null where the torch that is running has none.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout,
    const uint8_t* opaque_metadata, int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx),
    void* deleter_ctx);

namespace torchzoo {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

enum class Isa { baseline, avx2, avx512 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    best = Isa::avx512;
#if defined(TZ_ONE_ISA)
  best = std::min(best, Isa::avx2);
#endif
  if (const char* wanted = std::getenv("TORCHZOO_CPU_ISA")) {
    if (!std::strcmp(wanted, "baseline")) return Isa::baseline;
    if (!std::strcmp(wanted, "avx2")) return std::min(best, Isa::avx2);
  }
  return best;
#else
  return Isa::baseline;
#endif
}

inline Isa isa() {
  static const Isa found = detect_isa();
  return found;
}

// torch's `contiguous` finds its operator by name, which is slow in a cold cache, even where there is nothing
// to do.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor dense(const std::optional<Tensor>& t) {
  return t ? dense(*t) : Tensor();
}

// A tensor of these strides, which leave no gaps. A large one's memory comes from the pool, where torch can
// be told what becomes of it afterwards, which is since 2.11.
inline Tensor fresh_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides,
                            ScalarType type) {
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const int32_t device = aoti_torch_device_type_cpu();
  size_t bytes = aoti_torch_dtype_element_size(code);
  for (const int64_t size : sizes) bytes *= size;
  AtenTensorHandle made;
  if (bytes < Pool::LEAST || !torch_from_blob) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(sizes.size(), sizes.data(), strides, code, device, 0, &made));
    const Tensor result(made);
    if (bytes >= Pool::LEAST) in_huge_pages(result.mutable_data_ptr(), bytes);
    return result;
  }
  size_t block = Pool::block_size(bytes);
  void* data = pool().take(&block);
  STD_TORCH_CHECK(data, "no memory for a result of ", bytes, " bytes");
  const auto give = [](void* memory, void* size) { pool().give(memory, reinterpret_cast<size_t>(size)); };
  const AOTITorchError error =
      torch_from_blob(data, sizes.size(), sizes.data(), strides, 0, code, device, -1, &made,
                      aoti_torch_layout_strided(), nullptr, 0, give, reinterpret_cast<void*>(block));
  if (error) pool().give(data, block);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(made);
}

// torch's `new_empty` and `empty_like`, with large ones from the pool.
inline Tensor fresh(const Tensor&, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return fresh_strided(sizes, strides.data(), type);
}

inline Tensor fresh(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return fresh(like, sizes, like.scalar_type());
}

// Whether each place in memory up to the last is one element's, in whatever order.
inline bool without_gaps(const Tensor& t) {
  int64_t next = 1, left = t.numel();
  for (int64_t found = 1; found && next < left;) {
    found = 0;
    for (int64_t d = 0; d < t.dim() && !found; ++d)
      if (t.size(d) > 1 && t.stride(d) == next) found = t.size(d);
    next *= std::max<int64_t>(found, 1);
  }
  return next >= left;
}

inline Tensor fresh(const Tensor& like) {
  if (!like.is_contiguous() && !without_gaps(like)) return torch::stable::empty_like(like);
  return fresh_strided(like.sizes(), like.strides().data(), like.scalar_type());
}

// Memory for a kernel's own use; where it is large, it is the pool's.
template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t count) : size_(std::max<int64_t>(count, 1) * sizeof(T)) {
    if (pooled()) size_ = Pool::block_size(size_);
    data_ = pooled() ? pool().take(&size_) : std::malloc(size_);
    STD_TORCH_CHECK(data_, "no memory for ", size_, " bytes of workspace");
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { pooled() ? pool().give(data_, size_) : std::free(data_); }
  T* get() const { return static_cast<T*>(data_); }

 private:
  bool pooled() const { return size_ >= Pool::LEAST; }

  size_t size_;
  void* data_;
};

// Calls op.operator()<T>() with the type of a tensor that is known to be of float64 or float32.
template <class Op>
void with_type(const Tensor& tensor, const Op& op) {
  if (tensor.scalar_type() == ScalarType::Double) return op.template operator()<double>();
  op.template operator()<float>();
}

}  // namespace torchzoo

#define TZ_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define TZ_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TZ_TARGET_AVX512 \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#else
#define TZ_TARGET_AVX2
#define TZ_TARGET_AVX512
#endif

// `name(a...)` runs `body<bytes>(a...)` compiled for `isa()`, with that instruction set's vector size.
// Sanitizers take minutes to compile a copy: with TZ_ONE_ISA there is one, for AVX2.
#if defined(TZ_ONE_ISA)
#define TZ_ISA(name, body)                                               \
  template <class... A>                                                  \
  TZ_TARGET_AVX2 static void name(A... a) {                              \
    STD_TORCH_CHECK(::torchzoo::isa() != ::torchzoo::Isa::baseline,      \
                    "this build of the kernels is for AVX2 processors"); \
    body<32>(a...);                                                      \
  }
#else
#define TZ_ISA(name, body)                                                                   \
  template <class... A>                                                                      \
  TZ_TARGET_AVX512 static void name##_avx512(A... a) { body<64>(a...); }                     \
  template <class... A>                                                                      \
  TZ_TARGET_AVX2 static void name##_avx2(A... a) { body<32>(a...); }                         \
  template <class... A>                                                                      \
  static void name##_baseline(A... a) { body<16>(a...); }                                    \
  template <class... A>                                                                      \
  static void name(A... a) {                                                                 \
    switch (::torchzoo::isa()) {                                                             \
      case ::torchzoo::Isa::avx512: return name##_avx512(a...);                              \
      case ::torchzoo::Isa::avx2: return name##_avx2(a...);                                  \
      default: return name##_baseline(a...);                                                 \
    }                                                                                        \
  }
#endif
