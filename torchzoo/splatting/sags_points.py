"""Denser points where a cloud is flat: midpoints of neighbours, chosen by curvature.

E. Ververas, R. A. Potamias, J. Song, J. Deng and S. Zafeiriou, "SAGS: Structure-Aware 3D Gaussian
Splatting", 2024. With s1 >= s2 >= s3 the singular values of a point's k nearest points, itself
among them, less their mean, its curvature is

    s3 / (s1 + s2 + s3),

which is 0 on a plane. Points whose curvature is low for the cloud get midpoints to many of their
neighbours, the others to few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo import ops

__all__ = ["curvature", "curvature_densify", "neighbors", "voxel_means"]

_LEAST_SPREAD = 1e-6
"""Curvatures that differ by less are equal but for rounding."""


@torch.no_grad()
def neighbors(points: Tensor, k: int) -> Tensor:
    """Each point and its k - 1 nearest others, nearest first, `(P, k)`.

    Args:
        points: `(P, 3)`.
        k: How many, 1 to P.

    Raises:
        ValueError: Points that are not `(P, 3)`, not finite, or fewer than k.

    Example:
        >>> neighbors(torch.tensor([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]), 2).tolist()
        [[0, 1], [1, 0], [2, 1]]
    """
    if points.dim() != 2 or points.shape[1] != 3:
        raise ValueError(f"points: got {tuple(points.shape)}, expected (P, 3)")
    if not 1 <= k <= len(points):
        raise ValueError(f"points: got {len(points)}, expected at least k={k}, and k at least 1")
    if not points.isfinite().all():
        raise ValueError("points: got some that are NaN or infinite, expected finite ones")
    own = torch.arange(len(points), device=points.device)[:, None]
    if k == 1:
        return own
    return torch.cat([own, ops.knn(points, points, k - 1, exclude_self=True)[1]], 1)


@torch.no_grad()
def curvature(points: Tensor, *, k: int = 10) -> Tensor:
    """How far the surroundings of each point are from a plane.

    Args:
        points: The cloud.
        k: Points of a surrounding, the point itself among them.

    Shape:
        - points: `(P, 3)`
        - output: `(P,)`, from 0 to 1/3; 0 where all k points are the same

    Raises:
        ValueError: Points that are not finite, or fewer than k.

    Source:
        Ververas et al., "SAGS", 2024, the curvature-aware densification; singular values, as in
        the authors' code, rather than their squares.

    Example:
        >>> flat = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0), torch.zeros(1))
        >>> curvature(flat).max() < 1e-6
        tensor(True)
    """
    return _curvature(points, neighbors(points, k))


def _curvature(points: Tensor, table: Tensor) -> Tensor:
    around = points[table].to(torch.promote_types(points.dtype, torch.float32))
    values = torch.linalg.svdvals(around - around.mean(1, keepdim=True))
    total = values.sum(-1)
    return torch.where(total > 0, values[:, 2:].sum(-1) / total, 0.0)


@torch.no_grad()
def curvature_densify(
    points: Tensor,
    *,
    k: int = 10,
    low_k: int = 10,
    high_k: int = 2,
    z_threshold: float | None = -1.0,
) -> tuple[Tensor, Tensor]:
    """Points and midpoints of neighbours, most of them where the cloud is flat.

    Where half of the cloud or more is flat, hardly any curvature is a standard deviation below
    their mean, and the default chooses nothing: None for `z_threshold` does.

    Args:
        points: The cloud.
        k: Points of a surrounding, the point itself among them.
        low_k: Points of low curvature get midpoints to as many of their nearest, of which the
            point itself is one.
        high_k: The others get midpoints to as many of their nearest others.
        z_threshold: Curvature is low where it is so many standard deviations above the mean of
            the cloud; None: where it is below the median.

    Shape:
        - points: `(P, 3)`
        - outputs: `(P', 3)` and `(P', 2)`

    Returns:
        The points and then the midpoints, and the two rows of `points` that each is the middle
        of: for the points themselves twice their own, for the midpoints each pair once, the lower
        row first.

    Raises:
        ValueError: Points that are not finite, or fewer than are looked for.

    Source:
        Ververas et al., "SAGS", 2024, the curvature-aware densification; the figures are the
        authors' code's.

    Example:
        >>> points, parents = curvature_densify(torch.randn(50, 3))
        >>> points.shape[1], bool((parents[:50, 0] == torch.arange(50)).all())
        (3, True)
    """
    if min(k, low_k) < 1 or high_k < 0:
        got = f"k={k}, low_k={low_k}, high_k={high_k}"
        raise ValueError(f"k, low_k, high_k: got {got}, expected at least 1, 1 and 0")
    table = neighbors(points, max(k, low_k, high_k + 1))
    low = _is_low(_curvature(points, table[:, :k]), z_threshold)
    row = table[:, :1]
    pairs = [
        torch.stack([row[chosen].expand(-1, others), table[chosen, 1 : others + 1]], -1)
        for chosen, others in ((low, low_k - 1), (~low, high_k))
    ]
    both = torch.cat([part.flatten(0, 1) for part in pairs]).sort(-1).values
    parents = torch.cat([row.expand(-1, 2), both.unique(dim=0)])
    return points[parents].mean(1), parents


def _is_low(values: Tensor, z_threshold: float | None) -> Tensor:
    if z_threshold is None:
        return values < values.median()
    spread = values.std(correction=0).clamp_min(_LEAST_SPREAD)
    return (values - values.mean()) / spread < z_threshold


@torch.no_grad()
def voxel_means(points: Tensor, size: float = 0.0) -> Tensor:
    """The mean of the points in each voxel of a grid that has points.

    Args:
        points: The cloud, `(P, 3)`.
        size: Side of the voxels; 0: the median distance of a point to the nearest other.

    Returns:
        `(V, 3)`, in order of the voxels.

    Example:
        >>> points = torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.1, 0.1], [1.5, 0.5, 0.5]])
        >>> voxel_means(points, 1.0)
        tensor([[0.2000, 0.1000, 0.1000],
                [1.5000, 0.5000, 0.5000]])
    """
    if not size > 0:
        nearest, _ = ops.knn(points, points, 1, exclude_self=True)
        size = nearest.median().item()
    if not size > 0:
        return points
    cells = (points / size).floor()
    _, voxel = cells.unique(dim=0, return_inverse=True)
    count = int(voxel.max()) + 1
    sums = points.new_zeros(count, 3).index_add(0, voxel, points)
    return sums / voxel.bincount(minlength=count)[:, None]
