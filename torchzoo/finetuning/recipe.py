"""What a training run learns and how: its task, its recipe, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        loss: Called as `loss(model, *batch)`, gives the mean over the batch's rows.
        score: Called as `score(model, *batch)`, gives a number a row, whose mean is the metric.
        metric: Its name.
        higher: Whether more is better.
        start: Called before each step with its number and how many there are in all.
    """

    loss: Callable[..., Tensor]
    score: Callable[..., Tensor]
    metric: str = "accuracy"
    higher: bool = True
    start: Callable[[int, int], None] = lambda step, steps: None


@dataclass(frozen=True)
class Recipe:
    """How it is learned.

    Attributes:
        epochs: Passes over the data.
        batch_size: Most rows a step, of all processes and parts together; steps are equally large.
        lr: The highest learning rate.
        weight_decay: Decoupled weight decay.
        warmup: Share of the steps in which the rate climbs; then it falls as a cosine to 0.
        accumulate: Parts that a batch is cut into, one after the other, for memory.
        precision: `"no"`, `"bf16"` or `"fp16"`.
        ema: Decay of an average of the weights that is evaluated in their place; None: none.
        freeze: Globs of the names of parameters that stay as they are.
        clip: Largest norm of a gradient; None: any.
        seed: Seed of all that is random.
        save_every: Steps between checkpoints; None: an epoch.
        workers: Processes that read data.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    accumulate: int = 1
    precision: str = "no"
    ema: float | None = None
    freeze: tuple[str, ...] = ()
    clip: float | None = 1.0
    seed: int = 0
    save_every: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"save_every: expected at least 1, got {self.save_every}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision: expected no, bf16 or fp16, got {self.precision!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share in [0, 1), got {self.warmup}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema: expected a decay in (0, 1), got {self.ema}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step out of so many."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@dataclass
class Run:
    """Where a run stands.

    Attributes:
        step: Steps done.
        history: A row an epoch: epoch, step, loss, test_loss, the metric, rate, seconds.
        best: The best metric so far.
        loss_sum: Loss of the present epoch, summed over rows.
        resumed: The step that it went on from.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    loss_sum: float = 0.0
    resumed: int = 0


def classification() -> Task:
    """The task of telling classes apart: cross-entropy and accuracy of logits `(N, ..., K)`.

    Labels are `(N, ...)`: of each row, or of each place in it, as in texts.
    """

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(model(x)).flatten(0, -2), y.flatten())

    def score(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hits = (logits_of(model(x)).argmax(-1) == y).float()
        return hits.view(len(hits), -1).mean(1)

    return Task(loss, score)


def logits_of(output: Any) -> Tensor:
    """The logits of a model: its output, or that of a transformers model."""
    return output if isinstance(output, Tensor) else output.logits
