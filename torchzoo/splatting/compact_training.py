"""How a compact scene is trained: what is added to density control, and learning rates.

Source: Lee et al., "Compact 3D Gaussian Representation for Radiance Field", 2024, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchzoo.splatting.compact import Compact3DGS
from torchzoo.splatting.protocol import TrainStep
from torchzoo.splatting.scene import GaussianScene
from torchzoo.splatting.schedules import SHORT_STEPS, scaled_steps
from torchzoo.splatting.strategy import DefaultStrategy

__all__ = ["CompactStrategy", "color_decay", "compact_rates"]

COLOR_MILESTONES = (5_000, 15_000, 25_000)


def compact_rates(steps: int) -> dict[str, float]:
    """Learning rates of what only compact scenes have, for a run of so many steps.

    A mask must be able to close: from a logit of 1 to -4.6 Adam takes 560 steps at the full-size
    rate of 0.01, so short runs have ten times that.
    """
    mask = 0.1 if steps < SHORT_STEPS else 0.01
    return {"mask_logits": mask, "color": 0.01, "scale_vq": 1e-4, "rotation_vq": 1e-4}


def color_decay(done: int, steps: int) -> float:
    """Factor of the field's rate after `done` of `steps` steps.

    It rises from 0.01 to 1 in 100 steps and falls to a third after 5,000, 15,000 and 25,000, where
    the run has 30,000; in shorter ones the rise takes 10 steps at least.

    Example:
        >>> [round(color_decay(done, 30_000), 4) for done in (0, 50, 100, 5_000, 25_000)]
        [0.01, 0.505, 1.0, 0.33, 0.0359]
    """
    rise = 0.01 + 0.99 * min(1.0, done / scaled_steps(100, steps, 10))
    falls = sum(done >= scaled_steps(milestone, steps) for milestone in COLOR_MILESTONES)
    return rise * 0.33**falls


@dataclass(kw_only=True, eq=False)
class CompactStrategy(DefaultStrategy):
    """Density control of a `Compact3DGS` whose masks and codebooks learn as well.

    The loss gets `mask_weight` times the mean sigmoid of the masks, and the codebooks' loss once
    they have begun. Splats whose masks have closed go at every refinement, then every 1,000 steps,
    scaled, and at the end. The rate of the field follows `color_decay`.

    Args:
        mask_weight: Weight of the masks; None: 5e-4, and 1.5 / steps in runs below 3,000 steps,
            which keeps the way that masks drift.
        vq_start: Step after which codebooks begin; None: the last thirtieth of the run has them,
            and the last tenth of runs below 3,000 steps.

    Raises:
        ValueError: A negative count or weight, or `refine_every` of 0.

    Example:
        >>> strategy = CompactStrategy(cap_max=4000)
        >>> strategy.begin(Compact3DGS(10), steps=400)
        >>> strategy.weight, strategy.codebooks_from
        (0.00375, 360)
    """

    mask_weight: float | None = None
    vq_start: int | None = None
    _scene: Compact3DGS | None = field(default=None, init=False, repr=False)
    _hooked: Optimizer | None = field(default=None, init=False, repr=False)
    _done: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mask_weight", "vq_start"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value}, expected at least 0")

    @property
    def weight(self) -> float:
        """What the mean of the masks is multiplied by."""
        if self.mask_weight is not None:
            return self.mask_weight
        return 1.5 / self._steps if self._steps < SHORT_STEPS else 5e-4

    @property
    def codebooks_from(self) -> int:
        """The step after which codebooks begin."""
        if self.vq_start is not None:
            return self.vq_start
        if self._steps < SHORT_STEPS:
            return round(0.9 * self._steps)
        return scaled_steps(29_000, self._steps)

    def begin(self, scene: GaussianScene, steps: int) -> None:
        super().begin(scene, steps)
        if not isinstance(scene, Compact3DGS) or scene.frozen:
            raise ValueError(f"scene: got {type(scene).__name__}, expected an open Compact3DGS")
        self._scene, self._hooked = scene, None

    def penalty(self, scene: GaussianScene) -> Tensor | float:
        compact = cast(Compact3DGS, scene)
        total = self.weight * compact.mask_logits.sigmoid().sum() / max(compact.num_gaussians, 1)
        return total + compact.codebook_loss() if compact.use_vq else total

    def after_backward(self, step: TrainStep) -> None:
        super().after_backward(step)
        self._done = step.number - 1
        if self._hooked is not step.optimizer:  # a resumed run has a new one
            step.optimizer.register_step_pre_hook(self._set_color_rate)
            self._hooked = step.optimizer

    def _set_color_rate(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group["name"].startswith("color."):
                group["lr"] *= color_decay(self._done, self._steps)

    @torch.no_grad()
    def after_step(self, step: TrainStep) -> None:
        super().after_step(step)
        scene = cast(Compact3DGS, step.scene)
        late = step.number >= self.schedule()[1]
        every = scaled_steps(1000, self._steps)
        last = step.number == self._steps
        if self.is_due(step.number) or last or (late and step.number % every == 0):
            kept = scene.kept
            if not kept.all():
                scene.keep(kept, step.optimizer)
        if step.number == self.codebooks_from and scene.num_gaussians:
            scene.start_vq(generator=step.generator)

    def state_dict(self) -> dict[str, Tensor]:
        assert self._scene is not None  # begin comes first
        return {**super().state_dict(), "use_vq": torch.tensor(self._scene.use_vq)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        assert self._scene is not None
        self._scene.use_vq = bool(state["use_vq"])
