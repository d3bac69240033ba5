"""Rectifiers that compare with a bound, fused: one pass where masks and selections take several.

above      y = x unless x ≤ p, else 0; NaN passes
below      y = x where 0 < x ≤ p, else 0
saturate   y = min(max(x, 0), p), 0 for NaN

dy/dx is 1 where x passes and 0 elsewhere; dy/dp is 1 where `saturate` gives p, and else 0.

Where a compiler is at work the formula takes the operator's place, as it can be fused with others,
but not for large inputs on a CPU (`torchzoo.ops._elementwise.differentiate_formula`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from torchzoo.ops._elementwise import (
    as_parameter,
    as_result,
    differentiate_formula,
    empty_result,
    slopes_vmap,
    sum_leading,
    values_vmap,
)
from torchzoo.ops.calling import below_autograd

KINDS = ("above", "below", "saturate")


def bounded_relu(
    x: Tensor,
    bound: Tensor | float,
    *,
    kind: Literal["above", "below", "saturate"] = "saturate",
) -> Tensor:
    """Pass what is on the right side of a bound.

    Comparisons are in float32 at least. Backward keeps `x` and `bound` only.

    Args:
        x: Inputs, `(..., *features)`.
        bound: The bound p, one number or of a shape that broadcasts to `features`.
        kind: `"above"`: x above the bound, else 0, with NaN left as it is; `"below"`: x where it is
            above 0 and at most the bound, else 0; `"saturate"`: x where it is above 0, at most the
            bound. NaN gives 0 in the latter two.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`, of the type of x

    Returns:
        The rectified inputs.

    Raises:
        ValueError: `x` is not floating-point, `bound` does not fit it, or an unknown kind.

    Example:
        >>> x = torch.tensor([-1.0, 1.0, 3.0])
        >>> [bounded_relu(x, 2.0, kind=kind).tolist() for kind in ("above", "below", "saturate")]
        [[0.0, 0.0, 3.0], [0.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    bound = as_parameter("bound", bound, x)
    number = KINDS.index(kind)
    if differentiate_formula(x):
        return formula(x, bound, number)
    with below_autograd(x, bound):
        return torch.ops.torchzoo.bounded_relu.default(x, bound, number)


def _passes(x: Tensor, bound: Tensor, kind: int) -> Tensor:
    return ~(x <= bound) if KINDS[kind] == "above" else (x > 0) & (x <= bound)


def formula(x: Tensor, bound: Tensor, kind: int) -> Tensor:
    """The function in differentiable operations, in the type of `bound`."""
    wide_x = x.to(bound.dtype)
    rest = torch.where(wide_x > bound, bound, 0.0) if KINDS[kind] == "saturate" else 0.0
    return torch.where(_passes(wide_x, bound, kind), wide_x, rest).to(x.dtype)


def slopes(grad: Tensor, x: Tensor, bound: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """The gradients by `x` and `bound`, in differentiable operations."""
    wide_x, wide_grad = x.to(bound.dtype), grad.to(bound.dtype)
    dx = torch.where(_passes(wide_x, bound, kind), wide_grad, 0.0).to(x.dtype)
    if KINDS[kind] != "saturate":
        return dx, torch.zeros_like(bound)
    return dx, sum_leading(torch.where(wide_x > bound, wide_grad, 0.0), bound)


@torch.library.custom_op("torchzoo::bounded_relu", mutates_args=())
def bounded_relu_op(x: Tensor, bound: Tensor, kind: int) -> Tensor:
    return as_result(formula(x, bound, kind), x, bound)


@torch.library.custom_op("torchzoo::bounded_relu_backward", mutates_args=())
def bounded_relu_backward(
    grad: Tensor, x: Tensor, bound: Tensor, kind: int
) -> tuple[Tensor, Tensor]:
    dx, dbound = slopes(grad, x, bound, kind)
    return as_result(dx, x, bound), dbound


@bounded_relu_op.register_fake
def _(x: Tensor, bound: Tensor, kind: int) -> Tensor:
    return empty_result(x, bound)


@bounded_relu_backward.register_fake
def _(grad: Tensor, x: Tensor, bound: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    return empty_result(x, bound), torch.empty_like(bound)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bound, ctx.kind = inputs
    ctx.save_for_backward(x, bound)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # with gradients recorded in backward a second derivative is wanted
    op = torch.ops.torchzoo.bounded_relu_backward.default
    run = slopes if torch.is_grad_enabled() else op
    x, bound = ctx.saved_tensors
    return *run(grad, x, bound, ctx.kind), None


bounded_relu_op.register_autograd(_backward, setup_context=_setup)


bounded_relu_op.register_vmap(values_vmap(bounded_relu_op))
bounded_relu_backward.register_vmap(slopes_vmap(bounded_relu_backward))
