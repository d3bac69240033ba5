"""Nyström features of a kernel, and inducing points drawn by ridge leverage scores.

With inducing points S the features z(x) = K_SS^(+1/2) k_S(x) reproduce the part of the kernel that
S spans, z(x)^T z(x') = k_S(x)^T K_SS^+ k_S(x'). A point s, pulled n_s times, is drawn into S with

    p_s = min(1, qbar n_s sigma^2(x_s)),

sigma^2(x) being the posterior variance over lambda, its ridge leverage score; qbar is the
oversampling. Leverage scores add up to the effective dimension, so about qbar times that many
points are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Covariance(Protocol):
    """A covariance function by its matrices: `k(x1, x2)` and `k.diag(x)`."""

    def __call__(self, x1: Tensor, x2: Tensor) -> Tensor: ...
    def diag(self, x: Tensor) -> Tensor: ...


def as_covariance(kernel: Any) -> Covariance:
    """Take a kernel in any of the forms that this family knows.

    Args:
        kernel: A gpytorch kernel; or a function of two sets of points that broadcasts over leading
            dimensions, which may have a method `diag`.

    Returns:
        A `Covariance`: `k(x1, x2)` of shapes `(..., n, d)` and `(..., m, d)` is `(..., n, m)`, and
        `k.diag(x)` is `(..., n)`.

    Raises:
        ValueError: The kernel can't be called.

    Example:
        >>> covariance = as_covariance(lambda a, b: a @ b.mT)
        >>> covariance.diag(torch.tensor([[1.0], [3.0]]))
        tensor([1., 9.])
    """
    if isinstance(kernel, nn.Module):
        from gpytorch.kernels import Kernel

        if isinstance(kernel, Kernel):
            return _FromGPyTorch(kernel)
    if not callable(kernel):
        raise ValueError(f"kernel: expected a gpytorch kernel or a function, got {kernel!r}")
    return _FromFunction(kernel)


class _FromGPyTorch:
    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __call__(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.kernel(x1, x2).to_dense()

    def diag(self, x: Tensor) -> Tensor:
        return self.kernel(x, diag=True)


class _FromFunction:
    def __init__(self, kernel: Callable[[Tensor, Tensor], Tensor]):
        self.kernel = kernel

    def __call__(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.kernel(x1, x2)

    def diag(self, x: Tensor) -> Tensor:
        if hasattr(self.kernel, "diag"):
            return self.kernel.diag(x)
        return self.kernel(x[..., None, :], x[..., None, :])[..., 0, 0]


def inverse_root(k_ss: Tensor) -> Tensor:
    """Pseudo-inverse square root R of a kernel matrix: `R R^T` is its pseudo-inverse.

    Eigenvalues below `m eps` times the largest are cut, eps being the matrix's own precision. The
    columns of R that belong to them are 0, so that its shape depends on no values.

    Shape:
        - k_ss: `(..., m, m)`, symmetric
        - output: `(..., m, m)`

    Raises:
        ValueError: Matrices that are not square.

    Example:
        >>> root = inverse_root(torch.tensor([[4.0, 4.0], [4.0, 4.0]]))
        >>> root @ root.mT
        tensor([[0.0625, 0.0625],
                [0.0625, 0.0625]])
    """
    if k_ss.ndim < 2 or k_ss.shape[-1] != k_ss.shape[-2]:
        raise ValueError(f"k_ss: expected (..., m, m), got {tuple(k_ss.shape)}")
    m = k_ss.shape[-1]
    if not m:
        return k_ss
    values, vectors = torch.linalg.eigh(k_ss.double())
    cut = values[..., -1:] * m * torch.finfo(k_ss.dtype).eps
    kept = (values > cut) & (values > 0)
    scale = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
    return (vectors * scale[..., None, :]).to(k_ss.dtype)


def nystrom_features(k_ss: Tensor, k_ns: Tensor) -> Tensor:
    """Features z whose inner products are `k_ns K_ss^+ k_ns^T`.

    Args:
        k_ss: Kernel matrix of the inducing points.
        k_ns: Kernel of the points with the inducing points.

    Shape:
        - k_ss: `(..., m, m)`
        - k_ns: `(..., n, m)`
        - output: `(..., n, m)`

    Raises:
        ValueError: Shapes that don't fit.

    Source:
        C. K. I. Williams and M. Seeger, "Using the Nyström method to speed up kernel machines",
        2000.

    Example:
        >>> z = nystrom_features(torch.tensor([[4.0]]), torch.tensor([[2.0], [4.0]]))
        >>> z @ z.mT
        tensor([[1., 2.],
                [2., 4.]])
    """
    root = inverse_root(k_ss)
    if k_ns.ndim < 2 or k_ns.shape[-1] != k_ss.shape[-1]:
        raise ValueError(f"k_ns: expected (..., n, {k_ss.shape[-1]}), got {tuple(k_ns.shape)}")
    return k_ns @ root


class LeverageScoreSampler:
    """Draws inducing points independently, each in proportion to its leverage score.

    Args:
        oversampling: qbar.
        max_inducing: Most points to keep; where more are drawn, those of the highest probability.
        generator: Draws on its own device; None: a new one, seeded by torch's.

    Raises:
        ValueError: An option out of its range.

    Source:
        D. Calandriello, L. Carratino, A. Lazaric, M. Valko and L. Rosasco, "Gaussian process
        optimization with adaptive sketching: scalable and no regret", 2019, algorithm 1.

    Example:
        >>> sampler = LeverageScoreSampler(2.0)
        >>> variance, counts = torch.tensor([0.3, 0.1, 1.0]), torch.tensor([1, 5, 0])
        >>> sampler.probabilities(variance, counts)
        tensor([0.6000, 1.0000, 0.0000])
    """

    def __init__(
        self,
        oversampling: float = 5.0,
        *,
        max_inducing: int | None = None,
        generator: torch.Generator | None = None,
    ):
        if not 0 < oversampling < float("inf"):
            raise ValueError(f"oversampling: expected a number above 0, got {oversampling}")
        if max_inducing is not None and max_inducing < 1:
            raise ValueError(f"max_inducing: expected at least 1 or None, got {max_inducing}")
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.oversampling = oversampling
        self.max_inducing = max_inducing
        self.generator = generator

    def probabilities(self, variance: Tensor, counts: Tensor) -> Tensor:
        """Inclusion probabilities.

        Args:
            variance: Posterior variances over lambda.
            counts: How often each point was pulled.

        Shape:
            - variance, counts, output: `(n,)`
        """
        return (self.oversampling * variance * counts).clamp(0, 1)

    def sample(self, variance: Tensor, counts: Tensor) -> Tensor:
        """Indices of the points drawn, in increasing order: a fresh coin for each.

        Shape:
            - variance, counts: `(n,)`
            - output: `(m,)`, int64
        """
        p = self.probabilities(variance, counts)
        coins = torch.rand(
            p.shape, dtype=torch.float64, device=self.generator.device, generator=self.generator
        )
        drawn = (coins.to(p.device) < p).nonzero()[:, 0]
        if self.max_inducing is None or len(drawn) <= self.max_inducing:
            return drawn
        order = p[drawn].argsort(descending=True, stable=True)
        return drawn[order[: self.max_inducing]].sort().values
