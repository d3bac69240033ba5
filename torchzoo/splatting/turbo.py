"""Fitting scenes in fewer steps: where splats are added, how many, and which.

T. Lu, A. Dhiman, R. Srinath, E. Arslan, A. Xing, Y. Xiangli, R. V. Babu and S. Sridhar, "Turbo-GS:
Accelerating 3D Gaussian Fitting for High-Quality Radiance Fields", 2024 (arXiv 2412.13547; another
work of 2026 has the same name). It is a way to train, not another scene, and its parts can be had
one by one: candidates by the gradients of places and of colours, a number of splats that follows
the convergence (`ConvergenceBudget`), only splats that are seen often, more points to begin with
(`densify_points`), pictures of every d-th pixel and, at the end, several views a step (`dilation`
and `final_batch` of `SplatTrainer`).

What the paper leaves open and is ours: splats that only their colour makes candidates are cloned or
split by their size, as the others are; "often" is half the median; the points are midpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchzoo import ops
from torchzoo.splatting.protocol import TrainStep
from torchzoo.splatting.strategy import DefaultStrategy
from torchzoo.splatting.turbo_budget import ConvergenceBudget

if TYPE_CHECKING:
    from torchzoo.splatting.scene import GaussianScene

__all__ = ["TurboStrategy", "densify_points"]

SENSITIVITY_SHARE = 10
"""Sensitivities are summed over the last one in so many of the steps before the pruning."""


def densify_points(xyz: Tensor, rgb: Tensor, *, factor: float = 2.0) -> tuple[Tensor, Tensor]:
    """More points to begin with: midpoints between neighbours that are far apart.

    Points whose nearest neighbour is further away than the median get the midpoint to it, round by
    round, until there are `factor` times as many as at first, or none is further than the median.

    Args:
        xyz: Points.
        rgb: Their colours.
        factor: How many times as many there are at least in the end.

    Shape:
        - xyz: `(N, 3)`
        - rgb: `(N, 3)`
        - outputs: `(M, 3)`, the old points first

    Returns:
        Points and colours; a midpoint has the mean of two.

    Raises:
        ValueError: Shapes that don't fit, or a `factor` below 1.

    Source:
        Lu et al., "Turbo-GS", 2024, which densifies by a k-d tree; midpoints are ours.

    Example:
        >>> xyz = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1.25, 0, 0], [3.25, 0, 0]])
        >>> densify_points(xyz, torch.zeros(4, 3), factor=1.5)[0][4:]
        tensor([[0.5000, 0.0000, 0.0000],
                [2.2500, 0.0000, 0.0000]])
    """
    for name, value in (("xyz", xyz), ("rgb", rgb)):
        if value.dim() != 2 or value.shape[1] != 3 or len(value) != len(xyz):
            raise ValueError(f"{name}: got {tuple(value.shape)}, expected ({len(xyz)}, 3)")
    if not factor >= 1:
        raise ValueError(f"factor: got {factor}, expected at least 1")
    goal = factor * len(xyz)
    while 1 < len(xyz) < goal:
        distances, nearest = (x.squeeze(-1) for x in ops.knn(xyz, xyz, 1, exclude_self=True))
        far = (distances > distances.median()).nonzero().squeeze(-1)
        if not len(far):
            break
        # two that are each other's neighbours have one midpoint
        pairs = torch.stack([far, nearest[far]], -1).sort(-1).values.unique(dim=0)
        xyz, rgb = (torch.cat([x, x[pairs].mean(1)]) for x in (xyz, rgb))
    return xyz, rgb


@dataclass(kw_only=True, eq=False)
class TurboStrategy(DefaultStrategy):
    """Densify by place and colour, as much as the convergence allows, where it is looked at often.

    A splat is a candidate if the mean gradient of its place reaches `grow_grad2d` or, at one
    refinement in five, that of its colour `color_ratio` times as much: the length of the loss's
    gradient with respect to the colour that is blended, times the number of views. Of the
    candidates that were visible at least `visit_quantile` times as often as the median of the
    visible ones, those of the highest sum of both gradients, in units of their thresholds, are
    cloned or split as in `DefaultStrategy`, as long as the budget allows. Gradients of colours
    count in that sum where they are asked for.

    Opacities are not reset unless asked for, as the jumps of the loss would upset the budget.

    Args:
        cap_max: Splats at most, and what the budget grows to.
        steps: Steps of the run; None: as many as the trainer does.
        grow_grad2d: Mean gradient of a place at which a splat grows.
        color_ratio: The threshold of the colours' gradients is so many times that.
        color_prob: How often colours are asked for at a refinement.
        visit_quantile: How often a splat that grows is seen, relative to the median.
        budget: How many splats there may be; None: from those at first to `cap_max`.
        prune_share: Share of the splats that is removed once, half-way, those to whose opacity the
            pictures are the least sensitive; 0 for none, 0.6 in the paper. A sensitivity is the sum
            over views, pixels and channels of the squared derivative, estimated by one random
            projection a step over the tenth of the run before, or since the last refinement.
        generator: Where it is drawn from whether colours are asked for; None: the trainer's.

    Raises:
        ValueError: A negative option, a share above 1, `refine_every` of 0; when a run begins, more
            splats than the cap or the budget begin with, or another number of steps than `steps`.

    Source:
        Lu et al., "Turbo-GS: Accelerating 3D Gaussian Fitting for High-Quality Radiance Fields",
        2024 (arXiv 2412.13547).

    Example:
        >>> from torchzoo.splatting import GaussianScene
        >>> strategy = TurboStrategy(cap_max=500, steps=6000)
        >>> strategy.begin(GaussianScene(100), steps=6000)
        >>> strategy.progress(100), strategy.allowed(100), strategy.allowed(1550)
        (0.0, 100, 300)
    """

    cap_max: int = field()
    steps: int | None = None
    grow_grad2d: float = 2e-4
    color_ratio: float = 0.01
    color_prob: float = 0.2
    reset_every: int | None = 0
    visit_quantile: float = 0.5
    budget: ConvergenceBudget | None = None
    prune_share: float = 0.0
    generator: torch.Generator | None = None
    color: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False)
    sensitivity: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False)
    _curve: ConvergenceBudget = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("grow_grad2d", "color_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected above 0")
        for name, most in (("color_prob", 1.0), ("visit_quantile", 1.0), ("prune_share", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 to 1")
        self._curve = self.budget or ConvergenceBudget(0, self.cap_max)

    def begin(self, scene: GaussianScene, steps: int) -> None:
        if self.steps not in (None, steps):
            raise ValueError(f"steps: got {self.steps}, expected those of the run, {steps}")
        count = scene.num_gaussians
        most = self.cap_max if self.budget is None else min(self.budget.n0, self.cap_max)
        if count > most:
            name = "cap_max" if most == self.cap_max else "budget"
            raise ValueError(f"{name}: got {most}, expected at least the scene's {count} splats")
        super().begin(scene, steps)
        self._curve = self.budget or ConvergenceBudget(count, self.cap_max)
        self._curve.reset()
        self.color = self.sensitivity = torch.zeros(0)

    def progress(self, number: int) -> float:
        """How much of the densification is done after step `number`, from 0 to 1."""
        start, stop, _ = self.schedule()
        return min(1.0, max(0.0, (number - start) / max(1, stop - start)))

    def allowed(self, number: int) -> int:
        """How many splats there may be after step `number`, by what is known of the losses."""
        return min(self.cap_max, self._curve.allowed(self.progress(number)))

    def before_backward(self, step: TrainStep) -> None:
        super().before_backward(step)
        colors = step.output.info["colors"]
        if colors.requires_grad:
            colors.retain_grad()
        middle = self._steps // 2
        if self.prune_share and 0 <= middle - step.number < max(
            1, self._steps // SENSITIVITY_SHARE
        ):
            found = step.total(_squared_slopes(step))
            known = self.sensitivity.shape == found.shape
            self.sensitivity = self.sensitivity + found if known else found

    @torch.no_grad()
    def after_backward(self, step: TrainStep) -> None:
        super().after_backward(step)
        if step.number >= self.schedule()[1]:
            return
        self._curve.update(step.number, step.loss)
        found = step.total(self._color_gradients(step))
        known = self.color.shape == found.shape
        self.color = self.color + found if known else found

    def _color_gradients(self, step: TrainStep) -> Tensor:
        """Lengths of the gradients of the colours, summed over the views that see them, `(N,)`."""
        info = step.output.info
        colors, visible = info["colors"], (info["radii"] > 0).all(-1)
        gradient = torch.zeros_like(colors) if colors.grad is None else colors.grad
        if gradient.dim() == 2:  # one colour for all views, whose gradients can't be told apart
            gradient = gradient / len(visible)
        return (gradient.norm(dim=-1) * len(step.views) * visible).sum(0)

    @torch.no_grad()
    def after_step(self, step: TrainStep) -> None:
        if self.prune_share and step.number == self._steps // 2:
            self._prune_insensitive(step)
        super().after_step(step)
        if self.is_due(step.number):
            self.color = self.color.new_zeros(step.scene.num_gaussians)
            self.sensitivity = self.sensitivity.new_zeros(0)

    def select(self, step: TrainStep) -> tuple[Tensor, Tensor]:
        visits = self.count.clamp_min(1)
        score = self.grad2d / visits / self.threshold
        candidates = score >= 1
        if self._asks_for_colors(step):
            shade = self.color / visits / (self.color_ratio * self.threshold)
            candidates |= shade >= 1
            score = score + shade
        candidates &= self._often_seen()
        room = max(0, self.allowed(step.number) - step.scene.num_gaussians)
        order = torch.where(candidates, score, -1.0).argsort(descending=True, stable=True)
        candidates[order[room:]] = False
        small = step.scene.scales.amax(-1) <= self.grow_scale3d * step.scene_scale
        return candidates & small, candidates & ~small

    def _asks_for_colors(self, step: TrainStep) -> bool:
        random = self.generator or step.generator
        return torch.rand((), generator=random, device=random.device).item() < self.color_prob

    def _often_seen(self) -> Tensor:
        """Mask `(N,)` of the splats that were visible often since the last refinement."""
        seen = self.count > 0
        if not seen.any():
            return seen
        return seen & (self.count >= self.visit_quantile * self.count[seen].median())

    def _prune_insensitive(self, step: TrainStep) -> None:
        gone = int(self.prune_share * step.scene.num_gaussians)
        order = self.sensitivity.argsort(stable=True)
        kept = order[gone:].sort().values
        step.scene.keep(kept, step.optimizer)
        if len(self.count) == len(order):
            self.grad2d, self.count, self.color = (
                x[kept] for x in (self.grad2d, self.count, self.color)
            )

    def config(self) -> dict[str, Any]:
        return super().config() | {"budget": repr(self.budget)}

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict() | {"color": self.color, "sensitivity": self.sensitivity}
        state |= {f"budget.{name}": value for name, value in self._curve.state_dict().items()}
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.color, self.sensitivity = state["color"], state["sensitivity"]
        head = "budget."
        self._curve.load_state_dict(
            {name.removeprefix(head): x for name, x in state.items() if name.startswith(head)}
        )
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())


def _squared_slopes(step: TrainStep) -> Tensor:
    """Squares of the derivatives of the pictures by the opacities, summed, `(N,)`; an estimate.

    With random signs v the square of `sum_p v_p dI_p/do` has the wanted sum as its mean. The signs
    depend on the step alone, so that no other draws change.
    """
    image, logits = step.output.image, step.scene.opacity_logits
    assert image is not None  # it is trained on
    if not image.requires_grad:
        return torch.zeros_like(logits)
    random = torch.Generator(image.device).manual_seed(step.number)
    signs = 2.0 * torch.randint(2, image.shape, generator=random, device=image.device) - 1
    (slopes,) = torch.autograd.grad(image, logits, signs.to(image), retain_graph=True)
    opacities = logits.detach().sigmoid()
    return (slopes / (opacities * (1 - opacities)).clamp_min(1e-12)).square()
