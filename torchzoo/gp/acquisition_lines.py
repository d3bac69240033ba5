"""What an observation would do to a Gaussian posterior, and posteriors of weighted sums.

If y = f(x) + noise of variance lambda is observed next, the posterior means move along lines,

    mu_(n+1)(x') = mu_n(x') + s(x'; x) Z,    s(x'; x) = cov_n(x', x) / sqrt(var_n(x) + lambda),

with Z standard normal. The integral over an environment, g(x) = sum_k p_k f(x, w_k), is a linear
functional of f, so it has a Gaussian posterior and such lines, too.

P. I. Frazier, "A tutorial on Bayesian optimization", 2018, sections 4.2 and 5.5.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchzoo.gp.bnn_surrogates_posterior import JointGaussian


class Lines(NamedTuple):
    """Posterior means as lines in Z, the standardised next observation.

    Attributes:
        mean: Present means at the points, `(n,)`.
        slope: How much they rise by a unit of Z, `(..., n)`.
        mean_x: Present mean where the observation is, `(...)`.
        slope_x: The slope of that, `(...)`.
    """

    mean: Tensor
    slope: Tensor
    mean_x: Tensor
    slope_x: Tensor


def gaussian(model: Any, x: Tensor) -> JointGaussian:
    """The joint posterior of any model of one output.

    Args:
        model: A gpytorch `ExactGP`, a botorch model, or a surrogate of this family.
        x: Points.

    Shape:
        - x: `(..., n, d)`
        - mean: `(..., n, 1)`

    Raises:
        ValueError: The model gives no joint Gaussian of one output.

    Example:
        >>> from torchzoo.gp import GPSurrogate
        >>> x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
        >>> found = gaussian(GPSurrogate().fit(x, x), x[:2])
        >>> found.mean.shape, found.covariance.shape
        (torch.Size([2, 1]), torch.Size([1, 2, 2]))
    """
    import gpytorch

    if not hasattr(model, "posterior"):
        if not isinstance(model, gpytorch.models.ExactGP):
            kind = type(model).__name__
            raise ValueError(
                f"model: expected an ExactGP or something with a posterior, got {kind}"
            )
        plain = gpytorch.settings.fast_computations(False, False, False)
        with plain, gpytorch.settings.debug(False):  # which warns of points in the data
            normal = model(x)
        noise = model.likelihood.noise.mean(-1)[..., None, None]
        found = JointGaussian(
            normal.mean[..., None], normal.covariance_matrix[..., None, :, :], noise
        )
    else:
        found = model.posterior(x)
        if hasattr(found, "distribution"):  # botorch's
            observed = model.posterior(x, observation_noise=True)
            covariance = found.distribution.covariance_matrix[..., None, :, :]
            found = JointGaussian(found.mean, covariance, observed.variance - found.variance)
    if not hasattr(found, "covariance") or found.mean.shape != (*x.shape[:-1], 1):
        kind = f"{type(found).__name__} of means {tuple(found.mean.shape)}"
        raise ValueError(f"model: expected a joint Gaussian posterior of one output, got {kind}")
    return found


def posterior_lines(
    model: Any, points: Tensor, x: Tensor, *, noise: Tensor | float | None = None
) -> Lines:
    """How posterior means at points move when a value at x is observed.

    Args:
        model: As for `gaussian`; or one with `lines` of its own, as `IntegratedEnvironment`.
        points: Where the means are looked at.
        x: Where a value is observed; each by itself.
        noise: Variance of the noise; None: the model's.

    Shape:
        - points: `(n, d)`
        - x: `(..., d)`

    Returns:
        The `Lines`.

    Example:
        >>> from torchzoo.gp import GPSurrogate
        >>> x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
        >>> lines = posterior_lines(GPSurrogate().fit(x, x), x, torch.rand(3, 2, 1).double())
        >>> lines.mean.shape, lines.slope.shape, lines.slope_x.shape
        (torch.Size([5]), torch.Size([3, 2, 5]), torch.Size([3, 2]))
    """
    if hasattr(model, "lines"):
        return model.lines(points, x, noise=noise)
    return _lines(model, points, x, noise, torch.eye(len(points)))


class IntegratedEnvironment:
    """A function averaged over an environment that is known only while experiments run.

    It is a model of g(x) = sum_k p_k f(x, w_k) for whatever takes a model; what is observed is f
    at one x and one w, so that acquisition functions take both, `(..., 1, d + e)`.

    Args:
        model: A model of f, whose inputs are x and then w; as for `gaussian`.
        environments: The points w_k.
        weights: Their probabilities p_k; None: all equal.

    Shape:
        - environments: `(K, e)`
        - weights: `(K,)`

    Raises:
        ValueError: Shapes that don't fit.

    Source:
        P. I. Frazier, "A tutorial on Bayesian optimization", 2018, section 5.5; S. Toscano-Palmerin
        and P. I. Frazier, "Bayesian optimization with expensive integrands", 2018.

    Example:
        >>> from torchzoo.gp import GPSurrogate
        >>> data = torch.rand(20, 2, dtype=torch.float64)
        >>> model = GPSurrogate().fit(data, data.sum(1, keepdim=True))
        >>> average = IntegratedEnvironment(model, torch.tensor([[0.0], [1.0]]))
        >>> average.posterior(torch.rand(5, 1).double()).mean.shape
        torch.Size([5, 1])
    """

    def __init__(self, model: Any, environments: Tensor, weights: Tensor | None = None):
        if environments.ndim != 2 or not environments.numel():
            raise ValueError(f"environments: expected (K, e), got {tuple(environments.shape)}")
        if weights is None:
            weights = environments.new_full((len(environments),), 1 / len(environments))
        if weights.shape != environments.shape[:1]:
            expected = f"({len(environments)},)"
            raise ValueError(f"weights: expected {expected}, got {tuple(weights.shape)}")
        self.model, self.environments, self.weights = model, environments, weights

    def posterior(self, x: Tensor) -> JointGaussian:
        """Of the average g, without noise.

        Shape:
            - x: `(..., n, d)`
            - mean: `(..., n, 1)`
        """
        found = gaussian(self.model, self._pairs(x))
        w = self._functional(x.shape[-2]).to(found.mean)
        return JointGaussian(w @ found.mean, w @ found.covariance @ w.mT)

    def lines(self, points: Tensor, x: Tensor, *, noise: Tensor | float | None = None) -> Lines:
        """How means of g move when f is observed; see `posterior_lines`.

        The mean at x is that of f.

        Shape:
            - points: `(n, d)`
            - x: `(..., d + e)`
        """
        return _lines(self.model, self._pairs(points), x, noise, self._functional(len(points)))

    def _pairs(self, x: Tensor) -> Tensor:
        """Each point with all environments, `(..., n K, d + e)`."""
        count = len(self.environments)
        w = self.environments.to(x).expand(*x.shape[:-1], *self.environments.shape)
        wide = x[..., None, :].expand(*x.shape[:-1], count, x.shape[-1])
        return torch.cat([wide, w], -1).flatten(-3, -2)

    def _functional(self, n: int) -> Tensor:
        """The matrix `(n, n K)` that averages."""
        return torch.kron(torch.eye(n).to(self.weights), self.weights[None])


def _lines(
    model: Any, points: Tensor, x: Tensor, noise: Tensor | float | None, functional: Tensor
) -> Lines:
    """Lines of weighted sums of means at points, from one joint posterior."""
    n, at = len(points), x.reshape(-1, x.shape[-1])
    found = gaussian(model, torch.cat([points.to(at), at]))
    mean, covariance = found.mean[:, 0], found.covariance[0]
    if noise is None:
        noise = found.noise.expand(found.mean.shape)[n:, 0]
    functional = functional.to(mean)
    variance = covariance.diagonal()[n:].clamp_min(0)
    scale = (variance + noise).clamp_min(torch.finfo(mean.dtype).tiny).sqrt()
    shape = x.shape[:-1]
    return Lines(
        functional @ mean[:n],
        ((functional @ covariance[:n, n:]) / scale).mT.reshape(*shape, len(functional)),
        mean[n:].reshape(shape),
        (variance / scale).reshape(shape),
    )
