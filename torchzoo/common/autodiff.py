"""Derivatives of functions and modules that several families need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    center: float = 1.0,
    one_sided: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How far a critic is from having gradients of norm `center` between two sets of samples.

    The mean of `(norm of the critic's gradient - center)^2` at points
    `eps fake + (1 - eps) real`, eps uniform in [0, 1] for each pair. It can be differentiated by
    the critic's parameters; samples count as constants.

    Args:
        critic: Maps samples to a value each, rows apart from each other.
        real: Samples.
        fake: As many others.
        center: The norm aimed at.
        one_sided: Whether smaller norms are free.
        generator: Draws, on the device of the samples.

    Shape:
        - real, fake: `(..., D)`
        - critic: `(..., D)` to `(...)`
        - output: a scalar

    Raises:
        ValueError: Samples of different shapes.

    Source:
        I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin and A. Courville, "Improved training of
        Wasserstein GANs", 2017, equation 3; one-sided: H. Petzka, A. Fischer and D. Lukovnikov,
        "On the regularization of Wasserstein GANs", 2018, equation 8.

    Example:
        >>> gradient_penalty(lambda x: 3 * x[..., 0], torch.zeros(4, 2), torch.ones(4, 2)).item()
        4.0
    """
    if real.ndim == 0 or real.shape != fake.shape:
        raise ValueError(
            f"fake: expected (..., D) of the shape of real, {tuple(real.shape)}, "
            f"got {tuple(fake.shape)}"
        )
    eps = torch.rand(
        (*real.shape[:-1], 1), generator=generator, device=real.device, dtype=real.dtype
    )
    with torch.enable_grad():
        between = torch.lerp(real.detach(), fake.detach(), eps).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    # The norm has no gradient at 0, which a critic may well reach.
    apart = (slope.square().sum(-1) + 1e-12).sqrt() - center
    return (apart.clamp_min(0) if one_sided else apart).square().mean()
