"""CRReLU: ReLU with a correction whose size is trained, fused.

y = max(0, x) + ε x exp(−x²/2),
dy/dx = 1[x > 0] + ε (1 − x²) exp(−x²/2),   dy/dε = x exp(−x²/2).
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

FAR = 40.0
"""From here on exp(−x²/2) is 0 in float64 too; x is cut there, as inf · 0 would be NaN."""


def crrelu(x: Tensor, eps: Tensor | float) -> Tensor:
    """Rectify, and correct around zero by what the entropy of the output asks for.

    Half-precision inputs are computed in float32. Backward keeps `x` and `eps` only.

    Args:
        x: Inputs, `(..., C)`.
        eps: Size of the correction ε, one number or one for each of the last dimensions of `x`,
            usually `(C,)`.

    Shape:
        - x: `(..., C)`
        - output: `(..., C)`, of the type of x

    Returns:
        max(0, x) + ε x exp(−x²/2); infinity for infinity and 0 for minus infinity. The derivative
        by x at 0 is ε.

    Raises:
        ValueError: `x` is not floating-point, or `eps` does not fit it.

    Source:
        H. Sun et al., "A Method on Searching Better Activation Functions", 2024.

    Example:
        >>> crrelu(torch.tensor([-1.0, 0.0, 1.0, 2.0]), 0.01)
        tensor([-0.0061,  0.0000,  1.0061,  2.0027])
    """
    eps = as_parameter("eps", eps, x)
    if differentiate_formula(x):
        return formula(x, eps)
    with below_autograd(x, eps):
        return torch.ops.torchzoo.crrelu.default(x, eps)


def formula(x: Tensor, eps: Tensor) -> Tensor:
    """The function in differentiable operations, in the type of `eps`."""
    wide_x = x.to(eps.dtype)
    near = wide_x.clamp(-FAR, FAR)
    return (wide_x.relu() + eps * (near * (-0.5 * near.square()).exp())).to(x.dtype)


def slopes(grad: Tensor, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by `x` and `eps`, in differentiable operations."""
    wide_x, wide_grad = x.to(eps.dtype), grad.to(eps.dtype)
    near = wide_x.clamp(-FAR, FAR)
    bell = (-0.5 * near.square()).exp()
    dx = wide_grad * ((wide_x > 0) + eps * ((1 - near.square()) * bell))
    return dx.to(x.dtype), sum_leading(wide_grad * (near * bell), eps)


@torch.library.custom_op("torchzoo::crrelu", mutates_args=())
def crrelu_op(x: Tensor, eps: Tensor) -> Tensor:
    return as_result(formula(x, eps), x, eps)


@torch.library.custom_op("torchzoo::crrelu_backward", mutates_args=())
def crrelu_backward(grad: Tensor, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    dx, deps = slopes(grad, x, eps)
    return as_result(dx, x, eps), deps


@crrelu_op.register_fake
def _(x: Tensor, eps: Tensor) -> Tensor:
    return empty_result(x, eps)


@crrelu_backward.register_fake
def _(grad: Tensor, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    return empty_result(x, eps), torch.empty_like(eps)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    # with gradients recorded in backward a second derivative is wanted
    run = slopes if torch.is_grad_enabled() else torch.ops.torchzoo.crrelu_backward.default
    return run(grad, *ctx.saved_tensors)


crrelu_op.register_autograd(_backward, setup_context=_setup)


crrelu_op.register_vmap(values_vmap(crrelu_op))
crrelu_backward.register_vmap(slopes_vmap(crrelu_backward))
