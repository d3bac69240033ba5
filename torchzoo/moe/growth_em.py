"""Expectation-maximisation for mixtures of growth curves, many starts at once.

All parameters may have leading batch dimensions S, one fit each, and the data may have them too.
With `r_ik` the probability that subject i is of class k, an iteration takes in turn

    knot:   a Gauss-Newton step on sum_i r_ik log N_k(y_i), kept only where it gains;
    means:  (alpha, B, kappa) by generalised least squares, given knots and covariances;
    spread: (Psi, theta) from the growth factors given the responses;
    gate:   steps of D. Boehning, "Multinomial logistic regression algorithm", 1992, on
            sum_ik r_ik log pi_k(x_i), whose Hessian is bounded by that of equal probabilities.

Each of them raises the likelihood or leaves it (X.-L. Meng and D. van Dyk, "The EM Algorithm - an
Old Folk-song Sung to a Fast New Tune", 1997).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from torchzoo.moe.growth import GrowthParams
from torchzoo.moe.growth_curves import (
    Conditional,
    ExpertParams,
    GrowthData,
    Trajectory,
    apply,
    condition,
)

GATE_STEPS = 10
"""Steps of the gate in an iteration."""


class EMResult(NamedTuple):
    """Where expectation-maximisation came to.

    Attributes:
        params: The parameters, with batch dimensions `(S...)`.
        trace: `(iterations + 1, S...)`, log-likelihoods at the start and after each iteration.
    """

    params: GrowthParams
    trace: Tensor


@torch.no_grad()
def expectation_maximisation(
    trajectory: Trajectory,
    start: GrowthParams,
    data: GrowthData,
    *,
    bounds: tuple[float, float] | None,
    shared_residual: bool = False,
    max_iter: int = 200,
    tol: float = 1e-8,
) -> EMResult:
    """Climb to local maxima of the likelihood from all starts at once.

    Args:
        trajectory: The family of curves.
        start: Where to start, with batch dimensions `(S...)`, of a start or of a data set each.
        data: Measurements, `(n, ...)` or `(S..., n, ...)`.
        bounds: Range of the knots or rates; None where the curves have none.
        shared_residual: Whether all classes have the same residual variance.
        max_iter: Most iterations.
        tol: Stop where no fit gains more log-likelihood in an iteration.
    """
    params, joint = start, log_joint(trajectory, start, data)
    trace = [joint.logsumexp(-1).sum(-1)]
    for _ in range(max_iter):
        r = joint.softmax(-1)
        params = maximise(trajectory, params, data, r, bounds, shared_residual)
        joint = log_joint(trajectory, params, data)
        trace.append(joint.logsumexp(-1).sum(-1))
        if bool((trace[-1] - trace[-2] <= tol).all()):
            break
    return EMResult(params, torch.stack(trace))


def log_joint(trajectory: Trajectory, params: GrowthParams, data: GrowthData) -> Tensor:
    """`(S..., n, K)`, log-probability of the class plus log-density of the responses in it."""
    density = condition(trajectory, params.experts.per_subject(), data).log_density
    return params.log_weights(data.gate_x) + density


def maximise(
    trajectory: Trajectory,
    params: GrowthParams,
    data: GrowthData,
    r: Tensor,
    bounds: tuple[float, float] | None,
    shared_residual: bool = False,
) -> GrowthParams:
    """One M step, for responsibilities `(S..., n, K)`."""
    experts = params.experts
    if bounds is not None:
        experts = move_shapes(trajectory, experts, data, r, bounds)
    experts = solve_means(trajectory, experts, data, r)
    experts = update_spread(trajectory, experts, data, r, shared_residual)
    gate = update_gate(params.gate_bias, params.gate_weight, data.gate_x, r)
    return GrowthParams(*gate, *experts)


def explained(found: Conditional, params: ExpertParams, columns: Tensor) -> Tensor:
    """`Sigma^-1` times columns `(..., K, J, P)`, of subjects whose missing rows are 0."""
    theta, root = params.theta[..., None, None], params.scale_tril
    whitened = found.loadings @ root
    inner = torch.cholesky_solve(whitened.mT @ columns / theta, found.factor)
    return (columns - whitened @ inner) / theta


def move_shapes(
    trajectory: Trajectory,
    params: ExpertParams,
    data: GrowthData,
    r: Tensor,
    bounds: tuple[float, float],
) -> ExpertParams:
    """A Gauss-Newton step of the knots or rates, or a part of it, where the likelihood gains.

    The score is exact by Fisher's identity, the curvature that of the posterior mean curve.
    """
    aligned = params.per_subject()
    found = condition(trajectory, aligned, data)
    t = data.t[..., None, :]
    gamma = aligned.gamma.expand(*found.log_density.shape, 1).contiguous()
    one = (torch.ones_like(gamma),)
    slope = torch.func.jvp(lambda g: trajectory.loadings(t, g), (gamma,), one)[1]
    slope = slope * data.seen[..., None, :, None]
    bend = slope @ found.mean[..., None]  # change of the curve with the shape, (..., K, J, 1)
    root = aligned.scale_tril
    spread = root @ torch.cholesky_inverse(found.factor) @ root.mT
    trace = (slope * (found.loadings @ spread)).sum((-2, -1))
    score = ((found.left[..., None] * bend).sum((-2, -1)) - trace) / aligned.theta
    curvature = (bend * explained(found, aligned, bend)).sum((-2, -1))
    step = (r * score).sum(-2) / (r * curvature).sum(-2).clamp_min(torch.finfo(r.dtype).tiny)

    low, high = bounds
    edge = 1e-6 * (high - low)
    best, value = params.gamma, (r * found.log_density).sum(-2)
    for size in (1.0, 0.3, 0.05):
        moved = (params.gamma + size * step[..., None]).clamp(low + edge, high - edge)
        tried = condition(trajectory, params._replace(gamma=moved).per_subject(), data)
        gained = (r * tried.log_density).sum(-2)
        better = gained > value
        best, value = moved.where(better[..., None], best), gained.where(better, value)
    return params._replace(gamma=best)


def solve_means(
    trajectory: Trajectory, params: ExpertParams, data: GrowthData, r: Tensor
) -> ExpertParams:
    """Generalised least squares for `(alpha, B, kappa)`, subjects weighted by r."""
    aligned = params.per_subject()
    found = condition(trajectory, aligned, data)
    x = F.pad(data.expert_x, (1, 0), value=1.0)
    curves = (found.loadings[..., None] * x[..., None, None, None, :]).flatten(-2)
    effects = (data.tvc_x * data.seen[..., None])[..., None, :, :]
    effects = effects.expand(*curves.shape[:-1], effects.shape[-1])
    design = torch.cat([curves, effects], -1)  # (..., n, K, J, P)
    weighted = r[..., None, None] * design
    solved = explained(found, aligned, design)
    normal = einsum(weighted, solved, "... n k j a, ... n k j b -> ... k a b")
    residual = found.left / aligned.theta[..., None]  # Sigma^-1 times the residual
    moment = einsum(weighted, residual, "... n k j a, ... n k j -> ... k a")
    change = apply(torch.linalg.pinv(normal, hermitian=True), moment)
    factors, kappa = change.tensor_split([change.shape[-1] - params.kappa.shape[-1]], -1)
    factors = factors.unflatten(-1, (-1, x.shape[-1]))
    return params._replace(
        alpha=params.alpha + factors[..., 0],
        beta=params.beta + factors[..., 1:],
        kappa=params.kappa + kappa,
    )


def update_spread(
    trajectory: Trajectory,
    params: ExpertParams,
    data: GrowthData,
    r: Tensor,
    shared_residual: bool = False,
) -> ExpertParams:
    """`Psi` and `theta` from the growth factors' posterior; of an empty class they stay."""
    found = condition(trajectory, params.per_subject(), data)
    spread = torch.cholesky_inverse(found.factor)
    second = spread + found.u[..., :, None] * found.u[..., None, :]
    eye = torch.eye(spread.shape[-1], dtype=r.dtype, device=r.device)
    tiny = torch.finfo(r.dtype).eps
    total = r.sum(-2)[..., None, None] + tiny
    second = (einsum(r, second, "... n k, ... n k d e -> ... k d e") + tiny * eye) / total
    root, per_subject = params.scale_tril, params.scale_tril[..., None, :, :, :]
    around = (found.gram * (per_subject @ spread @ per_subject.mT)).sum((-2, -1))
    squares = (r * (found.left.square().sum(-1) + around)).sum(-2)
    count = (r * data.seen.sum(-1, keepdim=True)).sum(-2)
    if shared_residual:
        squares = squares.sum(-1, keepdim=True).expand_as(squares)
        count = count.sum(-1, keepdim=True).expand_as(count)
    theta = (squares + tiny * params.theta) / (count + tiny)
    return params._replace(scale_tril=root @ torch.linalg.cholesky(second), theta=theta)


def update_gate(bias: Tensor, weight: Tensor, gate_x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Biases and weights of the gate, with 0 for the first class."""
    x = F.pad(gate_x, (1, 0), value=1.0)
    inverse = torch.linalg.pinv(x.mT @ x, hermitian=True)
    logits = torch.cat([bias[..., None], weight], -1)  # (..., K, g + 1)
    for _ in range(GATE_STEPS):
        gap = (r - (x @ logits.mT).softmax(-1)).mT @ x @ inverse  # (..., K, g + 1)
        # The bound's inverse is 2 (I + 1 1^T) on the classes but the first. Rows of the gap add
        # up to 0, so that the sum over those classes is minus the first row.
        logits = logits + 2 * (gap - gap[..., :1, :])
    return logits[..., 0], logits[..., 1:]
