"""The photographs that belong to a capture's cameras."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchzoo.errors import TorchzooError
from torchzoo.splatting.cameras import Cameras

__all__ = ["load_photographs"]

_SUFFIXES = ("", ".png", ".jpg", ".jpeg")
_STRETCH = 0.01
"""How much the ratio of an image's sides may differ from its camera's."""


def load_photographs(
    cameras: Cameras, names: list[str], folder: str | Path, *, longest: int | None = None
) -> tuple[Cameras, Tensor]:
    """Read the images of a capture; a pixel of a smaller one is the mean over its square.

    Args:
        cameras: The capture's cameras.
        names: Paths of its images, in `folder` or its `images`; a suffix may be missing.
        folder: Where the capture is.
        longest: The longer side in pixels; None, or where the images are smaller: theirs.

    Returns:
        Cameras of images of the size read, and these images, `(V, H, W, 3)`, uint8. What is
        transparent shows black.

    Raises:
        ValueError: `longest` is below 1.
        TorchzooError: An image is missing, can't be read, or has other proportions than its camera.
    """
    if longest is not None and longest < 1:
        raise ValueError(f"longest: got {longest}, expected at least 1")
    paths = [_find(name, Path(folder)) for name in names]
    side = max(cameras.width, cameras.height)
    factor = min(1.0, longest / side) if longest else 1.0
    width, height = (max(1, round(factor * n)) for n in (cameras.width, cameras.height))
    pixels = torch.stack([_read(path, width, height) for path in paths])
    return cameras.resized(width, height), pixels


def _find(name: str, folder: Path) -> Path:
    for place in (folder, folder / "images"):
        for suffix in _SUFFIXES:
            if (path := place / f"{name}{suffix}").is_file():
                return path
    raise TorchzooError(f"image {name!r} is neither in {folder} nor in {folder / 'images'}")


def _read(path: Path, width: int, height: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if abs(image.width * height / (image.height * width) - 1) > _STRETCH + 1 / height:
                size = f"{image.width} × {image.height}"
                raise TorchzooError(f"{path}: got {size}, its camera has {width} × {height}")
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            clear = "A" in image.getbands() or "transparency" in image.info
            over = Image.alpha_composite(black, image.convert("RGBA")) if clear else image
            picture = over.convert("RGB")
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BOX)
            return torch.from_numpy(np.array(picture))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise TorchzooError(f"can't read the image {path}: {error}") from error
