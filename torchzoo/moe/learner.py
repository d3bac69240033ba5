"""What learners of mixture policies share: critics, and checkpoints that go on bit for bit."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchzoo.errors import WeightsError
from torchzoo.files import atomic_path
from torchzoo.moe.policy import PMoEPolicy


class Critic(nn.Module):
    """Value of a state and an action, `(..., obs)` and `(..., A)` to `(...)`, by a ReLU network.

    With `action_dim=0` it is the value of a state alone.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, hidden: Sequence[int], **factory: Any
    ) -> None:
        super().__init__()
        widths = (obs_dim + action_dim, *hidden)
        self.trunk = nn.Sequential(
            *(
                layer
                for pair in pairwise(widths)
                for layer in (nn.Linear(*pair, **factory), nn.ReLU())
            )
        )
        self.value = nn.Linear(widths[-1], 1, **factory)

    def forward(self, s: Tensor, a: Tensor | None = None) -> Tensor:
        x = s if a is None else torch.cat([s, a], -1)
        return self.value(self.trunk(x)).squeeze(-1)


class Buffer(Protocol):
    """Rows of experience: the first `len` of each of the columns `data`, a named tuple."""

    data: Any
    added: int

    def __len__(self) -> int: ...

    def fits(self, rows: int, added: int) -> bool:
        """Whether it can hold this many rows after so many were added."""
        ...

    def restore(self, rows: Mapping[str, Tensor], added: int) -> None:
        """Hold these rows instead, by column."""
        ...


class Learner(ABC):
    """Base of learners: saves and loads all that decides how training goes on.

    On the CPU a learner that was saved and loaded goes on bit for bit as if it had never stopped:
    weights, optimisers, experience and the state of torch's generator are in the checkpoint.
    """

    policy: PMoEPolicy
    buffer: Buffer
    optimizers: dict[str, torch.optim.Optimizer]

    @abstractmethod
    def update(self) -> dict[str, float]:
        """Learn from the buffer; losses by name."""

    @abstractmethod
    def _modules(self) -> dict[str, nn.Module]:
        """All modules with a state, by name."""

    def _more(self) -> dict[str, Tensor]:
        """Further tensors, which loading writes in place."""
        return {}

    def save(self, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint, one safetensors file, whole or not at all.

        Args:
            path: The file.
            notes: Anything in JSON that `load` is to give back.
        """
        state = json.dumps({"added": self.buffer.added, "notes": dict(notes or {})})
        tensors = {name: value.contiguous() for name, value in self._tensors().items()}
        with atomic_path(path) as part:
            save_file(tensors, part, metadata={"state": state})

    def load(self, path: str | Path) -> dict[str, Any]:
        """Go on from a checkpoint; torch's global generator is set too.

        Returns:
            The notes that were saved.

        Raises:
            WeightsError: The file can't be read, or is from a learner of other sizes. Nothing has
                been changed then.
        """
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["state"])
                loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"can't read the checkpoint {path}: {error}") from error
        self._check(path, loaded, state["added"])
        self._restore(loaded, state["added"])
        return state["notes"]

    def _tensors(self) -> dict[str, Tensor]:
        """All that decides how training goes on, by name."""
        found = {
            f"{part}.{name}": value
            for part, module in self._modules().items()
            for name, value in module.state_dict().items()
        }
        found |= {
            f"optimizer.{part}.{index}.{name}": value
            for part, optimizer in self.optimizers.items()
            for index, entry in optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        columns = self.buffer.data._asdict().items()
        found |= {f"replay.{name}": value[: len(self.buffer)] for name, value in columns}
        return found | self._more() | {"rng": torch.get_rng_state()}

    def _check(self, path: str | Path, loaded: Mapping[str, Tensor], added: int) -> None:
        rows = max((len(value) for value in _under(loaded, "replay").values()), default=0)
        if not self.buffer.fits(rows, added):
            raise WeightsError(
                f"{path}: replay: got {rows} rows of {added} that were added, which a buffer of "
                "this learner's size does not keep"
            )
        for name, value in self._tensors().items():
            if name.startswith("optimizer."):
                continue  # a fresh optimiser has no state yet
            shape = (rows, *value.shape[1:]) if name.startswith("replay.") else value.shape
            got = tuple(loaded[name].shape) if name in loaded else "nothing"
            if got != tuple(shape):
                raise WeightsError(f"{path}: {name}: got {got}, expected {tuple(shape)}")

    def _restore(self, loaded: Mapping[str, Tensor], added: int) -> None:
        for part, module in self._modules().items():
            module.load_state_dict(_under(loaded, part))
        for part, optimizer in self.optimizers.items():
            entries: dict[int, dict[str, Tensor]] = {}
            for name, value in _under(loaded, f"optimizer.{part}").items():
                index, _, key = name.partition(".")
                entries.setdefault(int(index), {})[key] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.buffer.restore(_under(loaded, "replay"), added)
        for name, value in self._more().items():
            value.copy_(loaded[name])
        torch.set_rng_state(loaded["rng"])


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix and a dot, without them."""
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in tensors.items()
        if name.startswith(f"{prefix}.")
    }
