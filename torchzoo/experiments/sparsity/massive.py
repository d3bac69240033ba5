"""Paper 57: does a five-parameter curve describe how massive activations emerge in training?

Six small language models are trained on a synthetic grammar; the ratio of largest to median
activation of each block is fitted by the law and by rivals, and predicted from the architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchzoo.data.grammar import Grammar
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.experiments.language import Decoder, batches, train
from torchzoo.sparsity import (
    Architecture,
    EmergenceCurve,
    EmergenceParams,
    EmergencePredictor,
    MassiveActivationMeter,
)

Floats = NDArray[np.float64]
Curve = Callable[[Floats], Floats]
Fit = Callable[[Floats, Floats], Curve]

HEADS, LENGTH = 4, 32
BATCH, SEQUENCES, HELD_OUT = 16, 10, 0.25
LAW, LOGISTIC, POLYNOMIAL, LOG = "law", "logistic", "polynomial", "logarithm"
PARAMETERS = {LAW: 5, LOGISTIC: 5, POLYNOMIAL: 5, LOG: 3}
PLACES = ("first layer", "middle layer", "last layer")
"""Whose curves are drawn, of the largest model."""

PUBLISHED = {
    "14M": 0.9307,
    "70M": 0.9681,
    "160M": 0.9831,
    "410M": 0.9937,
    "1B": 0.9922,
    "1.4B": 0.9956,
    "2.8B": 0.9686,
    "6.9B": 0.9954,
    "12B": 0.9829,
}
"""The paper's mean R² of the law by size of the Pythia models, for comparison."""


def checkpoints(steps: int, count: int) -> list[int]:
    """So many different steps from 1 to the last, as evenly spread over log t as they can be."""
    points = count
    while len(found := np.unique(np.geomspace(1, steps, points).round().astype(int))) < count:
        points += 1
    return [int(step) for step in found]


def histories(depth: int, width: int, steps: list[int], seed: int) -> Floats:
    """Ratios of each layer of one model at the checkpoints, `(layers, checkpoints)`."""
    source = Grammar()
    torch.manual_seed(seed)
    model = Decoder(
        source.vocab + 1,
        width,
        depth,
        HEADS,
        4 * width,
        length=LENGTH,
        gated=False,
        activation="silu",
        policy="dense",
    )
    text = source.sample(64, 1024, seed=seed)
    bos = source.vocab
    windows = batches(text, length=LENGTH, size=BATCH, seed=seed, bos=bos)
    fixed = next(batches(text, length=LENGTH, size=SEQUENCES, seed=seed + 1, bos=bos))[:, :-1]
    ratios: list[Tensor] = []

    def measure(step: int) -> None:
        if step in steps:
            with torch.no_grad(), MassiveActivationMeter(model) as meter:
                model(fixed)
            ratios.append(meter.ratios.double())

    train(model, windows, steps[-1], on_step=measure)
    return np.asarray(torch.stack(ratios, -1).numpy(), dtype=np.float64)


def fit_law(restarts: int, t: Floats, r: Floats) -> Curve:
    curve = EmergenceCurve.fit(t, r, restarts=restarts)
    return lambda at: curve.predict(at).numpy()


def fit_separable(
    basis: Callable[[Floats, Floats], Floats],
    low: Sequence[float],
    high: Sequence[float],
    restarts: int,
    t: Floats,
    r: Floats,
) -> Curve:
    """Fit `a · basis(u, t) + b` with bounds on u, with as much care as the law."""
    from scipy.optimize import least_squares
    from scipy.stats import qmc

    def linear(u: Floats) -> Floats:
        columns = np.stack([basis(u, t), np.ones_like(t)], -1)
        return np.asarray(np.linalg.lstsq(columns, r, rcond=None)[0], dtype=np.float64)

    def residuals(u: Floats) -> Floats:
        a, b = linear(u)
        return a * basis(u, t) + b - r

    starts = qmc.scale(qmc.Sobol(len(low), seed=0).random(restarts), low, high)
    rough = [least_squares(residuals, u, bounds=(low, high), max_nfev=12) for u in starts]
    rough.sort(key=lambda one: one.cost)
    found = [least_squares(residuals, one.x, bounds=(low, high)) for one in rough[:4]]
    u = min(found, key=lambda one: one.cost).x
    a, b = linear(u)
    return lambda at: a * basis(u, at) + b


def fit_polynomial(t: Floats, r: Floats) -> Curve:
    polynomial = np.polynomial.Polynomial.fit(np.log(t), r, 4)
    return lambda at: polynomial(np.log(at))


def logistic_basis(u: Floats, t: Floats) -> Floats:
    """The five-parameter logistic in log t, without its two levels: (1 + (t / c)^-b)^-g."""
    return np.exp(-np.exp(u[2]) * np.logaddexp(0, -np.exp(u[1]) * (np.log(t) - u[0])))


def log_basis(u: Floats, t: Floats) -> Floats:
    return np.log(t - 1 + np.exp(u[0]))


def fits(steps: int, restarts: int) -> dict[str, Fit]:
    """The law and its rivals, by name."""
    far = math.log(steps)
    logistic = (logistic_basis, (-far, -3.0, -4.0), (2 * far, 3.0, 4.0), restarts)
    return {
        LAW: partial(fit_law, restarts),
        LOGISTIC: partial(fit_separable, *logistic),
        POLYNOMIAL: fit_polynomial,
        LOG: partial(fit_separable, log_basis, (-7.0,), (far + 7.0,), restarts),
    }


def judge(fit: Fit, k: int, t: Floats, r: Floats) -> list[float]:
    """R² and BIC of a fit to all checkpoints, and relative error of a forecast of the last ones."""
    squares = float(((fit(t, r)(t) - r) ** 2).sum())
    r2 = 1 - squares / float(((r - r.mean()) ** 2).sum())
    bic = len(t) * math.log(squares / len(t)) + k * math.log(len(t))
    early = round((1 - HELD_OUT) * len(t))
    forecast = fit(t[:early], r[:early])(t[early:])
    error = float(np.sqrt(((forecast - r[early:]) ** 2).mean()) / r[early:].mean())
    return [r2, bic, error]


def predict_finals(finals: dict[Architecture, float]) -> tuple[float, float]:
    """Errors (RMS) of final ratios of a model left out: by ridge, and by the others' mean."""
    by_ridge, by_mean = [], []
    for model in {(arch.layers, arch.dim) for arch in finals}:
        out = [arch for arch in finals if (arch.layers, arch.dim) == model]
        kept = [arch for arch in finals if arch not in out]
        known = [finals[arch] for arch in kept]
        predicted = EmergencePredictor().fit(kept, known).predict(out).numpy()
        truth = np.array([finals[arch] for arch in out])
        by_ridge.extend((predicted - truth) ** 2)
        by_mean.extend((np.mean(known) - truth) ** 2)
    return math.sqrt(np.mean(by_ridge)), math.sqrt(np.mean(by_mean))


def trial(context: Context) -> dict[str, float]:
    """Train the models of one seed and fit all their layers."""
    options = context.options
    steps = checkpoints(options["steps"], options["checkpoints"])
    t = np.array(steps, dtype=np.float64)
    rivals = fits(steps[-1], options["restarts"])
    finals: dict[Architecture, float] = {}
    scores: dict[str, list[list[float]]] = {name: [] for name in rivals}
    for depth, width in product(options["depths"], options["widths"]):
        context.progress(f"{depth} layers of width {width}")
        found = histories(depth, width, steps, context.seed)
        for layer, r in enumerate(found, 1):
            finals[Architecture(layer, depth, width, HEADS, 4 * width)] = float(r[-1])
            for name, fit in rivals.items():
                scores[name].append(judge(fit, PARAMETERS[name], t, r))
    figures = {"steps": float(steps[-1])} | largest_model(found, t, options["restarts"])
    for name, rows in scores.items():
        r2, _, error = np.array(rows).T
        figures[f"mean R² of {name}"] = float(r2.mean())
        figures[f"lowest R² of {name}"] = float(r2.min())
        figures[f"median forecast error of {name}"] = float(np.median(error))
    bic = {name: np.array(rows)[:, 1] for name, rows in scores.items()}
    figures["share of layers with lower BIC than the logarithm"] = float(
        (bic[LAW] < bic[LOG]).mean()
    )
    ridge, mean = predict_finals(finals)
    figures |= {
        "error of final ratio by ridge": ridge,
        "error of final ratio by mean": mean,
        "largest final ratio": max(finals.values()),
    }
    return figures


def largest_model(found: Floats, t: Floats, restarts: int) -> dict[str, float]:
    """Measured ratios and fitted parameters of three layers."""
    figures: dict[str, float] = {}
    for place, layer in zip(PLACES, (0, len(found) // 2, -1), strict=True):
        r = found[layer]
        figures |= {f"{place}: ratio {i}": float(value) for i, value in enumerate(r)}
        params = EmergenceCurve.fit(t, r, restarts=restarts).params
        figures |= {f"{place}: {name}": value for name, value in params._asdict().items()}
    return figures


def _accuracy(measured: Measurements) -> tuple[bool, str]:
    r2 = measured["mean R² of law"]
    low = measured["lowest R² of law"].mean
    return r2.mean >= 0.9, f"{r2}, lowest layer {low:.3f} (the paper's models: 0.93 to 0.996)"


def _forecast(measured: Measurements) -> tuple[bool, str]:
    errors = {name: measured[f"median forecast error of {name}"].mean for name in PARAMETERS}
    text = ", ".join(f"{name} {100 * error:.1f} %" for name, error in errors.items())
    return errors[LAW] < min(errors[LOGISTIC], errors[POLYNOMIAL]), text


def _bic(measured: Measurements) -> tuple[bool, str]:
    share = measured["share of layers with lower BIC than the logarithm"].mean
    return share > 0.5, f"{100 * share:.0f} % of the layers"


def _architecture(measured: Measurements) -> tuple[bool, str]:
    ridge, mean = (measured[f"error of final ratio by {one}"] for one in ("ridge", "mean"))
    largest = measured["largest final ratio"].mean
    text = f"ridge {ridge}, mean {mean}; ratios reach {largest:.0f}, where large models reach 3,200"
    return ridge.mean < mean.mean, text


def plot(measured: Measurements, figure: Any) -> None:
    """Curves of three layers with the law's fit, and R² and forecast errors of law and rivals."""
    curves, quality = figure.subplots(1, 2, width_ratios=(1.5, 1))
    count = sum(name.startswith(f"{PLACES[0]}: ratio") for name in measured)
    steps = checkpoints(int(measured["steps"].mean), count)
    grid = torch.logspace(0, math.log10(steps[-1]), 200)
    for name, colour in zip(PLACES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        ratios = [measured[f"{name}: ratio {i}"].values[0] for i in range(count)]
        params = (measured[f"{name}: {field}"].values[0] for field in EmergenceParams._fields)
        curves.plot(steps, ratios, "o", ms=3, color=colour, label=name)
        fitted = EmergenceCurve(EmergenceParams(*params)).predict(grid)
        curves.plot(grid, fitted, color=colour, lw=1)
    curves.set_xscale("log")
    curves.set(xlabel="training step", ylabel="largest / median activation")
    curves.legend(fontsize=8)
    curves.set_title("the largest model: measured (dots), and the law (lines)", fontsize=10)

    names = list(PARAMETERS)
    for row, (what, colour) in enumerate(
        (("mean R² of", "tab:blue"), ("median forecast error of", "tab:orange"))
    ):
        heights = [measured[f"{what} {name}"].mean for name in names]
        places = [place + 0.4 * row - 0.2 for place in range(len(names))]
        quality.bar(places, heights, 0.4, color=colour, label=what.removesuffix(" of"))
        for place, height in zip(places, heights, strict=True):
            quality.text(place, min(height, 1.1) + 0.02, f"{height:.2f}", ha="center", fontsize=7)
    quality.set_xticks(range(len(names)), [f"{n}\n({PARAMETERS[n]})" for n in names], fontsize=8)
    quality.set_ylim(0, 1.25)
    quality.legend(fontsize=7, loc="upper right")
    quality.set_title("fits (parameters)", fontsize=10)


EXPERIMENT = Experiment(
    paper=57,
    claim=Claim(
        statement=(
            "An exponentially modulated logarithm of five parameters describes how massive "
            "activations emerge in training, and the architecture predicts where they settle."
        ),
        figure="mean R² 0.984 over 188 layers of nine models",
        source="abstract",
    ),
    setup=(
        "Six pre-norm decoders (2, 4 or 6 layers of width 32 or 64, 4 heads) on text of a "
        "synthetic grammar with a first symbol of its own, 400 steps of AdamW at 3e-3 on 16 "
        "windows of 32 symbols; the ratio of each block's output (of means over 10 fixed windows) "
        "at 40 steps spread over log t. Forecasts are of the last quarter of these from the "
        "others, errors relative to the mean ratio there. Networks as small as these stay at "
        "ratios of about ten, far below the thousands of large ones."
    ),
    baseline=(
        "five-parameter logistic and polynomial in log t, and a + b log(t + c), fitted with as "
        "many starts; the mean of the other models' final ratios"
    ),
    criteria=(
        Criterion("mean R² of the law at least 0.9", _accuracy),
        Criterion(
            "median forecast error of the law below that of both rivals of five parameters",
            _forecast,
        ),
        Criterion("BIC of the law below the logarithm's on more than half of the layers", _bic),
        Criterion(
            "ridge regression on the architecture predicts final ratios of a model left out with "
            "less error than the mean of the others",
            _architecture,
        ),
    ),
    budgets={
        "full": {
            "seeds": 1,
            "steps": 400,
            "checkpoints": 40,
            "depths": (2, 4, 6),
            "widths": (32, 64),
            "restarts": 32,
        },
        "smoke": {
            "seeds": 1,
            "steps": 44,
            "checkpoints": 40,
            "depths": (2,),
            "widths": (8, 16),
            "restarts": 2,
        },
    },
    trial=trial,
    plot=plot,
)
