"""Sorted grids: the sort, and how smooth a grid is."""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.ops import PlasStats, plas_sort

__all__ = ["PlasStats", "neighbor_distance", "plas_sort", "vad"]


def neighbor_distance(grid: Tensor) -> Tensor:
    """Mean Euclidean distance of a grid's vectors to those on their right and below.

    Args:
        grid: Vectors on a grid; its borders have fewer neighbours.

    Shape:
        - grid: `(D, H, W)`
        - output: scalar

    Raises:
        ValueError: Not three dimensions, or a single vector.

    Example:
        >>> neighbor_distance(torch.tensor([[[0.0, 3.0], [4.0, 7.0]]]))
        tensor(3.5000)
    """
    return torch.cat([d.norm(dim=0) for d in _steps(grid)]).mean()


def vad(grid: Tensor) -> Tensor:
    """Variance of absolute differences: of each feature between neighbours, right and below.

    Args:
        grid: Vectors on a grid.

    Shape:
        - grid: `(D, H, W)`
        - output: scalar

    Raises:
        ValueError: Not three dimensions, or a single vector.

    Source:
        Morgenstern et al., "Compact 3D Scene Representation via Self-Organizing Gaussian Grids",
        2024: the measure of smoothness of their sort.

    Example:
        >>> vad(torch.tensor([[[0.0, 3.0], [4.0, 7.0]]]))
        tensor(0.2500)
    """
    return torch.cat([d.abs().flatten() for d in _steps(grid)]).var(correction=0)


def _steps(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and below, `(D, n)` each."""
    if grid.ndim != 3 or grid.shape[1] * grid.shape[2] < 2:
        raise ValueError(f"grid: got {tuple(grid.shape)}, expected (D, H, W) with H W from 2")
    return grid.diff(dim=2).flatten(1), grid.diff(dim=1).flatten(1)
