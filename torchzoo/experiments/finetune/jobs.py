"""What the commands on whole models share: a model by name, swaps in it, data for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from torchzoo.errors import TorchzooError
from torchzoo.experiments.finetune.datasets import Rows, load_data
from torchzoo.experiments.finetune.models import check_classes, load_model
from torchzoo.finetuning import Task, classification
from torchzoo.sparsity import prosparse_convert
from torchzoo.surgery import Swapped
from torchzoo.swaps import apply, balanced


@dataclass(frozen=True)
class Job:
    """A model, what is swapped in it, and its data, all by name.

    Attributes:
        model: As for `load_model`.
        data: As for `load_data`.
        swaps: As for `torchzoo.swaps.apply`.
        weights: As for `load_model`.
        size: Height and width of images, length of texts; None: the data's own.
        seed: Seed of the weights that are drawn and of the split.
        recipe: None, or `"prosparse"`: feed-forward layers get relu.
    """

    model: str
    data: str
    swaps: tuple[str, ...] = ()
    weights: str | None = None
    size: int | None = None
    seed: int = 0
    recipe: str | None = None


class Ready(NamedTuple):
    """A job's model and data, what the swaps did, and what should be said."""

    model: nn.Module
    data: Rows
    reports: tuple[Swapped, ...]
    notes: tuple[str, ...]


def prepare(job: Job, data: Rows | None = None) -> Ready:
    """Build the model, swap layers, and check that model and data go together.

    Args:
        job: The job.
        data: The data where they are loaded already.

    Raises:
        TorchzooError: A name that is none, or parts that don't fit; the message says which.
    """
    data = data or load_data(job.data, size=job.size, seed=job.seed)
    torch.manual_seed(job.seed)
    model, notes = load_model(
        job.model, classes=len(data.classes), size=data.size, weights=job.weights, causal=data.text
    )
    row = data.test[0][0]
    names = f"model {job.model} on data {job.data}"
    check_classes(model, row, len(data.classes), names)
    reports = tuple(apply(model, swap, inputs=row[None]) for swap in job.swaps)
    if job.recipe == "prosparse":
        notes += (_to_relu(model, job.model),)
    if reports:
        check_classes(model, row, len(data.classes), f"{names} after the swaps")
    return Ready(model, data, reports, notes)


def _to_relu(model: nn.Module, name: str) -> str:
    try:
        layers = prosparse_convert(model).names
    except ValueError as error:
        raise TorchzooError(f"recipe prosparse on {name}: {error}") from error
    return f"{len(layers)} feed-forward layers have relu now: {', '.join(layers)}"


def task_of(balance: float) -> Task:
    """Classification, with a loss that evens out experts' loads."""
    return balanced(classification(), balance) if balance else classification()
