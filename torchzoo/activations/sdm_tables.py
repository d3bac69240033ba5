"""Empirical distributions, one a class, as tables; and room in buffers for tables that load.

A table holds the values of each class in ascending order, `(C, L)`, filled up with infinity, and
how many there are, `(C,)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def class_table(
    values: Tensor, labels: Tensor, num_classes: int, *, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The table of values `(N,)` by labels `(N,)`, of those that are kept.

    Example:
        >>> table, counts = class_table(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 0, 1]), 3)
        >>> table.tolist(), counts.tolist()
        ([[1.0, 3.0], [2.0, inf], [inf, inf]], [2, 1, 0])
    """
    if keep is not None:
        values, labels = values[keep], labels[keep]
    counts = labels.bincount(minlength=num_classes)
    table = values.new_full((num_classes, int(counts.max())), torch.inf)
    for c in range(num_classes):
        table[c, : int(counts[c])] = values[labels == c].sort().values
    return table, counts


def cdf(table: Tensor, counts: Tensor, values: Tensor, *, saturate: bool = False) -> Tensor:
    """The share of each class's values that are below those asked for.

    Args:
        table: Sorted values, `(C, L)`.
        counts: How many there are, `(C,)`.
        values: What to compare with, `(N, C)`.
        saturate: Whether a class's largest value, and all above, give 1.

    Returns:
        Shares in [0, 1], `(N, C)`; 0 for a class without values.
    """
    below = torch.searchsorted(table, values.T.contiguous()).T
    share = below.to(table.dtype) / counts.clamp_min(1)
    if saturate and table.shape[1]:
        largest = table.gather(1, (counts - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
        share = torch.where(values >= largest, 1, share)
    return torch.where(counts > 0, share, 0)


def room_for(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, names: Sequence[str]
) -> None:
    """Give buffers the shape and dtype that they have in a state dict, before it is loaded."""
    for name in names:
        given, own = state_dict.get(prefix + name), module.get_buffer(name)
        if given is not None and given.ndim == own.ndim and given.shape != own.shape:
            setattr(module, name, own.new_zeros(given.shape))
