"""Structural similarity of two sets of pixels, window by window of a virtual image.

Z. Xie, X. Yang, Y. Yang, Q. Sun, Y. Jiang, H. Wang, Y. Cai and M. Sun, "S3IM: Stochastic Structural
SIMilarity and Its Unreasonable Effectiveness for Neural Fields", 2023. An image of indices says
which pixel is where; over a window of K x K of them with weights w, x from one set and y from the
other,

    m_x = sum of w x,   v_x = sum of w (x - m_x)^2,   s = sum of w (x - m_x)(y - m_y),
    L = (2 m_x m_y + C1) / B,    B = m_x^2 + m_y^2 + C1,
    A = (2 s + C2) / V,          V = v_x + v_y + C2,         similarity = L A.

The shuffled pixels, as many as the image has, are never stored. For g above the similarity the
gradient of x_k is, as the weights' sum is 1,

    w_k g (2 A (m_y - L m_x) / B + 2 L / V (y_k - m_y) - 2 L A / V (x_k - m_x)),

summed over the windows that have the pixel; y's is the same with x and y exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from torchzoo.ops._splat_checks import check_types, common_dtype
from torchzoo.ops.calling import below_autograd, loop_over_batch, values_readable

MOST = 32
"""Side of the windows that the kernels hold."""


def s3im_groups(
    src: Tensor,
    tar: Tensor,
    indices: Tensor,
    *,
    kernel_size: int = 4,
    stride: int = 4,
    margin: int = 0,
    sigma: float = 1.5,
    data_range: float = 1.0,
) -> Tensor:
    """Structural similarity of two sets of pixels in each window of a virtual image.

    Differentiable once, in both sets; float16 and bfloat16 are computed in float32. The result is
    the same for any number of threads, and on CUDA from run to run. There an index out of range,
    which nobody looks for, makes its windows NaN.

    Args:
        src: One set of pixels, C channels each.
        tar: The other.
        indices: The image: the number of the pixel at each place, int32 or int64. A pixel may be
            at several places, or at none.
        kernel_size: Side K of a window.
        stride: Places from one window to the next.
        margin: Zeros around the image, less than K.
        sigma: Standard deviation of a window's weights, Gaussian around place K // 2 of each side.
        data_range: Range of the pixels' values; C1 and C2 are the squares of 0.01 and 0.03 of it.

    Shape:
        - src, tar: `(N, C)`
        - indices: `(H, W)`
        - output: `(rows, columns, C)`, `(H + 2 margin - K) // stride + 1` rows and likewise columns

    Returns:
        The similarity of each window and channel, from -1 to 1.

    Raises:
        ValueError: Shapes, dtypes or devices that don't fit, a window larger than the image, an
            option out of its range, or an index that is.
        NotImplementedError: An input has a forward-mode tangent.

    Source:
        Xie et al., "S3IM", 2023, section 3.2.

    Example:
        >>> colors, image = torch.rand(16, 3), torch.randperm(16).view(4, 4)
        >>> s3im_groups(colors, colors, image).shape
        torch.Size([1, 1, 3])
        >>> bool(s3im_groups(colors, 1 - colors, image).mean() < -0.5)
        True
    """
    _check(src, tar, indices, kernel_size, stride, margin, sigma, data_range)
    dtype = common_dtype(src, tar)
    x, y = src.to(dtype).contiguous(), tar.to(dtype).contiguous()
    options = (kernel_size, stride, margin, float(sigma), float(data_range))
    image = indices.long().contiguous()
    if kernel_size > MOST:
        return similarity(x, y, image, *options)
    with below_autograd(x, y):
        return _s3im_groups(x, y, image, *options)


def _check(
    src: Tensor,
    tar: Tensor,
    indices: Tensor,
    kernel_size: int,
    stride: int,
    margin: int,
    sigma: float,
    data_range: float,
) -> None:
    if src.ndim != 2:
        raise ValueError(f"src: got {tuple(src.shape)}, expected (N, C)")
    if tar.shape != src.shape:
        raise ValueError(f"tar: got {tuple(tar.shape)}, expected {tuple(src.shape)} as src")
    check_types("s3im_groups", {"src": src, "tar": tar})
    if indices.ndim != 2 or indices.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(indices.shape)} of {indices.dtype}"
        raise ValueError(f"indices: got {got}, expected (H, W) of torch.int32 or torch.int64")
    if indices.device != src.device:
        raise ValueError(f"indices: got {indices.device}, expected {src.device}, as src")
    for name, count in (("kernel_size", kernel_size), ("stride", stride)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected at least 1")
    if not 0 <= margin < kernel_size:
        raise ValueError(f"margin: got {margin}, expected 0 to {kernel_size - 1}")
    if kernel_size > min(indices.shape) + 2 * margin:
        got = f"{kernel_size} and an image of {tuple(indices.shape)} with margins of {margin}"
        raise ValueError(f"kernel_size: got {got}, expected at most its sides")
    for name, value in (("sigma", sigma), ("data_range", data_range)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number > 0")
    if indices.device.type == "cpu" and values_readable(indices):
        least, most = indices.aminmax()
        if least < 0 or most >= len(src):
            got = f"{int(least)} to {int(most)}"
            raise ValueError(f"indices: got {got}, expected 0 to {len(src) - 1}")


def windows_of(indices: Tensor, kernel_size: int, stride: int, margin: int, blank: int) -> Tensor:
    """The pixels of each window, `(K K, rows, columns)`; beyond the image is pixel `blank`."""
    image = F.pad(indices, (margin,) * 4, value=blank)
    windows = image.unfold(0, kernel_size, stride).unfold(1, kernel_size, stride)
    return rearrange(windows, "a b i j -> (i j) a b")


def weights_of(kernel_size: int, sigma: float, like: Tensor) -> Tensor:
    """Gaussian weights of a window's places, `(K K, 1, 1, 1)`, of sum 1."""
    offset = torch.arange(kernel_size, dtype=torch.float64, device=like.device) - kernel_size // 2
    one = torch.softmax(-offset.square() / (2 * sigma**2), 0).to(like.dtype)
    return torch.outer(one, one).view(-1, 1, 1, 1)


def _moments(
    src: Tensor, tar: Tensor, windows: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The m_x, m_y, v_x + v_y and s of the module, and the x - m_x and y - m_y."""
    x, y = (F.pad(pixels, (0, 0, 0, 1))[windows] for pixels in (src, tar))
    mx, my = ((weights * values).sum(0) for values in (x, y))
    # Moments about the mean: their sum is what the differences of raw moments lose digits on.
    dx, dy = x - mx, y - my
    spread = (weights * (dx.square() + dy.square())).sum(0)
    return mx, my, spread, (weights * dx * dy).sum(0), dx, dy


def _ratios(
    mx: Tensor, my: Tensor, spread: Tensor, covariance: Tensor, data_range: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The L, A, B and V of the module."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    squares, spreads = mx.square() + my.square() + c1, spread + c2
    return (2 * mx * my + c1) / squares, (2 * covariance + c2) / spreads, squares, spreads


def similarity(
    src: Tensor,
    tar: Tensor,
    indices: Tensor,
    kernel_size: int,
    stride: int,
    margin: int,
    sigma: float,
    data_range: float,
) -> Tensor:
    """The reference, in operations that torch knows."""
    windows = windows_of(indices, kernel_size, stride, margin, len(src))
    moments = _moments(src, tar, windows, weights_of(kernel_size, sigma, src))[:4]
    luminance, contrast, _, _ = _ratios(*moments, data_range)
    return luminance * contrast


@torch.library.custom_op("torchzoo::s3im_groups", mutates_args=())
def _s3im_groups(
    src: Tensor,
    tar: Tensor,
    indices: Tensor,
    kernel_size: int,
    stride: int,
    margin: int,
    sigma: float,
    data_range: float,
) -> Tensor:
    return similarity(src, tar, indices, kernel_size, stride, margin, sigma, data_range)


@_s3im_groups.register_fake
def _(
    src: Tensor,
    tar: Tensor,
    indices: Tensor,
    kernel_size: int,
    stride: int,
    margin: int,
    sigma: float,
    data_range: float,
) -> Tensor:
    sides = [(side + 2 * margin - kernel_size) // stride + 1 for side in indices.shape]
    return src.new_empty(*sides, src.shape[1])


@torch.library.custom_op("torchzoo::s3im_groups_backward", mutates_args=())
def _s3im_groups_backward(
    g: Tensor,
    src: Tensor,
    tar: Tensor,
    indices: Tensor,
    kernel_size: int,
    stride: int,
    margin: int,
    sigma: float,
    data_range: float,
) -> Tensor:
    """The gradient of src, for g `(rows, columns, C)`."""
    windows = windows_of(indices, kernel_size, stride, margin, len(src))
    weights = weights_of(kernel_size, sigma, src)
    mx, my, spread, covariance, dx, dy = _moments(src, tar, windows, weights)
    luminance, contrast, squares, spreads = _ratios(mx, my, spread, covariance, data_range)
    pull = contrast * (my - luminance * mx) / squares
    slopes = 2 * g * (pull + luminance / spreads * (dy - contrast * dx))
    sums = src.new_zeros(len(src) + 1, src.shape[1])
    return sums.index_add(0, windows.flatten(), (weights * slopes).flatten(0, 2))[:-1].clone()


@_s3im_groups_backward.register_fake
def _(
    g: Tensor,
    src: Tensor,
    tar: Tensor,
    indices: Tensor,
    kernel_size: int,
    stride: int,
    margin: int,
    sigma: float,
    data_range: float,
) -> Tensor:
    return torch.empty_like(src)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    src, tar, indices, *ctx.options = inputs
    ctx.save_for_backward(src, tar, indices)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    src, tar, indices = ctx.saved_tensors
    wanted, g = ctx.needs_input_grad, g.contiguous()
    g_src = _s3im_groups_backward(g, src, tar, indices, *ctx.options) if wanted[0] else None
    g_tar = _s3im_groups_backward(g, tar, src, indices, *ctx.options) if wanted[1] else None
    return g_src, g_tar, *(None,) * 6


_s3im_groups.register_autograd(_backward, setup_context=_setup)
_s3im_groups.register_vmap(loop_over_batch(_s3im_groups))
_s3im_groups_backward.register_vmap(loop_over_batch(_s3im_groups_backward))
