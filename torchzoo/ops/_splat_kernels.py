"""The weights of splats at pixels, and where they can't be seen: shared by the splat operators.

With `d = centre - pixel` and the conic (a, b, c), `q = a dx^2 + 2 b dx dy + c dy^2`:

    gaussian                 w = exp(-q / 2)
    generalized_exponential  w = exp(-q^(beta/2) / 2)
    analytic                 w = 2 pi I_u I_v / pixel^2, the mean over the pixel's window

`I_u` is the integral of the Gaussian over a window along the longer axis of its ellipse, with a
logistic function for the normal distribution's (Liang et al., Analytic-Splatting, 2024). The second
is of Hamdi et al., GES, 2024.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["gaussian", "generalized_exponential", "analytic"]
KERNELS = {"gaussian": 0, "generalized_exponential": 1, "analytic": 2}
GENERALIZED, ANALYTIC = 1, 2

SMALLEST_Q = 1e-8
"""q is not let below this in the generalised kernel: its derivative is infinite at 0."""
SMALLEST_VARIANCE = 1e-6
"""Square pixels, of the shorter axis in the analytic kernel."""
ROUND = 1e-6
"""Where the axes differ by less than this fraction, the ellipse is a circle without a direction."""
GROWN = 0.71
"""Sides of a pixel, by which the analytic kernel is seen farther: half its window's diagonal."""
EXCESS = 1.017
"""How much the analytic kernel can be above the Gaussian: the logistic function's tails."""


class Eigenframe(NamedTuple):
    """Axes of ellipses: the variances, and the first axis' direction."""

    long: Tensor
    short: Tensor
    cos: Tensor
    sin: Tensor


def eigenframe(cov: Tensor) -> Eigenframe:
    """Axes of covariances `(..., 3)`: xx, xy, yy; where they have none, those of the image.

    Differentiable: the direction of a circle gets no gradient.
    """
    xx, xy, yy = cov.unbind(-1)
    middle, half = (xx + yy) / 2, (xx - yy) / 2
    turned = half.square() + xy.square()
    is_round = 2 * turned.sqrt() < ROUND * (middle + turned.sqrt())
    radius = torch.where(is_round, 1, turned).sqrt()
    # Of the direction (half, xy) / radius, half the angle; the larger component by its root.
    cos2 = torch.where(is_round, 1, half / radius)
    sin2 = torch.where(is_round, 0, xy / radius)
    flat = cos2 >= 0
    large = ((1 + torch.where(flat, cos2, -cos2)) / 2).sqrt()
    small = sin2 / (2 * large)
    cos = torch.where(flat, large, torch.where(sin2 < 0, -small, small))
    sin = torch.where(flat, small, torch.where(sin2 < 0, -large, large))
    radius = torch.where(is_round, 0, radius)
    # A circle's axes are its diagonal entries, whose derivatives are finite.
    long = torch.where(is_round, xx, middle + radius).clamp(min=SMALLEST_VARIANCE)
    short = torch.where(is_round, yy, middle - radius).clamp(min=SMALLEST_VARIANCE)
    return Eigenframe(long, short, cos, sin)


def logistic_cdf(x: Tensor) -> Tensor:
    """The normal distribution function to 4e-4, as `1 / (1 + exp(-(1.6 x + 0.07 x^3)))`."""
    return torch.sigmoid((x * (1.6 + 0.07 * x.square())).clamp(-30, 30))


def window_integral(offset: Tensor, variance: Tensor, window: float) -> Tensor:
    """`s (S((u + window/2) / s) - S((u - window/2) / s))`: `I_u`."""
    s = variance.sqrt()
    return s * (logistic_cdf((offset + window / 2) / s) - logistic_cdf((offset - window / 2) / s))


def weights(kernel: int, d: Tensor, shape: Tensor, beta: Tensor | None, pixel: float) -> Tensor:
    """Weights `(...)` at offsets `d (..., 2)` of splats of `shape (..., 3)`, which broadcast.

    The shape is a conic, and a covariance for the analytic kernel.
    """
    dx, dy = d.unbind(-1)
    if kernel == ANALYTIC:
        frame = eigenframe(shape)
        u = frame.cos * dx + frame.sin * dy
        v = frame.cos * dy - frame.sin * dx
        area = window_integral(u, frame.long, pixel) * window_integral(v, frame.short, pixel)
        return area * (2 * math.pi / pixel**2)
    a, b, c = shape.unbind(-1)
    q = a * dx * dx + 2 * b * dx * dy + c * dy * dy
    if kernel == GENERALIZED:
        assert beta is not None
        return torch.exp(-0.5 * q.clamp(min=SMALLEST_Q) ** (beta / 2))
    return torch.exp(-0.5 * q.clamp(min=0))


def support(kernel: int, opacities: Tensor, beta: Tensor | None, alpha_min: float) -> Tensor:
    """The largest q at which alpha can reach `alpha_min`; NaN where it is reached nowhere."""
    if alpha_min == 0:
        reach = torch.full_like(opacities, torch.inf)
    else:
        ratio = opacities * ((EXCESS if kernel == ANALYTIC else 1) / alpha_min)
        reach = 2 * ratio.log()
    if kernel == GENERALIZED:
        assert beta is not None
        reach = torch.where(beta > 0, reach, torch.nan) ** (2 / beta)
    return torch.where((opacities >= 0) & (reach >= 0), reach, torch.nan)


def conic_of(kernel: int, shape: Tensor) -> Tensor:
    """The conics of what the rasteriser calls shapes."""
    if kernel != ANALYTIC:
        return shape
    frame = eigenframe(shape)
    p, r = 1 / frame.long, 1 / frame.short
    cos, sin = frame.cos, frame.sin
    return torch.stack(
        (
            cos * cos * p + sin * sin * r,
            cos * sin * (p - r),
            sin * sin * p + cos * cos * r,
        ),
        -1,
    )
