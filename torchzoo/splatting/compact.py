"""Splat scenes that are trained to be small: "Compact 3D Gaussian Representation for Radiance
Field" (Lee, Rho, Sun, Ko and Park, 2024).

With mask logits m, and sg[·] for what no gradient passes,

    M = sg[1(sigmoid(m) > eps) - sigmoid(m)] + sigmoid(m),   s' = s M,   o' = o M
    colour = max(0, 0.5 + C0 · MLP(grid(contract(mu)), Y(d)))
    s, q = sums of one code a stage of residual codebooks

so that a splat is stored as a position, an opacity and twelve short codes.

Deviations: the direction's nine harmonics Y are evaluated at d itself; the MLP has biases;
quaternions are turned to w >= 0 before they are quantised, and decoded scales taken by size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from torchzoo import ops, peers
from torchzoo.common.quantize import ResidualVQ
from torchzoo.registry import Comparison, Example, register
from torchzoo.splatting import compact_storage
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.compact_color import HashGridColor, fitted_harmonics
from torchzoo.splatting.compact_geometry import CompactGeometry
from torchzoo.splatting.scene import SH_C0, GaussianScene

if TYPE_CHECKING:
    from torchzoo.ops import RasterOutput

__all__ = ["Compact3DGS"]

UNIT_BOX = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))


def _scene_example() -> Example:
    angle = torch.tensor(0.3)
    turned = torch.eye(4)
    turned[0, 0] = turned[2, 2] = angle.cos()
    turned[0, 2], turned[2, 0] = angle.sin(), -angle.sin()
    viewmats = torch.stack([torch.eye(4), turned])
    viewmats[:, 2, 3] = 4
    K = torch.tensor([[16, 0, 6], [0, 16, 4], [0, 0, 1]])  # integers: no gradient reaches it
    box = [[-1e4] * 3, [1e4] * 3]  # so large that finite differences can't see the grid
    return Example(
        kwargs={
            "num_gaussians": 10,
            "aabb": box,
            "image_size": (8, 12),
            "field": {"levels": 1, "base": 1, "hidden": 8, "log2_table": 4},
            "codebook_size": 4,
            "stages": 2,
            "frozen": True,  # the mask and the quantisation have straight-through gradients
        },
        inputs=(viewmats, K.expand(2, 3, 3)),
        bad_options={
            "num_gaussians": -1,
            "aabb": [[0.0] * 3, [1.0, 1.0, 0.0]],
            "codebook_size": 48,
            "stages": 0,
            "mask_threshold": 0.0,
            "image_size": (0, 8),
        },
    )


@register(
    paper=26,
    example=_scene_example,
    compare=lambda: Comparison(
        {**{"num_gaussians": 2000, "image_size": (96, 128)}, "aabb": [[-1.5] * 3, [1.5] * 3]},
        peers.one_view(),
        ("GaussianScene",),
    ),
)
class Compact3DGS(CompactGeometry, GaussianScene):
    """A scene of Gaussians with a learned mask, colours of a field, and geometry from codebooks.

    Trained by `SplatTrainer` with `CompactStrategy`, which penalises masks that are open, removes
    those that have closed, and starts the codebooks. `finalize` gives the scene as it is stored,
    whose splats have codes in place of scales and rotations; `save` writes it, `load` reads it,
    and `bake` makes a plain scene for viewers.

    Args:
        num_gaussians: N at first.
        aabb: Lower and upper corner of the box that the colours are resolved best in.
        image_size: Height and width of the pictures that `forward` makes.
        field: Options of `HashGridColor`.
        codebook_size: Codes K a stage, a power of 2 up to 256.
        stages: Stages Q of the codebooks.
        mask_threshold: Masks whose sigmoid is not above this are 0.
        mask_init: Logit that all masks begin with.
        use_vq: Whether scales and rotations are quantised.
        frozen: Whether splats have codes in place of scales, rotations and masks.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - viewmats: `(..., 4, 4)`
        - Ks: `(..., 3, 3)`
        - output: `(..., height, width, 3)`

    Attributes:
        means: `(N, 3)`.
        opacity_logits: `(N,)`.
        log_scales: `(N, 3)`, not if frozen.
        quats: `(N, 4)`, not if frozen.
        mask_logits: `(N,)`, not if frozen.
        scale_codes: `(N, Q)`, uint8, if frozen.
        rotation_codes: `(N, Q)`, uint8, if frozen.
        color: The `HashGridColor`.
        scale_vq: The `ResidualVQ` of scales.
        rotation_vq: That of unit quaternions.

    Returns:
        Pictures on black; `render` has the options.

    Raises:
        ValueError: A size, box or threshold out of its range, or inputs of the wrong shape.

    Source:
        Lee et al., "Compact 3D Gaussian Representation for Radiance Field", 2024, section 3.

    Example:
        >>> import tempfile
        >>> small = {"levels": 4, "log2_table": 8, "hidden": 16}
        >>> scene = Compact3DGS.from_points(torch.randn(50, 3), torch.rand(50, 3), field=small)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sizes = scene.save(f"{folder}/scene.tzc")
        ...     again = Compact3DGS.load(f"{folder}/scene.tzc")
        >>> sizes["means"], sizes["scale_codes"], again.num_gaussians
        (300, 225, 50)
    """

    def __init__(
        self,
        num_gaussians: int,
        *,
        aabb: Tensor | Sequence[Sequence[float]] = UNIT_BOX,
        image_size: Sequence[int] = (64, 64),
        field: Mapping[str, Any] | None = None,
        codebook_size: int = 64,
        stages: int = 6,
        mask_threshold: float = 0.01,
        mask_init: float = 1.0,
        use_vq: bool = False,
        frozen: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_gaussians, sh_degree=0, image_size=image_size, **factory)
        if codebook_size not in (2**bits for bits in range(1, 9)):
            expected = "a power of 2 from 2 to 256"
            raise ValueError(f"codebook_size: got {codebook_size}, expected {expected}")
        if not 0 < mask_threshold < 1:
            raise ValueError(f"mask_threshold: got {mask_threshold}, expected between 0 and 1")
        self.mask_threshold, self.mask_init, self.frozen = mask_threshold, mask_init, frozen
        self._use_vq = use_vq
        for name in ("sh0", "shN", *(("log_scales", "quats") if frozen else ())):
            delattr(self, name)
        if frozen:
            for name in ("scale_codes", "rotation_codes"):
                codes = torch.empty(num_gaussians, stages, device=device, dtype=torch.uint8)
                self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        else:
            self.mask_logits = nn.Parameter(torch.empty(num_gaussians, **factory))
        self.color = HashGridColor(aabb, **(field or {}), **factory)
        if "aabb" in self._zoo_config:  # a tensor has no place there
            self._zoo_config["aabb"] = self.color.box
        self.scale_vq = ResidualVQ(3, codebook_size=codebook_size, stages=stages, **factory)
        self.rotation_vq = ResidualVQ(4, codebook_size=codebook_size, stages=stages, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Those of a plain scene, masks at `mask_init`, the parts' own; codes at random."""
        if self.frozen:
            self.means.uniform_(-1, 1)
            self.opacity_logits.fill_(math.log(0.1 / 0.9))
            for codes in (self.scale_codes, self.rotation_codes):
                codes.random_(0, self.scale_vq.codebook_size)
        else:
            super().reset_parameters()
        if "mask_logits" in self._parameters:
            self.mask_logits.fill_(self.mask_init)
        for part in (self.color, self.scale_vq, self.rotation_vq) if self._modules else ():
            part.reset_parameters()

    @classmethod
    def from_points(
        cls,
        xyz: Tensor,
        rgb: Tensor,
        *,
        init_opacity: float = 0.1,
        init_scale: float = 1.0,
        aabb: Tensor | Sequence[Sequence[float]] | None = None,
        **options: Any,
    ) -> Self:
        """Balls at points, as large as the points are apart, all grey.

        Args:
            xyz: Points, `(N, 3)`.
            rgb: Their colours `(N, 3)`, which the field does not start from.
            init_opacity: Opacity of each, between 0 and 1.
            init_scale: Factor of the scales.
            aabb: Box of the scene; None: that of the points, without the outer hundredth of them
                on each side.
            **options: Those of the constructor.

        Raises:
            ValueError: Shapes that don't fit, or an option out of its range.
        """
        start = GaussianScene.from_points(
            xyz, rgb, sh_degree=0, init_opacity=init_opacity, init_scale=init_scale
        )
        if aabb is None:
            order, skip = xyz.sort(0).values, len(xyz) // 100
            aabb = torch.stack([order[skip] - 1e-3, order[-1 - skip] + 1e-3])
        options = {"device": xyz.device, "dtype": xyz.dtype, **options}
        scene = cls(len(xyz), aabb=aabb, **options)
        for name in ("means", "quats", "log_scales", "opacity_logits"):
            scene.get_parameter(name).data.copy_(start.get_parameter(name))
        return scene

    def colors(self, cameras: Cameras) -> Tensor:
        """Colours of the splats as cameras see them, `(C, N, 3)`."""
        if cameras.camera_model == "orthographic":
            dirs = cameras.viewmats[:, 2:3, :3]
        else:
            dirs = self.means - cameras.centers[:, None].to(self.means.dtype)
        return self.color(self.means, dirs)

    def render(
        self, cameras: Cameras, *, use_vq: bool | None = None, **options: Any
    ) -> RasterOutput:
        """Pictures of the scene.

        Args:
            cameras: Where from.
            use_vq: Whether to quantise scales and rotations; None: as the scene does.
            **options: Those of `torchzoo.ops.rasterize`; also its `means`, `quats`, `scales`,
                `opacities` and `features`, in place of the scene's own.

        Returns:
            What `rasterize` returns.

        Raises:
            ValueError: `use_vq` is True before the codebooks have begun.
        """
        if use_vq and not self.use_vq:
            raise ValueError("use_vq: got True without codebooks, expected start_vq() before")
        quantised = self.use_vq if use_vq is None else use_vq
        made: dict[str, Callable[[], Tensor]] = {
            "means": lambda: self.means,
            "quats": lambda: self._unit_quats(quantised),
            "scales": lambda: self._scales(quantised),
            "opacities": lambda: self.opacities,
            "features": lambda: self.colors(cameras),
        }
        splats: dict[str, Any] = {
            name: make() for name, make in made.items() if name not in options
        }
        seen: dict[str, Any] = {
            "viewmats": cameras.viewmats,
            "Ks": cameras.Ks,
            "width": cameras.width,
            "height": cameras.height,
            "camera_model": cameras.camera_model,
        }
        return ops.rasterize(**splats | seen | options)

    @torch.no_grad()
    def finalize(self) -> Compact3DGS:
        """The scene as it is stored: without masked splats, with codes in place of geometry.

        Where training has not begun them, the codebooks are fitted now, to a copy.

        Raises:
            ValueError: No splat is left, and codebooks have not begun.
        """
        if self.frozen:
            rows = torch.arange(self.num_gaussians, device=self.means.device)
            return compact_storage.frozen(self, rows)
        if not self.use_vq:
            source = type(self)(**compact_storage.options_of(self, frozen=False))
            source.load_state_dict(self.state_dict())
            source.start_vq(generator=torch.Generator(self.means.device).manual_seed(0))
            return source.finalize()
        codes = [codebooks.encode(values) for codebooks, values in self._geometry()]
        return compact_storage.frozen(self, self.kept, codes)

    @torch.no_grad()
    def save(self, path: str | Path, huffman: bool = False) -> dict[str, int]:
        """Write the scene as it is stored, whole or not at all.

        Args:
            path: The file.
            huffman: Round opacities and table to 8 bits, the smallest of the table to 0, and
                entropy-code all; else positions, opacities, table and network are 16-bit floats
                and codes take log2 K bits.

        Returns:
            Bytes of each part, `"header"` among them; they add up to the file.

        Raises:
            TorchzooError: The file can't be written.
        """
        return compact_storage.write(path, self.finalize(), huffman)

    @classmethod
    @torch.no_grad()
    def load(cls, path: str | Path) -> Compact3DGS:
        """The frozen scene in a file, in float32 on the CPU.

        Raises:
            ValueError: It is no such file, or damaged; the message has the path.
            OSError: The file can't be read.
        """
        return compact_storage.read(path, cls)

    @torch.no_grad()
    def bake(self) -> GaussianScene:
        """A plain scene of degree 3, for viewers and editors, of the splats that are kept.

        The harmonics of a splat are fitted by least squares to its coefficients in directions
        spread evenly over the sphere.
        """
        kept = self.kept
        sh = fitted_harmonics(self.color, self.means[kept])
        return GaussianScene.from_tensors(
            self.means[kept],
            self.unit_quats[kept],
            self.scales[kept].clamp_min(1e-12).log(),
            self.opacity_logits[kept],
            SH_C0 * sh,
            image_size=self.image_size,
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        state = "frozen" if self.frozen else f"use_vq={self.use_vq}"
        return f"{self.num_gaussians}, image_size={self.image_size}, {state}"
