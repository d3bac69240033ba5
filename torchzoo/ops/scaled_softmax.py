"""Softmax of rows that each have a scale of their own, fused.

y_i = exp(s z_i) / Σ_c exp(s z_c)

for a row z and its scale s. For a gradient g of y and t = Σ_i g_i y_i,

dz_i = s y_i (g_i − t),   ds = Σ_i z_i y_i (g_i − t).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.ops._elementwise import differentiate_formula
from torchzoo.ops.calling import below_autograd, no_autocast
from torchzoo.ops.rows import wide


def scaled_softmax(z: Tensor, scale: Tensor) -> Tensor:
    """The softmax along the last axis of `z` times a number for each row.

    Half-precision inputs are computed in float32. Backward keeps the result and `scale`, and `z`
    only where the scale has a gradient.

    Args:
        z: Logits, `(..., C)`.
        scale: Scales, `(...)`, of any sign.

    Shape:
        - z, output: `(..., C)`
        - scale: `(...)`

    Returns:
        softmax(s z), contiguous, in the dtype of `z`. Where one product s z is NaN or infinity, or
        all are minus infinity, the row is NaN.

    Raises:
        ValueError: `z` is not floating-point or has no axis, or `scale` is not a real number for
            each row on the same device.

    Source:
        A. Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025, whose activation
        has the scale d ln(2 + q).

    Example:
        >>> scaled_softmax(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0.0, 100.0]))
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    if not z.is_floating_point() or not z.ndim:
        raise ValueError(
            f"z: expected floating point of shape (..., C), got {z.dtype} {tuple(z.shape)}"
        )
    if scale.shape != z.shape[:-1]:
        raise ValueError(
            f"scale: expected the shape of z without its last axis, {tuple(z.shape[:-1])}, "
            f"got {tuple(scale.shape)}"
        )
    if scale.is_complex() or scale.device != z.device:
        raise ValueError(
            f"scale: expected real numbers on {z.device}, as z is, "
            f"got {scale.dtype} on {scale.device}"
        )
    scale = scale.to(wide(z.dtype))
    if differentiate_formula(z):
        return formula(z, scale)
    with below_autograd(z, scale):
        result: Tensor = torch.ops.torchzoo.scaled_softmax.default(z, scale)
        return result


def formula(z: Tensor, scale: Tensor) -> Tensor:
    """The function in differentiable operations, in the type of `scale`."""
    return (z.to(scale.dtype) * scale.unsqueeze(-1)).softmax(-1).to(z.dtype)


def slopes(grad: Tensor, y: Tensor, scale: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients by `z` and `scale` (0 without z), in differentiable operations."""
    wide_y, wide_grad = y.to(scale.dtype), grad.to(scale.dtype)
    away = wide_y * (wide_grad - (wide_grad * wide_y).sum(-1, keepdim=True))
    dz = (scale.unsqueeze(-1) * away).to(y.dtype)
    if z is None:
        return dz, torch.zeros_like(scale)
    return dz, (z.to(scale.dtype) * away).sum(-1)


@torch.library.custom_op("torchzoo::scaled_softmax", mutates_args=())
def scaled_softmax_op(z: Tensor, scale: Tensor) -> Tensor:
    with no_autocast(z):
        return formula(z, scale).contiguous()


@torch.library.custom_op("torchzoo::scaled_softmax_backward", mutates_args=())
def scaled_softmax_backward(
    grad: Tensor, y: Tensor, scale: Tensor, z: Tensor | None
) -> tuple[Tensor, Tensor]:
    with no_autocast(y):
        dz, dscale = slopes(grad, y, scale, z)
        return dz.contiguous(), dscale.contiguous()


@scaled_softmax_op.register_fake
def _(z: Tensor, scale: Tensor) -> Tensor:
    return z.new_empty(z.shape)


@scaled_softmax_backward.register_fake
def _(grad: Tensor, y: Tensor, scale: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), scale.new_empty(scale.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    z, scale = inputs
    ctx.save_for_backward(output, scale, z if ctx.needs_input_grad[1] else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    # with gradients recorded in backward a second derivative is wanted
    op = torch.ops.torchzoo.scaled_softmax_backward.default
    run = slopes if torch.is_grad_enabled() else op
    return run(grad, *ctx.saved_tensors)


scaled_softmax_op.register_autograd(_backward, setup_context=_setup)


def _rows_vmap(op: Any) -> Any:
    """The vmap rule: no row depends on another, so a batch is one more leading dimension."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Tensor | None) -> tuple[Any, Any]:
        def lead(arg: Tensor | None, dim: int | None) -> Tensor | None:
            if arg is None:
                return None
            whole = arg.expand(info.batch_size, *arg.shape) if dim is None else arg
            return whole.movedim(dim or 0, 0)

        result = op(*map(lead, args, in_dims))
        return result, 0 if isinstance(result, Tensor) else (0,) * len(result)

    return rule


scaled_softmax_op.register_vmap(_rows_vmap(scaled_softmax_op))
scaled_softmax_backward.register_vmap(_rows_vmap(scaled_softmax_backward))
