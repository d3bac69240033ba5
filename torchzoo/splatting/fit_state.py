"""All that a training run has to bring back to go on exactly, as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchzoo.splatting.schedules import adam

if TYPE_CHECKING:
    from torchzoo.splatting.fitting import SplatTrainer

__all__ = ["load_tensors", "tensors_of"]


def tensors_of(trainer: SplatTrainer) -> dict[str, Tensor]:
    """Parameters, Adam's averages, statistics, history and the states of what is random."""
    tensors = {f"scene.{name}": value for name, value in trainer.scene.state_dict().items()}
    for group in trainer.optimizer.param_groups:
        for key, value in trainer.optimizer.state[group["params"][0]].items():
            tensors[f"adam.{key}.{group['name']}"] = value
    for name, value in trainer.strategy.state_dict().items():
        tensors[f"strategy.{name}"] = value
    for name, values in trainer.history.items():
        tensors[f"history.{name}"] = torch.tensor(values, dtype=torch.float64)
    tensors |= {
        "random.own": trainer.generator.get_state(),
        "random.cpu": torch.get_rng_state(),
        "random.queue": trainer.queue,
    }
    if trainer.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(trainer.device)
    return tensors


def load_tensors(trainer: SplatTrainer, tensors: Mapping[str, Tensor]) -> None:
    """Take over what `tensors_of` gave.

    Raises:
        RuntimeError: The scene has other parameters.
        KeyError: Something is missing.
    """
    device = trainer.device
    trainer.scene.load_state_dict(_under("scene", tensors))
    trainer.optimizer = adam(trainer.scene)
    for key, by_name in _by_key(_under("adam", tensors)).items():
        for group in trainer.optimizer.param_groups:
            if group["name"] in by_name:
                state = trainer.optimizer.state[group["params"][0]]
                state[key] = by_name[group["name"]].to(device)
    strategy = _under("strategy", tensors)
    trainer.strategy.load_state_dict({name: value.to(device) for name, value in strategy.items()})
    history = _under("history", tensors)
    trainer.history = {name: history[name].tolist() for name in trainer.history}
    random = _under("random", tensors)
    trainer.queue = random["queue"]
    trainer.generator.set_state(random["own"])
    torch.set_rng_state(random["cpu"])
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)


def _under(head: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `head` and a dot, by the rest of the name."""
    return {
        name.removeprefix(f"{head}."): value
        for name, value in tensors.items()
        if name.startswith(f"{head}.")
    }


def _by_key(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Adam's tensors by what they are, then by the parameter's name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        key, _, parameter = name.partition(".")
        found.setdefault(key, {})[parameter] = value
    return found
