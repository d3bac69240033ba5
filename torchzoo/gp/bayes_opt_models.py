"""How an optimiser handles its surrogates: other data, points that are pending, fidelities."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from torchzoo.gp.acquisition_lines import gaussian
from torchzoo.gp.bnn_surrogates_gp import DKLSurrogate, GPSurrogate, InfiniteWidthSurrogate
from torchzoo.gp.derivative_gp import DerivativeGP
from torchzoo.gp.fully_bayesian import FullyBayesianSurrogate
from torchzoo.gp.multi_task import MultiTaskSurrogate

TAKES_DATA = (
    GPSurrogate,
    DKLSurrogate,
    InfiniteWidthSurrogate,
    DerivativeGP,
    FullyBayesianSurrogate,
    MultiTaskSurrogate,
)
"""Surrogates that need no fit to take in data, as their states are hyperparameters."""


def default_surrogate(
    acquisition: str, bounds: Tensor, levels: Collection[float], seed: int
) -> Any:
    """The model that an optimiser has if it is given none."""
    generator = torch.Generator().manual_seed(seed)
    kind = DerivativeGP if acquisition == "dkg" else GPSurrogate
    return kind(bounds=model_bounds(bounds, levels), generator=generator)


def model_bounds(bounds: Tensor, levels: Collection[float]) -> Tensor:
    """Bounds of inputs with their fidelity, if there are any, `(2, d + 1)`."""
    if not levels:
        return bounds
    ends = [[min(levels)], [max(levels) + (len(levels) == 1)]]
    return torch.cat([bounds, bounds.new_tensor(ends)], 1)


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
