"""Discretised logistic leaves of a circuit, for ordered values such as grey levels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.circuits.finite_leaf import FiniteLeaf

__all__ = ["DiscretizedLogisticLeaf"]

HALVINGS = 6
"""How often a step that lowers the likelihood is halved before it is given up."""


class DiscretizedLogisticLeaf(FiniteLeaf):
    """Logistic distributions over the unit interval, cut into bins; the outer ones are open.

    `p(c) = sigmoid((e_(c+1) - loc) / scale) - sigmoid((e_c - loc) / scale)` with the edges
    `e_c = c / C`, and minus and plus infinity at the two ends.

    Args:
        num_bins: Number of bins `C`; values are 0 to `C - 1`.
        num_folds: Folds; a circuit sets it, like `num_units` and `shared`.
        num_units: Units of a fold.
        shared: Whether all folds have the same parameters.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        loc: `(F, K)`, centre in the unit interval.
        log_scale: `(F, K)`.

    Raises:
        ValueError: A size below 1, or fewer than 2 bins.

    Source:
        Salimans, Karpathy, Chen and Kingma, "PixelCNN++: Improving the PixelCNN with Discretized
        Logistic Mixture Likelihood and Other Modifications", 2017, eq. (2).

    Example:
        >>> leaf = DiscretizedLogisticLeaf(256, num_folds=2)
        >>> leaf.log_table().exp().sum(1)
        tensor([[1.0000],
                [1.0000]], grad_fn=<SumBackward1>)
    """

    def __init__(
        self,
        num_bins: int,
        *,
        num_folds: int = 1,
        num_units: int = 1,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_folds, num_units, shared)
        if num_bins < 2:
            raise ValueError(f"num_bins: got {num_bins}, expected at least 2")
        self.num_categories = num_bins
        size = (self.stored_folds, num_units)
        self.loc = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def options(self) -> dict[str, Any]:
        """See `Leaf.options`."""
        return {"num_bins": self.num_categories}

    def reset_parameters(self) -> None:
        """Draw centres uniformly from the unit interval; scales are 0.1."""
        nn.init.uniform_(self.loc)
        nn.init.constant_(self.log_scale, math.log(0.1))

    def log_table(self) -> Tensor:
        """See `FiniteLeaf.log_table`."""
        return _log_table(self.loc, self.log_scale, self.num_categories)

    @torch.no_grad()
    def fit_counts(self, counts: Tensor, step_size: float) -> None:
        """See `FiniteLeaf.fit_counts`: towards the moments, as far as the likelihood rises.

        There is no closed form. The step goes to the logistic distribution with the mean and the
        variance of the counts, and is halved where it would lower their likelihood.
        """
        total = counts.sum(1)
        weight = counts / total.clamp_min(torch.finfo(counts.dtype).tiny)[:, None]
        bins = self.num_categories
        centres = (torch.arange(bins, device=counts.device, dtype=counts.dtype) + 0.5) / bins
        mean = (weight * centres[:, None]).sum(1)
        var = (weight * (centres[:, None] - mean[:, None]).square()).sum(1)
        scale = (var + 1 / (12 * bins**2)).sqrt() * math.sqrt(3) / math.pi
        best = (weight * self.log_table()).sum(1)
        loc, log_scale = self.loc.clone(), self.log_scale.clone()
        waiting, step = total > 0, step_size
        for _ in range(HALVINGS):
            new_loc = loc + step * (mean - loc)
            new_scale = log_scale + step * (scale.log() - log_scale)
            score = (weight * _log_table(new_loc, new_scale, bins)).sum(1)
            better = waiting & (score > best)
            self.loc.copy_(torch.where(better, new_loc, self.loc))
            self.log_scale.copy_(torch.where(better, new_scale, self.log_scale))
            waiting, step = waiting & ~better, step / 2


def _log_table(loc: Tensor, log_scale: Tensor, bins: int) -> Tensor:
    """`(F, C, K)`, from `sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))`."""
    edges = torch.arange(1, bins, device=loc.device, dtype=loc.dtype)[:, None] / bins
    scale = log_scale.exp()[:, None]
    at = (edges - loc[:, None]) / scale
    upper, lower = F.logsigmoid(at), F.logsigmoid(-at)
    inside = torch.log(-torch.expm1(-1 / (bins * scale)))
    middle = upper[:, 1:] + lower[:, :-1] + inside
    return torch.cat([upper[:, :1], middle, lower[:, -1:]], 1)
