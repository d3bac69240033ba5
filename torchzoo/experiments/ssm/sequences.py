"""Sequence models on real data and over long gaps: `python -m torchzoo.experiments.ssm.sequences`.

Three tasks for `SequenceModel`: handwritten digits read pixel by pixel, pieces of text read byte by
byte, and a signal that must be remembered, or given back, after thousands of steps. The first two
are shipped.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo import hub
from torchzoo.data.digits import digits
from torchzoo.data.topics import topic_windows
from torchzoo.ssm import S4D, SequenceModel, ssm_param_groups
from torchzoo.trainer import accuracy

COMMAND = "python -m torchzoo.experiments.ssm.sequences"
CUES = 8


class Task(NamedTuple):
    """Sequences with labels, and the model to learn them."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    model: dict[str, Any]
    epochs: int
    data: str


def digit_pixels() -> Task:
    """Digits as 64 steps of one pixel, row after row."""
    data = digits()
    train, test = (x.flatten(1)[..., None] for x in (data.train_x, data.test_x))
    model: dict[str, Any] = {"d_input": 1, "d_output": 10, "d_model": 64, "d_state": 32}
    model |= {"dropout": 0.1}
    text = "scikit-learn's digits, training side of digits()"
    return Task(train, data.train_y, test, data.test_y, model, 30, text)


def text_bytes() -> Task:
    """Which of eight long topics of Python's help a piece of 256 bytes is from."""
    data = topic_windows()
    model: dict[str, Any] = {"d_input": 256, "d_output": len(data.names), "tokens": True}
    model |= {"d_model": 64, "d_state": 32, "dropout": 0.2, "bidirectional": True}
    text = "pydoc_data.topics, training side of topic_windows()"
    return Task(data.train_x, data.train_y, data.test_x, data.test_y, model, 8, text)


SHIPPED: dict[str, Callable[[], Task]] = {"digits-s4d": digit_pixels, "bytes-s4d": text_bytes}
"""The task behind each shipped name."""


def train(
    task: Task, *, seed: int = 0, lr: float = 5e-3, on_epoch: Callable[[float], None] | None = None
) -> SequenceModel:
    """Train a task's model by AdamW with a cosine schedule, dynamics slower than the rest.

    Args:
        task: The data and the model.
        seed: Seed of the initial weights and of the order.
        lr: Highest learning rate.
        on_epoch: Called after each epoch with its mean loss.
    """
    torch.manual_seed(seed)
    model = SequenceModel(**task.model)
    optimizer = torch.optim.AdamW(ssm_param_groups(model, lr, weight_decay=0.01))
    steps = task.epochs * math.ceil(len(task.train_x) / 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(task.epochs):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(task.train_x)).split(64):
            loss = F.cross_entropy(model(task.train_x[rows]), task.train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows) / len(task.train_x)
        if on_epoch:
            on_epoch(total)
    return model.eval()


def cued(length: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of eight cues for the first 1/64 of a sequence, and silence after it.

    Shape:
        - output: `(n, length, 8)` and `(n,)`
    """
    labels = torch.randint(CUES, (n,), generator=generator)
    x = torch.zeros(n, length, CUES)
    x[:, : length // 64] = F.one_hot(labels, CUES)[:, None].float()
    return x, labels


def recall(
    length: int, *, steps: int = 100, seed: int = 0, on_step: Callable[[float], None] | None = None
) -> float:
    """Learn to name the cue at the end of the sequence; the share of correct answers.

    The model's memory, 1/dt, is drawn around the length.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    memory = {"dt_min": 0.1 / length, "dt_max": 10 / length}
    model = SequenceModel(CUES, CUES, d_model=32, depth=1, d_state=32, pool="last", **memory)
    optimizer = torch.optim.AdamW(ssm_param_groups(model, 1e-2))
    for _ in range(steps):
        x, y = cued(length, 16, generator)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step:
            on_step(loss.item())
    return accuracy(model, *cued(length, 64, generator), batch_size=16)


def band_limited(length: int, cycles: int, n: int, generator: torch.Generator) -> Tensor:
    """Noise of unit variance from the lowest `cycles` frequencies of a sequence, `(n, length)`."""
    spectrum = torch.zeros(n, length // 2 + 1, dtype=torch.complex64)
    parts = torch.randn(2, n, cycles, generator=generator)
    spectrum[:, 1 : cycles + 1] = torch.complex(parts[0], parts[1])
    signal = torch.fft.irfft(spectrum, n=length)
    return signal / signal.std(-1, keepdim=True)


def copy(
    length: int, *, steps: int = 100, seed: int = 0, on_step: Callable[[float], None] | None = None
) -> float:
    """Learn to give a signal of 16 cycles back a quarter of the sequence later.

    One linear S4D layer on 32 copies of the signal, and a linear read-out.

    Returns:
        Mean squared error where the delayed signal is known; that of predicting zero is 1.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    delay = length // 4
    memory = {"dt_min": 0.4 / length, "dt_max": 40 / length}
    layer = S4D(32, 64, activation=None, post=None, **memory)
    head = torch.nn.Linear(32, 1)
    rest = [*head.parameters()]
    groups = ssm_param_groups(layer, 1e-2)
    optimizer = torch.optim.Adam([*groups, {"params": rest, "lr": 1e-2}])

    def error(n: int) -> Tensor:
        u = band_limited(length, 16, n, generator)
        y = head(layer(u[..., None].expand(-1, -1, 32)))[..., 0]
        return F.mse_loss(y[:, delay:], u[:, :-delay])

    for _ in range(steps):
        loss = error(8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step:
            on_step(loss.item())
    with torch.no_grad():
        return error(16).item()


def main(seed: int = 0) -> None:
    """Train and ship the models of real data, and print what they reach."""
    torch.set_num_threads(1)
    for name, make in SHIPPED.items():
        task = make()
        print(f"training {name}: mean loss of each epoch")
        model = train(task, seed=seed, on_epoch=lambda loss: print(f"{loss:.4f}", flush=True))
        reached = {
            "train_accuracy": round(accuracy(model, task.train_x, task.train_y), 4),
            "test_accuracy": round(accuracy(model, task.test_x, task.test_y), 4),
        }
        folder = hub.ship(
            name,
            model,
            data=task.data,
            metric=reached,
            seed=seed,
            command=f"{COMMAND} --seed {seed}" if seed else COMMAND,
        )
        print(f"{folder}: {reached}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args().seed)
