"""Checkpoints of a training run: tensors in safetensors, all else in JSON, nothing pickled.

A checkpoint is `step-N.safetensors` and beside it `step-N.json`, which is written last, holds the
digest of the tensors, and makes it valid. Both are written under another name and moved into place,
so that a kill at any moment leaves the one before.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchzoo._weights import sha256
from torchzoo.files import atomic_path, write_json

KEPT = 2
"""How many checkpoints stay: the last, and one to fall back to."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: The number of steps it was written after.
        tensors: Tensors by name, on the CPU.
        state: Plain values.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, of which some may share memory, to a safetensors file atomically."""
    # Tied weights are written once a name: a loader need not know what was tied.
    own = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    with atomic_path(path) as part:
        save_file(own, part)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint and take away those that are older than the last two.

    Args:
        folder: The folder of the run's checkpoints; made where it is missing.
        step: How many steps have been done.
        tensors: Tensors by name.
        state: Plain values that JSON can hold.

    Returns:
        The file of the tensors.
    """
    path = folder / f"step-{step}.safetensors"
    save_tensors(path, tensors)
    record = {"step": step, "sha256": sha256(path), "state": dict(state)}
    write_json(path.with_suffix(".json"), record)
    for old in steps(folder)[:-KEPT]:
        for suffix in (".json", ".safetensors"):  # without its JSON it is none
            (folder / f"step-{old}{suffix}").unlink(missing_ok=True)
    return path


def steps(folder: Path) -> list[int]:
    """After which steps there is a checkpoint, damaged ones included; ascending."""
    found = (re.fullmatch(r"step-(\d+)\.json", path.name) for path in folder.glob("step-*.json"))
    return sorted(int(match[1]) for match in found if match)


def load_last(folder: Path) -> Checkpoint | None:
    """The last checkpoint that is whole; None without any.

    Of each damaged one that is passed over a warning says what is wrong with it.
    """
    present = steps(folder)
    for step in reversed(present):
        try:
            return _load(folder, step)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            before = [other for other in present if other < step]
            goes_on = f"the one after step {before[-1]}" if before else "the start"
            warnings.warn(
                f"the checkpoint after step {step} is damaged ({error}); goes on from {goes_on}",
                stacklevel=2,
            )
    return None


def _load(folder: Path, step: int) -> Checkpoint:
    path = folder / f"step-{step}.safetensors"
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    match record:
        case {"step": int(found), "sha256": str(digest), "state": dict(state)} if found == step:
            if sha256(path) != digest:
                raise ValueError("the digest of its tensors is another")
            return Checkpoint(step, load_file(path), state)
    raise ValueError("its JSON lacks step, sha256 or state")
