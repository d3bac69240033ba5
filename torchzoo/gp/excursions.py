"""Paths of stationary Gaussian processes, and how long they stay on one side of zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.gp.stationary import as_stationary


def simulate_stationary(
    cov: Any,
    duration: float,
    num_points: int,
    *,
    num_paths: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw paths on an even grid by circulant embedding, their covariance exact to 1e-6.

    Args:
        cov: The covariance, in any form that `torchzoo.gp.as_stationary` takes.
        duration: Time from the first point to the last.
        num_points: Points of the grid, at least 2.
        num_paths: Independent paths.
        generator: Draws on the CPU.

    Shape:
        - output: `(num_paths, num_points)`, float64

    Raises:
        ValueError: An option out of its range, or a covariance whose embedding into a circle is
            not positive semi-definite even on one of 128 durations.

    Source:
        C. R. Dietrich and G. N. Newsam, "Fast and exact simulation of stationary Gaussian processes
        through circulant embedding of the covariance matrix", 1997.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> gauss = lambda t: torch.exp(-(t**2) / 2)
        >>> simulate_stationary(gauss, 10.0, 101, generator=generator).shape
        torch.Size([1, 101])
    """
    if num_points < 2 or num_paths < 1 or not duration > 0:
        raise ValueError(
            "duration, num_points, num_paths: expected more than 0, at least 2 and at least 1, "
            f"got {duration}, {num_points} and {num_paths}"
        )
    known = as_stationary(cov)
    step = duration / (num_points - 1)
    for factor in (1, 2, 4, 8, 16, 32, 64):
        half = factor * (num_points - 1)
        with torch.no_grad():
            lags = known.r(step * torch.arange(half + 1, dtype=torch.float64))
        power = torch.fft.hfft(lags.to(torch.complex128), n=2 * half)
        lost = power.clamp_max(0).sum() / power.sum()  # bounds the error of any covariance
        if lost > -1e-6:
            break
    else:
        raise ValueError(
            "cov: expected a covariance that dies out within 64 durations, got one whose "
            f"circulant has a share {-lost.item():.3g} of negative eigenvalues"
        )
    pairs = (num_paths + 1) // 2
    noise = torch.randn(2, pairs, 2 * half, dtype=torch.float64, generator=generator)
    spectrum = (power.clamp_min(0) / (2 * half)).sqrt() * torch.complex(noise[0], noise[1])
    both = torch.fft.fft(spectrum)[:, :num_points]
    return torch.cat([both.real, both.imag])[:num_paths]  # independent of each other


def excursion_times(paths: Tensor, dt: float) -> list[Tensor]:
    """Times between successive zero crossings, by linear interpolation between samples.

    What lies before a path's first crossing and after its last is left out.

    Args:
        paths: Samples, no further apart than the shortest excursion to be seen.
        dt: Time between samples.

    Shape:
        - paths: `(n, m)`, or `(m,)` for a single one

    Returns:
        For each path the lengths of its complete excursions, in order, above and below zero.

    Raises:
        ValueError: paths has other dimensions, or dt is not above 0.

    Example:
        >>> excursion_times(torch.tensor([-1.0, 1.0, 3.0, -3.0, -1.0, 3.0]), 0.5)
        [tensor([1.0000, 0.8750])]
    """
    if paths.ndim not in (1, 2) or not dt > 0:
        raise ValueError(
            f"paths, dt: expected (n, m) or (m,) and a number above 0, got {tuple(paths.shape)} "
            f"and {dt}"
        )
    found = []
    for path in paths.reshape(-1, paths.shape[-1]):
        left, right = path[:-1], path[1:]
        at = ((left < 0) != (right < 0)).nonzero()[:, 0]
        crossings = at + left[at] / (left[at] - right[at])
        found.append(crossings.diff() * dt)
    return found
