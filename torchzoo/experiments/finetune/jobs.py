"""What the commands on whole models share: a model by name, swaps in it, data for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from torchzoo.experiments.finetune.datasets import Images, load_data
from torchzoo.experiments.finetune.models import check_classes, load_model
from torchzoo.finetuning import Task, classification
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
        size: Height and width of the images; None: the data's own.
        seed: Seed of the weights that are drawn and of the split.
    """

    model: str
    data: str
    swaps: tuple[str, ...] = ()
    weights: str | None = None
    size: int | None = None
    seed: int = 0


class Ready(NamedTuple):
    """A job's model and data, what the swaps did, and what should be said."""

    model: nn.Module
    data: Images
    reports: tuple[Swapped, ...]
    notes: tuple[str, ...]


def prepare(job: Job, data: Images | None = None) -> Ready:
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
        job.model, classes=len(data.classes), size=data.size, weights=job.weights
    )
    image = data.test[0][0]
    names = f"model {job.model} on data {job.data}"
    check_classes(model, image, len(data.classes), names)
    reports = tuple(apply(model, swap, inputs=image[None]) for swap in job.swaps)
    if reports:
        check_classes(model, image, len(data.classes), f"{names} after the swaps")
    return Ready(model, data, reports, notes)


def task_of(balance: float) -> Task:
    """Classification, with a loss that evens out experts' loads."""
    return balanced(classification(), balance) if balance else classification()
