"""Properties of circuits that decide which queries are exact.

Smoothness and decomposability are the region graph's (`RegionGraph.check`) and every circuit has
them. Structured decomposability is `RegionGraph.structured`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit

__all__ = ["check_compatible", "check_deterministic", "is_compatible", "is_deterministic"]


def is_compatible(p: Circuit, q: Circuit) -> bool:
    """Whether two circuits split their variables alike, so that their product is a circuit."""
    try:
        check_compatible(p, q)
    except ValueError:
        return False
    return True


def check_compatible(p: Circuit, q: Circuit) -> None:
    """Refuse circuits whose product is not a circuit of their own region graph.

    Raises:
        ValueError: A region has several partitions, or region graphs, sums or leaves differ.
    """
    for region in range(len(p.region_graph.regions)):
        if (count := len(p.region_graph.partitions(region))) > 1:
            raise ValueError(
                f"p: got {count} partitions of region {region}, expected a structured region graph"
            )
    if p.region_graph.regions != q.region_graph.regions:
        raise ValueError("q: got another region graph than p's, expected the same")
    if p.sum != q.sum:
        raise ValueError(f"q: got sum={q.sum!r}, expected {p.sum!r} as in p")
    if p.leaf.num_categories != q.leaf.num_categories:
        got, wanted = q.leaf.num_categories, p.leaf.num_categories
        raise ValueError(f"q: got leaves of {got} values, expected {wanted} as in p")


@torch.no_grad()
def is_deterministic(circuit: Circuit) -> bool:
    """Whether at most one input of every sum is above 0 on any complete sample.

    Decided by supports: where weights and leaves are above 0. A sum that the root doesn't reach
    counts too; regions with several partitions count as not deterministic.
    """
    from torchzoo.circuits.pairs import full_weight, overlaps

    if not circuit.region_graph.structured:
        return False
    pairs = overlaps(circuit)
    for layer, (weight, _), found in zip(circuit.layers, circuit.weights(), pairs, strict=True):
        used = (full_weight(layer, weight) > 0).to(weight)
        shared = (found.products > -torch.inf).to(weight)
        shared = shared - torch.diag_embed(shared.diagonal(dim1=1, dim2=2))
        if torch.einsum("fok,fkj,foj->", used, shared, used) > 0:
            return False
    return True


def check_deterministic(circuit: Circuit, query: str) -> None:
    """Refuse a query that is exact for deterministic circuits only.

    Raises:
        ValueError: The circuit is not deterministic.
    """
    if not is_deterministic(circuit):
        raise ValueError(
            f"circuit: got one that is not deterministic, expected a deterministic one, as {query} "
            "has no exact answer else; entropy_mc estimates by samples"
        )
