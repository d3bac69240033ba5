"""Paper 4: is there a surrogate for Bayesian optimisation that is best on every problem?

Sampled networks, ensembles, deep kernels, networks of infinite width and a Gaussian process choose
batches from the same Sobol points by the same acquisition function. All seeds of a method are
fitted at once, so a run is a method on a problem; finished runs are kept in the output folder.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from torchzoo.experiment import (
    Claim,
    Context,
    Criterion,
    Experiment,
    Measurement,
    Measurements,
    versions,
)
from torchzoo.experiments.gp.bnn_surrogates_problems import LARGE, PROBLEMS, Table
from torchzoo.files import write_json
from torchzoo.gp import (
    DKLSurrogate,
    EnsembleSurrogate,
    GPSurrogate,
    HMCSurrogate,
    InfiniteWidthSurrogate,
    LaplaceSurrogate,
    SGHMCSurrogate,
    StandardizedSurrogate,
    run_rounds,
)

ROUNDS, TEST_POINTS = 6, 100
SURROGATES = ("HMC", "SGHMC", "ensemble", "DKL", "I-BNN", "GP")
DEFAULT = ("Branin", "nonstationary", LARGE)
ROUNDING = 1e-9  # of mean ranks, which are sums of halves over a count
TWICE = ("I-BNN", "GP")  # with twice as many seeds on the large problem


def surrogate(method: str, options: Mapping[str, Any], seed: int) -> StandardizedSurrogate | None:
    """A surrogate with the settings of the budget; None for random search."""
    net: dict[str, Any] = {"hidden": options["hidden"]}
    common: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
    steps, lr = options["steps"], 1e-2
    made: dict[str, Callable[[], StandardizedSurrogate | None]] = {
        "random": lambda: None,
        "GP": lambda: GPSurrogate(max_iter=options["gp iterations"], **common),
        "I-BNN": lambda: InfiniteWidthSurrogate(max_iter=options["gp iterations"], **common),
        "DKL": lambda: DKLSurrogate(
            pretrain_steps=steps, num_steps=options["kernel steps"], lr=lr, **net, **common
        ),
        "ensemble": lambda: EnsembleSurrogate(num_steps=steps, lr=lr, **net, **common),
        "Laplace": lambda: LaplaceSurrogate(**net, **common),
        "SGHMC": lambda: SGHMCSurrogate(
            num_steps=2 * steps, burn_in=steps, keep_every=5, **net, **common
        ),
        "HMC": lambda: HMCSurrogate(
            num_samples=options["samples"],
            burn_in=options["burn-in"],
            num_leapfrog=options["leapfrog"],
            pretrain_steps=steps,
            lr=lr,
            warm_start=True,
            **net,
            **common,
        ),
    }
    return made[method]()


def play(
    problem: str, method: str, seeds: list[int], options: Mapping[str, Any], checkpoint: Path | None
) -> dict[str, list[float]]:
    """Optimise with all seeds at once: figures by name, one each seed."""
    table = Table(problem, seeds, options["candidates"])
    model = surrogate(method, options, seeds[0])
    history = run_rounds(
        model,
        table,
        table.candidates,
        initial=options["initial"],
        rounds=ROUNDS,
        q=options["q"],
        generator=torch.Generator().manual_seed(1000 + seeds[0]),
        checkpoint=checkpoint,
    )
    reached = table.values.gather(-1, history.chosen).cummax(-1).values
    gap = (table.values.amax(-1, keepdim=True) - reached) / table.spread[:, None]
    ends = [options["initial"] + options["q"] * i - 1 for i in range(ROUNDS + 1)]
    figures = {f"regret, round {i}": gap[:, end].tolist() for i, end in enumerate(ends)}
    if model is not None:
        x, y = table.test(TEST_POINTS)
        density = model.posterior(x).log_prob(y).mean((-2, -1)) + table.spread.log()
        figures["NLL"] = (-density).tolist()
    return figures


@cache
def play_all(
    first: int, settings: tuple[tuple[str, Any], ...], folder: Path | None
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """All runs of a batch of seeds; those that are finished come from the folder."""
    options = dict(settings)
    found = {}
    for problem in options["problems"]:
        for method in options["methods"]:
            count = options["seeds"] * (2 if problem == LARGE and method in TWICE else 1)
            seeds = list(range(first, first + options["seeds"]))
            seeds += [10_000 + seed for seed in seeds[: count - len(seeds)]]
            stem = None if folder is None else folder / f"{problem}-{method}"
            done = None if stem is None else stem.with_suffix(".json")
            if done is not None and done.exists():
                found[problem, method] = json.loads(done.read_text(encoding="utf-8"))
                continue
            path = None if stem is None else stem.with_suffix(".safetensors")
            found[problem, method] = play(problem, method, seeds, options, path)
            if done is not None and path is not None:
                write_json(done, found[problem, method])
                path.unlink()
    return found


def state_folder(out: Path, first: int, settings: tuple[tuple[str, Any], ...]) -> Path:
    """Where finished runs are kept, apart for other code, settings or seeds."""
    source = inspect.getsource(sys.modules[__name__])
    key = hashlib.sha256(repr((source, first, settings, versions())).encode()).hexdigest()
    return out / f"bnn_surrogates.runs-{key[:16]}"


def trial(context: Context) -> dict[str, float]:
    """One seed's figures; the first trial plays all seeds."""
    count = context.options["seeds"]
    first = context.seed // count * count
    settings = tuple(sorted(context.options.items()))
    folder = None if context.out is None else state_folder(context.out, first, settings)
    context.progress("all runs")
    found = play_all(first, settings, folder)
    index = context.seed - first
    figures = {}
    for (problem, method), runs in found.items():
        for name, values in runs.items():
            figures[f"{name}, {method}, {problem}"] = values[index]
        if problem == LARGE and method in TWICE:
            last = runs[f"regret, round {ROUNDS}"]
            figures[f"regret of other seeds, {method}, {problem}"] = last[count + index]
    if folder is not None and index == count - 1:
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def regret(measured: Measurements, method: str, problem: str, end: int = ROUNDS) -> Measurement:
    """Simple regret over the spread of the function, after a round."""
    return measured[f"regret, round {end}, {method}, {problem}"]


def mean_ranks(measured: Measurements) -> dict[str, float]:
    """Rank by final regret, ties shared, averaged over problems and seeds; random search is in."""
    from scipy.stats import rankdata

    methods = (*SURROGATES, "random")
    ranks = []
    for problem in DEFAULT:
        runs = [regret(measured, method, problem).values for method in methods]
        ranks += [rankdata(column) for column in zip(*runs, strict=True)]
    means = sum(ranks) / len(ranks)
    return {method: float(rank) for method, rank in zip(methods, means, strict=True)}


def _depends(measured: Measurements) -> tuple[bool, str]:
    best = {p: min(SURROGATES, key=lambda m: regret(measured, m, p).mean) for p in DEFAULT}
    swaps = []
    for a, b in combinations(SURROGATES, 2):
        ends = {p: (regret(measured, a, p) - regret(measured, b, p)).interval for p in DEFAULT}
        lower = [p for p, (_, high) in ends.items() if high < 0]
        higher = [p for p, (low, _) in ends.items() if low > 0]
        if lower and higher:
            swaps.append(f"{a} beats {b} on {lower[0]}, {b} beats {a} on {higher[0]}")
    holds = len(set(best.values())) > 1 and bool(swaps)
    text = ", ".join(f"{p}: {m}" for p, m in best.items())
    return holds, f"best {text}; {'; '.join(swaps) or 'no pair changes order beyond its interval'}"


def _hmc(measured: Measurements) -> tuple[bool, str]:
    ranks = mean_ranks(measured)
    holds = ranks["HMC"] <= min(ranks["SGHMC"], ranks["ensemble"]) + ROUNDING
    return holds, ", ".join(f"{method} {rank:.2f}" for method, rank in ranks.items())


def _dkl(measured: Measurements) -> tuple[bool, str]:
    ranks = mean_ranks(measured)
    return ranks["DKL"] <= ranks[
        "HMC"
    ] + 1 + ROUNDING, f"{ranks['DKL']:.2f} against {ranks['HMC']:.2f}"


def _infinite(measured: Measurements) -> tuple[bool, str]:
    ours, other = (
        Measurement(
            method,
            (
                *regret(measured, method, LARGE).values,
                *measured[f"regret of other seeds, {method}, {LARGE}"].values,
            ),
        )
        for method in TWICE
    )
    low, high = (ours - other).interval
    return high < 0, f"{ours} against {other}, difference within [{low:.3g}, {high:.3g}]"


def plot(measured: Measurements, figure: Any) -> None:
    """Regret by round on each problem, and mean ranks beside densities."""
    axes = figure.subplots(2, 2).flatten()
    methods = (*SURROGATES, "random")
    colours = dict(zip(methods, ("C0", "C4", "C1", "C2", "C3", "black", "tab:gray"), strict=True))
    for ax, problem in zip(axes, DEFAULT, strict=False):
        for place, method in enumerate(methods):
            runs = [regret(measured, method, problem, i) for i in range(ROUNDS + 1)]
            style = "--" if method in ("GP", "random") else "-"
            ax.plot([r.mean for r in runs], style, color=colours[method], label=method)
            ax.errorbar(
                [ROUNDS + 0.15 * (place + 1)], [runs[-1].mean], yerr=[2 * runs[-1].std_error],
                color=colours[method], capsize=1.5, fmt="o", ms=3, lw=1,
            )  # fmt: skip
        ax.set_xticks(range(ROUNDS + 1))
        ax.set(title=problem, xlabel="round", ylabel="regret / sd of f")
        ax.set_ylim(bottom=0)
    ranks = mean_ranks(measured)
    order = sorted(methods, key=ranks.__getitem__, reverse=True)
    axes[3].barh(order, [ranks[m] for m in order], color=[colours[m] for m in order], height=0.6)
    for place, method in enumerate(order):
        axes[3].text(ranks[method] + 0.05, place, f"{ranks[method]:.1f}", va="center", fontsize=8)
    axes[3].set(title="Mean rank by final regret (1 is best)", xlim=(0, len(methods)))
    for ax in axes:
        ax.title.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    paper=4,
    claim=Claim(
        statement=(
            "Which surrogate optimises best depends on the problem; among fully stochastic "
            "networks Hamiltonian Monte Carlo is the best inference, deep kernel learning is "
            "competitive, and networks of infinite width are promising in high dimensions."
        ),
        figure="rankings of surrogates on synthetic and real problems",
        source="abstract",
    ),
    setup=(
        "Branin, a nonstationary function of one input and random networks of 50 inputs; 512 "
        "Sobol points a seed as candidates, 10 of them evaluated first, then 6 rounds of 4, chosen "
        "greedily by expected improvement on common samples. Networks of 2 x 32 tanh units with "
        "prior variance 10 and noise variance 0.1 (ensemble: 1); 60 samples of Hamiltonian Monte "
        "Carlo after 40 of burn-in, 20 steps each, from the last state. Regret is to the best "
        "candidate."
    ),
    baseline=(
        "random search, and a Gaussian process with a Matérn-5/2 kernel, on the same candidates"
    ),
    criteria=(
        Criterion(
            "the surrogate of the lowest mean regret is not the same on all problems, and some "
            "pair changes order between two problems with 95 % intervals of paired differences "
            "that exclude 0 on both",
            _depends,
        ),
        Criterion("the mean rank of HMC is not above those of SGHMC and of the ensemble", _hmc),
        Criterion("the mean rank of deep kernel learning is at most one above HMC's", _dkl),
        Criterion(
            "in 50 dimensions the regret of the infinite-width network is below the Gaussian "
            "process's, with a 95 % interval over twice as many seeds that excludes 0",
            _infinite,
        ),
    ),
    budgets={
        "full": {
            "seeds": 5,
            "problems": DEFAULT,
            "methods": (*SURROGATES, "random"),
            "candidates": 512,
            "initial": 10,
            "q": 4,
            "hidden": (32, 32),
            "steps": 500,
            "kernel steps": 300,
            "gp iterations": 100,
            "samples": 60,
            "burn-in": 40,
            "leapfrog": 20,
        },
        "extended": {
            "seeds": 5,
            "problems": tuple(PROBLEMS),
            "methods": (*SURROGATES, "Laplace", "random"),
            "candidates": 512,
            "initial": 10,
            "q": 4,
            "hidden": (32, 32),
            "steps": 500,
            "kernel steps": 300,
            "gp iterations": 100,
            "samples": 60,
            "burn-in": 40,
            "leapfrog": 20,
        },
        "smoke": {
            "seeds": 2,
            "problems": DEFAULT,
            "methods": (*SURROGATES, "random"),
            "candidates": 32,
            "initial": 5,
            "q": 1,
            "hidden": (4,),
            "steps": 5,
            "kernel steps": 2,
            "gp iterations": 2,
            "samples": 3,
            "burn-in": 2,
            "leapfrog": 2,
        },
    },
    trial=trial,
    plot=plot,
    together=True,
)
