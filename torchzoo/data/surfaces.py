"""Surfaces in space as points of even density: a sphere, a torus and a rolled-up sheet."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAJOR, MINOR = 1.0, 0.4  # radii of the torus
PITCH, TURNS, WIDTH = 0.1, (1.0, 4.0), 1.0  # of the sheet; turns in half circles


class Surface(NamedTuple):
    """Points of a surface, and where they are on it.

    Attributes:
        name: `"sphere"`, `"torus"` or `"folded sheet"`.
        points: `(n, 3)`
        chart: Coordinates along the surface, `(n, 2)`; for the sphere longitude and latitude.
    """

    name: str
    points: Tensor
    chart: Tensor


def sample_surface(name: str, count: int, *, generator: torch.Generator) -> Surface:
    """Draw points of a surface, uniform by area, in float64.

    The sphere has radius 1, the torus radii 1 and 0.4. The sheet is an Archimedean spiral of one
    and a half turns, 1 wide, its layers `0.2 pi` apart.

    Args:
        name: `"sphere"`, `"torus"` or `"folded sheet"`.
        count: Number of points.
        generator: A generator of the processor.

    Raises:
        ValueError: An unknown name.

    Example:
        >>> ball = sample_surface("sphere", 5, generator=torch.Generator().manual_seed(0))
        >>> ball.points.norm(dim=1).round(decimals=6).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    share = torch.rand(count, 2, dtype=torch.float64, generator=generator)
    u, v = share.unbind(1)
    if name == "sphere":
        z = 2 * v - 1
        u, flat = 2 * math.pi * u, (1 - z**2).sqrt()
        points = torch.stack([flat * u.cos(), flat * u.sin(), z], 1)
        return Surface(name, points, torch.stack([u, z.asin()], 1))
    if name == "torus":
        tube = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64)
        v = _interpolate(v, tube * MAJOR + MINOR * tube.sin(), tube)
        u, out = 2 * math.pi * u, MAJOR + MINOR * v.cos()
        points = torch.stack([out * u.cos(), out * u.sin(), MINOR * v.sin()], 1)
        return Surface(name, points, torch.stack([MAJOR * u, MINOR * v], 1))
    if name == "folded sheet":
        angle = math.pi * torch.linspace(*TURNS, 2001, dtype=torch.float64)
        length = PITCH / 2 * (angle * (1 + angle**2).sqrt() + angle.asinh())
        along = _interpolate(u, length, angle)
        radius = PITCH * along
        points = torch.stack([radius * along.cos(), WIDTH * v, radius * along.sin()], 1)
        distance = length[0] + u * (length[-1] - length[0])
        return Surface(name, points, torch.stack([distance, WIDTH * v], 1))
    raise ValueError(f"name: expected 'sphere', 'torus' or 'folded sheet', got {name!r}")


def triangulate(surface: Surface) -> Tensor:
    """Triangles whose corners are the points of a surface.

    Shape:
        - output: `(F, 3)`, integers

    Example:
        >>> torus = sample_surface("torus", 60, generator=torch.Generator().manual_seed(0))
        >>> len(triangulate(torus))  # two for each point
        120
    """
    from scipy.spatial import ConvexHull, Delaunay

    count = len(surface.points)
    if surface.name == "sphere":
        return torch.from_numpy(ConvexHull(surface.points.numpy()).simplices).long()
    chart = surface.chart.numpy()
    if surface.name == "folded sheet":
        return torch.from_numpy(Delaunay(chart).simplices).long()
    periods = 2 * math.pi * np.array([MAJOR, MINOR])
    shifts = [np.array([i, j]) for i in (0, -1, 1) for j in (0, -1, 1)]
    tiled = np.concatenate([chart + shift * periods for shift in shifts])
    return torch.from_numpy(_once(Delaunay(tiled).simplices, tiled, count, periods)).long()


def _once(faces: Any, tiled: Any, count: int, periods: Any) -> Any:
    """Of the triangles of a tiling, those whose centre lies in the first tile, corners modulo."""
    centres = tiled[faces].mean(1)
    inside = ((centres >= 0) & (centres < periods)).all(1)
    return faces[inside] % count


def _interpolate(share: Tensor, cumulative: Tensor, values: Tensor) -> Tensor:
    """Invert a cumulative distribution that is known on a grid, up to its scale."""
    low, high = cumulative[0], cumulative[-1]
    found = np.interp((low + share * (high - low)).numpy(), cumulative.numpy(), values.numpy())
    return torch.from_numpy(found)
