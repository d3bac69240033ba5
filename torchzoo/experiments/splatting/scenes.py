"""Views to train splats on: of a ray-traced scene by its name, or of a capture by its path."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.catalogue import suggest
from torchzoo.data.splat_scenes import make_scene
from torchzoo.data.splat_worlds import WORLDS
from torchzoo.errors import TorchzooError, UnknownNameError
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.formats import load_capture
from torchzoo.splatting.photographs import load_photographs

HELD_OUT = 8
"""One view in so many is not trained on."""


class Views(NamedTuple):
    """Pictures of a scene and where splats might begin.

    Attributes:
        cameras: V cameras.
        images: `(V, H, W, 3)`, floating point in [0, 1] or uint8.
        points: `(P, 3)`.
        colors: `(P, 3)`, from 0 to 1.
        train_ids: Views to train on.
        test_ids: Views held out; empty where there are fewer than 8.
    """

    cameras: Cameras
    images: Tensor
    points: Tensor
    colors: Tensor
    train_ids: Tensor
    test_ids: Tensor


def built_in(
    name: str, *, views: int = 24, size: int = 64, points: int | None = None, seed: int = 0
) -> Views:
    """Views of a ray-traced scene.

    Args:
        name: One of `torchzoo.data.splat_worlds.WORLDS`.
        views: How many views.
        size: Side of the pictures.
        points: Points at most; None: as many as the scene comes with.
        seed: Seed of the scene.

    Raises:
        UnknownNameError: There is no such scene.
    """
    if name not in WORLDS:
        known = ", ".join(WORLDS)
        raise UnknownNameError(f"no scene {name!r}{suggest(name, WORLDS)}; there are {known}")
    scene = make_scene(name, views, size, seed, n_points=points)
    return Views(
        scene.cameras, scene.images, scene.points, scene.colors, scene.train_ids, scene.test_ids
    )


def captured(
    path: Path, *, size: int | None = None, points: int | None = None, seed: int = 0
) -> Views:
    """Views of a capture: a COLMAP model or a `transforms.json`, with its images.

    Args:
        path: As for `torchzoo.splatting.formats.load_capture`.
        size: Longer side of the pictures; None: theirs.
        points: Points at most; also how many are scattered where the capture has none (10,000).
        seed: Seed of what is drawn.

    Raises:
        TorchzooError: Cameras or images are missing or can't be read; the message says which.
    """
    try:
        capture = load_capture(path)
    except (ValueError, OSError) as error:
        raise TorchzooError(_line(path, error)) from error
    folder = path if path.is_dir() else path.parent
    cameras, images = load_photographs(capture.cameras, capture.names, folder, longest=size)
    random = torch.Generator().manual_seed(seed)
    xyz, rgb = capture.points, capture.colors
    if not len(xyz):
        xyz, rgb = _scattered(cameras, points or 10_000, random)
    if points is not None and len(xyz) > points:
        chosen = torch.randperm(len(xyz), generator=random)[:points]
        xyz, rgb = xyz[chosen], rgb[chosen]
    index = torch.arange(len(cameras))
    held = (index % HELD_OUT == 0) & (len(cameras) >= HELD_OUT)
    return Views(cameras, images, xyz, rgb, index[~held], index[held])


def _scattered(cameras: Cameras, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grey points in a cube around what the cameras look at, half as wide as these are apart."""
    axes = cameras.viewmats[:, 2, :3]
    across = torch.eye(3) - axes[:, :, None] * axes[:, None, :]
    moment = (across @ cameras.centers[..., None]).sum(0)
    middle = (torch.linalg.pinv(across.sum(0)) @ moment).squeeze(-1)
    reach = cameras.scene_scale / 2
    place = 2 * torch.rand(count, 3, generator=random) - 1
    return middle + reach * place, torch.full((count, 3), 0.5)


def _line(path: Path, error: Exception) -> str:
    """What is wrong, with the path in front."""
    if isinstance(error, OSError):
        return f"can't read {error.filename or path}: {error.strerror or error}"
    text = str(error)
    return text if str(path) in text else f"{path}: {text}"
