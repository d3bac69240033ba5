"""Region graphs: how the scope of a circuit is split, level by level, down to single variables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple, Self

__all__ = ["Partition", "RegionGraph"]

Partition = tuple[int, ...]


class RegionGraph(NamedTuple):
    """A rooted graph of regions (sets of variables) and their partitions into smaller regions.

    A region is either an integer, the variable of a leaf, or a tuple of partitions; a partition is
    a tuple of positions of earlier regions. The last region is the root. A region with one child
    stands for a sum over the units of that child.

    Attributes:
        regions: The regions, children before parents.
        num_units: Units of a region that the builder asks for; None leaves it to the circuit.

    Example:
        >>> graph = RegionGraph((0, 1, 2, ((0, 1),), ((3, 2),))).check()
        >>> graph.num_variables, graph.structured, graph.scope(3)
        (3, True, (0, 1))
    """

    regions: tuple[int | tuple[Partition, ...], ...]
    num_units: int | None = None

    @property
    def root(self) -> int:
        """Position of the root."""
        return len(self.regions) - 1

    @property
    def num_variables(self) -> int:
        """Number of variables."""
        return 1 + max((r for r in self.regions if isinstance(r, int)), default=-1)

    @property
    def structured(self) -> bool:
        """Whether every region has at most one partition, so that the graph is a vtree."""
        return all(isinstance(region, int) or len(region) == 1 for region in self.regions)

    @property
    def has_leaf_sums(self) -> bool:
        """Whether every leaf has nothing but sums above it."""
        return all(leafless or len(part) == 1 for leafless, part in self._parts())

    def partitions(self, region: int) -> tuple[Partition, ...]:
        """Partitions of a region; none for a leaf."""
        found = self.regions[region]
        return () if isinstance(found, int) else found

    def scope(self, region: int) -> tuple[int, ...]:
        """Variables of a region, in increasing order."""
        return tuple(_members(self._scopes()[region]))

    def depths(self) -> list[int]:
        """Length of the longest path from the root to each region; -1 where there is none."""
        depths = [-1] * len(self.regions)
        depths[-1] = 0
        for region in range(self.root, -1, -1):
            for partition in self.partitions(region) if depths[region] >= 0 else ():
                for child in partition:
                    depths[child] = max(depths[child], depths[region] + 1)
        return depths

    def check(self) -> Self:
        """Return the graph if it is smooth and decomposable and covers its variables.

        Raises:
            ValueError: It is not; the message names the region.
        """
        self._check_form()
        scopes = self._scopes()
        for region in range(len(self.regions)):
            found = []
            for partition in self.partitions(region):
                union = 0
                for child in partition:
                    if twice := union & scopes[child]:
                        raise ValueError(
                            f"region_graph: region {region} is not decomposable, got variable "
                            f"{next(_members(twice))} in two parts of {partition}"
                        )
                    union |= scopes[child]
                found.append(union)
            for other in found[1:]:
                if missing := found[0] ^ other:
                    raise ValueError(
                        f"region_graph: region {region} is not smooth, got variable "
                        f"{next(_members(missing))} in some of its partitions only"
                    )
        if missing := scopes[-1] ^ ((1 << self.num_variables) - 1):
            raise ValueError(
                f"region_graph: the root (region {self.root}) lacks variable "
                f"{next(_members(missing))}, expected 0 to {self.num_variables - 1}"
            )
        if -1 in (depths := self.depths()):
            raise ValueError(
                f"region_graph: region {depths.index(-1)} is not reached from the root"
            )
        return self

    def _check_form(self) -> None:
        if not self.regions:
            raise ValueError("region_graph: got no regions, expected at least one")
        for region, found in enumerate(self.regions):
            if isinstance(found, int):
                if found < 0:
                    raise ValueError(f"region_graph: region {region} got variable {found} < 0")
            elif not found or not all(found):
                raise ValueError(f"region_graph: region {region} got no partition or an empty one")
            elif not all(0 <= child < region for partition in found for child in partition):
                raise ValueError(f"region_graph: region {region} got a child that is not before it")

    def _scopes(self) -> list[int]:
        """Scope of each region as a bit mask."""
        scopes: list[int] = []
        for region in self.regions:
            if isinstance(region, int):
                scopes.append(1 << region)
            else:
                mask = 0
                for child in (child for partition in region for child in partition):
                    mask |= scopes[child]
                scopes.append(mask)
        return scopes

    def binarized(self) -> RegionGraph:
        """The same splits by binary partitions: more parts split off one by one, single ones go.

        Raises:
            ValueError: A region has partitions that split nothing beside others that do.
        """
        builder = Builder()
        place: list[int] = []
        for region, found in enumerate(self.regions):
            if isinstance(found, int):
                place.append(builder.leaf(found))
            elif all(len(partition) == 1 for partition in found) and region != self.root:
                if len(found) > 1:
                    raise ValueError(f"region_graph: region {region} only mixes its children")
                place.append(place[found[0][0]])
            else:
                parts = [tuple(place[child] for child in partition) for partition in found]
                place.append(builder.region(*(builder.binary(part) for part in parts)))
        return builder.graph(self.num_units)

    def with_leaf_sums(self) -> RegionGraph:
        """The graph with a sum put above every leaf, so that leaves may have units of their own."""
        if self.has_leaf_sums:
            return self
        builder = Builder()
        place = []
        for found in self.regions:
            if isinstance(found, int):
                place.append(builder.region((builder.leaf(found),)))
            else:
                parts = [tuple(place[child] for child in partition) for partition in found]
                place.append(builder.region(*parts))
        return builder.graph(self.num_units)

    def _parts(self) -> Iterator[tuple[bool, Partition]]:
        """All partitions, each with whether it has no leaf among its parts."""
        for region in range(len(self.regions)):
            for part in self.partitions(region):
                yield not any(isinstance(self.regions[child], int) for child in part), part

    def to_json(self) -> str:
        """The graph as JSON: an object with the regions, an integer or a list of lists each."""
        return json.dumps({"regions": self.regions, "num_units": self.num_units})

    @classmethod
    def from_json(cls, text: str) -> RegionGraph:
        """The graph of `to_json`, checked.

        Raises:
            ValueError: The text is no such JSON, or the graph is not smooth and decomposable.

        Example:
            >>> RegionGraph.from_json(RegionGraph((0, 1, ((0, 1),))).to_json()).num_variables
            2
        """
        try:
            value = json.loads(text)
            regions = tuple(
                r if isinstance(r, int) else tuple(tuple(int(c) for c in part) for part in r)
                for r in value["regions"]
            )
            units = value.get("num_units")
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"text: got no JSON form of a region graph: {error!r}") from error
        return cls(regions, units).check()


class Builder:
    """Collects regions; each method returns the position of the region it adds."""

    def __init__(self) -> None:
        self.regions: list[int | tuple[Partition, ...]] = []

    def leaf(self, variable: int) -> int:
        """Add the leaf of a variable."""
        self.regions.append(variable)
        return len(self.regions) - 1

    def region(self, *partitions: Partition) -> int:
        """Add a region of these partitions."""
        self.regions.append(partitions)
        return len(self.regions) - 1

    def leaves(self, variables: tuple[int, ...]) -> int:
        """Add a leaf for each variable, and the region of all of them where they are several."""
        children = tuple(self.leaf(variable) for variable in variables)
        return children[0] if len(children) == 1 else self.region(children)

    def binary(self, parts: Partition) -> Partition:
        """A partition of at most two parts, whose second holds all but the first."""
        while len(parts) > 2:
            parts = (*parts[:-2], self.region(parts[-2:]))
        return parts

    def graph(self, num_units: int | None = None) -> RegionGraph:
        """The checked graph, whose root is the last region; a lone leaf gets a sum above it."""
        if isinstance(self.regions[-1], int):
            self.region((len(self.regions) - 1,))
        return RegionGraph(tuple(self.regions), num_units).check()


def _members(mask: int) -> Iterator[int]:
    """Positions of the bits of a mask."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
