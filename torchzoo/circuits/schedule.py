"""The order in which a region graph is evaluated: layers of regions, deepest first.

Every layer's values are one tensor with a row for each region. Leaves come in chunks, one for each
depth. Where the graph is a tree, rows are ordered so that a layer reads its children as they lie.
"""

from __future__ import annotations

from typing import NamedTuple

from torchzoo.circuits.region_graph import Partition, RegionGraph

__all__ = ["Fold", "LayerPlan", "Schedule", "schedule"]


class Fold(NamedTuple):
    """One partition: the row of its region in the layer, and its parts."""

    row: int
    parts: Partition


class LayerPlan(NamedTuple):
    """A layer: its regions, row by row, and their partitions, fold by fold."""

    regions: tuple[int, ...]
    folds: tuple[Fold, ...]


class Schedule(NamedTuple):
    """What is evaluated, in order: chunks of leaves, then layers; each gives one slot of values.

    Attributes:
        chunks: For each chunk of leaves the regions, in the order of the leaf layer's folds.
        layers: The layers.
        place: For each region its slot and its row there.
    """

    chunks: tuple[tuple[int, ...], ...]
    layers: tuple[LayerPlan, ...]
    place: tuple[tuple[int, int], ...]


def schedule(graph: RegionGraph, *, leaf_sums: bool = False) -> Schedule:
    """Order a checked graph by the longest paths from the root.

    Args:
        graph: The region graph.
        leaf_sums: Whether the regions right above leaves form a layer of their own, the first.

    Returns:
        The schedule.
    """
    depths = graph.depths()
    if leaf_sums:
        above = {r for r in range(len(depths)) if _only_leaf(graph, r)}
        bottom = 1 + max((d for r, d in enumerate(depths) if graph.partitions(r)), default=0)
        depths = [
            bottom if r in above else d if graph.partitions(r) else bottom + 1
            for r, d in enumerate(depths)
        ]
    waiting: list[list[int]] = [[] for _ in range(max(depths) + 1)]
    for region, depth in enumerate(depths):
        waiting[depth].append(region)
    chunks, layers = [], []
    rows: list[int] = [graph.root]
    for depth in range(len(waiting)):
        regions = tuple(row for row in rows if graph.partitions(row))
        if leaves := tuple(row for row in rows if not graph.partitions(row)):
            chunks.append(leaves)
        folds = tuple(
            Fold(row, parts)
            for row, region in enumerate(regions)
            for parts in graph.partitions(region)
        )
        if folds:
            layers.append(LayerPlan(regions, folds))
        if depth + 1 < len(waiting):
            below = set(waiting[depth + 1])
            read = [child for child in _by_position(folds) if child in below]
            rows = list(dict.fromkeys(read + waiting[depth + 1]))
    place = [(0, 0)] * len(depths)
    slots = [*chunks, *(layer.regions for layer in reversed(layers))]
    for slot, regions in enumerate(slots):
        for row, region in enumerate(regions):
            place[region] = (slot, row)
    return Schedule(tuple(chunks), tuple(reversed(layers)), tuple(place))


def _only_leaf(graph: RegionGraph, region: int) -> bool:
    """Whether the region is a sum right above a leaf."""
    partitions = graph.partitions(region)
    return bool(partitions) and not any(graph.partitions(c) for part in partitions for c in part)


def _by_position(folds: tuple[Fold, ...]) -> list[int]:
    """Children of all folds: the first parts, then the second ones, and so on."""
    longest = max((len(fold.parts) for fold in folds), default=0)
    return [fold.parts[j] for j in range(longest) for fold in folds if j < len(fold.parts)]
