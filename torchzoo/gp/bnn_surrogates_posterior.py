"""Posteriors over functions at a set of points, jointly over the points.

Inference by sampling gives functions f_1, ..., f_S, each as likely as the others, with mean
`sum_s f_s / S` and covariance `sum_s (f_s - mean) (f_s - mean)^T / S`; Gaussian inference gives
these two themselves. An acquisition function of several points needs their joint samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Normal

from torchzoo.common.linalg import psd_cholesky


class SamplePosterior(ABC):
    """A posterior at q points that can be sampled jointly.

    Attributes:
        noise: Variance of the noise of observations, which broadcasts to the mean.
    """

    noise: Tensor

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """`(..., q, m)`."""

    @property
    @abstractmethod
    def covariance(self) -> Tensor:
        """Between points, for each output: `(..., m, q, q)`."""

    @property
    def variance(self) -> Tensor:
        """`(..., q, m)`, without noise."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).mT

    @property
    def observed_variance(self) -> Tensor:
        """`(..., q, m)`, that of observations."""
        return self.variance + self.noise

    @abstractmethod
    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw functions at the points, `(*sample_shape, ..., q, m)`."""

    @abstractmethod
    def log_prob(self, y: Tensor) -> Tensor:
        """Log predictive density of each observation by itself, `(..., q, m)`."""

    @abstractmethod
    def affine(self, shift: Tensor, scale: Tensor) -> SamplePosterior:
        """That of `shift + scale f`, for a shift and a scale of each output."""


class FunctionSamples(SamplePosterior):
    """Equally likely functions, by their values.

    Args:
        values: `(S, ..., q, m)`.
        noise: Variance of the noise, which broadcasts to `(..., q, m)`.

    Example:
        >>> posterior = FunctionSamples(torch.tensor([[[0.0], [1.0]], [[2.0], [5.0]]]))
        >>> posterior.mean.flatten(), posterior.covariance.flatten()
        (tensor([1., 3.]), tensor([1., 2., 2., 4.]))
    """

    def __init__(self, values: Tensor, noise: Tensor | float = 0.0):
        self.values = values
        self.noise = torch.as_tensor(noise, dtype=values.dtype, device=values.device)

    @property
    def mean(self) -> Tensor:
        return self.values.mean(0)

    @property
    def variance(self) -> Tensor:
        return self.values.var(0, unbiased=False)

    @property
    def covariance(self) -> Tensor:
        centred = (self.values - self.mean).movedim(0, -1).movedim(-2, -3)
        return centred @ centred.mT / len(self.values)

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw whole functions: one index for all points."""
        device = self.values.device if generator is None else generator.device
        index = torch.randint(
            len(self.values), tuple(sample_shape), generator=generator, device=device
        )
        return self.values[index.to(self.values.device)]

    def log_prob(self, y: Tensor) -> Tensor:
        each = Normal(self.values, self.noise.sqrt()).log_prob(y)
        return each.logsumexp(0) - math.log(len(self.values))

    def affine(self, shift: Tensor, scale: Tensor) -> FunctionSamples:
        return FunctionSamples(shift + scale * self.values, self.noise * scale.square())


class JointGaussian(SamplePosterior):
    """A Gaussian over the values at all points, outputs independent.

    Args:
        mean: `(..., q, m)`.
        covariance: `(..., m, q, q)`.
        noise: Variance of the noise, which broadcasts to the mean.

    Example:
        >>> posterior = JointGaussian(torch.zeros(2, 1), torch.ones(1, 2, 2))
        >>> draw = posterior.rsample((3,))
        >>> torch.allclose(draw[:, 0], draw[:, 1], atol=0.02)
        True
    """

    def __init__(self, mean: Tensor, covariance: Tensor, noise: Tensor | float = 0.0):
        self._mean, self._covariance = mean, covariance
        self.noise = torch.as_tensor(noise, dtype=mean.dtype, device=mean.device)

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def covariance(self) -> Tensor:
        return self._covariance

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        factor, _ = psd_cholesky(self._covariance)
        shape = (*sample_shape, *self._mean.mT.shape)
        device = self._mean.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, dtype=factor.dtype, device=device)
        return self._mean + (factor @ noise.to(factor.device)[..., None])[..., 0].mT

    def log_prob(self, y: Tensor) -> Tensor:
        spread = self.observed_variance.clamp_min(0).sqrt()
        return Normal(self._mean, spread).log_prob(y)

    def affine(self, shift: Tensor, scale: Tensor) -> JointGaussian:
        square = scale.square()
        return JointGaussian(
            shift + scale * self._mean, self._covariance * square.mT[..., None], self.noise * square
        )
