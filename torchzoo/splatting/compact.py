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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torchzoo import ops, peers
from torchzoo.common.quantize import ResidualVQ
from torchzoo.files import atomic_path
from torchzoo.registry import Comparison, Example, register
from torchzoo.splatting import compact_file
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.compact_color import HashGridColor, harmonics
from torchzoo.splatting.compact_mask import hard_mask
from torchzoo.splatting.rotations import quat_to_matrix
from torchzoo.splatting.scene import SH_C0, GaussianScene

if TYPE_CHECKING:
    from torchzoo.ops import RasterOutput

__all__ = ["Compact3DGS"]

UNIT_BOX = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))
HASH_PRUNE = 0.1
"""Values of the table up to this size become 0 in an entropy-coded file."""
_DIRECTIONS = 256
"""Directions a baked colour is fitted in."""


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
class Compact3DGS(GaussianScene):
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

    mask_logits: nn.Parameter
    scale_codes: nn.Parameter
    rotation_codes: nn.Parameter
    frozen = False

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

    @property
    def use_vq(self) -> bool:
        """Whether scales and rotations are those of the codebooks."""
        return self._use_vq or self.frozen

    @use_vq.setter
    def use_vq(self, active: bool) -> None:
        self._use_vq = active
        if "use_vq" in self._zoo_config:
            self._zoo_config["use_vq"] = active

    @property
    def mask(self) -> Tensor:
        """Zeros and ones with the gradient of the sigmoid, `(N,)`; ones if frozen."""
        if self.frozen:
            return torch.ones_like(self.opacity_logits)
        return hard_mask(self.mask_logits, self.mask_threshold)

    @property
    def kept(self) -> Tensor:
        """Which splats' masks are open, `(N,)` bool."""
        return self.mask.detach() > 0

    @property
    def scales(self) -> Tensor:
        """Standard deviations along the axes `(N, 3)`, 0 where the mask is."""
        return self._scales(self.use_vq)

    @property
    def opacities(self) -> Tensor:
        """Opacities between 0 and 1, `(N,)`, 0 where the mask is."""
        return self.opacity_logits.sigmoid() * self.mask

    @property
    def unit_quats(self) -> Tensor:
        """Rotations as quaternions of length one, `(N, 4)`."""
        return self._unit_quats(self.use_vq)

    def _scales(self, use_vq: bool) -> Tensor:
        if self.frozen:
            return self.scale_vq.decode(self.scale_codes).abs()
        scales = self.log_scales.exp()
        if use_vq:
            scales = self.scale_vq(scales)[0].abs()
        return scales * self.mask[:, None]

    def _unit_quats(self, use_vq: bool) -> Tensor:
        if self.frozen:
            return F.normalize(self.rotation_vq.decode(self.rotation_codes), dim=-1)
        if not use_vq:
            return F.normalize(self.quats, dim=-1)
        return F.normalize(self.rotation_vq(_upper(self.quats))[0], dim=-1)

    def covariances(self) -> Tensor:
        """`R diag(s^2) R^T`, `(N, 3, 3)`."""
        half = quat_to_matrix(self.unit_quats) * self.scales[:, None]
        return half @ half.mT

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
    def start_vq(self, *, generator: torch.Generator | None = None) -> None:
        """Fit the codebooks to the splats that are kept, and quantise from now on.

        Raises:
            ValueError: No splat is kept.
        """
        for codebooks, values in self._geometry():
            codebooks.init_kmeans(values, generator=generator)
        self.use_vq = True

    def codebook_loss(self) -> Tensor:
        """The loss that the codebooks learn from, over the splats that are kept."""
        losses = [codebooks(values)[2] for codebooks, values in self._geometry()]
        return losses[0] + losses[1]

    def _geometry(self) -> list[tuple[ResidualVQ, Tensor]]:
        """Codebooks and what they stand for, without gradient and without masked rows."""
        kept = self.kept
        scales, quats = self.log_scales.detach().exp(), _upper(self.quats.detach())
        return [(self.scale_vq, scales[kept]), (self.rotation_vq, quats[kept])]

    @torch.no_grad()
    def finalize(self) -> Compact3DGS:
        """The scene as it is stored: without masked splats, with codes in place of geometry.

        Where training has not begun them, the codebooks are fitted now, to a copy.

        Raises:
            ValueError: No splat is left, and codebooks have not begun.
        """
        if self.frozen:
            return self._frozen(torch.arange(self.num_gaussians, device=self.means.device), None)
        if not self.use_vq:
            source = type(self)(**self._options(frozen=False))
            source.load_state_dict(self.state_dict())
            source.start_vq(generator=torch.Generator(self.means.device).manual_seed(0))
            return source.finalize()
        codes = [codebooks.encode(values) for codebooks, values in self._geometry()]
        return self._frozen(self.kept, codes)

    def _frozen(self, rows: Tensor, codes: list[Tensor] | None) -> Compact3DGS:
        """A frozen scene of some rows; None stands for the codes these have."""
        if codes is None:
            codes = [self.scale_codes[rows], self.rotation_codes[rows]]
        values = {"scale_codes": codes[0], "rotation_codes": codes[1]}
        values |= {"means": self.means[rows], "opacity_logits": self.opacity_logits[rows]}
        scene = Compact3DGS(**self._options(frozen=True) | {"num_gaussians": len(codes[0])})
        for name, value in values.items():
            scene.get_parameter(name).data.copy_(value)
        for name in ("color", "scale_vq", "rotation_vq"):
            scene.get_submodule(name).load_state_dict(self.get_submodule(name).state_dict())
        return scene.train(self.training)

    def _options(self, *, frozen: bool) -> dict[str, Any]:
        """Constructor arguments of a scene like this one."""
        grid = self.color.grid
        return {
            "num_gaussians": self.num_gaussians,
            "aabb": self.color.box,
            "image_size": self.image_size,
            "field": {
                "levels": grid.levels,
                "features": grid.features,
                "log2_table": grid.log2_table,
                "base": grid.base,
                "growth": grid.growth,
                "hidden": self.color.hidden,
                "layers": self.color.layers,
            },
            "codebook_size": self.scale_vq.codebook_size,
            "stages": self.scale_vq.stages,
            "mask_threshold": self.mask_threshold,
            "mask_init": self.mask_init,
            "use_vq": self.use_vq,
            "frozen": frozen,
            "device": self.means.device,
            "dtype": self.means.dtype,
        }

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
        scene = self.finalize()
        scene = scene._frozen(compact_file.morton_order(scene.means), None)
        values = {
            "means": scene.means,
            "opacities": scene.opacities,
            "scale_codes": scene.scale_codes,
            "rotation_codes": scene.rotation_codes,
            "codebooks": _vector([scene.scale_vq, scene.rotation_vq]),
            "grid": scene.color.grid.table,
            "mlp": _vector([scene.color.mlp]),
        }
        coders = compact_file.coders(huffman, scene.scale_vq.codebook_size, HASH_PRUNE)
        parts = {name: coders[name][0](value) for name, value in values.items()}
        options = scene._options(frozen=True)
        header = {"huffman": huffman, **{k: v for k, v in options.items() if k not in _UNSAVED}}
        data = compact_file.write_parts(header, parts)
        with atomic_path(path) as part:
            part.write_bytes(data)
        sizes = {name: len(coded) for name, coded in parts.items()}
        return {"header": len(data) - sum(sizes.values()), **sizes}

    @classmethod
    @torch.no_grad()
    def load(cls, path: str | Path) -> Compact3DGS:
        """The frozen scene in a file, in float32 on the CPU.

        Raises:
            ValueError: It is no such file, or damaged; the message has the path.
            OSError: The file can't be read.
        """
        data = Path(path).read_bytes()
        try:
            return _from_parts(*compact_file.read_parts(data))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: {error}") from None

    @torch.no_grad()
    def bake(self) -> GaussianScene:
        """A plain scene of degree 3, for viewers and editors, of the splats that are kept.

        The harmonics of a splat are fitted by least squares to its coefficients in directions
        spread evenly over the sphere.
        """
        steps = torch.arange(_DIRECTIONS, device=self.means.device, dtype=torch.float64)
        z = 1 - (2 * steps + 1) / _DIRECTIONS
        angle = steps * (math.pi * (3 - math.sqrt(5)))
        flat = (1 - z.square()).sqrt()
        dirs = torch.stack([flat * angle.cos(), flat * angle.sin(), z], -1)
        solve = torch.linalg.pinv(harmonics(3, dirs)).to(self.means.dtype)
        kept, sh = self.kept, self.means.new_zeros(self.num_gaussians, 16, 3)
        for weights, direction in zip(solve.T, dirs.to(self.means.dtype), strict=True):
            sh += weights[:, None] * self.color.coefficients(self.means, direction)[:, None]
        return GaussianScene.from_tensors(
            self.means[kept],
            self.unit_quats[kept],
            self.scales[kept].clamp_min(1e-12).log(),
            self.opacity_logits[kept],
            SH_C0 * sh[kept],
            image_size=self.image_size,
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        state = "frozen" if self.frozen else f"use_vq={self.use_vq}"
        return f"{self.num_gaussians}, image_size={self.image_size}, {state}"


_UNSAVED = ("device", "dtype", "mask_init", "mask_threshold", "frozen", "use_vq")


def _upper(quats: Tensor) -> Tensor:
    """Unit quaternions of the same rotations with w from 0."""
    quats = F.normalize(quats, dim=-1)
    return torch.where(quats[:, :1] < 0, -quats, quats)


def _vector(modules: Sequence[nn.Module]) -> Tensor:
    return parameters_to_vector([p for module in modules for p in module.parameters()])


def _from_parts(header: Mapping[str, Any], parts: Mapping[str, bytes]) -> Compact3DGS:
    """The scene of a file; its sizes are checked before there is memory for them."""
    options = dict(header)
    huffman = options.pop("huffman")
    with torch.device("meta"):
        plan = Compact3DGS(**options, frozen=True)
    modules: dict[str, list[nn.Module]] = {
        "codebooks": [plan.scale_vq, plan.rotation_vq],
        "mlp": [plan.color.mlp],
    }
    counts = {
        "means": plan.means.numel(),
        "opacities": plan.num_gaussians,
        "scale_codes": plan.scale_codes.numel(),
        "rotation_codes": plan.rotation_codes.numel(),
        "codebooks": sum(p.numel() for m in modules["codebooks"] for p in m.parameters()),
        "grid": plan.color.grid.table.numel(),
        "mlp": sum(p.numel() for p in plan.color.mlp.parameters()),
    }
    if parts.keys() != counts.keys():
        raise ValueError(f"parts: got {sorted(parts)}, expected {sorted(counts)}")
    coders = compact_file.coders(huffman, plan.scale_vq.codebook_size, HASH_PRUNE)
    found = {name: coders[name][1](parts[name], count) for name, count in counts.items()}
    scene = Compact3DGS(**options, frozen=True)
    opacities = found["opacities"].clamp(0, 1)
    for parameter, value in (
        (scene.means, found["means"]),
        (scene.opacity_logits, opacities.logit(eps=1e-6)),
        (scene.scale_codes, found["scale_codes"]),
        (scene.rotation_codes, found["rotation_codes"]),
        (scene.color.grid.table, found["grid"]),
    ):
        parameter.data.copy_(value.reshape(parameter.shape))
    books = [*scene.scale_vq.parameters(), *scene.rotation_vq.parameters()]
    vector_to_parameters(found["codebooks"], books)
    vector_to_parameters(found["mlp"], scene.color.mlp.parameters())
    return scene
