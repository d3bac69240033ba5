"""Acquisition functions averaged over models, which differ in their hyperparameters.

With hyperparameters theta_1, ..., theta_S drawn from their posterior given data D,

    E[acq(x; theta) given D] = sum_s acq(x; theta_s) / S,

which is the fully Bayesian acquisition function: what is uncertain of the hyperparameters counts,
which it doesn't at their mode. It is not the acquisition function of the averaged posterior.

J. Snoek, H. Larochelle and R. P. Adams, "Practical Bayesian optimization of machine learning
algorithms", 2012, section 3.2; P. I. Frazier, "A tutorial on Bayesian optimization", 2018,
section 3.2. No deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AveragedAcquisition(nn.Module):
    """The mean of an acquisition function over models.

    Args:
        models: The models, as the `members` of a `FullyBayesianSurrogate`.
        make: The acquisition function of a model.
        log: Whether `make` gives logarithms; the result is that of the mean, then.

    Shape:
        - x: `(..., q, d)`
        - output: `(...)`

    Raises:
        ValueError: There are no models.

    Source:
        J. Snoek, H. Larochelle and R. P. Adams, "Practical Bayesian optimization of machine
        learning algorithms", 2012, equation 5.

    Example:
        >>> from torchzoo.gp import FullyBayesianSurrogate, NoisyExpectedImprovement
        >>> x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        >>> surrogate = FullyBayesianSurrogate(num_samples=4, burn_in=20).fit(x, (5 * x).sin())
        >>> acquisition = AveragedAcquisition(
        ...     surrogate.members, lambda model: NoisyExpectedImprovement(model, x)
        ... )
        >>> acquisition(torch.rand(7, 1, 1).double()).shape
        torch.Size([7])
    """

    def __init__(
        self,
        models: Iterable[Any],
        make: Callable[[Any], Callable[[Tensor], Tensor]],
        *,
        log: bool = False,
    ):
        super().__init__()
        self.each = [make(model) for model in models]
        if not self.each:
            raise ValueError("models: expected at least 1, got none")
        self.log = log

    def extra_repr(self) -> str:
        return f"models={len(self.each)}, log={self.log}"

    def forward(self, x: Tensor) -> Tensor:
        values = torch.stack([one(x) for one in self.each])
        if self.log:
            return values.logsumexp(0) - math.log(len(values))
        return values.mean(0)
