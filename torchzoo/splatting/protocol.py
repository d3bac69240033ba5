"""What a densification strategy is asked, and what it sees of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torchzoo.ops.rasterize import RasterOutput
    from torchzoo.splatting.scene import GaussianScene

__all__ = ["DensifyStrategy", "TrainStep"]


@dataclass
class TrainStep:
    """One step of training, as strategies and callbacks see it.

    Attributes:
        number: 1 for the first step.
        scene: The scene.
        optimizer: The Adam that holds its parameters.
        views: Which views the step takes, of all processes, `(B,)`.
        output: What was rendered for this process's share of them.
        target: What `output.image` should be.
        size: Height and width of whole pictures, of which `output.image` may be a part.
        loss: The value that was minimised, over all views.
        scene_scale: Size of the scene, from the cameras.
        means_rate: The full-size learning rate of the means in this step.
        generator: What is random draws from it; the same on every process.
        total: Sums a tensor over the processes.
    """

    number: int
    scene: GaussianScene
    optimizer: Optimizer
    views: Tensor
    output: RasterOutput
    target: Tensor
    size: tuple[int, int]
    scene_scale: float
    means_rate: float
    generator: torch.Generator
    loss: float = math.nan
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor


class DensifyStrategy:
    """The protocol of strategies; this one leaves the number of Gaussians as it is.

    Attributes:
        absgrad: Whether `after_backward` needs `output.info["means2d"].absgrad`.
    """

    absgrad: bool = False

    def begin(self, scene: GaussianScene, steps: int) -> None:
        """Forget earlier runs and get ready for one of so many steps."""

    def penalty(self, scene: GaussianScene) -> Tensor | float:
        """What is added to the loss."""
        return 0.0

    def before_backward(self, step: TrainStep) -> None:
        """Called when the step's views are rendered."""

    def after_backward(self, step: TrainStep) -> None:
        """Called when all gradients are there."""

    def after_step(self, step: TrainStep) -> None:
        """Called when the parameters have been updated; the place for edits."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run has to bring back."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""

    def config(self) -> dict[str, Any]:
        """The options, in plain values, by which two runs are told apart."""
        return {"strategy": type(self).__name__}
