"""The largest term of each sum of a probabilistic circuit, and which one it is.

    values_bo = max_k (a_bk + log w_ok),   argmax_bo = the first k that reaches it.

This is `log_einsum_exp` with the sum replaced by a maximum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.ops.calling import below_autograd
from torchzoo.ops.log_einsum_exp import _check_types, _check_values, batch_into_folds


def log_max_sum(a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Take the largest weighted log-value of each row, and its place.

    Half-precision inputs are computed in float32. Differentiable in `a` and `w`: a gradient goes to
    the term that was taken. Results don't depend on the batch that a sample comes in.

    Args:
        a: Log-values, finite or minus infinity.
        w: Weights, not their logarithms, not below 0 (this is not checked).

    Shape:
        - a: `(F, B, K)`
        - w: `(F, O, K)`
        - values, argmax: `(F, B, O)`

    Returns:
        values, and argmax, int64, the first where several are largest; minus infinity and 0 where
        no term is above minus infinity.

    Raises:
        ValueError: Shapes, types or devices that don't fit together, or no terms at all.
        NotImplementedError: An input has a forward-mode tangent.

    Example:
        >>> a, w = torch.tensor([[[0.0, -1.0]]]), torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
        >>> values, argmax = log_max_sum(a, w)
        >>> values, argmax
        (tensor([[[-0.6931, -1.0000]]]), tensor([[[0, 1]]]))
    """
    _check_values("a", a)
    if a.shape[2] == 0:
        raise ValueError(f"a: expected at least one log-value, got {tuple(a.shape)}")
    if w.ndim != 3 or w.shape[::2] != a.shape[::2]:
        raise ValueError(f"w: expected ({a.shape[0]}, O, {a.shape[2]}), got {tuple(w.shape)}")
    _check_types("log_max_sum", a=a, w=w)
    kept = torch.promote_types(a.dtype, w.dtype)
    wide = torch.promote_types(kept, torch.float32)
    a, w = a.to(wide), w.to(wide)
    log_w = w.masked_fill(w == 0, 1).log().masked_fill(w == 0, -torch.inf)  # no 0 / 0 backward
    with below_autograd(a, log_w):
        values, argmax = _log_max_sum(a, log_w)
    return values.to(kept), argmax


@torch.library.custom_op("torchzoo::log_max_sum", mutates_args=())
def _log_max_sum(a: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    values = a.new_full((*a.shape[:2], log_w.shape[1]), -torch.inf)
    argmax = torch.zeros_like(values, dtype=torch.int64)
    for k in range(a.shape[2]):
        terms = a[..., k : k + 1] + log_w[:, None, :, k]
        larger = terms > values
        values = values.where(~larger, terms)
        argmax.masked_fill_(larger, k)
    return values, argmax


@_log_max_sum.register_fake
def _(a: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    values = a.new_empty(*a.shape[:2], log_w.shape[1])
    return values, torch.empty_like(values, dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    a, log_w = inputs
    values, argmax = output
    ctx.mark_non_differentiable(argmax)
    ctx.set_materialize_grads(False)
    ctx.shapes = a.shape, log_w.shape
    ctx.save_for_backward(values, argmax)


def _backward(
    ctx: Any, grad: Tensor | None, _grad_argmax: Any
) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    values, argmax = ctx.saved_tensors
    of_a, of_w = ctx.shapes
    grad = grad.masked_fill(values == -torch.inf, 0)
    da = grad.new_zeros(of_a).scatter_add(2, argmax, grad)
    dw = grad.new_zeros(of_w).mT.scatter_add(1, argmax, grad).mT
    return da, dw


_log_max_sum.register_autograd(_backward, setup_context=_setup)
_log_max_sum.register_vmap(batch_into_folds(_log_max_sum))
