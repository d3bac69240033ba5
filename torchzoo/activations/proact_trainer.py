"""Progressive training of the bounds of clipped activations, one layer after another.

S. Mousavi, M. H. Ahmadilivani, J. Raik, M. Jenihhin and M. Daneshtalab, "ProAct: Progressive
Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs", 2024. All but the
bounds stands still. Layers are visited from the last to the first; each one's bounds are trained by
Adam on the cross-entropy to the labels plus that to the fault-free network's output, with L2 decay
in the gradient that makes them shrink, for a list of decays from strong to weak. An epoch after
which the validation accuracy is within a tolerance of where it started is kept; else the bounds go
back to the last that were kept, and the next decay takes its turn.

Deviations: evaluation mode throughout, where the authors' loop lets statistics of normalisation
drift; bounds of single neurons learn at 0.001 and those of layers at 0.01, as the authors' code
means to set, with a warm-up over the first twentieth of the steps and a cosine after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.activations.faults import predictions
from torchzoo.activations.proact import HybridClippedReLU
from torchzoo.activations.proact_bounds import SMALLEST_BOUND, called_in_order

DECAYS = tuple(4.0 * 10.0**-k for k in range(5, 16))
LAYER_RATE, NEURON_RATE, WARM_UP = 0.01, 0.001, 0.05


class LayerReport(NamedTuple):
    """What training did to one layer.

    Attributes:
        name: The layer.
        initial: Bounds before.
        final: Bounds after.
        accepted: The decays of which at least one epoch was kept.
    """

    name: str
    initial: Tensor
    final: Tensor
    accepted: tuple[float, ...]


class ProActReport(NamedTuple):
    """What training did.

    Attributes:
        layers: The layers in the order in which they were visited.
        initial: Accuracy on the validation data before, in percent.
        final: After.
    """

    layers: tuple[LayerReport, ...]
    initial: float
    final: float


class ProActTrainer:
    """Makes the bounds of a network's `HybridClippedReLU` as tight as its accuracy allows.

    Args:
        model: The network, its activations converted by `convert_clipped`.
        reference: The network as it was before, without faults.
        tolerance: By how many percentage points the validation accuracy may differ.
        decays: L2 decays of the bounds, in the order in which they are tried.
        epochs: At most so many for each layer and decay.
        progressive: Whether layers take turns; else all bounds are trained at once.

    Raises:
        ValueError: `tolerance` is negative, `epochs` below 1, or the model has no such activation,
            or one whose bound can't learn.

    Source:
        S. Mousavi, M. H. Ahmadilivani, J. Raik, M. Jenihhin and M. Daneshtalab, "ProAct:
        Progressive Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs",
        2024: progressive training.

    Example:
        >>> from copy import deepcopy
        >>> from torchzoo.activations import convert_clipped, range_bounds
        >>> plain = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = [(torch.randn(16, 2), torch.randint(2, (16,)))]
        >>> model = deepcopy(plain)
        >>> _ = convert_clipped(model, range_bounds(plain, data))
        >>> trainer = ProActTrainer(model, plain, decays=(4e-5,), epochs=2)
        >>> [layer.name for layer in trainer.fit(data, data).layers]
        ['1']
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        *,
        tolerance: float = 0.2,
        decays: Sequence[float] = DECAYS,
        epochs: int = 100,
        progressive: bool = True,
    ):
        if not tolerance >= 0:
            raise ValueError(f"tolerance: expected percentage points ≥ 0, got {tolerance}")
        if epochs < 1:
            raise ValueError(f"epochs: expected 1 or more, got {epochs}")
        layers = [m for m in model.modules() if isinstance(m, HybridClippedReLU)]
        if not layers or any(m.hard or not isinstance(m.bound, nn.Parameter) for m in layers):
            raise ValueError(
                f"model: expected HybridClippedReLU with bounds that learn, got {layers}"
            )
        self.model, self.reference = model, reference
        self.tolerance, self.decays, self.epochs = tolerance, tuple(decays), epochs
        self.progressive = progressive

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy to the labels, plus that to the reference's probabilities."""
        logits = self.model(x)
        with torch.no_grad():
            soft = self.reference(x).softmax(-1)
        return F.cross_entropy(logits, y) + F.cross_entropy(logits, soft)

    def fit(self, train: Any, val: Any) -> ProActReport:
        """Train the bounds; both networks are in evaluation mode meanwhile.

        Args:
            train: Batches `(x, y)` with a length, gone through once an epoch.
            val: Batches `(x, y)` that the accuracy is measured on.

        Returns:
            What came of it.

        Raises:
            ValueError: No batch comes.
        """
        modes = [(network, network.training) for network in (self.model, self.reference)]
        for network, _ in modes:
            network.eval()
        try:
            return self._fit(train, val)
        finally:
            for network, training in modes:
                network.train(training)

    def _fit(self, train: Any, val: Any) -> ProActReport:
        start = self._accuracy(val)
        names = called_in_order(self.model, next(iter(train))[0], HybridClippedReLU)[::-1]
        bounds = {name: self.model.get_parameter(f"{name}.bound") for name in names}
        initial = {name: bound.detach().clone() for name, bound in bounds.items()}
        layers = []
        for group in [[name] for name in names] if self.progressive else [names]:
            trained = [bounds[name] for name in group]
            accepted = tuple(d for d in self.decays if self._shrink(trained, d, start, train, val))
            layers += [
                LayerReport(name, initial[name], bounds[name].detach().clone(), accepted)
                for name in group
            ]
        return ProActReport(tuple(layers), start, self._accuracy(val))

    def _shrink(
        self, bounds: list[nn.Parameter], decay: float, start: float, train: Any, val: Any
    ) -> int:
        """Train some bounds with one decay; returns how many epochs were kept."""
        rates = [NEURON_RATE if bound.numel() > 1 else LAYER_RATE for bound in bounds]
        groups = [{"params": [b], "lr": lr} for b, lr in zip(bounds, rates, strict=True)]
        optimizer = torch.optim.Adam(groups, weight_decay=decay)
        steps = self.epochs * len(train)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        kept = [bound.detach().clone() for bound in bounds]
        for epoch in range(self.epochs):
            for x, y in train:
                self._step(bounds, optimizer, x, y)
                schedule.step()
            if abs(self._accuracy(val) - start) > self.tolerance:
                with torch.no_grad():
                    for bound, old in zip(bounds, kept, strict=True):
                        bound.copy_(old)
                return epoch
            kept = [bound.detach().clone() for bound in bounds]
        return self.epochs

    def _step(
        self, bounds: list[nn.Parameter], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
    ) -> None:
        grads = torch.autograd.grad(self.loss(x, y), bounds, materialize_grads=True)
        for bound, grad in zip(bounds, grads, strict=True):
            bound.grad = grad
        optimizer.step()
        with torch.no_grad():
            for bound in bounds:
                bound.clamp_(min=SMALLEST_BOUND)
                bound.grad = None

    def _accuracy(self, val: Any) -> float:
        found, labels = predictions(self.model, val)
        return 100 * (found == labels).double().mean().item()


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    warm = math.ceil(WARM_UP * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
