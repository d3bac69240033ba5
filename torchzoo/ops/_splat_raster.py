"""Compositing of splats: the raw operators `splat_intersect`, `splat_raster` and its backward.

The image is cut into square tiles, and each gets the list of the splats that can be seen in it,
nearest first. A pixel then takes from its tile's list, with `T = 1` at first,

    alpha = min(alpha_max, o w),   T' = T (1 - alpha),   out += f alpha T,   T = T',

where alpha is at least `alpha_min`, and up to the splat that would make `T' <= t_stop`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchzoo.ops._splat_kernels import ANALYTIC, GROWN, conic_of, support, weights
from torchzoo.ops.calling import below_autograd, no_autocast

PIECE = 2**18
"""How many pairs of a splat and a pixel are held at a time."""
ROUNDING = 1e-6
"""Of the terms of q: a splat that misses a tile by less than their rounding is still listed."""


def _tiles(width: int, height: int, size: int) -> tuple[int, int]:
    """How many there are along x and along y."""
    return -(-width // size), -(-height // size)


def _least_q(conic: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Least q in rectangles that reach from `low` to `high (..., 2)`, seen from the mean."""
    a, b, c = conic.unbind(-1)
    (x0, y0), (x1, y1) = low.unbind(-1), high.unbind(-1)
    inside = (low <= 0).all(-1) & (high >= 0).all(-1)
    candidates = []
    for x in (x0, x1):  # the best point of each upright side, then of each level one
        candidates.append((x, torch.clamp(-b * x / c, y0, y1)))
    for y in (y0, y1):
        candidates.append((torch.clamp(-b * y / a, x0, x1), y))
    q = torch.stack(
        [(1 - ROUNDING) * (a * x * x + c * y * y) + 2 * b * x * y for x, y in candidates]
    )
    return torch.where(inside, 0, q.amin(0))


@torch.library.custom_op("torchzoo::splat_intersect", mutates_args=())
def splat_intersect(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    shape2d: Tensor,
    opacities: Tensor,
    beta: Tensor | None,
    width: int,
    height: int,
    tile_size: int,
    kernel: int,
    pixel: float,
    alpha_min: float,
    inria: bool,
) -> tuple[Tensor, Tensor]:
    tiles = means2d.new_tensor(_tiles(width, height, tile_size), dtype=torch.int64)
    c, n = (radii > 0).all(-1).nonzero().unbind(1)
    order = depths[c, n].sort(stable=True).indices
    c, n = c[order], n[order]
    mean, radius = means2d[c, n], radii[c, n]
    low = ((mean - radius) / tile_size).floor().clamp(min=0).to(torch.int64)
    high = ((mean + radius) / tile_size).ceil().clamp(max=tiles).to(torch.int64)
    sides = (high - low).clamp(min=0)
    counts = sides.prod(-1)
    pair = torch.arange(len(n), device=n.device).repeat_interleave(counts)
    rank = torch.arange(len(pair), device=n.device) - (counts.cumsum(0) - counts)[pair]
    across = sides[pair, 0]
    at = low[pair] + torch.stack((rank % across, rank // across), -1)
    c, n = c[pair], n[pair]
    if not inria:
        corner = at * tile_size + 0.5
        last = ((at + 1) * tile_size).clamp(max=tiles.new_tensor((width, height))) - 0.5
        grown = GROWN * pixel if kernel == ANALYTIC else 0.0
        conic = conic_of(kernel, shape2d[c, n])
        q = _least_q(conic, corner - mean[pair] - grown, last - mean[pair] + grown)
        reach = support(kernel, opacities, _at(beta, (1, -1)), alpha_min)[c, n]
        c, n, at = (x[~(q > reach)] for x in (c, n, at))
    tile = (c * tiles[1] + at[:, 1]) * tiles[0] + at[:, 0]
    tile, order = tile.sort(stable=True)
    every = torch.arange(int(means2d.shape[0] * tiles.prod()) + 1, device=tile.device)
    return torch.searchsorted(tile, every), n[order].to(torch.int32)


def _at(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if x is None else x.reshape(shape)


@splat_intersect.register_fake
def _(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    shape2d: Tensor,
    opacities: Tensor,
    beta: Tensor | None,
    width: int,
    height: int,
    tile_size: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    across, down = _tiles(width, height, tile_size)
    offsets = means2d.new_empty(means2d.shape[0] * across * down + 1, dtype=torch.int64)
    found = torch.library.get_ctx().new_dynamic_size()
    return offsets, means2d.new_empty(found, dtype=torch.int32)


class _Piece(NamedTuple):
    """Pixels of one tile, with the splats of its list that they have to look at."""

    camera: int
    rows: Tensor
    columns: Tensor
    splats: Tensor
    offset: Tensor


def _pieces(
    means2d: Tensor, tile_offsets: Tensor, ids: Tensor, width: int, height: int, tile_size: int
) -> Iterator[_Piece]:
    """All pixels that have a splat in their tile's list, some at a time; offsets `(L, P, 2)`."""
    across, down = _tiles(width, height, tile_size)
    bounds = tile_offsets.tolist()
    for tile, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        camera, place = divmod(tile, across * down)
        y, x = (tile_size * i for i in divmod(place, across))
        pixels = torch.cartesian_prod(
            torch.arange(y, min(y + tile_size, height), device=ids.device),
            torch.arange(x, min(x + tile_size, width), device=ids.device),
        ).reshape(-1, 2)
        splats = ids[begin:end].to(torch.int64)
        mean = means2d[camera, splats][:, None]
        for some in pixels.split(max(1, PIECE // len(splats))):
            rows, columns = some.unbind(1)
            centre = torch.stack((columns, rows), -1).to(mean.dtype) + 0.5
            yield _Piece(camera, rows, columns, splats, mean - centre)


class _Options(NamedTuple):
    kernel: int
    pixel: float
    alpha_min: float
    alpha_max: float


def _alphas(
    d: Tensor, shape: Tensor, opacity: Tensor, beta: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor]:
    """`(L, P)`, 0 below the cut-off, and which are not; d is `(L, P, 2)`, others begin with L."""
    exponent = None if beta is None else beta[:, None]
    w = weights(options.kernel, d, shape[:, None], exponent, options.pixel)
    alpha = (opacity[:, None] * w).clamp(max=options.alpha_max)
    counts = alpha >= options.alpha_min
    return torch.where(counts, alpha, 0), counts


def _before(alpha: Tensor) -> Tensor:
    """Transmittances in front of each splat of the lists, and behind all: `(L + 1, P)`."""
    return torch.cat((torch.ones_like(alpha[:1]), (1 - alpha).cumprod(0)))


@torch.library.custom_op("torchzoo::splat_raster", mutates_args=())
def splat_raster(
    means2d: Tensor,
    shape2d: Tensor,
    opacities: Tensor,
    features: Tensor,
    beta: Tensor | None,
    backgrounds: Tensor | None,
    depths: Tensor,
    pixel_mask: Tensor | None,
    tile_offsets: Tensor,
    ids: Tensor,
    width: int,
    height: int,
    tile_size: int,
    kernel: int,
    pixel: float,
    alpha_min: float,
    alpha_max: float,
    t_stop: float,
    inria: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grid = (means2d.shape[0], height, width)
    image = features.new_zeros(*grid, features.shape[2])
    final_t = means2d.new_ones(grid)
    last = torch.zeros(grid, dtype=torch.int32, device=ids.device)
    median_depth = torch.zeros_like(final_t)
    options = _Options(kernel, pixel, alpha_min, alpha_max)
    features = features.expand(grid[0], -1, -1)
    with no_autocast(means2d):
        for piece in _pieces(means2d, tile_offsets, ids, width, height, tile_size):
            c, n, at = piece.camera, piece.splats, (piece.camera, piece.rows, piece.columns)
            exponent = None if beta is None else beta[n]
            shape, opacity = shape2d[c, n], opacities[c, n]
            alpha, counts = _alphas(piece.offset, shape, opacity, exponent, options)
            after = _before(alpha)[1:]  # it never rises, so that all behind a stop are stopped
            blended = counts & ((after >= t_stop) if inria else (after > t_stop))
            if pixel_mask is not None:
                blended &= pixel_mask[at]
            alpha = torch.where(blended, alpha, 0)
            t = _before(alpha)
            image[at] = (alpha * t[:-1]).T @ features[c, n]
            final_t[at] = t[-1]
            place = torch.arange(1, len(n) + 1, device=n.device)[:, None]
            last[at] = (place * blended).amax(0).to(torch.int32)
            half = blended & (t[1:] < 0.5)
            crossed = depths[c, n[half.int().argmax(0)]]
            median_depth[at] = torch.where(half.any(0), crossed, 0)
    if backgrounds is not None:
        image += final_t[..., None] * backgrounds[:, None, None]
    return image, 1 - final_t, final_t, last, median_depth


@splat_raster.register_fake
def _(
    means2d: Tensor,
    shape2d: Tensor,
    opacities: Tensor,
    features: Tensor,
    beta: Tensor | None,
    backgrounds: Tensor | None,
    depths: Tensor,
    pixel_mask: Tensor | None,
    tile_offsets: Tensor,
    ids: Tensor,
    width: int,
    height: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grid = (means2d.shape[0], height, width)
    return (
        features.new_empty(*grid, features.shape[2]),
        means2d.new_empty(grid),
        means2d.new_empty(grid),
        means2d.new_empty(grid, dtype=torch.int32),
        means2d.new_empty(grid),
    )


@torch.library.custom_op("torchzoo::splat_raster_backward", mutates_args=())
def splat_raster_backward(
    means2d: Tensor,
    shape2d: Tensor,
    opacities: Tensor,
    features: Tensor,
    beta: Tensor | None,
    backgrounds: Tensor | None,
    tile_offsets: Tensor,
    ids: Tensor,
    width: int,
    height: int,
    tile_size: int,
    kernel: int,
    pixel: float,
    alpha_min: float,
    alpha_max: float,
    final_t: Tensor,
    last: Tensor,
    g_image: Tensor,
    g_alpha: Tensor | None,
    absgrad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = _Options(kernel, pixel, alpha_min, alpha_max)
    g_means, g_shape, g_opacities = map(torch.zeros_like, (means2d, shape2d, opacities))
    g_features = torch.zeros_like(features)
    g_beta = means2d.new_zeros(0) if beta is None else torch.zeros_like(beta)
    g_abs = torch.zeros_like(means2d) if absgrad else means2d.new_zeros(0)
    g_final_t = torch.zeros_like(final_t) if g_alpha is None else -g_alpha
    if backgrounds is not None:
        g_final_t = g_final_t + (g_image * backgrounds[:, None, None]).sum(-1)
    with no_autocast(means2d):
        for piece in _pieces(means2d, tile_offsets, ids, width, height, tile_size):
            c, n, at = piece.camera, piece.splats, (piece.camera, piece.rows, piece.columns)
            shared = min(c, features.shape[0] - 1)
            blended = torch.arange(len(n), device=n.device)[:, None] < last[at]

            def composite(
                d: Tensor, shape: Tensor, opacity: Tensor, f: Tensor, *exponent: Tensor
            ) -> tuple[Tensor, Tensor]:
                alpha, _ = _alphas(d, shape, opacity, exponent[0] if exponent else None, options)
                alpha = torch.where(blended, alpha, 0)  # noqa: B023
                t = _before(alpha)
                return (alpha * t[:-1]).T @ f, t[-1]

            exponent = () if beta is None else (beta[n],)
            inputs = (shape2d[c, n], opacities[c, n], features[shared, n], *exponent)
            pull = torch.func.vjp(composite, piece.offset, *inputs)[1]
            g_d, g_s, g_o, g_f, *g_b = pull((g_image[at], g_final_t[at]))
            g_means[c].index_add_(0, n, g_d.sum(1))
            g_shape[c].index_add_(0, n, g_s)
            g_opacities[c].index_add_(0, n, g_o)
            g_features[shared].index_add_(0, n, g_f)
            if g_b:
                g_beta.index_add_(0, n, g_b[0])
            if absgrad:
                g_abs[c].index_add_(0, n, g_d.abs().sum(1))
    return g_means, g_shape, g_opacities, g_features, g_beta, g_abs


@splat_raster_backward.register_fake
def _(
    means2d: Tensor,
    shape2d: Tensor,
    opacities: Tensor,
    features: Tensor,
    beta: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (means2d, shape2d, opacities, features)
    return (  # type: ignore[return-value]
        *(x.new_empty(x.shape) for x in inputs),
        means2d.new_empty(0) if beta is None else beta.new_empty(beta.shape),
        means2d.new_empty(means2d.shape if rest[-2] else 0),
    )


class Compositing(torch.autograd.Function):
    """`splat_raster` with gradients; `tracked` are the means that `absgrad` is set on, or None.

    `spacing` is how many pixels of `tracked` a pixel of the image is.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *splats, tracked, depths, pixel_mask, tile_offsets, ids = inputs[:11]
        ctx.spacing, ctx.deterministic, ctx.size, ctx.options, stop = inputs[11:]
        lists = (tile_offsets, ids)
        with below_autograd():
            image, alpha, final_t, last, median_depth = splat_raster(
                *splats, depths, pixel_mask, *lists, *ctx.size, *ctx.options, *stop
            )
        ctx.mark_non_differentiable(last, median_depth)
        ctx.set_materialize_grads(False)  # else these two would get some, of zeros
        ctx.channels = image.shape[-1]
        ctx.save_for_backward(*splats, tracked, *lists, final_t, last)
        return image, alpha, last, median_depth

    @staticmethod
    def backward(
        ctx: Any, g_image: Tensor | None, g_alpha: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        *inputs, backgrounds, tracked, tile_offsets, ids, final_t, last = ctx.saved_tensors
        if g_image is None:
            g_image = final_t.new_zeros(*final_t.shape, ctx.channels)
        above = (g_image.contiguous(), None if g_alpha is None else g_alpha.contiguous())
        with below_autograd(*inputs, backgrounds, *above):
            *slopes, g_beta, g_abs = splat_raster_backward(
                *(*inputs, backgrounds, tile_offsets, ids, *ctx.size, *ctx.options, final_t, last),
                *above,
                tracked is not None,
                ctx.deterministic,
            )
        if tracked is not None:
            tracked.absgrad = g_abs / ctx.spacing
        g_backgrounds = None
        if ctx.needs_input_grad[5]:
            g_backgrounds = (final_t[..., None] * g_image).sum((1, 2))
        return *slopes, g_beta if inputs[4] is not None else None, g_backgrounds, *(None,) * 10
