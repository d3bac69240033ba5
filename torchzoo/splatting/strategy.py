"""How many Gaussians a scene gets while it is trained, and where: densification strategies.

A strategy sees every training step three times, before and after the backward pass and after the
optimiser's step, and edits the scene in the last. Step counts that are not given are those of a
run of 30,000 steps, scaled to the run's length.

Sources: Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", 2023, section
5 (`DefaultStrategy`); Ye et al., "AbsGS: Recovering Fine Details for 3D Gaussian Splatting", 2024
(its absolute gradients); Kheradmand et al., "3D Gaussian Splatting as Markov Chain Monte Carlo",
2024 (`MCMCStrategy`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchzoo.splatting.protocol import DensifyStrategy, TrainStep
from torchzoo.splatting.schedules import FULL_STEPS, scaled_steps

if TYPE_CHECKING:
    from torchzoo.splatting.scene import GaussianScene

__all__ = ["DefaultStrategy", "DensifyStrategy", "MCMCStrategy", "TrainStep"]


@dataclass(kw_only=True, eq=False)
class _Refining(DensifyStrategy):
    """A strategy that acts every so many steps between a start and a stop."""

    refine_start: int | None = None
    refine_stop: int | None = None
    refine_every: int | None = None
    _steps: int = field(default=FULL_STEPS, init=False, repr=False)

    _full_stop = 15_000

    def __post_init__(self) -> None:
        for name in ("refine_start", "refine_stop"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value}, expected at least 0")
        if self.refine_every is not None and self.refine_every < 1:
            raise ValueError(f"refine_every: got {self.refine_every}, expected at least 1")

    def begin(self, scene: GaussianScene, steps: int) -> None:
        self._steps = steps

    def schedule(self) -> tuple[int, int, int]:
        """Start, stop and interval of refinements in this run."""
        scaled = (
            scaled_steps(500, self._steps, 25),
            scaled_steps(self._full_stop, self._steps),
            scaled_steps(100, self._steps, 25),
        )
        given = (self.refine_start, self.refine_stop, self.refine_every)
        start, stop, every = (s if g is None else g for g, s in zip(given, scaled, strict=True))
        return start, stop, every

    def is_due(self, number: int) -> bool:
        """Whether the scene is refined after step `number`: past the start, before the stop."""
        start, stop, every = self.schedule()
        return start < number < stop and number % every == 0

    def config(self) -> dict[str, Any]:
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        plain = (bool, int, float, str, list, tuple, type(None))
        return super().config() | {k: v for k, v in options.items() if isinstance(v, plain)}


@dataclass(kw_only=True, eq=False)
class DefaultStrategy(_Refining):
    """Adaptive density control: grow where the picture pulls at the splats, prune the transparent.

    Each step adds to a splat's statistics, for each view that shows it, the length of the loss's
    gradient with respect to its place in the picture, in units of half the picture, times the
    number of views (the loss is a mean over them). At a refinement, splats whose mean exceeds
    `grow_grad2d` are cloned if their largest scale is at most `grow_scale3d` times the scene's, and
    else split in two; then those of opacity below `prune_opacity` go, later on the very large ones
    as well. Opacities are lowered to twice `prune_opacity` from time to time, so that what is not
    needed shows.

    Args:
        grow_grad2d: Mean gradient above which a splat grows; None: 2e-4, with `absgrad` 8e-4.
        grow_scale3d: Largest scale, relative to the scene, of what is cloned rather than split.
        prune_opacity: Opacity below which splats are removed.
        prune_scale3d: Scale, relative to the scene, above which they are, after `prune_big_after`.
        cap_max: Splats at most; those of the highest gradients grow. None: no limit.
        absgrad: Take sums of absolute gradients over the pixels, in which opposite pulls add up.
        revised_opacity: Give split splats the opacity `1 - sqrt(1 - o)` in place of o.
        refine_start: Refine after this step; None: 500, scaled, at least 25.
        refine_stop: Refine before this step; None: 15,000, scaled.
        refine_every: Steps between refinements; None: 100, scaled, at least 25.
        reset_every: Steps between resets of the opacities, until `refine_stop`, 0 for none; None:
            3,000, scaled, and none in runs below 3,000 steps.
        prune_big_after: Step after which large splats are removed; None: 3,000, scaled.

    Raises:
        ValueError: A negative count, or `refine_every` of 0.

    Example:
        >>> strategy = DefaultStrategy(cap_max=4000)
        >>> strategy.begin(None, steps=6000)
        >>> strategy.schedule()
        (100, 3000, 25)
    """

    grow_grad2d: float | None = None
    grow_scale3d: float = 0.01
    prune_opacity: float = 0.005
    prune_scale3d: float = 0.1
    cap_max: int | None = None
    absgrad: bool = False
    revised_opacity: bool = False
    reset_every: int | None = None
    prune_big_after: int | None = None
    grad2d: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False)
    count: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cap_max", "reset_every", "prune_big_after"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value}, expected at least 0")

    @property
    def threshold(self) -> float:
        """The mean gradient above which a splat grows."""
        if self.grow_grad2d is not None:
            return self.grow_grad2d
        return 8e-4 if self.absgrad else 2e-4

    def begin(self, scene: GaussianScene, steps: int) -> None:
        super().begin(scene, steps)
        self.grad2d = self.count = torch.zeros(0)

    def before_backward(self, step: TrainStep) -> None:
        means2d = step.output.info["means2d"]
        if means2d.requires_grad:
            means2d.retain_grad()

    @torch.no_grad()
    def after_backward(self, step: TrainStep) -> None:
        if step.number >= self.schedule()[1]:
            return
        gradients, visible = self.screen_gradients(step)
        found = torch.stack([(gradients * visible).sum(0), visible.to(gradients).sum(0)])
        found = step.total(found)
        if self.grad2d.shape != found[0].shape:  # something else has edited the scene: start anew
            self.grad2d, self.count = torch.zeros_like(found)
        self.grad2d, self.count = self.grad2d + found[0], self.count + found[1]

    def screen_gradients(self, step: TrainStep) -> tuple[Tensor, Tensor]:
        """Lengths of the gradients of the splats' places, and where they are visible, `(C, N)`."""
        info = step.output.info
        means2d = info["means2d"]
        gradient = getattr(means2d, "absgrad" if self.absgrad else "grad", None)
        if gradient is None:  # no splat is seen
            gradient = torch.zeros_like(means2d)
        height, width = step.size
        half = gradient.new_tensor([width / 2, height / 2]) * len(step.views)
        return (gradient * half).norm(dim=-1), (info["radii"] > 0).all(-1)

    @torch.no_grad()
    def after_step(self, step: TrainStep) -> None:
        if self.is_due(step.number):
            self._grow(step)
            self._prune(step)
            self.grad2d = self.count = self.grad2d.new_zeros(step.scene.num_gaussians)
        if self._resets(step.number):
            step.scene.reset_opacities(2 * self.prune_opacity, step.optimizer)

    def select(self, step: TrainStep) -> tuple[Tensor, Tensor]:
        """Masks of the splats to clone and of those to split."""
        gradient = self.grad2d / self.count.clamp_min(1)
        high = gradient > self.threshold
        if self.cap_max is not None:
            room = max(0, self.cap_max - step.scene.num_gaussians)
            strongest = torch.where(high, gradient, -math.inf).argsort(descending=True, stable=True)
            high[strongest[room:]] = False
        small = step.scene.scales.amax(-1) <= self.grow_scale3d * step.scene_scale
        return high & small, high & ~small

    def _grow(self, step: TrainStep) -> None:
        scene, optimizer = step.scene, step.optimizer
        cloned, divided = self.select(step)
        rows = divided.nonzero().squeeze(-1)  # clones come last, so these stay where they are
        scene.clone(cloned, optimizer)
        scene.split(rows, optimizer, revised_opacity=self.revised_opacity, generator=step.generator)

    def _prune(self, step: TrainStep) -> None:
        scene = step.scene
        gone = scene.opacity_logits.sigmoid() < self.prune_opacity
        late = self.prune_big_after
        if step.number > (scaled_steps(3000, self._steps) if late is None else late):
            gone |= scene.scales.amax(-1) > self.prune_scale3d * step.scene_scale
        if gone.any():
            scene.keep(~gone, step.optimizer)

    def _resets(self, number: int) -> bool:
        every = self.reset_every
        if every is None:
            every = scaled_steps(3000, self._steps) if self._steps >= 3000 else 0
        return every > 0 and number % every == 0 and number < self.schedule()[1]

    def state_dict(self) -> dict[str, Tensor]:
        return {"grad2d": self.grad2d, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.grad2d, self.count = state["grad2d"], state["count"]


@dataclass(kw_only=True, eq=False)
class MCMCStrategy(_Refining):
    """Splats as samples: the dead move to where the living are, and all are shaken.

    At a refinement, splats of opacity up to `min_opacity` are moved onto others, which are drawn
    with odds proportional to their opacity, and then 5 % are added the same way, up to `cap_max`.
    A splat and its copies share its opacity and size as `torchzoo.splatting.relocated` says, and
    start with zero moments. After each step the means get noise

        Sigma xi · sigmoid(-100 (o - min_opacity)) · rate · noise,   xi ~ N(0, I),

    with the full-size learning rate of the means, and the loss gets a share of the mean opacity and
    scale. Scenes are best begun with `init_opacity=0.5` and `init_scale=0.1`.

    Args:
        cap_max: Splats at most.
        min_opacity: Opacity up to which a splat counts as dead.
        noise: Size of the noise.
        growth: Share that is added at a refinement.
        opacity_penalty: Weight of the mean opacity in the loss.
        scale_penalty: Weight of the mean scale in the loss.
        refine_start: Refine after this step; None: 500, scaled, at least 25.
        refine_stop: Refine before this step; None: 25,000, scaled.
        refine_every: Steps between refinements; None: 100, scaled, at least 25.

    Raises:
        ValueError: A negative count, or `refine_every` of 0.

    Example:
        >>> strategy = MCMCStrategy(cap_max=2000)
        >>> strategy.begin(None, steps=300)
        >>> strategy.schedule()
        (25, 250, 25)
    """

    cap_max: int = 1_000_000
    min_opacity: float = 0.005
    noise: float = 5e5
    growth: float = 0.05
    opacity_penalty: float = 0.01
    scale_penalty: float = 0.01

    _full_stop = 25_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap_max < 0:
            raise ValueError(f"cap_max: got {self.cap_max}, expected at least 0")

    def penalty(self, scene: GaussianScene) -> Tensor | float:
        if not scene.num_gaussians:
            return 0.0
        opacity = scene.opacity_logits.sigmoid().mean()
        return self.opacity_penalty * opacity + self.scale_penalty * scene.scales.mean()

    @torch.no_grad()
    def after_step(self, step: TrainStep) -> None:
        if self.is_due(step.number):
            self._relocate(step)
            self._add(step)
        self._shake(step)

    def _relocate(self, step: TrainStep) -> None:
        opacities = step.scene.opacity_logits.sigmoid()
        dead = (opacities <= self.min_opacity).nonzero().squeeze(-1)
        if 0 < len(dead) < len(opacities):
            odds = opacities.index_fill(0, dead, 0.0)
            self._copy(step, odds, len(dead), dead)

    def _add(self, step: TrainStep) -> None:
        count = step.scene.num_gaussians
        more = min(self.cap_max, int((1 + self.growth) * count)) - count
        if more > 0:
            self._copy(step, step.scene.opacity_logits.sigmoid(), more, None)

    def _copy(self, step: TrainStep, odds: Tensor, count: int, dead: Tensor | None) -> None:
        sources = _draw(odds, count, step.generator)
        step.scene.relocate(sources, step.optimizer, dead=dead, min_opacity=self.min_opacity)

    def _shake(self, step: TrainStep) -> None:
        scene = step.scene
        noise = torch.randn(
            scene.means.shape,
            generator=step.generator,
            device=scene.means.device,
            dtype=scene.means.dtype,
        )
        loose = (-100 * (scene.opacity_logits.sigmoid() - self.min_opacity)).sigmoid()
        noise *= loose[:, None] * (step.means_rate * self.noise)
        scene.means.add_((scene.covariances() @ noise[..., None]).squeeze(-1))


def _draw(odds: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` draws with replacement, of any number of rows (multinomial takes 2^24)."""
    total = odds.double().cumsum(0)
    place = torch.rand(count, generator=generator, device=odds.device, dtype=torch.float64)
    return torch.searchsorted(total, place * total[-1], right=True).clamp_max(len(odds) - 1)
