"""Functions to maximise on the unit cube, and their values at Sobol points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchzoo.gp import FlatMLP

LARGE = "random network, 50-d"
Function = Callable[[Tensor], Tensor]


def branin(x: Tensor) -> Tensor:
    """Minus Branin's function; at its three maxima it is -0.398."""
    a, b = 15 * x[..., 0] - 5, 15 * x[..., 1]
    ridge = b - 5.1 / (4 * math.pi**2) * a**2 + 5 / math.pi * a - 6
    return -(ridge**2 + 10 * (1 - 1 / (8 * math.pi)) * a.cos() + 10)


def nonstationary(x: Tensor) -> Tensor:
    """A sine of a polynomial of degree four: fast waves on the left, none on the right.

    Y. Xiong, W. Chen, D. Apley and X. Ding, "A non-stationary covariance-based Kriging method for
    metamodelling in engineering design", 2007, turned upside down.
    """
    t = x[..., 0] - 0.9
    return -((30 * t**4).sin() * (2 * t).cos() + t / 2)


def hartmann(x: Tensor) -> Tensor:
    """Minus Hartmann's function of six inputs; its maximum is 3.322."""
    alpha = x.new_tensor([1.0, 1.2, 3.0, 3.2])
    a = x.new_tensor(
        [
            [10, 3, 17, 3.5, 1.7, 8],
            [0.05, 10, 17, 0.1, 8, 14],
            [3, 3.5, 1.7, 10, 17, 8],
            [17, 8, 0.05, 10, 0.1, 14],
        ]
    )
    p = x.new_tensor(
        [
            [1312, 1696, 5569, 124, 8283, 5886],
            [2329, 4135, 8307, 3736, 1004, 9991],
            [2348, 1451, 3522, 2883, 3047, 6650],
            [4047, 8828, 8732, 5743, 1091, 381],
        ]
    )
    return (alpha * (-(a * (x[..., None, :] - 1e-4 * p) ** 2).sum(-1)).exp()).sum(-1)


def ackley(x: Tensor) -> Tensor:
    """Minus Ackley's function; its maximum is 0, in the middle."""
    z = 65.536 * (x - 0.5)
    spread = (-0.2 * z.square().mean(-1).sqrt()).exp()
    return 20 * spread + (2 * math.pi * z).cos().mean(-1).exp() - 20 - math.e


def random_network(seed: int) -> Function:
    """A network of 2 x 64 tanh units whose weights and biases are standard normal."""
    net = FlatMLP((50, 64, 64, 1))
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(net.size, dtype=torch.float64, generator=generator)
    return lambda x: net(theta, x)[..., 0]


PROBLEMS: dict[str, tuple[int, Callable[[int], Function], float]] = {
    "Branin": (2, lambda seed: branin, 0.0),
    "nonstationary": (1, lambda seed: nonstationary, 0.0),
    LARGE: (50, random_network, 0.0),
    "Hartmann": (6, lambda seed: hartmann, 0.0),
    "Ackley": (10, lambda seed: ackley, 0.01),
}


class Table:
    """Problems of several seeds by their values at Sobol points; calling it gives outcomes.

    Args:
        name: The problem.
        seeds: Each has Sobol points, noise, and where the problem is random a function of its own.
        count: Candidates.

    Attributes:
        candidates: `(B, N, d)`.
        values: Without noise, `(B, N)`.
        spread: Standard deviation of the values, `(B,)`; the unit of noise and regret.
    """

    def __init__(self, name: str, seeds: Sequence[int], count: int):
        self.dim, make, noise = PROBLEMS[name]
        self.seeds = list(seeds)
        self.functions = [make(seed) for seed in seeds]
        self.candidates = torch.stack([self._sobol(seed, count) for seed in seeds])
        self.values = self._values(self.candidates)
        self.spread = self.values.std(-1)
        draws = [
            torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        self.outcomes = self.values + noise * self.spread[:, None] * torch.stack(draws)

    def __call__(self, x: Tensor) -> Tensor:
        """Outcomes of candidates, `(B, q, d)` to `(B, q, 1)`."""
        same = (x[:, :, None, :] == self.candidates[:, None]).all(-1)
        return self.outcomes.gather(-1, same.int().argmax(-1))[..., None]

    def test(self, count: int) -> tuple[Tensor, Tensor]:
        """Other points and their values, `(B, count, d)` and `(B, count, 1)`."""
        x = torch.stack([self._sobol(100_000 + seed, count) for seed in self.seeds])
        return x, self._values(x)[..., None]

    def _sobol(self, seed: int, count: int) -> Tensor:
        engine = torch.quasirandom.SobolEngine(self.dim, scramble=True, seed=seed)
        return engine.draw(count, dtype=torch.float64)

    def _values(self, x: Tensor) -> Tensor:
        return torch.stack([f(rows) for f, rows in zip(self.functions, x, strict=True)])
