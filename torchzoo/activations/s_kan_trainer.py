"""The three phases of training an S-KAN: all families, a choice, what was chosen alone.

Z. Yang, J. Zhang, X. Luo, Z. Lu and L. Shen, Activation Space Selectable Kolmogorov-Arnold
Networks, 2024. For T1 steps all families train with free gates. For T2 steps the gates are
softmax(w / tau), tau falling geometrically, and the mean entropy of a node's gates is penalised.
Then each node keeps the family of its largest gate, and what is left trains for T3 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.activations.basis import check_count
from torchzoo.activations.pooled import SELECTIVE
from torchzoo.activations.s_kan import SKANLinear
from torchzoo.surgery import find, replace


class Callbacks(NamedTuple):
    """What a training loop calls.

    Attributes:
        on_step: Call before each step with its number from 0; true where parameters have been
            replaced, so that the optimizer must be made anew.
        penalty: Gives what to add to the loss, a scalar.
    """

    on_step: Callable[[int], bool]
    penalty: Callable[[], Tensor]


class Fit(NamedTuple):
    """What `SKANTrainer.fit` saw.

    Attributes:
        losses: The loss of each step, without the penalty.
        entropies: The mean entropy of a node's gates at the steps of phase 2.
        jump: By what the loss rose with the first step of phase 2.
    """

    losses: list[float]
    entropies: list[float]
    jump: float


class SKANTrainer:
    """Takes all `SKANLinear` layers of a model through the phases.

    Args:
        model: A model with such layers, changed in place, or one such layer; after pruning it is
            `trainer.model`, which for a single layer is another one.
        steps: Steps of the phases, T1, T2 and T3.
        tau: Temperature at the first and the last step of phase 2.
        entropy_weight: Weight of the mean entropy of the gates in phase 2.
        hard: One-hot gates in phase 2, with the gradient of the softmax: what is pruned then is not
            in use any more, so that pruning leaves the loss as it is.

    Raises:
        ValueError: Steps that are not three counts (the second at least 1), temperatures or a
            weight out of range, or a model without such a layer.

    Example:
        >>> from torchzoo.activations import SKAN
        >>> x = 2 * torch.rand(64, 2) - 1
        >>> trainer = SKANTrainer(SKAN((2, 3, 1)), steps=(5, 5, 5))
        >>> loss = lambda model, x: (model(x)[:, 0] - x.prod(-1)).square().mean()
        >>> fit = trainer.fit(loss, (x,), lr=1e-2)
        >>> len(fit.losses), trainer.model.layers[0].phase
        (15, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        steps: tuple[int, int, int],
        tau: tuple[float, float] = (1.0, 0.1),
        entropy_weight: float = 1e-3,
        *,
        hard: bool = False,
    ) -> None:
        if len(steps) != 3:
            raise ValueError(f"steps: expected three counts, got {steps!r}")
        for count, least in zip(steps, (0, 1, 0), strict=True):
            check_count("steps", count, least)
        if len(tau) != 2 or not min(tau) > 0:
            raise ValueError(f"tau: expected two numbers above 0, got {tau!r}")
        if not entropy_weight >= 0:
            raise ValueError(f"entropy_weight: expected at least 0, got {entropy_weight!r}")
        self.model, self.steps, self.tau = model, steps, tau
        self.entropy_weight, self.hard = entropy_weight, hard
        if not self._layers():
            raise ValueError("model: expected one with SKANLinear layers, got none")

    def _layers(self) -> list[SKANLinear]:
        return [m for m in find(self.model, SKANLinear).values() if isinstance(m, SKANLinear)]

    def temperature(self, step: int) -> float:
        """The temperature at a step, which counts from the start of phase 1."""
        first, last = self.tau
        share = min(max(step - self.steps[0], 0) / max(self.steps[1] - 1, 1), 1.0)
        return first * (last / first) ** share

    def on_step(self, step: int) -> bool:
        """Set the phase for a step; whether the model was pruned for it."""
        layers = self._layers()
        if not layers or step < self.steps[0]:
            return False
        last = self.steps[0] + self.steps[1] - 1
        for layer in layers:
            layer.select(self.temperature(min(step, last)), hard=self.hard)
        if step <= last:
            return False
        if isinstance(self.model, SKANLinear):
            self.model = self.model.prune()
        else:
            replace(self.model, SKANLinear, lambda layer: layer.prune())  # type: ignore[operator]
        return True

    def entropy(self) -> Tensor:
        """Mean over the layers of the mean entropy of a node's gates."""
        return torch.stack([layer.selection_entropy() for layer in self._layers()]).mean()

    def penalty(self) -> Tensor:
        """In phase 2 the weighted entropy, else 0."""
        layers = self._layers()
        if not layers or layers[0].phase != SELECTIVE:
            return torch.zeros(())
        return self.entropy_weight * self.entropy()

    def callbacks(self) -> Callbacks:
        """`on_step` and `penalty`, for a training loop of any kind."""
        return Callbacks(self.on_step, self.penalty)

    def fit(
        self,
        loss: Callable[..., Tensor],
        tensors: Sequence[Tensor],
        *,
        lr: float = 1e-2,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Fit:
        """Train with Adam through all phases; the model is pruned in the end, even if T3 = 0.

        Args:
            loss: Called as `loss(model, *batch)`, gives a scalar.
            tensors: The data, rows aligned.
            lr: Learning rate.
            batch_size: Rows a step, drawn without replacement; None for all.
            generator: Draws the rows.

        Returns:
            Losses, entropies, and the jump of the loss where the choice begins.
        """
        choosing = range(self.steps[0], self.steps[0] + self.steps[1])
        losses, entropies = [], []
        optimizer = _adam(self.model, lr)
        for step in range(sum(self.steps)):
            if self.on_step(step):
                optimizer = _adam(self.model, lr)
            if step in choosing:
                entropies.append(float(self.entropy().detach()))
            batch = tensors
            if batch_size is not None:
                rows = torch.randperm(len(tensors[0]), generator=generator)[:batch_size]
                batch = [tensor[rows.to(tensor.device)] for tensor in tensors]
            value = loss(self.model, *batch)
            optimizer.zero_grad(set_to_none=True)
            (value + self.penalty().to(value)).backward()
            optimizer.step()
            losses.append(float(value.detach()))
        self.on_step(sum(self.steps))
        before = losses[self.steps[0] - 1] if self.steps[0] else losses[0]
        return Fit(losses, entropies, losses[self.steps[0]] - before)


def _adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr, foreach=True)
