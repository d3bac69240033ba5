"""Dual activations: expectations of products of an activation under a Gaussian, in closed form.

For (u, v) ~ N(0, [[d1, s], [s, d2]]) and theta the angle whose cosine is s / sqrt(d1 d2),

    E[u+^n v+^n] = J_n / (2 pi),                       u+ = max(u, 0), 0^0 = 0,
    J_0 = pi - theta,
    J_1 = r + (pi - theta) s,                          r = sqrt(d1 d2 - s^2),
    J_2 = 3 r s + (pi - theta) (d1 d2 + 2 s^2),

the arc-cosine kernels: order 0 is the step function, order 1 the rectified linear unit. The angle
is atan2(r, s), as the gradient of an arc cosine blows up for parallel inputs. For the error
function

    E[erf(u) erf(v)] = (2 / pi) asin(2 s / sqrt((1 + 2 d1) (1 + 2 d2))).

Y. Cho and L. K. Saul, "Kernel methods for deep learning", 2009, equations 3 to 6; C. K. I.
Williams, "Computation with infinite neural networks", 1998, equation 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


def arc_cosine(d1: Tensor, d2: Tensor, s: Tensor, *, order: int = 1) -> Tensor:
    """`E[u+^n v+^n]` for Gaussian u and v of given covariance.

    Gradients are finite for parallel u and v, too.

    Args:
        d1: Variance of u, at least 0.
        d2: Variance of v, at least 0.
        s: Their covariance; what rounding puts beyond `sqrt(d1 d2)` counts as parallel.
        order: n, from 0 to 2.

    Shape:
        - d1, d2, s: broadcast to the output

    Raises:
        ValueError: An order without a closed form here.

    Source:
        Y. Cho and L. K. Saul, "Kernel methods for deep learning", 2009, equations 3 to 6.

    Example:
        >>> one = torch.tensor(1.0)
        >>> [round(arc_cosine(one, one, 0 * one, order=n).item(), 4) for n in (0, 1, 2)]
        [0.25, 0.1592, 0.25]
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order: expected 0, 1 or 2, got {order}")
    square = d1 * d2 - s * s
    apart = square > 0
    r = torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)
    moved = apart | (s != 0)  # at the origin the angle has no gradient
    rest = math.pi - torch.atan2(r, torch.where(moved, s, 1.0))
    if order == 0:
        return rest / (2 * math.pi)
    if order == 1:
        return (r + rest * s) / (2 * math.pi)
    return (3 * r * s + rest * (d1 * d2 + 2 * s * s)) / (2 * math.pi)


@dataclass(frozen=True)
class DualActivation:
    """An activation phi by its Gaussian expectations.

    Attributes:
        name: The activation's name.
        value: `E[phi(u) phi(v)]` of `(d1, d2, s)`, which broadcast.
        derivative: `E[phi'(u) phi'(v)]` of the same.
        diagonal: `E[phi(u)²]` of d1; exact where `value(d1, d1, d1)` would lose half the digits.
        derivative_diagonal: `E[phi'(u)²]` of d1.
    """

    name: str
    value: Callable[[Tensor, Tensor, Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor, Tensor], Tensor]
    diagonal: Callable[[Tensor], Tensor]
    derivative_diagonal: Callable[[Tensor], Tensor]


def _half(d: Tensor) -> Tensor:
    return d / 2


def _one_half(d: Tensor) -> Tensor:
    return torch.full_like(d, 0.5)


def _erf(d1: Tensor, d2: Tensor, s: Tensor) -> Tensor:
    sine = 2 * s / ((1 + 2 * d1) * (1 + 2 * d2)).sqrt()
    return 2 / math.pi * sine.asin()


def _erf_slope(d1: Tensor, d2: Tensor, s: Tensor) -> Tensor:
    return 4 / math.pi * ((1 + 2 * d1) * (1 + 2 * d2) - 4 * s * s).rsqrt()


def _erf_square(d: Tensor) -> Tensor:
    return 2 / math.pi * (2 * d / (1 + 2 * d)).asin()


def _erf_slope_square(d: Tensor) -> Tensor:
    return 4 / math.pi * (1 + 4 * d).rsqrt()


_CLOSED = {
    "erf": DualActivation(
        "erf",
        value=_erf,
        derivative=_erf_slope,
        diagonal=_erf_square,
        derivative_diagonal=_erf_slope_square,
    ),
    "relu": DualActivation(
        "relu",
        value=partial(arc_cosine, order=1),
        derivative=partial(arc_cosine, order=0),
        diagonal=_half,
        derivative_diagonal=_one_half,
    ),
}


def dual(name: str) -> DualActivation:
    """The dual activation of an activation with a closed form.

    Args:
        name: `"relu"` or `"erf"`.

    Raises:
        ValueError: No closed form of this name.

    Example:
        >>> relu = dual("relu")
        >>> relu.diagonal(torch.tensor(3.0)), relu.derivative_diagonal(torch.tensor(3.0))
        (tensor(1.5000), tensor(0.5000))
    """
    if name not in _CLOSED:
        raise ValueError(f"name: expected one of {sorted(_CLOSED)}, got {name!r}")
    return _CLOSED[name]
