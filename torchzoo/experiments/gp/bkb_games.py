"""Games of bandits: arms with rewards, and the posteriors that rivals of BKB choose by."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from torchzoo.gp import BKB, nystrom_features

NOISE, BETA_SCALE, MARKS = 0.5, 0.3, 8
Posterior = tuple[Tensor, Tensor]


def rbf(length: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Gaussian kernel of unit variance."""
    return lambda a, b: (-torch.cdist(a, b).square() / (2 * length**2)).exp()


def sample_path(arms: Tensor, length: float, seed: int) -> Tensor:
    """A draw of the process at the arms, by 2000 random Fourier features."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    waves = torch.randn(arms.shape[1], 2000, **options) / length
    phases = 2 * math.pi * torch.rand(2000, **options)
    return (arms @ waves + phases).cos() @ torch.randn(2000, **options) * (2 / 2000) ** 0.5


def uniform_arms(count: int, seed: int) -> Tensor:
    """Arms in the unit square."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, dtype=torch.float64, generator=generator)


@cache
def table(name: str) -> tuple[Tensor, Tensor, float]:
    """Rows of a table, a kernel ridge fit at them with unit variance, and the kernel's length.

    The fit is to the progression of diabetes, or to the colour intensity of wine from the rest.
    """
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    x, y = torch.from_numpy(data.data).double(), torch.from_numpy(data.target).double()
    if name == "wine":
        at = data.feature_names.index("color_intensity")
        x, y = torch.cat([x[:, :at], x[:, at + 1 :]], 1), x[:, at]
    x = (x - x.mean(0)) / x.std(0)
    y = (y - y.mean()) / y.std()
    length = float(torch.pdist(x).median())
    k = rbf(length)(x, x)
    fit = k @ torch.linalg.solve(k + torch.eye(len(k), dtype=k.dtype), y)
    return x, (fit - fit.mean()) / fit.std(), length


def exact_posterior(k: Tensor, counts: Tensor, sums: Tensor, lam: float) -> Posterior:
    """Mean and variance over lambda at all arms, pulls of an arm merged into their mean."""
    pulled = counts.nonzero()[:, 0]
    noise = lam / counts[pulled]
    factor = torch.linalg.cholesky(k[pulled][:, pulled] + noise.diag())
    white = torch.linalg.solve_triangular(factor, k[pulled], upper=False)
    means = (sums / counts)[pulled, None]
    mean = white.mT @ torch.linalg.solve_triangular(factor, means, upper=False)
    return mean[:, 0], (k.diagonal() - white.square().sum(0)) / lam


def sketch(
    k: Tensor, counts: Tensor, sums: Tensor, lam: float, inducing: Tensor, correct: bool
) -> Posterior:
    """The same from inducing points; without `correct` it is the subset of regressors."""
    z = nystrom_features(k[inducing][:, inducing], k[:, inducing])
    v = z.mT @ (counts[:, None] * z) + lam * torch.eye(z.shape[1], dtype=z.dtype)
    factor = torch.linalg.cholesky(v)
    variance = torch.linalg.solve_triangular(factor, z.mT, upper=False).square().sum(0)
    if correct:
        variance = variance + (k.diagonal() - z.square().sum(1)).clamp_min(0) / lam
    return z @ torch.cholesky_solve(z.mT @ sums[:, None], factor)[:, 0], variance


class Game:
    """Arms with rewards, and pulls of them; the noise of a round is the same for every bandit."""

    def __init__(self, arms: Tensor, values: Tensor, length: float, pulls: int, seed: int):
        self.arms, self.values, self.kernel = arms, values, rbf(length)
        self.k, self.lam = self.kernel(arms, arms), NOISE**2
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = NOISE * torch.randn(pulls, dtype=torch.float64, generator=self.generator)

    def reward(self, arm: int, t: int) -> float:
        return float(self.values[arm] + self.noise[t])

    def regret(self, chosen: list[int]) -> list[float]:
        """Cumulative regret at the marks."""
        lost = (self.values.max() - self.values[chosen]).cumsum(0)
        return [float(lost[len(chosen) * (i + 1) // MARKS - 1]) for i in range(MARKS)]

    def starved(self, posterior: Posterior, chosen: list[int]) -> float:
        """Share of arms whose variance is below half of the exact one for the same pulls."""
        exact = exact_posterior(self.k, *self.totals(chosen), self.lam)[1]
        return float((posterior[1] < 0.5 * exact).double().mean())

    def totals(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Pulls and rewards of each arm."""
        index = torch.tensor(chosen)
        counts = torch.bincount(index, minlength=len(self.arms)).double()
        rewards = self.values[index] + self.noise[: len(index)]
        return counts, torch.zeros_like(counts).index_add(0, index, rewards)

    def bkb(self) -> tuple[list[int], list[int], Posterior]:
        """Play BKB: arms, numbers of inducing points, and the last posterior."""
        bandit = BKB(
            self.kernel, noise_variance=self.lam, beta_scale=BETA_SCALE, generator=self.generator
        )
        bandit.initialize(self.arms, [0], [self.reward(0, 0)])
        sizes = [1]
        for t in range(1, len(self.noise)):
            arm = bandit.ask()
            bandit.tell(arm, self.reward(arm, t))
            sizes.append(len(bandit.inducing_index))
        return bandit.pulled_index.tolist(), sizes, (bandit.means, bandit.variances)

    def rival(self, posterior: Callable[[Tensor, Tensor], Posterior]) -> list[int]:
        """Play upper confidence bounds of a posterior given counts and sums."""
        chosen = [0]
        counts, sums = self.totals(chosen)
        for t in range(1, len(self.noise)):
            mean, variance = posterior(counts, sums)
            spread = math.log(t) * float((counts * variance).sum()) + math.log(2)
            beta = BETA_SCALE * (math.sqrt(self.lam) + math.sqrt(self.lam * spread))
            chosen.append(int((mean + beta * variance.clamp_min(0).sqrt()).argmax()))
            counts[chosen[-1]] += 1
            sums[chosen[-1]] += self.reward(chosen[-1], t)
        return chosen

    def uniform(self, sizes: list[int]) -> Callable[[Tensor, Tensor], Posterior]:
        """Inducing points drawn evenly from pulled arms, as many as BKB had in that round."""

        def posterior(counts: Tensor, sums: Tensor) -> Posterior:
            pulled = counts.nonzero()[:, 0]
            order = torch.randperm(len(pulled), generator=self.generator)
            kept = pulled[order[: sizes[int(counts.sum()) - 1]]]
            return sketch(self.k, counts, sums, self.lam, kept, True)

        return posterior
