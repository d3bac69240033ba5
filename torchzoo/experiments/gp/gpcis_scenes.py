"""Small pictures of two textured objects, one of which is meant, and clicks on what is wrong.

Half of the pictures are coloured Voronoi cells, half are cut from two photographs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.data.photographs import PHOTOGRAPHS, photograph

NOISE = 0.08
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Scenes(NamedTuple):
    """Standardised images `(N, 3, S, S)` and the masks of the object that is meant, `(N, S, S)`."""

    images: Tensor
    masks: Tensor


def standardise(photos: Tensor) -> Tensor:
    """Colours `(..., 3, H, W)` in [0, 1] as networks take them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (photos - mean) / std


def scenes(n: int, size: int, seed: int) -> Scenes:
    """Draw pictures."""
    generator = torch.Generator().manual_seed(seed)
    images, masks = [], []
    for index in range(n):
        surface = cells if index % 2 else crop
        picture = surface(size, generator, 0)
        meant = blob(size, generator)
        other = blob(size, generator) & ~meant
        for part in (other, meant):
            picture = torch.where(part, surface(size, generator, 1), picture)
        images.append(picture + NOISE * torch.randn(picture.shape, generator=generator))
        masks.append(meant)
    return Scenes(standardise(torch.stack(images).clamp(0, 1)), torch.stack(masks))


def cells(size: int, generator: torch.Generator, kind: int) -> Tensor:
    """A texture of 5 colours in 12 Voronoi cells, `(3, S, S)`."""
    centres = size * torch.rand(12, 2, generator=generator)
    colours = torch.rand(5, 3, generator=generator)
    nearest = torch.cdist(_grid(size), centres).argmin(1)
    return colours[nearest % 5].T.reshape(3, size, size)


def crop(size: int, generator: torch.Generator, kind: int) -> Tensor:
    """A piece of a photograph, the first for backgrounds and the second for objects, half size."""
    photo = photograph(PHOTOGRAPHS[kind])
    top, left = (
        int(torch.randint(0, side - 2 * size, (), generator=generator)) for side in photo.shape[:2]
    )
    piece = photo[top : top + 2 * size, left : left + 2 * size].permute(2, 0, 1)
    return F.avg_pool2d(piece, 2)


def blob(size: int, generator: torch.Generator) -> Tensor:
    """A round shape whose radius has three harmonics, as booleans `(S, S)`."""
    centre = size * (0.25 + 0.5 * torch.rand(2, generator=generator))
    radius = size * (0.16 + 0.12 * torch.rand((), generator=generator))
    waves = 0.2 * torch.randn(3, 2, generator=generator)
    away = _grid(size) - centre
    angle = torch.atan2(away[:, 0], away[:, 1])
    edge = 1 + sum(
        waves[k, 0] * ((k + 2) * angle).cos() + waves[k, 1] * ((k + 2) * angle).sin()
        for k in range(3)
    )
    return (away.norm(dim=1) < radius * edge).reshape(size, size)


def _grid(size: int) -> Tensor:
    at = torch.arange(size) + 0.5
    return torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).reshape(-1, 2)


def next_clicks(
    found: Tensor, masks: Tensor, points: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Click into the middle of the largest wrong region, never twice on a pixel.

    Args:
        found: Masks so far `(N, S, S)`.
        masks: The truth.
        points: Clicks so far `(N, M, 2)`.
        labels: Their labels `(N, M)`.

    Returns:
        Points and labels with one more click; label 0 where nothing is wrong.
    """
    wrong = (found != masks).numpy()
    truth = masks.numpy()
    new, signs = np.zeros((len(masks), 1, 2), np.int64), np.zeros((len(masks), 1), np.int64)
    for i, (region, done, label) in enumerate(
        zip(wrong, points.numpy(), labels.numpy(), strict=True)
    ):
        spot = middle(region, done[label != 0])
        if spot is not None:
            new[i, 0] = spot
            signs[i, 0] = 1 if truth[i][spot] else -1
    return (
        torch.cat([points, torch.from_numpy(new)], 1),
        torch.cat([labels, torch.from_numpy(signs)], 1),
    )


def middle(region: np.ndarray, done: np.ndarray) -> tuple[int, int] | None:
    """The pixel farthest from the edge of the largest connected part, without those clicked."""
    from scipy import ndimage

    free = region.copy()
    free[tuple(done.T)] = False
    if not free.any():
        return None
    parts, count = ndimage.label(free)
    largest = parts == 1 + np.bincount(parts.ravel())[1:].argmax() if count > 1 else free
    depth = ndimage.distance_transform_cdt(np.pad(largest, 1))[1:-1, 1:-1]
    row, column = divmod(int(depth.argmax()), region.shape[1])
    return row, column


def iou(found: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union, `(N,)`."""
    both = (found & masks).sum((1, 2))
    return both / (found | masks).sum((1, 2)).clamp_min(1)


def demo_photo(name: str, width: int = 160) -> Tensor:
    """A photograph made small, `(3, H, W)` in [0, 1]."""
    photo = photograph(name).permute(2, 0, 1)
    height = math.floor(photo.shape[1] * width / photo.shape[2])
    return F.interpolate(photo[None], (height, width), mode="area")[0]
