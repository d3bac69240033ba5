"""Simulated trials of spikes and images that have one of their three latents in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.data.digits import digits

_TURN, _GROW, _LOADING, _RATE = 0.6, 0.2, 0.5, 0.5


class PairedRecordings(NamedTuple):
    """Trials of one simulated session, float32.

    Attributes:
        latents: That of spikes alone, the shared one, that of images alone, `(B, T, 3)`.
        rates: Expected counts, `(B, T, N)`.
        spikes: Counts, `(B, T, N)`.
        images: Noisy images, flattened, `(B, T, S * S)`.
    """

    latents: Tensor
    rates: Tensor
    spikes: Tensor
    images: Tensor


def paired_recordings(
    trials: int = 120,
    *,
    num_steps: int = 60,
    neurons: int = 40,
    size: int = 12,
    lengthscale: float = 8.0,
    noise: float = 0.05,
    seed: int = 0,
) -> PairedRecordings:
    """Spikes and images of latents that are Gaussian processes with an RBF kernel.

    Counts are Poisson with log rates linear in the first two latents, normal weights of deviation
    0.5, and a rate of 0.5 at 0. Images are one handwritten digit, turned by 0.6 of the second
    latent, in radians, and made larger by the exponential of 0.2 of the third.

    Args:
        trials: Trials B.
        num_steps: Steps T of each.
        neurons: Neurons N.
        size: Side S of the images.
        lengthscale: Length of the kernel in steps.
        noise: Standard deviation of the noise of a pixel; not clipped.
        seed: Seed of all draws.

    Raises:
        ValueError: A number below 1, a length not above 0 or negative noise.

    Example:
        >>> data = paired_recordings(2, num_steps=5)
        >>> data.spikes.shape, data.images.shape
        (torch.Size([2, 5, 40]), torch.Size([2, 5, 144]))
    """
    if min(trials, num_steps, neurons, size) < 1:
        raise ValueError(
            "trials, num_steps, neurons, size: expected at least 1, "
            f"got {trials}, {num_steps}, {neurons}, {size}"
        )
    if not lengthscale > 0 or noise < 0:
        raise ValueError(
            f"lengthscale, noise: expected above 0 and at least 0, got {lengthscale}, {noise}"
        )
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(num_steps, dtype=torch.float64)
    covariance = (-((t[:, None] - t) ** 2) / (2 * lengthscale**2)).exp()
    root = torch.linalg.cholesky(covariance + 1e-8 * torch.eye(num_steps, dtype=torch.float64))
    draw = torch.randn(trials, num_steps, 3, generator=generator, dtype=torch.float64)
    latents = (root @ draw).float()
    weights = _LOADING * torch.randn(2, neurons, generator=generator)
    rates = _RATE * (latents[..., :2] @ weights).exp()
    images = _turned(latents[..., 1].flatten(), latents[..., 2].flatten(), size)
    images = images + noise * torch.randn(images.shape, generator=generator)
    spikes = torch.poisson(rates, generator=generator)
    return PairedRecordings(latents, rates, spikes, images.unflatten(0, (trials, num_steps)))


def _turned(turn: Tensor, growth: Tensor, size: int) -> Tensor:
    """The digit, once for each pair of latents, `(M, S * S)`."""
    digit = F.interpolate(digits((4,)).train_x[:1], (size, size), mode="bilinear")
    shrink, angle = (-_GROW * growth).exp(), _TURN * turn
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
    maps = F.pad((shrink[:, None] * rows).unflatten(-1, (2, 2)), (0, 1))  # no shift
    grid = F.affine_grid(maps, [len(maps), 1, size, size], align_corners=False)
    images = F.grid_sample(digit.expand(len(maps), -1, -1, -1), grid, align_corners=False)
    return images.flatten(1)
