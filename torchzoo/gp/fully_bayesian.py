"""A Gaussian process whose hyperparameters are sampled, not fitted.

The model is that of `GPSurrogate`, with its priors and a flat one for the mean: lengthscales
l_i ~ Gamma(3, 6), scale a ~ Gamma(2, 0.15), noise s ~ Gamma(1.1, 0.05) above 1e-4. With
theta = (log l, log a, log(s - 1e-4), m) the density to sample from is

    p(theta given D) ~ N(z; m 1, a K_l + s I) p(l) p(a) p(s) exp(sum of the logarithms in theta),

the last factor being that of the change of variables, by Hamiltonian Monte Carlo. The posterior of
f is a mixture of Gaussian processes, one for each sample.

J. Snoek, H. Larochelle and R. P. Adams, "Practical Bayesian optimization of machine learning
algorithms", 2012, section 3.2; P. I. Frazier, "A tutorial on Bayesian optimization", 2018,
section 3.2. Deviations: Hamiltonian Monte Carlo in place of slice sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Gamma

from torchzoo.common.samplers import hmc
from torchzoo.gp.bnn_surrogates import StandardizedSurrogate
from torchzoo.gp.bnn_surrogates_gp import GPSurrogate
from torchzoo.gp.bnn_surrogates_posterior import JointGaussian

LEAST_NOISE = 1e-4  # that of GPSurrogate
NUM_LEAPFROG = 8
MASS = 2.5, 1.5, 0.3, 0.15
"""Inverse variances of theta about as under the priors: lengthscales, scale, noise, mean."""


class FullyBayesianSurrogate(StandardizedSurrogate):
    """A Gaussian process with a Matérn-5/2 kernel, averaged over its hyperparameters.

    Its posterior has the mean and covariance of the mixture. Acquisition functions should be
    averaged themselves, over its `members`; see `AveragedAcquisition`. One output, and one problem
    at a time.

    Args:
        num_samples: Samples of the hyperparameters, over all chains.
        burn_in: Iterations before the first sample, in which step sizes adapt.
        thin: Iterations from one sample to the next.
        chains: Chains.
        **kwargs: `bounds` and `generator`.

    Attributes:
        members: A `GPSurrogate` for each sample.
        rhat: Split R-hat of each hyperparameter, after `fit` only.

    Shape:
        - X: `(n, d)`
        - Y: `(n, 1)`

    Raises:
        ValueError: An option out of its range.

    Source:
        J. Snoek, H. Larochelle and R. P. Adams, "Practical Bayesian optimization of machine
        learning algorithms", 2012, section 3.2.

    Example:
        >>> x = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        >>> surrogate = FullyBayesianSurrogate(num_samples=8, burn_in=50).fit(x, (6 * x).sin())
        >>> at = torch.tensor([[0.4]]).double()
        >>> len(surrogate.members), bool((surrogate.posterior(at).mean - 0.68).abs() < 0.2)
        (8, True)
    """

    members: list[GPSurrogate]

    def __init__(
        self,
        *,
        num_samples: int = 16,
        burn_in: int = 100,
        thin: int = 10,
        chains: int = 4,
        **kwargs: Any,
    ):
        for name, value in {"thin": thin, "chains": chains}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if burn_in < 0:
            raise ValueError(f"burn_in: expected at least 0, got {burn_in}")
        if num_samples < 1 or num_samples % chains:
            raise ValueError(f"num_samples: expected a multiple of {chains}, got {num_samples}")
        super().__init__(**kwargs)
        self.num_samples, self.burn_in, self.thin = num_samples, burn_in, thin
        self.chains = chains

    def fit(self, X: Tensor, Y: Tensor) -> Self:
        """Sample the hyperparameters given data.

        Raises:
            ValueError: Shapes that don't fit, or numbers that are not finite.
        """
        if X.ndim != 2 or Y.shape != (len(X), 1):
            raise ValueError(f"Y: expected ({len(X)}, 1), got {tuple(Y.shape)}")
        return super().fit(X, Y)

    def _fit(self, x: Tensor, z: Tensor) -> None:
        start = x.new_tensor([math.log(0.5)] * x.shape[-1] + [0.0, math.log(0.1), 0.0])
        draws = self._draws(x.device)
        shake = torch.empty(self.chains, len(start)).to(x).normal_(generator=draws)
        chain = hmc(
            lambda theta: log_posterior(theta, x, z[:, 0]),
            start + 0.1 * shake,
            num_samples=self.thin * self.num_samples // self.chains,
            burn_in=self.burn_in,
            step_size=0.1,
            num_leapfrog=NUM_LEAPFROG,
            mass=x.new_tensor([MASS[0]] * x.shape[-1] + list(MASS[1:])),
            generator=draws,
        )
        self.rhat = chain.rhat
        self.theta = chain.samples[:, self.thin - 1 :: self.thin].flatten(0, 1)
        self._condition(x, z)

    def _condition(self, x: Tensor, z: Tensor) -> None:
        self.members = [self._member(theta, x, z) for theta in self.theta]

    def _member(self, theta: Tensor, x: Tensor, z: Tensor) -> GPSurrogate:
        found = GPSurrogate(bounds=self.bounds, generator=torch.Generator())
        found._keep(self.x, self.y)
        lengthscale, scale, noise, mean = _parts(theta)
        model = found._build(x, z)
        model.kernel.base_kernel.lengthscale = lengthscale
        model.kernel.outputscale = scale
        model.likelihood.noise = noise
        model.mean.initialize(constant=mean)
        found.model = model.eval().requires_grad_(False)
        return found

    def _posterior(self, x: Tensor) -> JointGaussian:
        found = [member._posterior(x) for member in self.members]
        means = torch.stack([one.mean for one in found])
        mean = means.mean(0)
        apart = (means - mean)[..., 0]
        between = torch.einsum("s...i,s...j->...ij", apart, apart) / len(means)
        within = torch.stack([one.covariance for one in found]).mean(0)
        noise = torch.stack([one.noise for one in found]).mean(0)
        return JointGaussian(mean, within + between[..., None, :, :], noise)

    def _state(self) -> dict[str, Tensor]:
        return {"theta": self.theta}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self.theta = state["theta"]
        self._condition(self._scaled(self.x), (self.y - self._shift) / self._scale)


def log_posterior(theta: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Log density of hyperparameters given data, up to a constant.

    Args:
        theta: Logarithms of the lengthscales, of the scale, of the noise less 1e-4; the mean.
        x: Inputs, scaled.
        z: Values, standardised.

    Shape:
        - theta: `(..., d + 3)`
        - x: `(n, d)`
        - z: `(n,)`
        - output: `(...)`; -inf where the covariance is singular in floating point

    Example:
        >>> log_posterior(torch.zeros(5, 4), torch.rand(3, 1), torch.zeros(3)).shape
        torch.Size([5])
    """
    lengthscale, scale, noise, mean = _parts(theta)
    rows = x / lengthscale[..., None, :]
    square = (rows[..., :, None, :] - rows[..., None, :, :]).square().sum(-1)
    s = (5 * square.clamp_min(torch.finfo(x.dtype).tiny)).sqrt()
    matern = (1 + s + s.square() / 3) * (-s).exp()
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    covariance = scale[..., None, None] * matern + noise[..., None, None] * eye
    factor, failed = torch.linalg.cholesky_ex(covariance)
    white = torch.linalg.solve_triangular(factor, (z - mean[..., None])[..., None], upper=False)
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    value = -0.5 * white.square().sum((-2, -1)) - half_log_det
    value = value + _gamma(3.0, 6.0, lengthscale).sum(-1)
    value = value + _gamma(2.0, 0.15, scale) + _gamma(1.1, 0.05, noise)
    return torch.where(failed > 0, -math.inf, value + theta[..., :-1].sum(-1))


def _parts(theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lengthscales, scale, noise and mean."""
    scale, noise = theta[..., -3].exp(), theta[..., -2].exp() + LEAST_NOISE
    return theta[..., :-3].exp(), scale, noise, theta[..., -1]


def _gamma(shape: float, rate: float, x: Tensor) -> Tensor:
    plain = Gamma(x.new_tensor(shape), x.new_tensor(rate), validate_args=False)
    return plain.log_prob(x)
