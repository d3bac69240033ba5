"""Paper 40: do EvoNorm layers outperform BatchNorm and GroupNorm in a small residual net?

A pre-activation residual net on digits is trained with one kind of norm and activation after
another, at a large and a small batch, from the same initial weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.activations import EvoNormB0, EvoNormS0
from torchzoo.data.digits import digits
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.trainer import accuracy

GROUP = 4
BATCHES = (128, 8)
VALIDATION_SEED = 1000
"""Learning rates are chosen with this seed, which no trial has."""

ARMS: Mapping[str, Callable[[int], nn.Module]] = {
    "BN+ReLU": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
    "BN+SiLU": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.SiLU()),
    "GN+ReLU": lambda c: nn.Sequential(nn.GroupNorm(c // GROUP, c), nn.ReLU()),
    "GN+SiLU": lambda c: nn.Sequential(nn.GroupNorm(c // GROUP, c), nn.SiLU()),
    "LN+SiLU": lambda c: nn.Sequential(nn.GroupNorm(1, c), nn.SiLU()),
    "EvoNorm-B0": EvoNormB0,
    "EvoNorm-S0": lambda c: EvoNormS0(c, group_size=GROUP),
}
COMPARISONS = (
    ("EvoNorm-B0", "BN+ReLU"),
    ("EvoNorm-S0", "GN+ReLU"),
    ("EvoNorm-S0", "GN+SiLU"),
)


class Block(nn.Module):
    """Pre-activation residual block: norm, activation, convolution, twice."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        skip = x if self.skip is None else self.skip(y)
        return self.conv2(self.norm2(self.conv1(y))) + skip


def build(arm: str, seed: int) -> nn.Sequential:
    """The net of an arm; convolutions and classifier are the same for all arms of a seed."""
    torch.manual_seed(seed)  # no norm draws
    norm = ARMS[arm]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1, bias=False),
        Block(8, 8, norm),
        Block(8, 16, norm),
        Block(16, 32, norm),
        norm(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def train(
    arm: str, seed: int, x: Tensor, y: Tensor, *, lr: float, batch: int, epochs: int
) -> nn.Module:
    """SGD with momentum 0.9; the learning rate is that at batch 128, scaled with the batch."""
    model = build(arm, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr * batch / BATCHES[0], momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in order.split(batch):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model


@cache
def chosen_lr(arm: str, rates: tuple[float, ...], images: int, epochs: int) -> float:
    """The rate of highest accuracy on a validation split; the lowest of several."""
    data = digits(seed=VALIDATION_SEED)
    x, y = data.train_x[:images], data.train_y[:images]
    held_x, held_y = data.train_x[images:], data.train_y[images:]

    def score(lr: float) -> float:
        options: dict[str, Any] = {"lr": lr, "batch": BATCHES[0], "epochs": epochs}
        return accuracy(train(arm, VALIDATION_SEED, x, y, **options), held_x, held_y)

    return max(rates, key=score)


@torch.no_grad()
def feature_mean(model: nn.Module, x: Tensor) -> float:
    """Mean of the features before pooling, in units of their deviation."""
    model.eval()
    features = model[:5](x)  # type: ignore[index]
    return float(features.mean() / features.std())


def trial(context: Context) -> dict[str, float]:
    images, epochs = context.options["images"], context.options["epochs"]
    rates = tuple(context.options["rates"])
    data = digits(seed=context.seed)
    x, y = data.train_x[:images], data.train_y[:images]
    figures = {}
    for arm in ARMS:
        lr = chosen_lr(arm, rates, images, epochs)
        figures[f"{arm}: learning rate"] = lr
        for batch in BATCHES:
            context.progress(f"{arm}, batches of {batch}")
            model = train(arm, context.seed, x, y, lr=lr, batch=batch, epochs=epochs)
            hits = accuracy(model, data.test_x, data.test_y)
            figures[f"{arm}, batch {batch}"] = 100 * hits
            if arm == "EvoNorm-S0" and batch == BATCHES[0]:
                figures["mean of S0's features over their deviation"] = feature_mean(
                    model, data.test_x
                )
    return figures


def _many_cases(measured: Measurements) -> tuple[bool, str]:
    above, below, behind, texts = 0, 0, False, []
    for batch in BATCHES:
        for ours, theirs in COMPARISONS:
            gain = measured[f"{ours}, batch {batch}"] - measured[f"{theirs}, batch {batch}"]
            above += gain.mean > gain.std_error
            below += gain.mean < -gain.std_error
            behind |= ours == "EvoNorm-B0" and gain.mean < -gain.std_error
            texts.append(f"{gain.name}: {gain}")
    mean = measured["mean of S0's features over their deviation"]
    changes = ", ".join(f"{arm} {_change(measured, arm):+.2f}" for arm in ARMS)
    text = f"{above} above, {below} below. " + "; ".join(texts)
    text += f". From batch 128 to 8: {changes}. S0 does not centre: {mean.name} {mean}"
    return bool(above > below and not behind), text


def _change(measured: Measurements, arm: str) -> float:
    large, small = (measured[f"{arm}, batch {batch}"] for batch in BATCHES)
    return (small - large).mean


def plot(measured: Measurements, figure: Any) -> None:
    """Test accuracy of each arm at both batch sizes, seed by seed."""
    axes = figure.subplots()
    for batch, colour, shift in zip(
        BATCHES, ("tab:blue", "tab:orange"), (-0.12, 0.12), strict=True
    ):
        for place, arm in enumerate(ARMS):
            values = measured[f"{arm}, batch {batch}"].values
            x = [place + shift] * len(values)
            axes.plot(x, values, "o", color=colour, alpha=0.5, ms=5)
            axes.plot(
                place + shift, measured[f"{arm}, batch {batch}"].mean, "_", color=colour, ms=18
            )
        axes.plot([], [], "o", color=colour, label=f"batches of {batch}")
    axes.set_xticks(range(len(ARMS)), list(ARMS))
    axes.set_ylabel("test accuracy, %")
    axes.set_title("digits, small residual net: seeds (dots) and their mean (lines)", fontsize=10)
    axes.legend()
    axes.grid(axis="y", alpha=0.3)


EXPERIMENT = Experiment(
    paper=40,
    claim=Claim(
        statement=(
            "EvoNorm layers work well in ResNets, MobileNets and EfficientNets, transfer to Mask "
            "R-CNN and BigGAN, and outperform BatchNorm and GroupNorm layers in many cases."
        ),
        figure="B0 and S0 above BatchNorm and GroupNorm in many cases",
        source="abstract",
    ),
    setup=(
        "Digits of 8×8 pixels, 768 training images; a pre-activation residual net with three "
        "blocks of 8, 16 and 32 channels, groups of 4 channels; 5 epochs of SGD with momentum 0.9, "
        "batches of 128 and of 8. The learning rate of each arm is the best of three at batches of "
        "128 on a split of its own, and proportional to the batch. All arms of a seed share the "
        "initial convolutions and the order of the images."
    ),
    baseline="BatchNorm and GroupNorm with ReLU or SiLU in the same net, with their own rate",
    criteria=(
        Criterion(
            "of six comparisons (B0 with BN+ReLU, S0 with GN+ReLU and GN+SiLU, batches of 128 and "
            "8) more are above one standard error of the paired difference than below minus one, "
            "and B0 is below BN+ReLU by that at neither batch size",
            _many_cases,
        ),
    ),
    budgets={
        "full": {"seeds": 3, "images": 768, "epochs": 5, "rates": [0.03, 0.1, 0.3]},
        "smoke": {"seeds": 1, "images": 64, "epochs": 1, "rates": [0.1]},
    },
    trial=trial,
    plot=plot,
)
