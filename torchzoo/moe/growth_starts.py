"""Starts for maximum likelihood of mixtures of growth curves, from clusters of subjects.

Several starts are climbed a few steps at once and the best one goes on (C. Biernacki, G. Celeux
and G. Govaert, "Choosing starting values for the EM algorithm for getting the highest likelihood in
multivariate Gaussian mixture models", 2003).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.moe.growth import GrowthMoE, GrowthParams
from torchzoo.moe.growth_curves import ExpertParams, GrowthData, apply, condition
from torchzoo.moe.growth_em import expectation_maximisation, solve_means, update_spread

SHORT_RUN = 10
"""Iterations of expectation-maximisation after which the best start is chosen."""

GRID = 7
"""Knots or rates that a start tries in each class."""


def best_start(model: GrowthMoE, data: GrowthData, n_starts: int, seed: int) -> GrowthParams:
    """The best of several starts after a short run of each.

    Args:
        model: Gives the sizes; it is left as it is.
        data: Measurements.
        n_starts: Number of starts.
        seed: Seed of the clusters.
    """
    found = expectation_maximisation(
        model.experts.trajectory,
        initial_params(model, data, n_starts, seed),
        data,
        bounds=shape_bounds(model),
        shared_residual=model.experts.shared_residual,
        max_iter=SHORT_RUN,
    )
    best = int(found.trace[-1].nan_to_num(-math.inf).argmax())
    return GrowthParams(*(value[best] for value in found.params))


def shape_bounds(model: GrowthMoE) -> tuple[float, float] | None:
    """Range of the knots or rates; None where the curves have none."""
    bounds = model.experts.trajectory.bounds
    return None if bounds is None else bounds(*model.experts.time_range)


@torch.no_grad()
def initial_params(model: GrowthMoE, data: GrowthData, n_starts: int, seed: int) -> GrowthParams:
    """Starts from clusters of the subjects, with batch dimension `(n_starts,)`.

    Clusters are of the coefficients of each subject's own curve, standardised, and after the
    first start weighed at random. Knots or rates are the best of a grid, class by class.
    """
    trajectory, bounds, k = model.experts.trajectory, shape_bounds(model), model.num_classes
    shape = data.y.new_full((1, trajectory.num_shapes), 0.0 if bounds is None else sum(bounds) / 2)
    loadings = trajectory.loadings(data.t, shape) * data.seen[..., None]
    pooled = torch.linalg.lstsq(loadings.flatten(0, 1), data.y.flatten()[:, None]).solution
    # Coefficients that too few measurements leave open stay at those of all subjects together.
    residual = data.y[..., None] - loadings @ pooled
    own = (pooled + torch.linalg.pinv(loadings) @ residual).squeeze(-1)
    left = data.y - apply(loadings, own)
    theta = left.square().mean() + 1e-3 * data.y.var()

    deviations = own - own.mean(0)
    psi = deviations.mT @ deviations / len(own)
    psi = psi + 1e-3 * torch.diag_embed(psi.diagonal() + psi.diagonal().mean())
    labels = _clusters(own, k, n_starts, seed)
    r = 0.9 * F.one_hot(labels, k).to(own) + 0.1 / k  # (S, n, K)

    def repeat(value: Tensor) -> Tensor:
        return value.expand(n_starts, k, *value.shape).clone()

    zeros = data.y.new_zeros
    params = GrowthParams(
        zeros(n_starts, k),
        zeros(n_starts, k, data.gate_x.shape[-1]),
        repeat(shape[0]),
        repeat(pooled[:, 0]),
        repeat(zeros(len(pooled), data.expert_x.shape[-1])),
        repeat(torch.linalg.cholesky(psi)),
        repeat(theta),
        repeat(zeros(data.tvc_x.shape[-1])),
    )
    return _with_best_shapes(model, params, data, r)


def _with_best_shapes(
    model: GrowthMoE, params: GrowthParams, data: GrowthData, r: Tensor
) -> GrowthParams:
    """Means, covariances, and knots or rates of a grid, for classes of given members."""
    trajectory, bounds = model.experts.trajectory, shape_bounds(model)
    grid = [None] if bounds is None else torch.linspace(*bounds, GRID + 2)[1:-1].tolist()
    fits, values = [], []
    for shape in grid:
        experts = params.experts
        if shape is not None:
            experts = experts._replace(gamma=torch.full_like(experts.gamma, shape))
        experts = solve_means(trajectory, experts, data, r)
        experts = update_spread(trajectory, experts, data, r)
        joint = condition(trajectory, experts.per_subject(), data).log_density
        fits.append(experts)
        values.append((r * joint).sum(-2))  # (S, K)
    best = torch.stack(values).argmax(0)

    def pick(*candidates: Tensor) -> Tensor:
        stacked = torch.stack(candidates)
        index = best.reshape(1, *best.shape, *(1 for _ in stacked.shape[3:]))
        return stacked.gather(0, index.expand(1, *stacked.shape[1:]))[0]

    experts = ExpertParams(*map(pick, *fits))
    if model.experts.shared_residual:
        experts = experts._replace(theta=experts.theta.mean(-1, keepdim=True).expand_as(best))
    return GrowthParams(params.gate_bias, params.gate_weight, *experts)


def _clusters(points: Tensor, k: int, n_starts: int, seed: int) -> Tensor:
    """`(n_starts, n)` int64, labels by k-means++ of coordinates with other weights each time."""
    import numpy as np
    from scipy.cluster.vq import kmeans2

    rng = np.random.default_rng(seed)
    standard = ((points - points.mean(0)) / (points.std(0) + 1e-12)).cpu().numpy()
    labels = []
    for start in range(n_starts):
        weights = rng.exponential(size=standard.shape[1]) if start else 1.0
        found = kmeans2(standard * weights, k, minit="++", missing="warn", seed=rng)[1]
        labels.append(torch.as_tensor(found, dtype=torch.int64, device=points.device))
    return torch.stack(labels)
