"""Ray-traced scenes with known cameras, depths and surface points, for splatting experiments.

Nothing here is made of Gaussians, and each pixel is the mean over its square, so that images of
several sizes agree and a fit can't win by sharing the renderer of its own truth.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchzoo.data import raytracing, splat_worlds
from torchzoo.data.raytracing import World
from torchzoo.data.splat_worlds import WORLDS, world
from torchzoo.errors import TorchzooError
from torchzoo.files import atomic_path
from torchzoo.ops.library import cache_folder
from torchzoo.splatting.cameras import Cameras

RADIUS, FOV = 4.0, 45.0
_POINT_NOISE, _OUTLIERS = 0.01, 0.02
_GOLDEN = math.pi * (3 - math.sqrt(5))
_POINTS = {"smooth_surfaces": 300}


@dataclass(frozen=True, eq=False)
class SyntheticScene:
    """Views of a world and points of its surfaces.

    Attributes:
        cameras: V cameras, from the lowest to the highest.
        images: `(V, H, W, 3)` in [0, 1], over black.
        depth: `(V, H, W)`, z at the pixels' centres, 0 where nothing opaque is.
        alpha: `(V, H, W)`, the part of each pixel that is covered; over a background of colour b an
            image is `images + (1 - alpha) b`.
        glint: `(V, H, W)`, the part of each pixel that shows glass or a highlight.
        points: `(P, 3)`, as from structure from motion: with noise and outliers.
        colors: `(P, 3)`, their colours in one view.
        train_ids: Views to fit, int64.
        test_ids: Views held out, every eighth.
    """

    cameras: Cameras
    images: Tensor
    depth: Tensor
    alpha: Tensor
    glint: Tensor
    points: Tensor
    colors: Tensor
    train_ids: Tensor
    test_ids: Tensor


def make_scene(
    name: str,
    n_views: int = 24,
    size: int = 64,
    seed: int = 0,
    zoom: float = 1.0,
    *,
    n_points: int | None = None,
    supersample: int = 4,
) -> SyntheticScene:
    """Ray-trace a scene, or read it from the cache folder where it was traced before.

    Cameras look at the origin from a Fibonacci hemisphere of radius 4. Points lie where rays of
    training views meet opaque surfaces that at least two training views see; each gets noise of
    standard deviation 0.01 in each coordinate, and 2 % are put anywhere around the scene.

    Args:
        name: One of `torchzoo.data.splat_worlds.WORLDS`.
        n_views: Views V, at least 2.
        size: Side of the square images.
        seed: Seed of the world, the cameras' azimuth and the points.
        zoom: Factor of the focal length, 1 for a field of view of 45 degrees.
        n_points: Points P at most; None: 300 for `"smooth_surfaces"`, else 2,000.
        supersample: Rays a side of a pixel.

    Raises:
        ValueError: An unknown name, fewer than 2 views, or a size, zoom, number of points or of
            rays that is not positive.

    Example:
        >>> scene = make_scene("checker", n_views=4, size=16)
        >>> scene.images.shape, scene.test_ids.tolist()
        (torch.Size([4, 16, 16, 3]), [1])
    """
    if name not in WORLDS:
        raise ValueError(f"name: expected one of {tuple(WORLDS)}, got {name!r}")
    if n_points is None:
        n_points = _POINTS.get(name, 2000)
    for label, value, least in (
        ("n_views", n_views, 2),
        ("size", size, 1),
        ("n_points", n_points, 1),
        ("supersample", supersample, 1),
    ):
        if value < least:
            raise ValueError(f"{label}: expected a number ≥ {least}, got {value}")
    if not zoom > 0:
        raise ValueError(f"zoom: expected a number > 0, got {zoom}")
    cameras = hemisphere(n_views, size, seed=seed, zoom=zoom)
    path = _cached(repr((name, n_views, size, seed, float(zoom), n_points, supersample)))
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        tensors = _trace(world(name, seed), cameras, seed, n_points, supersample)
        with suppress(TorchzooError), atomic_path(path) as part:
            save_file(tensors, part)
    train, test = split(n_views)
    return SyntheticScene(cameras, **tensors, train_ids=train, test_ids=test)


def hemisphere(n_views: int, size: int, *, seed: int = 0, zoom: float = 1.0) -> Cameras:
    """Cameras on a Fibonacci lattice of the hemisphere, 9 to 72 degrees high."""
    index = torch.arange(n_views)
    height = 0.15 + 0.8 * (index + 0.5) / n_views
    angle = _GOLDEN * (index + 7.0 * seed)
    flat = (1 - height.square()).sqrt()
    eyes = RADIUS * torch.stack([flat * angle.cos(), flat * angle.sin(), height], -1)
    fov = 2 * math.degrees(math.atan(math.tan(math.radians(FOV) / 2) / zoom))
    return Cameras.look_at(eyes, width=size, height=size, fov=fov)


def split(n_views: int) -> tuple[Tensor, Tensor]:
    """Views to fit and views held out: every eighth, none of them the lowest of many."""
    index = torch.arange(n_views)
    held = index % 8 == min(4, (n_views - 1) // 2)
    return index[~held], index[held]


def _trace(
    scene: World, cameras: Cameras, seed: int, n_points: int, supersample: int
) -> dict[str, Tensor]:
    views = scene.render(cameras, supersample=supersample)
    train = cameras[split(len(cameras))[0]]
    points, colors = surface_points(scene, train, n_points, seed=seed)
    return {**views._asdict(), "points": points, "colors": colors}


def surface_points(
    scene: World, cameras: Cameras, count: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Points that structure from motion might find, and their colours, `(P, 3)` each.

    Args:
        scene: The world.
        cameras: The views it is reconstructed from.
        count: Points wanted; where hardly any surface is seen twice there may be fewer.
        seed: Seed of all that is drawn.
    """
    random = torch.Generator().manual_seed(seed)
    points, colors = torch.empty(0, 3), torch.empty(0, 3)
    for _ in range(8):
        p, c = _glimpses(scene, cameras, 2 * count, random)
        often = visible(scene, cameras, p).sum(0) >= min(2, len(cameras))
        points, colors = torch.cat([points, p[often]]), torch.cat([colors, c[often]])
        if len(points) >= count:
            break
    points, colors = points[:count], colors[:count]
    points = points + _POINT_NOISE * torch.randn(points.shape, generator=random)
    stray = torch.randperm(len(points), generator=random)[: round(_OUTLIERS * len(points))]
    points[stray] = 3 * torch.rand(len(stray), 3, generator=random) - 1.5
    colors[stray] = torch.rand(len(stray), 3, generator=random)
    return points, colors


def visible(scene: World, cameras: Cameras, points: Tensor) -> Tensor:
    """Whether each of V cameras sees each of P points of opaque surfaces, `(V, P)` bool."""
    seen = []
    for camera in cameras:
        x, y, z = camera.viewmats[0, :3, :3] @ points.T + camera.viewmats[0, :3, 3:]
        u, v, _ = camera.Ks[0] @ torch.stack([x / z, y / z, torch.ones_like(z)])
        inside = (z > 0) & (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
        o = camera.centers.T.expand(3, len(points))
        seen.append(inside & ~scene.hidden(o, points.T - o, reach=1 - 1e-3))
    return torch.stack(seen)


def _glimpses(
    scene: World, cameras: Cameras, count: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Where random rays of random cameras meet opaque surfaces, and the light they bring."""
    which = torch.randint(len(cameras), (count,), generator=random)
    K, view = cameras.Ks[which], cameras.viewmats[which]
    size = torch.tensor([cameras.width, cameras.height])
    pixel = torch.rand(count, 2, generator=random) * size
    slope = (pixel - K[:, :2, 2]) / K[:, [0, 1], [0, 1]]
    ahead = torch.cat([slope, torch.ones(count, 1)], -1)
    o, d = cameras.centers[which].T, torch.einsum("pij,pi->jp", view[:, :3, :3], ahead)
    rays = scene.trace(o, d)
    met = rays.t.isfinite()
    return (o + rays.t * d).T[met], rays.color.T[met]


def _cached(key: str) -> Path:
    """The file of a scene; its name changes with whatever decides the scene, this code too."""
    digest = hashlib.sha256(key.encode())
    for source in (raytracing.__file__, splat_worlds.__file__, __file__):
        digest.update(Path(source).read_bytes())
    return cache_folder() / "scenes" / f"{digest.hexdigest()[:24]}.safetensors"
