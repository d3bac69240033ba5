"""Paper 157: do trained delta activations change less often than dense ones are non-zero?

A per-frame network that reads moving gratings is trained dense and then refined in three arms: as
it is, with a penalty on the size of its activations, and with delta activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.data.gratings import CLASSES, moving_gratings
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.ops.library import backend
from torchzoo.sparsity import (
    DeltaActivation,
    DeltaConv2d,
    DeltaLinear,
    DeltaMeter,
    L1Activation,
    delta_penalty,
    fold_to_streaming,
)
from torchzoo.trainer import accuracy, fit

ARMS = ("dense", "L1", "delta")
RATES = (0.3, 1.0, 3.0, 10.0)
CHANNELS = (8, 16, 64)
PICK_SEED = 1000  # never a seed of the verdict
BATCH, PRETRAIN_LR, REFINE_LR = 32, 3e-3, 1e-3

Clips = tuple[Tensor, Tensor]


class FrameNet(nn.Module):
    """Two convolutions, mean over space, a dense layer, mean over time, logits."""

    def __init__(self, arm: str, rate: float = 0.0):
        super().__init__()
        self.conv1 = DeltaConv2d(1, CHANNELS[0], 5, padding=2)
        self.conv2 = DeltaConv2d(CHANNELS[0], CHANNELS[1], 3, stride=2, padding=1)
        self.dense = nn.Linear(CHANNELS[1], CHANNELS[2])
        self.head = nn.Linear(CHANNELS[2], CLASSES)
        self.act1, self.act2, self.act3 = (activation(arm, rate, c) for c in CHANNELS)

    def forward(self, clips: Tensor) -> Tensor:
        pooled = self.features(clips).mean((2, 3))
        return self.head(self.act3(self.dense(pooled)).mean(1))

    def features(self, clips: Tensor) -> Tensor:
        """Activations of the second convolution, (B, T, 8, 8, 16)."""
        return self.act2(self.conv2(self.act1(self.conv1(clips))))

    def steps(self) -> list[float]:
        """Mean quantisation step of each delta activation."""
        layers = [m for m in self.modules() if isinstance(m, DeltaActivation)]
        return [layer.threshold.abs().mean().item() for layer in layers]


def activation(arm: str, rate: float, channels: int) -> nn.Module:
    if arm == "dense":
        return nn.ReLU()
    return L1Activation(rate=rate) if arm == "L1" else DeltaActivation(channels, rate=rate)


def loss(model: nn.Module, clips: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(clips), labels) + delta_penalty(model)


def pretrain(clips: Clips, options: Mapping[str, Any], generator: torch.Generator) -> FrameNet:
    model = FrameNet("dense")
    epochs = options["pretrain"]
    fit(model, loss, clips, epochs=epochs, batch_size=BATCH, lr=PRETRAIN_LR, generator=generator)
    return model


def refine(
    dense: FrameNet,
    arm: str,
    rate: float,
    clips: Clips,
    epochs: int,
    on_epoch: Callable[[FrameNet, int], None],
) -> FrameNet:
    """Train an arm on from the dense weights, every arm in the same order of clips."""
    model = FrameNet(arm, rate)
    model.load_state_dict(dense.state_dict(), strict=False)
    fit(
        model,
        loss,
        clips,
        epochs=epochs,
        batch_size=BATCH,
        lr=REFINE_LR,
        generator=torch.Generator().manual_seed(0),
        on_epoch=lambda epoch, _: on_epoch(model, epoch + 1),
    )
    return model


def nonzeros(model: FrameNet, arm: str, clips: Tensor) -> float:
    """Share of activations that a zero-skipping machine sees: of changes for the delta arm."""
    with torch.no_grad(), DeltaMeter(model) as meter:
        for batch in clips.split(100):
            model(batch)
    return meter.temporal if arm == "delta" else meter.spatial


@cache
def pick_rates(train: int, pretrain_epochs: int, epochs: int) -> dict[str, float]:
    """The rate of each penalised arm, from a fifth of the training clips of a seed of its own.

    It is the rate with the fewest non-zeros among those whose accuracy is within one (binomial)
    standard error of the dense arm's, or the most accurate where there is none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PICK_SEED)
        generator = torch.Generator().manual_seed(PICK_SEED)
        clips, labels = moving_gratings(train, generator=generator)
        fitting = (clips[: train * 4 // 5], labels[: train * 4 // 5])
        held = (clips[train * 4 // 5 :], labels[train * 4 // 5 :])
        dense = pretrain(fitting, {"pretrain": pretrain_epochs}, generator)

        def judge(arm: str, rate: float) -> tuple[float, float]:
            model = refine(dense, arm, rate, fitting, epochs, lambda *_: None)
            return accuracy(model, *held, batch_size=100), nonzeros(model, arm, held[0])

        reached = judge("dense", 0.0)[0]
        floor = reached - (reached * (1 - reached) / len(held[1])) ** 0.5
        picked = {}
        for arm in ARMS[1:]:
            found = {rate: judge(arm, rate) for rate in RATES}
            good = [rate for rate in RATES if found[rate][0] >= floor]
            if good:
                picked[arm] = min(good, key=lambda rate: found[rate][1])
            else:
                picked[arm] = max(RATES, key=lambda rate: found[rate][0])
    return picked


def trial(context: Context) -> dict[str, float]:
    """Pre-train, refine the three arms, and time the folded dense part of the delta arm."""
    options = context.options
    context.progress("picking the rates")
    rates = pick_rates(options["train"], options["pretrain"], options["refine"])
    generator = torch.Generator().manual_seed(context.seed)
    train = moving_gratings(options["train"], generator=generator)
    test = moving_gratings(options["test"], generator=generator)
    context.progress("pre-training")
    dense = pretrain(train, options, generator)

    figures = {f"rate, {arm}": rate for arm, rate in rates.items()}
    for arm in ARMS:
        context.progress(f"refining, {arm}")
        model, found = run_arm(arm, rates.get(arm, 0.0), dense, train, test, options)
        figures |= found
    context.progress("timing")  # of the last arm, delta
    figures["speed-up of the folded dense part"] = speed_up(model, test[0][: options["timed"]])
    figures["native step"] = float(backend("delta_linear_step", context.device.type)[0] == "native")
    return figures


def run_arm(
    arm: str,
    rate: float,
    dense: FrameNet,
    train: Clips,
    test: Clips,
    options: Mapping[str, Any],
) -> tuple[FrameNet, dict[str, float]]:
    """Refine one arm; figures after the short and the long refinement, and the steps it learnt."""
    names = {options["refine"]: "short", options["long"]: "long"}
    figures = {}

    def measure(model: FrameNet, epoch: int) -> None:
        if epoch in names:
            figures[accuracy_name(arm, names[epoch])] = accuracy(model, *test, batch_size=100)
            figures[nonzero_name(arm, names[epoch])] = nonzeros(model, arm, test[0])

    model = refine(dense, arm, rate, train, options["long"], measure)
    starts = FrameNet(arm).steps()
    for layer, (start, end) in enumerate(zip(starts, model.steps(), strict=True), 1):
        figures |= {f"step {layer}, start": start, f"step {layer}, end": end}
    return model, figures


@torch.no_grad()
def speed_up(model: FrameNet, clips: Tensor) -> float:
    """Frames a second of the folded dense part over the plain one, both 1024 to 1024, at batch 1.

    Both take the levels of the delta arm's second convolution, a clip after the other.
    """
    frames = rearrange(model.features(clips), "n t h w c -> (n t) 1 (h w c)")
    linear = nn.Linear(frames.shape[-1], frames.shape[-1])
    plain = nn.Sequential(linear, nn.ReLU())
    folded = fold_to_streaming(nn.Sequential(DeltaLinear.from_module(linear), nn.ReLU()))

    def run_plain() -> None:
        for frame in frames:
            plain(frame)

    def run_folded() -> None:
        for index, frame in enumerate(frames):
            if index % clips.shape[1] == 0:
                state = folded.init_state((1,))
            _, state = folded.step(frame, state)

    return best_time(run_plain) / best_time(run_folded)


def best_time(run: Callable[[], None], repeats: int = 7) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def accuracy_name(arm: str, which: str) -> str:
    return f"accuracy, {arm}, {which} refinement"


def nonzero_name(arm: str, which: str) -> str:
    return f"non-zeros, {arm}, {which} refinement"


def drop(measured: Measurements, which: str) -> Measurement:
    """Accuracy that the delta arm loses against the dense arm trained equally long."""
    return measured[accuracy_name("dense", which)] - measured[accuracy_name("delta", which)]


def _fewer_than_dense(measured: Measurements) -> tuple[bool, str]:
    dense, delta = (measured[nonzero_name(arm, "short")] for arm in ("dense", "delta"))
    times = dense.mean / max(delta.mean, 1e-12)
    return times >= 2.5, f"{times:.2f} times fewer: dense {dense}, delta {delta}"


def _fewer_than_l1(measured: Measurements) -> tuple[bool, str]:
    l1, delta = (measured[nonzero_name(arm, "short")] for arm in ("L1", "delta"))
    change = measured[accuracy_name("delta", "short")] - measured[accuracy_name("L1", "short")]
    holds = delta.mean < l1.mean and change.mean >= -change.std_error
    return holds, f"non-zeros L1 {l1}, delta {delta}; accuracy of delta minus L1 {change}"


def _recovers(measured: Measurements) -> tuple[bool | None, str]:
    short, long = drop(measured, "short"), drop(measured, "long")
    text = f"drop {short} after the short, {long} after the long refinement"
    if short.mean <= short.std_error:
        return None, f"void, there is no drop to recover from: {text}"
    return long.mean < short.mean, text


def _faster(measured: Measurements) -> tuple[bool | None, str]:
    times = measured["speed-up of the folded dense part"]
    if min(measured["native step"].values) < 1:
        return None, f"void without the native operator; its reference gives {times} times"
    return times.mean >= 1.5, f"{times} times the frames a second"


def plot(measured: Measurements, figure: Any) -> None:
    """Non-zeros of the arms after both refinements, and their accuracy."""
    left, right = figure.subplots(1, 2)
    for axes, name in ((left, nonzero_name), (right, accuracy_name)):
        for offset, which, colour in ((-0.2, "short", "tab:blue"), (0.2, "long", "tab:cyan")):
            found = [measured[name(arm, which)] for arm in ARMS]
            places = [place + offset for place in range(len(ARMS))]
            bars = axes.bar(
                places,
                [m.mean for m in found],
                0.38,
                yerr=[m.std_error for m in found],
                capsize=3,
                color=colour,
                label=f"{which} refinement",
            )
            axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=3)
        axes.set_xticks(range(len(ARMS)), ["dense (size)", "L1 (size)", "delta (changes)"])
        axes.spines[["top", "right"]].set_visible(False)
    goal = measured[nonzero_name("dense", "short")].mean / 2.5
    line = left.axhline(goal, color="0.3", linestyle="--", label="2.5 times fewer than dense")
    left.legend(handles=[line], loc="upper right", fontsize=8, frameon=False)
    left.set_title("share of non-zeros that a machine sees")
    right.set_title("test accuracy")
    left.set_ylim(top=1.1 * left.get_ylim()[1])
    right.set_ylim(top=1.18)
    right.legend(loc="upper center", ncols=2, fontsize=8, frameon=False)


EXPERIMENT = Experiment(
    paper=157,
    claim=Claim(
        statement=(
            "Training delta activations, quantised and penalised on their changes over time, makes "
            "activations almost 3 times sparser; the accuracy it costs comes back with longer "
            "training."
        ),
        figure="almost 3 times sparser activations (UCF101)",
        source="abstract",
    ),
    setup=(
        "Clips of 12 frames of 16x16 pixels: an 8x8 patch with one of 8 gratings moves a pixel "
        "every second frame over a still noise background, with sensor noise of 0.02. Per frame "
        "conv 5x5 (8), conv 3x3 stride 2 (16), mean over space, dense (64), then mean over time "
        "and softmax. 600 training and 300 test clips; 20 epochs dense, then 4 (short) or 8 (long) "
        "epochs an arm from the same weights; AdamW, batch 32, learning rate 0.003 and then 0.001. "
        "Delta activations: a step a channel from 0.1, trained by the paper's rule. Rates from "
        "0.3, 1, 3, 10, picked on held-out training clips of another seed: the fewest non-zeros at "
        "an accuracy within one standard error of the dense arm's. Non-zeros are counted over all "
        "activations of the three layers, of values for dense and L1, of changes after the first "
        "frame for delta."
    ),
    baseline="the dense network and one with an L1 penalty on its activations, refined as long",
    criteria=(
        Criterion(
            "delta has at least 2.5 times fewer non-zeros than dense (short refinement)",
            _fewer_than_dense,
        ),
        Criterion(
            "delta has fewer non-zeros than L1, and its accuracy is at most one standard error of "
            "the paired difference below (short refinement)",
            _fewer_than_l1,
        ),
        Criterion(
            "the accuracy that delta loses against dense is smaller after the long refinement than "
            "after the short one (void where that is within one standard error of 0)",
            _recovers,
        ),
        Criterion(
            "the folded dense part (1024 to 1024, batch 1) does at least 1.5 times the frames a "
            "second of the plain one (void where the operator has no native kernel)",
            _faster,
        ),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "train": 600,
            "test": 300,
            "pretrain": 20,
            "refine": 4,
            "long": 8,
            "timed": 20,
        },
        "smoke": {
            "seeds": 2,
            "train": 40,
            "test": 20,
            "pretrain": 1,
            "refine": 1,
            "long": 2,
            "timed": 1,
        },
    },
    trial=trial,
    plot=plot,
)
