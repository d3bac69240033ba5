"""Paper 151: how close is the independent interval approximation to simulated excursions?

Long paths of six processes with a monotone covariance are cut at their zero crossings. The law of
the lengths is compared with the approximation and with an exponential law of Rice's mean, and
exponents with exact ones; a process whose covariance oscillates must be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.gp import excursion_times, persistency_exponent, simulate_stationary, slepian_iia


def diffusion(d: float) -> Callable[[Tensor], Tensor]:
    """A field that diffuses from white noise in d dimensions, in logarithmic time."""
    return lambda t: torch.cosh(t / 2) ** (-d / 2)


def acceleration(t: Tensor) -> Tensor:
    """The place of a randomly accelerated particle, in logarithmic time."""
    return 1.5 * torch.exp(-t / 2) - 0.5 * torch.exp(-1.5 * t)


def gauss(t: Tensor) -> Tensor:
    return torch.exp(-(t**2) / 2)


def matern52(t: Tensor) -> Tensor:
    return (1 + t + t**2 / 3) * torch.exp(-t)


def oscillating(t: Tensor) -> Tensor:
    """Not monotone: the sign of r' changes."""
    return torch.cos(t) * torch.exp(-(t**2) / 20)


PROCESSES = {
    "diffusion, d=1": diffusion(1),
    "diffusion, d=2": diffusion(2),
    "diffusion, d=3": diffusion(3),
    "acceleration": acceleration,
    "gauss": gauss,
    "matern-5/2": matern52,
}
EXACT = {"diffusion, d=2": 3 / 16, "acceleration": 1 / 4}
STEP, DURATION = 0.02, 5000.0
TAIL = 0.2  # the share of the longest excursions from which a tail's slope is estimated


def distance(lengths: Tensor, cdf: Tensor) -> float:
    """Largest distance of an empirical distribution function from another, given at its places."""
    n = len(lengths)
    values = cdf[lengths.argsort()]
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((values - steps[:-1]).abs(), (values - steps[1:]).abs()).max())


def tail_slope(lengths: Tensor) -> float:
    """Rate of an exponential tail by maximum likelihood, from the longest excursions."""
    start = lengths.quantile(1 - TAIL)
    return float(1 / (lengths[lengths > start] - start).mean())


def simulated(cov: Callable[[Tensor], Tensor], paths: int, generator: torch.Generator) -> Tensor:
    """Lengths of the excursions of some paths of 5,000 time units, a few paths at a time."""
    found = []
    for part in torch.arange(paths).split(4):
        points = round(DURATION / STEP) + 1
        x = simulate_stationary(cov, DURATION, points, num_paths=len(part), generator=generator)
        found += excursion_times(x, STEP)
    return torch.cat(found)


def trial(context: Context) -> dict[str, float]:
    """All distances and exponents of one seed."""
    generator = torch.Generator().manual_seed(context.seed)
    figures = {}
    for name, cov in PROCESSES.items():
        context.progress(name)
        lengths = simulated(cov, context.options["paths"], generator)
        iia = slepian_iia(cov, t_max=float(lengths.max()) + 1)
        rice = float(iia.mean)
        figures[f"excursions, {name}"] = float(len(lengths))
        figures[f"mean over Rice's, {name}"] = float(lengths.mean()) / rice
        figures[f"distance, {name}"] = distance(lengths, 1 - iia.survival(lengths))
        figures[f"distance of Poisson, {name}"] = distance(lengths, -torch.expm1(-lengths / rice))
        figures[f"exponent, {name}"] = float(iia.exponent)
        figures[f"simulated exponent, {name}"] = tail_slope(lengths)
    forced = slepian_iia(oscillating)
    figures["refused"] = float(refused())
    figures["least implied density, oscillating"] = float(forced.pdf(forced.t).min())
    return figures


def refused() -> bool:
    """Whether the oscillating process is refused."""
    try:
        persistency_exponent(oscillating)
    except ValueError:
        return True
    return False


def _exponents(measured: Measurements) -> tuple[bool, str]:
    pairs = [(measured[f"exponent, {name}"].mean, exact) for name, exact in EXACT.items()]
    return all(abs(value - exact) < 0.02 for value, exact in pairs), ", ".join(
        f"{value:.4f} against {exact:.4f} ({name})"
        for (value, exact), name in zip(pairs, EXACT, strict=True)
    )


def _distances(measured: Measurements) -> tuple[bool, str]:
    pairs = {
        name: (measured[f"distance, {name}"].mean, measured[f"distance of Poisson, {name}"].mean)
        for name in PROCESSES
    }
    holds = all(ours < 0.03 and ours < 0.7 * poisson for ours, poisson in pairs.values())
    return holds, ", ".join(
        f"{ours:.3f} against {poisson:.3f} ({name})" for name, (ours, poisson) in pairs.items()
    )


def _refusal(measured: Measurements) -> tuple[bool, str]:
    density = measured["least implied density, oscillating"].mean
    said = measured["refused"].mean == 1
    return said and density < 0, f"{'refused' if said else 'taken'}, density down to {density:.3g}"


def plot(measured: Measurements, figure: Any) -> None:
    """Survival functions of two processes; exponents; the implied density of a refused one."""
    curves, exponents, density = figure.subplots(1, 3)
    for name, colour in (("diffusion, d=2", "tab:blue"), ("gauss", "tab:orange")):
        lengths = simulated(PROCESSES[name], 1, torch.Generator().manual_seed(0)).sort().values
        iia = slepian_iia(PROCESSES[name])
        seen = iia.survival(iia.t)
        curves.semilogy(iia.t, seen, color=colour, lw=1, label=f"{name}, IIA")
        curves.semilogy(iia.t, torch.exp(-iia.t / iia.mean), ":", color=colour, lw=1)
        left = 1 - torch.arange(len(lengths)) / len(lengths)
        curves.semilogy(lengths, left, ".", color=colour, ms=2)
    curves.set_ylim(2e-3, 1.2)
    curves.set_xlim(0, 25)
    curves.set_xlabel("t")
    curves.set_title("P(T > t)\nsimulated (dots), Poisson (dotted)", fontsize=9)
    curves.legend(fontsize=7, frameon=False)

    for row, name in enumerate(PROCESSES):
        spread = measured[f"simulated exponent, {name}"]
        exponents.errorbar(
            spread.mean, row, xerr=2 * spread.std_error, fmt="o", color="tab:gray", ms=4
        )
        exponents.plot(measured[f"exponent, {name}"].mean, row, "|", color="tab:blue", ms=16)
        if name in EXACT:
            exponents.plot(EXACT[name], row, "x", color="tab:red", ms=6)
    exponents.set_yticks(range(len(PROCESSES)), list(PROCESSES), fontsize=8)
    exponents.set_title("exponent\nIIA (bar), simulated (dot), exact (x)", fontsize=9)

    forced = slepian_iia(oscillating)
    density.plot(forced.t, forced.pdf(forced.t), color="tab:blue", lw=1)
    density.axhline(0, color="black", lw=0.5)
    density.set_xlim(0, 15)
    density.set_xlabel("t")
    density.set_title("implied density, oscillating\nbelow 0: refused", fontsize=9)
    for axes in (curves, exponents, density):
        axes.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    paper=151,
    claim=Claim(
        statement=(
            "Matching the expected clipped Slepian process gives close approximations to "
            "exceedance distributions and persistency exponents of stationary Gaussian processes "
            "whose covariance is monotone, and none for those where it is not."
        ),
        figure="a proper distribution for monotone covariances, with an explicit stochastic form",
        source="abstract",
    ),
    setup=(
        f"Six processes, each 13 paths of {DURATION:,.0f} time units in steps of {STEP} a seed, by "
        "circulant embedding; excursions by linear interpolation. Simulated exponents from the "
        "longest fifth of the excursions. Control: cos(t) exp(-t²/20)."
    ),
    baseline="an exponential law of Rice's mean, as a Poisson process of crossings would have",
    criteria=(
        Criterion(
            "the exponents of diffusion in two dimensions and of random acceleration are within "
            "0.02 of the exact 3/16 and 1/4",
            _exponents,
        ),
        Criterion(
            "for every monotone process the distribution function is within 0.03 of the simulated "
            "one everywhere, and within 0.7 of the Poisson law's distance",
            _distances,
        ),
        Criterion(
            "the oscillating process is refused, and the density that matching implies for it "
            "falls below 0",
            _refusal,
        ),
    ),
    budgets={"full": {"seeds": 3, "paths": 13}, "smoke": {"seeds": 1, "paths": 1}},
    trial=trial,
    plot=plot,
)
