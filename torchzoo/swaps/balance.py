"""Even loads of experts while a swapped model is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from torchzoo.finetuning import Task
from torchzoo.moe import Gate, load_balance_loss
from torchzoo.surgery import capture, find


def balanced(task: Task, weight: float = 0.01) -> Task:
    """The task with a loss that evens out the experts' loads, summed over a model's gates.

    Args:
        task: The task.
        weight: Weight of the load-balancing loss; a model without gates has none.

    Example:
        >>> import torch
        >>> from torchzoo.finetuning import classification
        >>> model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
        >>> task = classification()
        >>> torch.equal(balanced(task).loss(model, x, y), task.loss(model, x, y))
        True
    """

    def loss(model: nn.Module, *batch: Any) -> Tensor:
        if not model.training or not find(model, Gate):
            return task.loss(model, *batch)
        with capture(model, Gate) as routings:
            value = task.loss(model, *batch)
        terms = [load_balance_loss(routing) for found in routings.values() for routing in found]
        return value + weight * sum(terms, start=value.new_zeros(()))

    return dataclasses.replace(task, loss=loss)
