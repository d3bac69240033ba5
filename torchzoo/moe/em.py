"""Expectation-maximisation for the Gaussian mixture of experts.

R. A. Jacobs and M. I. Jordan, "Hierarchical Mixtures of Experts and the EM Algorithm", 1994. With
`r_ti` the probability that expert i made the pair t,

    E step:  r_ti = pi_i(x_t) N(y_t | a_i^T x_t + b_i, var_i) / p(y_t | x_t)
    M step:  (a_i, b_i) by least squares with weights r_ti, var_i the weighted mean square of the
             residuals, and the gate by L-BFGS on sum_ti r_ti log pi_i(x_t).

The gate's step starts from the present gate and never lowers its objective, so that the likelihood
never decreases as long as each input keeps its experts. Those of a top-K gate are held during the
step and chosen anew after it; where that lowers the likelihood, the step is cut back.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from torchzoo.moe.likelihood import (
    check_responses,
    gate_cross_entropy,
    mean_log_likelihood,
    minimize_known,
)

if TYPE_CHECKING:
    from torchzoo.moe.gaussian import GaussianMoE

VARIANCE_FLOOR = 1e-8
"""Least variance of an expert in units of the variance of y: without a floor the likelihood has no
maximum, as an expert through a few points may become a spike."""

GATE_STEPS = 20
"""L-BFGS iterations of the gate in an M step."""

HALVINGS = 12
"""Lengths of a gate's step that are tried, each half the last, before the gate stays as it was."""


def fit_em(
    model: GaussianMoE, x: Tensor, y: Tensor, *, max_iter: int = 200, tol: float = 1e-9
) -> Tensor:
    """Climb to a local maximum of the likelihood by expectation-maximisation.

    Args:
        model: The model, changed in place.
        x: Inputs, `(..., d)`.
        y: Responses, `(...)`.
        max_iter: Most iterations.
        tol: Stop where an iteration gains less mean log-likelihood.

    Returns:
        `(iterations + 1,)`, the mean log-likelihood at the start and after each iteration.

    Raises:
        ValueError: Shapes that don't fit.

    Source:
        Jacobs and Jordan, "Hierarchical Mixtures of Experts and the EM Algorithm", 1994, eq.
        (21) to (24) for one level.

    Example:
        >>> from torchzoo.moe import GaussianMoE
        >>> trace = fit_em(GaussianMoE(2, 3), torch.randn(50, 2), torch.randn(50), max_iter=4)
        >>> len(trace), bool((trace.diff() > 0).all())
        (5, True)
    """
    check_responses(x, y)
    x, y = x.reshape(-1, x.shape[-1]), y.flatten()
    trace = [mean_log_likelihood(model, x, y)]
    for _ in range(max_iter):
        with torch.no_grad():
            responsibilities = model.responsibilities(x, y)
            update_experts(model, x, y, responsibilities)
        trace.append(_climb_gate(model, x, y, responsibilities))
        if trace[-1] - trace[-2] < tol:
            break
    return torch.stack(trace)


def weighted_lines(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A line for each column of weights, by least squares; the shortest one where many fit.

    Args:
        x: Inputs, `(n, d)`.
        y: Responses, `(n,)`.
        weights: Weights at least 0, `(n, k)`, with a positive sum in each column.

    Returns:
        Slopes `(k, d)`, intercepts `(k,)` and weighted mean squares of the residuals `(k,)`.
    """
    x64, y64, w64 = x.double(), y.double(), weights.double()
    design = F.pad(x64, (0, 1), value=1.0)
    gram = einsum(w64, design, design, "n k, n p, n q -> k p q")
    moment = einsum(w64, design, y64, "n k, n p, n -> k p")
    lines = einsum(torch.linalg.pinv(gram, hermitian=True), moment, "k p q, k q -> k p")
    residuals = rearrange(y64, "n -> n 1") - design @ lines.T
    var = (w64 * residuals.square()).sum(0) / w64.sum(0)
    return lines[:, :-1].to(x.dtype), lines[:, -1].to(x.dtype), var.to(x.dtype)


@torch.no_grad()
def update_experts(model: GaussianMoE, x: Tensor, y: Tensor, responsibilities: Tensor) -> None:
    """The M step of the experts; one that is responsible for nothing stays as it is.

    Args:
        model: The model, changed in place.
        x: Inputs, `(n, d)`.
        y: Responses, `(n,)`.
        responsibilities: `(n, k)`.
    """
    used = responsibilities.sum(0) > torch.finfo(x.dtype).tiny
    a, b, var = weighted_lines(x, y, responsibilities.where(used, 1.0))
    # A start below the floor must not be raised to it: that would lower the likelihood.
    floor = torch.minimum(VARIANCE_FLOOR * y.var(correction=0), model.log_var.exp())
    model.a[used] = a[used].to(model.a.dtype)
    model.b[used] = b[used].to(model.b.dtype)
    model.log_var[used] = torch.maximum(var, floor).log()[used].to(model.log_var.dtype)


def update_gate(model: GaussianMoE, x: Tensor, responsibilities: Tensor) -> None:
    """The M step of the gate; it never lowers `sum_ti r_ti log pi_i(x_t)`.

    The experts that a top-K gate has chosen for each input are held.

    Args:
        model: The model, changed in place.
        x: Inputs, `(n, d)`.
        responsibilities: `(n, k)`, 0 for experts that are not chosen.
    """
    with torch.no_grad():
        unused = ~model.selected(x).mT
    objective = partial(gate_cross_entropy, model.gate, x, responsibilities.mT, unused)
    minimize_known(objective, model.gate.parameters(), max_iter=GATE_STEPS)


def _climb_gate(model: GaussianMoE, x: Tensor, y: Tensor, responsibilities: Tensor) -> Tensor:
    """The longest of the gate's M step and its halves that keeps the likelihood from falling.

    Returns:
        The mean log-likelihood after it.
    """
    gate = list(model.gate.parameters())
    start = [p.detach().clone() for p in gate]
    before = mean_log_likelihood(model, x, y)
    update_gate(model, x, responsibilities)
    end = [p.detach().clone() for p in gate]
    with torch.no_grad():
        for halving in range(HALVINGS):
            for p, p0, p1 in zip(gate, start, end, strict=True):
                p.copy_(torch.lerp(p0, p1, 0.5**halving))
            after = mean_log_likelihood(model, x, y)
            if after >= before:
                return after
        for p, p0 in zip(gate, start, strict=True):
            p.copy_(p0)
    return before
