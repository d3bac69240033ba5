"""Paper 67: are clicks obeyed and spread better by a Gaussian process than by convolutions?

Both networks have the same encoder, training, and clicks on their own errors. What trains the
process is also tried without its prior, and its features with the nearest click.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.data.photographs import PHOTOGRAPHS
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.experiments.gp.gpcis_scenes import (
    Scenes,
    demo_photo,
    iou,
    next_clicks,
    scenes,
    standardise,
)
from torchzoo.gp import (
    GPCISHead,
    click_disks,
    click_violations,
    disk_points,
    gpcis_loss,
    normalized_focal_loss,
)
from torchzoo.gp.gpcis_page import export_html

METHODS = ("GPCIS", "conv", "conv, overwritten", "nearest click", "no prior")
CHANNELS, JUDGED = 16, (1, 3, 5)
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps images, points and labels to logits `(N, 1, S, S)`."""


def encoder() -> nn.Sequential:
    """Three convolutions, of growing reach."""
    layers: list[nn.Module] = []
    for index, (inputs, dilation) in enumerate(((3, 1), (CHANNELS, 2), (CHANNELS, 4))):
        if index:
            layers.append(nn.ReLU())
        layers.append(nn.Conv2d(inputs, CHANNELS, 3, padding=dilation, dilation=dilation))
    return nn.Sequential(*layers)


class ProcessNet(nn.Module):
    """The encoder and the process."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = encoder(), GPCISHead(CHANNELS)

    def forward(self, images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.encoder(images), images, points, labels).logits

    def loss(self, images: Tensor, points: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        return gpcis_loss(self.head(self.encoder(images), images, points, labels), masks)


class ConvNet(nn.Module):
    """The encoder, and convolutions that see its features, the colours and maps of the clicks."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = CHANNELS + 3 + 2
        for dilation in (2, 4, 8):
            layers += [
                nn.Conv2d(inputs, CHANNELS, 3, padding=dilation, dilation=dilation),
                nn.ReLU(),
            ]
            inputs = CHANNELS
        self.encoder = encoder()
        self.head = nn.Sequential(*layers, nn.Conv2d(CHANNELS, 1, 1))

    def forward(self, images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        disks = click_disks(disk_points(points, labels).float(), images.shape[-2:], radius=2)
        return self.head(torch.cat([self.encoder(images), images, disks], 1))

    def loss(self, images: Tensor, points: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        return normalized_focal_loss(self(images, points, labels), masks)


def no_clicks(n: int) -> tuple[Tensor, Tensor]:
    """Points and labels without a click."""
    return torch.zeros(n, 0, 2, dtype=torch.long), torch.zeros(n, 0, dtype=torch.long)


def play(predict: Predict, data: Scenes, rounds: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Click round by round on what is wrong; points, labels and logits after each click."""
    points, labels = no_clicks(len(data.masks))
    found = torch.zeros_like(data.masks)
    played = []
    with torch.no_grad():
        for _ in range(rounds):
            points, labels = next_clicks(found, data.masks, points, labels)
            logits = predict(data.images, points, labels)
            found = logits[:, 0] > 0
            played.append((points, labels, logits))
    return played


def train(net: Any, data: Scenes, steps: int, batch: int, seed: int) -> Any:
    """Each step plays 1 to 5 clicks in evaluation, and learns from the last position."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(data.masks), (batch,), generator=generator)
        some = Scenes(data.images[rows], data.masks[rows])
        rounds = int(torch.randint(1, 6, (), generator=generator))
        points, labels, _ = play(net.eval(), some, rounds)[-1]
        net.train()
        optimizer.zero_grad()
        net.loss(some.images, points, labels, some.masks[:, None].float()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval()


def overwritten(net: nn.Module) -> Predict:
    """A network's logits, with those of the clicked pixels set to the labels."""

    def predict(images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        logits = net(images, points, labels)
        flat = logits.flatten(1).clone()
        index = points[..., 0] * images.shape[-1] + points[..., 1]
        for k in range(labels.shape[1]):
            old = flat.gather(1, index[:, k, None])
            sign = labels[:, k, None]
            flat.scatter_(1, index[:, k, None], torch.where(sign != 0, sign.to(old), old))
        return flat.reshape(logits.shape)

    return predict


def nearest_click(net: ProcessNet) -> Predict:
    """The label of the click that is nearest by the trained kernel."""

    def predict(images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        x = net.head.embed(net.encoder(images), images)
        index = points[..., 0] * images.shape[-1] + points[..., 1]
        z = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        k = net.head.kernel(x, z).masked_fill((labels == 0)[:, None], -1)
        best = labels.gather(1, k.argmax(-1))
        return best.float().reshape(len(images), 1, *images.shape[-2:])

    return predict


def without_prior(net: ProcessNet) -> Predict:
    """The process with omega = 0."""

    def predict(images: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        kept = net.head.omega_mean.data
        net.head.omega_mean.data = torch.zeros_like(kept)
        try:
            return net(images, points, labels)
        finally:
            net.head.omega_mean.data = kept

    return predict


def score(predict: Predict, data: Scenes, rounds: int) -> dict[str, float]:
    """Quality after some clicks, clicks needed for 85 %, and the share of clicks disobeyed."""
    played = play(predict, data, rounds)
    curve = torch.stack([iou(logits[:, 0] > 0, data.masks) for *_, logits in played], 1)
    figures = {f"IoU@{n}": curve[:, n - 1].mean().item() for n in range(1, max(JUDGED) + 1)}
    reached = curve >= 0.85
    needed = torch.where(reached.any(1), reached.int().argmax(1) + 1, rounds)
    figures["NoC@85"] = needed.float().mean().item()
    broken = total = 0
    for points, labels, logits in played[: max(JUDGED)]:
        broken += int(click_violations(logits, points, labels).sum())
        total += int((labels != 0).sum())
    return figures | {"violations": broken / total}


@torch.no_grad()
def click_times(nets: dict[str, nn.Module], data: Scenes, repeats: int) -> dict[str, float]:
    """Milliseconds from a picture with five clicks to its mask, taken in turns; the median."""
    points, labels, _ = play(nets["conv"], Scenes(data.images[:1], data.masks[:1]), 5)[-1]
    taken: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(repeats):
        for name, net in nets.items():
            started = time.perf_counter()
            net(data.images[:1], points, labels)
            taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: sorted(values)[repeats // 2] for name, values in taken.items()}


@torch.no_grad()
def pages(net: ProcessNet, folder: Path) -> None:
    """Web pages on which the photographs can be segmented."""
    for name in PHOTOGRAPHS:
        photo = demo_photo(name)
        image = standardise(photo)
        features = net.encoder(image[None])[0]
        path = folder / f"gpcis-{name}.html"
        export_html(net.head, features, image, photo, path, title=f"Segment {name}.jpg")


def trial(context: Context) -> dict[str, float]:
    """Both networks from one seed, and what is made of them."""
    options, seed = context.options, context.seed
    train_set = scenes(options["train"], options["size"], 2 * seed)
    test_set = scenes(options["test"], options["size"], 2 * seed + 1)
    nets: dict[str, Any] = {}
    for name, kind in (("GPCIS", ProcessNet), ("conv", ConvNet)):
        context.progress(f"training {name}")
        torch.manual_seed(seed)
        nets[name] = train(kind(), train_set, options["steps"][name], options["batch"], seed)
    if context.out:
        pages(nets["GPCIS"], context.out)
    context.progress("clicking")
    predicts: dict[str, Predict] = {
        **nets,
        "conv, overwritten": overwritten(nets["conv"]),
        "nearest click": nearest_click(nets["GPCIS"]),
        "no prior": without_prior(nets["GPCIS"]),
    }
    figures: dict[str, float] = {}
    for method in METHODS:
        for what, value in score(predicts[method], test_set, options["rounds"]).items():
            figures[f"{what}, {method}"] = value
    for name, value in click_times(nets, test_set, options["repeats"]).items():
        figures[f"ms a click, {name}"] = value
    return figures


def _obeyed(measured: Measurements) -> tuple[bool, str]:
    ours, other = measured["violations, GPCIS"], measured["violations, conv"]
    return max(ours.values) == 0 < min(other.values), f"{ours} against {other}"


def _better(measured: Measurements, method: str) -> tuple[bool, str]:
    gain: Measurement = measured["IoU@3, GPCIS"] - measured[f"IoU@3, {method}"]
    low, high = gain.interval
    pair = f"{measured['IoU@3, GPCIS']} against {measured[f'IoU@3, {method}']}"
    return low > 0, f"{pair}; gain {gain.mean:.3f}, 95 % interval {low:.3f} to {high:.3f}"


def _quick(measured: Measurements) -> tuple[bool, str]:
    ours, other = measured["ms a click, GPCIS"].mean, measured["ms a click, conv"].mean
    return ours <= 1.5 * other, f"{ours:.2f} ms against {other:.2f} ms, {ours / other:.2f} times"


def plot(measured: Measurements, figure: Any) -> None:
    """Quality by clicks, clicks disobeyed, and clicks needed."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    colours = dict(zip(METHODS, ("C0", "black", "tab:gray", "C1", "C2"), strict=True))
    clicks = range(1, max(JUDGED) + 1)
    for method, colour in colours.items():
        runs = [measured[f"IoU@{n}, {method}"] for n in clicks]
        style = "--" if method == "conv, overwritten" else "-"
        left.errorbar(
            clicks, [m.mean for m in runs], yerr=[2 * m.std_error for m in runs],
            fmt=f"o{style}", ms=4, color=colour, label=method,
        )  # fmt: skip
    left.set(xlabel="clicks", title="Intersection over union (two standard errors)")
    left.set_xticks(clicks)
    left.legend(fontsize=8, frameon=False)
    places = range(len(METHODS))
    for axes, what, factor, title in (
        (middle, "violations", 100, "Clicks disobeyed (%)"),
        (right, "NoC@85", 1, "Clicks to reach 85 %"),
    ):
        values = [factor * measured[f"{what}, {method}"].mean for method in METHODS]
        bars = axes.barh(places, values, color=list(colours.values()), height=0.6)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axes.set_yticks(places, METHODS if axes is middle else [""] * len(METHODS), fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set(title=title)
    for axes in (left, middle, right):
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    paper=67,
    claim=Claim(
        statement=(
            "Taking each image's clicks as data of a Gaussian process, drawn pathwise, spreads the "
            "clicks over the whole image and makes predictions right at the clicks, at linear cost."
        ),
        figure="accurate predictions at clicks, and fewer clicks for the same quality",
        source="abstract",
    ),
    setup=(
        "Pictures of 32 x 32 pixels with two objects of random shape, one of them meant: Voronoi "
        "cells, or pieces of two photographs, with noise; 400 to train, 100 to test, drawn anew "
        "for each seed. An encoder of 3 convolutions with 16 channels, which sees no clicks. 100 "
        "steps of Adam on 16 pictures each; a step plays 1 to 5 clicks, each into the middle of "
        "the largest region that the network gets wrong then, and learns from the last position."
    ),
    baseline=(
        "the same encoder and training with convolutions on features, colours and click maps "
        "instead of the process, 240 steps, which take about as long; that with the clicked "
        "pixels overwritten; and, on the process's features, the nearest click's label, and the "
        "process without its prior"
    ),
    criteria=(
        Criterion(
            "of distinct clicks, the first to the fifth, the process disobeys none, for all seeds, "
            "and the convolutions some",
            _obeyed,
        ),
        Criterion(
            "after 3 clicks the process has a higher intersection over union than the "
            "convolutions, the 95 % interval of the paired gain above 0",
            lambda measured: _better(measured, "conv"),
        ),
        Criterion(
            "it is also higher than with the clicked pixels overwritten, in the same sense",
            lambda measured: _better(measured, "conv, overwritten"),
        ),
        Criterion("a click takes at most 1.5 times the time", _quick),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "train": 400,
            "test": 100,
            "size": 32,
            "steps": {"GPCIS": 100, "conv": 240},
            "batch": 16,
            "rounds": 20,
            "repeats": 200,
        },
        "smoke": {
            "seeds": 1,
            "train": 8,
            "test": 4,
            "size": 32,
            "steps": {"GPCIS": 6, "conv": 6},
            "batch": 4,
            "rounds": 5,
            "repeats": 3,
        },
    },
    trial=trial,
    plot=plot,
)
