"""K functions of each input on a uniform grid or of its tanh, all in one pass: features of KANs.

splines      1/n! sum_j (-1)^j C(n + 1, j) relu((n + 1)/2 - j - abs(s))^n,   j = 0 .. n // 2,
             the B-splines of order n around s = u - k + (n - 1)/2 = 0, on knots of spacing 1
gaussians    exp(-(u - k)^2)
chebyshev    T_k(tanh x), polynomials of the first kind

for k = 0 .. K - 1 and u = (x - low) / spacing. The slope of a spline has n - 1 for n in factorial
and power and the factor -sign(s); so there is no recursion over orders. That of T_k is k U_(k-1).

Backward keeps x alone and computes slopes where it reads their gradients. Where a compiler is at
work the formula takes the operator's place.
"""

from __future__ import annotations

from math import comb, factorial
from typing import Any, Literal

import torch
from torch import Tensor

from torchzoo.ops._elementwise import differentiate_formula
from torchzoo.ops.calling import below_autograd, loop_over_batch
from torchzoo.ops.rows import wide

FAMILIES = ("splines", "gaussians", "chebyshev")
MOST_ORDER = 31
"""Sums of higher powers cancel to nothing in float64 too."""


def basis_functions(
    x: Tensor,
    family: Literal["splines", "gaussians", "chebyshev"],
    count: int,
    *,
    order: int = 3,
    low: float = 0.0,
    spacing: float = 1.0,
) -> Tensor:
    """The functions of a family at every input.

    Half-precision inputs are computed in float32. Backward keeps `x` only.

    Args:
        x: Inputs, `(..., D)`.
        family: Which functions.
        count: Number of functions K.
        order: Of splines, the degree n of their pieces, 1 to 31.
        low: Of splines and Gaussians, where the grid begins.
        spacing: Of splines and Gaussians, the distance of neighbours on the grid.

    Shape:
        - x: `(..., D)`
        - output: `(..., K, D)`, of the type of x

    Returns:
        The functions, for each of them the inputs side by side.

    Raises:
        ValueError: `x` is not floating-point or has no dimensions, an unknown family, `count` below
            1, an order out of range or a spacing that is not above 0.

    Source:
        C. de Boor, "On Calculating with B-Splines", 1972; Z. Li, "Kolmogorov-Arnold Networks are
        Radial Basis Function Networks", 2024; S. Sidharth et al., "Chebyshev Polynomial-Based
        Kolmogorov-Arnold Networks", 2024.

    Example:
        >>> basis_functions(torch.tensor([2.0]), "splines", 4)[:, 0] * 6
        tensor([0., 0., 1., 4.])
    """
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"x: expected floating point (..., D), got {x.dtype} {tuple(x.shape)}")
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if not 1 <= order <= MOST_ORDER:
        raise ValueError(f"order: expected 1 to {MOST_ORDER}, got {order}")
    if not spacing > 0:
        raise ValueError(f"spacing: expected a number above 0, got {spacing}")
    setting = (FAMILIES.index(family), count, order, float(low), float(spacing))
    rows = x.to(wide(x.dtype)).reshape(-1, x.shape[-1])
    if differentiate_formula():
        values = formula(rows, *setting)
    else:
        with below_autograd(x):
            values = torch.ops.torchzoo.basis_functions.default(rows, *setting)
    return values.reshape(*x.shape[:-1], count, x.shape[-1]).to(x.dtype)


def _numbers(count: int, like: Tensor) -> Tensor:
    """0, 1, .., count - 1 as a column."""
    return torch.arange(count, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _splines(u: Tensor, count: int, order: int, derivative: int) -> Tensor:
    """B-splines on knots of spacing 1, or their slopes; in place, as new memory costs most."""
    degree = order - derivative
    s = u.unsqueeze(-2) - (_numbers(count, u) - (order - 1) / 2)
    inner = s.abs().neg_().add_((order + 1) / 2)
    total = torch.zeros_like(s)
    for j in range(order // 2 + 1):
        power = (inner - j).relu_() ** degree if degree else (inner > j).to(s.dtype)
        total.add_(power, alpha=(-1) ** (j + derivative) * comb(order + 1, j) / factorial(degree))
    return total.mul_(s.sign()) if derivative else total


def _chebyshev(z: Tensor, first: Tensor, second: Tensor, count: int) -> Tensor:
    """What follows from two polynomials by the recurrence of both kinds."""
    values = [first, second]
    for _ in range(2, count):
        values.append(2 * z * values[-1] - values[-2])
    return torch.stack(values[:count], -2)


def formula(x: Tensor, family: int, count: int, order: int, low: float, spacing: float) -> Tensor:
    """The functions in differentiable operations."""
    if FAMILIES[family] == "chebyshev":
        z = x.tanh()
        return _chebyshev(z, torch.ones_like(z), z, count)
    u = (x - low) / spacing
    if FAMILIES[family] == "splines":
        return _splines(u, count, order, 0)
    return (u.unsqueeze(-2) - _numbers(count, u)).square().neg().exp()


def slopes(
    grad: Tensor, x: Tensor, family: int, count: int, order: int, low: float, spacing: float
) -> Tensor:
    """The gradient by `x`, in differentiable operations."""
    if FAMILIES[family] == "chebyshev":
        z = x.tanh()
        second_kind = _chebyshev(z, torch.zeros_like(z), torch.ones_like(z), count)
        return (grad * _numbers(count, x) * second_kind).sum(-2) * (1 - z.square())
    u = (x - low) / spacing
    if FAMILIES[family] == "splines":
        return (grad * _splines(u, count, order, 1)).sum(-2) / spacing
    s = u.unsqueeze(-2) - _numbers(count, u)
    return (grad * (s * s.square().neg().exp())).sum(-2) * (-2 / spacing)


@torch.library.custom_op("torchzoo::basis_functions", mutates_args=())
def basis_functions_op(
    x: Tensor, family: int, count: int, order: int, low: float, spacing: float
) -> Tensor:
    return formula(x, family, count, order, low, spacing).contiguous()


@torch.library.custom_op("torchzoo::basis_functions_backward", mutates_args=())
def basis_functions_backward(
    grad: Tensor, x: Tensor, family: int, count: int, order: int, low: float, spacing: float
) -> Tensor:
    return slopes(grad, x, family, count, order, low, spacing).contiguous()


@basis_functions_op.register_fake
def _(x: Tensor, family: int, count: int, order: int, low: float, spacing: float) -> Tensor:
    return x.new_empty(x.shape[0], count, x.shape[1])


@basis_functions_backward.register_fake
def _(
    grad: Tensor, x: Tensor, family: int, count: int, order: int, low: float, spacing: float
) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.setting = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # with gradients recorded in backward a second derivative is wanted
    op = torch.ops.torchzoo.basis_functions_backward.default
    run = slopes if torch.is_grad_enabled() else op
    return run(grad, *ctx.saved_tensors, *ctx.setting), None, None, None, None, None


basis_functions_op.register_autograd(_backward, setup_context=_setup)


basis_functions_op.register_vmap(loop_over_batch(basis_functions_op))
basis_functions_backward.register_vmap(loop_over_batch(basis_functions_backward))
