"""The network whose filters paper 43 prunes in its experiment, and how each arm does it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.data.digits import DigitsSplit
from torchzoo.sparsity import (
    FTWTConv2d,
    ftwt_convert,
    ftwt_recording,
    measured_flops,
    open_gates,
)
from torchzoo.surgery import find

WIDTHS = (16, 16, 32, 32)
BATCH, MOMENTUM, WEIGHT_DECAY = 128, 0.9, 5e-4
LEARNING_RATE, HEAD_RATE = 1e-2, 0.1
COOLDOWN = 0.5


def network(widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    """Four convolutions with batch norm, a pooling after the second, mean over space, logits."""
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(zip((1, *widths), widths, strict=False)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        if place == 1:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return nn.Sequential(*layers)


def task_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def refine(
    model: nn.Module,
    data: DigitsSplit,
    epochs: int,
    seed: int,
    extra: Callable[[nn.Module], Tensor] | None = None,
    *,
    freeze: bool = False,
) -> nn.Module:
    """Train on by SGD, heads at their own rate; with `freeze` the backbone alone after a while.

    `extra` is a further loss, of a model that records. Where the heads freeze it is left out.
    """
    heads = {
        id(p)
        for f in find(model, FTWTConv2d).values()
        for p in f.get_submodule("predictor").parameters()
    }
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in heads]},
        {"params": [p for p in model.parameters() if id(p) in heads], "lr": HEAD_RATE},
    ]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        frozen = freeze and epoch >= COOLDOWN * epochs
        for p in groups[1]["params"]:
            p.requires_grad_(not frozen)
        for index in torch.randperm(len(data.train_x), generator=generator).split(BATCH):
            x, y = data.train_x[index], data.train_y[index]
            optimizer.zero_grad()
            if extra is None or frozen:
                loss = task_loss(model, x, y)
            else:
                with ftwt_recording(model):
                    loss = task_loss(model, x, y) + extra(model)
            loss.backward()
            optimizer.step()
    return model.eval()


def sparsity_penalty(model: nn.Module, weight: float) -> Tensor:
    """How open the gates are: the sum of their sigmoids, its mean over images and layers."""
    logits = [f.logits for f in find(model, FTWTConv2d).values() if isinstance(f, FTWTConv2d)]
    sums = [g.sigmoid().sum(-1).mean() for g in logits if g is not None]
    return weight * torch.stack(sums).mean()


def gated(dense: nn.Module, data: DigitsSplit, threshold: float, mode: str) -> nn.Module:
    """The dense model with masks that let everything through."""
    model = copy.deepcopy(dense)
    ftwt_convert(model, threshold, mode=mode)
    batches = list(data.train_x.split(BATCH))
    open_gates(model, 4 * batches)
    return model


def pruned(dense: nn.Sequential, kept: float) -> nn.Sequential:
    """The dense model without the filters of the smallest L1 norm, the same share of each layer."""
    model = network(tuple(max(1, round(kept * width)) for width in WIDTHS))
    columns = torch.arange(1)
    for old, new in zip(dense, model, strict=True):
        if isinstance(old, nn.Conv2d) and isinstance(new, nn.Conv2d):
            strength = old.weight.detach().abs().sum((1, 2, 3))
            rows = strength.topk(new.out_channels).indices.sort().values
            new.weight.data = old.weight.data[rows][:, columns].clone()
            assert old.bias is not None
            assert new.bias is not None
            new.bias.data = old.bias.data[rows].clone()
            columns = rows
        elif isinstance(old, nn.BatchNorm2d):
            state = {k: v[columns] if v.ndim else v for k, v in old.state_dict().items()}
            new.load_state_dict(state)
        elif isinstance(old, nn.Linear) and isinstance(new, nn.Linear):
            new.load_state_dict({"weight": old.weight[:, columns], "bias": old.bias})
    return model


def multiplications(model: nn.Module, images: Tensor) -> float:
    """What the convolutions of a model without masks do for an image, dead channels left out."""
    model = copy.deepcopy(model)
    for place in ftwt_convert(model).names:
        model.get_submodule(place).gate = "open"  # type: ignore[assignment]
    return measured_flops(model, [images]).macs
