"""Sorting tokens by expert and back, without a tensor of size tokens x experts x capacity.

The `(T, k)` slots of a routing are sorted by expert, stably, slots that are not used last:

    order = argsort(expert of slot),   src = order // k,   xs = x[src],   offs = ends of the groups;
    y[src_n] += weights_n ys_n.

Dropless by default. With a capacity C an expert takes C slots at most and the others are dropped;
a token that loses all its slots gets zero, which the residual connection around the layer carries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.moe.routing import Routing, check_count
from torchzoo.ops.calling import values_readable

DROP_POLICIES = ("position", "probs")


class Slots(NamedTuple):
    """The slots in use, sorted by expert.

    `N` of them, or, while a graph is traced (`torch.compile`, `torch.export`, `torch.vmap`), always
    `T k`, so that shapes don't depend on the data; the surplus slots are then past the last end and
    have weight 0.

    Attributes:
        offs: `(E,)` int32, where each expert's slots end.
        src: `(N,)` int64, token of each slot.
        weights: `(N,)`, combine weight of each slot; differentiable.
        routing: The routing with the slots that capacity dropped taken out.
    """

    offs: Tensor
    src: Tensor
    weights: Tensor
    routing: Routing


class Dispatch(NamedTuple):
    """Tokens sorted by expert: what `Slots` holds, after the tokens themselves.

    Attributes:
        xs: `(N, d)`, the token of each slot.
        offs: `(E,)` int32, where each expert's rows end.
        src: `(N,)` int64, index of the token of each row.
        weights: `(N,)`, combine weight of each row; differentiable.
        routing: The routing with the slots that capacity dropped taken out.
    """

    xs: Tensor
    offs: Tensor
    src: Tensor
    weights: Tensor
    routing: Routing


def _expert_or_last(routing: Routing, num_experts: int) -> Tensor:
    """`(T k,)`, the expert of each slot; `num_experts` where the slot is not used."""
    return torch.where(routing.mask, routing.experts, num_experts).flatten()


def _check(routing: Routing, num_experts: int, capacity: int | None, drop_policy: str) -> None:
    check_count("num_experts", num_experts)
    if routing.logits.shape[-1] != num_experts:
        raise ValueError(
            f"num_experts: expected {routing.logits.shape[-1]}, as in routing, got {num_experts}"
        )
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity: expected at least 0, got {capacity}")
    if drop_policy not in DROP_POLICIES:
        raise ValueError(f"drop_policy: expected one of {DROP_POLICIES}, got {drop_policy!r}")


def apply_capacity(
    routing: Routing, num_experts: int, capacity: int, *, drop_policy: str = "position"
) -> Routing:
    """Drop the slots that are more than an expert takes.

    Args:
        routing: What a gate returned.
        num_experts: Number of experts `E`.
        capacity: How many slots an expert takes.
        drop_policy: "position" keeps the slots of the earliest tokens, and of one token the first
            slot; "probs" keeps those with the largest weights, ties to the earliest.

    Returns:
        The routing with `mask` False and `weights` 0 where a slot was dropped; the other weights
        keep their values.

    Raises:
        ValueError: A `num_experts` that is not the routing's, a negative capacity, or an unknown
            policy.

    Example:
        >>> from torchzoo.moe import TopKGate
        >>> routing = TopKGate(4, 2, 1)(torch.ones(10, 4))
        >>> round(float(apply_capacity(routing, 2, 4).dropped_fraction), 3)
        0.6
    """
    _check(routing, num_experts, capacity, drop_policy)
    experts = _expert_or_last(routing, num_experts)
    if drop_policy == "probs":
        priority = routing.weights.detach().flatten().argsort(descending=True, stable=True)
    else:
        priority = torch.arange(experts.numel(), device=experts.device)
    order = priority[experts[priority].argsort(stable=True)]
    groups = experts[order]
    rank = torch.arange(groups.numel(), device=groups.device) - torch.searchsorted(groups, groups)
    kept = torch.empty_like(rank, dtype=torch.bool).scatter(0, order, rank < capacity)
    mask = routing.mask & kept.view_as(routing.mask)
    return routing._replace(weights=routing.weights * mask, mask=mask)


def permute_tokens(
    x: Tensor,
    routing: Routing,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "position",
) -> Dispatch:
    """Sort tokens by expert, a row for each slot in use.

    Args:
        x: Tokens.
        routing: Routing of these tokens.
        num_experts: Number of experts `E`.
        capacity: How many slots an expert takes; None drops nothing.
        drop_policy: See `apply_capacity`.

    Shape:
        - x: `(T, d)`

    Returns:
        A `Dispatch`; within an expert, rows are in the order of the tokens.

    Raises:
        ValueError: Tokens and routing of different lengths, a `num_experts` that is not the
            routing's, a negative capacity, or an unknown policy.

    Example:
        >>> from torchzoo.moe import TopKGate
        >>> x = torch.randn(10, 4)
        >>> dispatch = permute_tokens(x, TopKGate(4, 3, 2)(x), 3)
        >>> dispatch.xs.shape, int(dispatch.offs[-1])
        (torch.Size([20, 4]), 20)
    """
    tokens = routing.mask.shape[0]
    if x.ndim != 2 or x.shape[0] != tokens:
        raise ValueError(f"x: expected ({tokens}, d), as in routing, got {tuple(x.shape)}")
    slots = sort_slots(routing, num_experts, capacity=capacity, drop_policy=drop_policy)
    return Dispatch(x[slots.src], *slots)


def sort_slots(
    routing: Routing,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "position",
) -> Slots:
    """Sort the slots in use by expert: `permute_tokens` without the tokens.

    Args:
        routing: What a gate returned.
        num_experts: Number of experts `E`.
        capacity: How many slots an expert takes; None drops nothing.
        drop_policy: See `apply_capacity`.

    Returns:
        The `Slots`; within an expert, in the order of the tokens.

    Raises:
        ValueError: A `num_experts` that is not the routing's, a negative capacity, or an unknown
            policy.
    """
    _check(routing, num_experts, capacity, drop_policy)
    if capacity is not None:
        routing = apply_capacity(routing, num_experts, capacity, drop_policy=drop_policy)
    experts = _expert_or_last(routing, num_experts)
    order = experts.argsort(stable=True)
    groups = torch.arange(num_experts, device=order.device)
    offs = torch.searchsorted(experts[order], groups, right=True, out_int32=True)
    if values_readable(offs):
        order = order[: int(offs[-1])]
    weights = torch.where(routing.mask, routing.weights, 0).flatten()[order]
    return Slots(offs, order // routing.mask.shape[1], weights, routing)


def unpermute_tokens(ys: Tensor, src: Tensor, weights: Tensor, num_tokens: int) -> Tensor:
    """Add up the weighted outputs of the experts for each token.

    The sum is accumulated in float32 (float64 for float64 rows).

    Args:
        ys: Output row of each sorted slot.
        src: Token of each row.
        weights: Combine weight of each row.
        num_tokens: Number of tokens `T`.

    Shape:
        - ys: `(N, d)`
        - src, weights: `(N,)`
        - output: `(T, d)`

    Returns:
        `y[t] = sum of weights[n] ys[n] over the rows n of token t`, of the type of `ys`.

    Raises:
        ValueError: Shapes that don't fit together.

    Example:
        >>> ys, src = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 2, 0])
        >>> unpermute_tokens(ys, src, torch.tensor([1.0, 1.0, 0.5]), 3).tolist()
        [[2.5], [0.0], [2.0]]
    """
    if ys.ndim != 2 or not ys.shape[:1] == src.shape == weights.shape:
        raise ValueError(
            "ys, src, weights: expected (N, d), (N,), (N,), "
            f"got {tuple(ys.shape)}, {tuple(src.shape)}, {tuple(weights.shape)}"
        )
    dtype = torch.promote_types(ys.dtype, torch.float32)
    rows = rearrange(weights.to(dtype), "n -> n 1") * ys.to(dtype)
    return rows.new_zeros(num_tokens, ys.shape[1]).index_add(0, src, rows).to(ys.dtype)
