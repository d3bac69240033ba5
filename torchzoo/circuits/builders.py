"""Builders of region graphs: trees over latents, random and regular splits, image rectangles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor

from torchzoo.circuits.region_graph import Builder, RegionGraph

__all__ = [
    "balanced",
    "factorised",
    "hclt",
    "linear",
    "poon_domingos",
    "quad_tree",
    "rat_spn",
]

Box = tuple[tuple[int, int], ...]


def hclt(parent: Tensor | Sequence[int], *, num_latents: int | None = None) -> RegionGraph:
    """Hidden Chow-Liu tree: a latent for each variable, connected as a tree over the variables.

    `p(x) = sum_z p(z_r) prod p(z_i | z_parent(i)) prod p(x_i | z_i)`. The region of node `i` holds
    the variables below `i` and has one partition: the leaf of `x_i`, then the children's regions.

    Args:
        parent: `(D,)`, parent of each variable, -1 at the root; see `chow_liu_tree`.
        num_latents: States of a latent, noted for the circuit as its number of units.

    Returns:
        The region graph, a vtree.

    Raises:
        ValueError: `parent` is not a tree, or `num_latents` is below 1.

    Source:
        Liu and Van den Broeck, "Tractable Regularization of Probabilistic Circuits", 2021,
        section 3.

    Example:
        >>> hclt([-1, 0, 0], num_latents=4).regions
        (2, ((0,),), 1, ((2,),), 0, ((4, 3, 1),))
    """
    parents = [int(p) for p in (parent.tolist() if isinstance(parent, Tensor) else parent)]
    if num_latents is not None and num_latents < 1:
        raise ValueError(f"num_latents: got {num_latents}, expected at least 1")
    order = topological_order(parents)
    children: list[list[int]] = [[] for _ in parents]
    for node in order[1:]:
        children[parents[node]].append(node)
    builder, place = Builder(), [0] * len(parents)
    for node in reversed(order):
        parts = tuple(place[child] for child in children[node])
        place[node] = builder.region((builder.leaf(node), *parts))
    return builder.graph(num_latents)


def topological_order(parents: Sequence[int]) -> list[int]:
    """Nodes of a tree, each after its parent.

    Raises:
        ValueError: `parents` is not a tree with one root.
    """
    size = len(parents)
    roots = [node for node, up in enumerate(parents) if up == -1]
    if len(roots) != 1 or not all(-1 <= up < size for up in parents):
        raise ValueError(
            f"parent: got {len(roots)} roots (-1) among {size} nodes, expected one and every other "
            f"entry in 0 to {size - 1}"
        )
    below: list[list[int]] = [[] for _ in range(size)]
    for node, up in enumerate(parents):
        if up >= 0:
            below[up].append(node)
    order = roots
    for node in order:
        order.extend(below[node])
    if len(order) != size:
        raise ValueError(f"parent: got a cycle, {size - len(order)} nodes don't hang on the root")
    return order


def linear(num_variables: int, order: Sequence[int] | None = None) -> RegionGraph:
    """Chain: each region splits off one variable. With CP sums it is a hidden Markov model.

    Args:
        num_variables: Number of variables.
        order: The order of splitting off; 0, 1, ... by default.

    Returns:
        The region graph, a vtree of depth `num_variables`.

    Raises:
        ValueError: `num_variables` is below 1, or `order` is no permutation.

    Example:
        >>> linear(3).scope(4)
        (1, 2)
    """
    order = _checked_order(num_variables, order)
    builder = Builder()
    rest: tuple[int, ...] = ()
    leaves = [builder.leaf(variable) for variable in order]
    for leaf in reversed(leaves):
        rest = (builder.region((leaf, *rest)),)
    return builder.graph()


def balanced(num_variables: int, order: Sequence[int] | None = None) -> RegionGraph:
    """Balanced binary tree: each region is halved in the given order.

    Args:
        num_variables: Number of variables.
        order: The order of the leaves; 0, 1, ... by default.

    Returns:
        The region graph, a vtree of depth about `log2(num_variables)`.

    Raises:
        ValueError: `num_variables` is below 1, or `order` is no permutation.

    Example:
        >>> max(balanced(64).depths())
        6
    """
    order = _checked_order(num_variables, order)
    builder = Builder()

    def build(variables: Sequence[int]) -> int:
        if len(variables) == 1:
            return builder.leaf(variables[0])
        half = (len(variables) + 1) // 2
        return builder.region((build(variables[:half]), build(variables[half:])))

    build(order)
    return builder.graph()


def factorised(num_variables: int) -> RegionGraph:
    """One region of all variables: a mixture of fully factorised distributions.

    Args:
        num_variables: Number of variables.

    Returns:
        The region graph.

    Raises:
        ValueError: `num_variables` is below 1.

    Example:
        >>> factorised(3).regions
        (0, 1, 2, ((0, 1, 2),))
    """
    builder = Builder()
    builder.leaves(tuple(_checked_order(num_variables, None)))
    return builder.graph()


def rat_spn(
    num_variables: int, *, depth: int, num_repetitions: int = 1, seed: int = 0
) -> RegionGraph:
    """Random balanced binary splits down to a depth, several times over, mixed at the root.

    Args:
        num_variables: Number of variables.
        depth: Number of splits from the root to a bottom region, which is a product of leaves.
        num_repetitions: Number of random trees.
        seed: Seed of the splits.

    Returns:
        The region graph, a vtree where there is one repetition.

    Raises:
        ValueError: A size is below 1.

    Source:
        Peharz et al., "Random Sum-Product Networks: A Simple and Effective Approach to
        Probabilistic Deep Learning", 2019, algorithm 1.

    Example:
        >>> graph = rat_spn(8, depth=2, num_repetitions=3)
        >>> len(graph.partitions(graph.root))
        3
    """
    variables = _checked_order(num_variables, None)
    for name, value in (("depth", depth), ("num_repetitions", num_repetitions)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    builder, chance = Builder(), random.Random(seed)

    def build(part: list[int], depth: int) -> int:
        if depth == 0 or len(part) == 1:
            return builder.leaves(tuple(part))
        return builder.region(split(part, depth))

    def split(part: list[int], depth: int) -> tuple[int, ...]:
        if len(part) == 1:
            return (builder.leaf(part[0]),)
        mixed = chance.sample(part, len(part))
        half = (len(part) + 1) // 2
        return build(sorted(mixed[:half]), depth - 1), build(sorted(mixed[half:]), depth - 1)

    builder.region(*(split(list(variables), depth) for _ in range(num_repetitions)))
    return builder.graph()


def poon_domingos(
    shape: Sequence[int], *, delta: int = 1, axes: Sequence[int] | None = None
) -> RegionGraph:
    """All splits of a grid into axis-aligned rectangles, each rectangle being there once.

    Cuts lie at multiples of `delta`. Rectangles that no cut crosses are products of leaves.

    Args:
        shape: Sizes of the grid; variables are numbered in row-major order.
        delta: Distance of cuts.
        axes: Axes that are cut; all by default.

    Returns:
        The region graph, whose regions have as many partitions as there are cuts through them.

    Raises:
        ValueError: A size or `delta` is below 1, or there is no such axis.

    Source:
        Poon and Domingos, "Sum-Product Networks: A New Deep Architecture", 2011, section 4.

    Example:
        >>> graph = poon_domingos((4, 4), delta=2)
        >>> len(graph.partitions(graph.root))
        2
    """
    shape = _checked_shape(shape)
    axes = range(len(shape)) if axes is None else tuple(axes)
    if delta < 1:
        raise ValueError(f"delta: got {delta}, expected at least 1")
    if not all(0 <= axis < len(shape) for axis in axes):
        raise ValueError(f"axes: got {tuple(axes)}, expected numbers in 0 to {len(shape) - 1}")
    builder = Builder()
    leaves = [builder.leaf(variable) for variable in range(prod(shape))]
    known: dict[Box, int] = {}

    def build(box: Box) -> int:
        if box not in known:
            inside = _variables(box, shape)
            partitions = [tuple(build(half) for half in halves) for halves in cuts(box)]
            if len(inside) == 1:
                known[box] = leaves[inside[0]]
            else:
                known[box] = builder.region(*(partitions or [inside]))
        return known[box]

    def cuts(box: Box) -> list[tuple[Box, Box]]:
        found = []
        for axis in axes:
            low, high = box[axis]
            for at in range((low // delta + 1) * delta, high, delta):
                first = (*box[:axis], (low, at), *box[axis + 1 :])
                second = (*box[:axis], (at, high), *box[axis + 1 :])
                found.append((first, second))
        return found

    build(tuple((0, size) for size in shape))
    return builder.graph()


def quad_tree(shape: Sequence[int]) -> RegionGraph:
    """Every rectangle of a grid splits into its quadrants (halves of each axis, in general).

    Args:
        shape: Sizes of the grid; variables are numbered in row-major order.

    Returns:
        The region graph, a vtree.

    Raises:
        ValueError: A size is below 1.

    Example:
        >>> graph = quad_tree((4, 4))
        >>> [len(part) for part in graph.partitions(graph.root)]
        [4]
    """
    shape = _checked_shape(shape)
    builder = Builder()

    def build(box: Box) -> int:
        if all(high - low == 1 for low, high in box):
            return builder.leaf(_variables(box, shape)[0])
        halves = [
            ((low, (low + high + 1) // 2), ((low + high + 1) // 2, high))
            if high - low > 1
            else ((low, high),)
            for low, high in box
        ]
        return builder.region(tuple(build(part) for part in product(*halves)))

    build(tuple((0, size) for size in shape))
    return builder.graph()


def _variables(box: Box, shape: Sequence[int]) -> tuple[int, ...]:
    """Numbers of a rectangle's cells in row-major order of the whole grid."""
    grid = torch.arange(prod(shape), device="cpu").view(tuple(shape))
    return tuple(grid[tuple(slice(low, high) for low, high in box)].flatten().tolist())


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not shape or min(shape) < 1:
        raise ValueError(f"shape: got {tuple(shape)}, expected sizes of at least 1")
    return tuple(shape)


def _checked_order(num_variables: int, order: Sequence[int] | None) -> list[int]:
    if num_variables < 1:
        raise ValueError(f"num_variables: got {num_variables}, expected at least 1")
    found = list(range(num_variables)) if order is None else [int(item) for item in order]
    if sorted(found) != list(range(num_variables)):
        raise ValueError(f"order: got {found}, expected a permutation of 0 to {num_variables - 1}")
    return found
