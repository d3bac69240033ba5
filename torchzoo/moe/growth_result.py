"""What a fit of a mixture of growth curves gives: estimates, their errors, information criteria."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from torchzoo.moe.growth import GrowthMoE

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Arguments of a `GrowthMoE`."""

QUANTILE = 1.959963984540054
"""Of the standard normal distribution, at 0.975."""


class GrowthEstimates(NamedTuple):
    """A value for each parameter of a mixture of growth curves: an estimate, or its error.

    Attributes:
        gate_bias: `(K,)`, 0 for the first class.
        gate_weight: `(K, g)`, 0 for the first class.
        gamma: `(K, c)`, knots or rates.
        alpha: `(K, d)`, means of the growth factors at the mean of the covariates.
        beta: `(K, d, p)`, effects of the covariates.
        psi: `(K, d, d)`, covariances of the growth factors.
        theta: `(K,)`, residual variances.
        kappa: `(K, q)`, effects of the time-varying covariates.
    """

    gate_bias: Tensor
    gate_weight: Tensor
    gamma: Tensor
    alpha: Tensor
    beta: Tensor
    psi: Tensor
    theta: Tensor
    kappa: Tensor


@dataclass(frozen=True, eq=False)
class GrowthMoEFit:
    """A fitted mixture of growth curves.

    Attributes:
        params: The estimates; classes are in increasing order of the knot or rate.
        loglik: Log-likelihood.
        aic: Akaike's information criterion, `2 P - 2 loglik`.
        bic: Bayesian information criterion, `P log n - 2 loglik`.
        entropy: From 0 to 1, how clearly subjects belong to a class: 1 less their mean posterior
            entropy in units of `log K`.
        converged: Whether the search met its tolerance.
        n_starts: Number of starts.
        num_parameters: Number `P` of free parameters.
        model: The `GrowthMoE`.
        inputs: What it was fitted to, as arguments of the model.
    """

    params: GrowthEstimates
    loglik: float
    aic: float
    bic: float
    entropy: float
    converged: bool
    n_starts: int
    num_parameters: int
    model: GrowthMoE
    inputs: Inputs

    @cached_property
    def se(self) -> GrowthEstimates:
        """Standard errors of the estimates, from the observed information.

        0 for what is fixed, NaN where the information is not positive definite. They take longer
        than the fit, and are computed when they are first asked for.
        """
        top, loss = objective(self.model, self.inputs)
        slopes = jacrev(lambda vector: _estimates(self.model, vector))(top)
        variances = (slopes @ _inverse(hessian(loss)(top)) @ slopes.mT).diagonal()
        return _unflatten(variances.sqrt(), self.params)

    @cached_property
    def ci(self) -> tuple[GrowthEstimates, GrowthEstimates]:
        """Lower and upper ends of the 95 % Wald intervals, from the standard errors."""
        pairs = list(zip(self.params, self.se, strict=True))
        low = GrowthEstimates(*(value - QUANTILE * se for value, se in pairs))
        return low, GrowthEstimates(*(value + QUANTILE * se for value, se in pairs))


def objective(model: GrowthMoE, inputs: Inputs) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The free parameters as one vector, and the negative log-likelihood of such a vector."""
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def loss(vector: Tensor) -> Tensor:
        return -functional_call(model, split_vector(model, vector), inputs).sum()

    return start, loss


def split_vector(model: GrowthMoE, vector: Tensor) -> dict[str, Tensor]:
    """The parameters by name, cut from a vector of all."""
    named = dict(model.named_parameters())
    parts = vector.split([p.numel() for p in named.values()])
    return {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}


class _Estimates(nn.Module):
    """A model's estimates as one vector, as a `forward`, which is what `functional_call` calls."""

    def __init__(self, model: GrowthMoE) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        params = self.model.params()
        values = params._replace(scale_tril=params.psi)
        return torch.cat([value.flatten() for value in values])


def _estimates(model: GrowthMoE, vector: Tensor) -> Tensor:
    """All entries of the estimates, of a vector of the free parameters."""
    named = {f"model.{name}": part for name, part in split_vector(model, vector).items()}
    return functional_call(_Estimates(model), named, ())


def _unflatten(vector: Tensor, like: GrowthEstimates) -> GrowthEstimates:
    parts = vector.split([value.numel() for value in like])
    return GrowthEstimates(*(v.view(p.shape) for v, p in zip(parts, like, strict=True)))


def _inverse(information: Tensor) -> Tensor:
    """The inverse of a positive definite matrix; NaN for any other."""
    values, axes = torch.linalg.eigh(information)
    least = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return (axes / torch.where(values > least, values, math.nan)) @ axes.mT


def relative_entropy(posterior: Tensor) -> float:
    """From 0 to 1, how clearly subjects belong to a class, for posteriors `(n, K)`."""
    k = posterior.shape[-1]
    disorder = -torch.xlogy(posterior, posterior).sum(-1).mean().item()
    return 1 - disorder / math.log(k) if k > 1 else 1.0
