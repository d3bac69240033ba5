"""A loop of asking and telling that survives being killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchzoo.files import atomic_path
from torchzoo.gp.bkb import BKB


def run_bandit(
    bandit: BKB,
    objective: Callable[[Tensor], Any],
    num_pulls: int,
    *,
    checkpoint: str | Path | None = None,
    every: int = 10,
) -> None:
    """Ask and tell until there are so many pulls, initial ones included.

    Args:
        bandit: A `BKB` or `BBKB`, with arms; without, if there is a checkpoint to continue.
        objective: Gives the rewards of points. Noise that it draws from torch's global generator
            goes on where it was when a run is continued.
        num_pulls: Pulls to stop at.
        checkpoint: File that the state is written to. One that is there is continued, and all
            comes out as if the run had never ended.
        every: Rounds between two writes.

    Shape:
        - points: `(b, d)`, and their rewards `(b,)`

    Raises:
        RuntimeError: The bandit has no arms, and there is no checkpoint.
        ValueError: An option out of its range, or rewards that are not finite.

    Example:
        >>> bandit = BKB(lambda a, b: a @ b.mT)
        >>> bandit.initialize(torch.tensor([[1.0], [2.0]]), [0], [1.0])
        >>> run_bandit(bandit, lambda x: x[:, 0], 10)
        >>> bandit.t
        10
    """
    from safetensors.torch import load_file, save_file

    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        state = load_file(path)
        torch.set_rng_state(state.pop("rng"))
        bandit.load_state_dict(state)
    rounds = 0
    while bandit.t < num_pulls:
        index = torch.as_tensor(bandit.ask()).reshape(-1)[: num_pulls - bandit.t]
        rewards = torch.as_tensor(objective(bandit.arms[index.to(bandit.arms.device)]))
        bandit.tell(index, rewards.reshape(-1))
        rounds += 1
        if path is not None and (rounds % every == 0 or bandit.t >= num_pulls):
            with atomic_path(path) as part:
                save_file(bandit.state_dict() | {"rng": torch.get_rng_state()}, part)
