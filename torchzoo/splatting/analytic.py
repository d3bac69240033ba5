"""Splats shaded by their integral over a pixel, for pictures at any resolution.

Z. Liang, Q. Zhang, W. Hu, L. Zhu, Y. Feng and K. Jia, "Analytic-Splatting: Anti-Aliased 3D Gaussian
Splatting via Analytic Integration", 2024. With S close to the normal distribution function,

    S(x) = 1 / (1 + exp(-(1.6 x + 0.07 x^3))),
    I(x, s) = s (S((x + h/2) / s) - S((x - h/2) / s)),
    w = 2 pi I(u, s1) I(v, s2),

where s1 >= s2 are the deviations of the splat on the image, without any blur, u and v the pixel's
offset along its axes, and h the side of the pixel. The opacity at a pixel of side 1, in colour and
transmittance alike, is `o w`. A splat much larger than a pixel has `w = exp(-q / 2)`, as in plain
splatting; a much smaller one `w = 2 pi s1 s2`: it fades as it shrinks, which is the anti-aliasing.

As in the paper, the square that is integrated over is turned to the splat's axes. The largest
errors of w over offsets up to 1.5 pixels in each direction, and those of the value at the pixel's
centre in its place, are

    ======================  ========  ======
    deviations              integral  centre
    ======================  ========  ======
    (1, 1)                  0.0037    0.079
    (0.3, 0.3)              0.0004    0.54
    (1, 0.3) along an axis  0.0014    0.35
    (1, 0.3) slanted        0.018     0.33
    (2, 0.2) slanted        0.050     0.46
    (3, 2) slanted          0.0050    0.015
    ======================  ========  ======

So w jumps where a small splat becomes round and its axes turn, which above half a pixel can't be
seen. The 3-D filter is that of Z. Yu, A. Chen, B. Huang, T. Sattler and A. Geiger, "Mip-Splatting:
Alias-free 3D Gaussian Splatting", 2024.

Deviations from the paper: variances are at least 1e-6 square pixels, and a splat counts wherever
its opacity reaches the cut-off, not up to three deviations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import reduce
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.ops._splat_kernels import ANALYTIC, logistic_cdf, weights
from torchzoo.registry import Comparison, register
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.scene import GaussianScene, _example

if TYPE_CHECKING:
    from torchzoo.ops import RasterOutput

__all__ = [
    "AnalyticScene",
    "area_downsample",
    "gaussian_cdf_logistic",
    "mip_filter_3d",
    "multiscale_cameras",
    "pixel_integral",
]

SATURATED = 10.0
"""Where S is 0 or 1 in any floating-point type."""
NEAR, MARGIN = 0.01, 0.15
"""A camera sees what is in front of this depth, and this share of its image beyond each edge."""


def gaussian_cdf_logistic(x: Tensor) -> Tensor:
    """The normal distribution function to 4e-4, by a logistic function of a cubic.

    Args:
        x: Numbers of any size, infinite ones too.

    Shape:
        - x, output: `(...)`

    Returns:
        `1 / (1 + exp(-(1.6 x + 0.07 x^3)))`.

    Source:
        Liang et al., "Analytic-Splatting", 2024, the conditioned logistic function.

    Example:
        >>> gaussian_cdf_logistic(torch.tensor([-1.0, 0.0, 1.0, 1e4]))
        tensor([0.1584, 0.5000, 0.8416, 1.0000])
    """
    return logistic_cdf(x.clamp(-SATURATED, SATURATED))


def pixel_integral(cov2d: Tensor, offset: Tensor, *, window: float = 1.0) -> Tensor:
    """The integral of `exp(-q / 2)` over a square that is turned to the axes of the covariance.

    The square's centre is at `offset` from the Gaussian's. Differentiable in both; a round
    covariance, which has no axes, gets those of the image.

    Args:
        cov2d: Covariances in square pixels, entries xx, xy, yy.
        offset: From the mean to the pixel's centre.
        window: Side of the square in pixels.

    Shape:
        - cov2d: `(..., 3)`
        - offset: `(..., 2)`, whose leading dimensions broadcast with those of `cov2d`
        - output: `(...)`

    Returns:
        The integrals; divided by `window^2` they are the weights of the rasteriser's analytic
        kernel.

    Raises:
        ValueError: Shapes that don't fit, a variance or a window that is not positive.

    Source:
        Liang et al., "Analytic-Splatting", 2024, the window integral.

    Example:
        >>> round_splat = torch.tensor([0.01, 0.0, 0.01])
        >>> pixel_integral(round_splat, torch.zeros(2)) / (2 * math.pi * 0.01)
        tensor(1.0000)
    """
    for name, value, size in (("cov2d", cov2d, 3), ("offset", offset, 2)):
        if value.shape[-1:] != (size,):
            raise ValueError(f"{name}: got {tuple(value.shape)}, expected (..., {size})")
    if not window > 0:
        raise ValueError(f"window: got {window}, expected above 0")
    if not torch.compiler.is_compiling() and (cov2d[..., ::2] <= 0).any():
        raise ValueError("cov2d: got a variance that is not positive, expected xx > 0 and yy > 0")
    return window**2 * weights(ANALYTIC, offset, cov2d, None, window)


@torch.no_grad()
def mip_filter_3d(means: Tensor, cameras: Cameras, *, variance: float = 0.2) -> Tensor:
    """How far to smooth each Gaussian so that none is finer than what the cameras could tell.

    A pixel of a camera of focal length f covers `z / f` at depth z. The filter's deviation is
    `sqrt(variance)` times the least of that over the cameras that see the Gaussian's centre, in
    their image or up to 15 % of it beyond. What none sees gets the largest deviation of the others.

    Args:
        means: Centres in the world.
        cameras: Pinhole or orthographic cameras, at the size of the pictures to train on.
        variance: That of the filter in pixels of the nearest camera.

    Shape:
        - means: `(N, 3)`
        - output: `(N,)`

    Returns:
        Standard deviations in the world, without gradient; zeros where no camera sees anything.

    Raises:
        ValueError: `means` is not `(N, 3)`, the cameras are fisheyes, or a variance that is not
            positive.

    Source:
        Yu et al., "Mip-Splatting", 2024, the 3-D smoothing filter.

    Example:
        >>> cameras = Cameras.orbit(4, radius=4.0, width=64, height=64, fov=90.0)
        >>> mip_filter_3d(torch.zeros(1, 3), cameras) * 32 / 4  # focal length 32, depth 4
        tensor([0.4472])
    """
    if means.dim() != 2 or means.shape[1] != 3:
        raise ValueError(f"means: got {tuple(means.shape)}, expected (N, 3)")
    if cameras.camera_model == "fisheye":
        raise ValueError("cameras: got fisheyes, expected pinhole or orthographic ones")
    if not variance > 0:
        raise ValueError(f"variance: got {variance}, expected above 0")
    cameras = cameras.to(means.device, means.dtype)
    finest = means.new_full((len(means),), math.inf)
    for view, K in zip(cameras.viewmats, cameras.Ks, strict=True):
        x, y, z = (means @ view[:3, :3].T + view[:3, 3]).unbind(-1)
        depth = z if cameras.camera_model == "pinhole" else torch.ones_like(z)
        seen = z >= NEAR
        for axis, (along, size) in enumerate(((x, cameras.width), (y, cameras.height))):
            place = K[axis, axis] * along / depth + K[axis, 2]
            seen &= (place - size / 2).abs() <= (0.5 + MARGIN) * size
        pixel = depth / torch.maximum(K[0, 0], K[1, 1])
        finest = torch.where(seen, torch.minimum(finest, pixel), finest)
    known = finest.isfinite()
    largest = finest[known].max() if known.any() else finest.new_zeros(())
    return math.sqrt(variance) * torch.where(known, finest, largest)


def multiscale_cameras(cameras: Cameras, factors: Sequence[int] = (1, 2, 4, 8)) -> list[Cameras]:
    """The same views in smaller images.

    Args:
        cameras: Cameras at full size.
        factors: What width and height are divided by.

    Returns:
        Cameras for each factor; what they see is `area_downsample` of the full pictures.

    Raises:
        ValueError: A factor below 1, or one that doesn't divide width and height.

    Example:
        >>> cameras = Cameras.orbit(3, radius=4.0, width=64, height=32)
        >>> [(c.width, c.height) for c in multiscale_cameras(cameras, (1, 4))]
        [(64, 32), (16, 8)]
    """
    size = (cameras.height, cameras.width)
    for factor in factors:
        _check_divides("factors", factor, size)
    return [cameras.resized(cameras.width // f, cameras.height // f) for f in factors]


def area_downsample(images: Tensor, factor: int) -> Tensor:
    """Smaller pictures, each pixel the mean of those that it covers.

    Args:
        images: Pictures, channels last.
        factor: What their sides are divided by.

    Shape:
        - images: `(..., H, W, C)`
        - output: `(..., H / factor, W / factor, C)`

    Raises:
        ValueError: Pictures of fewer than three dimensions or not in floating point, a factor below
            1, or one that doesn't divide H and W.

    Example:
        >>> area_downsample(torch.arange(8.0).reshape(2, 4, 1), 2).flatten()
        tensor([2.5000, 4.5000])
    """
    if images.dim() < 3 or not images.is_floating_point():
        found = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"images: got {found}, expected floating point (..., H, W, C)")
    _check_divides("factor", factor, (images.shape[-3], images.shape[-2]))
    return reduce(images, "... (h a) (w b) c -> ... h w c", "mean", a=factor, b=factor)


def _check_divides(name: str, factor: int, size: tuple[int, int]) -> None:
    if factor < 1 or any(side % factor for side in size):
        raise ValueError(f"{name}: got {factor}, expected a divisor of height and width {size}")


@register(
    paper=17,
    example=_example,
    compare=lambda: Comparison(
        {"num_gaussians": 2000, "image_size": (96, 128)}, peers.one_view(), ("GaussianScene",)
    ),
)
class AnalyticScene(GaussianScene):
    """A scene whose pictures integrate each Gaussian over the pixels.

    All of `GaussianScene` holds, but that `render` and `forward` take the analytic kernel, so that
    a scene that was trained at one size or distance can be shown at others. Optionally Gaussians
    are smoothed in space, too, to what the training cameras could tell: variances `s^2 + f^2` along
    all axes with opacities that keep their mass. f are the `filter_scales`, which edits carry along
    and `update_filter_3d` sets; call it again every 100 steps or so while a scene is trained.

    Args:
        num_gaussians: N at first.
        sh_degree: Degree of the spherical harmonics of the colours, 0 to 3.
        num_features: Size F of the optional `features`.
        image_size: Height and width of the pictures that `forward` makes.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - viewmats: `(..., 4, 4)`
        - Ks: `(..., 3, 3)`
        - output: `(..., height, width, 3)`

    Attributes:
        filter_scales: `(N,)`, deviations of the 3-D filter, not learned; 0 at first.

    Returns:
        Pictures on black.

    Raises:
        ValueError: A size or degree out of its range, or inputs of the wrong shape.

    Source:
        Liang et al., "Analytic-Splatting: Anti-Aliased 3D Gaussian Splatting via Analytic
        Integration", 2024.

    Example:
        >>> scene = AnalyticScene.from_points(torch.randn(50, 3), torch.rand(50, 3))
        >>> cameras = Cameras.orbit(2, radius=4.0, width=32, height=24)
        >>> scene.update_filter_3d(cameras)
        >>> scene.render(cameras.resized(8, 6), filter_3d=True).image.shape
        torch.Size([2, 6, 8, 3])
    """

    filter_scales: nn.Parameter

    def __init__(
        self,
        num_gaussians: int,
        *,
        sh_degree: int = 3,
        num_features: int = 0,
        image_size: Sequence[int] = (64, 64),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_gaussians,
            sh_degree=sh_degree,
            num_features=num_features,
            image_size=image_size,
            device=device,
            dtype=dtype,
        )
        unfiltered = torch.zeros(num_gaussians, device=device, dtype=dtype)
        self.filter_scales = nn.Parameter(unfiltered, requires_grad=False)

    @torch.no_grad()
    def update_filter_3d(self, cameras: Cameras, *, variance: float = 0.2) -> None:
        """Set `filter_scales` for the cameras that the scene is trained on; see `mip_filter_3d`."""
        self.filter_scales.copy_(mip_filter_3d(self.means, cameras, variance=variance))

    def render(self, cameras: Cameras, *, filter_3d: bool = False, **options: Any) -> RasterOutput:
        """Pictures of the scene.

        Args:
            cameras: Where from.
            filter_3d: Whether Gaussians are smoothed by `filter_scales`.
            **options: Those of `GaussianScene.render`; `kernel` is `"analytic"` by default.

        Returns:
            What `rasterize` returns.
        """
        if filter_3d:
            smoothed = (self.scales.square() + self.filter_scales[:, None].square()).sqrt()
            kept = (self.scales / smoothed).prod(-1)
            options = {"scales": smoothed, "opacities": self.opacities * kept} | options
        return super().render(cameras, **{"kernel": "analytic"} | options)
