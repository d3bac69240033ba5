"""What a model that has learnt by ProSparse can leave out: with relu, and with a threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torchzoo.finetuning import Task
from torchzoo.sparsity import ActivationMeter, prosparse_convert


def shift(
    model: nn.Module, test: Dataset[Any], task: Task, *, threshold: float, batch_size: int = 64
) -> list[dict[str, Any]]:
    """Evaluate a model with relu, then with FATReLU, which it is left with.

    Args:
        model: The model, whose feed-forward layers are converted.
        test: Rows to evaluate on.
        task: Loss and metric.
        threshold: Of FATReLU.
        batch_size: Rows at a time.

    Returns:
        For each activation the `test_loss`, the task's metric, and the share of neurons that are
        `inactive`.
    """
    rows = []
    for name, value in (("relu", None), (f"fatrelu({threshold:g})", threshold)):
        prosparse_convert(model, threshold=value)
        rows.append({"activation": name} | _evaluate(model, test, task, batch_size))
    return rows


@torch.no_grad()
def _evaluate(
    model: nn.Module, test: Dataset[Any], task: Task, batch_size: int
) -> dict[str, float]:
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    scores: list[Tensor] = []
    with ActivationMeter(model.eval()) as meter:
        for batch in DataLoader(test, batch_size=batch_size):
            batch = [value.to(device) for value in batch]
            losses.append(task.loss(model, *batch) * len(batch[0]))
            scores.append(task.score(model, *batch).sum())
        inactive = 1 - meter.active
    count = len(test)  # type: ignore[arg-type]
    loss, score = (float(torch.stack(part).sum()) / count for part in (losses, scores))
    return {"test_loss": loss, task.metric: score, "inactive": inactive}
