"""Finding, reading and checking saved weights, before anything of them reaches a model."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from torchzoo.catalogue import suggest
from torchzoo.errors import WeightsError

CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped weights: a folder for each name, and `manifest.json`."""


def manifest() -> dict[str, dict[str, Any]]:
    """For each shipped name: file, sha256, class, data, metric, seed, command and parameters."""
    path = WEIGHTS / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def install(part: Path, folder: Path) -> None:
    """Move the three files from `part`, on the same file system, to `folder`."""
    if not folder.exists():
        part.rename(folder)
        return
    (folder / CONFIG).unlink(missing_ok=True)
    if not (folder / CARD).exists():
        (part / CARD).rename(folder / CARD)
    for name in (TENSORS, CONFIG):
        (part / name).replace(folder / name)


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(name: str, revision: str | None, token: str | bool | None) -> Path:
    """The folder of a shipped name, local folder or hub id."""
    shipped = manifest()
    if name in shipped:
        return _shipped(name, shipped[name])
    if os.path.isdir(name):
        return Path(name)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return _download(name, revision, token)
    hint = suggest(name, shipped)
    raise WeightsError(f"no weights {name!r}: not shipped, no folder, no hub id{hint}")


def _shipped(name: str, entry: Mapping[str, Any]) -> Path:
    path = WEIGHTS / entry["file"]
    if not path.is_file():
        raise WeightsError(f"{name}: {path} is missing from this installation")
    if (digest := sha256(path)) != entry["sha256"]:
        raise WeightsError(f"{name}: sha256 of {path} is {digest}, expected {entry['sha256']}")
    return path.parent


def _download(repo: str, revision: str | None, token: str | bool | None) -> Path:
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, token=token, allow_patterns=[CONFIG, TENSORS]
            )
        )
    except Exception as error:  # which error it is depends on the hub's HTTP library
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise WeightsError(f"can't download {repo!r} from the hub: {reason}") from error


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Class path and encoded arguments of a saved model."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON: {error}") from error
    match config:
        case {"format": 1, "class": str(kind), "config": dict(arguments)}:
            return kind, arguments
    raise WeightsError(f"{path} is not a config of format 1 with class and config")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved model, on the CPU."""
    path = folder / TENSORS
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"can't read {path}: {error}") from error


def restore_tied(loaded: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Add the names that were left out of the file because they share a tensor with another."""
    for key, tensor in own.items():
        if key not in loaded:
            twins = [other for other in own if own[other] is tensor and other in loaded]
            if twins:
                loaded[key] = loaded[twins[0]]


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, keys: bool = True) -> str:
    """What of `given` doesn't fit a model's `own` tensors, in a line; empty if all fits."""
    wrong = [
        f"{key} is {_kind(given[key])}, the model has {_kind(own[key])}"
        for key in own
        if key in given
        and (
            own[key].shape != given[key].shape
            or own[key].is_floating_point() != given[key].is_floating_point()
        )
    ]
    parts = [_some("wrong shape or dtype", wrong)]
    if keys:
        parts += [_some("missing", own.keys() - given.keys())]
        parts += [_some("left over", given.keys() - own.keys())]
    return "; ".join(part for part in parts if part)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _some(label: str, items: Iterable[str], most: int = 5) -> str:
    found = sorted(items)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"{label}: {', '.join(found[:most])}{more}" if found else ""
