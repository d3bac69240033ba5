// The geometry of a convolution and its checks, shared by the CPU and the CUDA kernel.
//
// Frames are channels last: x (..., rows, columns, channels), acc (..., rows, columns, outputs), and
// weight_t (channels, kernel rows, kernel columns, outputs).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "delta_linear.h"

namespace torchzoo {

constexpr int64_t SIDE = 8;  // a tile is SIDE x SIDE outputs

struct Axis {  // rows or columns
  int64_t in, out, kernel, stride, padding, dilation;

  // The input that output o sees through tap k; it may lie in the padding.
  TZ_HOST_DEVICE int64_t input(int64_t o, int64_t k) const { return o * stride - padding + k * dilation; }
  TZ_HOST_DEVICE bool inside(int64_t i) const { return i >= 0 && i < in; }
  TZ_HOST_DEVICE int64_t tiles() const { return (out + SIDE - 1) / SIDE; }
};

struct Span {  // from first on, `last` not included
  int64_t first, last;
};

TZ_HOST_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The outputs of a tile, and the inputs that they see, padding left out.
TZ_HOST_DEVICE Span outputs_of(const Axis& axis, int64_t tile) {
  return {tile * SIDE, least(tile * SIDE + SIDE, axis.out)};
}

TZ_HOST_DEVICE Span halo_of(const Axis& axis, Span outputs) {
  const int64_t first = axis.input(outputs.first, 0);
  const int64_t last = least(axis.input(outputs.last - 1, axis.kernel - 1) + 1, axis.in);
  return {least(first < 0 ? 0 : first, last), last};  // empty if all of it is padding
}

// Rows and columns of a step, once it is sure that the tensors fit together.
inline std::pair<Axis, Axis> axes(const torch::stable::Tensor& x, const torch::stable::Tensor& x_ref,
                                  const torch::stable::Tensor& acc,
                                  const torch::stable::Tensor& weight_t,
                                  const std::optional<torch::stable::Tensor>& quantum,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation) {
  using torch::headeronly::ScalarType;
  const ScalarType type = acc.scalar_type(), held = weight_t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "delta_conv2d_step: acc must be float32 or float64");
  STD_TORCH_CHECK(type == x.scalar_type() && type == x_ref.scalar_type() &&
                      (!quantum || quantum->scalar_type() == type),
                  "delta_conv2d_step: x, x_ref, acc and quantum must have one type");
  STD_TORCH_CHECK(held == type || held == ScalarType::BFloat16 || held == ScalarType::Half,
                  "delta_conv2d_step: weight_t must have the type of acc or a half one");
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 3 && x_ref.dim() == dims && acc.dim() == dims && weight_t.dim() == 4 &&
                      stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "delta_conv2d_step: expected frames (..., rows, columns, channels)");
  bool fits = x.size(-1) == weight_t.size(0) && acc.size(-1) == weight_t.size(3) &&
              weight_t.size(0) > 0 && weight_t.size(3) > 0 && x_ref.size(-1) == x.size(-1) &&
              (!quantum || quantum->numel() == 1 || quantum->numel() == x.size(-1));
  for (int64_t d = 0; d < dims - 1; ++d)
    fits = fits && x_ref.size(d) == x.size(d) && (d >= dims - 3 || acc.size(d) == x.size(d));
  Axis axis[2];
  for (int64_t d = 0; d < 2; ++d) {
    axis[d] = {x.size(d - 3), acc.size(d - 3), weight_t.size(d + 1), stride[d], padding[d], dilation[d]};
    const auto [in, out, kernel, hop, zeros, gap] = axis[d];
    constexpr int64_t limit = int64_t(1) << 31;
    fits = fits && in > 0 && out > 0 && kernel > 0 && kernel < limit && hop > 0 && hop < limit &&
           zeros >= 0 && zeros < limit && gap > 0 && gap < limit;
    const int64_t last = fits ? in + 2 * zeros - gap * (kernel - 1) - 1 : -1;  // place of a window
    fits = fits && last >= 0 && last / hop + 1 == out;
  }
  STD_TORCH_CHECK(fits, "delta_conv2d_step: shapes that don't fit together");
  return {axis[0], axis[1]};
}

}  // namespace torchzoo
