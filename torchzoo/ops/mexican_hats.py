"""Mexican hats, K of them for each input with shifts and rates of their own, in one pass.

psi(u) = c (1 - u^2) exp(-u^2 / 2),   u = (x - shift) rate,   c = 2 / (sqrt(3) pi^(1/4)),
psi'(u) = c u (u^2 - 3) exp(-u^2 / 2): the wavelets of norm 1 that are a Gaussian's curvature.

Backward keeps x and the parameters alone and computes slopes where it reads their gradients. Where
a compiler is at work the formula takes the operator's place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchzoo.ops._elementwise import differentiate_formula
from torchzoo.ops.calling import below_autograd, loop_over_batch
from torchzoo.ops.rows import wide

NORM = 2 / (math.sqrt(3) * math.pi**0.25)


def mexican_hats(x: Tensor, shift: Tensor, rate: Tensor) -> Tensor:
    """Each input's wavelets.

    Half-precision inputs are computed in float32. Backward keeps `x`, `shift` and `rate` only.

    Args:
        x: Inputs, `(..., D)`.
        shift: Where each wavelet has its middle, `(K, D)`.
        rate: One over its width, `(K, D)`.

    Shape:
        - x: `(..., D)`
        - output: `(..., K, D)`, of the type of x

    Returns:
        psi((x - shift) rate), for each function the inputs side by side.

    Raises:
        ValueError: `x` is not floating-point, or the parameters do not fit it or each other.

    Source:
        Z. Bozorgasl and H. Chen, "Wav-KAN: Wavelet Kolmogorov-Arnold Networks", 2024.

    Example:
        >>> mexican_hats(torch.tensor([1.0]), torch.tensor([[0.0], [1.0]]), torch.ones(2, 1))
        tensor([[0.0000],
                [0.8673]])
    """
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"x: expected floating point (..., D), got {x.dtype} {tuple(x.shape)}")
    if shift.ndim != 2 or shift.shape[1] != x.shape[-1]:
        raise ValueError(f"shift: expected shape (K, {x.shape[-1]}), got {tuple(shift.shape)}")
    if rate.shape != shift.shape:
        raise ValueError(f"rate: expected shape {tuple(shift.shape)}, got {tuple(rate.shape)}")
    rows = x.to(wide(x.dtype)).reshape(-1, x.shape[-1])
    shift, rate = shift.to(rows.dtype), rate.to(rows.dtype)
    if differentiate_formula():
        values = formula(rows, shift, rate)
    else:
        with below_autograd(x, shift, rate):
            values = torch.ops.torchzoo.mexican_hats.default(rows, shift, rate)
    return values.reshape(*x.shape[:-1], *shift.shape).to(x.dtype)


def formula(x: Tensor, shift: Tensor, rate: Tensor) -> Tensor:
    """The wavelets in differentiable operations."""
    square = ((x.unsqueeze(-2) - shift) * rate).square()
    return (1 - square) * (NORM * (-0.5 * square).exp())


def slopes(grad: Tensor, x: Tensor, shift: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by `x`, `shift` and `rate`, in differentiable operations."""
    offset = x.unsqueeze(-2) - shift
    u = offset * rate
    square = u.square()
    to_u = grad * (u * (square - 3) * (NORM * (-0.5 * square).exp()))
    return (to_u * rate).sum(-2), -(to_u * rate).sum(0), (to_u * offset).sum(0)


@torch.library.custom_op("torchzoo::mexican_hats", mutates_args=())
def mexican_hats_op(x: Tensor, shift: Tensor, rate: Tensor) -> Tensor:
    return formula(x, shift, rate).contiguous()


@torch.library.custom_op("torchzoo::mexican_hats_backward", mutates_args=())
def mexican_hats_backward(
    grad: Tensor, x: Tensor, shift: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dshift, drate = slopes(grad, x, shift, rate)
    return dx.contiguous(), dshift.contiguous(), drate.contiguous()


@mexican_hats_op.register_fake
def _(x: Tensor, shift: Tensor, rate: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], *shift.shape)


@mexican_hats_backward.register_fake
def _(grad: Tensor, x: Tensor, shift: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), shift.new_empty(shift.shape), rate.new_empty(rate.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # with gradients recorded in backward a second derivative is wanted
    op = torch.ops.torchzoo.mexican_hats_backward.default
    run = slopes if torch.is_grad_enabled() else op
    found: tuple[Tensor, Tensor, Tensor] = run(grad, *ctx.saved_tensors)
    return found


mexican_hats_op.register_autograd(_backward, setup_context=_setup)


mexican_hats_op.register_vmap(loop_over_batch(mexican_hats_op))
mexican_hats_backward.register_vmap(loop_over_batch(mexican_hats_backward))
