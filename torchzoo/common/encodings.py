"""Encodings of coordinates, for networks that see more in them than the numbers themselves."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HashGridEncoding"]

_PRIMES = (1, 2654435761, 805459861, 3674653429, 2097192037, 1434869437, 2165219737)
"""One factor a coordinate in the spatial hash of Müller et al., 2022, equation 4."""


class HashGridEncoding(nn.Module):
    """Features of a point from grids of rising resolution, whose corners share tables by hashing.

    Level l is a grid of `n_l = floor(base · growth^l)` cells a side. A point gets, from each level,
    the features of its cell's corners, weighted linearly in each coordinate. A level whose
    `(n_l + 1)^d` corners fit into the table has an entry for each corner; in larger ones corner v
    takes entry `(v_1 p_1 xor … xor v_d p_d) mod T`, which others may share. The result is
    continuous, and differentiable once in table and points.

    Args:
        in_dim: Number d of coordinates, 1 to 7.
        levels: Number L of grids.
        features: Numbers F an entry.
        log2_table: Entries T of the largest tables, as a power of 2.
        base: Cells a side of the coarsest grid.
        growth: What each grid is finer by.
        device: Device of the table.
        dtype: Type of the table.

    Shape:
        - x: `(..., d)`, from 0 to 1; outside it counts as the nearest point of the cube
        - output: `(..., L · F)`, level after level

    Attributes:
        resolutions: `n_l` of each level.
        table: `(entries, F)`, level after level.

    Returns:
        The features.

    Raises:
        ValueError: An option out of its range, or points of the wrong shape or type.

    Source:
        Müller, Evans, Schied, Keller, "Instant Neural Graphics Primitives with a Multiresolution
        Hash Encoding", 2022, equations 2 to 4; tables are drawn from U(-1e-4, 1e-4) as there.

    Example:
        >>> encoding = HashGridEncoding(3, levels=4, log2_table=10)
        >>> encoding(torch.rand(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        in_dim: int,
        *,
        levels: int = 16,
        features: int = 2,
        log2_table: int = 19,
        base: int = 16,
        growth: float = 1.447,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= in_dim <= len(_PRIMES):
            raise ValueError(f"in_dim: got {in_dim}, expected 1 to {len(_PRIMES)}")
        for name, value in (("levels", levels), ("features", features), ("base", base)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if not 0 <= log2_table <= 30:
            raise ValueError(f"log2_table: got {log2_table}, expected 0 to 30")
        if not 1 <= growth < math.inf:
            raise ValueError(f"growth: got {growth}, expected at least 1")
        self.in_dim, self.levels, self.features = in_dim, levels, features
        self.log2_table, self.base, self.growth = log2_table, base, growth
        self.resolutions = tuple(math.floor(base * growth**level) for level in range(levels))
        if self.resolutions[-1] > 1 << 30:
            raise ValueError(f"growth: got {growth}, expected at most 2^30 cells a side")
        self.sizes = tuple(min((n + 1) ** in_dim, 1 << log2_table) for n in self.resolutions)
        self.table = nn.Parameter(
            torch.empty(sum(self.sizes), features, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from U(-1e-4, 1e-4)."""
        nn.init.uniform_(self.table, -1e-4, 1e-4)

    def is_dense(self, level: int) -> bool:
        """Whether each corner of a level has an entry of its own."""
        return cast(int, (self.resolutions[level] + 1) ** self.in_dim) <= 1 << self.log2_table

    def indices(self, corners: Tensor, level: int) -> Tensor:
        """Rows of the level's part of the table.

        Args:
            corners: Integer coordinates of grid points, from 0 to the level's resolution.
            level: Which grid.

        Shape:
            - corners: `(..., d)`, int64
            - output: `(...,)`, int64
        """
        parts = corners.unbind(-1)
        if self.is_dense(level):
            side = self.resolutions[level] + 1
            return sum((part * side**i for i, part in enumerate(parts)), torch.zeros_like(parts[0]))
        index = parts[0]
        for part, prime in zip(parts[1:], _PRIMES[1:], strict=False):
            index = index ^ part * prime
        return index & (1 << self.log2_table) - 1

    def forward(self, x: Tensor) -> Tensor:
        """Features `(..., L · F)` of points `(..., d)`; see the class."""
        if x.dim() < 1 or x.shape[-1] != self.in_dim:
            raise ValueError(f"x: got {tuple(x.shape)}, expected (..., {self.in_dim})")
        if not x.is_floating_point():
            raise ValueError(f"x: got {x.dtype}, expected floating point")
        x = x.to(self.table.dtype).clamp(0, 1)
        offsets = list(itertools.product((0, 1), repeat=self.in_dim))
        upper = torch.tensor(offsets, device=x.device)
        encoded, first = [], 0
        for level, (n, size) in enumerate(zip(self.resolutions, self.sizes, strict=True)):
            place = x * n
            cell = place.detach().long().clamp(0, n - 1)  # the last cell holds its far border
            part = (place - cell)[..., None, :]
            weight = torch.where(upper == 1, part, 1 - part).prod(-1)
            rows = self.indices(cell[..., None, :] + upper, level) + first
            encoded.append((weight[..., None] * F.embedding(rows, self.table)).sum(-2))
            first += size
        return torch.cat(encoded, -1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"{self.in_dim}, levels={self.levels}, features={self.features}, "
            f"log2_table={self.log2_table}, base={self.base}, growth={self.growth}"
        )
