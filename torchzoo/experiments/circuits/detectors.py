"""Detectors of digits and of their attributes, the rules that tie them, and an attack on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.circuits import KnowledgeCircuit
from torchzoo.trainer import fit

ATTRIBUTES = {
    "has a loop": (0, 6, 8, 9),
    "even": (0, 2, 4, 6, 8),
    "at least 5": (5, 6, 7, 8, 9),
    "prime": (2, 3, 5, 7),
    "curved top": (0, 2, 3, 8, 9),
    "straight stroke": (1, 4, 7),
}
CLASSES, KNOWN = 10, len(ATTRIBUTES)
SIGMA = 0.25
"""Standard deviation of the noise, in training and in smoothing."""
WEIGHTS = (0.25, 0.5, 1.0, 2.0)


def attribute_table() -> Tensor:
    """`(10, 6)` bool, the attributes of each digit."""
    return torch.tensor([[c in own for own in ATTRIBUTES.values()] for c in range(CLASSES)])


def rules(weight: float) -> list[tuple[int, int, float]]:
    """All 60 rules: a class implies each attribute, or that it is absent."""
    return [
        (c, CLASSES + a if has else ~(CLASSES + a), weight)
        for c, row in enumerate(attribute_table().tolist())
        for a, has in enumerate(row)
    ]


class Detectors(nn.Module):
    """Nets of one hidden layer, side by side: a class model, and one net for each attribute."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        nets = 1 + 2 * KNOWN
        self.first = nn.Parameter(torch.randn(nets, 64, hidden) / 8)
        self.bias = nn.Parameter(torch.zeros(nets, 1, hidden))
        self.classes = nn.Linear(hidden, CLASSES)
        self.last = nn.Parameter(torch.randn(2 * KNOWN, hidden, 1) / hidden**0.5)
        self.last_bias = nn.Parameter(torch.zeros(2 * KNOWN, 1, 1))

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the classes `(B, 10)`, and of attributes by their own and by permuted labels."""
        hidden = torch.baddbmm(self.bias, x.expand(len(self.first), -1, -1), self.first).relu()
        known = torch.baddbmm(self.last_bias, hidden[1:], self.last)[..., 0].T
        return self.classes(hidden[0]), known

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 22)`, probabilities."""
        classes, known = self.logits(x)
        return torch.cat([classes.softmax(-1), known.sigmoid()], -1)


def train(x: Tensor, y: Tensor, epochs: int) -> Detectors:
    """Fit all detectors to images with noise."""
    known = attribute_table()[y]
    targets = torch.cat([known, known[torch.randperm(len(y))]], 1).float()

    def loss(model: nn.Module, x: Tensor, y: Tensor, targets: Tensor) -> Tensor:
        assert isinstance(model, Detectors)
        classes, known = model.logits(x + SIGMA * torch.randn_like(x))
        attributes = F.binary_cross_entropy_with_logits(known, targets, reduction="none")
        return F.cross_entropy(classes, y) + attributes.mean(0).sum()

    model = Detectors()
    fit(model, loss, (x, y, targets), epochs=epochs, batch_size=128, lr=5e-3, weight_decay=1e-2)
    return model


def choose_weight(pi: Tensor, y: Tensor) -> float:
    """The weight of the rules under which training labels are likeliest."""

    def loss(weight: float) -> float:
        p = KnowledgeCircuit(CLASSES + KNOWN, rules(weight))(pi)[:, :CLASSES]
        return F.nll_loss((p / p.sum(1, keepdim=True)).log(), y).item()

    return min(WEIGHTS, key=loss)


def attack(
    model: nn.Module,
    correct: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    radius: float,
    steps: int,
    copies: int = 8,
) -> Tensor:
    """Projected gradient in the l2 ball: lower the smoothed, corrected chance of the true class."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        noisy = x + delta + SIGMA * torch.randn(copies, *x.shape)
        pi = model(noisy.flatten(0, 1)).unflatten(0, (copies, -1)).mean(0)
        chance = correct(pi).gather(1, y[:, None])
        (slope,) = torch.autograd.grad(chance.log().sum(), delta)
        with torch.no_grad():
            way = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
            delta = delta - 2.5 * radius / steps * way
            size = delta.norm(dim=1, keepdim=True).clamp_min(1e-12)
            delta = delta * (radius / size).clamp_max(1)
    return x + delta.detach()
