"""ProSparse while a model is trained: a penalty on its neurons that climbs in stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchzoo.finetuning import Task
from torchzoo.sparsity import ActivationL1, SineSparsityScheduler


@contextmanager
def prosparse(task: Task, model: nn.Module, *, weight: float = 0.2) -> Iterator[Task]:
    """The task with ProSparse's penalty, which follows the step: a run that is resumed is the same.

    The stages are those of the paper for LLaMA2-7B, brought to the steps of the run. The model's
    feed-forward layers should have relu; `torchzoo.sparsity.prosparse_convert` gives it to them.

    Args:
        task: The task.
        model: The model that will be trained.
        weight: Weight of the penalty in the last stage.

    Raises:
        ValueError: A weight that is negative, or a model without known feed-forward layers.

    Source:
        Song et al., "ProSparse: introducing and enhancing intrinsic activation sparsity within
        large language models", 2024.

    Example:
        >>> import torch
        >>> from torchzoo.finetuning import classification
        >>> mlp = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
        >>> with prosparse(classification(), mlp) as task:
        ...     task.start(99, 100)  # the last step
        ...     more = task.loss(mlp, x, y) - classification().loss(mlp, x, y)
        >>> torch.testing.assert_close(more, 0.2 * mlp[1](mlp[0](x)).mean())
    """
    if not weight >= 0:
        raise ValueError(f"weight: expected a number >= 0, got {weight}")
    stages = SineSparsityScheduler.published("llama2-7b")
    now = 0.0

    def start(step: int, steps: int) -> None:
        nonlocal now
        task.start(step, steps)
        now = stages.scaled(steps, weight).value_at(step + 1)

    with ActivationL1(model) as penalty:

        def loss(trained: nn.Module, *batch: Any) -> Tensor:
            value = task.loss(trained, *batch)
            return value + now * penalty.value() if trained.training else value

        yield dataclasses.replace(task, loss=loss, start=start)
