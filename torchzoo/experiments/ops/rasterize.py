"""`rasterize` against its tensor formulation, a matrix product, and its own inner loop at its best.

Splats fill the image: standard deviations of about 3 pixels, each pixel behind some 40 of them. A
case "forward" is a whole rendering, colours by spherical harmonics of degree 3 included; a case
"training" renders and takes the gradients of all that a scene is made of. The peers are

- `reference`: the same operators as their tensor formulations, where these end in time;
- `product`: one float32 product of 2048 x 2048 matrices, as a yardstick for the machine;
- `forward`: the rendering alone, beside the training step;
- `dense`: for the compositing alone, as many pairs of a pixel and a splat as were blended, but in
  tiles that their splats cover whole and with lists that stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops import _splat_project, _splat_raster
from torchzoo.ops.rasterize import rasterize
from torchzoo.ops.spherical_harmonics import splat_sh

ALPHA_MIN, ALPHA_MAX, T_STOP, TILE = 1 / 255, 0.99, 1e-4, 16
DEEP = 512  # splats of a tile's list that stays in cache


class Scene(NamedTuple):
    """Splats in front of one camera."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh: Tensor
    viewmat: Tensor
    K: Tensor


def make_scene(count: int, size: int, device: torch.device, deviation: float = 3.0) -> Scene:
    """Splats all over the image, with deviations of about so many pixels."""
    generator = torch.Generator().manual_seed(0)
    uniform = partial(torch.rand, generator=generator)
    depth, focal = 2 + 4 * uniform(count, 1), 1.2 * size
    across = (uniform(count, 2) - 0.5) * (1.05 * size / focal) * depth
    scene = Scene(
        torch.cat((across, depth), 1),
        torch.randn(count, 4, generator=generator),
        (uniform(count, 3) + 0.5) * deviation / focal * depth,
        0.05 + 0.9 * uniform(count),
        0.2 * torch.randn(count, 16, 3, generator=generator),
        torch.eye(4)[None],
        torch.tensor([[[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]]]),
    )
    return Scene._make(x.to(device) for x in scene)


def render(scene: Scene, size: int) -> Tensor:
    """The image."""
    means, quats, scales, opacities, sh, viewmat, K = scene
    image = rasterize(
        means, quats, scales, opacities, sh, viewmat, K, size, size, sh_degree=3
    ).image
    assert image is not None
    return image


def step(scene: Scene, size: int, upstream: Tensor) -> tuple[Tensor, ...]:
    """The image's gradients."""
    leaves = [x.detach().requires_grad_() for x in scene[:5]]
    image = render(Scene._make((*leaves, scene.viewmat, scene.K)), size)
    return torch.autograd.grad(image, leaves, upstream)


def _body(op: Any) -> Callable[..., Any]:
    body: Callable[..., Any] = op._init_fn
    return body


def reference(scene: Scene, size: int) -> Tensor:
    """The image, by the operators' tensor formulations."""
    means, quats, scales, opacities, sh, viewmat, K = scene
    radii, means2d, depths, conics, _, _ = _body(_splat_project.splat_project)(
        *(means, quats, scales, opacities[None], None, viewmat, K, size, size),
        *(0, 0, 0.3, 0.01, 1e10, 0.0, ALPHA_MIN, False, False),
    )
    colours = (_body(splat_sh)(3, means, sh) + 0.5).relu()[None]
    grid = (size, size, TILE, 0, 1.0, ALPHA_MIN)
    shown = (means2d, conics, opacities[None])
    lists = _body(_splat_raster.splat_intersect)(
        means2d, radii, depths, conics, opacities[None], None, *grid, False
    )
    out = _body(_splat_raster.splat_raster)(
        *shown, colours, None, None, None, *lists, *grid, ALPHA_MAX, T_STOP, False
    )
    image: Tensor = out[0]
    return image


def _product(device: torch.device) -> Callable[[], Tensor]:
    matrix = torch.ones(2048, 2048, device=device)
    return lambda: matrix @ matrix


def rendering(
    device: torch.device, count: int, size: int, peers: tuple[str, ...]
) -> Mapping[str, Callable[[], Any]]:
    """A forward pass and its peers."""
    scene = make_scene(count, size, device)
    calls: dict[str, Callable[[], Any]] = {
        OURS: partial(render, scene, size),
        "reference": partial(reference, scene, size),
        "product": _product(device),
    }
    return {name: call for name, call in calls.items() if name in (OURS, *peers)}


def training(device: torch.device, count: int, size: int) -> Mapping[str, Callable[[], Any]]:
    """A pass forward and back, a product, and the pass forward."""
    scene = make_scene(count, size, device)
    upstream = torch.randn(1, size, size, 3, generator=torch.Generator().manual_seed(1)).to(device)
    return {
        OURS: partial(step, scene, size, upstream),
        "product": _product(device),
        "forward": partial(render, scene, size),
    }


def compositing(device: torch.device, count: int, size: int) -> Mapping[str, Callable[[], Any]]:
    """`splat_raster` of a scene, and of a wall of splats with as many pairs."""
    scene = make_scene(count, size, device)
    means, quats, scales, opacities, _, viewmat, K = scene
    radii, means2d, depths, conics, _, _ = _splat_project.splat_project(
        *(means, quats, scales, opacities[None], None, viewmat, K, size, size),
        *(0, 0, 0.3, 0.01, 1e10, 0.0, ALPHA_MIN, False, False),
    )
    grid = (size, size, TILE, 0, 1.0, ALPHA_MIN)
    shapes = (means2d, conics, opacities[None])
    lists = _splat_raster.splat_intersect(
        means2d, radii, depths, conics, opacities[None], None, *grid, False
    )
    colours = torch.ones(1, count, 3, device=device)
    composite: Callable[..., Any] = _splat_raster.splat_raster
    inputs = (*shapes, colours, None, None, None, *lists, *grid, ALPHA_MAX, T_STOP, False)
    ours = partial(composite, *inputs)
    tiles = max(1, round(_pairs(*shapes, lists, size, ours()[2]) / (DEEP * TILE**2)))
    centres = torch.tensor([tiles * TILE / 2, TILE / 2], device=device).repeat(1, DEEP, 1)
    flat = torch.tensor([1e-9, 0, 1e-9], device=device).repeat(1, DEEP, 1)
    thin = torch.full((1, DEEP), 0.01, device=device)
    ids = torch.arange(DEEP, dtype=torch.int32, device=device).repeat(tiles)
    offsets = torch.arange(tiles + 1, device=device) * DEEP
    wall = (centres, flat, thin, colours[:, :DEEP], None, None, None, offsets, ids)
    options = (tiles * TILE, TILE, TILE, 0, 1.0, ALPHA_MIN, ALPHA_MAX, 0.0, False)
    dense = partial(composite, *wall, *options)
    return {OURS: ours, "dense": dense}


def _pairs(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    lists: tuple[Tensor, Tensor],
    size: int,
    last: Tensor,
) -> int:
    """How many pairs of a pixel and a splat were blended."""
    offsets, ids = lists[0].tolist(), lists[1].long()
    across, found = -(-size // TILE), 0
    for tile, (begin, end) in enumerate(pairwise(offsets)):
        y, x = (TILE * i for i in divmod(tile, across))
        ends = last[0, y : y + TILE, x : x + TILE]
        rows = torch.arange(ends.shape[0], device=ids.device) + y + 0.5
        columns = torch.arange(ends.shape[1], device=ids.device) + x + 0.5
        n = ids[begin:end]
        dx = means2d[0, n, 0, None, None] - columns
        dy = means2d[0, n, 1, None, None] - rows[:, None]
        a, b, c = conics[0, n, :, None, None].unbind(1)
        alpha = opacities[0, n, None, None] * torch.exp(
            -(a * dx * dx + 2 * b * dx * dy + c * dy * dy) / 2
        )
        place = torch.arange(len(n), device=ids.device)[:, None, None]
        found += int(((alpha >= ALPHA_MIN) & (place < ends)).sum())
    return found


def _cases() -> list[Case]:
    cases = []
    for count, size, peers, bar, against in (
        (2_000, 64, ("reference", "product"), None, None),
        (10_000, 256, ("reference", "product"), 50.0, "reference"),
        (100_000, 800, ("product",), 1 / 1.5, "product"),
    ):
        name = f"{count:,} splats, {size} x {size}"
        pairs, pixels = 250.0 * count, float(size * size)
        moved = 4.0 * (count * 59 + pixels * 6)
        make = partial(rendering, count=count, size=size, peers=peers)
        cases.append(Case(f"forward {name}", make, 30 * pairs, moved, pixels, bar, against))
        make = partial(training, count=count, size=size)
        least = 1 / 6 if size == 800 else None
        cases.append(
            Case(f"training {name}", make, 80 * pairs, 3 * moved, pixels, least, "product")
        )
    for count, size in ((10_000, 256), (100_000, 800)):
        name = f"compositing {count:,} splats, {size} x {size}"
        make = partial(compositing, count=count, size=size)
        work, moved = 7500.0 * count, 4.0 * (count * 9 + size * size * 6)
        cases.append(Case(name, make, work, moved, float(size * size), 0.2, "dense"))
    return cases


BENCH = Bench("rasterize", _cases())
