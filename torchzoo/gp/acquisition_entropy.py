"""Acquisition functions that count what is learned of where the maximum is.

The information is mutual, of the maximiser x* over a finite set A and of the observation y at x,

    H[x*] - E H[x* given y] = H[y] - E H[y given x*],

so entropy search, which follows the left side, and predictive entropy search, which follows the
right one, are two ways to one number. Both draw values over A and look at which one is the highest.

P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 4.3; P. Hennig and C. J.
Schuler, "Entropy search for information-efficient global optimization", 2012; J. M.
Hernandez-Lobato, M. W. Hoffman and Z. Ghahramani, "Predictive entropy search for efficient global
optimization of black-box functions", 2014. Deviations: a finite set A stands for the domain; what
x* tells of y comes from the draws it is the maximiser of, not from expectation propagation on
conditions at a few points, for which there is botorch's `qPredictiveEntropySearch`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchzoo.common.linalg import psd_cholesky
from torchzoo.gp.acquisition_lines import gaussian
from torchzoo.gp.acquisition_modules import OneStep, seeded, sobol_normal


class _SampledMaximisers(OneStep):
    """White noise for draws over the candidates, the same at each call."""

    white: Tensor

    def __init__(self, model: Any, candidates: Tensor, noise: Tensor | float | None, white: Tensor):
        super().__init__("candidates", model, candidates, noise, False)
        self.register_buffer("white", white.to(candidates))

    def _factor(self, like: Tensor) -> Tensor:
        """Cholesky factor of the covariance of the candidates."""
        return psd_cholesky(gaussian(self.model, self.points.to(like)).covariance[0])[0]


class EntropySearch(_SampledMaximisers):
    """How much is learned of where the maximum over a finite set is.

    It is the mutual information of the maximiser and Z, the standardised observation, with
    probabilities by counting on common samples and with Z at Gauss-Hermite nodes: at least 0, a
    little too high by the counting, and without a gradient.

    Args:
        model: See `KnowledgeGradient`.
        candidates: The set A.
        noise: Variance of the noise; None: the model's.
        num_samples: Functions that are drawn.
        num_nodes: Values of Z.
        generator: Draws them, once; None: a new one, seeded by torch's.

    Shape:
        - candidates: `(M, d)`
        - x: `(..., 1, d)`
        - output: `(...)`

    Raises:
        ValueError: An option out of its range, or shapes that don't fit.

    Source:
        P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 4.3; P. Hennig and
        C. J. Schuler, "Entropy search for information-efficient global optimization", 2012.

    Example:
        >>> from torchzoo.gp import GPSurrogate
        >>> x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        >>> acquisition = EntropySearch(GPSurrogate().fit(x, (5 * x).sin()), x)
        >>> bool((acquisition(torch.rand(3, 1, 1).double()) >= 0).all())
        True
    """

    def __init__(
        self,
        model: Any,
        candidates: Tensor,
        *,
        noise: Tensor | float | None = None,
        num_samples: int = 512,
        num_nodes: int = 10,
        generator: torch.Generator | None = None,
    ):
        for name, value in {"num_samples": num_samples, "num_nodes": num_nodes}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        shape = (num_samples, len(candidates) + 1)
        white = torch.randn(shape, generator=seeded(generator), dtype=torch.float64)
        super().__init__(model, candidates, noise, white)
        self.num_nodes = num_nodes

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        import numpy as np

        mean, slope, _, _ = self._lines(x)
        factor = self._factor(mean)
        white, extra = self.white[:, :-1].to(mean), self.white[:, -1].to(mean)
        paths = mean + white @ factor.mT
        nodes, weights = (
            mean.new_tensor(v) for v in np.polynomial.hermite_e.hermegauss(self.num_nodes)
        )
        weights = weights / weights.sum()
        values = [
            self._information(paths, row, self._observed(factor, row, white, extra), nodes, weights)
            for row in slope.reshape(-1, slope.shape[-1])
        ]
        return torch.stack(values).reshape(slope.shape[:-1]) if values else slope.sum(-1)

    def _observed(self, factor: Tensor, slope: Tensor, white: Tensor, extra: Tensor) -> Tensor:
        """Z of each path: its regression on the path, and what that leaves open."""
        weight = torch.linalg.solve_triangular(factor, slope[:, None], upper=False)[:, 0]
        return white @ weight + (1 - weight.square().sum()).clamp_min(0).sqrt() * extra

    def _information(
        self, paths: Tensor, slope: Tensor, observed: Tensor, nodes: Tensor, weights: Tensor
    ) -> Tensor:
        moved = paths + (nodes[:, None, None] - observed[:, None]) * slope
        top = moved.argmax(-1)
        counts = torch.zeros(len(nodes), len(slope)).to(paths)
        given = counts.scatter_add(1, top, torch.ones_like(moved[..., 0])) / len(paths)
        return (_entropy(weights @ given) - weights @ _entropy(given)).clamp_min(0)


class PredictiveEntropySearch(_SampledMaximisers):
    """How much the entropy of an observation falls by learning where the maximum is.

    Values over A are drawn once. An observation given that a candidate is the maximiser has the
    mean and variance of those draws in which it is, and is taken as Gaussian, which has the most
    entropy for them: up to sampling the result is at most the mutual information. It has a gradient
    by x.

    Args:
        model: See `KnowledgeGradient`.
        candidates: The set A.
        noise: Variance of the noise; None: the model's.
        num_samples: Functions that are drawn, by Sobol points.
        generator: Scrambles these, once; None: a new one, seeded by torch's.

    Shape:
        - candidates: `(M, d)`
        - x: `(..., 1, d)`
        - output: `(...)`

    Raises:
        ValueError: An option out of its range, or shapes that don't fit.

    Source:
        J. M. Hernandez-Lobato and others, "Predictive entropy search for efficient global
        optimization of black-box functions", 2014, equation 3; P. I. Frazier, "A tutorial on
        Bayesian optimization", 2018, section 4.3.

    Example:
        >>> from torchzoo.gp import GPSurrogate
        >>> x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        >>> acquisition = PredictiveEntropySearch(GPSurrogate().fit(x, (5 * x).sin()), x)
        >>> bool((acquisition(torch.rand(3, 1, 1).double()) >= 0).all())
        True
    """

    def __init__(
        self,
        model: Any,
        candidates: Tensor,
        *,
        noise: Tensor | float | None = None,
        num_samples: int = 1024,
        generator: torch.Generator | None = None,
    ):
        white = sobol_normal(num_samples, len(candidates), seeded(generator))
        super().__init__(model, candidates, noise, white)

    def forward(self, x: Tensor) -> Tensor:
        mean, slope, _, _ = self._lines(x)
        factor, white = self._factor(mean).detach(), self.white.to(mean)
        top = (mean.detach() + white @ factor.mT).argmax(-1)
        member = F.one_hot(top, len(mean)).to(mean)
        # Z, the standardised observation, of each draw: its mean, and the variance that is left
        flat = slope.reshape(-1, len(mean))
        weight = torch.linalg.solve_triangular(factor, flat.mT, upper=False).mT
        seen = weight @ white.mT
        left = (1 - weight.square().sum(-1, keepdim=True)).clamp_min(0)
        count = member.sum(0)
        within = seen - ((seen @ member) / count.clamp_min(1)) @ member.mT
        variance = left + within.square() @ member / (count - 1).clamp_min(1)
        # all draws together, not the 1 that Z has: what they are off by cancels
        whole = left + seen.var(-1, keepdim=True)
        # one draw tells nothing of a variance
        variance = torch.where(count > 1, variance, whole).clamp_min(torch.finfo(mean.dtype).tiny)
        gain = 0.5 * ((whole / variance).log() @ count) / count.sum()
        return gain.clamp_min(0).reshape(slope.shape[:-1])


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)
