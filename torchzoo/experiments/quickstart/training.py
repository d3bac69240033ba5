"""How every model of the quickstart is trained and judged: one recipe for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.data.streams import place, random_offsets
from torchzoo.experiments.quickstart.model import ZooVisionModel
from torchzoo.moe import load_balance_loss
from torchzoo.trainer import accuracy, fit

BALANCE = 0.01
"""Weight of the load-balance loss of each block."""


@dataclass(frozen=True)
class Recipe:
    """What a training run costs, the same for every model.

    Attributes:
        epochs: Passes over the images; each puts every image at a new random place.
        batch_size: Images a step.
        lr: Learning rate of AdamW.
        weight_decay: Its weight decay.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05

    def steps(self, images: int) -> int:
        """Updates in a run over so many images."""
        return self.epochs * math.ceil(images / self.batch_size)


def objective(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, and for experts the balance of their load."""
    if not isinstance(model, ZooVisionModel):
        return F.cross_entropy(model(images), labels)
    logits, routings = model(images, return_routing=True)
    balance = torch.stack([load_balance_loss(routing) for routing in routings]).sum()
    return F.cross_entropy(logits, labels) + BALANCE * balance


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train on randomly placed images; gates are annealed over the whole run."""
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, batch: Tensor, target: Tensor) -> Tensor:
        offsets = random_offsets(len(batch), generator=generator)
        return objective(model, place(batch, offsets), target)

    fit(
        model,
        loss,
        (images, labels),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        generator=generator,
        on_step=model.anneal if isinstance(model, ZooVisionModel) else None,
        on_epoch=lambda epoch, _: on_epoch(epoch),
    )


def placed(images: Tensor) -> Tensor:
    """Images at places that never change: what a model is judged on."""
    generator = torch.Generator().manual_seed(0)
    return place(images, random_offsets(len(images), generator=generator))


def score(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the placed images that the model puts into their class."""
    return accuracy(model, placed(images), labels)
