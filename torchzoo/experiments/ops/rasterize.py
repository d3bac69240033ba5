"""`rasterize` against its tensor formulation, a product, itself, and its inner loop at its best.

Splats fill the image: standard deviations of about 3 pixels, each pixel behind some 40 of them. A
"forward" is a whole rendering, colours by spherical harmonics of degree 3 included; "training"
renders and takes the gradients of all that a scene is made of, "steps" do so ten times in a row;
"compositing" is `splat_raster` alone. Each case has one peer:

- `reference`: the same operators as their tensor formulations;
- `product`: one float32 product of 2048 x 2048 matrices, as a yardstick for the machine;
- `forward`: a rendering that keeps what gradients need, beside the gradients alone;
- `one thread`: the same on one thread, beside all threads; in a row, as training goes, since a core
  that slept while one thread was measured has to wake up first, with nothing in its cache;
- `dense`: as many pairs of a pixel and a splat as were blended, but in tiles that their splats
  cover whole and with lists that stay in cache. This is how fast the machine evaluates pairs at
  the most, so that the ratio is the share of that peak that compositing reaches.
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
IN_A_ROW = 10  # steps, where threads are compared


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


def formulation(op: Any) -> Callable[..., Any]:
    """A custom operator's tensor formulation."""
    body: Callable[..., Any] = op._init_fn
    return body


def reference(scene: Scene, size: int) -> Tensor:
    """The image, by the operators' tensor formulations."""
    means, quats, scales, opacities, sh, viewmat, K = scene
    radii, means2d, depths, conics, _, _ = formulation(_splat_project.splat_project)(
        *(means, quats, scales, opacities[None], None, viewmat, K, size, size),
        *(0, 0, 0.3, 0.01, 1e10, 0.0, ALPHA_MIN, False, False),
    )
    colours = formulation(splat_sh)(3, means, sh, viewmat, radii)[None]
    grid = (size, size, TILE, 0, 1.0, ALPHA_MIN)
    shown = (means2d, conics, opacities[None])
    lists = formulation(_splat_raster.splat_intersect)(
        means2d, radii, depths, conics, opacities[None], None, *grid, False
    )
    out = formulation(_splat_raster.splat_raster)(
        *shown, colours, None, None, depths, None, *lists, *grid, ALPHA_MAX, T_STOP, False
    )
    image: Tensor = out[0]
    return image


def _upstream(size: int, device: torch.device) -> Tensor:
    return torch.randn(1, size, size, 3, generator=torch.Generator().manual_seed(1)).to(device)


def _product(device: torch.device) -> Callable[[], Tensor]:
    matrix = torch.ones(2048, 2048, device=device)
    return lambda: matrix @ matrix


def rendering(
    device: torch.device, count: int, size: int, peer: str
) -> Mapping[str, Callable[[], Any]]:
    """A pass forward, and its tensor formulation or a product."""
    scene = make_scene(count, size, device)
    other = partial(reference, scene, size) if peer == "reference" else _product(device)
    return {OURS: partial(render, scene, size), peer: other}


def training(
    device: torch.device, count: int, size: int, peer: str
) -> Mapping[str, Callable[[], Any]]:
    """A pass forward and back, and a product."""
    scene = make_scene(count, size, device)
    return {OURS: partial(step, scene, size, _upstream(size, device)), peer: _product(device)}


def steps(
    device: torch.device, count: int, size: int, peer: str
) -> Mapping[str, Callable[[], Any]]:
    """Passes forward and back in a row, and the same on one thread."""
    scene = make_scene(count, size, device)
    upstream = _upstream(size, device)

    def in_a_row() -> Any:
        return [step(scene, size, upstream) for _ in range(IN_A_ROW)][-1]

    def alone() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return in_a_row()
        finally:
            torch.set_num_threads(threads)

    return {OURS: in_a_row, peer: alone}


def backward(device: torch.device, count: int, size: int) -> Mapping[str, Callable[[], Any]]:
    """A pass back, and the pass forward."""
    scene = make_scene(count, size, device)
    leaves = [x.requires_grad_() for x in scene[:5]]
    forward = partial(render, scene, size)
    pull = partial(torch.autograd.grad, forward(), leaves, _upstream(size, device))
    return {OURS: partial(pull, retain_graph=True), "forward": forward}


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
    inputs = (*shapes, colours, None, None, depths, None, *lists, *grid)
    ours = partial(composite, *inputs, ALPHA_MAX, T_STOP, False)
    tiles = max(1, round(_pairs(*shapes, lists, size, ours()[3]) / (DEEP * TILE**2)))
    centres = torch.tensor([tiles * TILE / 2, TILE / 2], device=device).repeat(1, DEEP, 1)
    flat = torch.tensor([1e-9, 0, 1e-9], device=device).repeat(1, DEEP, 1)
    thin = torch.full((1, DEEP), 0.01, device=device)
    ids = torch.arange(DEEP, dtype=torch.int32, device=device).repeat(tiles)
    offsets = torch.arange(tiles + 1, device=device) * DEEP
    wall = (centres, flat, thin, colours[:, :DEEP], None, None, thin, None, offsets, ids)
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


def _case(
    what: str, peer: str, sizes: tuple[int, int], bar: float | None, rounds: int | None = None
) -> Case:
    count, size = sizes
    makers: dict[str, Callable[..., Mapping[str, Callable[[], Any]]]] = {
        "forward": partial(rendering, peer=peer),
        "training": partial(training, peer=peer),
        "steps": partial(steps, peer=peer),
        "backward": backward,
        "compositing": compositing,
    }
    row = IN_A_ROW
    each = {"forward": 30, "training": 80, "steps": 80 * row, "backward": 50, "compositing": 30}[
        what
    ]
    passes = {"forward": 1, "training": 3, "steps": 3 * row, "backward": 2, "compositing": 1}[what]
    numbers = 9 if what == "compositing" else 59  # of a splat
    return Case(
        f"{what} against {peer}, {count:,} splats, {size} x {size}",
        partial(makers[what], count=count, size=size),
        each * 250.0 * count,  # a splat is seen by some 250 pixels
        4.0 * passes * (numbers * count + 6 * size**2),
        float(size**2),
        bar,
        peer,
        rounds,
    )


SMALL, MEDIUM, LARGE = (2_000, 64), (10_000, 256), (100_000, 800)
BENCH = Bench(
    "rasterize",
    [
        _case("forward", "reference", SMALL, None),
        _case("forward", "reference", MEDIUM, 50.0),
        _case("forward", "reference", LARGE, 50.0, 3),
        _case("forward", "product", LARGE, 1 / 1.5),
        _case("training", "product", SMALL, None),
        _case("training", "product", LARGE, 1 / 6),
        _case("backward", "forward", MEDIUM, 1 / 3),
        _case("backward", "forward", LARGE, 1 / 3),
        _case("steps", "one thread", MEDIUM, 1.7),
        _case("steps", "one thread", LARGE, 1.7, 5),
        _case("compositing", "dense", MEDIUM, 0.2),
        _case("compositing", "dense", LARGE, 0.2),
    ],
)
