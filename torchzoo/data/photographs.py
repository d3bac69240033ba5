"""Films that a moving camera takes of real photographs, those that scikit-learn ships.

A view of S x S pixels looks at a spot (y, x) of the photograph at a scale z, photograph pixels a
film pixel. The camera holds still, and then pans and zooms:

    spot_t = spot_0 + z_0 · pan · m_t · (sin φ, cos φ),   z_t = z_0 · zoom^(±m_t),

with m_t moves by frame t, turning back at the photograph's edges. A film pixel takes the mean light
of its square, bilinearly between the photograph's pixels, and the sensor adds noise.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOGRAPHS = ("china", "flower")


class Films(NamedTuple):
    """Films `(N, T, S, S, 3)` in [0, 1] and the photograph each shows, `(N,)`."""

    frames: Tensor
    labels: Tensor


@cache
def photograph(name: str = "china") -> Tensor:
    """A photograph as float32 in [0, 1], `(427, 640, 3)`; don't write to it.

    Args:
        name: `"china"`, a temple, or `"flower"`.

    Raises:
        ValueError: Another name.

    Source:
        `sklearn.datasets.load_sample_image`; licences and authors are in that folder's README.

    Example:
        >>> photograph("flower").shape
        torch.Size([427, 640, 3])
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"name: expected one of {PHOTOGRAPHS}, got {name!r}")
    from sklearn.datasets import load_sample_image

    return torch.tensor(load_sample_image(f"{name}.jpg"), dtype=torch.float32) / 255


def camera_films(
    n: int,
    *,
    frames: int = 16,
    size: int = 32,
    scale: float = 4.0,
    pan: float = 1.0,
    zoom: float = 1.0,
    hold: int = 1,
    noise: float = 0.01,
    seed: int = 0,
) -> Films:
    """Film the photographs: each film has its own photograph, first spot and direction.

    Args:
        n: Films N.
        frames: Frames T of a film.
        size: Side S of a frame, in pixels.
        scale: Photograph pixels a film pixel at the start.
        pan: Film pixels of the start that the view moves by in a move; need not be whole.
        zoom: Factor of the scale in a move, ≥ 1; half of the films zoom in and half out, at random.
        hold: Frames from one move to the next; as many as `frames`: a camera that stands still.
        noise: Standard deviation of the sensor's noise, new in every value and frame; the sum is
            clipped to [0, 1].
        seed: Seed of everything drawn; with the other arguments it decides each value.

    Returns:
        The films and which of `PHOTOGRAPHS` they show.

    Raises:
        ValueError: No frames, `hold`, `size` or `scale`, a zoom below 1, negative noise, or a view
            that at some time is larger than the photograph.

    Example:
        >>> films = camera_films(2, frames=4, size=16, pan=2.0, hold=2)
        >>> films.frames.shape, films.labels.shape
        (torch.Size([2, 4, 16, 16, 3]), torch.Size([2]))
    """
    for name, value, least in (
        ("frames", frames, 1),
        ("size", size, 1),
        ("hold", hold, 1),
        ("zoom", zoom, 1),
        ("noise", noise, 0),
    ):
        if not value >= least:
            raise ValueError(f"{name}: expected a number ≥ {least}, got {value}")
    if not scale > 0:
        raise ValueError(f"scale: expected a number > 0, got {scale}")
    generator = torch.Generator().manual_seed(seed)
    moves = torch.arange(frames) // hold
    sign = 2.0 * torch.randint(0, 2, (n, 1), generator=generator) - 1
    labels = torch.randint(0, len(PHOTOGRAPHS), (n,), generator=generator)
    scales = scale * zoom ** (sign * moves)  # (N, T)
    extent = torch.tensor(photograph().shape[:2]).float()
    room = extent - size * scale * zoom ** float(moves[-1])
    if bool((room < 0).any()):
        raise ValueError(
            f"size, scale, zoom: a view of {float((extent - room).max()):g} photograph pixels is "
            f"larger than {tuple(int(side) for side in extent)}"
        )
    start = torch.rand(n, 1, 2, generator=generator) * room
    angle = 2 * math.pi * torch.rand(n, 1, generator=generator)
    way = pan * scale * torch.stack([angle.sin(), angle.cos()], -1) * moves[:, None]
    spots = extent / 2 + _reflect(start + way, room) - room / 2  # centres of views, (N, T, 2)

    still = (
        torch.stack(
            [
                views(photograph(PHOTOGRAPHS[int(label)]), spot, zoomed, size)
                for label, spot, zoomed in zip(labels, spots, scales, strict=True)
            ]
        )
        if n
        else torch.zeros(0, frames, size, size, 3)
    )
    grain = noise * torch.randn(still.shape, generator=generator)
    return Films((still + grain).clamp(0, 1), labels)


def views(image: Tensor, spots: Tensor, scales: Tensor, size: int) -> Tensor:
    """What a camera without noise sees.

    Args:
        image: The photograph; beyond its edges they go on.
        spots: The middle of each view, in pixels down and right from the upper left corner.
        scales: Photograph pixels a pixel of each view. A view's pixel is the mean of as many
            samples a side as the largest scale, rounded up.
        size: Side S of a view.

    Shape:
        - image: `(H, W, C)`
        - spots: `(T, 2)`
        - scales: `(T,)`
        - output: `(T, S, S, C)`

    Example:
        >>> image = torch.arange(16.0).view(4, 4, 1)
        >>> views(image, torch.tensor([[1.0, 3.0]]), torch.ones(1), 2).flatten().tolist()
        [2.0, 3.0, 6.0, 7.0]
    """
    taps = max(1, math.ceil(float(scales.max())))  # samples a side of a film pixel's square
    offset = (torch.arange(size * taps) + 0.5) / taps - size / 2
    rows, columns = (spots[:, i, None] + scales[:, None] * offset for i in (0, 1))
    extent = torch.tensor(image.shape[:2])
    y, x = (2 * at / side - 1 for at, side in zip((rows, columns), extent, strict=True))
    grid = torch.stack(
        [x[:, None, :].expand(-1, size * taps, -1), y[:, :, None].expand(-1, -1, size * taps)], -1
    )
    source = image.permute(2, 0, 1).expand(len(spots), -1, -1, -1)
    sampled = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, taps).permute(0, 2, 3, 1)


def _reflect(position: Tensor, room: Tensor) -> Tensor:
    """Fold positions `(..., 2)` into 0 … room, turning back at both ends."""
    period = 2 * room.clamp(min=torch.finfo(room.dtype).tiny)
    folded = position.remainder(period)
    return torch.minimum(folded, period - folded)
