"""What predictions come as where no covariance between points is formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class GaussianPosterior(NamedTuple):
    """Independent Gaussians by mean and variance, of one shape.

    Attributes:
        mean: Their means.
        variance: Their variances.
        noise: Variance of the noise of observations, of the same shape; None: unknown.

    Example:
        >>> posterior = GaussianPosterior(torch.zeros(3), torch.full((3,), 4.0))
        >>> posterior.stddev
        tensor([2., 2., 2.])
        >>> posterior.rsample((5,)).shape
        torch.Size([5, 3])
    """

    mean: Tensor
    variance: Tensor
    noise: Tensor | None = None

    @property
    def stddev(self) -> Tensor:
        """Standard deviations."""
        return self.variance.clamp_min(0).sqrt()

    def observed(self) -> GaussianPosterior:
        """That of observations, noise included.

        Raises:
            ValueError: The noise is unknown.
        """
        if self.noise is None:
            raise ValueError("noise: expected a variance, got None")
        return GaussianPosterior(self.mean, self.variance + self.noise)

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw, with gradients to mean and variance.

        Args:
            sample_shape: Shape of the draws, in front of that of the mean.
            generator: Draws on the device of the mean.
        """
        noise = torch.randn(
            (*sample_shape, *self.mean.shape),
            generator=generator,
            device=self.mean.device,
            dtype=self.mean.dtype,
        )
        return self.mean + self.stddev * noise
