"""What every leaf layer of a circuit does.

A leaf layer holds `F` folds, one for each leaf region, with `K` univariate distributions (units)
each. Values come fold by fold, `(F, B)`, and log-probabilities are `(F, B, K)`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor

from torchzoo.hub import ZooModel

__all__ = ["Leaf", "blend", "draw"]


def draw(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw an index along the last axis, of chance in proportion to `probs`; never one of chance 0.

    Args:
        probs: `(..., K)`, not below 0, not all 0.
        generator: Source of randomness.

    Returns:
        `(...)`, indices.
    """
    times = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / times).argmax(-1)


class Leaf(ZooModel):
    """Base of leaf layers: `num_folds` folds of `num_units` univariate distributions.

    As argument of a circuit a leaf is a template: the circuit makes its own, with a fold for each
    leaf region. With `shared` all folds have the same parameters.

    Attributes:
        num_folds: Folds `F`.
        num_units: Units `K`.
        stored_folds: Folds that have parameters: `F`, or 1 if shared.
        num_categories: Number of values `C`, or None for continuous ones.
    """

    num_categories: int | None = None

    def __init__(self, num_folds: int, num_units: int, shared: bool) -> None:
        super().__init__()
        for name, value in (("num_folds", num_folds), ("num_units", num_units)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.num_folds, self.num_units, self.shared = num_folds, num_units, shared
        self.stored_folds = 1 if shared else num_folds

    def options(self) -> dict[str, Any]:
        """Constructor arguments that say which distributions these are."""
        return {}

    def resized(
        self,
        num_folds: int,
        num_units: int,
        *,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new leaf layer of the same distributions with other sizes."""
        sizes = {"num_folds": num_folds, "num_units": num_units, "shared": shared}
        kind: Any = type(self)  # whose constructor has more arguments than the base's
        return cast(Self, kind(**self.options(), **sizes, device=device, dtype=dtype))

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise at random, so that units differ."""

    @abstractmethod
    def invalid(self, x: Tensor) -> Tensor:
        """Which values the distributions can't have, by their value."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """`(F, B, K)`, log-probability (or density) of the values `(F, B)`."""

    def log_prob_chunks(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """`log_prob` of consecutive folds, so many at a time, each in memory of its own."""
        return list(self.log_prob(x).split(list(sizes)))

    @abstractmethod
    def log_cdf(self, x: Tensor) -> Tensor:
        """`(F, B, K)`, log of the chance to be strictly less than the values `(F, B)`."""

    @abstractmethod
    def log_prob_soft(self, log_w: Tensor) -> Tensor:
        """`(F, B, K)`, `log sum_c p(c) w(c)` for the log-weights `(F, B, C)` of values."""

    @abstractmethod
    def mean(self) -> Tensor:
        """`(F, K)`, expected value."""

    @abstractmethod
    def variance(self) -> Tensor:
        """`(F, K)`, variance."""

    def second_moment(self) -> Tensor:
        """`(F, K)`, expected square."""
        return self.variance() + self.mean().square()

    @abstractmethod
    def mode(self) -> Tensor:
        """`(F, K)`, the likeliest value."""

    @abstractmethod
    def max_log_prob(self) -> Tensor:
        """`(F, K)`, log-probability of the mode."""

    @abstractmethod
    def sample(self, units: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`(F, N)`, a value drawn from the given units `(F, N)`."""

    @abstractmethod
    def inner(self, other: Leaf) -> Tensor:
        """`(F, K, K')`, `log sum_x p_k(x) q_k'(x)` (an integral for densities)."""

    def shared_support(self) -> Tensor:
        """`(F, K, K)`, 1 for pairs of units that have a possible value in common, else 0."""
        weight = next(self.parameters())
        return weight.new_ones(self.num_folds, self.num_units, self.num_units)

    @abstractmethod
    def product(self, other: Leaf) -> Leaf:
        """The leaf of `K K'` units that are in proportion to `p_k q_k'`."""

    @abstractmethod
    def statistics(self, x: Tensor, flow: Tensor) -> Tensor:
        """Sufficient statistics of values `(F, B)`, each weighted by `flow` `(F, B, K)`."""

    @abstractmethod
    def soft_statistics(self, log_w: Tensor, flow: Tensor) -> Tensor:
        """`statistics` where log-weights `(F, B, C)` of the values are all that is known."""

    @abstractmethod
    def update(self, statistics: Tensor, pseudocount: float | Tensor, step_size: float) -> None:
        """Move `step_size` of the way to the most likely parameters; units of no weight stay."""

    @abstractmethod
    def fit_noisily(self, x: Tensor, noise: float, generator: torch.Generator | None) -> None:
        """Start all units at the distribution of the values `(F, N)`, times noise to part them."""

    def extra_repr(self) -> str:
        """Sizes in short."""
        own = [f"{key}={value}" for key, value in self.options().items()]
        sizes = [f"num_folds={self.num_folds}", f"num_units={self.num_units}"]
        return ", ".join(own + sizes + ["shared=True"] * self.shared)


def blend(old: Tensor, counts: Tensor, dim: int | tuple[int, ...], step_size: float) -> Tensor:
    """`(1 - step_size) old + step_size counts / sum(counts)` where the sum is above 0, else old."""
    total = counts.sum(dim, keepdim=True)
    new = counts / total.clamp_min(torch.finfo(counts.dtype).tiny)
    return torch.where(total > 0, old + step_size * (new - old), old)
