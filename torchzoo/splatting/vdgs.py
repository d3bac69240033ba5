"""Scenes whose splats change their opacity or colour with the direction they are seen in.

D. Malarz, W. Smolak-Dyżewska, J. Tabor, S. Tadeja and P. Spurek, "Gaussian Splatting with
NeRF-based Color and Opacity", 2024. With F the factors of a `ViewDirectionField`,

    o'(d) = F(mu, d) o,   sh'(d) = F(mu, d) sh   ("mul"),   or sums in place of products ("add")

are what a camera sees of a splat of opacity o and colour coefficients sh in direction d. Glass,
highlights and reflections, which harmonics with one opacity can't show, are what it is for.

Deviations: opacities are held to [0, 1], which sums could leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from torchzoo import peers
from torchzoo.registry import Comparison, Example, register
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.compact_color import harmonics
from torchzoo.splatting.scene import MAX_SH_DEGREE, GaussianScene, _example
from torchzoo.splatting.schedules import SHORT_STEPS
from torchzoo.splatting.vdgs_field import ViewDirectionField

if TYPE_CHECKING:
    from torchzoo.ops import RasterOutput

__all__ = ["VDGSScene", "vdgs_rates"]

OPERATORS = {"mul": ("sigmoid", "exp"), "add": ("sigmoid", "identity")}
"""What goes with which output of the field: not what starts by hiding or filling all."""
_POLAR = 12
"""Heights of the directions that opacities are baked in; there are twice as many azimuths."""
_ROWS = 4096
"""Splats baked at a time."""


def vdgs_rates(steps: int) -> dict[str, float]:
    """The learning rate of the field, for a run of so many steps.

    Example:
        >>> vdgs_rates(30_000), vdgs_rates(250)
        ({'field': 0.001}, {'field': 0.01})
    """
    return {"field": 1e-2 if steps < SHORT_STEPS else 1e-3}


def _vdgs_example() -> Example:
    plain = _example()
    box = [[-1.5] * 3, [1.5] * 3]
    small: dict[str, Any] = {"hidden": 8, "levels": 2, "log2_table": 6, "base": 2}
    field = ViewDirectionField(box, target="both", sh_degree=1, **small)
    other = ViewDirectionField(box, target="color", sh_degree=2, **small)
    return Example(
        {**plain.kwargs, "field": field},
        plain.inputs,
        1,
        {**plain.bad_options, "operator": "pow", "field": other},
    )


@register(
    paper=50,
    example=_vdgs_example,
    compare=lambda: Comparison(
        {
            **{"num_gaussians": 2000, "image_size": (96, 128)},
            "field": ViewDirectionField([[-1.5] * 3, [1.5] * 3]),
        },
        peers.one_view(),
        ("GaussianScene",),
    ),
)
class VDGSScene(GaussianScene):
    """N splats whose opacities or colours a network corrects for each camera.

    `SplatTrainer(scene, ..., rates=vdgs_rates(steps))` trains it, the field from the first step.
    Opacities of the scene, `opacities`, are those before the correction; strategies prune and
    reset them. With `"mul"` and a sigmoid splats begin at about half of their opacity. Files know
    nothing of the field: save `modulated(camera)` in them, or `save_pretrained` all.

    Args:
        num_gaussians: N at first.
        field: Makes the factors; for colours of the scene's degree.
        operator: `"mul"` or `"add"`; factors from `"exp"` go with the first, those from
            `"identity"` with the second.
        detach_means: Whether no gradient reaches the means through the field.
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
        field: The `ViewDirectionField`; the parameters are those of `GaussianScene`.

    Returns:
        Pictures on black; `render` has the options.

    Raises:
        ValueError: A size, degree or operator that can't be, a field for other colours or another
            operator, or inputs of the wrong shape.

    Source:
        Malarz et al., "Gaussian Splatting with NeRF-based Color and Opacity", 2024.

    Example:
        >>> scene = VDGSScene.from_points(torch.randn(50, 3), torch.rand(50, 3))
        >>> cameras = Cameras.orbit(2, radius=4.0, width=32, height=24)
        >>> scene.render(cameras).image.shape, scene.factors(cameras)["opacity"].shape
        (torch.Size([2, 24, 32, 3]), torch.Size([2, 50]))
    """

    def __init__(
        self,
        num_gaussians: int,
        *,
        field: ViewDirectionField,
        operator: str = "mul",
        detach_means: bool = False,
        sh_degree: int = 3,
        num_features: int = 0,
        image_size: Sequence[int] = (64, 64),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if operator not in OPERATORS:
            raise ValueError(f"operator: got {operator!r}, expected one of {tuple(OPERATORS)}")
        if field.output not in OPERATORS[operator]:
            expected = f"one of {OPERATORS[operator]} for operator={operator!r}"
            raise ValueError(f"field: got one with output={field.output!r}, expected {expected}")
        if field.target != "opacity" and field.sh_degree != sh_degree:
            got = f"one for colours of degree {field.sh_degree}"
            raise ValueError(f"field: got {got}, expected sh_degree={sh_degree}")
        super().__init__(
            num_gaussians,
            sh_degree=sh_degree,
            num_features=num_features,
            image_size=image_size,
            device=device,
            dtype=dtype,
        )
        self.operator, self.detach_means = operator, detach_means
        self.field = field

    def reset_parameters(self) -> None:
        """Those of a plain scene, and the field's own; a new scene takes its field as it is."""
        super().reset_parameters()
        if "field" in self._modules:
            self.field.reset_parameters()

    @classmethod
    def from_points(
        cls,
        xyz: Tensor,
        rgb: Tensor,
        *,
        sh_degree: int = 3,
        field: ViewDirectionField | None = None,
        **options: Any,
    ) -> Self:
        """Balls at points, as large as the points are apart.

        Args:
            xyz: Points, `(N, 3)`.
            rgb: Their colours from 0 to 1, `(N, 3)`.
            sh_degree: Degree of the colours.
            field: Makes the factors; None: one for opacities, whose box is that of the points
                without the outer hundredth of them on each side.
            **options: Those of `GaussianScene.from_points` and of the constructor; an
                `init_opacity` is that before the correction.

        Raises:
            ValueError: Shapes that don't fit, or an option out of its range.
        """
        if field is None:
            factory: dict[str, Any] = {"device": xyz.device, "dtype": xyz.dtype}
            field = ViewDirectionField(_box_around(xyz), sh_degree=sh_degree, **factory)
        return super().from_points(xyz, rgb, sh_degree=sh_degree, field=field, **options)

    def factors(self, cameras: Cameras) -> dict[str, Tensor]:
        """What the field gives for each camera: `"opacity"` `(C, N)`, `"sh"` `(C, N, K, 3)`."""
        means = self.means.detach() if self.detach_means else self.means
        if cameras.camera_model == "orthographic":
            ways = cameras.viewmats[:, 2:3, :3].to(means)
        else:
            ways = means - cameras.centers[:, None].to(means)
        ways = ways.expand(-1, self.num_gaussians, -1)
        return self.field(means, F.normalize(ways, dim=-1), self._extra())

    def appearance(self, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """Opacities and coefficients of colours as cameras see them.

        Returns:
            `(C, N)` and `(C, N, K, 3)`; without the C what the field leaves alone.
        """
        factors, opacities, sh = self.factors(cameras), self.opacities, self.sh
        if "opacity" in factors:
            opacities = self._corrected(opacities, factors["opacity"]).clamp(0, 1)
        if "sh" in factors:
            sh = self._corrected(sh, factors["sh"])
        return opacities, sh

    def _corrected(self, values: Tensor, factors: Tensor) -> Tensor:
        return factors * values if self.operator == "mul" else factors + values

    def _extra(self) -> Tensor | None:
        """What else the field sees of the splats, `(N, E)`."""
        columns = {"log_scales": self.log_scales, "quats": self.unit_quats}
        names = self.field.extra_inputs
        return torch.cat([columns[name] for name in names], -1) if names else None

    def render(self, cameras: Cameras, **options: Any) -> RasterOutput:
        """Pictures of the scene, as `GaussianScene.render` makes them.

        Args:
            cameras: Where from.
            **options: Those of `GaussianScene.render`. Opacities and features given here are drawn
                as they are.
        """
        if not {"opacities", "features"} <= options.keys():
            opacities, sh = self.appearance(cameras)
            options = {"opacities": opacities} | options
            if "features" not in options:
                options = {"features": sh, "sh_degree": self.sh_degree} | options
        return super().render(cameras, **options)

    @torch.no_grad()
    def modulated(self, camera: Cameras) -> GaussianScene:
        """The plain scene that looks the same to one camera.

        Raises:
            ValueError: `camera` is not one.
        """
        if len(camera) != 1:
            raise ValueError(f"camera: got {len(camera)} cameras, expected 1")
        opacities, sh = self.appearance(camera)
        return GaussianScene.from_tensors(
            self.means,
            self.quats,
            self.log_scales,
            opacities.flatten().logit(eps=1e-6),
            sh.reshape(self.sh.shape),
            features=getattr(self, "features", None),
            image_size=self.image_size,
        )

    @torch.no_grad()
    def bake_opacity_sh(self, degree: int = 2) -> Tensor:
        """Spherical harmonics of the splats' opacities, for viewers that have no network.

        The coefficients are those nearest in the mean square over all directions. The sum of the
        harmonics in the direction from the camera to the splat is its opacity, but for what only
        higher degrees could tell; it may leave [0, 1].

        Args:
            degree: Of the harmonics, 0 to 3.

        Returns:
            `(N, (degree + 1)^2)`.

        Raises:
            ValueError: A degree out of its range, or a field that leaves opacities alone.
        """
        if not 0 <= degree <= MAX_SH_DEGREE:
            raise ValueError(f"degree: got {degree}, expected 0 to {MAX_SH_DEGREE}")
        if self.field.target == "color":
            raise ValueError("target: got a field for 'color', expected 'opacity' or 'both'")
        dirs, weights = _sphere(_POLAR)
        project = (weights[:, None] * harmonics(degree, dirs)).to(self.means)
        dirs = dirs.to(self.means)[:, None]
        opacities, extra = self.opacities, self._extra()
        found = []
        for rows in torch.arange(self.num_gaussians, device=self.means.device).split(_ROWS):
            ways = dirs.expand(-1, len(rows), -1)
            factors = self.field(self.means[rows], ways, None if extra is None else extra[rows])
            seen = self._corrected(opacities[rows], factors["opacity"]).clamp(0, 1)
            found.append(seen.T @ project)
        return torch.cat(found)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{super().extra_repr()}, operator={self.operator!r}"


def _box_around(xyz: Tensor) -> list[list[float]]:
    """Corners of the box of points, but for a hundredth of them on each side."""
    if xyz.dim() != 2 or xyz.shape[1] != 3 or not len(xyz):
        return [[-1.0] * 3, [1.0] * 3]  # no points; what is of another shape is refused later
    order, skip = xyz.detach().sort(0).values, len(xyz) // 100
    return [(order[skip] - 1e-3).tolist(), (order[-1 - skip] + 1e-3).tolist()]


def _sphere(polar: int) -> tuple[Tensor, Tensor]:
    """Unit vectors `(2 n^2, 3)` and weights of a rule exact up to degree 2 n - 1, in float64."""
    z, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(polar))
    angle = torch.arange(2 * polar, dtype=torch.float64) * (math.pi / polar)
    flat = (1 - z.square()).sqrt()[:, None]
    parts = [flat * angle.cos(), flat * angle.sin(), z[:, None].expand(-1, 2 * polar)]
    each = (weights * math.pi / polar).repeat_interleave(2 * polar)
    return rearrange(torch.stack(parts), "c z a -> (z a) c"), each
