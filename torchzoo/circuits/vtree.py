"""Structured circuits as trees of matrices, in the order in which a codec goes through them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.circuits.circuit import Circuit
from torchzoo.circuits.folded_layers import SumLayer
from torchzoo.circuits.inputs import FiniteLeaf
from torchzoo.circuits.region_graph import RegionGraph

Matmul = Callable[[Tensor, Tensor], Tensor]
Choose = Callable[[int, Tensor], Tensor]
"""Gets a variable and its conditional up to a factor `(N, C)`; gives the values `(N,)`."""


class Vtree(NamedTuple):
    """A structured region graph whose children are in the order of the tour.

    Attributes:
        children: For each region its children, larger scope first; none for a leaf.
        positions: For each region the positions of these children in its partition.
        parent: For each region its parent, -1 for the root.
        variable: For each region its variable, -1 for an inner one.
        walk: Regions in the order of the tour, leaves once and inner ones twice.
    """

    children: list[tuple[int, ...]]
    positions: list[tuple[int, ...]]
    parent: list[int]
    variable: list[int]
    walk: list[tuple[int, bool]]

    @classmethod
    def of(cls, graph: RegionGraph) -> Vtree:
        """The vtree of a region graph.

        Raises:
            ValueError: A region has more than one partition.
        """
        sizes: list[int] = []
        children: list[tuple[int, ...]] = []
        positions: list[tuple[int, ...]] = []
        parent = [-1] * len(graph.regions)
        for region in range(len(graph.regions)):
            parts = graph.partitions(region)
            if len(parts) > 1:
                raise ValueError(
                    f"circuit: expected a structured region graph with one partition a region, "
                    f"got {len(parts)} at region {region}"
                )
            found = parts[0] if parts else ()
            order = sorted(range(len(found)), key=lambda i: -sizes[found[i]])
            sizes.append(sum(sizes[child] for child in found) if found else 1)
            positions.append(tuple(order))
            children.append(tuple(found[i] for i in order))
            for child in found:
                parent[child] = region
        variable = [region if isinstance(region, int) else -1 for region in graph.regions]
        return cls(children, positions, parent, variable, _walk(children))

    @property
    def order(self) -> list[int]:
        """The variables in the order of their turns."""
        return [self.variable[region] for region, _ in self.walk if self.variable[region] >= 0]


def _walk(children: Sequence[tuple[int, ...]]) -> list[tuple[int, bool]]:
    """Depth first; a region comes with False when it is entered and with True when it is left."""
    stack, walk = [(len(children) - 1, False)], []
    while stack:
        region, left = stack.pop()
        walk.append((region, left))
        if not left and children[region]:
            stack.append((region, True))
            stack.extend((child, False) for child in reversed(children[region]))
    return walk


class Factors(NamedTuple):
    """A circuit's parameters as probabilities, a matrix a region.

    Attributes:
        tree: The vtree.
        weights: By inner region, `(K_out, K_in)` over Hadamard products of the children or
            `(K_out, K_1, K_2)` over pairs of units of two children, in the tree's order.
        leaves: By leaf region, `(C, K)`.
    """

    tree: Vtree
    weights: dict[int, Tensor]
    leaves: dict[int, Tensor]

    @property
    def num_parameters(self) -> int:
        """Number of edges with a parameter, leaves included: the size |p| of the circuit."""
        return sum(w.numel() for w in (*self.weights.values(), *self.leaves.values()))

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """The same with every tensor replaced by the function's value."""
        weights, leaves = (
            {region: function(tensor) for region, tensor in part.items()}
            for part in (self.weights, self.leaves)
        )
        return Factors(self.tree, weights, leaves)

    def fingerprint(self) -> bytes:
        """SHA-256 of the vtree and of the parameters, which are on the CPU, as float32."""
        digest = hashlib.sha256()
        tree = self.tree
        for numbers in (tree.parent, tree.variable, *tree.children):
            digest.update(struct.pack(f"<I{len(numbers)}i", len(numbers), *numbers))
        for tensors in (self.weights, self.leaves):
            for region in sorted(tensors):
                digest.update(struct.pack(f"<{tensors[region].ndim}I", *tensors[region].shape))
                digest.update(tensors[region].numpy().astype("<f4").tobytes())
        return digest.digest()


def factors_of(circuit: Circuit) -> Factors:
    """The parameters of a structured circuit over finitely many values, differentiable.

    Raises:
        ValueError: A region has more than one partition, leaves are continuous, or the root has
            several classes.
    """
    tree = Vtree.of(circuit.region_graph)
    if not isinstance(circuit.leaf, FiniteLeaf):
        raise ValueError(f"circuit: expected leaves over finitely many values, got {circuit.leaf}")
    if circuit.num_classes != 1:
        raise ValueError(f"circuit: expected num_classes 1, got {circuit.num_classes}")
    leaves = dict(zip(circuit.leaf_regions, circuit.leaf.full_table().exp(), strict=True))
    weights = {}
    for layer in circuit.layers:
        assert isinstance(layer, SumLayer)
        of_folds = layer.weight().expand(len(layer.plan.folds), *layer.log_weight.shape[1:])
        for fold, weight in zip(layer.plan.folds, of_folds, strict=True):
            region = layer.plan.regions[fold.row]
            swapped = weight.ndim == 3 and tree.positions[region] == (1, 0)
            weights[region] = weight.transpose(1, 2) if swapped else weight
    return Factors(tree, weights, leaves)


class EdgeCounter:
    """Multiplies matrices and counts the edges that a product stands for, by sample and value.

    Attributes:
        edges: Entries of the matrices so far.
    """

    def __init__(self) -> None:
        self.edges = 0

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product."""
        self.edges += weight.numel()
        return x @ weight


def rescaled(values: Tensor) -> Tensor:
    """Rows divided by their largest entry, a constant factor; rows of zeros stay."""
    top = values.detach().amax(-1, keepdim=True)
    return values / torch.where(top > 0, top, 1)


def summed(values: Tensor, dim: int) -> Tensor:
    """The sum over an axis, one entry after the other, which `Tensor.sum` does not promise."""
    first, *others = values.unbind(dim)
    for other in others:
        first = first + other
    return first
