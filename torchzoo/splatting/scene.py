"""A scene of 3-D Gaussians: their parameters, the values these stand for, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import ops, peers
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register
from torchzoo.splatting import edits
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.rotations import quat_to_matrix

if TYPE_CHECKING:
    from torchzoo.ops import RasterOutput

__all__ = ["SH_C0", "GaussianScene"]

SH_C0 = 0.28209479177387814
"""The spherical harmonic of degree 0, 1 / (2 sqrt(pi)): a colour is 0.5 + SH_C0 * sh0."""

MAX_SH_DEGREE = 3


def _example() -> Example:
    angle = torch.tensor(0.3)
    turned = torch.eye(4)
    turned[0, 0] = turned[2, 2] = angle.cos()
    turned[0, 2], turned[2, 0] = angle.sin(), -angle.sin()
    viewmats = torch.stack([torch.eye(4), turned])
    viewmats[:, 2, 3] = 4
    K = torch.tensor([[16, 0, 6], [0, 16, 4], [0, 0, 1]])  # integers: no gradient reaches it
    return Example(
        kwargs={"num_gaussians": 10, "sh_degree": 1, "image_size": (8, 12)},
        inputs=(viewmats, K.expand(2, 3, 3)),
        bad_options={"num_gaussians": -1, "sh_degree": 4, "num_features": -1, "image_size": (0, 8)},
    )


@register(
    paper=None,
    example=_example,
    compare=lambda: Comparison(
        {"num_gaussians": 2000, "image_size": (96, 128)},
        peers.one_view(),
        ("AnalyticScene", "GeneralizedExponentialScene"),
    ),
)
class GaussianScene(ZooModel):
    """N coloured 3-D Gaussians, blended front to back into pictures.

    Every parameter has one row for each Gaussian; so must those that a subclass registers on the
    scene itself, as the edits (`keep`, `clone`, `split`, `append`, `relocate`) act on all of them.
    What has other shapes belongs into submodules. `load_state_dict` takes over the number of
    Gaussians of what it loads.

    Args:
        num_gaussians: N at first.
        sh_degree: Degree of the spherical harmonics of the colours, 0 to 3; `K = (degree + 1)^2`.
        num_features: Size F of the optional `features`.
        image_size: Height and width of the pictures that `forward` makes.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - viewmats: `(..., 4, 4)`
        - Ks: `(..., 3, 3)`
        - output: `(..., height, width, 3)`

    Attributes:
        means: `(N, 3)`.
        quats: `(N, 4)`, wxyz, of any length.
        log_scales: `(N, 3)`, natural logarithms of the standard deviations along the axes.
        opacity_logits: `(N,)`.
        sh0: `(N, 1, 3)`, the coefficients of degree 0; `sh` is both of them.
        shN: `(N, K - 1, 3)`, those of the other degrees.
        features: `(N, F)`, there if F is not 0.

    Returns:
        Pictures on black; `render` has the options.

    Raises:
        ValueError: A size or degree out of its range, or inputs of the wrong shape.

    Source:
        Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", 2023.

    Example:
        >>> scene = GaussianScene.from_points(torch.randn(50, 3), torch.rand(50, 3))
        >>> cameras = Cameras.orbit(2, radius=4.0, width=32, height=24)
        >>> scene.render(cameras).image.shape
        torch.Size([2, 24, 32, 3])
    """

    means: nn.Parameter
    quats: nn.Parameter
    log_scales: nn.Parameter
    opacity_logits: nn.Parameter
    sh0: nn.Parameter
    shN: nn.Parameter

    keep = edits.keep
    clone = edits.clone
    split = edits.split
    append = edits.append
    relocate = edits.relocate
    reset_opacities = edits.reset_opacities

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
        super().__init__()
        for name, value in (("num_gaussians", num_gaussians), ("num_features", num_features)):
            if value < 0:
                raise ValueError(f"{name}: got {value}, expected at least 0")
        if not 0 <= sh_degree <= MAX_SH_DEGREE:
            raise ValueError(f"sh_degree: got {sh_degree}, expected 0 to {MAX_SH_DEGREE}")
        if len(image_size) != 2 or min(image_size) < 1:
            raise ValueError(f"image_size: got {tuple(image_size)}, expected (height, width)")
        self.sh_degree, self.image_size = sh_degree, (image_size[0], image_size[1])
        shapes = {
            "means": (3,),
            "quats": (4,),
            "log_scales": (3,),
            "opacity_logits": (),
            "sh0": (1, 3),
            "shN": ((sh_degree + 1) ** 2 - 1, 3),
            "features": (num_features,),
        }
        for name, shape in shapes.items():
            if name != "features" or num_features:
                rows = torch.empty(num_gaussians, *shape, device=device, dtype=dtype)
                self.register_parameter(name, nn.Parameter(rows))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Grey balls of opacity 0.1, spread evenly over the cube from -1 to 1."""
        for parameter in self.parameters(recurse=False):
            parameter.zero_()
        self.means.uniform_(-1, 1)
        self.quats[:, 0] = 1
        self.log_scales.fill_(-math.log(max(self.num_gaussians, 1)) / 3)
        self.opacity_logits.fill_(math.log(0.1 / 0.9))

    @classmethod
    def from_tensors(
        cls,
        means: Tensor,
        quats: Tensor,
        log_scales: Tensor,
        opacity_logits: Tensor,
        sh: Tensor,
        *,
        features: Tensor | None = None,
        **options: Any,
    ) -> Self:
        """A scene with copies of these values; `sh` is `(N, K, 3)`, options the constructor's.

        Raises:
            ValueError: Shapes that don't fit each other.
        """
        count = len(means)
        degree = {(k + 1) ** 2: k for k in range(MAX_SH_DEGREE + 1)}
        if sh.dim() != 3 or sh.shape[1] not in degree:
            raise ValueError(f"sh: got {tuple(sh.shape)}, expected (N, K, 3) with K of 1, 4, 9, 16")
        values = {
            "means": means,
            "quats": quats,
            "log_scales": log_scales,
            "opacity_logits": opacity_logits,
            "sh0": sh[:, :1],
            "shN": sh[:, 1:],
        }
        options = {"device": means.device, "dtype": means.dtype, **options}
        if features is not None:
            values["features"] = features
            options["num_features"] = features.shape[-1]
        scene = cls(count, sh_degree=degree[sh.shape[1]], **options)
        for name, value in values.items():
            parameter = scene.get_parameter(name)
            if value.shape != parameter.shape:
                full = "sh" if name in ("sh0", "shN") else name
                got, expected = tuple(value.shape), tuple(parameter.shape)
                raise ValueError(f"{full}: got {got}, expected {expected} with N={count}")
            parameter.data.copy_(value)
        return scene

    @classmethod
    def from_points(
        cls,
        xyz: Tensor,
        rgb: Tensor,
        *,
        sh_degree: int = 3,
        init_opacity: float = 0.1,
        init_scale: float = 1.0,
        **options: Any,
    ) -> Self:
        """Balls at points, as large as the points are apart.

        A ball's scale is `init_scale` times the root mean square distance to the three nearest
        other points (1 for a lone point); distances below about 3e-4 count as that.

        Args:
            xyz: Points, `(N, 3)`.
            rgb: Their colours from 0 to 1, `(N, 3)`.
            sh_degree: Degree of the colours.
            init_opacity: Opacity of each, between 0 and 1.
            init_scale: Factor of the scales.
            **options: Those of the constructor.

        Returns:
            The scene.

        Raises:
            ValueError: Shapes that don't fit, or an option out of its range.
        """
        for name, value in (("xyz", xyz), ("rgb", rgb)):
            if value.dim() != 2 or value.shape[1] != 3 or len(value) != len(xyz):
                raise ValueError(f"{name}: got {tuple(value.shape)}, expected ({len(xyz)}, 3)")
        if not 0 < init_opacity < 1:
            raise ValueError(f"init_opacity: got {init_opacity}, expected between 0 and 1")
        if not init_scale > 0:
            raise ValueError(f"init_scale: got {init_scale}, expected above 0")
        count = len(xyz)
        sh = xyz.new_zeros(count, (sh_degree + 1) ** 2, 3)
        sh[:, 0] = (rgb - 0.5) / SH_C0
        scales = init_scale * _spacing(xyz)
        return cls.from_tensors(
            xyz,
            F.pad(xyz.new_ones(count, 1), (0, 3)),
            scales.log()[:, None].expand(count, 3),
            xyz.new_full((count,), init_opacity).logit(),
            sh,
            **options,
        )

    @classmethod
    def for_image(
        cls,
        height: int,
        width: int,
        num_gaussians: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Grey, flat Gaussians scattered over an image, to fit a picture with.

        `Cameras.for_image(height, width)` is the camera that sees them.
        """
        longer = max(height, width)
        place = torch.rand(num_gaussians, 3, generator=generator, device=device, dtype=dtype)
        means = (2 * place - 1) * place.new_tensor([width / longer, height / longer, 0.0])
        half_spacing = math.sqrt(width * height / max(num_gaussians, 1)) / longer
        scales = means.new_tensor([half_spacing, half_spacing, 1e-4])
        return cls.from_tensors(
            means,
            F.pad(means.new_ones(num_gaussians, 1), (0, 3)),
            scales.log().expand(num_gaussians, 3),
            means.new_zeros(num_gaussians),
            means.new_zeros(num_gaussians, 1, 3),
            image_size=(height, width),
        )

    @property
    def num_gaussians(self) -> int:
        """N."""
        return len(self.means)

    @property
    def scales(self) -> Tensor:
        """Standard deviations along the axes, `(N, 3)`."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> Tensor:
        """Opacities between 0 and 1, `(N,)`."""
        return self.opacity_logits.sigmoid()

    @property
    def unit_quats(self) -> Tensor:
        """Rotations as quaternions of length one, `(N, 4)`."""
        return F.normalize(self.quats, dim=-1)

    @property
    def sh(self) -> Tensor:
        """All coefficients of the colours, `(N, K, 3)`."""
        return torch.cat([self.sh0, self.shN], 1)

    def covariances(self) -> Tensor:
        """`R diag(s^2) R^T`, `(N, 3, 3)`."""
        half = quat_to_matrix(self.quats) * self.scales[:, None]
        return half @ half.mT

    def render(self, cameras: Cameras, **options: Any) -> RasterOutput:
        """Pictures of the scene.

        Args:
            cameras: Where from.
            **options: Those of `torchzoo.ops.rasterize`; also its `means`, `quats`, `scales`,
                `opacities` and `features`, in place of the scene's own. Without `features` the
                colours are drawn, with `sh_degree` up to the scene's.

        Returns:
            What `rasterize` returns; the picture is `.image`, `(C, H, W, 3)`.
        """
        if "features" not in options:
            options = {"features": self.sh, "sh_degree": self.sh_degree} | options
        splats = {name: getattr(self, name) for name in ("means", "quats", "scales", "opacities")}
        seen = {
            "viewmats": cameras.viewmats,
            "Ks": cameras.Ks,
            "width": cameras.width,
            "height": cameras.height,
            "camera_model": cameras.camera_model,
        }
        return ops.rasterize(**splats | seen | options)

    def forward(self, viewmats: Tensor, Ks: Tensor) -> Tensor:
        """Pictures `(..., height, width, 3)` on black, from pinhole cameras; see the class."""
        batch = viewmats.shape[:-2]
        for name, value, size in (("viewmats", viewmats, 4), ("Ks", Ks, 3)):
            if value.shape[-2:] != (size, size) or value.shape[:-2] != batch:
                got, expected = tuple(value.shape), (*batch, size, size)
                raise ValueError(f"{name}: got {got}, expected {expected}")
        height, width = self.image_size
        cameras = Cameras(
            viewmats.reshape(-1, 4, 4), Ks.reshape(-1, 3, 3).to(viewmats), width, height
        )
        if viewmats.is_meta:  # how many tiles the Gaussians meet has no value there
            return self.means.new_empty(*batch, height, width, 3)
        image = self.render(cameras).image
        assert image is not None  # it is asked for
        return image.reshape(*batch, height, width, 3)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take over the number of rows where all parameters come with the same, then load."""
        edits.adopt_size(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _note_size(self) -> None:
        """Let the saved config say how many Gaussians there are now."""
        if "num_gaussians" in self._zoo_config:
            self._zoo_config["num_gaussians"] = len(self.means)

    def extra_repr(self) -> str:
        """What `print` shows."""
        height, width = self.image_size
        return f"{self.num_gaussians}, sh_degree={self.sh_degree}, image_size=({height}, {width})"


def _spacing(xyz: Tensor) -> Tensor:
    """Root mean square distance to the three nearest other points, `(N,)`."""
    neighbours = min(3, len(xyz) - 1)
    if neighbours < 1:
        return xyz.new_ones(len(xyz))
    distances, _ = ops.knn(xyz, xyz, neighbours, exclude_self=True)
    return distances.square().mean(-1).clamp_min(1e-7).sqrt()
