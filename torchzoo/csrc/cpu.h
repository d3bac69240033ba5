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
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// `contiguous` and `empty_like` for steps of microseconds: torch's own find their operators by name,
// which is slow in a cold cache, and the first even where there is nothing to do.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Asks for huge pages where the system has them: large results and scratch lie in memory that the process
// has just got, which costs a fault for each page at its first write, and of 2 MiB pages there are 512
// times fewer. They also need fewer entries in the tables that translate addresses.
inline void in_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = 2 << 20;
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + huge - 1) / huge * huge, last = (start + bytes) / huge * huge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // if it can
#endif
}

inline Tensor in_huge_pages(Tensor t) {
  in_huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}

// torch's `new_empty` and `empty_like`, in huge pages.
template <class... Type>
Tensor fresh(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, Type... type) {
  return in_huge_pages(torch::stable::new_empty(like, sizes, type...));
}

inline Tensor fresh(const Tensor& like) { return in_huge_pages(torch::stable::empty_like(like)); }

inline Tensor fresh_like(const Tensor& dense) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dense.dim(), dense.sizes().data(), dense.strides().data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dense.scalar_type())),
      aoti_torch_device_type_cpu(), 0, &made));
  return in_huge_pages(Tensor(made));
}

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
