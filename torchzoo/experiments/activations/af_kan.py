"""Paper 8: is AF-KAN more accurate than MLPs and other KANs of as many parameters?

Digits, flattened. AF-KAN against an MLP, a ReLU-KAN and a B-spline KAN: of equal size, where the
rivals have fewer hidden units, and of equal structure, where the KANs have many times the weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.activations import AFKAN, BSplineBasis, KANLinear, ReLUProductBasis
from torchzoo.data.digits import digits
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.trainer import accuracy, fit

INPUTS, HIDDEN, CLASSES = 64, 32, 10
RATES = (1e-3, 3e-3, 1e-2)
AF = "AF-KAN"
RIVALS = ("MLP", "ReLU-KAN", "B-spline KAN")
SMALL = {"MLP": 34, "ReLU-KAN": 5, "B-spline KAN": 4}
"""Hidden units with which a rival has just as many parameters as AF-KAN, or a few more."""
ARMS = (AF, *RIVALS, *(f"{name}, small" for name in RIVALS))


def build(arm: str) -> nn.Module:
    """The model of an arm."""
    name, _, small = arm.partition(", ")
    hidden = SMALL[name] if small else HIDDEN
    widths = (INPUTS, hidden), (hidden, CLASSES)
    if name == AF:
        return AFKAN((INPUTS, hidden, CLASSES))
    if name == "MLP":
        return nn.Sequential(
            nn.Linear(*widths[0]), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(*widths[1])
        )
    if name == "ReLU-KAN":
        return nn.Sequential(
            *(KANLinear(*width, ReLUProductBasis(), base_weight=False) for width in widths)
        )
    return nn.Sequential(*(KANLinear(*width, BSplineBasis()) for width in widths))


def train(arm: str, x: Tensor, y: Tensor, *, seed: int, epochs: int, lr: float) -> nn.Module:
    """A model of an arm, trained."""
    torch.manual_seed(seed)
    model = build(arm).to(x.device)
    fit(
        model,
        lambda model, x, y: F.cross_entropy(model(x), y),
        (x, y),
        epochs=epochs,
        batch_size=64,
        lr=lr,
        weight_decay=1e-4,
        generator=torch.Generator().manual_seed(seed),
    )
    return model


@cache
def best_rate(arm: str, train_rows: int, epochs: int) -> float:
    """The arm's learning rate with the best accuracy on a fifth of seed 0's training part."""
    data = digits(seed=0)
    x, y = data.train_x.flatten(1)[:train_rows], data.train_y[:train_rows]
    held = len(x) // 5
    scores = {}
    for lr in RATES:
        model = train(arm, x[held:], y[held:], seed=0, epochs=epochs, lr=lr)
        scores[lr] = accuracy(model, x[:held], y[:held])
    return max(scores, key=lambda lr: scores[lr])


def trial(context: Context) -> Mapping[str, float]:
    """Accuracy, parameters and CPU seconds of every arm, each at its own best learning rate."""
    epochs, rows = context.options["epochs"], context.options["train"]
    data, figures = digits(seed=context.seed), {}
    train_x, test_x = (part.flatten(1).to(context.device) for part in (data.train_x, data.test_x))
    train_y, test_y = data.train_y.to(context.device), data.test_y.to(context.device)
    for arm in ARMS:
        context.progress(arm)
        lr = best_rate(arm, rows, epochs)
        started = time.process_time()
        model = train(arm, train_x[:rows], train_y[:rows], seed=context.seed, epochs=epochs, lr=lr)
        figures[seconds(arm)] = time.process_time() - started
        figures[score(arm)] = accuracy(model, test_x, test_y)
        figures[size(arm)] = sum(p.numel() for p in model.parameters())
        figures[f"{arm}: learning rate"] = lr
    return figures


def score(arm: str) -> str:
    """Name of the figure with an arm's test accuracy."""
    return f"{arm}: accuracy"


def size(arm: str) -> str:
    """Name of the figure with an arm's number of parameters."""
    return f"{arm}: parameters"


def seconds(arm: str) -> str:
    """Name of the figure with the processor's seconds for an arm's training."""
    return f"{arm}: CPU seconds"


def gain(measured: Measurements, rival: str) -> Measurement:
    """AF-KAN's accuracy less a rival's, seed by seed."""
    return measured[score(AF)] - measured[score(rival)]


def beats_equal_size(measured: Measurements) -> tuple[bool, str]:
    """The headline: every rival of as many parameters is behind by more than chance."""
    gains = {name: gain(measured, f"{name}, small") for name in RIVALS}
    text = ", ".join(f"{name} {difference}" for name, difference in gains.items())
    return all(d.mean > d.std_error for d in gains.values()), f"difference to {text}"


def keeps_up(measured: Measurements) -> tuple[bool, str]:
    """Of equal structure, the B-spline KAN has at least six times the parameters."""
    difference = gain(measured, "B-spline KAN")
    ratio = measured[size("B-spline KAN")].mean / measured[size(AF)].mean
    holds = difference.mean >= -0.01 and ratio >= 6
    return holds, f"difference {difference}, {ratio:.1f} times fewer parameters"


def is_slower(measured: Measurements) -> tuple[bool, str]:
    """The paper says so itself."""
    ratios = {n: measured[seconds(AF)].mean / measured[seconds(n)].mean for n in RIVALS}
    text = ", ".join(f"{ratio:.2f} times {name}" for name, ratio in ratios.items())
    return all(ratio > 1 for ratio in ratios.values()), text


def plot(measured: Measurements, figure: Any) -> None:
    """Accuracy over the number of parameters, with standard errors, and each seed as a dot."""
    axes = figure.subplots()
    colors = dict(
        zip((AF, *RIVALS), ("tab:blue", "tab:gray", "tab:green", "tab:orange"), strict=True)
    )
    for arm in ARMS:
        name, _, small = arm.partition(", ")
        value, parameters = measured[score(arm)], measured[size(arm)].mean
        label = None if small else name
        axes.errorbar(
            parameters,
            value.mean,
            value.std_error,
            fmt="s" if small else "o",
            color=colors[name],
            label=label,
            capsize=5,
            markersize=10,
        )
        axes.plot([parameters] * len(value.values), value.values, "k.", markersize=4, zorder=3)
    axes.set_xscale("log")
    ticks = (2000, 5000, 10000, 20000)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="parameters", ylabel="test accuracy on digits")
    axes.set_title(
        "Round: 64-32-10; square: as many parameters as AF-KAN. Mean ± s.e., a dot a seed"
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")


EXPERIMENT = Experiment(
    paper=8,
    claim=Claim(
        statement="With as many parameters AF-KAN is more accurate than MLP, ReLU-KAN and other "
        "KANs; with the same structure it keeps up with 6 to 10 times fewer, but is slower.",
        figure="6 to 10 times fewer parameters at equal structure on MNIST and Fashion-MNIST",
        source="abstract",
    ),
    setup="Digits (64 inputs in [0, 1]), 64-32-10, 10 epochs of AdamW with batches of 64, weight "
    "decay 1e-4 and a constant learning rate out of 1e-3, 3e-3 and 1e-2, chosen for each arm on a "
    "fifth of seed 0's training part; 3 seeds of split, start and order.",
    baseline="MLP with LayerNorm and SiLU, ReLU-KAN with a fixed grid, B-spline KAN with a SiLU "
    "branch: with 32 hidden units, and with 34, 5 and 4, the least that give as many parameters "
    "as AF-KAN has.",
    criteria=(
        Criterion(
            "Equal parameters: AF-KAN's accuracy is above that of MLP, ReLU-KAN and B-spline KAN, "
            "each by more than 1 s.e. of the paired difference",
            beats_equal_size,
        ),
        Criterion(
            "Equal structure: AF-KAN is at most 1 point below the B-spline KAN with at least 6 "
            "times fewer parameters",
            keeps_up,
        ),
        Criterion("Equal structure: AF-KAN takes more CPU time to train than any rival", is_slower),
    ),
    budgets={
        "full": {"seeds": 3, "epochs": 10, "train": 2000},
        "smoke": {"seeds": 1, "epochs": 1, "train": 200},
    },
    trial=trial,
    plot=plot,
)
