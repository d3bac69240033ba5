"""Experiments: a paper's claim, scaled down, against what was measured.

An experiment module defines one `EXPERIMENT`. Its criteria are written down before anything runs,
and `verdict` turns them into one of three words by one rule that is the same for every paper, so
no experiment can choose its own verdict after seeing its figures.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import platform
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from torchzoo.catalogue import Paper, suggest
from torchzoo.errors import UnknownNameError
from torchzoo.files import atomic_path, write_json
from torchzoo.version import __version__
from torchzoo.workers import Place, find, place, side_by_side

Verdict = Literal["reproduced", "partly", "not reproduced"]

RULE = (
    "reproduced: every criterion holds; partly: the first criterion, the headline, holds but "
    "another fails; not reproduced: the headline fails or is void. A void criterion, one whose "
    "premise does not hold, counts neither way."
)


@dataclass(frozen=True)
class Claim:
    """What the paper says: the statement in our words, its figure, and where it stands."""

    statement: str
    figure: str
    source: str


@dataclass(frozen=True)
class Measurement:
    """One measured figure, a value a seed."""

    name: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def std_error(self) -> float:
        """Standard error of the mean (0 for a single seed)."""
        n = len(self.values)
        if n < 2:
            return 0.0
        return math.sqrt(math.fsum((v - self.mean) ** 2 for v in self.values) / (n - 1) / n)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean, by Student's t; endless for a single seed."""
        from scipy.stats import t

        n = len(self.values)
        reach = float(t.ppf(0.975, n - 1)) * self.std_error if n > 1 else math.inf
        return self.mean - reach, self.mean + reach

    def __sub__(self, other: Measurement) -> Measurement:
        """The paired difference, seed by seed."""
        pairs = zip(self.values, other.values, strict=True)
        return Measurement(f"{self.name} - {other.name}", tuple(a - b for a, b in pairs))

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.std_error:.2g}"


Measurements = Mapping[str, Measurement]
Tick = Callable[[str], None]


def _silent(_: str) -> None:
    """Take a line about the present step."""


@dataclass(frozen=True)
class Criterion:
    """A condition on the measurements, stated before the run.

    Attributes:
        text: The condition in words, with its threshold.
        test: Gives whether it holds (None: void) and the figures it looked at, as text.
    """

    text: str
    test: Callable[[Measurements], tuple[bool | None, str]]


@dataclass(frozen=True)
class Context:
    """What a trial gets: its seed, the budget's options, the device, and a progress call.

    `out` is the folder of the results, for the states of long steps; None where nothing is kept.
    """

    seed: int
    options: Mapping[str, Any]
    device: torch.device
    progress: Tick = _silent
    out: Path | None = None


Trial = Callable[[Context], Mapping[str, float]]


@dataclass(frozen=True)
class Experiment:
    """A paper's headline claim as a runnable comparison.

    Attributes:
        paper: The paper's number.
        claim: What the paper says.
        setup: How it is scaled down: data, sizes, training.
        baseline: What it is compared with, on the same budget.
        criteria: Conditions, the headline first.
        budgets: Options by budget name; `full` and `smoke` must be there, each with `seeds`.
        trial: Runs one seed and returns named figures (the same names for every seed).
        plot: Draws the measurements on a matplotlib figure.
        together: Whether the first trial computes what the other seeds need: then one worker runs
            them all.
    """

    paper: int
    claim: Claim
    setup: str
    baseline: str
    criteria: Sequence[Criterion]
    budgets: Mapping[str, Mapping[str, Any]]
    trial: Trial
    plot: Callable[[Measurements, Any], None]
    together: bool = False


@dataclass(frozen=True)
class Result:
    """One run of an experiment; `to_json` is what is saved and printed."""

    paper: int
    verdict: Verdict
    rule: str
    claim: dict[str, str]
    criteria: list[dict[str, Any]]
    measurements: list[dict[str, Any]]
    baseline: str
    setup: str
    budget: str
    seeds: list[int]
    seconds: float
    versions: dict[str, str]
    device: str
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def measured(self) -> dict[str, Measurement]:
        return {m["name"]: Measurement(m["name"], tuple(m["values"])) for m in self.measurements}


def verdict(outcomes: Sequence[bool | None]) -> Verdict:
    """The verdict for the criteria's outcomes, headline first, by `RULE`."""
    if not outcomes or not outcomes[0]:
        return "not reproduced"
    return "partly" if False in outcomes else "reproduced"


def load(paper: Paper) -> Experiment:
    """The experiment of a paper.

    Raises:
        UnknownNameError: The paper has none yet.
    """
    if not paper.experiment:
        raise UnknownNameError(f"paper {paper.number} ({paper.title}) has no experiment yet")
    return import_module(paper.experiment).EXPERIMENT


def reproduce(
    experiment: Experiment,
    *,
    budget: str = "full",
    seed: int = 0,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    jobs: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Result:
    """Run every seed of a budget and judge the criteria.

    Args:
        experiment: The experiment.
        budget: A budget of the experiment, `"full"` or `"smoke"`.
        seed: The first seed; the others follow it.
        device: Where the trials run.
        out: Folder for `<unit>.json` and `<unit>.png`. With it a run that was interrupted goes on
            with the seeds that were not finished.
        jobs: Seeds at once. Above 1 each runs in a worker process with one torch thread, and a
            script must call this under `if __name__ == "__main__"`. Figures don't depend on it,
            but for those that rounding changes with the number of threads, and measured times.
        progress: Called with seeds done, seeds in all, and a line about the present step.

    Raises:
        UnknownNameError: The experiment has no such budget.
        ValueError: A trial gave a figure that is no finite number, fewer jobs than one, or several
            with a trial that is not at the top level of a module.
    """
    if budget not in experiment.budgets:
        near = suggest(budget, experiment.budgets)
        raise UnknownNameError(f"no budget {budget!r}, expected {sorted(experiment.budgets)}{near}")
    if not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs: expected an integer at least 1, got {jobs!r}")
    options = dict(experiment.budgets[budget])
    seeds = list(range(seed, seed + options["seeds"]))
    device = torch.device(device)
    unit = experiment.trial.__module__.rpartition(".")[2]
    folder = Path(out) if out else None
    partial = folder / f"{unit}.partial.json" if folder else None
    state = _resume(partial, _fingerprint(experiment, options, seed, device))
    trials, spent, started = state["trials"], state["seconds"], time.perf_counter()

    def tick(text: str) -> None:
        progress(len(trials), len(seeds), text)

    tick("")
    left = [Context(s, options, device, out=folder) for s in seeds if str(s) not in trials]
    with closing(_runs(experiment, left, jobs, tick)) as runs:
        for finished, figures in runs:
            trials[str(finished)] = figures
            state["seconds"] = spent + time.perf_counter() - started
            if partial:
                write_json(partial, state)
            tick("")

    measured = {
        name: Measurement(name, tuple(trials[str(s)][name] for s in seeds))
        for name in trials[str(seed)]
    }
    where = describe(device, threads=1 if jobs > 1 else None)
    if jobs > 1 and len(seeds) > 1 and not experiment.together:
        where += f", {min(jobs, len(seeds))} seeds at once"
    result = _judge(experiment, measured, budget, options, seeds, state["seconds"], where)
    if folder:
        write_json(folder / f"{unit}.json", result.to_json())
        save_plot(experiment, measured, folder / f"{unit}.png")
        assert partial is not None
        partial.unlink(missing_ok=True)
    return result


def _runs(
    experiment: Experiment, contexts: Sequence[Context], jobs: int, tick: Tick
) -> Generator[tuple[int, dict[str, float]]]:
    """Seeds and their figures, whichever is finished first."""
    if jobs == 1:
        for context in contexts:
            yield context.seed, _run(experiment.trial, context, tick)
        return
    where = place(experiment.trial)
    calls = side_by_side(
        _run_apart,
        [(where, context) for context in contexts],
        1 if experiment.together else jobs,
        lambda index, text: tick(f"seed {contexts[index].seed}: {text}"),
    )
    with closing(calls):
        for index, figures in calls:
            yield contexts[index].seed, figures


def _run(trial: Trial, context: Context, tick: Tick) -> dict[str, float]:
    """The figures of one seed."""
    torch.manual_seed(context.seed)
    found = trial(replace(context, progress=tick))
    figures = {name: float(value) for name, value in found.items()}
    for name, value in figures.items():
        if not math.isfinite(value):
            told = f"the trial gave {name} = {value}, expected a finite number"
            raise ValueError(f"seed {context.seed}: {told}")
    return figures


def _run_apart(call: tuple[Place, Context], tick: Tick) -> dict[str, float]:
    """The same in a worker."""
    where, context = call
    return _run(find(where), context, tick)


def _judge(
    experiment: Experiment,
    measured: dict[str, Measurement],
    budget: str,
    options: dict[str, Any],
    seeds: list[int],
    seconds: float,
    device: str,
) -> Result:
    judged = [(criterion, *criterion.test(measured)) for criterion in experiment.criteria]
    return Result(
        paper=experiment.paper,
        verdict=verdict([holds for _, holds, _ in judged]),
        rule=RULE,
        claim=asdict(experiment.claim),
        criteria=[{"text": c.text, "holds": holds, "measured": text} for c, holds, text in judged],
        measurements=[
            {"name": m.name, "mean": m.mean, "std_error": m.std_error, "values": list(m.values)}
            for m in measured.values()
        ],
        baseline=experiment.baseline,
        setup=experiment.setup,
        budget=budget,
        seeds=seeds,
        seconds=round(seconds, 1),
        versions=versions(),
        device=device,
        options=options,
    )


def save_plot(experiment: Experiment, measured: Measurements, path: Path) -> None:
    """Draw an experiment's measurements into a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib, of the extra `plot`, is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
    experiment.plot(measured, figure)
    with atomic_path(path) as part:
        figure.savefig(part, format="png")


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    return {
        "torchzoo": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe(device: str | torch.device, threads: int | None = None) -> str:
    """A device in words: the GPU's name, or the processor and its thread count, torch's if None."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {threads or torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _fingerprint(
    experiment: Experiment, options: dict[str, Any], seed: int, device: torch.device
) -> str:
    """Changes whenever finished trials of an interrupted run would no longer be comparable."""
    source = inspect.getsource(inspect.getmodule(experiment.trial) or type(experiment))
    parts = [source, json.dumps(options, sort_keys=True, default=str), seed, device, versions()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _resume(partial: Path | None, fingerprint: str) -> dict[str, Any]:
    fresh: dict[str, Any] = {"fingerprint": fingerprint, "trials": {}, "seconds": 0.0}
    if partial is None or not partial.is_file():
        return fresh
    try:
        state = json.loads(partial.read_text(encoding="utf-8"))
        same = state["fingerprint"] == fingerprint and isinstance(state["trials"], dict)
        return state if same else fresh
    except (json.JSONDecodeError, KeyError, TypeError):
        return fresh
