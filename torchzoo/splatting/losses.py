"""Losses of pictures against photographs, channels last."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from torchzoo.common.images import ssim


def l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference.

    Args:
        image: What was rendered.
        target: What it should be, of the same shape.

    Shape:
        - image, target: `(..., H, W, C)`
        - output: scalar

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> l1(torch.zeros(2, 4, 4, 3), torch.full((2, 4, 4, 3), 0.5))
        tensor(0.5000)
    """
    if image.shape != target.shape:
        raise ValueError(
            f"target: expected the shape of image, {tuple(image.shape)}, got {tuple(target.shape)}"
        )
    return (image - target).abs().mean()


def photometric_loss(image: Tensor, target: Tensor, *, ssim_weight: float = 0.2) -> Tensor:
    """The loss of Gaussian splatting: `(1 - w) L1 + w (1 - SSIM)`.

    Args:
        image: What was rendered, values in [0, 1].
        target: What it should be, of the same shape.
        ssim_weight: The weight w, in [0, 1].

    Shape:
        - image, target: `(..., H, W, C)`
        - output: scalar

    Raises:
        ValueError: Shapes that differ, fewer than three dimensions, or a weight outside [0, 1].

    Source:
        B. Kerbl, G. Kopanas, T. Leimkühler and G. Drettakis, "3D Gaussian Splatting for Real-Time
        Radiance Field Rendering", 2023, equation 7; SSIM has windows of 11 pixels with a standard
        deviation of 1.5 and zeros beyond the border.

    Example:
        >>> import torch
        >>> target = torch.rand(1, 16, 16, 3)
        >>> bool(photometric_loss(target, target) < 1e-5)
        True
    """
    if not 0 <= ssim_weight <= 1:
        raise ValueError(f"ssim_weight: expected a number in [0, 1], got {ssim_weight}")
    difference = l1(image, target)
    if not ssim_weight:
        return difference
    first, second = (rearrange(x, "... h w c -> ... c h w") for x in (image, target))
    return (1 - ssim_weight) * difference + ssim_weight * (1 - ssim(first, second).mean())
