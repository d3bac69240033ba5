"""Where a command runs and where it writes, checked before the work rather than after it."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path

from torchzoo.errors import TorchzooError


class Device(StrEnum):
    """Where to run; auto takes CUDA where it is."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def resolve_device(wanted: Device) -> str:
    """The torch device that an option stands for.

    Raises:
        TorchzooError: CUDA is asked for where this torch sees none.
    """
    import torch

    if wanted is Device.cuda and not torch.cuda.is_available():
        raise TorchzooError("--device cuda: this torch sees no CUDA device (see torchzoo doctor)")
    if wanted is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted.value


def check_folder(out: Path) -> None:
    """Make a folder and try to write into it.

    Raises:
        TorchzooError: It can't be made or written, or the disk is full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise TorchzooError(f"can't write into {out}: {error.strerror or error}") from error
