"""Nearest neighbours by Euclidean distance, a chunk of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ENTRIES = 1 << 22
"""How many distances a chunk holds."""


@torch.no_grad()
def knn(x: Tensor, y: Tensor, k: int, *, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """The k points of `y` nearest to each point of `x`.

    Distances are square roots of sums of squared differences, not differences of products, so
    that equal points are at 0 and a pair's distance does not depend on what else is asked for.
    No gradient is tracked: where one is needed, compute the distances to `y[indices]`.

    Args:
        x: Queries, `(N, d)`.
        y: Points to search, `(M, d)`.
        k: Number of neighbours, 1 to M (to M - 1 with `exclude_self`).
        exclude_self: Whether `x` and `y` are the same points, and none is its own neighbour; an
            equal point of another index is one.

    Shape:
        - x: `(N, d)`
        - y: `(M, d)`
        - outputs: `(N, k)`

    Returns:
        Distances in ascending order, in the dtype of `x` (float32 for half precision), and int64
        indices into `y`; equal distances in ascending order of index. A NaN counts as infinitely
        far.

    Raises:
        ValueError: Shapes that don't fit, dtypes or devices that differ, or `k` out of its range.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> distances, indices = knn(x, x, 1, exclude_self=True)
        >>> distances.flatten().tolist(), indices.flatten().tolist()
        ([1.0, 1.0, 2.0], [1, 0, 1])
    """
    _check(x, y, k, exclude_self)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = y.to(wide)
    if not len(x):
        return y.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=x.device)
    found = []
    rows = max(1, _CHUNK_ENTRIES // len(y))
    for start in range(0, len(x), rows):
        queries = x[start : start + rows].to(wide)
        distances = torch.cdist(queries, y, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        if exclude_self:
            row = torch.arange(len(queries), device=x.device)
            distances[row, start + row] = torch.nan  # farther than any
        found.append(_smallest(distances, k))
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


def _smallest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest entries of each row, ties by index, and their places; NaN never counts.

    `topk` says how small the k-th is, but picks any of those that tie for it.
    """
    last = (
        distances.nan_to_num(nan=torch.inf, posinf=torch.inf).topk(k, largest=False).values[:, -1:]
    )
    nearer, level = distances < last, distances == last
    room = k - nearer.sum(-1, keepdim=True)
    chosen = nearer | (level & (level.cumsum(-1) <= room))
    indices = chosen.nonzero()[:, 1].view(-1, k)  # ascending in each row
    values, order = distances.gather(-1, indices).sort(dim=-1, stable=True)
    return values, indices.gather(-1, order)


def _check(x: Tensor, y: Tensor, k: int, exclude_self: bool) -> None:
    if x.ndim != 2:
        raise ValueError(f"x: expected (N, d), got {tuple(x.shape)}")
    if y.ndim != 2 or y.shape[1] != x.shape[1]:
        raise ValueError(f"y: expected (M, {x.shape[1]}), got {tuple(y.shape)}")
    if not x.is_floating_point() or (x.dtype, x.device) != (y.dtype, y.device):
        raise ValueError(
            f"y: expected the floating dtype and device of x, got {y.dtype} on {y.device} "
            f"for {x.dtype} on {x.device}"
        )
    if exclude_self and len(x) != len(y):
        raise ValueError(f"x: expected the {len(y)} points of y to exclude, got {len(x)}")
    most = len(y) - exclude_self
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1 to {most} neighbours, got {k}")
