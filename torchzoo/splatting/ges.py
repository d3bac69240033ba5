"""Scenes of generalised exponentials: splats that learn how steeply they end.

A. Hamdi, L. Melas-Kyriazi, J. Mai, G. Qian, R. Liu, C. Vondrick, B. Ghanem and A. Vedaldi, "GES:
Generalized Exponential Splatting for Efficient Radiance Field Rendering", 2024. A splat is

    L(x) = exp(-1/2 ((x - mu)^T Sigma^-1 (x - mu))^(beta/2)),

a Gaussian at `beta = 2`. It is drawn in one of two ways, which are different things:

- `"exact"`: with `exp(-1/2 q^(beta/2))` on the image, q of the projected covariance. The integral
  of L along a ray is another function of q (`ray_integral`) unless `beta = 2`: this keeps the
  ellipses and the steepness, not the ball.
- `"approx"`: as the authors' renderer does, with plain Gaussians of the scales `s phi(beta)`,
  `phi = 2 / (1 + exp(-rho (beta - 2)))`. The picture is one that Gaussians of other scales make,
  and beta a second parameter of the scales. What the paper gains then comes from its training:
  the frequency-modulated loss, the shapes' resets and a higher threshold of densification.

Deviations: `"exact"` is not in the paper. In it `beta = 2 exp(raw_shape)` within `beta_range`, as
the area that a splat covers grows fast below `beta = 1`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from torchzoo import peers
from torchzoo.registry import Comparison, Example, register
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.generalized_exponential import gef_variance_scale
from torchzoo.splatting.protocol import TrainStep
from torchzoo.splatting.scene import GaussianScene, _example
from torchzoo.splatting.schedules import SHORT_STEPS, scaled_steps
from torchzoo.splatting.strategy import DefaultStrategy

if TYPE_CHECKING:
    from torchzoo.ops import RasterOutput

__all__ = ["GESStrategy", "GeneralizedExponentialScene", "ges_shape_modulation"]

MODES = ("exact", "approx")


def ges_shape_modulation(raw: Tensor, strength: float = 0.1) -> Tensor:
    """The factor of the scales by which Gaussians stand in for other shapes.

        phi = 2 / (1 + exp(-strength raw)),   raw = beta - 2

    Args:
        raw: Shapes less 2.
        strength: The paper's rho.

    Shape:
        - raw: `(...)`
        - output: `(...)`, between 0 and 2

    Source:
        Hamdi et al., "GES", 2024, the approximate rasteriser of section 4; 0.1 is the authors'
        code's.

    Example:
        >>> ges_shape_modulation(torch.tensor([-10.0, 0.0, 10.0]))
        tensor([0.5379, 1.0000, 1.4621])
    """
    return 2 * torch.sigmoid(strength * raw)


def _ges_example() -> Example:
    plain = _example()
    bad = {"mode": "fast", "beta_range": (0.0, 2.0), "shape_strength": -1.0}
    return Example(plain.kwargs, plain.inputs, 1, {**plain.bad_options, **bad})


@register(
    paper=46,
    example=_ges_example,
    compare=lambda: Comparison(
        {"num_gaussians": 2000, "image_size": (96, 128)}, peers.one_view(), ("GaussianScene",)
    ),
)
class GeneralizedExponentialScene(GaussianScene):
    """N splats like those of `GaussianScene`, each with a shape of its own.

    `raw_shape` is learnt with a rate of its own: `SplatTrainer(..., rates={"raw_shape": 1e-2})`
    for `"exact"`, the authors' 1e-3 for `"approx"`. A shape at an end of `beta_range` gets no
    gradient. Clones and splits have the shape of what they come from; so do relocated splats,
    whose new scales and opacities keep the look of Gaussians, which is exact only at `beta = 2`.
    File formats for Gaussians don't know shapes: save `to_gaussian()` in them.

    Args:
        num_gaussians: N at first.
        sh_degree: Degree of the spherical harmonics of the colours, 0 to 3.
        num_features: Size F of the optional `features`.
        image_size: Height and width of the pictures that `forward` makes.
        mode: `"exact"` or `"approx"`, see the module.
        shape_strength: The rho of `ges_shape_modulation`, for `"approx"`.
        beta_range: Least and largest shape, for `"exact"`. A splat reaches as far as
            `(2 ln 255 o)^(1/beta)` standard deviations: 3.3 at 2, 11 at 1, 122 at 0.5.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - viewmats: `(..., 4, 4)`
        - Ks: `(..., 3, 3)`
        - output: `(..., height, width, 3)`

    Attributes:
        raw_shape: `(N,)`, 0 for Gaussians; the others are those of `GaussianScene`.

    Returns:
        Pictures on black; `render` has the options.

    Raises:
        ValueError: A size, degree, mode or range that can't be, or inputs of the wrong shape.

    Source:
        Hamdi et al., "GES: Generalized Exponential Splatting for Efficient Radiance Field
        Rendering", 2024.

    Example:
        >>> points, colors = torch.randn(50, 3), torch.rand(50, 3)
        >>> scene = GeneralizedExponentialScene.from_points(points, colors)
        >>> cameras = Cameras.orbit(2, radius=4.0, width=32, height=24)
        >>> scene.render(cameras).image.shape, scene.beta.shape
        (torch.Size([2, 24, 32, 3]), torch.Size([50]))
    """

    raw_shape: nn.Parameter

    def __init__(
        self,
        num_gaussians: int,
        *,
        sh_degree: int = 3,
        num_features: int = 0,
        image_size: Sequence[int] = (64, 64),
        mode: str = "exact",
        shape_strength: float = 0.1,
        beta_range: Sequence[float] = (1.0, 12.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: got {mode!r}, expected one of {MODES}")
        if not shape_strength > 0:
            raise ValueError(f"shape_strength: got {shape_strength}, expected above 0")
        if len(beta_range) != 2 or not 0 < beta_range[0] <= 2 <= beta_range[1] < math.inf:
            got = tuple(beta_range)
            raise ValueError(f"beta_range: got {got}, expected (least > 0, largest) around 2")
        super().__init__(
            num_gaussians,
            sh_degree=sh_degree,
            num_features=num_features,
            image_size=image_size,
            device=device,
            dtype=dtype,
        )
        self.mode, self.shape_strength = mode, shape_strength
        self.beta_range = (float(beta_range[0]), float(beta_range[1]))
        shapes = torch.zeros(num_gaussians, device=device, dtype=dtype)
        self.raw_shape = nn.Parameter(shapes)

    @classmethod
    def from_tensors(
        cls,
        means: Tensor,
        quats: Tensor,
        log_scales: Tensor,
        opacity_logits: Tensor,
        sh: Tensor,
        *,
        raw_shape: Tensor | None = None,
        features: Tensor | None = None,
        **options: Any,
    ) -> Self:
        """A scene with copies of these values; without `raw_shape` it looks like Gaussians.

        Raises:
            ValueError: Shapes that don't fit each other.
        """
        count = len(means)
        if raw_shape is not None and raw_shape.shape != (count,):
            got = tuple(raw_shape.shape)
            raise ValueError(f"raw_shape: got {got}, expected ({count},) with N={count}")
        scene = super().from_tensors(
            means, quats, log_scales, opacity_logits, sh, features=features, **options
        )
        if raw_shape is not None:
            scene.raw_shape.data.copy_(raw_shape)
        return scene

    @property
    def beta(self) -> Tensor:
        """Shapes `(N,)`: 2 for Gaussians, more for boxes, less for peaks."""
        if self.mode == "approx":
            return 2 + self.raw_shape
        return (2 * self.raw_shape.exp()).clamp(*self.beta_range)

    @property
    def effective_scales(self) -> Tensor:
        """The scales that are drawn, `(N, 3)`: with `"approx"` changed by the shapes."""
        if self.mode == "exact":
            return self.scales
        return self.scales * ges_shape_modulation(self.raw_shape, self.shape_strength)[:, None]

    def render(self, cameras: Cameras, **options: Any) -> RasterOutput:
        """Pictures of the scene, as `GaussianScene.render` makes them.

        Args:
            cameras: Where from.
            **options: Those of `GaussianScene.render`. Scales given here are drawn as they are;
                with another `kernel` the splats are drawn by it, without their shapes.
        """
        if self.mode == "approx":
            shapes: dict[str, Any] = {"scales": self.effective_scales}
        elif "kernel" in options:
            shapes = {}
        else:
            shapes = {"kernel": "generalized_exponential", "beta": self.beta}
        return super().render(cameras, **shapes | options)

    def to_gaussian(self) -> GaussianScene:
        """The scene as Gaussians, for formats and viewers that know no others.

        With `"approx"` it looks the same. With `"exact"` each splat gets the Gaussian of the same
        opacity and, on the image, the same variances.
        """
        if self.mode == "approx":
            phi_log = math.log(2) + F.logsigmoid(self.shape_strength * self.raw_shape)
        else:
            phi_log = gef_variance_scale(self.beta, dim=2).log()
        return GaussianScene.from_tensors(
            self.means,
            self.quats,
            self.log_scales + phi_log[:, None],
            self.opacity_logits,
            self.sh,
            features=getattr(self, "features", None),
            image_size=self.image_size,
        )

    @torch.no_grad()
    def reset_shapes(self, optimizers: Optimizer | Iterable[Optimizer] = ()) -> None:
        """Make Gaussians of all splats, and forget the optimisers' moments of the shapes."""
        self.raw_shape.zero_()
        for one in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
            for value in one.state.get(self.raw_shape, {}).values():
                if isinstance(value, Tensor) and value.shape == self.raw_shape.shape:
                    value.zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


@dataclass(kw_only=True, eq=False)
class GESStrategy(DefaultStrategy):
    """`DefaultStrategy` with what the authors change: a higher threshold, and care of the shapes.

    Shapes of a scene in mode `"approx"` are set back to Gaussians from time to time, and splats
    whose modulation has fallen below `prune_modulation` are removed at refinements; with the
    authors' strength of 0.1 that takes a raw shape below -60. Other scenes are densified alone.
    The authors train for 40,000 steps.

    Args:
        grow_grad2d: Mean gradient above which a splat grows.
        prune_modulation: Factor of the scales below which splats are removed.
        reset_shapes_every: Steps between resets of the shapes, until `refine_stop`, 0 for none;
            None: 1,000, scaled, and none in runs below 3,000 steps.

    Raises:
        ValueError: A negative count, or `refine_every` of 0.

    Source:
        Hamdi et al., "GES", 2024; the figures are the authors' code's.

    Example:
        >>> GESStrategy().threshold
        0.0003
    """

    grow_grad2d: float | None = 3e-4
    prune_modulation: float = 0.005
    reset_shapes_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reset_shapes_every is not None and self.reset_shapes_every < 0:
            got = self.reset_shapes_every
            raise ValueError(f"reset_shapes_every: got {got}, expected at least 0")

    @torch.no_grad()
    def after_step(self, step: TrainStep) -> None:
        super().after_step(step)
        scene = step.scene
        if isinstance(scene, GeneralizedExponentialScene) and scene.mode == "approx":
            if self.is_due(step.number):
                phi = ges_shape_modulation(scene.raw_shape, scene.shape_strength)
                self._keep(step, phi >= self.prune_modulation)
            if self._resets_shapes(step.number):
                scene.reset_shapes(step.optimizer)

    def _keep(self, step: TrainStep, kept: Tensor) -> None:
        if not kept.all():
            step.scene.keep(kept, step.optimizer)
            self.grad2d = self.count = self.grad2d.new_zeros(step.scene.num_gaussians)

    def _resets_shapes(self, number: int) -> bool:
        every = self.reset_shapes_every
        if every is None:
            every = scaled_steps(1000, self._steps) if self._steps >= SHORT_STEPS else 0
        return every > 0 and number % every == 0 and number < self.schedule()[1]
