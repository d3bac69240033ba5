"""Images of splats: projection, colours by direction, and compositing of any number of channels."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from torchzoo.ops._splat_checks import check_splats, check_types, common_dtype, expect, per_camera
from torchzoo.ops._splat_kernels import ANALYTIC, KERNELS, Kernel
from torchzoo.ops._splat_project import CAMERAS, CameraModel, project
from torchzoo.ops._splat_raster import Compositing, splat_intersect, splat_raster
from torchzoo.ops.calling import below_autograd
from torchzoo.ops.project_gaussians import ALPHA_MIN
from torchzoo.ops.spherical_harmonics import check_coefficients, spherical_harmonics, view_colors

RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]
BLUR = 0.3
INRIA_NEAR = 0.2


class RasterOutput(NamedTuple):
    """A rendering of C cameras.

    Attributes:
        image: The features' channels over the background, `(C, H, W, F)`; None without "RGB".
        alpha: How much is covered, `(C, H, W)`.
        depth: Depths weighted like colours, `(C, H, W)`; with "ED" divided by alpha; None for
            "RGB".
        info: `radii (C, N, 2)`, `means2d (C, N, 2)`, which keeps its gradient, `n_isects`, how many
            pairs of a splat and a tile there were, `last_ids (C, H, W)`, how far down the tile's
            list a pixel looked, `median_depth (C, H, W)`, at which less than half of the light is
            left, 0 where that is nowhere, and, with "RGB", `colors`, the channels of each splat as
            they are blended, `(C, N, F)`, or `(N, F)` where the features are so.
    """

    image: Tensor | None
    alpha: Tensor
    depth: Tensor | None
    info: dict[str, Tensor]


def sh_to_rgb(values: Tensor) -> Tensor:
    """The colour of a sum of spherical harmonics: 0.5 more, and not below 0.

    Example:
        >>> sh_to_rgb(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.0000, 0.5000, 1.5000])
    """
    return torch.relu(values + 0.5)


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    features: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    kernel: Kernel = "gaussian",
    beta: Tensor | None = None,
    backgrounds: Tensor | None = None,
    sh_degree: int | None = None,
    render_mode: RenderMode = "RGB",
    absgrad: bool = False,
    tile_size: int = 16,
    pixel_mask: Tensor | None = None,
    dilation: int = 1,
    offset: tuple[int, int] = (0, 0),
    eps2d: float | None = None,
    near: float = 0.01,
    far: float = 1e10,
    radius_clip: float = 0.0,
    antialiased: bool = False,
    preset: Literal["gsplat", "inria"] = "gsplat",
    alpha_min: float = ALPHA_MIN,
    alpha_max: float = 0.99,
    t_stop: float = 1e-4,
    deterministic: bool | None = None,
    camera_model: CameraModel = "pinhole",
) -> RasterOutput:
    """Render splats, nearest first, for each camera.

    Differentiable once, in `means`, `quats`, `scales`, `opacities`, `features`, `beta`,
    `backgrounds` and `viewmats`, not in `Ks`. Splats that can't be seen, those with a number that
    is not finite among them, count for nothing and get gradients of zero.

    Args:
        means: Centres in the world.
        quats: Rotations wxyz, of any length but zero.
        scales: Standard deviations along the axes, not their logarithms.
        opacities: From 0 to 1, not their logits.
        features: Channels to render; with `sh_degree`, coefficients of spherical harmonics.
        viewmats: World to camera: x right, y down, z forward.
        Ks: Intrinsics in pixels; without skew.
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        kernel: How a splat fades with the distance q from its centre: `exp(-q / 2)`,
            `exp(-q^(beta/2) / 2)`, or the integral of the first over a pixel.
        beta: Exponents of the generalised exponential kernel, above 0.
        backgrounds: Colour behind all; default 0.
        sh_degree: Highest degree of the harmonics to use, 0 to 3. Colours are seen along the ray
            from the camera to the mean, by an orthographic camera along its axis.
        render_mode: "RGB", any number of channels, and how to render depths: "D" accumulated, "ED"
            expected.
        absgrad: Set the sum of absolute gradients over the pixels as `info["means2d"].absgrad` in
            the backward pass; not in a compiled one.
        tile_size: Side of the squares of pixels that share a list of splats.
        pixel_mask: Pixels to render; the others show the background.
        dilation: Render every so many pixels of each row and column.
        offset: The first column and the first row to render, below `dilation`.
        eps2d: Square pixels, added to the variances on the image; default 0.3. The analytic kernel
            adds none.
        near: Least depth.
        far: Largest depth.
        radius_clip: Splats with a box of no larger half-sides are left out.
        antialiased: Make up for the blur by a lower opacity.
        preset: "inria" is for scenes trained with the first implementation: `near` is 0.2, there is
            no `far`, splats end at 3 sigma rounded up to tiles, and one that brings the
            transmittance to `t_stop` exactly still counts.
        alpha_min: Less opacity at a pixel counts as none; at 0 every splat reaches every pixel.
        alpha_max: Largest opacity at a pixel.
        t_stop: A pixel ends before the splat that would bring its transmittance to this.
        deterministic: Sum gradients in a fixed order on a GPU; default, whether torch is asked for
            that everywhere. On a CPU it is always so.
        camera_model: Of the orthographic one, focal lengths are pixels per unit of length; the
            fisheye is equidistant.

    Shape:
        - means: `(N, 3)`
        - quats: `(N, 4)`
        - scales: `(N, 3)`
        - opacities: `(N,)` or `(C, N)`
        - features: `(N, F)` or `(C, N, F)`; with `sh_degree`, `(N, K, 3)` or `(C, N, K, 3)`
        - viewmats: `(C, 4, 4)`
        - Ks: `(C, 3, 3)`
        - beta: `(N,)`
        - backgrounds: `(F,)` or `(C, F)`
        - pixel_mask: `(C, H, W)`, booleans
        - outputs: see `RasterOutput`; H is `ceil((height - offset[1]) / dilation)`, W likewise

    Returns:
        Image, alpha, depth and what strategies and metrics need.

    Raises:
        ValueError: Shapes, dtypes, devices or options that don't fit.
        NotImplementedError: An input has a forward-mode tangent.

    Source:
        Kerbl, Kopanas, Leimkühler, Drettakis, 3D Gaussian Splatting for Real-Time Radiance Field
        Rendering, 2023, equations 2 to 6.

    Example:
        >>> K = torch.tensor([[[100.0, 0.0, 8.0], [0.0, 100.0, 8.0], [0.0, 0.0, 1.0]]])
        >>> out = rasterize(
        ...     torch.tensor([[0.005, 0.005, 1.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        ...     torch.full((1, 3), 0.02), torch.tensor([0.8]), torch.tensor([[1.0, 0.5]]),
        ...     torch.eye(4)[None], K, 16, 16,
        ... )
        >>> out.image.shape, out.image[0, 8, 8]
        (torch.Size([1, 16, 16, 2]), tensor([0.8000, 0.4000]))
    """
    check_splats(
        "rasterize",
        means,
        quats,
        scales,
        viewmats,
        Ks,
        opacities,
        beta,
        kernel,
        camera_model,
        width,
        height,
    )
    C, N = viewmats.shape[0], means.shape[0]
    _check_features(features, sh_degree, C, N)
    _check_grid(tile_size, dilation, offset, width, height)
    if render_mode not in get_args(RenderMode):
        raise ValueError(f"render_mode: got {render_mode!r}, expected {RenderMode}")
    if preset not in ("gsplat", "inria"):
        raise ValueError(f"preset: got {preset!r}, expected 'gsplat' or 'inria'")
    if kernel == "analytic" and eps2d is not None:
        warnings.warn("eps2d: the analytic kernel has no blur, it is ignored", stacklevel=2)
    check_types("rasterize", {"means": means, "features": features, "backgrounds": backgrounds})
    across, down = -(-(width - offset[0]) // dilation), -(-(height - offset[1]) // dilation)
    channels = 3 if sh_degree is not None else features.shape[-1]
    if backgrounds is not None and tuple(backgrounds.shape) != (channels,):
        words = f"(F,) or (C, F) with C={C}, F={channels}"
        expect("backgrounds", backgrounds, (C, channels), words)
    if pixel_mask is not None:
        expect("pixel_mask", pixel_mask, (C, down, across), f"{(C, down, across)}, booleans")
        if pixel_mask.dtype != torch.bool or pixel_mask.device != means.device:
            found = f"{pixel_mask.dtype} on {pixel_mask.device}"
            raise ValueError(f"pixel_mask: got {found}, expected torch.bool on {means.device}")

    inputs = (means, quats, scales, opacities, features, viewmats, Ks, beta, backgrounds)
    dtype = common_dtype(*inputs)
    means, quats, scales, viewmats, Ks = (
        x.to(dtype).contiguous() for x in (means, quats, scales, viewmats, Ks)
    )
    beta = None if beta is None else beta.to(dtype).contiguous()
    opacities = per_camera(opacities.to(dtype), C, 1).contiguous()
    code, inria = KERNELS[kernel], preset == "inria"
    radii, means2d, depths, conics, covs2d, compensations = project(
        means,
        quats,
        scales,
        opacities.detach(),
        None if beta is None else beta.detach(),
        viewmats,
        Ks,
        width,
        height,
        code,
        CAMERAS[camera_model],
        0.0 if code == ANALYTIC else BLUR if eps2d is None else eps2d,
        INRIA_NEAR if inria else near,
        float("inf") if inria else far,
        radius_clip,
        alpha_min,
        antialiased,
        inria,
    )
    if antialiased:
        opacities = opacities * compensations
    if means2d.requires_grad and not torch.compiler.is_compiling():
        means2d.retain_grad()
    painted = features.to(dtype)
    if sh_degree is not None and render_mode not in ("D", "ED"):
        painted = _view(sh_degree, means, viewmats, radii, painted, camera_model)
    colors = painted
    painted, behind = _channels(painted, depths, backgrounds, render_mode)
    image, alpha, last, median_depth, n_isects = _composite(
        (means2d, covs2d if code == ANALYTIC else conics, opacities, painted, beta, behind),
        radii,
        depths,
        pixel_mask,
        means2d if absgrad and means2d.requires_grad else None,
        torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        (dilation, offset),
        (across, down, tile_size),
        (code, 1 / dilation, alpha_min, alpha_max),
        (t_stop, inria),
    )
    info = {
        "radii": radii,
        "means2d": means2d,
        "n_isects": n_isects,
        "last_ids": last,
        "median_depth": median_depth,
    }
    if render_mode not in ("D", "ED"):
        info["colors"] = colors
    depth = None if render_mode == "RGB" else image[..., -1]
    if depth is not None and render_mode.endswith("ED"):
        depth = depth / alpha.clamp(min=1e-10)
    if render_mode in ("D", "ED"):
        return RasterOutput(None, alpha, depth, info)
    shown = image if depth is None else image[..., :channels]
    return RasterOutput(shown, alpha, depth, info)


def _check_features(features: Tensor, sh_degree: int | None, C: int, N: int) -> None:
    tail = 1 if sh_degree is None else 2
    if sh_degree is not None:
        if not 0 <= sh_degree <= 3:
            raise ValueError(f"sh_degree: got {sh_degree}, expected 0 to 3")
        check_coefficients("features", features, sh_degree)
    lead = tuple(features.shape[:-tail])
    if lead not in ((N,), (C, N)) or features.shape[-1] < 1:
        rest = "F" if sh_degree is None else "K, 3"
        words = f"(N, {rest}) or (C, N, {rest}) with N={N}, C={C}"
        raise ValueError(f"features: got {tuple(features.shape)}, expected {words}")


def _check_grid(
    tile_size: int, dilation: int, offset: tuple[int, int], width: int, height: int
) -> None:
    if not 1 <= tile_size <= 64:
        raise ValueError(f"tile_size: got {tile_size}, expected 1 to 64")
    if not 1 <= dilation <= min(width, height):
        raise ValueError(f"dilation: got {dilation}, expected 1 to {min(width, height)}")
    if len(offset) != 2 or not all(0 <= o < dilation for o in offset):
        raise ValueError(f"offset: got {offset}, expected two from 0 to {dilation - 1}")


def _view(
    sh_degree: int,
    means: Tensor,
    viewmats: Tensor,
    radii: Tensor,
    coeffs: Tensor,
    camera_model: CameraModel,
) -> Tensor:
    """`(C, N, 3)`: the colours that the cameras see the splats in."""
    if camera_model != "orthographic":
        return view_colors(sh_degree, means, viewmats, radii, coeffs)
    seen = (radii > 0).all(-1, keepdim=True)
    directions = torch.where(seen, viewmats[:, 2:3, :3], 0)
    return sh_to_rgb(spherical_harmonics(sh_degree, directions, coeffs))


def _channels(
    features: Tensor, depths: Tensor, backgrounds: Tensor | None, render_mode: RenderMode
) -> tuple[Tensor, Tensor | None]:
    """All that is composited, `(C or 1, N, F)`, and what is behind it, `(C, F)`."""
    C = depths.shape[0]
    if render_mode in ("D", "ED"):
        return depths[..., None].contiguous(), None
    if features.ndim == 2:
        features = features[None]
    if backgrounds is not None:
        backgrounds = per_camera(backgrounds.to(features.dtype), C, 1)
    if render_mode == "RGB":
        return (
            features.contiguous(),
            backgrounds if backgrounds is None else backgrounds.contiguous(),
        )
    features = torch.cat((features.expand(C, -1, -1), depths[..., None]), -1)
    if backgrounds is not None:
        backgrounds = torch.nn.functional.pad(backgrounds, (0, 1))
    return features, backgrounds


def _composite(
    splats: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    radii: Tensor,
    depths: Tensor,
    pixel_mask: Tensor | None,
    tracked: Tensor | None,
    deterministic: bool,
    grid: tuple[int, tuple[int, int]],
    size: tuple[int, int, int],
    options: tuple[int, float, float, float],
    stop: tuple[float, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image, alpha, last places, median depths, and how many pairs there were."""
    means2d, shape2d, opacities, features, beta, backgrounds = splats
    dilation, offset = grid
    if dilation > 1:  # onto the grid of the pixels to render
        means2d = (means2d - means2d.new_tensor(offset) - 0.5) / dilation + 0.5
        radii = (radii + (dilation - 1)) // dilation
        factor = dilation**2
        shape2d = shape2d / factor if options[0] == ANALYTIC else shape2d * factor
    kernel, pixel, alpha_min, _ = options
    depths = depths.detach()
    tile_offsets, ids = splat_intersect(
        means2d.detach(),
        radii,
        depths,
        shape2d.detach(),
        opacities.detach(),
        None if beta is None else beta.detach(),
        *size,
        kernel,
        pixel,
        alpha_min,
        stop[1],
    )
    inputs = (means2d, shape2d, opacities, features, beta, backgrounds)
    lists = (depths, pixel_mask, tile_offsets, ids)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        found = Compositing.apply(
            *inputs, tracked, *lists, dilation, deterministic, size, options, stop
        )
    else:
        with below_autograd():
            image, alpha, _, *places = splat_raster(*inputs, *lists, *size, *options, *stop)
        found = (image, alpha, *places)
    return *found, tile_offsets[-1]
