"""Randomised smoothing: what a detector can say anywhere within an l2 ball, and counts with bounds.

For f with values in [0, 1] and `g(x) = E f(x + sigma N(0, I))`, `Phi^-1(g)` is `1 / sigma`
Lipschitz in l2 (Cohen, Rosenfeld and Kolter 2019 for votes; Salman et al. 2019 for any f), so

    Phi(Phi^-1(g(x)) - r / sigma) <= g(x + delta) <= Phi(Phi^-1(g(x)) + r / sigma),  |delta| <= r.

g itself is estimated from samples: Clopper-Pearson intervals for votes, and for soft outputs the
inequality of Chernoff and Hoeffding, `P(mean <= m) <= exp(-n kl(m, g))` for m below g, which holds
for any variables in [0, 1] and is nearly as tight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = [
    "ball_bounds",
    "certified_coverage",
    "mean_bounds",
    "smoothed_bounds",
    "smoothed_mean",
]

OUTPUTS = ("vote", "soft")


@torch.no_grad()
def smoothed_mean(
    predictor: nn.Module,
    x: Tensor,
    *,
    sigma: float,
    num_samples: int = 1000,
    output: str = "vote",
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Average a predictor over Gaussian noise on its inputs.

    Args:
        predictor: Gives `L` probabilities for each input.
        x: Inputs.
        sigma: Standard deviation of the noise.
        num_samples: Noisy copies of each input.
        output: `"vote"` counts where a probability is above 1/2, `"soft"` averages probabilities.
        batch_size: Noisy inputs a call.
        generator: Source of the noise.

    Shape:
        - x: `(N, ...)`
        - output: `(N, L)` float64

    Returns:
        The averages, estimates of the smoothed predictor.

    Raises:
        ValueError: A scale or a count that is not above 0, or an unknown kind of output.

    Example:
        >>> sure = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid())
        >>> smoothed_mean(sure, torch.zeros(5, 2), sigma=0.25, num_samples=10).shape
        torch.Size([5, 3])
    """
    for name, value in (("sigma", sigma), ("num_samples", num_samples), ("batch_size", batch_size)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected above 0")
    _check_output(output)
    rows = []
    for part in x.split(batch_size):
        copies = max(1, batch_size // max(1, len(part)))
        total: Tensor | float = 0.0
        for start in range(0, num_samples, copies):
            count = min(copies, num_samples - start)
            noise = torch.randn(
                count, *part.shape, generator=generator, device=x.device, dtype=x.dtype
            )
            probability = predictor((part + sigma * noise).flatten(0, 1))
            found = (probability > 0.5) if output == "vote" else probability
            total = total + found.unflatten(0, (count, len(part))).sum(0, dtype=torch.float64)
        assert isinstance(total, Tensor)
        rows.append(total / num_samples)
    return torch.cat(rows)


def mean_bounds(
    mean: Tensor, num_samples: int, level: float, *, output: str = "vote"
) -> tuple[Tensor, Tensor]:
    """Confidence interval of an expected value from a mean of independent samples in [0, 1].

    Args:
        mean: Means of the samples.
        num_samples: Number of samples.
        level: Chance that the interval fails, half of it at each end.
        output: `"vote"`, samples are 0 or 1: the interval of Clopper and Pearson; `"soft"`,
            anything in [0, 1]: Chernoff and Hoeffding.

    Shape:
        - mean: `(...)`
        - output: two of `(...)`, float64

    Returns:
        Lower and upper ends.

    Raises:
        ValueError: A level outside (0, 1), no samples, or an unknown kind of output.

    Source:
        Clopper and Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the Case of
        the Binomial", 1934; Hoeffding, "Probability Inequalities for Sums of Bounded Random
        Variables", 1963, theorem 1.

    Example:
        >>> mean_bounds(torch.tensor(0.0), 1000, 0.002)[1].mul(1e4).round()
        tensor(69., dtype=torch.float64)
    """
    _check_output(output)
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a number in (0, 1)")
    if num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples}, expected at least 1")
    mean = mean.double()
    if output == "vote":
        from scipy.stats import beta

        count = (mean * num_samples).round().cpu().numpy()
        low = torch.as_tensor(beta.ppf(level / 2, count, num_samples - count + 1))
        high = torch.as_tensor(beta.isf(level / 2, count + 1, num_samples - count))
        return low.to(mean).nan_to_num(nan=0.0), high.to(mean).nan_to_num(nan=1.0)
    budget = math.log(2 / level) / num_samples
    return 1 - _kl_upper(1 - mean, budget), _kl_upper(mean, budget)


def _kl_upper(mean: Tensor, budget: float) -> Tensor:
    """The largest q at least the mean with `kl(mean, q) <= budget`, from above."""
    low, high = mean.clone(), torch.ones_like(mean)
    for _ in range(60):
        middle = (low + high) / 2
        apart = torch.special.xlogy(mean, mean / middle)
        apart = apart + torch.special.xlogy(1 - mean, (1 - mean) / (1 - middle))
        near = apart <= budget
        low, high = torch.where(near, middle, low), torch.where(near, high, middle)
    return high


def ball_bounds(
    lo: Tensor, hi: Tensor, *, sigma: float, radius: float | Tensor
) -> tuple[Tensor, Tensor]:
    """What smoothed values between `lo` and `hi` can become within an l2 ball.

    Args:
        lo: Lower ends at the centre.
        hi: Upper ends at the centre.
        sigma: Standard deviation of the noise.
        radius: Radius of the ball.

    Shape:
        - lo, hi: `(...)`
        - output: two of `(...)`

    Returns:
        Lower and upper ends in the ball.

    Raises:
        ValueError: A `sigma` that is not above 0, or a `radius` below 0.

    Source:
        Salman et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed
        Classifiers", 2019, lemma 2.

    Example:
        >>> half = torch.tensor(0.5)
        >>> ball_bounds(half, half, sigma=0.5, radius=0.5)
        (tensor(0.1587), tensor(0.8413))
    """
    if not sigma > 0:
        raise ValueError(f"sigma: got {sigma}, expected above 0")
    if not torch.as_tensor(radius).ge(0).all():
        raise ValueError(f"radius: got {radius}, expected at least 0")
    shift = radius / sigma
    low = torch.special.ndtr(torch.special.ndtri(lo) - shift)
    return low, torch.special.ndtr(torch.special.ndtri(hi) + shift)


def smoothed_bounds(
    predictor: nn.Module,
    x: Tensor,
    *,
    sigma: float,
    radius: float,
    num_samples: int = 1000,
    alpha_cert: float = 1e-3,
    output: str = "vote",
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Bounds of a smoothed predictor's probabilities anywhere within an l2 ball around inputs.

    Each interval fails, by bad luck of the samples, with chance at most `alpha_cert`.

    Args:
        predictor: Gives `L` probabilities for each input.
        x: Inputs.
        sigma: Standard deviation of the noise.
        radius: Radius of the ball, in units of `x`.
        num_samples: Noisy copies of each input.
        alpha_cert: Chance that an interval fails, half of it at each end.
        output: What is smoothed, `"vote"` or `"soft"`; see `smoothed_mean`.
        batch_size: Noisy inputs a call.
        generator: Source of the noise.

    Shape:
        - x: `(N, ...)`
        - output: two of `(N, L)`, float64

    Returns:
        Lower and upper ends.

    Raises:
        ValueError: See `smoothed_mean`, `mean_bounds` and `ball_bounds`.

    Source:
        Kang, Gürel, Li and Li, "COLEP: Certifiably Robust Learning-Reasoning Conformal Prediction
        via Probabilistic Circuits", 2024, section 5, after Cohen, Rosenfeld and Kolter, "Certified
        Adversarial Robustness via Randomized Smoothing", 2019.

    Example:
        >>> step = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sigmoid())
        >>> lo, hi = smoothed_bounds(step, torch.zeros(2, 1), sigma=0.5, radius=0.25)
        >>> bool((lo < hi).all())
        True
    """
    mean = smoothed_mean(
        predictor,
        x,
        sigma=sigma,
        num_samples=num_samples,
        output=output,
        batch_size=batch_size,
        generator=generator,
    )
    lo, hi = mean_bounds(mean, num_samples, alpha_cert, output=output)
    return ball_bounds(lo, hi, sigma=sigma, radius=radius)


def certified_coverage(covered: Tensor, *, beta: float = 1e-3, loss: float = 0.0) -> float:
    """Lower bound of a coverage from points on which it is certain to hold or not.

    Args:
        covered: Bool, for independent points that were not used for the thresholds, whether the
            worst case of each is covered.
        beta: Chance that the bound fails.
        loss: Chance that a point counts wrongly, which is taken off.

    Shape:
        - covered: `(N,)`

    Returns:
        The lower end of Clopper and Pearson at level `beta`, less `loss`, at least 0.

    Raises:
        ValueError: Another shape or type, no points, or a `beta` outside (0, 1).

    Example:
        >>> round(certified_coverage(torch.ones(100, dtype=torch.bool), beta=0.05), 4)
        0.9705
    """
    if covered.ndim != 1 or covered.dtype != torch.bool or not len(covered):
        got = f"{covered.dtype} of shape {tuple(covered.shape)}"
        raise ValueError(f"covered: got {got}, expected bool of shape (N,) with N at least 1")
    if not 0 < beta < 1:
        raise ValueError(f"beta: got {beta}, expected a number in (0, 1)")
    share = covered.double().mean()
    low, _ = mean_bounds(share, len(covered), 2 * beta) if beta < 0.5 else (share, share)
    return max(0.0, low.item() - loss)


def _check_output(output: str) -> None:
    if output not in OUTPUTS:
        raise ValueError(f"output: got {output!r}, expected one of {OUTPUTS}")
