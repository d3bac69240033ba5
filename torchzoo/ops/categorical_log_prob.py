"""Log-probabilities of categorical distributions at given values, without their whole tables.

    out_bk = l_ck - log sum_c' exp(l_c'k),  c = x_b,  fold by fold.

With `g` the gradient of the output, that of `l` is
`sum_(b: x_b = c) g_bk - softmax(l)_ck sum_b g_bk`. Only the inputs are kept for the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.ops.calling import below_autograd, no_autocast, refuse_forward_mode
from torchzoo.ops.log_einsum_exp import batch_into_folds


def categorical_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """Look values up in log-probabilities that are given up to a constant for each distribution.

    Half-precision logits are computed in float32. Differentiable any number of times in `logits`.
    The result of a value does not depend on the batch that it comes in.

    Args:
        logits: Log-probabilities up to a constant, finite or minus infinity.
        x: Integers from 0 to `C - 1`; others are an error on the CPU.

    Shape:
        - logits: `(F, C, K)`
        - x: `(F, B)`
        - output: `(F, B, K)`

    Returns:
        `log_softmax(logits, 1)` at the values.

    Raises:
        ValueError: Shapes, types or devices that don't fit together.
        NotImplementedError: `logits` has a forward-mode tangent.

    Example:
        >>> logits = torch.tensor([[[0.0], [0.0], [-torch.inf]]])
        >>> categorical_log_prob(logits, torch.tensor([[1, 2]])).flatten()
        tensor([-0.6931,    -inf])
    """
    if logits.ndim != 3 or not logits.is_floating_point():
        found = f"{logits.dtype} {tuple(logits.shape)}"
        raise ValueError(f"logits: expected floats of shape (F, C, K), got {found}")
    if x.ndim != 2 or x.shape[0] != logits.shape[0] or x.is_floating_point() or x.is_complex():
        expected = f"integers of shape ({logits.shape[0]}, B)"
        raise ValueError(f"x: expected {expected}, got {x.dtype} {tuple(x.shape)}")
    if x.device != logits.device:
        raise ValueError(f"x: expected it on {logits.device}, as logits are, got {x.device}")
    refuse_forward_mode("categorical_log_prob", logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with below_autograd(wide):
        return _categorical_log_prob(wide, x.long()).to(logits.dtype)


@torch.library.custom_op("torchzoo::categorical_log_prob", mutates_args=())
def _categorical_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    with no_autocast(logits):
        index = x[..., None].expand(-1, -1, logits.shape[2])
        return logits.log_softmax(1).gather(1, index)


@torch.library.custom_op("torchzoo::categorical_log_prob_backward", mutates_args=())
def _categorical_log_prob_backward(grad: Tensor, logits: Tensor, x: Tensor) -> Tensor:
    return _slopes(grad, logits, x)


def _slopes(grad: Tensor, logits: Tensor, x: Tensor) -> Tensor:
    """The gradient by logits, in differentiable operations."""
    folds, values, units = logits.shape
    rows = x + values * torch.arange(folds, device=x.device)[:, None]
    taken = grad.new_zeros(folds * values, units).index_add(0, rows.flatten(), grad.flatten(0, 1))
    taken = taken.view_as(logits)
    return taken - logits.softmax(1) * grad.sum(1, keepdim=True)


@_categorical_log_prob.register_fake
def _(logits: Tensor, x: Tensor) -> Tensor:
    return logits.new_empty(*x.shape, logits.shape[2])


@_categorical_log_prob_backward.register_fake
def _(grad: Tensor, logits: Tensor, x: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    logits, x = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted
        return _slopes(grad, logits, x), None
    return _categorical_log_prob_backward(grad, logits, x), None


_categorical_log_prob.register_autograd(_backward, setup_context=_setup)
_categorical_log_prob.register_vmap(batch_into_folds(_categorical_log_prob))
_categorical_log_prob_backward.register_vmap(batch_into_folds(_categorical_log_prob_backward))
