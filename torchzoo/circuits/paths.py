"""The paper's schedule of a circuit's conditionals, which evaluates the path above each leaf.

Liu, Mandt and Van den Broeck, Lossless Compression with Probabilistic Circuits, 2022, algorithm 1.
`torchzoo.circuits.order` has the tour, which finds the same in fewer operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.circuits.vtree import Choose, Factors, Matmul, Vtree, rescaled, summed


def path_evaluation(
    factors: Factors, rows: int, choose: Choose, matmul: Matmul = torch.matmul
) -> None:
    """The paper's schedule: for each variable, evaluate what lies on the path above its leaf.

    The path ends at the first region whose scope has every variable so far; units n there have
    top-down probabilities ptd(n), and Pr(prefix) = sum_n ptd(n) p_n(prefix). Here the path is
    evaluated for all categories of the variable. Arguments are those of `tour`.
    """
    tree = factors.tree
    top_down = _top_down(factors, matmul)
    known: dict[int, Tensor] = {}  # values of regions whose variables had their turn
    turns: dict[int, int] = {}  # how many variables of a region had theirs
    leaves = [region for region, _ in tree.walk if tree.variable[region] >= 0]
    for turn, leaf in enumerate(leaves):
        value = factors.leaves[leaf].expand(rows, -1, -1)  # (N, C, K)
        path, region = [(leaf, value)], leaf
        while turns.get(region, 0) < turn or _only_child(tree, region):
            child, region = region, tree.parent[region]
            value = _above(factors, region, child, value, known, matmul)
            path.append((region, value))
        pmf = _matmul3(matmul, value, top_down[region][:, None])[..., 0]
        chosen = choose(tree.variable[leaf], pmf)
        for region, values in path:
            known[region] = values[torch.arange(rows), chosen]
        up = leaf
        while up >= 0:
            turns[up] = turns.get(up, 0) + 1
            up = tree.parent[up]


def _above(
    factors: Factors,
    region: int,
    child: int,
    value: Tensor,
    known: dict[int, Tensor],
    matmul: Matmul,
) -> Tensor:
    """Values `(N, C, K)` of a region from those of a child; the other ones are known or 1."""
    weight, children = factors.weights[region], factors.tree.children[region]
    if weight.ndim == 2:
        for other in children:
            if other != child and other in known:
                value = value * known[other][:, None]
        value = _matmul3(matmul, value, weight.T)
    elif child == children[0]:
        value = _matmul3(matmul, value, summed(weight, 2).T)
    else:
        pairs = (known[children[0]][:, None, :, None] * value[:, :, None]).flatten(2)
        value = _matmul3(matmul, pairs, weight.flatten(1).T)
    return rescaled(value.flatten(1)).view(value.shape)


def _only_child(tree: Vtree, region: int) -> bool:
    return tree.parent[region] >= 0 and len(tree.children[tree.parent[region]]) == 1


def _matmul3(matmul: Matmul, x: Tensor, weight: Tensor) -> Tensor:
    return matmul(x.flatten(0, 1), weight).view(*x.shape[:2], weight.shape[1])


def _top_down(factors: Factors, matmul: Matmul) -> dict[int, Tensor]:
    """Top-down probabilities of each region's units: 1 at the root, theta-weighted below."""
    some = factors.leaves[next(iter(factors.leaves))]
    top_down = {len(factors.tree.children) - 1: some.new_ones(1)}
    for region, left in factors.tree.walk:
        if left or factors.tree.variable[region] >= 0:
            continue
        weight, above = factors.weights[region], top_down[region][None]
        below = [weight] if weight.ndim == 2 else [summed(weight, 2), summed(weight, 1)]
        found = [matmul(above, part)[0] for part in below]
        for place, child in enumerate(factors.tree.children[region]):
            top_down[child] = found[place % len(found)]
    return top_down
