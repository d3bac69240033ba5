"""What a prior over weights is matched to: Gaussian processes, and the inputs to look at.

B.-H. Tran, S. Rossi, D. Milios and M. Filippone, "All you need is a good functional prior for
Bayesian deep learning", 2022, sections 3.3 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchzoo.common.linalg import psd_cholesky

FunctionSampler = Callable[[Tensor, int], Tensor]
"""Maps inputs `(M, D)` and a number n to n functions at the inputs, `(n, M)`."""


def gp_prior(
    kernel: Callable[[Tensor, Tensor], Any],
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> FunctionSampler:
    """Functions of a Gaussian process of mean 0.

    Args:
        kernel: A gpytorch kernel, or a function of two sets of inputs `(M, D)`.
        noise: Variance added to each value.
        generator: Draws on the device of the inputs.

    Returns:
        The sampler.

    Raises:
        ValueError: A negative noise; or, on a call, a kernel that is not positive semi-definite.

    Example:
        >>> sampler = gp_prior(lambda x, y: x @ y.mT)
        >>> sampler(torch.randn(5, 3), 100).shape
        torch.Size([100, 5])
    """
    _check_noise(noise)

    def sample(x: Tensor, n: int) -> Tensor:
        with torch.no_grad():
            k = kernel(x, x)
            k = k if isinstance(k, Tensor) else k.to_dense()
            return _draw(k.double(), noise, n, generator).to(x.dtype)

    return sample


def rbf_prior(
    lengthscale: float | Tensor,
    variance: float = 1.0,
    *,
    spread: float = 0.0,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> FunctionSampler:
    """Functions of a Gaussian process with the kernel `variance exp(-r^2 / 2)`.

    Args:
        lengthscale: Unit of the distance r, or one for each dimension.
        variance: Variance of the functions.
        spread: Above 0 the process is hierarchical: each function has a lengthscale and a variance
            of its own, whose logarithms are normal around those given, with this standard
            deviation.
        noise: Variance added to each value.
        generator: Draws on the device of the inputs.

    Returns:
        The sampler.

    Raises:
        ValueError: An option out of its range.

    Example:
        >>> sampler = rbf_prior(0.6, spread=1.0, generator=torch.Generator().manual_seed(0))
        >>> sampler(torch.linspace(-1, 1, 20)[:, None], 100).shape
        torch.Size([100, 20])
    """
    scale = torch.as_tensor(lengthscale, dtype=torch.float64)
    if scale.ndim > 1 or not (scale > 0).all():
        raise ValueError(f"lengthscale: expected above 0, got {lengthscale}")
    if not 0 < variance < math.inf:
        raise ValueError(f"variance: expected above 0, got {variance}")
    if not spread >= 0:
        raise ValueError(f"spread: expected at least 0, got {spread}")
    _check_noise(noise)

    def sample(x: Tensor, n: int) -> Tensor:
        count = n if spread else 1
        log_factors = spread * torch.randn(
            2, count, 1, 1, generator=generator, device=x.device, dtype=torch.float64
        )
        scaled = x.detach().double() / scale.to(x.device)
        square = torch.cdist(scaled, scaled).square() * (-2 * log_factors[0]).exp()
        k = variance * log_factors[1].exp() * (-square / 2).exp()
        return _draw(k if spread else k[0], noise, n, generator).to(x.dtype)

    return sample


def measurement_sets(
    x: Tensor, *, share: float = 0.7, generator: torch.Generator | None = None
) -> Callable[[int], Tensor]:
    """Random inputs among the data and around them.

    Args:
        x: Training inputs.
        share: Part of the inputs that are training inputs, as far as there are enough; the rest is
            uniform within the range of each column.
        generator: Draws on the device of the inputs.

    Shape:
        - x: `(N, D)`

    Returns:
        Maps a number M to `(M, D)` inputs.

    Raises:
        ValueError: No inputs, or a share outside [0, 1].

    Example:
        >>> sets = measurement_sets(torch.tensor([[0.0], [2.0]]), share=0.5)
        >>> sets(4).shape
        torch.Size([4, 1])
    """
    if x.ndim != 2 or not len(x):
        raise ValueError(f"x: expected (N, D), got {tuple(x.shape)}")
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected within [0, 1], got {share}")
    low, high = x.amin(0), x.amax(0)

    def sample(count: int) -> Tensor:
        known = min(round(share * count), len(x))
        rows = torch.randperm(len(x), generator=generator, device=x.device)[:known]
        spots = torch.rand(
            count - known, x.shape[1], generator=generator, device=x.device, dtype=x.dtype
        )
        return torch.cat([x[rows], low + (high - low) * spots])

    return sample


def _draw(k: Tensor, noise: float, n: int, generator: torch.Generator | None) -> Tensor:
    """Draws `(n, M)` from normal distributions of covariances `(M, M)` or `(n, M, M)`."""
    k = k + noise * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    factor, _ = psd_cholesky(k)
    white = torch.randn(n, k.shape[-1], generator=generator, device=k.device, dtype=k.dtype)
    return (factor @ white[..., None])[..., 0] if k.ndim == 3 else white @ factor.mT


def _check_noise(noise: float) -> None:
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise: expected at least 0, got {noise}")
