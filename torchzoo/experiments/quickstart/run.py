"""The quickstart from beginning to end: fine-tune, stream, flag, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from torchzoo.circuits import Circuit
from torchzoo.data.digits import DigitsSplit, digits
from torchzoo.experiment import describe, versions
from torchzoo.experiments.quickstart import finetune, outliers, temporal, timing
from torchzoo.experiments.quickstart.baseline import TransformerModel
from torchzoo.experiments.quickstart.composition import composition, count
from torchzoo.experiments.quickstart.figures import (
    accuracy_rows,
    outlier_rows,
    temporal_rows,
    timing_rows,
)
from torchzoo.experiments.quickstart.model import ZooVisionModel
from torchzoo.experiments.quickstart.outcome import Outcome
from torchzoo.hub import from_pretrained

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done, and its steps in all."""


@dataclass(frozen=True)
class Budget:
    """How much is measured.

    Attributes:
        seeds: Runs of each fine-tuning arm.
        epochs: Epochs of each run.
        films: Films of moving digits.
        frames: Frames of each.
        steps: Quantisation steps that are tried.
        classifier_epochs: Epochs of the classifier that the circuit is compared with.
        min_run_time: Seconds that each call is timed for at the least.
    """

    seeds: int = 3
    epochs: int = finetune.EPOCHS
    films: int = 24
    frames: int = 20
    steps: tuple[float | None, ...] = (None, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
    classifier_epochs: int = outliers.RECIPE.epochs
    min_run_time: float = 0.3


FULL = Budget()
QUICK = Budget(
    seeds=2,
    epochs=4,
    films=4,
    frames=6,
    steps=(None, 1 / 16),
    classifier_epochs=2,
    min_run_time=0.02,
)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread: tensors this small gain nothing from more, and lose where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(
    budget: Budget,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> Outcome:
    """Measure everything.

    Args:
        budget: How much.
        seed: First seed of fine-tuning, and the seed of all else that is drawn.
        device: Where to train and stream; times are taken on the CPU, and there too.
        progress: Called as each stage goes on.
    """
    started = time.perf_counter()
    device = torch.device(device)
    data = digits(finetune.CLASSES)
    runs = _finetune_all(budget, data, seed, device, progress)
    model = runs["zoo_pretrained"][0].model
    assert isinstance(model, ZooVisionModel)
    stream = _stream(budget, model, data, seed, progress)
    flagged = _flag(budget, seed, device, progress)
    timings = _time_all(budget, model, device, progress)
    accuracies = {key: [run.accuracy[-1] for run in each] for key, each in runs.items()}
    setup = {
        "seed": seed,
        "budget": asdict(budget),
        "device": describe(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "labels_per_class": finetune.LABELS_PER_CLASS,
        "test_images": len(data.test_y),
        "parameters": count(model),
        "baseline_parameters": count(TransformerModel(len(finetune.CLASSES))),
        "learning_rates": {arm.key: arm.lr for arm in finetune.ARMS},
        "circuit": outliers.WEIGHTS,
        "film": {"hold": temporal.HOLD, "noise": temporal.NOISE},
        "seconds": round(time.perf_counter() - started, 1),
    }
    return Outcome(
        model=model.cpu(),
        parts=composition(model),
        runs=runs,
        stream=stream,
        outliers=flagged,
        timings=timings,
        rows=[
            *accuracy_rows(accuracies),
            *temporal_rows(stream),
            *outlier_rows(flagged),
            *timing_rows(timings),
        ],
        setup=setup,
    )


def _finetune_all(
    budget: Budget, data: DigitsSplit, seed: int, device: torch.device, progress: Progress
) -> dict[str, list[finetune.Run]]:
    total = len(finetune.ARMS) * budget.seeds * budget.epochs
    tick = _counter(progress, "fine-tune on 5 to 9", total)
    return {
        arm.key: [
            finetune.finetune(
                arm, data, seed=seed + k, epochs=budget.epochs, device=device, on_epoch=tick
            )
            for k in range(budget.seeds)
        ]
        for arm in finetune.ARMS
    }


def _stream(
    budget: Budget, model: ZooVisionModel, data: DigitsSplit, seed: int, progress: Progress
) -> temporal.Temporal:
    total = 2 * budget.frames * len(budget.steps)
    return temporal.measure(
        model,
        data,
        steps=budget.steps,
        films=budget.films,
        frames=budget.frames,
        seed=seed,
        on_frame=_counter(progress, "stream moving digits", total),
    )


def _flag(budget: Budget, seed: int, device: torch.device, progress: Progress) -> outliers.Outliers:
    circuit = from_pretrained(outliers.WEIGHTS, device=device)
    assert isinstance(circuit, Circuit)
    tick = _counter(progress, "flag what is no digit", budget.classifier_epochs)
    return outliers.measure(circuit, seed=seed, epochs=budget.classifier_epochs, on_epoch=tick)


def _time_all(
    budget: Budget, model: ZooVisionModel, device: torch.device, progress: Progress
) -> list[timing.Timing]:
    places = [torch.device("cpu")] + ([device] if device.type == "cuda" else [])
    tick = _counter(progress, "time each part", timing.CASES * len(places))
    return [
        row
        for place in places
        for row in timing.measure(model, place, min_run_time=budget.min_run_time, on_case=tick)
    ]


def _counter(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """A call that counts the steps of a stage."""
    done = 0
    progress(stage, 0, total)

    def tick() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total)

    return tick
