"""Growth curves with random coefficients: their parameters, and what measurements say of them.

A subject measured at its own times `t_1..t_J` follows, in class k,

    y_j = sum_d lambda_d(t_j; gamma_k) eta_d + kappa_k^T z_j + e_j,        e_j ~ N(0, theta_k),
    eta = alpha_k + B_k x + zeta,                                          zeta ~ N(0, Psi_k),

so that `y | k ~ N(Lambda (alpha_k + B_k x) + z kappa_k, Lambda Psi_k Lambda^T + theta_k I)`, with a
`Lambda` of its own for each subject. With `Psi = L L^T` and `W = Lambda L` only the d x d matrix
`A = I + W^T W / theta` is factorised:

    u = A^-1 W^T r / theta,   |Sigma| = theta^J |A|,   r^T Sigma^-1 r = |r - W u|^2 / theta + |u|^2,

and given y, `eta` has mean `alpha + B x + L u` and covariance `L A^-1 L^T`. Missing occasions are
rows of `Lambda` and r that are 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MARGIN = 0.05
"""How far a knot stays from both ends of the times, as a fraction of their span."""


class ExpertParams(NamedTuple):
    """Parameters of the growth curves of `K` classes, with any leading batch dimensions.

    `d` growth factors, `p` covariates, `q` time-varying covariates.

    Attributes:
        gamma: `(..., K, c)`, knot or rate of each class; `c` is 0 for curves that have none.
        alpha: `(..., K, d)`, means of the growth factors at the mean of the covariates.
        beta: `(..., K, d, p)`, effects `B` of the covariates on the growth factors.
        scale_tril: `(..., K, d, d)`, Cholesky factors of the covariances `Psi`.
        theta: `(..., K)`, residual variances.
        kappa: `(..., K, q)`, direct effects of the time-varying covariates.
    """

    gamma: Tensor
    alpha: Tensor
    beta: Tensor
    scale_tril: Tensor
    theta: Tensor
    kappa: Tensor

    @property
    def psi(self) -> Tensor:
        """`(..., K, d, d)`, covariances of the growth factors within a class."""
        return self.scale_tril @ self.scale_tril.mT

    def per_subject(self) -> ExpertParams:
        """The same with an axis of size 1 before that of the classes, for subjects."""
        tails = (2, 2, 3, 3, 1, 2)
        return ExpertParams(*(p.unsqueeze(-n - 1) for p, n in zip(self, tails, strict=True)))


class GrowthData(NamedTuple):
    """Measurements of subjects; the last axis but one of `(..., n, J)` is theirs.

    Attributes:
        y: `(..., J)`, responses, 0 where missing.
        t: `(..., J)`, times, 0 where missing.
        seen: `(..., J)`, 1 where measured, else 0.
        gate_x: `(..., g)`, covariates of the gate.
        expert_x: `(..., p)`, covariates of the experts, less their training mean.
        tvc_x: `(..., J, q)`, time-varying covariates, 0 where missing.
    """

    y: Tensor
    t: Tensor
    seen: Tensor
    gate_x: Tensor
    expert_x: Tensor
    tvc_x: Tensor


@dataclass(frozen=True)
class Trajectory:
    """A family of curves that are linear in `num_factors` growth factors.

    Attributes:
        num_factors: Number of growth factors.
        loadings: Of times `(..., J)` and shapes `(..., c)`, gives `(..., J, num_factors)`.
        bounds: Of the first and last time, gives the range of the shape, a knot or a rate; None
            for curves without one.
    """

    num_factors: int
    loadings: Callable[[Tensor, Tensor], Tensor]
    bounds: Callable[[float, float], tuple[float, float]] | None = None

    @property
    def num_shapes(self) -> int:
        return 0 if self.bounds is None else 1


def linear_loadings(t: Tensor, gamma: Tensor) -> Tensor:
    """`(1, t)`: level at time 0 and slope."""
    return torch.stack([torch.ones_like(t), t], -1)


def quadratic_loadings(t: Tensor, gamma: Tensor) -> Tensor:
    """`(1, t, t^2)`."""
    return torch.stack([torch.ones_like(t), t, t.square()], -1)


def bilinear_loadings(t: Tensor, gamma: Tensor) -> Tensor:
    """`(1, min(t, knot), max(t - knot, 0))`: level at time 0, slopes before and after the knot."""
    t, knot = torch.broadcast_tensors(t, gamma)
    return torch.stack([torch.ones_like(t), torch.minimum(t, knot), (t - knot).relu()], -1)


def centred_bilinear_loadings(t: Tensor, gamma: Tensor) -> Tensor:
    """`(1, t - knot, abs(t - knot))`: level at the knot, mean of the slopes, half their rise.

    The factors are those of `bilinear_loadings` times `centring(gamma)`.
    """
    past = t - gamma
    return torch.stack([torch.ones_like(past), past, past.abs()], -1)


def centring(gamma: Tensor) -> Tensor:
    """`(..., 3, 3)`, turns the factors of a bilinear spline with knot `(..., 1)` into centred ones.

    `(eta0 + knot eta1, (eta1 + eta2) / 2, (eta2 - eta1) / 2)`, so that both pairs of loadings and
    factors draw the same curve.
    """
    one, zero = torch.ones_like(gamma), torch.zeros_like(gamma)
    rows = [
        torch.cat([one, gamma, zero], -1),
        torch.cat([zero, one / 2, one / 2], -1),
        torch.cat([zero, -one / 2, one / 2], -1),
    ]
    return torch.stack(rows, -2)


def exponential_loadings(t: Tensor, gamma: Tensor) -> Tensor:
    """`(1, 1 - exp(-rate t))`: level at time 0 and how far it is from there to the asymptote."""
    t, rate = torch.broadcast_tensors(t, gamma)
    return torch.stack([torch.ones_like(t), -torch.expm1(-rate * t)], -1)


def _knots(start: float, end: float) -> tuple[float, float]:
    margin = MARGIN * (end - start)
    return start + margin, end - margin


def _rates(start: float, end: float) -> tuple[float, float]:
    return 0.1 / (end - start), 20 / (end - start)


TRAJECTORIES = {
    "bilinear": Trajectory(3, bilinear_loadings, _knots),
    "linear": Trajectory(2, linear_loadings),
    "quadratic": Trajectory(3, quadratic_loadings),
    "exponential": Trajectory(2, exponential_loadings, _rates),
}


class Conditional(NamedTuple):
    """Subjects in classes: density of what was measured, and growth factors given it.

    Attributes:
        log_density: `(..., K)`.
        loadings: `(..., K, J, d)`, 0 in the rows of missing occasions.
        gram: `(..., K, d, d)`, `Lambda^T Lambda`.
        left: `(..., K, J)`, residuals from the curve of the posterior mean, `r - W u`.
        u: `(..., K, d)`, posterior mean of `L^-1 zeta`.
        factor: `(..., K, d, d)`, Cholesky factor of `A`, the posterior precision of `L^-1 zeta`.
        mean: `(..., K, d)`, posterior mean of the growth factors.
    """

    log_density: Tensor
    loadings: Tensor
    gram: Tensor
    left: Tensor
    u: Tensor
    factor: Tensor
    mean: Tensor


def unpack_tril(packed: Tensor, d: int) -> Tensor:
    """`(..., d, d)`, lower triangular, of rows `(..., d (d + 1) / 2)`; diagonals by exponential."""
    i = torch.arange(d, device=packed.device)
    places = (i * (i + 1) // 2)[:, None] + i.minimum(i[:, None])  # of no use above the diagonal
    return packed[..., places].tril(-1) + torch.diag_embed(packed[..., places.diagonal()].exp())


def pack_tril(factor: Tensor) -> Tensor:
    """`(..., d (d + 1) / 2)`, the rows that `unpack_tril` makes `(..., d, d)` of."""
    logs = torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1).log()) + factor.tril(-1)
    rows, columns = torch.tril_indices(*factor.shape[-2:], device=factor.device)
    return logs[..., rows, columns]


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """`(..., a)`, the products of matrices `(..., a, b)` with vectors `(..., b)`."""
    return (matrix @ vector[..., None]).squeeze(-1)


def centers(params: ExpertParams, data: GrowthData) -> Tensor:
    """`(..., K, d)`, means `alpha + B x` of the growth factors."""
    return params.alpha + apply(params.beta, data.expert_x[..., None, :])


def direct_effects(params: ExpertParams, data: GrowthData) -> Tensor:
    """`(..., K, J)`, what the time-varying covariates add to the responses."""
    return apply(data.tvc_x[..., None, :, :], params.kappa)


def condition(trajectory: Trajectory, params: ExpertParams, data: GrowthData) -> Conditional:
    """Densities of subjects in all classes, and their growth factors given the measurements.

    Args:
        trajectory: The family of curves.
        params: Parameters whose batch dimensions broadcast with those of the subjects.
        data: Measurements of the subjects.
    """
    seen = data.seen[..., None, :]  # (..., 1, J)
    y = (data.y[..., None, :] - direct_effects(params, data)) * seen
    loadings = trajectory.loadings(data.t[..., None, :], params.gamma) * seen[..., None]
    gram = loadings.mT @ loadings
    center, root, theta = centers(params, data), params.scale_tril, params.theta

    eye = torch.eye(trajectory.num_factors, dtype=theta.dtype, device=theta.device)
    precision = eye + root.mT @ gram @ root / theta[..., None, None]
    factor, failed = torch.linalg.cholesky_ex(precision)
    # Fails where a search has gone so far that numbers overflow, which must not end the search.
    factor = factor.masked_fill(failed[..., None, None] > 0, math.nan)
    moment = apply(root.mT, apply(loadings.mT, y - apply(loadings, center)))
    u = torch.cholesky_solve((moment / theta[..., None])[..., None], factor).squeeze(-1)
    mean = center + apply(root, u)
    left = y - apply(loadings, mean)

    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = log_det + seen.sum(-1) * (math.log(2 * math.pi) + theta.log())
    quadratic = left.square().sum(-1) / theta + u.square().sum(-1)
    return Conditional(-0.5 * (quadratic + log_det), loadings, gram, left, u, factor, mean)
