"""Maximum likelihood for mixtures of growth curves, with standard errors and model comparison.

A start clusters the subjects by the coefficients of their own least-squares curves. All starts are
climbed a few steps by expectation-maximisation at once and the best one to the top: by more of it,
or by L-BFGS in coordinates in which the information at the start is the identity, so that a
gradient is a distance in standard errors; that information is the sum of the squares of the
subjects' scores, which costs one gradient (E. Berndt, B. Hall, R. Hall and J. Hausman, "Estimation
and Inference in Nonlinear Structural Models", 1974). At the top the inverse of the observed
information, the negative Hessian of the log-likelihood, gives the covariance of all estimates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from torchzoo.common.solvers import minimize_lbfgs
from torchzoo.moe.growth import GrowthMoE, GrowthParams
from torchzoo.moe.growth_em import expectation_maximisation
from torchzoo.moe.growth_result import (
    GrowthEstimates,
    GrowthMoEFit,
    Inputs,
    objective,
    relative_entropy,
    split_vector,
)
from torchzoo.moe.growth_starts import best_start, shape_bounds
from torchzoo.moe.routing import check_count

BOTH = ("gate_x", "expert_x")
MODELS = {"full": BOTH, "expert": BOTH[1:], "gating": BOTH[:1], "mixture": BOTH[:0]}
"""For each nested model, the covariates it uses."""


def fit_growth_moe(
    y: Tensor,
    t: Tensor,
    num_classes: int,
    *,
    gate_x: Tensor | None = None,
    expert_x: Tensor | None = None,
    tvc_x: Tensor | None = None,
    mask: Tensor | None = None,
    trajectory: str = "bilinear",
    shared_residual: bool = False,
    init: GrowthParams | None = None,
    n_starts: int = 5,
    seed: int = 0,
    method: str = "lbfgs",
    max_iter: int = 500,
    tol: float = 1e-4,
) -> GrowthMoEFit:
    """Maximum-likelihood fit of a mixture of growth curves, the best of several starts.

    Args:
        y: Responses.
        t: Times.
        num_classes: Number of classes `K`.
        gate_x: Covariates of the gate; none by default.
        expert_x: Covariates of the experts; none by default. Their mean is taken off them, in the
            fit and in later predictions.
        tvc_x: Time-varying covariates; none by default.
        mask: True where measured; all by default.
        trajectory: See `GrowthMoE`.
        shared_residual: See `GrowthMoE`.
        init: Where to start instead; then there is one start.
        n_starts: Number of starts.
        seed: Seed of the starts.
        method: "lbfgs" or "em".
        max_iter: Most iterations.
        tol: Stop where no coordinate of the gradient is above this, in standard errors at the
            start ("lbfgs"), or where an iteration gains no more log-likelihood ("em", and "lbfgs"
            where a knot is at a time).

    Shape:
        - y: `(n, J)`
        - t: `(n, J)`, increasing along J where measured
        - gate_x: `(n, g)`
        - expert_x: `(n, p)`
        - tvc_x: `(n, J, q)`
        - mask: `(n, J)` bool

    Returns:
        The fit, in float64.

    Raises:
        ValueError: Shapes that don't fit, values that are not finite, times that don't increase,
            subjects with fewer than three measurements, or fewer subjects than classes.

    Source:
        Liu and Perera, "Extending Mixture of Experts Model to Investigate Heterogeneity of
        Trajectories: When, Where and How to Add Which Covariates", 2021; several short runs:
        Biernacki, Celeux and Govaert, "Choosing starting values for the EM algorithm for getting
        the highest likelihood in multivariate Gaussian mixture models", 2003.

    Example:
        >>> t = torch.arange(6.0).expand(200, 6)
        >>> low = torch.arange(200) < 80
        >>> level = torch.where(low, 0.0, 8.0) + torch.randn(200)
        >>> y = level[:, None] + torch.randn(200)[:, None] * t + 0.3 * torch.randn(200, 6)
        >>> fit = fit_growth_moe(y, t, 2, trajectory="linear", n_starts=2)
        >>> fit.converged, fit.params.alpha.shape, fit.entropy > 0.9
        (True, torch.Size([2, 2]), True)
    """
    if method not in ("lbfgs", "em"):
        raise ValueError(f"method: expected 'lbfgs' or 'em', got {method!r}")
    check_count("n_starts", n_starts)
    mask = check_values(y, t, gate_x=gate_x, expert_x=expert_x, tvc_x=tvc_x, mask=mask)
    times = t[mask]
    model = GrowthMoE(
        num_classes,
        _columns(gate_x),
        _columns(expert_x),
        trajectory=trajectory,
        shared_residual=shared_residual,
        tvc=_columns(tvc_x),
        time_range=(times.min().item(), times.max().item()),
        device=y.device,
    )
    if len(y) < num_classes:
        raise ValueError(f"num_classes: expected at most {len(y)}, the subjects, got {num_classes}")
    inputs = (y.double(), t.double(), gate_x, expert_x, tvc_x, mask)
    if expert_x is not None:
        model.experts.mean.copy_(expert_x.double().mean(0))
    if init is None:
        init = best_start(model, model.data(*inputs), n_starts, seed)
    model.set_params(init)
    converged = _climb(model, inputs, method, max_iter, tol)
    with torch.no_grad():
        model.set_params(model.params().ordered())
    return _report(model, inputs, converged, n_starts)


def compare_models(
    y: Tensor,
    t: Tensor,
    num_classes: int,
    *,
    gate_x: Tensor,
    expert_x: Tensor,
    **options: Any,
) -> dict[str, GrowthMoEFit]:
    """Fit the four nested models, which tells where covariates are of use.

    Args:
        y: Responses, `(n, J)`.
        t: Times, `(n, J)`.
        num_classes: Number of classes.
        gate_x: Covariates of the gate, `(n, g)`.
        expert_x: Covariates of the experts, `(n, p)`.
        **options: For `fit_growth_moe`; of `init`, each model takes the part it has.

    Returns:
        Fits by name, the least BIC first: "full" (both kinds of covariates), "expert" (those of
        the growth factors), "gating" (those of the class), "mixture" (neither).

    Raises:
        ValueError: See `fit_growth_moe`.

    Source:
        Liu and Perera, "Extending Mixture of Experts Model to Investigate Heterogeneity of
        Trajectories: When, Where and How to Add Which Covariates", 2021.

    Example:
        >>> t = torch.arange(6.0).expand(200, 6)
        >>> x = torch.randn(200, 1)
        >>> y = 3 * x + torch.randn(200, 1) * t + 0.3 * torch.randn(200, 6)
        >>> fits = compare_models(y, t, 1, gate_x=x, expert_x=x, trajectory="linear", n_starts=1)
        >>> fits["expert"].bic < fits["gating"].bic
        True
    """
    covariates = {"gate_x": gate_x, "expert_x": expert_x}
    init = options.pop("init", None)
    fits = {}
    for name, used in MODELS.items():
        given: dict[str, Any] = {key: covariates[key] for key in used}
        start = None if init is None else _restrict(init, used)
        fits[name] = fit_growth_moe(y, t, num_classes, init=start, **given, **options)
    return dict(sorted(fits.items(), key=lambda item: item[1].bic))


def check_values(
    y: Tensor,
    t: Tensor,
    *,
    gate_x: Tensor | None = None,
    expert_x: Tensor | None = None,
    tvc_x: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The mask; raises a ValueError where values can't be fitted."""
    if y.ndim != 2 or y.shape != t.shape or y.numel() == 0:
        got = f"{tuple(y.shape)} and {tuple(t.shape)}"
        raise ValueError(f"y, t: expected both (n, J), not empty, got {got}")
    if mask is None:
        mask = torch.ones_like(y, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != y.shape:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(f"mask: expected bool of shape {tuple(y.shape)} as y, got {got}")
    values = {"y": y[mask], "t": t[mask], "gate_x": gate_x, "expert_x": expert_x}
    if tvc_x is not None:
        values["tvc_x"] = tvc_x[mask]
    for name, value in values.items():
        if value is not None and not bool(value.isfinite().all()):
            bad = int((~value.isfinite()).sum())
            raise ValueError(f"{name}: expected finite values, got {bad} that are not")
    if bool((mask.sum(-1) < 3).any()):
        fewest = int(mask.sum(-1).min())
        raise ValueError(f"mask: expected at least 3 measurements a subject, got {fewest}")
    before = torch.where(mask, t, -math.inf).cummax(-1).values[:, :-1]
    later = mask[:, 1:] & (t[:, 1:] <= before)
    if bool(later.any()):
        row = int(later.any(-1).nonzero()[0])
        raise ValueError(f"t: expected increasing times, got {t[row].tolist()} in row {row}")
    return mask


def _columns(value: Tensor | None) -> int:
    return 0 if value is None else value.shape[-1]


def _restrict(params: GrowthParams, used: tuple[str, ...]) -> GrowthParams:
    """The parameters without the effects of covariates that are not used."""
    if "gate_x" not in used:
        params = params._replace(gate_weight=params.gate_weight[..., :0])
    return params if "expert_x" in used else params._replace(beta=params.beta[..., :0])


def _climb(model: GrowthMoE, inputs: Inputs, method: str, max_iter: int, tol: float) -> bool:
    """Climb from the present parameters; whether the top was reached.

    Where a knot meets a time, the likelihood has a kink, at which no gradient vanishes. There
    L-BFGS leaves off, and expectation-maximisation, which needs no gradient to vanish, goes on.
    """
    if method == "lbfgs" and _climb_by_lbfgs(model, inputs, max_iter, tol):
        return True
    with torch.no_grad():
        start = model.params()
    found = expectation_maximisation(
        model.experts.trajectory,
        start,
        model.data(*inputs),
        bounds=shape_bounds(model),
        shared_residual=model.experts.shared_residual,
        max_iter=max_iter,
        tol=tol,
    )
    model.set_params(found.params)
    return bool(found.trace[-1] - found.trace[-2] <= tol)


def _climb_by_lbfgs(model: GrowthMoE, inputs: Inputs, max_iter: int, tol: float) -> bool:
    start, loss = objective(model, inputs)
    scores = _scores(model, inputs, start)
    curvature, axes = torch.linalg.eigh(scores.mT @ scores)
    # In directions of no curvature a step is as long as in the flattest other one.
    scales = curvature.clamp_min(1e-6 * curvature.max()).rsqrt()
    steps = torch.zeros_like(start, requires_grad=True)

    def point() -> Tensor:
        return start + axes @ (scales * steps)

    found = minimize_lbfgs(lambda: loss(point()), [steps], max_iter=max_iter, tol=tol)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(point(), model.parameters())
    return found.converged


def _scores(model: GrowthMoE, inputs: Inputs, vector: Tensor) -> Tensor:
    """`(n, P)`, gradients of the subjects' log-likelihoods with respect to a vector of all."""

    def log_density(vector: Tensor, *subject: Tensor | None) -> Tensor:
        return functional_call(model, split_vector(model, vector), subject)

    subjects = tuple(None if value is None else 0 for value in inputs)
    return vmap(grad(log_density), in_dims=(None, *subjects))(vector, *inputs)


@torch.no_grad()
def _report(model: GrowthMoE, inputs: Inputs, converged: bool, n_starts: int) -> GrowthMoEFit:
    params = model.params()
    log_joint = model.log_joint(model.data(*inputs))
    loglik = log_joint.logsumexp(-1).sum().item()
    count, n = sum(p.numel() for p in model.parameters()), len(log_joint)
    return GrowthMoEFit(
        params=GrowthEstimates(*params[:5], params.psi, *params[6:]),
        loglik=loglik,
        aic=2 * count - 2 * loglik,
        bic=count * math.log(n) - 2 * loglik,
        entropy=relative_entropy(log_joint.softmax(-1)),
        converged=converged,
        n_starts=n_starts,
        num_parameters=count,
        model=model,
        inputs=inputs,
    )
