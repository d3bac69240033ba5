"""`log_einsum_exp` over the blocks of weights that a pruned circuit has kept.

Edges are blocks of weights in compressed rows: row r owns `row_ptr[r] <= e < row_ptr[r + 1]`, and
edge e leads to fold `col_idx[e]` of the operand:

    out[r]_bo = log sum_e sum_k w_blocks[e]_ok exp(a[col_idx[e]]_bk).

Rows with equally many edges are one `log_einsum_exp`, whose maximum is over their own edges only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.ops.calling import below_autograd, loop_over_batch, values_readable
from torchzoo.ops.log_einsum_exp import (
    _check_types,
    _check_values,
    _log_einsum_exp,
    _log_einsum_exp_backward,
)


def block_sparse_log_einsum_exp(
    a: Tensor, w_blocks: Tensor, row_ptr: Tensor, col_idx: Tensor, *, deterministic: bool = False
) -> Tensor:
    """Multiply exponentials of log-values with blocks of weights, and take the logarithm.

    All else is as in `log_einsum_exp`. For each edge the values that it reads are copied.

    Args:
        a: Log-values, finite or minus infinity.
        w_blocks: Weights of each edge, not below 0 (this is not checked).
        row_ptr: Where each row's edges begin, and where the last one's end; int32 or int64.
        col_idx: Which fold of `a` each edge leads to, of the type of `row_ptr`.
        deterministic: Fix the order of additions where there is no kernel, too.

    Shape:
        - a: `(C, B, K)`
        - w_blocks: `(E, O, K)`
        - row_ptr: `(R + 1,)`
        - col_idx: `(E,)`
        - output: `(R, B, O)`

    Returns:
        The log-values of the sums; minus infinity in rows without an edge.

    Raises:
        ValueError: Shapes, types or devices that don't fit together, or, on the CPU, pointers that
            don't rise from 0 to E and folds that don't exist.
        NotImplementedError: An input has a forward-mode tangent.

    Example:
        >>> a = torch.tensor([[[0.0]], [[1.0]], [[2.0]]])
        >>> row_ptr, col_idx = torch.tensor([0, 2, 2, 3]), torch.tensor([0, 1, 2])
        >>> block_sparse_log_einsum_exp(a, torch.ones(3, 1, 1), row_ptr, col_idx).flatten()
        tensor([1.3133,   -inf, 2.0000])
    """
    _check_values("a", a)
    _check(a, w_blocks, row_ptr, col_idx)
    _check_types("block_sparse_log_einsum_exp", a=a, w_blocks=w_blocks)
    kept = torch.promote_types(a.dtype, w_blocks.dtype)
    wide = torch.promote_types(kept, torch.float32)
    a, w_blocks = a.to(wide), w_blocks.to(wide)
    with below_autograd(a, w_blocks):
        out = _block_log_einsum_exp(a, w_blocks, row_ptr.long(), col_idx.long(), deterministic)
    return out.to(kept)


def _check(a: Tensor, w_blocks: Tensor, row_ptr: Tensor, col_idx: Tensor) -> None:
    if w_blocks.ndim != 3 or w_blocks.shape[2] != a.shape[2]:
        raise ValueError(f"w_blocks: expected (E, O, {a.shape[2]}), got {tuple(w_blocks.shape)}")
    edges = w_blocks.shape[0]
    for name, index in (("row_ptr", row_ptr), ("col_idx", col_idx)):
        if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}: expected int32 or int64 with one dimension, "
                f"got {index.dtype} {tuple(index.shape)}"
            )
        if index.device != a.device:
            raise ValueError(f"{name}: expected it on {a.device}, as a is, got {index.device}")
    if not row_ptr.numel():
        raise ValueError("row_ptr: expected R + 1 pointers, got none")
    if col_idx.shape[0] != edges:
        raise ValueError(f"col_idx: expected ({edges},), got {tuple(col_idx.shape)}")
    if a.is_cpu and values_readable(row_ptr) and values_readable(col_idx):
        ends = row_ptr.tolist()
        if ends != sorted(ends) or ends[0] != 0 or ends[-1] != edges:
            raise ValueError(f"row_ptr: expected pointers that rise from 0 to {edges}, got {ends}")
        low, high = (int(v) for v in col_idx.aminmax()) if edges else (0, -1)
        if low < 0 or high >= a.shape[0]:
            raise ValueError(f"col_idx: expected folds in [0, {a.shape[0]}), got {low} to {high}")


def _rows(row_ptr: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows `(n,)` that have equally many edges, and those `(n, edges)`."""
    counts = row_ptr.diff()
    for count in counts.unique().tolist():
        if count:
            rows = (counts == count).nonzero()[:, 0]
            yield rows, row_ptr[rows][:, None] + torch.arange(count, device=row_ptr.device)


def _operands(a: Tensor, w_blocks: Tensor, col_idx: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """What rows read, edge after edge, `(n, B, edges K)`, and its weights `(n, O, 1, edges K)`."""
    values = rearrange(a[col_idx[edges]], "n e b k -> n b (e k)")
    return values, rearrange(w_blocks[edges], "n e o k -> n o 1 (e k)")


def _plain(
    a: Tensor, w_blocks: Tensor, row_ptr: Tensor, col_idx: Tensor, deterministic: bool
) -> Tensor:
    """Row by row of equal length; differentiable."""
    out = a.new_full((row_ptr.shape[0] - 1, a.shape[1], w_blocks.shape[1]), -torch.inf)
    for rows, edges in _rows(row_ptr):
        values, weights = _operands(a, w_blocks, col_idx, edges)
        out = out.index_copy(0, rows, _log_einsum_exp(None, values, weights, deterministic))
    return out


@torch.library.custom_op("torchzoo::block_log_einsum_exp", mutates_args=())
def _block_log_einsum_exp(
    a: Tensor, w_blocks: Tensor, row_ptr: Tensor, col_idx: Tensor, deterministic: bool
) -> Tensor:
    return _plain(a, w_blocks, row_ptr, col_idx, deterministic)


@torch.library.custom_op("torchzoo::block_log_einsum_exp_backward", mutates_args=())
def _block_log_einsum_exp_backward(
    grad: Tensor, a: Tensor, w_blocks: Tensor, row_ptr: Tensor, col_idx: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    da, dw = torch.zeros_like(a), torch.zeros_like(w_blocks)
    for rows, edges in _rows(row_ptr):
        values, weights = _operands(a, w_blocks, col_idx, edges)
        _, dvalues, dweights = _log_einsum_exp_backward(
            grad[rows], None, values, weights, out[rows], False, True, True
        )
        count = edges.shape[1]
        da.index_add_(
            0, col_idx[edges].flatten(), rearrange(dvalues, "n b (e k) -> (n e) b k", e=count)
        )
        dw[edges] = rearrange(dweights, "n o 1 (e k) -> n e o k", e=count)
    return da, dw


@_block_log_einsum_exp.register_fake
def _(a: Tensor, w_blocks: Tensor, row_ptr: Tensor, col_idx: Tensor, deterministic: bool) -> Tensor:
    return a.new_empty(row_ptr.shape[0] - 1, a.shape[1], w_blocks.shape[1])


@_block_log_einsum_exp_backward.register_fake
def _(
    grad: Tensor, a: Tensor, w_blocks: Tensor, row_ptr: Tensor, col_idx: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(w_blocks)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4], output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, out = ctx.saved_tensors
    a, w_blocks, row_ptr, col_idx = inputs
    if torch.is_grad_enabled():  # a second derivative is wanted
        plain = _plain(a, w_blocks, row_ptr, col_idx, False)
        leaves = [t for t, on in zip(inputs, ctx.needs_input_grad, strict=False) if on]
        found = iter(torch.autograd.grad(plain, leaves, grad, create_graph=True))
        return tuple(next(found) if on else None for on in ctx.needs_input_grad)
    da, dw = _block_log_einsum_exp_backward(grad, a, w_blocks, row_ptr, col_idx, out)
    return da, dw, None, None, None


_block_log_einsum_exp.register_autograd(_backward, setup_context=_setup)
_block_log_einsum_exp.register_vmap(loop_over_batch(_block_log_einsum_exp))
_block_log_einsum_exp_backward.register_vmap(loop_over_batch(_block_log_einsum_exp_backward))
