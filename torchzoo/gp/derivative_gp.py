"""A Gaussian process of a function and its gradient, from observations of both.

For a stationary kernel kappa(q), q = sum_i ((x_i - x'_i) / l_i)^2, with u_i = (x_i - x'_i) / l_i^2,

    cov(f, f') = kappa,    cov(d_i f, f') = 2 kappa' u_i = -cov(f, d_i f'),
    cov(d_i f, d_j f') = -4 kappa'' u_i u_j - 2 kappa' [i = j] / l_i^2,

where derivatives of kappa are by q. For Matern-5/2 with s = sqrt(5 q), kappa is
(1 + s + s^2/3) exp(-s), kappa' = -5/6 (1 + s) exp(-s) and kappa'' = 25/12 exp(-s); for the Gaussian
kernel kappa = exp(-q/2).

P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 5.6; J. Wu, M. Poloczek,
A. G. Wilson and P. I. Frazier, "Bayesian optimization with gradients", 2017. No deviations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.distributions import Gamma

from torchzoo.common.linalg import psd_cholesky
from torchzoo.common.solvers import minimize_lbfgs
from torchzoo.gp.bnn_surrogates import StandardizedSurrogate
from torchzoo.gp.bnn_surrogates_posterior import JointGaussian
from torchzoo.gp.posterior import GaussianPosterior

Kind = Literal["matern52", "rbf"]


def derivative_covariance(
    x1: Tensor, x2: Tensor, lengthscale: Tensor, *, kernel: Kind = "matern52"
) -> Tensor:
    """Covariance of values and gradients at two sets of points, for unit variance.

    Args:
        x1: First points.
        x2: Second points.
        lengthscale: One for each input, or one for all.
        kernel: `"matern52"` or `"rbf"`.

    Shape:
        - x1, x2: `(..., n, d)` and `(..., m, d)`
        - lengthscale: `(d,)` or a scalar
        - output: `(..., n (1 + d), m (1 + d))`; all values, then the gradient of each point

    Raises:
        ValueError: An unknown kernel.

    Example:
        >>> x = torch.zeros(1, 2)
        >>> derivative_covariance(x, x, torch.tensor([1.0, 2.0]), kernel="rbf").diagonal()
        tensor([1.0000, 1.0000, 0.2500])
    """
    if kernel not in ("matern52", "rbf"):
        raise ValueError(f"kernel: expected 'matern52' or 'rbf', got {kernel!r}")
    n, m, d = x1.shape[-2], x2.shape[-2], x1.shape[-1]
    lengthscale = lengthscale.expand(d)
    apart = (x1[..., :, None, :] - x2[..., None, :, :]) / lengthscale
    value, first, second = _radial(apart.square().sum(-1), kernel)
    u = apart / lengthscale
    by_x = 2 * first[..., None] * u
    both = -4 * second[..., None, None] * u[..., :, None] * u[..., None, :]
    both = both - 2 * first[..., None, None] * torch.diag(lengthscale**-2)
    top = torch.cat([value, -by_x.flatten(-2)], -1)
    left = by_x.mT.flatten(-3, -2)
    corner = both.transpose(-3, -2).reshape(*both.shape[:-4], n * d, m * d)
    return torch.cat([top, torch.cat([left, corner], -1)], -2)


def _radial(q: Tensor, kernel: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel as a function of q, and its first two derivatives."""
    if kernel == "rbf":
        value = (-0.5 * q).exp()
        return value, -0.5 * value, 0.25 * value
    # the root has no derivative at 0, and there the terms with it have the derivative 0
    s = (5 * torch.where(q > 0, q, 1.0)).sqrt() * (q > 0)
    decay = (-s).exp()
    return (1 + s + 5 * q / 3) * decay, -5 / 6 * (1 + s) * decay, 25 / 12 * decay


class DerivativeGP(StandardizedSurrogate):
    """A Gaussian process that learns from gradients as well, with hyperparameters at the mode.

    A surrogate like the others of this family: outputs are standardised, priors on lengthscales
    Gamma(3, 6), on the scale Gamma(2, 0.15), on the noises Gamma(1.1, 0.05). One output, and one
    problem at a time.

    Args:
        kernel: `"matern52"` or `"rbf"`.
        noise_var: Variance of the noise of standardised values; None: it is fitted.
        grad_noise_var: That of gradients by inputs scaled to the unit cube; None: it is fitted.
        max_iter: Iterations of L-BFGS.
        **kwargs: `bounds` and `generator`.

    Shape:
        - X: `(n, d)`
        - Y: `(n, 1)`
        - grad: `(n, d)`

    Raises:
        ValueError: An option out of its range.

    Source:
        P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 5.6.

    Example:
        >>> x = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
        >>> gp = DerivativeGP(noise_var=1e-6, grad_noise_var=1e-6)
        >>> _ = gp.fit(x, (6 * x).sin(), grad=6 * (6 * x).cos())
        >>> at = torch.tensor([[0.5]]).double()
        >>> bool((gp.posterior(at).mean - (6 * at).sin()).abs() < 0.01)
        True
    """

    grad: Tensor

    def __init__(
        self,
        *,
        kernel: Kind = "matern52",
        noise_var: float | None = None,
        grad_noise_var: float | None = None,
        max_iter: int = 100,
        **kwargs: Any,
    ):
        if kernel not in ("matern52", "rbf"):
            raise ValueError(f"kernel: expected 'matern52' or 'rbf', got {kernel!r}")
        for name, value in {"noise_var": noise_var, "grad_noise_var": grad_noise_var}.items():
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0 or None, got {value}")
        if max_iter < 1:
            raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
        super().__init__(**kwargs)
        self.kernel, self.max_iter = kernel, max_iter
        self.noise_var, self.grad_noise_var = noise_var, grad_noise_var

    def fit(self, X: Tensor, Y: Tensor, grad: Tensor | None = None) -> Self:
        """Fit to values and gradients.

        Args:
            X: Inputs.
            Y: Values.
            grad: Gradients; NaN where there is none; None: there are none at all.

        Raises:
            ValueError: Shapes that don't fit, or numbers that are not finite.
        """
        if X.ndim != 2 or Y.shape != (len(X), 1):
            raise ValueError(f"Y: expected ({len(X)}, 1), got {tuple(Y.shape)}")
        grad = torch.full_like(X, math.nan) if grad is None else grad.detach().to(X).clone()
        if grad.shape != X.shape or grad.isinf().any():
            raise ValueError(
                f"grad: expected {tuple(X.shape)} of finite numbers or NaN, got {tuple(grad.shape)}"
            )
        self.grad = grad
        return super().fit(X, Y)

    def gradient(self, X: Tensor) -> GaussianPosterior:
        """The posterior of the gradient, each entry by itself.

        Shape:
            - X: `(..., q, d)`
            - mean, variance: `(..., q, d)`

        Raises:
            RuntimeError: Before `fit`.
            ValueError: Points of another dimension.
        """
        self._check(X)
        q, d = X.shape[-2:]
        mean, covariance = self._joint(self._scaled(X.to(self.x)), slice(q, None))
        unit = (self._slope_unit() * self._scale[0, 0]).expand(d)
        variance = covariance.diagonal(dim1=-2, dim2=-1).unflatten(-1, (q, d))
        return GaussianPosterior(mean.unflatten(-1, (q, d)) * unit, variance * unit.square())

    def joint(self, X: Tensor) -> JointGaussian:
        """The posterior of values and gradients, jointly.

        Shape:
            - X: `(..., q, d)`
            - mean: `(..., q (1 + d), 1)`; all values, then the gradient of each point

        Raises:
            RuntimeError: Before `fit`.
            ValueError: Points of another dimension.
        """
        self._check(X)
        q, d = X.shape[-2:]
        mean, covariance = self._joint(self._scaled(X.to(self.x)), slice(None))
        slope = (self._slope_unit() * self._scale[0, 0]).expand(q, d).flatten()
        unit = torch.cat([self._scale[0, 0].expand(q), slope])
        mean = mean * unit + torch.cat([self._shift[0, 0].expand(q), torch.zeros_like(slope)])
        noises = self._parts(self.theta)[2]
        noise = torch.cat([noises[:1].expand(q), noises[1:].expand(q * d)]) * unit.square()
        covariance = covariance * unit * unit[:, None]
        return JointGaussian(mean[..., None], covariance[..., None, :, :], noise[:, None])

    def _slope_unit(self) -> Tensor:
        """Derivatives of scaled inputs by inputs, `(d,)`."""
        if self.bounds is None:
            return torch.ones_like(self.x[0])
        return 1 / (self.bounds[1] - self.bounds[0]).to(self.x)

    def _fit(self, x: Tensor, z: Tensor) -> None:
        d = x.shape[-1]
        start = [math.log(math.log(2))] * (d + 1) + [math.log(0.1)] * 2 + [0.0]
        theta = torch.tensor(start, dtype=x.dtype, device=x.device, requires_grad=True)
        minimize_lbfgs(lambda: self._loss(theta, x, z), [theta], max_iter=self.max_iter)
        self.theta = theta.detach()
        self._solve(x, z)

    def _parts(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lengthscales, variance, the two noises `(2,)`; the mean is the last of theta."""
        fixed = (self.noise_var, self.grad_noise_var)
        noises = [
            theta[-3 + i].exp() + 1e-6 if value is None else theta.new_tensor(value)
            for i, value in enumerate(fixed)
        ]
        return theta[:-4].exp(), theta[-4].exp(), torch.stack(noises), theta[-1]

    def _targets(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled values and gradients in one row, and which of them are there."""
        grad = self.grad / self._slope_unit() / self._scale[0, 0]
        both = torch.cat([z[:, 0], grad.flatten()])
        return both, ~both.isnan()

    def _factor(self, theta: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factor of the observations, and their residuals whitened by it."""
        lengthscale, variance, noises, mean = self._parts(theta)
        both, there = self._targets(z)
        n = len(x)
        noise = torch.cat([noises[:1].expand(n), noises[1:].expand(x.numel())])
        k = variance * derivative_covariance(x, x, lengthscale, kernel=self.kernel) + noise.diag()
        residual = both - torch.cat([mean.expand(n), torch.zeros_like(both[n:])])
        factor, _ = psd_cholesky(k[there][:, there])
        white = torch.linalg.solve_triangular(factor, residual[there, None], upper=False)
        return factor, white[:, 0]

    def _loss(self, theta: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Minus the log posterior of the hyperparameters, per observation."""
        factor, white = self._factor(theta, x, z)
        lengthscale, variance, noises, _ = self._parts(theta)
        fit = 0.5 * white.square().sum() + factor.diagonal().log().sum()
        prior = _gamma(3.0, 6.0, lengthscale) + _gamma(2.0, 0.15, variance)
        for noise, value in zip(noises, (self.noise_var, self.grad_noise_var), strict=True):
            if value is None:
                prior = prior + _gamma(1.1, 0.05, noise)
        return (fit - prior) / len(white)

    def _solve(self, x: Tensor, z: Tensor) -> None:
        with torch.no_grad():
            self._chol, self._white = self._factor(self.theta, x, z)
            self._there = self._targets(z)[1]

    def _joint(self, x: Tensor, wanted: slice) -> tuple[Tensor, Tensor]:
        """Mean and covariance of some of values and gradients at scaled points, standardised."""
        lengthscale, variance, _, mean = self._parts(self.theta)
        options: dict[str, Any] = {"kernel": self.kernel}
        data = self._scaled(self.x)
        prior = variance * derivative_covariance(x, x, lengthscale, **options)
        cross = variance * derivative_covariance(data, x, lengthscale, **options)
        white = torch.linalg.solve_triangular(
            self._chol, cross[..., self._there, :][..., wanted], upper=False
        )
        shift = torch.cat([mean.expand(x.shape[-2]), mean.new_zeros(x.shape[-2:].numel())])
        found = shift[wanted] + (white.mT @ self._white[:, None])[..., 0]
        return found, prior[..., wanted, wanted] - white.mT @ white

    def _posterior(self, x: Tensor) -> JointGaussian:
        mean, covariance = self._joint(x, slice(0, x.shape[-2]))
        noise = self._parts(self.theta)[2][:1]
        return JointGaussian(mean[..., None], covariance[..., None, :, :], noise)

    def _state(self) -> dict[str, Tensor]:
        return {"theta": self.theta, "grad": self.grad}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self.theta, self.grad = state["theta"], state["grad"]
        self._solve(self._scaled(self.x), (self.y - self._shift) / self._scale)


def _gamma(shape: float, rate: float, x: Tensor) -> Tensor:
    return Gamma(x.new_tensor(shape), x.new_tensor(rate)).log_prob(x).sum()
