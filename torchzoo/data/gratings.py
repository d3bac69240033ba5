"""Short videos of a grating that moves in small steps over a still background."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ORIENTATIONS, FREQUENCIES = 4, 2
CLASSES = ORIENTATIONS * FREQUENCIES


def moving_gratings(
    n: int,
    *,
    frames: int = 12,
    size: int = 16,
    patch: int = 8,
    contrast: float = 0.5,
    background: float = 0.25,
    noise: float = 0.02,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw clips in which a patch with one of 8 gratings moves a pixel every second frame.

    The class is the grating: one of 4 orientations at 1/8 or 1/4 cycles a pixel, in any phase. The
    patch starts anywhere, moves in one of the 8 directions and turns back at the border. The
    background is white noise, drawn once a clip; every pixel of every frame has sensor noise.

    Args:
        n: Clips.
        frames: Frames T of a clip.
        size: Height and width of a frame, in pixels.
        patch: Height and width of the patch, at most `size`.
        contrast: Amplitude of the grating.
        background: Standard deviation of the background.
        noise: Standard deviation of the sensor noise.
        generator: Draws everything (on the CPU).

    Returns:
        Clips `(n, T, size, size, 1)` and classes `(n,)` in 0 … 7.

    Raises:
        ValueError: The patch does not fit.

    Example:
        >>> clips, labels = moving_gratings(4)
        >>> clips.shape, labels.shape
        (torch.Size([4, 12, 16, 16, 1]), torch.Size([4]))
    """
    if not 0 < patch <= size:
        raise ValueError(f"patch: expected 1 … {size}, the size of a frame, got {patch}")
    label = torch.randint(CLASSES, (n,), generator=generator)
    angle = math.pi / ORIENTATIONS * (label % ORIENTATIONS)
    frequency = 0.125 * (1 + label // ORIENTATIONS)
    phase = 2 * math.pi * torch.rand(n, generator=generator)

    room = size - patch
    start = torch.randint(room + 1, (n, 2), generator=generator)
    turn = math.pi / 4 * torch.randint(8, (n,), generator=generator)
    direction = torch.stack([turn.sin(), turn.cos()], -1).round().long()
    moves = torch.arange(frames) // 2
    corner = _reflect(start[:, None] + direction[:, None] * moves[:, None], room)  # (n, T, 2)

    pixel = torch.arange(size)
    row = (pixel - corner[..., :1])[..., :, None]  # within the patch, (n, T, size, 1)
    column = (pixel - corner[..., 1:])[..., None, :]
    inside = (row >= 0) & (row < patch) & (column >= 0) & (column < patch)
    angle, frequency, phase = (v[:, None, None, None] for v in (angle, frequency, phase))
    wave = 2 * math.pi * frequency * (row * angle.sin() + column * angle.cos()) + phase
    still = background * torch.randn(n, 1, size, size, generator=generator)
    clip = torch.where(inside, contrast * wave.cos(), still)
    return (clip + noise * torch.randn(clip.shape, generator=generator)).unsqueeze(-1), label


def _reflect(position: Tensor, room: int) -> Tensor:
    """Fold positions into 0 … room, turning back at both ends."""
    if room == 0:
        return torch.zeros_like(position)
    folded = position.remainder(2 * room)
    return torch.minimum(folded, 2 * room - folded)
