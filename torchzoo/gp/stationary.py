"""Stationary covariances r(t) of unit variance on the line, with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class StationaryCovariance(Protocol):
    """A covariance by its values and derivatives at lags t >= 0.

    Attributes:
        r: Values, `(...) -> (...)`, 1 at lag 0.
        dr: First derivative, of the same shape.
        d2r0: Second derivative at lag 0, a scalar below 0.
    """

    def r(self, t: Tensor) -> Tensor: ...
    def dr(self, t: Tensor) -> Tensor: ...
    @property
    def d2r0(self) -> Tensor: ...


@dataclass(frozen=True)
class FromFunction:
    """A covariance given by a function of the lag; derivatives are autograd's, from the right.

    Args:
        function: r(t) in differentiable PyTorch, elementwise, for t >= 0.
    """

    function: Callable[[Tensor], Tensor]

    def r(self, t: Tensor) -> Tensor:
        return self.function(t)

    def dr(self, t: Tensor) -> Tensor:
        return _slope(self.function, t)

    @property
    def d2r0(self) -> Tensor:
        return _slope(self.dr, torch.zeros((), dtype=torch.float64))


def as_stationary(cov: Any) -> StationaryCovariance:
    """Take a covariance in any of the forms that this family knows, and check it at lag 0.

    Args:
        cov: A `StationaryCovariance`; or a function r(t) of lags t >= 0 in differentiable PyTorch;
            or a gpytorch kernel of one input dimension: RBF, Matern or rational quadratic.

    Returns:
        The covariance. A kernel's hyperparameters keep their graph.

    Raises:
        ValueError: Another kind of object, r(0) is not 1, r'(0+) is not 0 (paths are not
            differentiable, so that crossings come in fractal clusters, as for Matern-1/2), or
            r''(0) is not a finite number below 0.

    Example:
        >>> cov = as_stationary(lambda t: torch.exp(-(t**2) / 2))
        >>> cov.d2r0.item()
        -1.0
    """
    if isinstance(cov, StationaryCovariance):
        known: StationaryCovariance = cov
    elif hasattr(cov, "has_lengthscale"):
        known = FromFunction(_kernel_function(cov))
    elif callable(cov):
        known = FromFunction(cov)
    else:
        raise ValueError(
            "cov: expected a function of the lag, an object with r, dr and d2r0, or a gpytorch "
            f"kernel, got {type(cov).__name__}"
        )
    zero = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        value, slope, curvature = (float(x) for x in (known.r(zero), known.dr(zero), known.d2r0))
    if not abs(value - 1) < 1e-6:
        raise ValueError(f"cov: expected unit variance, r(0) = 1, got {value:.6g}")
    if not curvature < 0 or math.isinf(curvature) or abs(slope) > 1e-6 * math.sqrt(-curvature):
        raise ValueError(
            "cov: expected a process with a derivative, r'(0) = 0 and finite r''(0) < 0, got "
            f"r'(0) = {slope:.4g}, r''(0) = {curvature:.4g}"
        )
    return known


def one_minus(cov: StationaryCovariance, t: Tensor) -> Tensor:
    """1 - r(t), for small lags from the integral of r', which is free of cancellation."""
    x, w = _gauss(t)
    near = t.clamp_max(_near(cov))
    integral = (cov.dr(near[..., None] * x) * w).sum(-1) * near
    return torch.where(t <= near, -integral, 1 - cov.r(t))


def half_width(cov: StationaryCovariance) -> float:
    """The first lag at which r(t) = 1/2, as a bracketing on a grid of powers of 2 sees it."""
    scale = float((-cov.d2r0).detach()) ** -0.5
    with torch.no_grad():
        high = scale * 2.0 ** torch.arange(0, 60, dtype=torch.float64)
        below = (cov.r(high) < 0.5).nonzero()
        if not len(below):
            raise ValueError("cov: expected r(t) to fall to 0, got one that stays above 1/2")
        b = float(high[below[0, 0]])
        a = b / 2 if below[0, 0] else 0.0
        for _ in range(60):
            middle = (a + b) / 2
            at = float(cov.r(torch.tensor(middle, dtype=torch.float64)))
            a, b = (middle, b) if at > 0.5 else (a, middle)
    return b


def _near(cov: StationaryCovariance) -> float:
    """Lags below this one are small: r has fallen by about an eighth there."""
    return 0.5 * float((-cov.d2r0).detach()) ** -0.5


def _gauss(t: Tensor) -> tuple[Tensor, Tensor]:
    import numpy as np

    x, w = np.polynomial.legendre.leggauss(16)
    return t.new_tensor((x + 1) / 2), t.new_tensor(w / 2)


def _slope(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Derivative of an elementwise function, with a graph where t or the function has one."""
    keep = torch.is_grad_enabled() and (t.requires_grad or function(t).requires_grad)
    with torch.enable_grad():
        t = t if t.requires_grad else t.detach().requires_grad_()
        value = function(t)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), t, create_graph=True)
    return slope if keep else slope.detach()


def _kernel_function(kernel: Any) -> Callable[[Tensor], Tensor]:
    """The covariance function of a gpytorch kernel, in closed form: theirs has no slope at 0."""
    from gpytorch.kernels import MaternKernel, RBFKernel, RQKernel

    if isinstance(kernel, MaternKernel | RBFKernel | RQKernel) and kernel.lengthscale.numel() == 1:
        scale = kernel.lengthscale.double().reshape(())
        if isinstance(kernel, RBFKernel):
            return lambda t: torch.exp(-((t / scale) ** 2) / 2)
        if isinstance(kernel, RQKernel):
            alpha = kernel.alpha.double().reshape(())
            return lambda t: (1 + (t / scale) ** 2 / (2 * alpha)) ** -alpha
        if kernel.nu == 0.5:
            return lambda t: torch.exp(-t / scale)
        if kernel.nu == 1.5:
            return lambda t: _matern(t * 3**0.5 / scale, (1.0, 1.0))
        return lambda t: _matern(t * 5**0.5 / scale, (1.0, 1.0, 1 / 3))
    raise ValueError(
        "cov: expected an RBF, Matern or rational quadratic kernel of one lengthscale, got "
        f"{type(kernel).__name__}; pass other covariances as functions of the lag"
    )


def _matern(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    return sum(c * z**i for i, c in enumerate(coefficients)) * torch.exp(-z)
