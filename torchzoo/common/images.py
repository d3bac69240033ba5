"""How much alike two images are: PSNR, SSIM and its form over several scales.

Z. Wang, A. C. Bovik, H. R. Sheikh and E. P. Simoncelli, "Image quality assessment: from error
visibility to structural similarity", 2004. With local means m, variances v and covariance c under a
Gaussian window,

    SSIM = (2 m_x m_y + C1) / (m_x^2 + m_y^2 + C1) · (2 c + C2) / (v_x + v_y + C2),
    C1 = (0.01 L)^2,  C2 = (0.03 L)^2,

L the range of the data; the second factor alone is what several scales multiply (Z. Wang,
E. P. Simoncelli and A. C. Bovik, "Multiscale structural similarity for image quality assessment",
2003).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.ops.calling import no_autocast

_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_BLOCK = 64
"""Rows a block: few enough that the band matrix is not all zeros, enough for a fast product."""


def psnr(x: Tensor, y: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB.

    Args:
        x: Images; the last three dimensions are one image, whatever their order.
        y: Their truth.
        data_range: Largest possible difference L.

    Shape:
        - x, y: `(..., C, H, W)`
        - output: `(...)`

    Returns:
        `10 log10(L^2 / MSE)`, infinite for equal images.

    Raises:
        ValueError: Shapes that differ or fewer than three dimensions, or a range that is not
            positive.

    Example:
        >>> psnr(torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.1))
        tensor(20.)
    """
    x, y = _checked(x, y, data_range)
    return -10 * ((x - y) / data_range).square().mean((-3, -2, -1)).log10()


def ssim(
    x: Tensor, y: Tensor, *, window: int = 11, sigma: float = 1.5, data_range: float = 1.0
) -> Tensor:
    """Structural similarity of each image: the mean of `ssim_map`.

    Args:
        x: Images.
        y: Images to compare them with.
        window: Side of the window, odd.
        sigma: Standard deviation of its Gaussian weights, in pixels.
        data_range: Range of the data L.

    Shape:
        - x, y: `(..., C, H, W)`
        - output: `(...)`

    Returns:
        In [-1, 1], and 1 for equal images.

    Raises:
        ValueError: As in `ssim_map`.

    Example:
        >>> x = torch.linspace(0, 1, 256).view(1, 16, 16)
        >>> ssim(x, x), bool(ssim(x, 0.5 * x) < 0.9)
        (tensor(1.), True)
    """
    similarity = ssim_map(x, y, window=window, sigma=sigma, data_range=data_range)
    return similarity.mean((-3, -2, -1))


def ssim_map(
    x: Tensor, y: Tensor, *, window: int = 11, sigma: float = 1.5, data_range: float = 1.0
) -> Tensor:
    """Structural similarity around each pixel, channel by channel, with zeros beyond the borders.

    float16 and bfloat16 are computed in float32, as variances are differences.

    Args:
        x: Images.
        y: Images to compare them with.
        window: Side of the window, odd.
        sigma: Standard deviation of its Gaussian weights, in pixels.
        data_range: Range of the data L.

    Shape:
        - x, y: `(..., C, H, W)`
        - output: `(..., C, H, W)`

    Raises:
        ValueError: Shapes that differ or fewer than three dimensions, an even or negative window,
            or a sigma or range that is not positive.

    Example:
        >>> ssim_map(torch.ones(1, 8, 8), torch.zeros(1, 8, 8)).max() < 0.01
        tensor(True)
    """
    _check_window(window, sigma)
    x, y = _checked(x, y, data_range)
    luminance, contrast = _similarity(x, y, window, sigma, data_range, window // 2)
    return luminance * contrast


def ms_ssim(
    x: Tensor, y: Tensor, *, window: int = 11, sigma: float = 1.5, data_range: float = 1.0
) -> Tensor:
    """Structural similarity over five scales, each half the size of the one before.

    Windows lie within the images, and negative factors count as 0; the mean is over channels.

    Args:
        x: Images.
        y: Images to compare them with.
        window: Side of the window, odd.
        sigma: Standard deviation of its Gaussian weights, in pixels.
        data_range: Range of the data L.

    Shape:
        - x, y: `(..., C, H, W)`
        - output: `(...)`

    Returns:
        In [0, 1], and 1 for equal images.

    Raises:
        ValueError: As in `ssim_map`, or a side below `16 window`.

    Example:
        >>> x = torch.rand(3, 176, 176)
        >>> bool(ms_ssim(x, x) > 0.999), bool(ms_ssim(x, 1 - x) < 0.1)
        (True, True)
    """
    _check_window(window, sigma)
    x, y = _checked(x, y, data_range)
    least = window * 2 ** (len(_SCALES) - 1)
    if min(x.shape[-2:]) < least:
        raise ValueError(f"x: expected sides of {least} at least, got {tuple(x.shape[-2:])}")
    shape = x.shape[:-2]
    x, y = (image.reshape(-1, 1, *image.shape[-2:]) for image in (x, y))
    result = torch.ones((), dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(_SCALES):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        luminance, factor = _similarity(x, y, window, sigma, data_range, 0)
        if scale == len(_SCALES) - 1:
            factor = luminance * factor
        result = result * factor.mean((-3, -2, -1)).clamp(min=0) ** weight
    return result.reshape(shape).mean(-1)


def _similarity(
    x: Tensor, y: Tensor, window: int, sigma: float, data_range: float, padding: int
) -> tuple[Tensor, Tensor]:
    """The two factors of SSIM around each pixel whose window lies in the padded image."""
    offset = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    weights = torch.softmax(-offset.square() / (2 * sigma**2), 0)
    planes = torch.stack([x, y, x * x, y * y, x * y])
    with no_autocast(x):
        mx, my, xx, yy, xy = _rows(_rows(planes, weights, padding).mT, weights, padding).mT
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    return luminance, (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)


def _rows(planes: Tensor, weights: Tensor, padding: int) -> Tensor:
    """Weighted means along dimension -2 of every window in the padded planes.

    One product of a band matrix with each block of rows and those its last windows reach into:
    several times faster than a convolution with one channel, and as exact.
    """
    reach = len(weights) - 1
    count = planes.shape[-2] + 2 * padding - reach
    step = math.ceil(count / math.ceil(count / _BLOCK))
    band = torch.stack([F.pad(weights, (i, step - 1 - i)) for i in range(step)])
    blocks = F.pad(planes, (0, 0, padding, padding + -count % step)).unfold(-2, step + reach, step)
    return (band @ blocks.mT).flatten(-3, -2)[..., :count, :]


def _checked(x: Tensor, y: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    if x.ndim < 3:
        raise ValueError(f"x: expected (..., C, H, W), got {tuple(x.shape)}")
    if y.shape != x.shape:
        raise ValueError(f"y: expected the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    if not data_range > 0:
        raise ValueError(f"data_range: expected a number > 0, got {data_range}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


def _check_window(window: int, sigma: float) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window: expected an odd number ≥ 1, got {window}")
    if not sigma > 0:
        raise ValueError(f"sigma: expected a number > 0, got {sigma}")
