"""Collectives of expert parallelism: sparse all-gather, sparse reduce-scatter, token exchange.

With `x_e` the row of expert `e`, which its owner has, and `g_de` a row at each holder `d`,

    sparse_all_gather:      y_de = x_e                     for all holders d of e,
    sparse_reduce_scatter:  x_e = sum_{holders d of e} g_de.

They are adjoint linear maps, so each is the other's backward. Rows go down (or up) a binomial tree
a row: a rank receives at most the experts that move in the first and sends at most those in the
second. Everything is sent point to point, which gloo and NCCL have; with one rank nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchzoo.moe.placement import ExpertPlacement
from torchzoo.moe.transfer import Group, Traffic, Transfer, group_rank, lost_ranks_reported


def sparse_all_gather(
    local: Tensor,
    placement: ExpertPlacement,
    group: Group | None = None,
    *,
    traffic: Traffic | None = None,
) -> Tensor:
    """Copy the rows of experts from their owners to all ranks that hold them.

    Differentiable any number of times; a collective in backward too.

    Args:
        local: Rows of the experts that this rank owns, by expert.
        placement: Owners and holders; the same on all ranks.
        group: The ranks; None for the default group, or one process where there is none.
        traffic: Counts the bytes.

    Shape:
        - local: `(n_own, ...)`
        - output: `(n_held, ...)`

    Returns:
        Rows of the experts that this rank holds, by expert.

    Raises:
        ValueError: Rows or a group that don't fit the placement.
        RuntimeError: Another rank ended.

    Source:
        Qing et al., "Hecate", 2025, section 3 (spAG); the trees are ours.

    Example:
        >>> placement = ExpertPlacement(torch.tensor([0]), torch.tensor([[True]]), node_size=1)
        >>> sparse_all_gather(torch.ones(1, 3), placement).shape
        torch.Size([1, 3])
    """
    rank = _check("local", local, placement, group, owned=True)
    return local if rank is None else _AllGather.apply(local, placement, group, traffic)


def sparse_reduce_scatter(
    local: Tensor,
    placement: ExpertPlacement,
    group: Group | None = None,
    *,
    traffic: Traffic | None = None,
) -> Tensor:
    """Add up the rows of each expert over all ranks that hold it, at its owner.

    Differentiable any number of times; a collective in backward too.

    Args:
        local: Rows of the experts that this rank holds, by expert.
        placement: Owners and holders; the same on all ranks.
        group: The ranks; None for the default group, or one process where there is none.
        traffic: Counts the bytes.

    Shape:
        - local: `(n_held, ...)`
        - output: `(n_own, ...)`

    Returns:
        Sums for the experts that this rank owns, by expert.

    Raises:
        ValueError: Rows or a group that don't fit the placement.
        RuntimeError: Another rank ended.

    Source:
        Qing et al., "Hecate", 2025, section 3 (spRS); the trees are ours.

    Example:
        >>> placement = ExpertPlacement(torch.tensor([0]), torch.tensor([[True]]), node_size=1)
        >>> sparse_reduce_scatter(torch.ones(1, 3), placement).shape
        torch.Size([1, 3])
    """
    rank = _check("local", local, placement, group, owned=False)
    return local if rank is None else _ReduceScatter.apply(local, placement, group, traffic)


def _check(
    name: str, rows: Tensor, placement: ExpertPlacement, group: Group | None, *, owned: bool
) -> int | None:
    """This rank, or None if it is the only one."""
    rank, size = group_rank(group)
    if size != placement.num_devices:
        raise ValueError(
            f"placement: expected {size} ranks, as in the group, got {placement.num_devices}"
        )
    wanted = len(placement.owned(rank) if owned else placement.held(rank))
    if rows.ndim < 1 or len(rows) != wanted:
        what = "owned" if owned else "held"
        raise ValueError(
            f"{name}: expected {wanted} rows, an expert {what} each, got {tuple(rows.shape)}"
        )
    return rank if size > 1 else None


def start_all_gather(
    local: Tensor,
    placement: ExpertPlacement,
    group: Group | None = None,
    *,
    traffic: Traffic | None = None,
) -> Transfer:
    """Begin what `sparse_all_gather` does, outside autograd; on more ranks than one."""
    _check("local", local, placement, group, owned=True)
    rank, _ = group_rank(group)
    held, owned = placement.held(rank), set(placement.owned(rank))
    rows = local.new_empty(len(held), *local.shape[1:])
    rows[[row for row, expert in enumerate(held) if expert in owned]] = local.detach()
    return Transfer("sparse_all_gather", rows, placement, group, traffic, upward=False)


def start_reduce_scatter(
    local: Tensor,
    placement: ExpertPlacement,
    group: Group | None = None,
    *,
    traffic: Traffic | None = None,
) -> Transfer:
    """Begin what `sparse_reduce_scatter` does, outside autograd; on more ranks than one."""
    _check("local", local, placement, group, owned=False)
    rows = local.detach().clone(memory_format=torch.contiguous_format)
    return Transfer("sparse_reduce_scatter", rows, placement, group, traffic, upward=True)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, placement: ExpertPlacement, *more: Any) -> Tensor:
        ctx.options = placement, *more
        group, traffic = more
        return start_all_gather(local, placement, group, traffic=traffic).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        placement, group, traffic = ctx.options
        return sparse_reduce_scatter(grads[0], placement, group, traffic=traffic), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, placement: ExpertPlacement, *more: Any) -> Tensor:
        ctx.options = placement, *more
        group, traffic = more
        return start_reduce_scatter(local, placement, group, traffic=traffic).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        placement, group, traffic = ctx.options
        return sparse_all_gather(grads[0], placement, group, traffic=traffic), None, None, None


def exchange_rows(
    x: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: Group | None = None,
    *,
    traffic: Traffic | None = None,
) -> Tensor:
    """Send rows to all ranks and receive theirs; the backward sends gradients the other way.

    Args:
        x: Rows, sorted by the rank that they go to.
        send: How many rows go to each rank.
        receive: How many rows come from each rank.
        group: The ranks; None for the default group, or one process where there is none.
        traffic: Counts the bytes that leave or come to this rank.

    Shape:
        - x: `(sum(send), ...)`
        - output: `(sum(receive), ...)`

    Returns:
        The received rows, sorted by the rank that they come from.

    Raises:
        ValueError: Counts that don't fit the rows or the group.
        RuntimeError: Another rank ended.

    Example:
        >>> exchange_rows(torch.ones(2, 3), [2], [2]).shape
        torch.Size([2, 3])
    """
    _, size = group_rank(group)
    if len(send) != size or len(receive) != size or sum(send) != len(x):
        raise ValueError(
            f"send, receive: expected {size} counts each, send's of sum {len(x)}, "
            f"got {list(send)} and {list(receive)}"
        )
    return x if size == 1 else _ExchangeRows.apply(x, list(send), list(receive), group, traffic)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Any, traffic: Any
    ) -> Tensor:
        ctx.options = send, receive, group, traffic
        rank, _ = group_rank(group)
        x = x.contiguous()
        out = x.new_empty(sum(receive), *x.shape[1:])
        with lost_ranks_reported("exchange_rows"):
            dist.all_to_all_single(out, x, receive, send, group=group)
        sent, received = ([*y.split(n)] for y, n in ((x, send), (out, receive)))
        del sent[rank], received[rank]
        if traffic is not None:
            traffic.add("exchange_rows", sent, received, calls=1)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        send, receive, group, traffic = ctx.options
        back = exchange_rows(grads[0], receive, send, group, traffic=traffic)
        return back, None, None, None, None


def gather_counts(counts: Tensor, group: Group | None = None) -> Tensor:
    """`(D, E)`, the counts `(E,)` of every rank.

    Raises:
        RuntimeError: Another rank ended.
    """
    _, size = group_rank(group)
    out = counts.new_empty(size * len(counts))
    with lost_ranks_reported("gather_counts"):
        dist.all_gather_into_tensor(out, counts.contiguous(), group=group)
    return out.view(size, -1)
