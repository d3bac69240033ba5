"""The Slepian model: what a stationary Gaussian process does after it crosses zero upwards.

Let X have mean 0, covariance r with r(0) = 1, and second spectral moment lam2 = -r''(0). Seen from
an up-crossing of zero at t = 0 it is, in distribution,

    X_0(t) = -R r'(t) / sqrt(lam2) + D(t),      R Rayleigh, density u exp(-u^2/2),
    Cov(D(t), D(s)) = r(t-s) - r(t) r(s) - r'(t) r'(s) / lam2,

R and the centred Gaussian process D independent. Its expected sign has a closed form,

    E(t) = E[sgn X_0(t)] = -r'(t) / sqrt(lam2 (1 - r(t)^2)),     E(0) = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.gp.stationary import as_stationary, one_minus


class SlepianProcess:
    """A stationary Gaussian process seen from one of its up-crossings of zero.

    Args:
        cov: The covariance, in any form that `as_stationary` takes.
        device: Where results are made.
        dtype: Their type.

    Raises:
        ValueError: See `as_stationary`.

    Source:
        H. Bengtsson and K. Podgórski, "The Slepian model based independent interval approximation
        of persistency and zero-level exceedance distributions", 2024.

    Example:
        >>> process = SlepianProcess(lambda t: torch.exp(-(t**2) / 2))
        >>> [round(e, 4) for e in process.expected_clipped(torch.tensor([0.0, 1.0])).tolist()]
        [1.0, 0.7629]
    """

    def __init__(
        self,
        cov: Any,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self.cov = as_stationary(cov)
        self.device = torch.device(device) if device is not None else torch.get_default_device()
        self.dtype = dtype

    @property
    def spectral_moment(self) -> Tensor:
        """lam2 = -r''(0), per squared unit of time."""
        return -self.cov.d2r0

    def mean(self, t: Tensor, rayleigh: Tensor | float) -> Tensor:
        """Mean of X_0 given R: `-R r'(t) / sqrt(lam2)`.

        Shape:
            - t, rayleigh: broadcast to the output
        """
        return -torch.as_tensor(rayleigh) * self.cov.dr(_lags(t)) / self.spectral_moment.sqrt()

    def covariance(self, t: Tensor) -> Tensor:
        """Covariance matrix of D.

        Shape:
            - t: `(m,)`
            - output: `(m, m)`
        """
        t = _lags(t)
        r, dr = self.cov.r(t), self.cov.dr(t)
        apart = self.cov.r((t[:, None] - t).abs())
        return apart - torch.outer(r, r) - torch.outer(dr, dr) / self.spectral_moment

    def expected_clipped(self, t: Tensor) -> Tensor:
        """E(t), the expected sign of X_0.

        Shape:
            - t: `(...)`, at least 0
            - output: `(...)`
        """
        t = _lags(t)
        gap = one_minus(self.cov, t)
        tiny = torch.finfo(t.dtype).tiny
        safe = torch.where(gap > 0, gap * (2 - gap), torch.ones_like(gap))
        value = -self.cov.dr(t) / (self.spectral_moment * safe.clamp_min(tiny)).sqrt()
        return torch.where(gap > 0, value, torch.ones_like(value))

    def sample(self, t: Tensor, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw paths of X_0.

        Args:
            t: Times, at least 0.
            n: Number of paths.
            generator: Draws on its own device.

        Shape:
            - t: `(m,)`
            - output: `(n, m)`

        Raises:
            ValueError: t is not a vector of times of at least 0.
        """
        if t.ndim != 1 or (len(t) and not t.min() >= 0):
            raise ValueError(f"t: expected a vector of times >= 0, got shape {tuple(t.shape)}")
        t = _lags(t)
        values, vectors = torch.linalg.eigh(self.covariance(t))  # singular: D(0) = D'(0) = 0
        root = vectors * values.clamp_min(0).sqrt()
        where = generator.device if generator is not None else self.device
        normal = torch.randn(n, len(t), dtype=t.dtype, device=where, generator=generator)
        uniform = torch.rand(n, 1, dtype=t.dtype, device=where, generator=generator)
        rayleigh = (-2 * torch.log1p(-uniform)).sqrt()
        paths = self.mean(t, rayleigh.to(t.device)) + normal.to(t.device) @ root.mT
        return paths.to(self.device, self.dtype)


def _lags(t: Tensor) -> Tensor:
    return torch.as_tensor(t).double()
