"""The same model with and without a swap, fine-tuned on the same budget over several seeds."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from torchzoo.experiment import describe, versions
from torchzoo.experiments.finetune.datasets import load_data
from torchzoo.experiments.finetune.jobs import Job, prepare, task_of
from torchzoo.files import atomic_path
from torchzoo.finetuning import Recipe, finetune
from torchzoo.swaps import apply
from torchzoo.timing import time_modules

WITHOUT, WITH = "without", "with"
Progress = Callable[[int, int, str], None]


def compare(
    job: Job,
    recipe: Recipe,
    *,
    seeds: int = 3,
    balance: float = 0.01,
    device: str = "cpu",
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Fine-tune a model with and without swaps from the same weights, on the same rows.

    Args:
        job: Model, data, and at least one swap; its seed is the first.
        recipe: The budget of each run; its seed is replaced.
        seeds: How many seeds; each draws weights, split and order anew.
        balance: As for `task_of`.
        device: `"cpu"` or `"cuda"`.
        progress: Called with steps done and in all, of all runs together, and a line.

    Returns:
        A JSON-ready object: for each of `without` and `with` the `accuracy`, `test_loss` and
        `seconds` of each seed and the `curve` of accuracies, what `time_modules` measures, and
        `difference`: of the accuracies, seed by seed, mean and standard error.
    """
    runs: dict[str, list[dict[str, Any]]] = {WITHOUT: [], WITH: []}
    cost: dict[str, Any] = {}
    for index, seed in enumerate(range(job.seed, job.seed + seeds)):
        data = load_data(job.data, size=job.size, seed=seed)
        plain = prepare(dataclasses.replace(job, seed=seed, swaps=()), data).model
        models = {WITHOUT: plain, WITH: copy.deepcopy(plain)}
        notes = [note for swap in job.swaps for note in apply(models[WITH], swap).notes]
        if index == 0:
            rows = torch.stack([data.train[i][0] for i in range(recipe.batch_size)])
            placed = {name: copy.deepcopy(model).to(device) for name, model in models.items()}
            cost = time_modules(placed, [rows.to(device)])
        for place, (name, model) in enumerate(models.items()):
            done = 2 * index + place

            def tick(step: int, steps: int, line: str, done: int = done, name: str = name) -> None:
                progress(done * steps + step, 2 * seeds * steps, f"{name} the swap: {line}")

            start = time.perf_counter()
            run = finetune(
                model,
                task_of(balance),
                data.train,
                data.test,
                dataclasses.replace(recipe, seed=seed),
                device="cpu" if device == "cpu" else None,
                progress=tick,
            )
            runs[name].append(
                {
                    "accuracy": run.history[-1]["accuracy"],
                    "test_loss": run.history[-1]["test_loss"],
                    "seconds": time.perf_counter() - start,
                    "curve": [row["accuracy"] for row in run.history],
                }
            )
    pairs = zip(runs[WITH], runs[WITHOUT], strict=True)
    return {
        "job": dataclasses.asdict(job),
        "recipe": dataclasses.asdict(recipe),
        "seeds": list(range(job.seed, job.seed + seeds)),
        "device": describe(torch.device(device)),
        "versions": versions(),
        "notes": notes,
        "runs": {name: _columns(rows) for name, rows in runs.items()},
        "cost": cost,
        "difference": mean_and_error([a["accuracy"] - b["accuracy"] for a, b in pairs]),
    }


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, which is 0 for a single value.

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    if len(values) < 2:
        return values[0], 0.0
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw accuracies, their course, and what a step costs, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=120)
    points, course, costs = figure.subplots(1, 3)
    colors = {WITHOUT: "0.5", WITH: "C0"}
    for place, (name, run) in enumerate(result["runs"].items()):
        mean, error = mean_and_error(run["accuracy"])
        points.plot([place] * len(run["accuracy"]), run["accuracy"], "o", color=colors[name])
        points.errorbar(place + 0.15, mean, error, fmt="s", color=colors[name], capsize=5)
        epochs = range(1, len(run["curve"][0]) + 1)
        for curve in run["curve"]:
            course.plot(epochs, curve, color=colors[name], alpha=0.4, linewidth=1)
        means = [statistics.mean(values) for values in zip(*run["curve"], strict=True)]
        course.plot(epochs, means, "o-", color=colors[name], label=f"{name} the swap")
    points.set(xticks=[0, 1], xlim=(-0.5, 1.6), ylabel="accuracy", title="each seed, mean ± s.e.")
    points.set_xticklabels([f"{name} the swap" for name in result["runs"]])
    course.set(xlabel="epoch", ylabel="accuracy", title="in training")
    course.xaxis.get_major_locator().set_params(integer=True)
    course.legend(frameon=False)
    labels, ratios = zip(*_ratios(result["cost"]), strict=True)
    costs.barh(labels, ratios, color=colors[WITH])
    costs.axvline(1.0, color=colors[WITHOUT])
    costs.set(xlabel="with / without", title="cost")
    costs.invert_yaxis()
    swaps = ", ".join(result["job"]["swaps"])
    figure.suptitle(f"{result['job']['model']}, {swaps}, on {result['job']['data']}")
    with atomic_path(path) as part:
        figure.savefig(part, format="png")


def _ratios(cost: dict[str, Any]) -> list[tuple[str, float]]:
    """What grows and by how much."""
    old, new = cost[WITHOUT], cost[WITH]
    found = [("parameters", new["parameters"] / old["parameters"])]
    found += [("FLOPs", new["flops"] / old["flops"])] if old["flops"] else []
    for what in ("forward", "step"):
        medians = [row[what]["seconds"]["median"] for row in (new, old)]
        found.append((f"{what} time", medians[0] / medians[1]))
    peaks = [row["step"]["peak_bytes"] for row in (new, old)]
    if all(peaks):
        found.append(("step memory", peaks[0] / peaks[1]))
    return found
