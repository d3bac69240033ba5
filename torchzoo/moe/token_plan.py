"""Where tokens go when experts have copies, without a process group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchzoo.moe.placement import check_nodes

CELLS = 2**20
"""Cells of a plan that are worked out at once, about."""


def plan_dispatch(counts: Tensor, materialized: Tensor, node_size: int) -> Tensor:
    """Say how many tokens each device sends where.

    Tokens stay on their device if it holds their expert; else they are split evenly among the
    holders on the same node; else, where there is none, among all holders. What remains of a
    split goes to different holders for different devices and experts.

    Args:
        counts: Tokens that each device has for each expert.
        materialized: Which devices hold which experts.
        node_size: Devices a node.

    Shape:
        - counts: `(D, E)`, int64
        - materialized: `(E, D)`, bool
        - output: `(D, E, D)`, int64

    Returns:
        Tokens from a device for an expert to a device.

    Raises:
        ValueError: Shapes that don't fit, negative counts, or an expert that nobody holds.

    Source:
        Qing et al., "Hecate", 2025, section 4; that remainders are spread is ours.

    Example:
        >>> counts, held = torch.tensor([[3], [4]]), torch.tensor([[True, False]])
        >>> plan_dispatch(counts, held, 2)[:, 0].tolist()
        [[3, 0], [4, 0]]
    """
    _check(counts[None], materialized[None], node_size)
    experts = torch.arange(len(materialized), device=counts.device)
    return torch.cat(list(_by_node(counts, materialized, node_size, experts)))


def token_flow(counts: Tensor, materialized: Tensor, node_size: int) -> Tensor:
    """`(D, D)` float64, the sum of `plan_dispatch` over the experts, in less memory.

    Args:
        counts: `(D, E)`, int64, tokens that each device has for each expert.
        materialized: `(E, D)`, bool, which devices hold which experts.
        node_size: Devices a node.

    Raises:
        ValueError: See `plan_dispatch`.

    Example:
        >>> counts, held = torch.tensor([[3, 1], [4, 0]]), torch.tensor([[True, False]] * 2)
        >>> token_flow(counts, held, 2).tolist()
        [[4.0, 0.0], [4.0, 0.0]]
    """
    return token_flows(counts[None], materialized[None], node_size)[0]


def token_flows(counts: Tensor, materialized: Tensor, node_size: int) -> Tensor:
    """`(L, D, D)` float64, `token_flow` of several layers at once.

    Args:
        counts: `(L, D, E)`, int64, tokens that each device has for each expert.
        materialized: `(L, E, D)`, bool, which devices hold which experts.
        node_size: Devices a node.

    Raises:
        ValueError: See `plan_dispatch`.
    """
    _check(counts, materialized, node_size)
    shared = materialized.sum(-1) > 1
    flow = counts.double() @ (materialized & ~shared[..., None]).double()
    layers, experts = shared.nonzero(as_tuple=True)
    if len(experts):
        parts = _by_node(counts.mT[shared].T, materialized[shared], node_size, experts)
        split = torch.cat(
            [
                flow.new_zeros(len(part), *flow.shape[::2]).index_add(1, layers, part.double())
                for part in parts
            ]
        )
        flow += split.transpose(0, 1)
    return flow


def _check(counts: Tensor, materialized: Tensor, node_size: int) -> None:
    num_experts, num_devices = materialized.shape[1:] if materialized.ndim == 3 else (0, 0)
    if not num_experts or counts.shape != (len(materialized), num_devices, num_experts):
        raise ValueError(
            "counts, materialized: expected (D, E) and (E, D), "
            f"got {tuple(counts.shape[1:])} and {tuple(materialized.shape[1:])}"
        )
    check_nodes(num_devices, node_size)
    if bool((counts < 0).any()):
        raise ValueError(f"counts: expected at least 0, got {int(counts.min())}")
    if not bool(materialized.any(-1).all()):
        lost = int((~materialized.any(-1)).nonzero()[0, 1])
        raise ValueError(f"materialized: expected a holder of expert {lost}, got none")


def _by_node(
    counts: Tensor, materialized: Tensor, node_size: int, experts: Tensor
) -> Iterator[Tensor]:
    """`(sources, experts, D)`, the plan for some nodes at a time, to bound memory.

    The columns of `counts` and the rows of `materialized` are those of `experts`.
    """
    devices = torch.arange(len(counts), device=counts.device)
    nodes = max(1, CELLS // (node_size * materialized.numel()))
    for sources in devices.split(nodes * node_size):
        yield _split(counts[sources], materialized, node_size, experts, sources, devices)


def _split(
    counts: Tensor,
    materialized: Tensor,
    node_size: int,
    experts: Tensor,
    sources: Tensor,
    devices: Tensor,
) -> Tensor:
    """`(sources, E, D)`: counts of these devices, kept or split evenly among the holders."""
    first = sources[::node_size]
    near = materialized & (devices // node_size == first[:, None] // node_size)[:, None]
    holders = torch.where(near.any(-1, keepdim=True), near, materialized)  # (nodes, E, D)
    place = holders.cumsum(-1) - 1  # of a holder among the holders
    size = holders.sum(-1).repeat_interleave(node_size, 0)  # (sources, E)
    holders, place = (part.repeat_interleave(node_size, 0) for part in (holders, place))
    turn = place - ((experts + sources[:, None]) % size)[..., None]
    turn = torch.where(turn < 0, turn + size[..., None], turn)
    split = ((counts // size)[..., None] + (turn < (counts % size)[..., None])) * holders
    here = devices == sources[:, None]
    kept = materialized[:, sources].T  # (sources, E)
    return torch.where(kept[..., None], counts[..., None] * here[:, None], split)
