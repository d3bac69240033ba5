"""Paper 121: bit flips in a digit classifier with clipped activations.

The same trained network under the same flips, with ReLU and with five ways to bound it, whose own
thresholds are stored too and hit on top.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import trainer
from torchzoo.activations import (
    ProActTrainer,
    convert_clipped,
    inject_bit_flips,
    range_bounds,
)
from torchzoo.activations.faults import predictions
from torchzoo.data.digits import digits
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements

BERS = (1e-5, 3e-5, 1e-4, 3e-4)
DECAYS = (4e-5, 4e-7)
NONE, RANGER, CLIPACT, FITACT = "ReLU", "Ranger", "ClipAct", "FitAct"
JOINT, PROACT = "ProAct, all layers at once", "ProAct"
METHODS = (NONE, RANGER, CLIPACT, FITACT, JOINT, PROACT)


def classifier() -> nn.Sequential:
    """Three convolutions and two dense layers, 20,730 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 10)),
    )


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def protected(net: nn.Module, method: str, train: Any, val: Any, options: Any) -> nn.Module:
    """A copy of the network with a method's activations, their bounds trained if it does that."""
    model = copy.deepcopy(net)
    if method == NONE:
        return model
    neurons = ("all",) if method == FITACT else ("last",)
    bounds = range_bounds(net, train, per_neuron=neurons)
    kinds = {RANGER: "ranger", CLIPACT: "clipact", FITACT: "fitact"}
    convert_clipped(model, bounds, kinds.get(method, "proact"))
    if method in (FITACT, JOINT, PROACT):
        ProActTrainer(
            model,
            net,
            decays=DECAYS[: options["decays"]],
            epochs=options["bound_epochs"],
            progressive=method == PROACT,
        ).fit(train, val)
    return model


def accuracy(model: nn.Module, test: Any) -> float:
    found, labels = predictions(model, test)
    return 100 * (found == labels).double().mean().item()


def is_bound(name: str, tensor: Tensor) -> bool:
    return name.endswith("bound")


def under_faults(
    model: nn.Module, ber: float, seeds: range, test: Any
) -> tuple[list[float], list[int]]:
    """Accuracies and the numbers of flips that hit bounds, an injection a seed.

    Flips of weights and biases depend on the seed alone, so that all methods suffer the same ones.
    """
    hits, flips = [], []
    has_bounds = any(is_bound(name, value) for name, value in model.state_dict().items())
    for seed in seeds:
        weights, bounds = (torch.Generator().manual_seed(2 * seed + i) for i in (0, 1))
        with inject_bit_flips(
            model, ber, generator=weights, targets=lambda name, tensor: not is_bound(name, tensor)
        ):
            if not has_bounds:
                hits.append(accuracy(model, test))
                flips.append(0)
                continue
            with inject_bit_flips(model, ber, generator=bounds, targets=is_bound) as on_bounds:
                hits.append(accuracy(model, test))
                flips.append(on_bounds.count)
    return hits, flips


def trial(context: Context) -> dict[str, float]:
    """Accuracies of every method, without faults and at each bit error rate."""
    options, data = context.options, digits(seed=context.seed)
    rows = len(data.train_x) * 4 // 5
    train = batches(data.train_x[:rows], data.train_y[:rows], 64)
    val = batches(data.train_x[rows:], data.train_y[rows:], 512)
    test = batches(data.test_x, data.test_y, 512)
    net = classifier()
    generator = torch.Generator().manual_seed(context.seed)
    trainer.fit(
        net,
        cross_entropy,
        (data.train_x[:rows], data.train_y[:rows]),
        epochs=options["epochs"],
        batch_size=64,
        lr=2e-3,
        generator=generator,
    )
    net.eval()
    plain = sum(value.numel() for value in net.state_dict().values())
    figures: dict[str, float] = {}
    for method in METHODS:
        context.progress(method)
        model = protected(net, method, train, val, options).eval()
        figures[clean(method)] = accuracy(model, test)
        stored = sum(value.numel() for value in model.state_dict().values())
        figures[extra(method)] = stored - plain
        hit_bounds = []
        for i, ber in enumerate(BERS):
            first = 10_000 * context.seed + 1000 * i
            found, flips = under_faults(model, ber, range(first, first + options["trials"]), test)
            figures[faulty(method, ber)] = sum(found) / len(found)
            hit_bounds += flips
        figures[on_bounds(method)] = sum(hit_bounds)
    return figures


def clean(method: str) -> str:
    return f"{method}: accuracy without faults"


def faulty(method: str, ber: float) -> str:
    return f"{method}: accuracy, BER {ber:g}"


def extra(method: str) -> str:
    return f"{method}: extra parameters"


def on_bounds(method: str) -> str:
    return f"{method}: flips of bounds, all injections"


def under_all(measured: Measurements, method: str) -> Measurement:
    """Mean accuracy over the bit error rates, a value a seed."""
    rows = zip(*(measured[faulty(method, ber)].values for ber in BERS), strict=True)
    return Measurement(method, tuple(sum(row) / len(row) for row in rows))


def gap(measured: Measurements, method: str) -> Measurement:
    """How far ProAct is above a method, in points, seed by seed."""
    return under_all(measured, PROACT) - under_all(measured, method)


def _above(measured: Measurements) -> tuple[bool, str]:
    gaps = {method: gap(measured, method) for method in (NONE, RANGER, JOINT)}
    text = "; ".join(f"above {method} by {value}" for method, value in gaps.items())
    holds = all(value.mean > value.std_error for value in gaps.values())
    return holds, f"{under_all(measured, PROACT)} %; {text}"


def _not_below(measured: Measurements) -> tuple[bool, str]:
    value, other = gap(measured, FITACT), gap(measured, CLIPACT)
    return value.mean >= -value.std_error, f"{value}; to {CLIPACT} {other}"


def _no_drop(measured: Measurements) -> tuple[bool, str]:
    drop = measured[clean(NONE)] - measured[clean(PROACT)]
    return drop.mean <= 0.5, f"{drop} points from {measured[clean(NONE)]} %"


def _few_parameters(measured: Measurements) -> tuple[bool, str]:
    ours, theirs = (measured[extra(method)].mean for method in (PROACT, FITACT))
    hits = (measured[on_bounds(method)].mean for method in (PROACT, FITACT))
    text = f"{ours:.0f} against {theirs:.0f}; flips of bounds " + " against ".join(
        f"{count:.1f}" for count in hits
    )
    return ours <= theirs / 3, text


COLOURS = dict(
    zip(METHODS, ("0.2", "0.6", "tab:green", "tab:orange", "tab:cyan", "tab:blue"), strict=True)
)


def plot(measured: Measurements, figure: Any) -> None:
    """Accuracy against the bit error rate, and against the parameters that a method adds."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, method in enumerate(METHODS):
        found = [measured[faulty(method, ber)] for ber in BERS]
        style = {"color": COLOURS[method], "capsize": 2, "markersize": 5}
        left.errorbar(
            [ber * 1.07 ** (place - 2.5) for ber in BERS],  # side by side: some are as good
            [m.mean for m in found],
            [m.std_error for m in found],
            fmt="o-",
            label=method,
            linewidth=2 if method == PROACT else 1,
            **style,
        )
        average = under_all(measured, method)
        right.errorbar(
            [measured[extra(method)].mean * (0.8 if method == JOINT else 1)],
            [average.mean],
            [average.std_error],
            fmt="o",
            **style,
        )
    left.set_xscale("log")
    left.set(xlabel="bit error rate", ylabel="accuracy (%)", title="under faults")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    right.set_xscale("symlog", linthresh=1)
    right.set(xlabel="extra parameters", title="mean over the rates")
    right.grid(alpha=0.3)
    left.grid(alpha=0.3)


EXPERIMENT = Experiment(
    paper=121,
    claim=Claim(
        statement=(
            "Bounds for each neuron are needed in the last activation layer alone. With one bound "
            "a layer elsewhere, trained layer by layer, networks resist bit errors better than "
            "with bounds for layers, and as well as with bounds for all neurons, at less memory."
        ),
        figure="gains of resilience given network by network",
        source="abstract",
    ),
    setup=(
        "8×8 digits, 3 convolutions and 2 dense layers of 20,730 float32 parameters, 10 epochs of "
        "AdamW at 0.002. Bounds start at the largest activations on the training data and are "
        "trained with decays 4e-5 and 4e-7, at most 4 epochs each, within 0.2 points of the "
        "validation accuracy: layer by layer from the last (ProAct), or all at once (FitAct and "
        "the ablation). Each bit flips with probability 1e-5, 3e-5, 1e-4 or 3e-4, 20 injections "
        "each, at the same places of weights and biases for all methods, and on the bounds on top. "
        "Accuracies are of 450 test images, in percent; logits that are not finite are wrong."
    ),
    baseline="the same network with ReLU, Ranger, ClipAct, FitAct, and ProAct trained all at once",
    criteria=(
        Criterion(
            "mean accuracy over the rates: ProAct above ReLU, Ranger and training all layers at "
            "once, each by more than a standard error of the paired difference",
            _above,
        ),
        Criterion(
            "not below FitAct by more than a standard error of the paired difference", _not_below
        ),
        Criterion("accuracy without faults at most 0.5 points below ReLU's", _no_drop),
        Criterion("at most a third of FitAct's extra parameters", _few_parameters),
    ),
    budgets={
        "full": {"seeds": 3, "epochs": 10, "decays": 2, "bound_epochs": 4, "trials": 20},
        "smoke": {"seeds": 1, "epochs": 1, "decays": 1, "bound_epochs": 1, "trials": 1},
    },
    trial=trial,
    plot=plot,
)
