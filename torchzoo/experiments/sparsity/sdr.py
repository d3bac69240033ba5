"""Paper 60: do simulated dendritic segments err as often as the closed forms say?

Segments with a few synapses onto a sparse pattern are shown random and noisy inputs; how often they
fire is compared with the prediction, and so is the threshold that errs least.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.sparsity import (
    SDR,
    DendriteSegments,
    optimal_threshold,
    sdr_false_positive,
    sdr_union_false_positive,
)

ACTIVE, THETA = 40, 3
CELLS, SYNAPSES = (500, 1000, 2000, 4000), (10, 15, 20)
UNION = {"n": 2000, "a": 40, "s": 10, "theta": 6}
PATTERNS = range(1, 31)
NOISY = ((500, 15, 0.5), (500, 20, 0.5), (1000, 12, 0.5), (1000, 20, 0.6))
"""Cells, synapses and share of the pattern replaced; the least error of each is above 1e-3."""
DENSE_CELLS, DENSE_SYNAPSES = 2000, (10, 20)
DENSITIES = {"dense": 2, "sparse": 50}
CHUNK = 20_000  # inputs simulated at a time


def rate_name(n: int, s: int) -> str:
    return f"fires, {n} cells, {s} synapses"


def union_name(count: int) -> str:
    return f"fires, union of {count}"


def theta_name(n: int, s: int, noise: float) -> str:
    return f"best threshold, {n} cells, {s} synapses, noise {noise:g}"


def density_name(kind: str, s: int) -> str:
    return f"fires, {kind}, {s} synapses"


def inputs(n: int, a: int, trials: int, generator: torch.Generator) -> list[SDR]:
    """Random inputs, in chunks."""
    sizes = [len(part) for part in torch.arange(trials).split(CHUNK)]
    return [SDR.random(n, a, (size,), generator) for size in sizes]


def segments(
    n: int, a: int, sizes: tuple[int, ...], generator: torch.Generator
) -> DendriteSegments:
    """A layer of segments of several sizes, all onto one random pattern."""
    layer = DendriteSegments(n, len(sizes), max(sizes), 1)
    pattern = SDR.random(n, a, (), generator)
    for place, size in enumerate(sizes):
        layer.store(pattern, place, size, generator)
    return layer


def single_patterns(trials: int, generator: torch.Generator) -> dict[str, float]:
    """How often segments fire for random inputs, for every number of cells and synapses."""
    figures = {}
    for n in CELLS:
        layer = segments(n, ACTIVE, SYNAPSES, generator)
        overlap = torch.cat([layer.overlaps(x) for x in inputs(n, ACTIVE, trials, generator)])
        for s, fires in zip(SYNAPSES, (overlap >= THETA).unbind(-1), strict=True):
            figures[rate_name(n, s)] = fires.double().mean().item()
    return figures


def unions(trials: int, generator: torch.Generator) -> dict[str, float]:
    """How often unions of random patterns fire, each trial with a union and an input of its own.

    The input is cells 0 to a - 1, which is as good as any; only synapses onto it are kept.
    """
    n, a, s, theta = UNION.values()
    hits = torch.zeros(trials, a + 1, dtype=torch.bool)
    figures = {}
    for count in PATTERNS:
        for part, more in zip(hits.split(CHUNK), inputs(n, s, trials, generator), strict=True):
            part.scatter_(-1, more.indices.clamp_max(a), True)
        figures[union_name(count)] = (hits[:, :a].sum(-1) >= theta).double().mean().item()
    return figures


def best_theta(n: int, s: int, noise: float, trials: int, generator: torch.Generator) -> int:
    """The threshold with the fewest false alarms and misses in a simulation, the lowest on ties."""
    pattern = SDR.random(n, ACTIVE, (), generator)
    layer = DendriteSegments(n, 1, s, 1)
    layer.store(pattern, 0, s, generator)
    errors = torch.zeros(s, dtype=torch.int64)
    theta = torch.arange(1, s + 1)
    for others in inputs(n, ACTIVE, trials, generator):
        noisy = SDR(n, pattern.indices.expand(len(others.indices), -1)).noise(noise, generator)
        errors += (layer.overlaps(others) >= theta).sum(0) + (layer.overlaps(noisy) < theta).sum(0)
    return int(theta[errors.argmin()])


def trial(context: Context) -> dict[str, float]:
    """All simulated rates and thresholds of one seed."""
    options = context.options
    generator = torch.Generator().manual_seed(context.seed)
    context.progress("single patterns")
    figures = {"inputs a rate": float(options["trials"])}
    figures |= single_patterns(options["trials"], generator)
    context.progress("unions")
    figures |= unions(options["trials"], generator)
    context.progress("noise")
    for setting in NOISY:
        figures[theta_name(*setting)] = best_theta(*setting, options["noisy"], generator)
    context.progress("density")
    for kind, share in DENSITIES.items():
        a = DENSE_CELLS // share
        layer = segments(DENSE_CELLS, a, DENSE_SYNAPSES, generator)
        parts = inputs(DENSE_CELLS, a, options[kind], generator)
        overlap = torch.cat([layer.overlaps(x) for x in parts])
        fires = overlap >= torch.tensor(DENSE_SYNAPSES) // 2
        for s, rate in zip(DENSE_SYNAPSES, fires.double().mean(0).tolist(), strict=True):
            figures[density_name(kind, s)] = rate
    return figures


@cache
def predictions() -> dict[str, float]:
    """The closed forms of the rates that the headline judges."""
    single = sdr_false_positive(torch.tensor(CELLS)[:, None], ACTIVE, torch.tensor(SYNAPSES), THETA)
    names = [rate_name(n, s) for n in CELLS for s in SYNAPSES]
    found = dict(zip(names, single.flatten().tolist(), strict=True))
    union = sdr_union_false_positive(**UNION, num_patterns=torch.tensor(PATTERNS), exact=True)
    return found | dict(zip(map(union_name, PATTERNS), union.tolist(), strict=True))


def slope(rates: list[float] | Tensor) -> float:
    """Slope of log rate in log n, by least squares."""
    return float(np.polyfit(np.log(CELLS), np.log(np.asarray(rates)), 1)[0])


def predicted_theta(n: int, s: int, noise: float) -> int:
    return int(optimal_threshold(n, ACTIVE, s, noise).theta)


def inside(measured: Measurements) -> tuple[int, int]:
    """How many rates, of all seeds, are within 3 binomial standard deviations, and of how many."""
    trials = measured["inputs a rate"].mean
    found = [
        abs(rate - p) <= 3 * (p * (1 - p) / trials) ** 0.5
        for name, p in predictions().items()
        for rate in measured[name].values
    ]
    return sum(found), len(found)


def _accurate(measured: Measurements) -> tuple[bool, str]:
    good, number = inside(measured)
    return good >= 0.95 * number, f"{good} of {number} rates ({100 * good / number:.1f} %)"


def _power_law(measured: Measurements) -> tuple[bool | None, str]:
    predicted = predictions()
    ratios = []
    for s in SYNAPSES:
        names = [rate_name(n, s) for n in CELLS]
        rates = [measured[name].mean for name in names]
        if not all(rates):
            return None, f"void, no segment of {s} synapses fired at some size"
        ratios.append(slope(rates) / slope([predicted[name] for name in names]))
    return max(abs(r - 1) for r in ratios) <= 0.1, ", ".join(
        f"{ratio:.3f} of the predicted slope with {s} synapses"
        for s, ratio in zip(SYNAPSES, ratios, strict=True)
    )


def _thresholds(measured: Measurements) -> tuple[bool, str]:
    pairs = [(measured[theta_name(*case)].values, predicted_theta(*case)) for case in NOISY]
    holds = all(abs(value - best) <= 1 for values, best in pairs for value in values)
    return holds, "; ".join(
        f"{', '.join(f'{v:g}' for v in values)} against {best}" for values, best in pairs
    )


def _needs_sparsity(measured: Measurements) -> tuple[bool, str]:
    dense, sparse = (
        [measured[density_name(kind, s)].mean for s in DENSE_SYNAPSES] for kind in DENSITIES
    )
    return min(dense) > 0.3 and max(sparse) < 1e-3, "; ".join(
        f"{s} synapses: dense {one:.3f}, sparse {two:.1e}"
        for s, one, two in zip(DENSE_SYNAPSES, dense, sparse, strict=True)
    )


def plot(measured: Measurements, figure: Any) -> None:
    """Rates against their predictions, by number of cells and of patterns; best thresholds."""
    left, middle, right = figure.subplots(1, 3)
    predicted = predictions()
    for s, colour in zip(SYNAPSES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        names = [rate_name(n, s) for n in CELLS]
        left.loglog(CELLS, [predicted[name] for name in names], color=colour, lw=1)
        left.loglog(
            CELLS, [measured[name].mean for name in names], "o", color=colour, ms=4, label=str(s)
        )
    left.set_xticks(CELLS, map(str, CELLS))
    left.minorticks_off()
    left.set_xlabel("cells (40 active)")
    left.set_title(f"random input fires, theta = {THETA}", fontsize=10)
    left.legend(title="synapses", fontsize=8, frameon=False)

    names = [union_name(count) for count in PATTERNS]
    middle.semilogy(PATTERNS, [predicted[name] for name in names], color="tab:blue", lw=1)
    rates = [(count, measured[name].mean) for count, name in zip(PATTERNS, names, strict=True)]
    seen = [(count, rate) for count, rate in rates if rate > 0]
    if seen:
        middle.semilogy(*zip(*seen, strict=True), "o", color="tab:blue", ms=4)
    middle.set_ylim(1e-7, 1.5)
    middle.set_xlabel("patterns in the segment")
    middle.set_title("union, theta = 6; lines: closed form", fontsize=10)

    rows = range(len(NOISY))
    best = [predicted_theta(*case) for case in NOISY]
    right.plot(best, rows, "|", color="black", ms=22, label="predicted")
    for row, case in zip(rows, NOISY, strict=True):
        values = measured[theta_name(*case)].values
        spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
        label = "simulated" if row == 0 else None
        right.plot(values, np.add(row, spread), "o", color="tab:blue", ms=4, label=label)
    right.set_yticks(rows, [f"n={n}, s={s}\nnoise {noise:g}" for n, s, noise in NOISY], fontsize=8)
    right.set_xlim(0, max(best) + 3)
    right.set_xticks(range(0, max(best) + 4, 2))
    right.set_ylim(-0.6, len(NOISY) + 0.1)
    right.set_xlabel("threshold of least error")
    right.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    paper=60,
    claim=Claim(
        statement=(
            "A dendritic segment recognises sparse patterns of many cells accurately and in spite "
            "of noise from a tiny number of synapses, can hold several patterns at once, and the "
            "theory predicts its best threshold."
        ),
        figure="predicted thresholds match those of NMDA spikes",
        source="abstract",
    ),
    setup=(
        "Random patterns with 40 active cells. 200,000 random inputs a rate: 500 to 4,000 cells "
        "and 10, 15 or 20 synapses at threshold 3; unions of 1 to 30 patterns of 10 synapses each "
        "in 2,000 cells at threshold 6, each trial with its own union. Best thresholds from "
        "100,000 random and 100,000 noisy inputs, for four pairs of size and noise whose least "
        "error is above 0.001. Dense control: half of 2,000 cells active (20,000 inputs) against "
        "one in 50 (200,000), threshold half of the synapses."
    ),
    baseline="the closed forms; for the last criterion, patterns with half of the cells active",
    criteria=(
        Criterion(
            "at least 95 % of the rates (12 single, 30 unions, every seed) are within 3 binomial "
            "standard deviations of the closed form",
            _accurate,
        ),
        Criterion(
            "the slope of log error in log n is within 10 % of the closed form's", _power_law
        ),
        Criterion(
            "the threshold of least error is within 1 of the predicted one in all four settings "
            "and every seed",
            _thresholds,
        ),
        Criterion(
            "dense patterns fire by mistake in over 30 % of cases, sparse ones in under 0.1 %, "
            "with as many synapses",
            _needs_sparsity,
        ),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "trials": 200_000,
            "noisy": 100_000,
            "dense": 20_000,
            "sparse": 200_000,
        },
        "smoke": {"seeds": 1, "trials": 2000, "noisy": 2000, "dense": 500, "sparse": 2000},
    },
    trial=trial,
    plot=plot,
)
