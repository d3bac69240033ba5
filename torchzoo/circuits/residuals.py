"""Photographs as patches of small integers, by steps that can be undone exactly.

    colour:      (R, G, B) -> (G, R - G, B - G)
    prediction:  e = x - median(W, N, W + N - NW)     (the pixels left, above, and above left)

all modulo 256, so that both are bijections of 8-bit images. Weinberger, Seroussi and Sapiro, The
LOCO-I Lossless Image Compression Algorithm, 2000, has the predictor. Its errors are cut in square
patches; what a circuit over these learns is how their spread goes along with that of neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

SIDE = 8
"""Pixels a side of a patch."""


def to_residuals(pixels: Tensor) -> Tensor:
    """Errors of the prediction of each plane of an image.

    Args:
        pixels: 8-bit image of one or three channels.

    Shape:
        - pixels: `(H, W, C)`, uint8
        - output: `(C, H, W)`, uint8

    Raises:
        ValueError: Another shape or type.

    Example:
        >>> to_residuals(torch.full((1, 3, 1), 7, dtype=torch.uint8)).tolist()
        [[[7, 0, 0]]]
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(
            f"pixels: expected uint8 (H, W, 1 or 3), got {pixels.dtype} {tuple(pixels.shape)}"
        )
    planes = _decorrelated(rearrange(pixels, "h w c -> c h w"), -1).int()
    left, above, corner = (torch.zeros_like(planes) for _ in range(3))
    left[:, :, 1:] = planes[:, :, :-1]
    above[:, 1:] = planes[:, :-1]
    corner[:, 1:, 1:] = planes[:, :-1, :-1]
    left[:, 1:, :1] = above[:, 1:, :1]  # beyond the edges the image goes on
    corner[:, 1:, :1] = above[:, 1:, :1]
    above[:, :1] = left[:, :1]
    corner[:, :1] = left[:, :1]
    guess = torch.maximum(
        torch.minimum(left, above),
        torch.minimum(torch.maximum(left, above), left + above - corner),
    )
    return (planes - guess).to(torch.uint8)


def from_residuals(residuals: Tensor) -> Tensor:
    """The image whose prediction has these errors: `to_residuals` undone.

    Shape:
        - residuals: `(C, H, W)`, uint8
        - output: `(H, W, C)`, uint8

    Example:
        >>> image = torch.randint(256, (5, 4, 3), dtype=torch.uint8)
        >>> torch.equal(from_residuals(to_residuals(image)), image)
        True
    """
    channels, height, width = residuals.shape
    # A pixel waits for those left and above, so pixels of one diagonal y + x are restored at once.
    # The frame is wide by one row and column, from which prediction takes what is beyond the edge.
    error = residuals.numpy().reshape(channels, -1).astype(np.int32)
    frame = np.zeros((channels, (height + 1) * (width + 1)), dtype=np.int32)
    for diagonal in range(height + width - 1):
        y = np.arange(max(0, diagonal - width + 1), min(diagonal, height - 1) + 1)
        x = diagonal - y
        at = (y + 1) * (width + 1) + x + 1
        left, above, corner = frame[:, at - 1], frame[:, at - width - 1], frame[:, at - width - 2]
        left = np.where(x == 0, above, left)
        corner = np.where(x == 0, above, corner)
        above = np.where(y == 0, left, above)
        corner = np.where(y == 0, left, corner)
        low, high = np.minimum(left, above), np.maximum(left, above)
        guess = np.maximum(low, np.minimum(high, left + above - corner))
        frame[:, at] = (guess + error[:, y * width + x]) & 255
    planes = frame.reshape(channels, height + 1, width + 1)[:, 1:, 1:].astype(np.uint8)
    return rearrange(_decorrelated(torch.from_numpy(planes), 1), "c h w -> h w c").contiguous()


def _decorrelated(planes: Tensor, sign: int) -> Tensor:
    """Red and blue less green (or plus, with sign 1); the planes as (G, R, B) (or from that)."""
    if len(planes) == 1:
        return planes
    if sign < 0:
        red, green, blue = planes
        return torch.stack([green, red - green, blue - green])
    green, red, blue = planes
    return torch.stack([red + green, green, blue + green])


def to_patches(planes: Tensor) -> Tensor:
    """Planes cut in square patches, in row-major order; those over the edge are filled with 0.

    Shape:
        - planes: `(C, H, W)`
        - output: `(N, 64)`

    Example:
        >>> to_patches(torch.ones(1, 9, 3)).sum(1).tolist()
        [24.0, 3.0]
    """
    down, right = (-size % SIDE for size in planes.shape[1:])
    padded = torch.nn.functional.pad(planes, (0, right, 0, down))
    return rearrange(padded, "c (h p) (w q) -> (c h w) (p q)", p=SIDE, q=SIDE)


def from_patches(patches: Tensor, channels: int, height: int, width: int) -> Tensor:
    """The planes `(C, H, W)` that were cut into these patches `(N, 64)`."""
    rows, columns = -(-height // SIDE), -(-width // SIDE)
    sizes = {"c": channels, "h": rows, "w": columns, "p": SIDE, "q": SIDE}
    planes = rearrange(patches, "(c h w) (p q) -> c (h p) (w q)", **sizes)
    return planes[:, :height, :width]
