"""Paper 43: does predicting which filters fire cost less accuracy than other pruning?

A small convolutional network on digits is trained dense, its thresholds are chosen from the
multiplications estimated before any further training, and it is trained on with masks, against
static pruning and against gates with a sparsity penalty, at equal measured multiplications.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.data.digits import DigitsSplit, digits
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.experiments.sparsity.channel_gate_arms import (
    BATCH,
    gated,
    multiplications,
    network,
    pruned,
    refine,
    sparsity_penalty,
    task_loss,
)
from torchzoo.sparsity import FTWTConv2d, estimate_flops, ftwt_convert, ftwt_loss, measured_flops
from torchzoo.surgery import find
from torchzoo.trainer import accuracy, fit

TARGETS = (0.35, 0.5)
THRESHOLDS = (*(round(0.3 + 0.02 * i, 2) for i in range(35)), 0.99)
KEPT = (0.8, 0.7, 0.6, 0.5)
"""Shares of the filters that static pruning keeps in each layer."""
PENALTIES = (0.1, 0.3, 1.0)
ARMS = {
    "FTWT": tuple(f"{100 * target:.0f} %" for target in TARGETS),
    "static": tuple(f"{kept:g} kept" for kept in KEPT),
    "penalty": tuple(f"weight {weight:g}" for weight in PENALTIES),
}
RESNET_TAU, RESNET_SIZE = 0.6, 64


def name(arm: str, which: str, figure: str) -> str:
    return f"{arm}, {which}: {figure}"


def choose(table: Mapping[float, Any], target: float) -> float:
    """The threshold whose estimated reduction is nearest to the target."""
    return min(table, key=lambda tau: abs(table[tau].reduction - target))


def trial(context: Context) -> dict[str, float]:
    """Pre-train, choose thresholds, and train every arm on from the same weights."""
    options, seed = context.options, context.seed
    data = digits(seed=seed)
    data = data._replace(
        train_x=data.train_x[: options["train"]], train_y=data.train_y[: options["train"]]
    )
    test = data.test_x, data.test_y
    context.progress("pre-training")
    dense = network()
    fit(
        dense,
        task_loss,
        (data.train_x, data.train_y),
        epochs=options["pretrain"],
        batch_size=BATCH,
        lr=3e-3,
        generator=torch.Generator().manual_seed(seed),
    )
    epochs = options["refine"]
    table = estimate_flops(dense, [data.train_x], THRESHOLDS[:: options["skip"]])
    whole = table[THRESHOLDS[0]].dense
    longer = refine(copy.deepcopy(dense), data, epochs, seed)
    figures = {
        "dense: accuracy": accuracy(longer, *test),
        "dense: reduction": 1 - multiplications(longer, test[0]) / whole,
    }
    for target, which in zip(TARGETS, ARMS["FTWT"], strict=True):
        context.progress(f"FTWT, {which}")
        tau = choose(table, target)
        model = gated(dense, data, tau, "decoupled")
        refine(model, data, epochs, seed, ftwt_loss, freeze=True)
        figures |= {
            name("FTWT", which, "threshold"): tau,
            name("FTWT", which, "estimated reduction"): table[tau].reduction,
            name("FTWT", which, "reduction"): measured_flops(model, [test[0]]).reduction,
            name("FTWT", which, "accuracy"): accuracy(model, *test),
        }
    for kept, which in zip(KEPT, ARMS["static"], strict=True):
        context.progress(f"static pruning, {which}")
        small = refine(pruned(dense, kept), data, epochs, seed)
        figures[name("static", which, "reduction")] = 1 - multiplications(small, test[0]) / whole
        figures[name("static", which, "accuracy")] = accuracy(small, *test)
    for weight, which in zip(PENALTIES, ARMS["penalty"], strict=True):
        context.progress(f"penalty, {which}")
        model = gated(dense, data, 0.9, "joint")
        refine(model, data, epochs, seed, partial(sparsity_penalty, weight=weight))
        figures[name("penalty", which, "reduction")] = measured_flops(model, [test[0]]).reduction
        figures[name("penalty", which, "accuracy")] = accuracy(model, *test)
    context.progress("a timm ResNet")
    images, shown = options["resnet"]
    return figures | resnet(data, images, shown, seed)


def resnet(data: DigitsSplit, images: int, shown: int, seed: int) -> dict[str, float]:
    """What gathering saves a timm ResNet at batch 1, in multiplications and in time."""
    import timm

    def larger(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(RESNET_SIZE, RESNET_SIZE), mode="bilinear")

    train = data._replace(train_x=larger(data.train_x[:images]), train_y=data.train_y[:images])
    dense = timm.create_model("resnet10t", pretrained=False, in_chans=1, num_classes=10)
    refine(dense, train, 1, seed)
    model = copy.deepcopy(dense)
    ftwt_convert(model, RESNET_TAU)
    refine(model, train, 1, seed, ftwt_loss)
    tested = larger(data.test_x[:shown])
    saved = measured_flops(model, [tested]).reduction
    with torch.no_grad():
        masked = model(tested)
        for layer in find(model, FTWTConv2d).values():
            layer.policy = "gather"  # type: ignore[assignment]
        off = (model(tested) - masked).abs().max() / masked.abs().max()
    return {
        "timm ResNet: reduction": saved,
        "timm ResNet: time of dense over gathered": best_time(dense, tested)
        / best_time(model, tested),
        "timm ResNet: gathered off by": off.item(),
    }


@torch.no_grad()
def best_time(model: nn.Module, images: Tensor, repeats: int = 3) -> float:
    """Seconds for some images, one at a time: the fastest of some runs."""
    model.eval()
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        for image in images.split(1):
            model(image)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def interpolated(measured: Measurements, arm: str, at: Measurement) -> Measurement:
    """A rival's accuracy at some reductions, seed by seed, between its own and the dense model.

    Beyond a rival's largest reduction its accuracy there is taken, which is in its favour.
    """
    values = []
    for seed, reduction in enumerate(at.values):
        points = [
            [measured[f"{which}: {figure}"].values[seed] for figure in ("reduction", "accuracy")]
            for which in ("dense", *(f"{arm}, {which}" for which in ARMS[arm]))
        ]
        places, heights = zip(*sorted(points), strict=True)
        values.append(float(np.interp(reduction, places, heights)))
    return Measurement(f"{arm} at the same multiplications", tuple(values))


def _better(measured: Measurements) -> tuple[bool, str]:
    which = ARMS["FTWT"][-1]
    own, at = (measured[name("FTWT", which, f)] for f in ("accuracy", "reduction"))
    gains = {arm: own - interpolated(measured, arm, at) for arm in ("static", "penalty")}
    drop = measured["dense: accuracy"] - own
    text = "; ".join(f"{gain} above {arm}" for arm, gain in gains.items())
    return (
        all(gain.mean > gain.std_error for gain in gains.values()),
        f"accuracy {own} at a reduction of {at}: {text}; {drop} below dense",
    )


def _foreseen(measured: Measurements) -> tuple[bool, str]:
    holds, texts = True, []
    for which in ARMS["FTWT"]:
        guess, final = (
            measured[name("FTWT", which, f)] for f in ("estimated reduction", "reduction")
        )
        gap = final - guess
        holds = holds and max(map(abs, gap.values)) < 0.05
        texts.append(f"{100 * guess.mean:.1f} % estimated, {100 * final.mean:.1f} % measured")
    return holds, "; ".join(texts)


def plot(measured: Measurements, figure: Any) -> None:
    """Accuracy over reduction for the arms; estimated against measured reductions."""
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    dense = measured["dense: accuracy"]
    left.axhline(100 * dense.mean, color="0.5", lw=1, ls="--", label="dense")
    colours = {"FTWT": "tab:blue", "static": "tab:orange", "penalty": "tab:green"}
    labels = {"FTWT": "FTWT", "static": "static pruning", "penalty": "gates with a penalty"}
    for arm, whiches in ARMS.items():
        x, y = (
            [measured[name(arm, which, f)] for which in whiches] for f in ("reduction", "accuracy")
        )
        left.errorbar(
            [100 * m.mean for m in x],
            [100 * m.mean for m in y],
            xerr=[100 * m.std_error for m in x],
            yerr=[100 * m.std_error for m in y],
            fmt="o-",
            ms=4,
            lw=1,
            capsize=2,
            color=colours[arm],
            label=labels[arm],
        )
    left.set_xlabel("multiplications saved, %")
    left.set_ylabel("test accuracy, %")
    left.legend(fontsize=8, frameon=False)

    for which, colour in zip(ARMS["FTWT"], ("tab:cyan", "tab:blue"), strict=True):
        guess, final = (
            measured[name("FTWT", which, f)].values for f in ("estimated reduction", "reduction")
        )
        right.plot(
            100 * np.array(guess), 100 * np.array(final), "o", color=colour, label=f"target {which}"
        )
    ends = np.array([0.0, 70.0])
    right.plot(ends, ends, color="0.5", lw=1)
    right.fill_between(ends, ends - 5, ends + 5, color="0.92", zorder=0)
    right.set_xlabel("saving estimated before training, %")
    right.set_ylabel("saving measured, %")
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    paper=43,
    claim=Claim(
        statement=(
            "Heads that learn which filters fire for an image save more multiplications at similar "
            "accuracy than pruning with a sparsity loss, and the saving is known before training."
        ),
        figure="15 % and 24 % more FLOPs saved at similar accuracy on CIFAR",
        source="abstract",
    ),
    setup=(
        "Digits of 8x8 pixels; four 3x3 convolutions (16, 16, 32, 32) with batch norm, a pooling "
        "after the second, mean over space. 12 epochs dense (AdamW, 0.003), then 6 epochs an arm "
        "from the same weights: SGD with momentum 0.9, rate 0.01, heads 0.1, batch 128, heads "
        "first opened by 44 batches of targets of 1. FTWT: decoupled, heads frozen after half of "
        "the epochs, thresholds from a grid of 0.3 to 0.99, those whose saving estimated on the "
        "training images before training is nearest to 35 and 50 %. Multiplications are those of "
        "the masked convolutions and the heads, on the test images; input channels that are zero "
        "everywhere cost nothing in any arm. Besides, a timm resnet10t at "
        "64x64 pixels, an epoch dense and one masked at 0.6 (all convolutions of its blocks and "
        "stem but one): what gathering filters saves at batch 1."
    ),
    baseline=(
        "static pruning of the filters of least L1 norm (0.8, 0.7, 0.6 or 0.5 kept a layer), and "
        "the same gates trained jointly with a penalty on their sum (weights 0.1, 0.3, 1), equally "
        "long; accuracies interpolated at FTWT's measured saving"
    ),
    criteria=(
        Criterion(
            "at the 50 % target FTWT is more accurate than either baseline at its own "
            "multiplications, by more than a standard error of the paired difference",
            _better,
        ),
        Criterion(
            "savings estimated before training are within 5 points of the final ones, for both "
            "targets and every seed",
            _foreseen,
        ),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "train": 1347,
            "pretrain": 12,
            "refine": 6,
            "skip": 1,
            "resnet": (384, 20),
        },
        "smoke": {
            "seeds": 1,
            "train": 128,
            "pretrain": 1,
            "refine": 1,
            "skip": 6,
            "resnet": (2, 1),
        },
    },
    trial=trial,
    plot=plot,
)
