"""Sums over the two values of a concept, and the probabilities of concepts that they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Decisions", "check_box", "check_probabilities", "decision_levels", "log_leaves"]


class Decisions(nn.Module):
    """Sums of one height, each over the two values of a variable.

    Args:
        variable: For each sum its variable.
        child: For each sum and value the places of the sums that are multiplied in.
        device: Device of the indices.

    Shape:
        - values: `(M, B)`, log-values of all earlier sums
        - leaves: `(L, 2, B)`, log-probabilities of the values
        - output: `(S, 2, B)`, the two terms without their weights
    """

    variable: Tensor
    child: Tensor

    def __init__(
        self,
        variable: list[int],
        child: list[list[list[int]]],
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        shape = (len(child), 2, -1 if child[0][0] else 0)
        places = torch.tensor(child, device=device, dtype=torch.int64).reshape(shape)
        self.register_buffer("variable", torch.tensor(variable, device=device), persistent=False)
        self.register_buffer("child", places, persistent=False)

    def forward(self, values: Tensor, leaves: Tensor) -> Tensor:
        """The terms."""
        terms = leaves.index_select(0, self.variable)
        below = values.index_select(0, self.child.flatten())
        return terms + below.unflatten(0, self.child.shape).sum(2)


def decision_levels(
    sums: Sequence[tuple[int, list[list[int]]]],
    heights: Sequence[int],
    device: torch.device | str | None = None,
) -> nn.ModuleList:
    """Sums put together by their height, lowest first.

    Args:
        sums: Variable and children (for each value) of each sum; place 0 is the empty product.
        heights: Their heights.
        device: Device of the indices.
    """
    levels = nn.ModuleList()
    for height in range(max(heights) + 1):
        level = [own for own, h in zip(sums, heights, strict=True) if h == height]
        most = max(len(child[0]) for _, child in level)
        child = [[c + [0] * (most - len(c)) for c in pair] for _, pair in level]
        levels.append(Decisions([variable for variable, _ in level], child, device))
    return levels


def log_leaves(pi: Tensor) -> Tensor:
    """`(..., 2)`, logarithms of `1 - pi` and `pi`, kept finite."""
    both = torch.stack([1 - pi, pi], -1)
    return both.clamp_min(torch.finfo(pi.dtype).tiny).log()


def check_probabilities(name: str, value: Tensor, size: int) -> None:
    """Refuse what are no probabilities of `size` concepts; compiled graphs check shapes only."""
    if value.dim() == 0 or value.shape[-1] != size or not value.is_floating_point():
        got = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"{name}: got {got}, expected floats of shape (*, {size})")
    if torch.compiler.is_compiling() or value.device.type == "meta" or not value.numel():
        return
    low, high = value.detach().aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name}: got values from {low.item():.6g} to {high.item():.6g}, expected "
            "probabilities in [0, 1]"
        )


def check_box(lo: Tensor, hi: Tensor, size: int) -> None:
    """Refuse what is no box of probabilities."""
    check_probabilities("lo", lo, size)
    check_probabilities("hi", hi, size)
    if lo.shape != hi.shape:
        raise ValueError(f"hi: got shape {tuple(hi.shape)}, expected that of lo {tuple(lo.shape)}")
    if (lo > hi).any():
        raise ValueError("lo: got a lower end above the upper one, expected lo <= hi")
