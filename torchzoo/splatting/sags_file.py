"""Files of scenes decoded from points: one safetensors file, with sizes as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torchzoo.files import atomic_path
from torchzoo.splatting.sags_encoder import StructureAwareEncoder

if TYPE_CHECKING:
    from torchzoo.splatting.sags import SAGSScene

__all__ = ["read", "write"]

_KEY = "sags"


def write(path: str | Path, scene: SAGSScene, dtype: torch.dtype) -> int:
    """Write a scene in a dtype, whole or not at all; returns the bytes of the file."""
    encoder = {name: getattr(scene.encoder, name) for name in ("dim", "k", "variant")}
    encoder |= {name: getattr(scene.encoder.grid, name) for name in ("levels", "log2_table")}
    header = {"class": type(scene).__name__, "image_size": scene.image_size, "encoder": encoder}
    tensors = {name: value.to("cpu", dtype) for name, value in scene.state_dict().items()}
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={_KEY: json.dumps(header)})
    return Path(path).stat().st_size


def read(path: str | Path) -> SAGSScene:
    """The scene in a file, in float32 on the CPU.

    Raises:
        ValueError: It is no such file, or damaged.
        OSError: The file can't be read.
    """
    from torchzoo.splatting import SAGSLite, SAGSScene  # which are made of this module

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        scene = {"SAGSScene": SAGSScene, "SAGSLite": SAGSLite}[header["class"]](
            len(state["means"]),
            encoder=StructureAwareEncoder(**header["encoder"]),
            image_size=header["image_size"],
        )
        scene.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a file of SAGSScene.save, {error!r}") from None
    return scene
