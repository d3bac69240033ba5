"""HyReLU: a ReLU that falls back to zero, smoothly, above a trained bound; fused.

y = max(0, x) σ(t),  t = κ (λ − x),
dy/dx = σ(t) − κ x σ(t) σ(−t),   dy/dλ = κ x σ(t) σ(−t)   for 0 < x < inf, else all are 0.

Where a compiler is at work the formula takes the operator's place, as it can be fused with others,
but not for large inputs on a CPU (`torchzoo.ops._elementwise.differentiate_formula`).
"""

from __future__ import annotations

from typing import Any

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


def hyrelu(
    x: Tensor, bound: Tensor | float, *, sharpness: float = 20.0, nan_to_zero: bool = True
) -> Tensor:
    """Rectify, and send to zero what lies above a bound.

    Half-precision inputs are computed in float32. Backward keeps `x` and `bound` only.

    Args:
        x: Inputs, `(..., *features)`.
        bound: The bound λ, one number or of a shape that broadcasts to `features`.
        sharpness: κ, how steeply the output falls at the bound, > 0.
        nan_to_zero: Whether NaN, as a bit flip may leave it, gives 0; else it gives NaN.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`, of the type of x

    Returns:
        max(0, x) σ(κ (λ − x)): x well below the bound, λ/2 at it, 0 well above it, for infinity
        and for x ≤ 0.

    Raises:
        ValueError: `x` is not floating-point, `bound` does not fit it, or `sharpness` is not a
            finite number above 0.

    Source:
        S. Mousavi, M. H. Ahmadilivani, J. Raik, M. Jenihhin and M. Daneshtalab, "ProAct:
        Progressive Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs",
        2024 (HyReLU), without the cancellation of max(0, x − x σ(κ (x − λ))).

    Example:
        >>> hyrelu(torch.tensor([-1.0, 1.0, 2.0, 30.0, torch.inf]), 2.0)
        tensor([0., 1., 1., 0., 0.])
    """
    if not 0 < sharpness < float("inf"):
        raise ValueError(f"sharpness: expected a finite number > 0, got {sharpness}")
    bound = as_parameter("bound", bound, x)
    if differentiate_formula(x):
        return formula(x, bound, float(sharpness), nan_to_zero)
    with below_autograd(x, bound):
        return torch.ops.torchzoo.hyrelu.default(x, bound, float(sharpness), nan_to_zero)


def _passed(x: Tensor, nan_to_zero: bool) -> Tensor:
    """Keep x where it is above 0 and finite, else 0."""
    passes = (x > 0) & (x < torch.inf)
    return torch.where(passes if nan_to_zero else passes | x.isnan(), x, 0.0)


def formula(x: Tensor, bound: Tensor, sharpness: float, nan_to_zero: bool) -> Tensor:
    """The function in differentiable operations, in the type of `bound`."""
    passed = _passed(x.to(bound.dtype), nan_to_zero)
    return (passed * (sharpness * (bound - passed)).sigmoid()).to(x.dtype)


def slopes(
    grad: Tensor, x: Tensor, bound: Tensor, sharpness: float, nan_to_zero: bool
) -> tuple[Tensor, Tensor]:
    """The gradients by `x` and `bound`, in differentiable operations."""
    wide_grad = grad.to(bound.dtype)
    passed = _passed(x.to(bound.dtype), nan_to_zero)
    t = sharpness * (bound - passed)
    low = t.sigmoid()
    fall = sharpness * (passed * low * (-t).sigmoid())
    dx = torch.where(passed == 0, 0.0, wide_grad * (low - fall))
    return dx.to(x.dtype), sum_leading(wide_grad * fall, bound)


@torch.library.custom_op("torchzoo::hyrelu", mutates_args=())
def hyrelu_op(x: Tensor, bound: Tensor, sharpness: float, nan_to_zero: bool) -> Tensor:
    return as_result(formula(x, bound, sharpness, nan_to_zero), x, bound)


@torch.library.custom_op("torchzoo::hyrelu_backward", mutates_args=())
def hyrelu_backward(
    grad: Tensor, x: Tensor, bound: Tensor, sharpness: float, nan_to_zero: bool
) -> tuple[Tensor, Tensor]:
    dx, dbound = slopes(grad, x, bound, sharpness, nan_to_zero)
    return as_result(dx, x, bound), dbound


@hyrelu_op.register_fake
def _(x: Tensor, bound: Tensor, sharpness: float, nan_to_zero: bool) -> Tensor:
    return empty_result(x, bound)


@hyrelu_backward.register_fake
def _(
    grad: Tensor, x: Tensor, bound: Tensor, sharpness: float, nan_to_zero: bool
) -> tuple[Tensor, Tensor]:
    return empty_result(x, bound), torch.empty_like(bound)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bound, *ctx.options = inputs
    ctx.save_for_backward(x, bound)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # with gradients recorded in backward a second derivative is wanted
    run = slopes if torch.is_grad_enabled() else torch.ops.torchzoo.hyrelu_backward.default
    return *run(grad, *ctx.saved_tensors, *ctx.options), None, None


hyrelu_op.register_autograd(_backward, setup_context=_setup)


hyrelu_op.register_vmap(values_vmap(hyrelu_op))
hyrelu_backward.register_vmap(slopes_vmap(hyrelu_backward))
