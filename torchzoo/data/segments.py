"""Synthetic non-stationary sequences: which segment deviates, under a gain and drift of its own?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Sequences x (N, length, dim), float32, and the deviating segment y (N,) of each, int64."""

    x: Tensor
    y: Tensor


def deviating_segments(
    n: int,
    *,
    length: int = 32,
    dim: int = 64,
    segments: int = 4,
    amplitude: float = 1.0,
    seed: int = 0,
) -> Segments:
    """Noise in which one segment stands out in z-score, though in no fixed unit.

    x = gain * (noise + slope * time + amplitude * sign * [time in segment y]) + offset. Noise is
    standard normal; a sample has one gain exp(N(0, 1/2)) and one offset N(0, 9), and for each
    feature a slope N(0, 1) over time from -1 to 1 and a random sign.

    Args:
        n: Number of sequences N.
        length: Time steps; a multiple of `segments`.
        dim: Features.
        segments: Number of equal segments, the classes.
        amplitude: Shift of the deviating segment in standard deviations of the noise.
        seed: Seed of everything that is drawn.

    Shape:
        - x: `(N, length, dim)`
        - y: `(N,)`, each class equally likely

    Raises:
        ValueError: `length` is no multiple of `segments`.

    Example:
        >>> deviating_segments(3, seed=1).x.shape
        torch.Size([3, 32, 64])
    """
    if segments < 1 or length % segments:
        raise ValueError(f"length: expected a multiple of {segments=}, got {length}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    y = torch.randint(segments, (n,), generator=generator)
    time = torch.linspace(-1, 1, length)[:, None]
    inside = torch.arange(length) // (length // segments) == y[:, None]
    shift = amplitude * normal(n, 1, dim).sign() * inside[..., None]
    clean = normal(n, length, dim) + normal(n, 1, dim) * time + shift
    gain, offset = torch.exp(normal(n, 1, 1) / 2**0.5), 3 * normal(n, 1, 1)
    return Segments(gain * clean + offset, y)
