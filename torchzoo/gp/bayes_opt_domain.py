"""Where an optimiser may look: a box or a finite set, with fidelities or without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchzoo.gp.acquisition_optimize import check_bounds, check_points, sobol_points


@dataclass(frozen=True)
class Domain:
    """A box, and perhaps a finite set of its points.

    Attributes:
        bounds: Lower and upper ends, `(2, d)`.
        candidates: The points, `(M, d)`; None: all of the box.
        levels: Fidelities, rising; the last one counts.
        seed: Of the Sobol points.

    Raises:
        ValueError: Bounds or candidates of a wrong shape, or candidates outside of the bounds.

    Example:
        >>> domain = Domain(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), levels=(0.5, 1.0))
        >>> domain.spread(3).shape, domain.initial(0, 3)[:, 2]
        (torch.Size([3, 2]), tensor([0.5000, 1.0000, 0.5000], dtype=torch.float64))
    """

    bounds: Tensor
    candidates: Tensor | None = None
    levels: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        if self.candidates is not None:
            check_points("candidates", self.candidates, self.bounds)

    @property
    def box(self) -> Tensor | None:
        """The bounds, if there are no candidates."""
        return self.bounds if self.candidates is None else None

    def spread(self, count: int) -> Tensor:
        """The first so many Sobol points or candidates, around and around, `(count, d)`."""
        if self.candidates is not None:
            return self.candidates[torch.arange(count) % len(self.candidates)]
        return sobol_points(self.bounds, count, self.seed)

    def initial(self, n: int, q: int) -> Tensor:
        """Points of the initial design from the n-th on, `(q, d)`; fidelities take turns."""
        chosen = self.spread(n + q)[n:]
        if not self.levels:
            return chosen
        levels = chosen.new_tensor(self.levels)
        return torch.cat([chosen, levels[torch.arange(n, n + q) % len(levels), None]], 1)

    def grid(self, x: Tensor, count: int) -> Tensor:
        """A finite set that stands for the domain, points x among it."""
        if self.candidates is not None:
            return self.candidates
        return torch.cat([x, self.spread(count)]).unique(dim=0)

    def at_top(self, x: Tensor) -> Tensor:
        """Points with the fidelity that counts, if there are any."""
        if not self.levels:
            return x
        return torch.cat([x, torch.full_like(x[..., :1], self.levels[-1])], -1)
