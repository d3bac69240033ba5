"""Notes of what a change moved in a model's structure, from which it can be undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

from torch import nn

_HELD = (
    "_modules",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_NOT_STRUCTURE = {*_HELD, "_parameters", "_buffers", "training", "_zoo_undo"}
_NOTES = "_zoo_undo"


class _Nothing(Enum):
    """Stands for an entry that is not there; copies of it are itself."""

    HERE = "nothing"


class Step(NamedTuple):
    """One entry that changed: of a module's own attributes, or of one of the dicts it holds.

    Attributes:
        holder: The module.
        held: Name of the dict, empty for the attributes themselves.
        key: The entry.
        old: What it was.
        new: What it is now.
    """

    holder: nn.Module
    held: str
    key: Any
    old: Any
    new: Any


@contextmanager
def noted(model: nn.Module) -> Iterator[None]:
    """Note on the model what the context changes of it; after an error put it back at once."""
    before = {module: _entries(module) for module in model.modules()}
    try:
        yield
    except BaseException:
        _put_back(_steps(before))
        raise
    vars(model).setdefault(_NOTES, []).append(_steps(before))


def undo(model: nn.Module) -> list[list[Step]]:
    """Put back what was noted, the latest first, and return the notes."""
    changes: list[list[Step]] = vars(model).pop(_NOTES, [])
    for steps in reversed(changes):
        _put_back(steps)
    return changes


def _entries(module: nn.Module) -> dict[tuple[str, Any], Any]:
    own = {("", key): value for key, value in vars(module).items() if key not in _NOT_STRUCTURE}
    return own | {(held, key): v for held in _HELD for key, v in vars(module)[held].items()}


def _steps(before: dict[nn.Module, dict[tuple[str, Any], Any]]) -> list[Step]:
    found = []
    for holder, old in before.items():
        new = _entries(holder)
        for held, key in old | new:
            pair = [entries.get((held, key), _Nothing.HERE) for entries in (old, new)]
            if pair[0] is not pair[1]:
                found.append(Step(holder, held, key, *pair))
    return found


def _put_back(steps: list[Step]) -> None:
    for step in reversed(steps):
        entries = vars(step.holder)[step.held] if step.held else vars(step.holder)
        if step.old is _Nothing.HERE:
            entries.pop(step.key, None)
        else:
            entries[step.key] = step.old
