"""One-step acquisition functions that reason about what will be reported in the end.

A value is what the posterior mean will be of the point that is reported, once y at x is known; see
`torchzoo.gp.acquisition_lines` for how means move, and `torchzoo.gp.acquisition` for the formula.

    noisy EI:  E[max_(i <= n+1) mu_(n+1)(x_i)] - max_(i <= n) mu_n(x_i),   x_(n+1) = x,
    KG:        E[max_A mu_(n+1)] - max_A mu_n.

P. I. Frazier, "A tutorial on Bayesian optimization", 2018, sections 4 and 5. Deviations: the
knowledge gradient is that of a finite set A. botorch's noisy expected improvement, which integrates
over what the noise hid, is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.gp.acquisition import expected_rise
from torchzoo.gp.acquisition_lines import IntegratedEnvironment, Lines, posterior_lines


class OneStep(nn.Module):
    """What the acquisition functions share: a model, points where means matter, the noise.

    Args:
        name: What the points are called in errors.
        model: A fitted model.
        points: The points, `(n, d)`.
        noise: Variance of the noise; None: the model's.
        log: Whether to give the logarithm.

    Raises:
        ValueError: Shapes that don't fit.
    """

    points: Tensor

    def __init__(
        self, name: str, model: Any, points: Tensor, noise: Tensor | float | None, log: bool
    ):
        if points.ndim != 2 or not points.numel():
            raise ValueError(f"{name}: expected (n, d), got {tuple(points.shape)}")
        super().__init__()
        self.model = model.eval() if isinstance(model, nn.Module) else model
        self.register_buffer("points", points.detach())
        self.noise, self.log = noise, log

    def extra_repr(self) -> str:
        return f"points={len(self.points)}, log={self.log}"

    def _lines(self, x: Tensor) -> Lines:
        if x.ndim < 2 or x.shape[-2] != 1:
            raise ValueError(f"x: expected (..., 1, d), one point at a time, got {tuple(x.shape)}")
        return posterior_lines(self.model, self.points, x[..., 0, :], noise=self.noise)


class NoisyExpectedImprovement(OneStep):
    """Expected improvement where values are noisy and an evaluated point will be reported.

    Without noise it is expected improvement. x itself is one of the points that can be reported;
    if its mean is the highest already, that is part of the improvement.

    Args:
        model: A fitted model of what is to be maximised: a gpytorch `ExactGP`, a botorch model, or
            a surrogate of this family.
        X_observed: Points evaluated so far.
        noise: Variance of the noise; None: the model's.
        log: Whether to give the logarithm.

    Shape:
        - X_observed: `(n, d)`
        - x: `(..., 1, d)`
        - output: `(...)`

    Raises:
        ValueError: Shapes that don't fit.

    Source:
        P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 5.1.

    Example:
        >>> from torchzoo.gp import GPSurrogate
        >>> x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        >>> acquisition = NoisyExpectedImprovement(GPSurrogate().fit(x, (5 * x).sin()), x)
        >>> bool((acquisition(torch.rand(7, 1, 1).double()) >= 0).all())
        True
    """

    def __init__(
        self,
        model: Any,
        X_observed: Tensor,
        *,
        noise: Tensor | float | None = None,
        log: bool = False,
    ):
        if isinstance(model, IntegratedEnvironment):
            raise ValueError(
                "model: expected one of what is observed, got an IntegratedEnvironment"
            )
        super().__init__("X_observed", model, X_observed, noise, log)

    def forward(self, x: Tensor) -> Tensor:
        mean, slope, mean_x, slope_x = self._lines(x)
        ahead = (mean_x - mean.amax()).clamp_min(0)
        a = torch.cat([mean.expand(slope.shape), mean_x[..., None]], -1)
        b = torch.cat([slope, slope_x[..., None]], -1)
        rise = expected_rise(a, b, log=self.log)
        return torch.logaddexp(ahead.log(), rise) if self.log else ahead + rise


class KnowledgeGradient(OneStep):
    """How much the highest posterior mean over a finite set rises by one observation, exactly.

    botorch's `qKnowledgeGradient` is the one for a continuous domain.

    Args:
        model: A fitted model of what is to be maximised; see `NoisyExpectedImprovement`. With an
            `IntegratedEnvironment` candidates are points x, and observations are at x and w.
        candidates: The set A of points that may be reported.
        noise: Variance of the noise; None: the model's.
        log: Whether to give the logarithm.

    Shape:
        - candidates: `(M, d)`
        - x: `(..., 1, d)`
        - output: `(...)`

    Raises:
        ValueError: Shapes that don't fit.

    Source:
        P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 4.2.

    Example:
        >>> from torchzoo.gp import GPSurrogate
        >>> x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        >>> acquisition = KnowledgeGradient(GPSurrogate().fit(x, (5 * x).sin()), x)
        >>> acquisition(torch.rand(3, 2, 1, 1).double()).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        model: Any,
        candidates: Tensor,
        *,
        noise: Tensor | float | None = None,
        log: bool = False,
    ):
        super().__init__("candidates", model, candidates, noise, log)

    def forward(self, x: Tensor) -> Tensor:
        mean, slope, _, _ = self._lines(x)
        return expected_rise(mean, slope, log=self.log)

    def simulate(self, x: Tensor, z: Tensor) -> Tensor:
        """The rise for given standardised observations, an unbiased estimate.

        Its gradient is that of the mean at the maximiser of the new means, which is held fixed: by
        the envelope theorem an unbiased one of the knowledge gradient's, for stochastic ascent.

        Shape:
            - x: `(..., 1, d)`
            - z: `(S,)`, draws of a standard normal
            - output: `(S, ...)`
        """
        mean, slope, _, _ = self._lines(x)
        moved = mean + slope * z.reshape(-1, *[1] * slope.ndim)
        return moved.amax(-1) - mean.amax()


class CostAwareKG(KnowledgeGradient):
    """Knowledge gradient by a unit of cost, for sources of several fidelities.

    The model's inputs are points with a fidelity; candidates have the fidelity that counts.

    Args:
        model: See `KnowledgeGradient`.
        candidates: The set A of points that may be reported.
        cost: Costs, above 0, of evaluations `(..., d)`.
        noise: Variance of the noise; None: the model's.
        log: Whether to give the logarithm.

    Shape:
        - candidates: `(M, d)`
        - x: `(..., 1, d)`
        - output: `(...)`

    Raises:
        ValueError: Shapes that don't fit.

    Source:
        P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 5.4.

    Example:
        >>> from torchzoo.gp import GPSurrogate
        >>> x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        >>> model = GPSurrogate().fit(x, (5 * x).sin())
        >>> half = CostAwareKG(model, x, lambda x: torch.full_like(x[..., 0], 2.0))
        >>> at = torch.rand(4, 1, 1).double()
        >>> torch.allclose(KnowledgeGradient(model, x)(at), 2 * half(at))
        True
    """

    def __init__(
        self,
        model: Any,
        candidates: Tensor,
        cost: Callable[[Tensor], Tensor],
        *,
        noise: Tensor | float | None = None,
        log: bool = False,
    ):
        super().__init__(model, candidates, noise=noise, log=log)
        self.cost = cost

    def forward(self, x: Tensor) -> Tensor:
        value, cost = super().forward(x), self.cost(x[..., 0, :])
        return value - cost.log() if self.log else value / cost


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or a new one, seeded by torch's."""
    if generator is not None:
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


def sobol_normal(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Scrambled Sobol points of a standard normal, `(count, dim)`, in double precision.

    Raises:
        ValueError: No points.
    """
    if count < 1:
        raise ValueError(f"num_samples: expected at least 1, got {count}")
    seed = int(torch.randint(2**31, (), generator=generator))
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    tiny = torch.finfo(torch.float64).eps
    return torch.special.ndtri(engine.draw(count, dtype=torch.float64).clamp(tiny, 1 - tiny))
