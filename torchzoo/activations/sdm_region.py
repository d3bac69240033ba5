"""What an SDM calibrator fits: rescaler, region of acceptance, and bounds of repeated runs."""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.activations.sdm import sdm_loss, sdm_softmax


class SDMRegion(NamedTuple):
    """Where predictions are accepted.

    Attributes:
        qt_min: The least soft bin; infinite where the region is empty.
        psi: Thresholds of the classes, `(C,)`; 0 where the region is empty.
    """

    qt_min: Tensor
    psi: Tensor


def dkw_band(n: Tensor, alpha: float) -> Tensor:
    """Half width of the band that an empirical distribution of n values stays in with chance alpha.

    Args:
        n: Numbers of values, any shape.
        alpha: Probability, above 1/2.

    Returns:
        `sqrt(ln(2 / (1 - alpha)) / (2 n))`, and 1 where n is 0.

    Source:
        Dvoretzky, Kiefer and Wolfowitz, 1956, with the constant of Massart, 1990.

    Example:
        >>> round(dkw_band(torch.tensor(100), 0.95).item(), 5)
        0.13581
    """
    half = (math.log(2 / (1 - alpha)) / (2 * n.clamp_min(1))).sqrt()
    return torch.where(n > 0, half, 1.0)


def find_region(p: Tensor, qt: Tensor, labels: Tensor, alpha: float) -> SDMRegion:
    """The least soft bin from which on every class's quantile is at least alpha.

    Args:
        p: Rescaled outputs of the points that take part, wrong predictions too, `(N, C)`.
        qt: Their soft bins, `(N,)`.
        labels: Their true classes, `(N,)`.
        alpha: Probability.

    Returns:
        The region; empty, with `qt_min` infinite, where there is none.

    Source:
        Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025, the search for the
        high-probability region.

    Example:
        >>> p = torch.tensor([[0.6, 0.4], [0.99, 0.01], [0.02, 0.98]])
        >>> qt, labels = torch.tensor([1.5, 3.0, 3.5]), torch.tensor([0, 0, 1])
        >>> find_region(p, qt, labels, 0.95).qt_min.item()
        3.0
    """
    values = p.gather(1, labels.unsqueeze(-1)).squeeze(-1).tolist()
    bins, classes = qt.tolist(), labels.tolist()
    order = sorted(range(len(bins)), key=bins.__getitem__, reverse=True)
    above: list[list[float]] = [[] for _ in range(p.shape[1])]
    region = SDMRegion(qt.new_tensor(math.inf), p.new_zeros(p.shape[1]))
    for place, i in enumerate(order):
        bisect.insort(above[classes[i]], values[i])
        if place + 1 < len(order) and bins[order[place + 1]] == bins[i]:
            continue  # the candidate keeps all points of its bin
        psi = [_lower_quantile(ascending, alpha) for ascending in above]
        if min(psi) >= alpha:
            region = SDMRegion(qt.new_tensor(bins[i]), p.new_tensor(psi))
    return region


def _lower_quantile(ascending: list[float], alpha: float) -> float:
    n = len(ascending)
    return ascending[min(int((1 - alpha) * n), n - 1)] if n else 0.0


def rescale(v: Tensor, weight: Tensor, qt: Tensor) -> Tensor:
    """The rescaled output `softmax(ln(2 + qt) W v)`, `(N, C)`."""
    return sdm_softmax(v @ weight.T, qt, torch.ones_like(qt))


@torch.enable_grad()
def fit_rescaler(
    v: Tensor, qt: Tensor, labels: Tensor, *, steps: int = 300, lr: float = 1e-2
) -> Tensor:
    """The matrix W `(C, C)` of least loss on calibration points, by Adam on all of them at once.

    Args:
        v: Quantiles of the outputs, `(N, C)`.
        qt: Soft bins, `(N,)`; the loss of a point is to the base 2 + qt.
        labels: True classes, `(N,)`.
        steps: Number of steps.
        lr: Learning rate.

    Returns:
        The matrix of the lowest loss that was met, starting at the identity.

    Source:
        Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025, the rescaler.
    """
    weight = torch.eye(v.shape[1], dtype=v.dtype, device=v.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=lr)
    lowest, best = math.inf, weight.detach().clone()
    for _ in range(steps + 1):
        loss = sdm_loss(v @ weight.T, labels, qt, torch.ones_like(qt))
        if loss.item() < lowest:
            lowest, best = loss.item(), weight.detach().clone()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return best


def bin_medians(p: Tensor, pred: Tensor, hard_bins: Tensor, num_bins: int) -> Tensor:
    """Median of the predicted class's output by predicted class and bin, `(C, B)`; NaN if none."""
    values = p.gather(1, pred.unsqueeze(-1)).squeeze(-1)
    medians = p.new_full((p.shape[1], num_bins), torch.nan)
    for c, b in set(zip(pred.tolist(), hard_bins.tolist(), strict=True)):
        medians[c, b] = _median(values[(pred == c) & (hard_bins == b)])
    return medians


def cauchy_spread(values: Tensor, alpha: float) -> float:
    """How far a Cauchy law around 0, of these values' spread, reaches with chance alpha.

    Args:
        values: One value a run, `(J,)`.
        alpha: Probability.

    Returns:
        The median absolute deviation times `tan(pi (alpha - 1/2))`; 0 where that is not finite.

    Example:
        >>> round(cauchy_spread(torch.tensor([1.0, 2.0, 4.0]), 0.75), 6)
        1.0
    """
    spread = float(_median((values - _median(values)).abs()))
    reach = spread * math.tan(math.pi * (alpha - 0.5))
    return reach if math.isfinite(reach) else 0.0


def _median(values: Tensor) -> Tensor:
    """The median, midway between two; infinities are values, NaN gives NaN."""
    if not len(values) or values.isnan().any():
        return values.new_tensor(torch.nan)
    ascending = values.sort().values
    return (ascending[(len(values) - 1) // 2] + ascending[len(values) // 2]) / 2
