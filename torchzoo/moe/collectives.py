"""Collectives of expert parallelism: sparse all-gather, sparse reduce-scatter, token exchange.

With `x_e` the row of expert `e`, which its owner has, and `g_de` a row at each holder `d`,

    sparse_all_gather:      y_de = x_e                     for all holders d of e,
    sparse_reduce_scatter:  x_e = sum_{holders d of e} g_de.

They are adjoint linear maps, so each is the other's backward. Rows go down (or up) a binomial tree
a row: a rank receives at most the experts that move in the first and sends at most those in the
second. Everything is sent point to point, which gloo and NCCL have; with one rank nothing is sent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchzoo.moe.placement import ExpertPlacement

Group = dist.ProcessGroup


@dataclass
class Traffic:
    """Bytes that a rank handed to other ranks and took from them, by collective.

    Attributes:
        sent: Bytes sent, by name of the collective.
        received: Bytes received, by name of the collective.
        calls: Calls, by name of the collective.
    """

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


@contextmanager
def lost_ranks_reported(what: str) -> Iterator[None]:
    """Say in words what an error of the communication library means."""
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        raise RuntimeError(
            f"{what}: rank {dist.get_rank()} can't reach the others, one of which has probably "
            f"ended or hangs; start the job again from its last checkpoint ({error})"
        ) from error


def group_rank(group: Group | None) -> tuple[int, int]:
    """This process's rank in a group and the group's size; None is the default group, if any."""
    if group is None and not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


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


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, placement: ExpertPlacement, *more: Any) -> Tensor:
        ctx.options = placement, *more
        group, traffic = more
        rank, _ = group_rank(group)
        index = {expert: row for row, expert in enumerate(placement.held(rank))}
        rows = local.new_empty(len(index), *local.shape[1:])
        rows[[index[expert] for expert in placement.owned(rank)]] = local
        for transfers in placement.rounds:
            _exchange("sparse_all_gather", rows, index, transfers, rank, group, traffic, add=False)
        _count(traffic, "sparse_all_gather", calls=1)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        placement, group, traffic = ctx.options
        return sparse_reduce_scatter(grads[0], placement, group, traffic=traffic), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, placement: ExpertPlacement, *more: Any) -> Tensor:
        ctx.options = placement, *more
        group, traffic = more
        rank, _ = group_rank(group)
        index = {expert: row for row, expert in enumerate(placement.held(rank))}
        rows = local.clone(memory_format=torch.contiguous_format)
        for transfers in reversed(placement.rounds):
            upward = [(expert, target, source) for expert, source, target in transfers]
            _exchange("sparse_reduce_scatter", rows, index, upward, rank, group, traffic, add=True)
        _count(traffic, "sparse_reduce_scatter", calls=1)
        return rows[[index[expert] for expert in placement.owned(rank)]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        placement, group, traffic = ctx.options
        return sparse_all_gather(grads[0], placement, group, traffic=traffic), None, None, None


def _exchange(
    what: str,
    rows: Tensor,
    index: dict[int, int],
    transfers: list[tuple[int, int, int]],
    rank: int,
    group: Group | None,
    traffic: Traffic | None,
    *,
    add: bool,
) -> None:
    """Do the transfers of a round: one message for each pair of ranks, its rows by expert."""
    outgoing, incoming = defaultdict(list), defaultdict(list)
    for expert, source, target in transfers:
        if source == rank:
            outgoing[target].append(index[expert])
        elif target == rank:
            incoming[source].append(index[expert])
    messages = {peer: rows[picked] for peer, picked in outgoing.items()}
    buffers = {peer: rows.new_empty(len(at), *rows.shape[1:]) for peer, at in incoming.items()}
    operations = [
        dist.P2POp(kind, tensor, group=group, group_peer=peer)
        for kind, tensors in ((dist.isend, messages), (dist.irecv, buffers))
        for peer, tensor in tensors.items()
    ]
    with lost_ranks_reported(what):
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
    _count(traffic, what, sent=messages.values(), received=buffers.values())
    for peer in sorted(buffers):
        at = torch.tensor(incoming[peer], device=rows.device)
        _ = rows.index_add_(0, at, buffers[peer]) if add else rows.index_copy_(0, at, buffers[peer])


def _count(
    traffic: Traffic | None, what: str, sent: Any = (), received: Any = (), calls: int = 0
) -> None:
    if traffic is not None:
        traffic.sent[what] += sum(tensor.nbytes for tensor in sent)
        traffic.received[what] += sum(tensor.nbytes for tensor in received)
        traffic.calls[what] += calls


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
        _count(traffic, "exchange_rows", sent=sent, received=received, calls=1)
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
