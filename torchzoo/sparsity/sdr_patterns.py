"""Sparse binary patterns by the indices of their active cells: drawn, mixed, compared and packed.

The sets that Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?",
2016, reason about. A batch of patterns that differ in their number of active cells is padded with
the index n, one past the last cell, which counts nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class SDR:
    """Patterns of n binary cells of which few are active, as sorted indices.

    Args:
        n: Cells.
        indices: Active cells of each pattern, in any order, without repeats; n is padding.

    Shape:
        - indices: `(..., a)`, integers in 0..n

    Raises:
        ValueError: n below 1, or indices that are not integers, out of range or repeated.

    Source:
        Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?", 2016.

    Example:
        >>> one = SDR(8, torch.tensor([5, 1, 2]))
        >>> one, one.overlap(SDR(8, torch.tensor([2, 3, 5])))
        (SDR(n=8, shape=(), active=3), tensor(2))
    """

    def __init__(self, n: int, indices: Tensor):
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        if indices.ndim == 0 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(
                f"indices: expected integers (..., a), got {indices.dtype} {tuple(indices.shape)}"
            )
        if ((indices < 0) | (indices > n)).any():
            raise ValueError(f"indices: expected cells 0..{n - 1}, or {n} as padding, got others")
        self.n = n
        self.indices = indices.long().sort(-1).values
        if ((self.indices.diff(dim=-1) == 0) & (self.indices[..., 1:] < n)).any():
            raise ValueError("indices: expected distinct cells in each pattern, got repeated ones")

    @property
    def shape(self) -> torch.Size:
        """The shape of the batch of patterns."""
        return self.indices.shape[:-1]

    @property
    def active(self) -> Tensor:
        """Number of active cells of each pattern, `(...)`."""
        return (self.indices < self.n).sum(-1)

    def __repr__(self) -> str:
        most = self.indices.shape[-1]
        return f"SDR(n={self.n}, shape={tuple(self.shape)}, active={most})"

    def __getitem__(self, place: int | slice | Tensor) -> Self:
        """Some of the patterns of a batch, by the first dimension."""
        if not self.shape:
            raise ValueError("place: expected a batch of patterns, got a single one")
        return type(self)(self.n, self.indices[place])

    @classmethod
    def random(
        cls,
        n: int,
        a: int,
        shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Self:
        """Uniformly random patterns with a of n cells active.

        Raises:
            ValueError: a not in 0..n.
        """
        _within("a", a, n)
        return cls(n, _random_subset(n, a, shape, generator))

    @classmethod
    def from_dense(cls, dense: Tensor) -> Self:
        """From bool cells `(..., n)`."""
        if dense.dtype != torch.bool or dense.ndim == 0:
            raise ValueError(f"dense: expected bool (..., n), got {dense.dtype}, {dense.ndim}-d")
        n = dense.shape[-1]
        cells = torch.arange(n, device=dense.device)
        return cls(n, _trim(cells.where(dense, n), n))

    @classmethod
    def topk(cls, x: Tensor, k: int) -> Self:
        """The k cells with the largest values of `x` `(..., n)`."""
        _within("k", k, x.shape[-1])
        return cls(x.shape[-1], x.topk(k, -1).indices)

    @classmethod
    def from_bits(cls, n: int, bits: Tensor) -> Self:
        """The inverse of `bits`.

        Raises:
            ValueError: Other than ceil(n / 64) words, or a cell above n.
        """
        words = -(-n // 64)
        if bits.shape[-1:] != (words,):
            raise ValueError(f"bits: expected (..., {words}) words, got {tuple(bits.shape)}")
        shifts = torch.arange(64, device=bits.device)
        dense = (bits.view(torch.int64).unsqueeze(-1) >> shifts & 1).bool().flatten(-2)
        if dense[..., n:].any():
            raise ValueError(f"bits: expected no cell above {n - 1}, got some")
        return cls.from_dense(dense[..., :n])

    def to_dense(self) -> Tensor:
        """Bool cells `(..., n)`."""
        dense = torch.zeros((*self.shape, self.n + 1), dtype=torch.bool, device=self.indices.device)
        return dense.scatter(-1, self.indices, True)[..., : self.n]

    def bits(self) -> Tensor:
        """Cells packed into `(..., ceil(n / 64))` words of uint64, cell 0 in the lowest bit."""
        dense = torch.nn.functional.pad(self.to_dense(), (0, -self.n % 64))
        words = dense.unflatten(-1, (-1, 64)).long()
        shifts = torch.arange(64, device=dense.device)
        return (words << shifts).sum(-1).view(torch.uint64)

    def overlap(self, other: SDR) -> Tensor:
        """Number of cells active in both, `(...)` as the batches broadcast.

        Raises:
            ValueError: The patterns have other numbers of cells.
        """
        _same_cells(self, other)
        shape = torch.broadcast_shapes(self.shape, other.shape)
        mine, theirs = (s.indices.expand(*shape, -1).contiguous() for s in (self, other))
        if not theirs.shape[-1]:
            return torch.zeros(shape, dtype=torch.int64, device=mine.device)
        place = torch.searchsorted(theirs, mine).clamp_max(theirs.shape[-1] - 1)
        return ((theirs.gather(-1, place) == mine) & (mine < self.n)).sum(-1)

    def noise(self, eta: float, generator: torch.Generator | None = None) -> Self:
        """Replace round(eta a) of the active cells by cells outside the pattern, at random.

        Raises:
            ValueError: eta not in [0, 1], patterns with different numbers of active cells, or too
                few cells outside them.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected a number in [0, 1], got {eta}")
        if (self.indices == self.n).any():
            raise ValueError("eta: expected patterns with equally many active cells, got padding")
        a = self.indices.shape[-1]
        lost = round(eta * a)
        if lost > self.n - a:
            raise ValueError(f"eta: expected at most {self.n - a} new cells, got {lost}")
        kept = self.subsample(a - lost, generator).indices
        # the r-th cell outside the pattern is r plus the number of active cells below it
        rank = _random_subset(self.n - a, lost, self.shape, generator).to(self.indices.device)
        below = self.indices - torch.arange(a, device=rank.device)
        new = rank + torch.searchsorted(below.contiguous(), rank.contiguous(), right=True)
        return type(self)(self.n, torch.cat([kept, new], -1))

    def union(self, dim: int = -1) -> Self:
        """The cells active in any of the patterns along a batch dimension.

        Raises:
            ValueError: No such dimension.
        """
        if not -len(self.shape) <= dim < len(self.shape):
            raise ValueError(f"dim: expected a dimension of {tuple(self.shape)}, got {dim}")
        cells = self.indices.movedim(dim % len(self.shape), -2).flatten(-2).sort(-1).values
        again = torch.nn.functional.pad(cells.diff(dim=-1) == 0, (1, 0))
        return type(self)(self.n, _trim(cells.masked_fill(again, self.n), self.n))

    def subsample(self, s: int, generator: torch.Generator | None = None) -> Self:
        """A random s of the active cells of each pattern.

        Raises:
            ValueError: s not in 0..a for some pattern.
        """
        fewest = int(self.active.min()) if self.active.numel() else self.indices.shape[-1]
        _within("s", s, fewest)
        device = generator.device if generator else self.indices.device
        keys = torch.rand(self.indices.shape, generator=generator, device=device)
        keys = keys.to(self.indices.device).masked_fill(self.indices == self.n, -1.0)
        return type(self)(self.n, self.indices.gather(-1, keys.topk(s, -1).indices))


def _random_subset(
    n: int, a: int, shape: Sequence[int], generator: torch.Generator | None
) -> Tensor:
    """Uniformly random a of n numbers, `(*shape, a)`.

    Few of many: Floyd's algorithm, which takes j itself where a draw from 0..j is taken already.
    Else the largest of n random keys.
    """
    device = generator.device if generator else None
    if a * a > 16 * n:
        return torch.rand((*shape, n), generator=generator, device=device).topk(a, -1).indices
    taken = torch.full((*shape, a), -1, dtype=torch.int64, device=device)
    for place, last in enumerate(range(n - a, n)):
        draw = torch.randint(0, last + 1, tuple(shape), generator=generator, device=device)
        repeated = (taken[..., :place] == draw.unsqueeze(-1)).any(-1)
        taken[..., place] = draw.masked_fill(repeated, last)
    return taken


def _trim(cells: Tensor, n: int) -> Tensor:
    """Sort and drop the columns that hold nothing but padding."""
    cells = cells.sort(-1).values
    return cells[..., : int((cells < n).sum(-1).max()) if cells.numel() else 0]


def _same_cells(one: SDR, other: SDR) -> None:
    if one.n != other.n:
        raise ValueError(f"other: expected patterns of {one.n} cells, got {other.n}")


def _within(name: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"{name}: expected 0 to {most}, got {value}")
