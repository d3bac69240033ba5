"""Assertions for Monte Carlo tests."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_se(x: Tensor, expected: Tensor | float, n_se: float = 4) -> None:
    """Assert that the mean of samples is within `n_se` standard errors of its expectation.

    Args:
        x: Independent samples along the first dimension.
        expected: The expectation, of the shape of one sample or broadcast to it.
        n_se: Allowed distance in standard errors; at 4, one correct comparison in 16,000 fails.

    Shape:
        - x: `(N, ...)`, N at least 2
        - expected: `(...)`

    Raises:
        AssertionError: Some element of the mean is farther away; the message says the worst.
        ValueError: Fewer than two samples.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> assert_within_se(torch.randn(1000, 3, generator=generator), 0.0)
    """
    if x.dim() == 0 or len(x) < 2:
        raise ValueError(f"x: expected at least two samples, got shape {tuple(x.shape)}")
    samples = x.detach().double()
    target = torch.as_tensor(expected, dtype=torch.float64, device=x.device)
    error = (samples.mean(0) - target).abs()
    # samples without spread may still differ from the expectation by their own rounding
    rounding = torch.finfo(x.dtype).eps * target.abs() if x.is_floating_point() else 0.0
    allowed = n_se * samples.std(0) / len(x) ** 0.5 + rounding
    excess = (error - allowed).flatten()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"mean is {error.flatten()[worst]:.3g} from its expectation, allowed "
        f"{allowed.flatten()[worst]:.3g} ({n_se} standard errors of {len(x)} samples)"
    )
