"""Products with those rows of a matrix that are active for a token, the other rows left unread.

For N tokens, H rows and `active (N, H)`:

    rows_dot    s_ni = x_n · w_i                 (N, D), (H, D) → (N, H), 0 where not active
    rows_sum    y_n  = Σ_{i active} h_ni w_i     (N, H), (H, D) → (N, D)
    rows_outer  o_i  = Σ_{n active} h_ni x_n     (N, H), (N, D) → (H, D)

Each derivative of one of them is another of them, with the same pairs, so what is built from them
is sparse in every order of differentiation. Sums are kept and returned in float32 at least, but for
`rows_outer`, a gradient of weights, which has the type of `x`. `dense_above` below 1 allows a
product to read every row where the share of active pairs is above it, as that is faster then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.ops.calling import no_autocast


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _dense(active: Tensor | None, dense_above: float) -> bool:
    if active is None or dense_above >= 1:
        return active is None
    return bool(active.sum() > dense_above * active.numel())


def _bags(weight: Tensor, rows: Tensor, active: Tensor) -> Tensor:
    """For each row of `active` the sum of the rows that it chooses, times their weights."""
    out = rows.new_zeros(active.shape[0], rows.shape[1], dtype=weight.dtype)
    chosen = active.nonzero()[:, 1]
    if not chosen.numel() or not rows.shape[1]:
        return out
    if rows.dtype != weight.dtype:
        used, chosen = chosen.unique(return_inverse=True)
        rows = rows[used].to(weight.dtype)
    count = active.sum(1)
    return F.embedding_bag(
        chosen, rows, count.cumsum(0) - count, mode="sum", per_sample_weights=weight[active]
    )


@torch.library.custom_op("torchzoo::rows_dot", mutates_args=())
def rows_dot(x: Tensor, w: Tensor, active: Tensor | None, dense_above: float) -> Tensor:
    """s_ni = x_n · w_i where active, all of them for None."""
    x, dtype = x.to(wide(w.dtype)), wide(w.dtype)
    with no_autocast(x):
        if active is None:
            return x @ w.to(dtype).mT
        if _dense(active, dense_above):
            return torch.where(active, x @ w.to(dtype).mT, 0.0)
        out = x.new_zeros(active.shape)
        used = active.any(0).nonzero()[:, 0]
        out[:, used] = torch.where(active[:, used], x @ w[used].to(dtype).mT, 0.0)
        return out


@torch.library.custom_op("torchzoo::rows_sum", mutates_args=())
def rows_sum(h: Tensor, w: Tensor, active: Tensor, dense_above: float) -> Tensor:
    """y_n = Σ_i h_ni w_i over the active i."""
    dtype = wide(w.dtype)
    with no_autocast(h):
        if _dense(active, dense_above):
            return torch.where(active, h, 0.0).to(dtype) @ w.to(dtype)
        return _bags(h.to(dtype), w, active)


@torch.library.custom_op("torchzoo::rows_outer", mutates_args=())
def rows_outer(h: Tensor, x: Tensor, active: Tensor, dense_above: float) -> Tensor:
    """o_i = Σ_n h_ni x_n over the active n."""
    dtype = wide(x.dtype)
    with no_autocast(h):
        if _dense(active, dense_above):
            out = torch.where(active, h, 0.0).to(dtype).mT @ x.to(dtype)
        else:
            out = _bags(h.to(dtype).mT, x, active.mT)
        return out.to(x.dtype)


@rows_dot.register_fake
def _(x: Tensor, w: Tensor, active: Tensor | None, dense_above: float) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], dtype=wide(w.dtype))


@rows_sum.register_fake
def _(h: Tensor, w: Tensor, active: Tensor, dense_above: float) -> Tensor:
    return h.new_empty(h.shape[0], w.shape[1], dtype=wide(w.dtype))


@rows_outer.register_fake
def _(h: Tensor, x: Tensor, active: Tensor, dense_above: float) -> Tensor:
    return x.new_empty(h.shape[1], x.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dense_above = inputs
    ctx.save_for_backward(*tensors)


def _dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w, active = ctx.saved_tensors
    if active is None:
        active = torch.ones_like(grad, dtype=torch.bool)
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = rows_sum(grad, w, active, ctx.dense_above).to(x.dtype)
    if ctx.needs_input_grad[1]:
        dw = rows_outer(grad, x.to(w.dtype), active, ctx.dense_above)
    return dx, dw, None, None


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, w, active = ctx.saved_tensors
    dh = dw = None
    if ctx.needs_input_grad[0]:
        dh = rows_dot(grad, w, active, ctx.dense_above).to(h.dtype)
    if ctx.needs_input_grad[1]:
        dw = rows_outer(h, grad.to(w.dtype), active, ctx.dense_above)
    return dh, dw, None, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, x, active = ctx.saved_tensors
    dh = dx = None
    if ctx.needs_input_grad[0]:
        dh = rows_dot(x, grad, active, ctx.dense_above).to(h.dtype)
    if ctx.needs_input_grad[1]:
        dx = rows_sum(h, grad, active, ctx.dense_above).to(x.dtype)
    return dh, dx, None, None


rows_dot.register_autograd(_dot_backward, setup_context=_setup)
rows_sum.register_autograd(_sum_backward, setup_context=_setup)
rows_outer.register_autograd(_outer_backward, setup_context=_setup)


def loop_over_batch(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule that calls an op once for each element of the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        columns = [
            [arg] * info.batch_size if dim is None else arg.unbind(dim)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        results = [op(*row) for row in zip(*columns, strict=True)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


for _op in (rows_dot, rows_sum, rows_outer):
    _op.register_vmap(loop_over_batch(_op))
