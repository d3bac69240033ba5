"""What an optimiser needs of acquisition functions beyond their own files, without botorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.common.linalg import psd_cholesky
from torchzoo.gp.acquisition import expected_improvement
from torchzoo.gp.acquisition_lines import gaussian
from torchzoo.gp.acquisition_modules import CostAwareKG
from torchzoo.gp.bnn_surrogates_gp import DKLSurrogate, GPSurrogate, InfiniteWidthSurrogate
from torchzoo.gp.derivative_gp import DerivativeGP

TAKES_DATA = (GPSurrogate, DKLSurrogate, InfiniteWidthSurrogate, DerivativeGP)
"""Surrogates that need no fit to take in data, as their states are hyperparameters."""


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


def model_bounds(bounds: Tensor, levels: Collection[float]) -> Tensor:
    """Bounds of inputs with their fidelity, if there are any, `(2, d + 1)`."""
    if not levels:
        return bounds
    ends = [[min(levels)], [max(levels) + (len(levels) == 1)]]
    return torch.cat([bounds, bounds.new_tensor(ends)], 1)


def sample_maxima(
    model: Any, points: Tensor, count: int = 64, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the maximum of a function over points, `(count,)`."""
    found = gaussian(model, points)
    factor, _ = psd_cholesky(found.covariance[0].detach())
    white = torch.randn(len(factor), count, dtype=factor.dtype, generator=generator)
    return (found.mean.detach() + factor @ white).amax(0)


def believing(model: Any, x: Tensor) -> Any:
    """A surrogate that has seen its own mean at a point, hyperparameters unchanged if it can."""
    y = gaussian(model, x).mean.detach()
    data = torch.cat([model.x, x]), torch.cat([model.y, y])
    if not isinstance(model, TAKES_DATA):
        return copy.deepcopy(model).fit(*data)
    grad = getattr(model, "grad", None)
    if grad is not None:
        grad = torch.cat([grad, torch.full_like(x, math.nan)])
    return with_data(model, model.state_dict(), *data, grad)


def with_data(
    surrogate: Any, state: Mapping[str, Tensor], x: Tensor, y: Tensor, grad: Tensor | None = None
) -> Any:
    """A copy of a surrogate with hyperparameters of a state and other data."""
    found = copy.copy(surrogate)
    found.generator = torch.Generator()
    new = {"x": x, "y": y}
    if "grad" in state:
        new["grad"] = torch.full_like(x, math.nan) if grad is None else grad
    found.load_state_dict(dict(state) | new)
    return found
