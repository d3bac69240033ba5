"""The acquisition functions of an optimiser by their names, without botorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.common.linalg import psd_cholesky
from torchzoo.gp.acquisition import expected_improvement, max_value_entropy
from torchzoo.gp.acquisition_average import AveragedAcquisition
from torchzoo.gp.acquisition_derivative import DerivativeKnowledgeGradient
from torchzoo.gp.acquisition_entropy import EntropySearch, PredictiveEntropySearch
from torchzoo.gp.acquisition_lines import gaussian
from torchzoo.gp.acquisition_modules import (
    CostAwareKG,
    KnowledgeGradient,
    NoisyExpectedImprovement,
)
from torchzoo.gp.fully_bayesian import FullyBayesianSurrogate

ACQUISITIONS = ("ei", "noisy_ei", "kg", "dkg", "es", "pes", "mes", "random")
GRID = {"kg": 256, "dkg": 128, "mes": 256, "es": 64, "pes": 128}
"""Points of a box that stand for it."""


class ClosedForm(nn.Module):
    """A function of the posterior mean and standard deviation at one point.

    Args:
        model: As for `torchzoo.gp.gaussian`.
        value: The function.

    Shape:
        - x: `(..., 1, d)`
        - output: `(...)`
    """

    def __init__(self, model: Any, value: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.model, self.value = model, value

    def forward(self, x: Tensor) -> Tensor:
        found = gaussian(self.model, x)
        tiny = torch.finfo(x.dtype).tiny
        return self.value(found.mean[..., 0, 0], found.variance[..., 0, 0].clamp_min(tiny).sqrt())


class Improvement(ClosedForm):
    """Expected improvement, times the probability that all constraints are at most 0.

    Args:
        model: As for `torchzoo.gp.gaussian`.
        best: The best feasible value; None: there is none, only the probability counts.
        limits: A surrogate of the constraints, an output each, independent of each other.

    Shape:
        - x: `(..., 1, d)`
        - output: `(...)`
    """

    def __init__(self, model: Any, best: Tensor | None, limits: Any = None):
        def value(mean: Tensor, std: Tensor) -> Tensor:
            return torch.ones_like(mean) if best is None else expected_improvement(mean, std, best)

        super().__init__(model, value)
        self.limits = limits

    def forward(self, x: Tensor) -> Tensor:
        gain = super().forward(x)
        if self.limits is None:
            return gain
        found = self.limits.posterior(x)
        spread = found.variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        return gain * torch.special.ndtr(-found.mean / spread).prod(-1)[..., 0]


class AtFidelity(nn.Module):
    """Knowledge gradient of observations at one fidelity, by a unit of cost.

    Args:
        model: A model whose last input is the fidelity.
        targets: Points that may be reported, with the fidelity that counts.
        level: The fidelity.
        price: Its cost.

    Shape:
        - x: `(..., 1, d)`
        - output: `(...)`
    """

    def __init__(self, model: Any, targets: Tensor, level: float, price: float):
        super().__init__()
        self.level = level
        self.gain = CostAwareKG(model, targets, lambda x: torch.full_like(x[..., 0], price))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain(torch.cat([x, torch.full_like(x[..., :1], self.level)], -1))


def sample_maxima(
    model: Any, points: Tensor, count: int = 64, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the maximum of a function over points, `(count,)`."""
    found = gaussian(model, points)
    factor, _ = psd_cholesky(found.covariance[0].detach())
    white = torch.randn(len(factor), count, dtype=factor.dtype, generator=generator)
    return (found.mean.detach() + factor @ white).amax(0)


def averaged(model: Any, make: Callable[[Any], Callable[[Tensor], Tensor]]) -> Any:
    """The acquisition function of a model, or its mean over a model's hyperparameters."""
    if isinstance(model, FullyBayesianSurrogate):
        return AveragedAcquisition(model.members, make)
    return make(model)


def acquisition_on_points(
    name: str, model: Any, points: Tensor, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """The acquisition functions that look at a set of points: all but `"ei"` and `"random"`.

    Args:
        name: One of `ACQUISITIONS`.
        model: As for `torchzoo.gp.gaussian`.
        points: What was evaluated for `"noisy_ei"`, else what stands for the domain.
        generator: Draws.
    """
    if name == "noisy_ei":
        return NoisyExpectedImprovement(model, points)
    if name == "kg":
        return KnowledgeGradient(model, points)
    if name == "dkg":
        return DerivativeKnowledgeGradient(model, points, num_samples=32, generator=generator)
    if name == "es":
        return EntropySearch(model, points, generator=generator)
    if name == "pes":
        return PredictiveEntropySearch(model, points, generator=generator)
    maxima = sample_maxima(model, points, generator=generator)
    return ClosedForm(model, lambda mean, std: max_value_entropy(mean, std, maxima))
