"""One small training loop over tensors that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model with AdamW and return the mean loss of each epoch.

    Args:
        model: The model; it is in training mode during a step and left in evaluation mode.
        loss: Called as `loss(model, *batch)`, gives a scalar.
        tensors: The data, rows aligned; a batch takes the same rows of each.
        epochs: Passes over the data.
        batch_size: Rows a step; the last batch of an epoch may be smaller.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        generator: Draws the order of the rows (on the CPU), so that a run can be repeated.
        on_step: Called after each step, for example to advance a gate's annealing.
        on_epoch: Called after each epoch with its index and mean loss, the model in evaluation
            mode.

    Raises:
        ValueError: No rows, or tensors of different lengths.
    """
    rows = {len(tensor) for tensor in tensors}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"tensors: expected the same non-zero number of rows, got {sorted(rows)}")
    n = rows.pop()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    history = []
    for epoch in range(epochs):
        model.train()
        total = 0.0
        order = torch.randperm(n, generator=generator)
        for index in order.split(batch_size):
            batch = [tensor[index.to(tensor.device)] for tensor in tensors]
            value = loss(model, *batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total += value.item() * len(index)
            if on_step:
                on_step()
        model.eval()
        history.append(total / n)
        if on_epoch:
            on_epoch(epoch, history[-1])
    return history


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 512) -> float:
    """Share of rows whose highest logit is the label, the model in evaluation mode."""
    model.eval()
    hits = sum(
        int((model(a).argmax(-1) == b).sum())
        for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)
    )
    return hits / len(x)
