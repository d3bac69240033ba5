"""Maximum-likelihood estimation of a Gaussian mixture of experts from several starts.

The measure with at most `k` atoms that maximises `sum_t log p(y_t | x_t)`, as in H. Nguyen,
P. Akbarian and N. Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
2024. The likelihood has many local maxima: each start is climbed and the best one kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.common.solvers import minimize_lbfgs
from torchzoo.moe.em import GATE_STEPS, update_experts
from torchzoo.moe.gates import TopKGate
from torchzoo.moe.gaussian import GaussianMoE
from torchzoo.moe.gaussian_params import MoEParams
from torchzoo.moe.routing import Gate, check_count


def fit_mle(
    x: Tensor,
    y: Tensor,
    num_experts: int,
    *,
    gate: str | Gate = "softmax",
    top_k: int | None = None,
    select_with_bias: bool = False,
    init: MoEParams | None = None,
    restarts: int = 5,
    seed: int = 0,
    method: str = "lbfgs",
    max_iter: int = 500,
    tol: float = 1e-9,
) -> GaussianMoE:
    """Maximum-likelihood fit of a Gaussian mixture of experts, the best of several starts.

    A start clusters the standardised pairs (x, y) by k-means++, fits a line to each cluster and
    the gate to the cluster labels. The likelihood has no maximum where an expert passes exactly
    through as many points as it has coefficients; such spikes are for the user to look at.

    Args:
        x: Inputs, `(n, d)`.
        y: Responses, `(n,)`.
        num_experts: Number of experts.
        gate: Gate by name or a `Gate`, which is copied; see `GaussianMoE`.
        top_k: Experts a token, with the gate "topk".
        select_with_bias: Whether the gate "topk" chooses by scores with bias.
        init: Where to start instead; then there is one start.
        restarts: Number of starts from clusters.
        seed: Seed of the starts; start i has `seed + i`.
        method: "lbfgs" or "em".
        max_iter: Most iterations of a start.
        tol: See `GaussianMoE.fit`.

    Shape:
        - x: `(n, d)`
        - y: `(n,)`

    Returns:
        The fitted model, in the type and on the device of `x`.

    Raises:
        ValueError: Shapes that don't fit, fewer points than experts, or no start.

    Source:
        Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of
        Experts?", 2024, eq. (2).

    Example:
        >>> x = torch.linspace(-1, 1, 400, dtype=torch.float64)[:, None]
        >>> y = 3 * x[:, 0].abs() + 0.1 * torch.sin(100 * x[:, 0])
        >>> sorted(round(slope) for slope in fit_mle(x, y, 2).params().a.flatten().tolist())
        [-3, 3]
    """
    check_count("num_experts", num_experts)
    check_count("restarts", restarts)
    _check_points(x, y, num_experts)
    rule: dict[str, Any] = {"top_k": top_k, "select_with_bias": select_with_bias}
    fits = []
    for start in range(seed, seed + (restarts if init is None else 1)):
        if init is None:
            model = _start_from_clusters(x, y, num_experts, gate, rule, start)
        else:
            model = GaussianMoE.from_params(init, gate=gate, **rule)
        fits.append(model.fit(x, y, method=method, max_iter=max_iter, tol=tol))
    return _likeliest(fits, x, y)


def fit_restarts(model: GaussianMoE, x: Tensor, y: Tensor, restarts: int, **options: Any) -> None:
    """Fit from the present parameters and from clusters, and keep the best.

    Args:
        model: The model, changed in place.
        x: Inputs, `(n, d)`.
        y: Responses, `(n,)`.
        restarts: Number of starts in all.
        options: Passed on to `GaussianMoE.fit`.

    Raises:
        ValueError: Shapes that don't fit, or fewer points than experts.
    """
    _check_points(x, y, model.num_experts)
    starts = [copy.deepcopy(model) for _ in range(restarts)]
    for seed, start in enumerate(starts[1:]):
        initialize_from_clusters(start, x, y, seed=seed)
    best = _likeliest([start.fit(x, y, **options) for start in starts], x, y)
    model.load_state_dict(best.state_dict())


@torch.no_grad()
def _likeliest(models: Sequence[GaussianMoE], x: Tensor, y: Tensor) -> GaussianMoE:
    """The model of the highest likelihood, the first where several have it."""
    return max(models, key=lambda model: model.log_prob(x, y).mean().item())


def _check_points(x: Tensor, y: Tensor, num_experts: int) -> None:
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x, y: expected (n, d) and (n,), got {tuple(x.shape)}, {tuple(y.shape)}")
    if len(x) < num_experts:
        raise ValueError(f"num_experts: expected at most {len(x)}, the points, got {num_experts}")


def _start_from_clusters(
    x: Tensor, y: Tensor, num_experts: int, gate: str | Gate, rule: dict[str, Any], seed: int
) -> GaussianMoE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = gate if isinstance(gate, str) else copy.deepcopy(gate)
        model = GaussianMoE(x.shape[-1], num_experts, gate=kind, **rule)
    model.to(device=x.device, dtype=x.dtype)
    initialize_from_clusters(model, x, y, seed=seed)
    return model


def initialize_from_clusters(model: GaussianMoE, x: Tensor, y: Tensor, *, seed: int) -> None:
    """Start from clusters of the standardised pairs (x, y): their lines, and a gate to tell them.

    Args:
        model: The model, changed in place.
        x: Inputs, `(n, d)`.
        y: Responses, `(n,)`.
        seed: Seed of k-means++.
    """
    import numpy as np
    from scipy.cluster.vq import kmeans2, whiten

    k = model.num_experts
    pairs = torch.cat([x, y.unsqueeze(-1)], -1).double().cpu().numpy()
    points = whiten(pairs, check_finite=False)
    rng = np.random.default_rng(seed)
    _, labels = kmeans2(points, k, minit="++", missing="warn", seed=rng)
    hard = F.one_hot(torch.as_tensor(labels, dtype=torch.int64, device=x.device), k).to(x.dtype)
    # A tenth of the weight is shared out: no expert is a spike at the start, and a gate that
    # fits separable clusters stays finite.
    soft = 0.9 * hard + 0.1 / k
    update_experts(model, x, y, soft)
    _teach_gate(model.gate, x, soft)


def _teach_gate(gate: Gate, x: Tensor, labels: Tensor) -> None:
    """Fit the softmax over all experts to labels `(n, k)`.

    Where a top-K gate chooses without its bias, the weights alone must tell the labels apart, and
    the bias is 0.
    """
    held = gate.bias if isinstance(gate, TopKGate) and not gate.select_with_bias else None
    if held is not None:
        nn.init.zeros_(held)

    def cross_entropy() -> Tensor:
        return -(labels * gate.log_probs(x)).sum(-1).mean()

    free = [p for p in gate.parameters() if p is not held]
    minimize_lbfgs(cross_entropy, free, max_iter=GATE_STEPS)
