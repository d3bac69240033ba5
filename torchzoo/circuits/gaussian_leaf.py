"""Gaussian leaves of a circuit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.circuits.leaf import Leaf

__all__ = ["GaussianLeaf"]

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class GaussianLeaf(Leaf):
    """Gaussian leaves with mean `loc` and standard deviation `min_std + exp(log_std)`.

    Args:
        min_std: Lower bound of the standard deviation, which keeps the likelihood finite.
        num_folds: Folds; a circuit sets it, like `num_units` and `shared`.
        num_units: Units of a fold.
        shared: Whether all folds have the same parameters.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        loc: `(F, K)`, means.
        log_std: `(F, K)`.

    Raises:
        ValueError: A size below 1, or `min_std` below 0.

    Example:
        >>> leaf = GaussianLeaf(num_folds=2, num_units=3)
        >>> leaf.log_prob(torch.randn(2, 5)).shape
        torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        min_std: float = 1e-3,
        *,
        num_folds: int = 1,
        num_units: int = 1,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_folds, num_units, shared)
        if min_std < 0:
            raise ValueError(f"min_std: got {min_std}, expected at least 0")
        self.min_std = min_std
        size = (self.stored_folds, num_units)
        self.loc = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.log_std = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def options(self) -> dict[str, Any]:
        """See `Leaf.options`."""
        return {"min_std": self.min_std}

    def reset_parameters(self) -> None:
        """Draw means from N(0, 1); standard deviations are `min_std + 1`."""
        nn.init.normal_(self.loc)
        nn.init.zeros_(self.log_std)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(F, K)`."""
        std = self.min_std + self.log_std.exp()
        size = (self.num_folds, self.num_units)
        return self.loc.expand(size), std.expand(size)

    def _standardised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, std = self._moments()
        return (x.to(loc)[..., None] - loc[:, None]) / std[:, None], std[:, None]

    def invalid(self, x: Tensor) -> Tensor:
        """NaN and infinities."""
        return ~x.isfinite()

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Leaf.log_prob`."""
        z, std = self._standardised(x)
        return -0.5 * z.square() - std.log() - LOG_SQRT_2PI

    def log_cdf(self, x: Tensor) -> Tensor:
        """See `Leaf.log_cdf`."""
        return torch.special.log_ndtr(self._standardised(x)[0])

    def log_prob_soft(self, log_w: Tensor) -> Tensor:
        """Soft evidence is for leaves of finitely many values: raises."""
        raise ValueError("log_w: got soft evidence, expected none for Gaussian leaves")

    def mean(self) -> Tensor:
        """See `Leaf.mean`."""
        return self._moments()[0]

    def variance(self) -> Tensor:
        """See `Leaf.variance`."""
        return self._moments()[1].square()

    def mode(self) -> Tensor:
        """See `Leaf.mode`."""
        return self._moments()[0]

    def max_log_prob(self) -> Tensor:
        """See `Leaf.max_log_prob`."""
        return -self._moments()[1].log() - LOG_SQRT_2PI

    def sample(self, units: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `Leaf.sample`."""
        loc, std = (value.gather(1, units) for value in self._moments())
        return loc + std * torch.empty_like(loc).normal_(generator=generator)

    def inner(self, other: Leaf) -> Tensor:
        """See `Leaf.inner`: the density of `N(loc, var + var')` at `loc'`."""
        (loc, std), (loc2, std2) = self._moments(), _moments_of(other, self)
        var = std[..., None].square() + std2[:, None].square()
        gap = loc[..., None] - loc2[:, None]
        return -0.5 * gap.square() / var - 0.5 * var.log() - LOG_SQRT_2PI

    @torch.no_grad()
    def product(self, other: Leaf) -> GaussianLeaf:
        """See `Leaf.product`: a product of Gaussian densities is one, up to a constant."""
        (loc, std), (loc2, std2) = self._moments(), _moments_of(other, self)
        precision, precision2 = std.pow(-2)[..., None], std2.pow(-2)[:, None]
        total = (precision + precision2).flatten(1)
        mean = (precision * loc[..., None] + precision2 * loc2[:, None]).flatten(1) / total
        leaf = GaussianLeaf(0.0, num_folds=self.num_folds, num_units=mean.shape[1]).to(mean)
        leaf.set_moments(mean, total.rsqrt())
        return leaf

    @torch.no_grad()
    def set_moments(self, mean: Tensor, std: Tensor) -> None:
        """Set means and standard deviations `(F, K)`, the latter to `min_std` where below it."""
        self.loc.copy_(mean)
        self.log_std.copy_((std - self.min_std).clamp_min(1e-4 * self.min_std).log())

    def statistics(self, x: Tensor, flow: Tensor) -> Tensor:
        """See `Leaf.statistics`: `(3, F, K)`, weight and first two moments about the mean."""
        loc = self.loc.detach()[:, None]
        gap = x.to(loc)[..., None] - loc
        found = torch.stack([(flow * power).sum(1) for power in (gap**0, gap, gap**2)])
        return found.sum(1, keepdim=True) if self.shared else found

    def soft_statistics(self, log_w: Tensor, flow: Tensor) -> Tensor:
        """Soft evidence is for leaves of finitely many values: raises."""
        return self.log_prob_soft(log_w)

    @torch.no_grad()
    def update(self, statistics: Tensor, pseudocount: float | Tensor, step_size: float) -> None:
        """See `Leaf.update`; `pseudocount` observations of the present distribution are added."""
        if isinstance(pseudocount, Tensor):
            raise ValueError("leaf_pseudocount: got a tensor, expected a number for GaussianLeaf")
        var = (self.min_std + self.log_std.exp()).square()
        weight, first, second = statistics
        weight, second = weight + pseudocount, second + pseudocount * var
        safe = weight.clamp_min(torch.finfo(weight.dtype).tiny)
        shift = step_size * first / safe
        square = var + step_size * (second / safe - var)
        seen = weight > 0
        std = torch.where(seen, (square - shift.square()).clamp_min(0), var).sqrt()
        self.set_moments(torch.where(seen, self.loc + shift, self.loc), std)

    @torch.no_grad()
    def fit_noisily(self, x: Tensor, noise: float, generator: torch.Generator | None) -> None:
        """See `Leaf.fit_noisily`: means are moved by `noise` standard deviations times N(0, 1)."""
        x = x.to(self.loc)
        x = x.reshape(1, -1) if self.shared else x
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True, correction=0)
        shift = torch.randn(self.loc.shape, generator=generator, device=x.device).to(x)
        self.set_moments(mean + noise * std * shift, std.expand_as(shift))


def _moments_of(leaf: Leaf, like: GaussianLeaf) -> tuple[Tensor, Tensor]:
    """Moments of a leaf that must be Gaussian with as many folds as `like`."""
    if not isinstance(leaf, GaussianLeaf) or leaf.num_folds != like.num_folds:
        raise ValueError(f"other: got {leaf!r}, expected Gaussian leaves like {like!r}")
    return leaf._moments()
