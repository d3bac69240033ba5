"""New classes from few labels: pretrained against from scratch, zoo parts against a transformer.

The four arms get the same labels, the same placement of every image in every epoch and the same
number of updates; figures are taken after the last one. The learning rate of each arm was chosen
by `tune`, from one grid, on training images that no run here is judged on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchzoo.data.digits import DigitsSplit
from torchzoo.experiments.quickstart.baseline import TransformerModel
from torchzoo.experiments.quickstart.model import ZooVisionModel
from torchzoo.experiments.quickstart.training import Recipe, placed, score, train
from torchzoo.hub import from_pretrained

CLASSES = range(5, 10)
LABELS_PER_CLASS = 10
EPOCHS, BATCH = 80, 25
LOOK_EVERY = 4
"""Epochs between two looks at a run; the first and the last epoch are always looked at."""


@dataclass(frozen=True)
class Arm:
    """One of the runs that are compared.

    Attributes:
        key: Its name in report.json.
        title: Its name for a reader.
        zoo: Whether the model is of zoo parts; else it is the transformer.
        weights: The shipped weights to start from; None from scratch.
        lr: The learning rate that validation chose.
    """

    key: str
    title: str
    zoo: bool
    weights: str | None
    lr: float


ARMS = (
    Arm("zoo_pretrained", "zoo parts, pretrained", True, "digits-0-4", 2e-3),
    Arm("zoo_scratch", "zoo parts, from scratch", True, None, 2e-3),
    Arm("transformer_pretrained", "transformer, pretrained", False, "digits-0-4-transformer", 1e-3),
    Arm("transformer_scratch", "transformer, from scratch", False, None, 2e-3),
)


@dataclass
class Run:
    """One fine-tuning run.

    Attributes:
        model: The model after the last update.
        epochs: Epochs done at each look.
        accuracy: Test accuracy at each look.
        temperature: Temperature of the gates at each look; empty without gates.
        load: For each look and block, the share of the used slots that each expert has.
        active: For each look, experts that a token uses, averaged over tokens and blocks.
    """

    model: ZooVisionModel | TransformerModel
    epochs: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    load: list[list[list[float]]] = field(default_factory=list)
    active: list[float] = field(default_factory=list)


def few_labels(data: DigitsSplit, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """`per_class` training images of each class, drawn by the seed, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train_y), generator=generator)
    labels = data.train_y[order]
    kept = torch.cat([order[labels == label][:per_class] for label in labels.unique()])
    return data.train_x[kept], data.train_y[kept]


def start(arm: Arm, recipe: Recipe, images: int) -> ZooVisionModel | TransformerModel:
    """The arm's model before its first update: new head, dense gates."""
    gates: dict[str, Any] = {"anneal_steps": recipe.steps(images)} if arm.zoo else {}
    if arm.weights is None:
        return (ZooVisionModel if arm.zoo else TransformerModel)(len(CLASSES), **gates)
    model = from_pretrained(arm.weights, **gates)
    assert isinstance(model, ZooVisionModel | TransformerModel)
    model.start_over()
    return model


def finetune(
    arm: Arm,
    data: DigitsSplit,
    *,
    seed: int,
    epochs: int = EPOCHS,
    lr: float | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[], None] = lambda: None,
) -> Run:
    """Fine-tune one arm and follow it.

    Args:
        arm: What to fine-tune.
        data: Digits of `CLASSES`; the few labels come from its training side, the accuracy from
            its test side.
        seed: Seed of the choice of labels, the fresh weights, and the places of the images.
        epochs: Passes over the few labelled images.
        lr: Replaces the arm's learning rate.
        device: Where to train.
        on_epoch: Called after each epoch.
    """
    recipe = Recipe(epochs, BATCH, arm.lr if lr is None else lr)
    images, labels = (part.to(device) for part in few_labels(data, LABELS_PER_CLASS, seed))
    test_x, test_y = data.test_x.to(device), data.test_y.to(device)
    torch.manual_seed(seed)
    run = Run(start(arm, recipe, len(images)).to(device))

    def follow(epoch: int) -> None:
        if epoch % LOOK_EVERY == 0 or epoch == epochs - 1:
            run.epochs.append(epoch + 1)
            run.accuracy.append(score(run.model, test_x, test_y))
            if isinstance(run.model, ZooVisionModel):
                _follow_gates(run, run.model, placed(images))
        on_epoch()

    train(run.model, images, labels, recipe, seed=seed, on_epoch=follow)
    return run


@torch.no_grad()
def _follow_gates(run: Run, model: ZooVisionModel, images: Tensor) -> None:
    _, routings = model(images, return_routing=True)
    loads = torch.stack([routing.load for routing in routings]).double()  # (blocks, experts)
    tokens = routings[0].mask.shape[0]
    run.temperature.append(float(model.gates[0].temperature))
    run.load.append((loads / loads.sum(-1, keepdim=True)).tolist())
    run.active.append(float(loads.sum(-1).mean()) / tokens)
