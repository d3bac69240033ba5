"""Pruning and growing: a circuit that keeps its busy edges and gets more of them.

Pruning sets the weights of the edges with the least flow to 0, or of blocks of edges, for which
`torchzoo.circuits.compact` has layers that skip them. Without the row being normalised
again it would cost a sample exactly `-log(1 - flow)` for one edge. Growing puts several noisy
copies in the place of every unit; with no noise the distribution stays what it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.circuits.block_sparse import cut
from torchzoo.circuits.learning import edge_flows

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit

__all__ = ["grow", "prune"]


@torch.no_grad()
def prune(
    circuit: Circuit,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float,
    block_size: int = 1,
    labels: Tensor | None = None,
    batch_size: int | None = None,
) -> int:
    """Remove the share of edges that the data uses least; every sum keeps its busiest one.

    A removed edge has `log_weight` of minus infinity, and stays out of further learning.

    Args:
        circuit: The circuit, changed in place.
        x: `(N, D)`, values.
        mask: `(N, D)` bool, True where observed.
        fraction: Share of the edges (blocks) still there that is removed.
        block_size: Sums and inputs of a block of edges that go or stay together.
        labels: `(N,)`, the class of each sample, needed where there are several.
        batch_size: Samples at a time; all by default.

    Returns:
        The number of edges removed.

    Raises:
        ValueError: `fraction` outside [0, 1), `block_size` below 1, or see `edge_flows`.

    Source:
        Dang, Liu and Van den Broeck, "Sparse Probabilistic Circuits via Pruning and Growing", 2022,
        section 3.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, Circuit, balanced
        >>> circuit, x = Circuit(balanced(4), CategoricalLeaf(3)), torch.randint(0, 3, (50, 4))
        >>> prune(circuit, x, fraction=0.5) > 0
        True
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: got {fraction}, expected a number in [0, 1)")
    if block_size < 1:
        raise ValueError(f"block_size: got {block_size}, expected at least 1")
    flows = edge_flows(circuit, x, mask, labels=labels, batch_size=batch_size).weights
    # (F, R, C): flows and largest weights of blocks
    blocks = [cut(flow.flatten(2), block_size).sum((3, 4)) for _, _, flow in flows]
    largest = [cut(weight.flatten(2), block_size).amax((3, 4)) for _, weight, _ in flows]
    alive = torch.cat([flow[weight > 0] for flow, weight in zip(blocks, largest, strict=True)])
    count = int(fraction * len(alive))
    if not count:
        return 0
    threshold = alive.kthvalue(count).values
    removed = 0
    for (parameter, weight, _), flow, top in zip(flows, blocks, largest, strict=True):
        busiest = torch.zeros_like(flow, dtype=torch.bool)
        # of a row without any flow the edge of largest weight stays
        tie = top * torch.finfo(flow.dtype).tiny
        busiest.scatter_(2, (flow + tie).argmax(2, keepdim=True), True)
        weak = (flow <= threshold) & ~busiest
        edges = cut(weight.flatten(2), block_size)
        dead = weak[..., None, None] & (edges > 0)
        left = ((edges > 0) & ~dead).any(4, keepdim=True).any(2, keepdim=True)
        dead &= left  # a sum that would be left without edges keeps its own
        dead = rearrange(dead, "f r c o k -> f (r o) (c k)").view_as(parameter)
        parameter.masked_fill_(dead, -torch.inf)
        removed += int(dead.sum())
    return removed


@torch.no_grad()
def grow(
    circuit: Circuit,
    *,
    copies: int = 2,
    noise: float = 0.3,
    generator: torch.Generator | None = None,
) -> Circuit:
    """A circuit with `copies` noisy copies of every unit.

    An edge becomes one from each copy of its sum to each copy of its input, with the same weight
    times `1 + noise N(0, 1)`, kept above 0. Parameters of leaves get `noise N(0, 1)` added.

    Args:
        circuit: The circuit, left as it is.
        copies: Copies of a unit.
        noise: Size of the noise; copies of no noise would never part.
        generator: Source of randomness.

    Returns:
        The larger circuit.

    Raises:
        ValueError: `copies` below 1, or `noise` below 0.

    Source:
        Dang, Liu and Van den Broeck, "Sparse Probabilistic Circuits via Pruning and Growing", 2022,
        section 4.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, Circuit, balanced
        >>> grow(Circuit(balanced(4), CategoricalLeaf(3), num_units=2)).num_units
        4
    """
    if copies < 1 or noise < 0:
        name, value = ("copies", copies) if copies < 1 else ("noise", noise)
        raise ValueError(f"{name}: got {value}, expected at least {int(copies < 1)}")
    found = type(circuit)(
        circuit.region_graph,
        circuit.leaf.resized(1, 1),
        num_units=circuit.num_units * copies,
        num_leaf_units=circuit.num_leaf_units * copies,
        sum=circuit.sum,
        num_classes=circuit.num_classes,
        tie=circuit.tie,
    ).to(circuit.layers[0].log_weight)

    def random_like(value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=generator, device=value.device).to(value)

    for old, new in zip(circuit.leaf.parameters(), found.leaf.parameters(), strict=True):
        new.copy_(old.repeat_interleave(copies, -1))
        new.add_(noise * random_like(new))
    for layer, larger in zip(circuit.layers, found.layers, strict=True):
        for small, large in zip(layer.log_weights(), larger.log_weights(), strict=True):
            grown = small.detach()
            for axis in range(1, large.dim()):
                grown = grown.repeat_interleave(large.shape[axis] // grown.shape[axis], axis)
            large.copy_(grown + (1 + noise * random_like(large)).clamp_min(0.1).log())
    return found
