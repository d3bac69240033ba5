"""Chow-Liu trees: the tree over variables whose edges carry the most mutual information."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["chow_liu_tree", "maximum_spanning_tree", "mutual_information"]

LARGEST = 2**28
"""How many pair counts `D^2 C^2` are allowed (1 GiB)."""
PIECE = 2**24
"""How many numbers a piece of work takes at a time."""


def chow_liu_tree(
    x: Tensor, *, num_categories: int | None, alpha: float = 0.01, bins: int | None = None
) -> Tensor:
    """The tree over variables whose edges carry the most mutual information.

    Args:
        x: `(N, D)`, integers from 0 to `num_categories - 1`; or numbers that are treated as
            Gaussian, with `num_categories=None`.
        num_categories: Number of values.
        alpha: Added to the count of every pair of values.
        bins: Values are coarsened to this many for the mutual information.

    Returns:
        `(D,)`, each variable's parent, -1 at the root, which is the centre of the tree.

    Raises:
        ValueError: No samples, values out of range, or more pair counts than fit into memory.

    Source:
        Chow and Liu, "Approximating Discrete Probability Distributions with Dependence Trees",
        1968.

    Example:
        >>> a = torch.randint(0, 2, (500,))
        >>> x = torch.stack([a, torch.randint(0, 2, (500,)), a], 1)
        >>> parent = chow_liu_tree(x, num_categories=2)
        >>> bool(parent[0] == 2 or parent[2] == 0)
        True
    """
    return maximum_spanning_tree(
        mutual_information(x, num_categories=num_categories, alpha=alpha, bins=bins)
    )


@torch.no_grad()
def mutual_information(
    x: Tensor, *, num_categories: int | None, alpha: float = 0.01, bins: int | None = None
) -> Tensor:
    """Mutual information of all pairs of variables, in nats; see `chow_liu_tree`.

    Returns:
        `(D, D)` float64. The diagonal has no meaning.

    Raises:
        ValueError: See `chow_liu_tree`.
    """
    if x.dim() != 2 or not len(x):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, D) with N > 0")
    if num_categories is None:
        correlation = torch.atleast_2d(torch.corrcoef(x.T.double())).nan_to_num()
        return -0.5 * torch.log1p(-correlation.square().clamp_max(1 - 1e-12))
    if x.is_floating_point() or x.min() < 0 or x.max() >= num_categories:
        got = f"{x.dtype} from {x.min().item()} to {x.max().item()}"
        raise ValueError(f"x: got {got}, expected integers from 0 to {num_categories - 1}")
    if alpha < 0:
        raise ValueError(f"alpha: got {alpha}, expected at least 0")
    size, x = num_categories, x.long()
    if bins is not None:
        if not 1 <= bins <= num_categories:
            raise ValueError(f"bins: got {bins}, expected 1 to {num_categories}")
        size, x = bins, x * bins // num_categories
    joint = _pair_counts(x, size)
    total = len(x) + alpha * size**2
    single = joint.diagonal(dim1=0, dim2=2).sum(0).double().T  # counts of one variable's values
    entropy = -torch.xlogy(p := (single + alpha * size) / total, p).sum(1)
    step = max(1, PIECE // joint[0].numel())
    both = [
        -torch.xlogy(p := (part.double() + alpha) / total, p).sum((1, 3))
        for part in joint.split(step)
    ]
    return entropy[:, None] + entropy - torch.cat(both)


def _pair_counts(x: Tensor, size: int) -> Tensor:
    """`(D, C, D, C)`, how often each pair of values occurs."""
    dim = x.shape[1]
    if (dim * size) ** 2 > LARGEST:
        raise ValueError(
            f"x: got {dim} variables of {size} values, {(dim * size) ** 2} pair counts, expected "
            f"at most {LARGEST}; coarsen the values by bins"
        )
    joint = torch.zeros(dim * size, dim * size, device=x.device)
    for part in x.split(max(1, PIECE // (dim * size))):
        hot = F.one_hot(part, size).flatten(1).float()
        joint.addmm_(hot.T, hot)
    return joint.view(dim, size, dim, size)


def maximum_spanning_tree(weight: Tensor) -> Tensor:
    """The spanning tree of largest total weight, hung up at its centre.

    Args:
        weight: `(D, D)`, symmetric weights of edges.

    Returns:
        `(D,)` int64, each node's parent, -1 at the root: the first node of least eccentricity.

    Example:
        >>> weight = torch.tensor([[0, 3, 1], [3, 0, 2], [1, 2, 0]])
        >>> maximum_spanning_tree(weight).tolist()
        [1, -1, 1]
    """
    from scipy.sparse import csgraph

    values = weight.detach().cpu().double().numpy()
    cost = values.max() - np.triu(values, 1) + 1.0  # above 0, as 0 would mean that there is no edge
    tree = csgraph.minimum_spanning_tree(np.triu(cost, 1))
    steps = csgraph.shortest_path(tree, directed=False, unweighted=True)
    root = int(steps.max(1).argmin())
    parent = csgraph.breadth_first_order(tree, root, directed=False)[1].astype(np.int64)
    parent[root] = -1
    return torch.from_numpy(parent).to(weight.device)
