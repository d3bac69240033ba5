"""Files of scenes and of photographs, by one door each: `load`, `save` and `load_capture`.

Scenes: `.ply` in the layout of Kerbl et al., `.splat`, `.spz`, and folders in the format of the
zoo's other models, the only ones that keep a scene's `features`. Nothing that is read can run code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from torchzoo.files import atomic_path
from torchzoo.splatting.colmap import Capture, read_colmap
from torchzoo.splatting.ply import read_ply, write_ply
from torchzoo.splatting.scene import GaussianScene
from torchzoo.splatting.splat_file import read_splat, write_splat
from torchzoo.splatting.spz import read_spz, write_spz
from torchzoo.splatting.transforms import read_transforms

__all__ = ["FORMATS", "Capture", "load", "load_capture", "save"]

FORMATS: dict[str, tuple[Callable[[bytes], GaussianScene], Callable[[GaussianScene], bytes]]] = {
    ".ply": (read_ply, write_ply),
    ".splat": (read_splat, write_splat),
    ".spz": (read_spz, write_spz),
}
"""Reader and writer of each kind of file, by its suffix."""

GAUSSIAN = {"means", "quats", "log_scales", "opacity_logits", "sh0", "shN"}
"""What the files hold of a scene."""


def load(path: str | Path) -> GaussianScene:
    """Read a scene; the suffix says which format it has.

    Args:
        path: A file, or a folder that `save_pretrained` wrote.

    Returns:
        The scene, in float32 on the CPU.

    Raises:
        ValueError: The suffix is none of `FORMATS`, or the file is damaged; the message has the
            path and what is wrong.
        OSError: The file can't be read.
    """
    path = Path(path)
    if path.is_dir():
        return GaussianScene.from_pretrained(path)
    read, _ = FORMATS[_suffix(path)]
    data = path.read_bytes()
    try:
        return read(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save(scene: GaussianScene, path: str | Path) -> Path:
    """Write a scene, whole or not at all; the suffix says in which format.

    A format that can't hold all that the scene has leaves the rest out, with a warning.

    Args:
        scene: The scene.
        path: A file, or, without a suffix, a folder.

    Returns:
        The path.

    Raises:
        ValueError: The suffix is none of `FORMATS`, or the format can't hold the scene.
        TorchzooError: The file can't be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(GaussianScene(5), f"{folder}/scene.ply")
        ...     load(path).means.shape
        torch.Size([5, 3])
    """
    path = Path(path)
    if not path.suffix:
        return scene.save_pretrained(path)
    data = FORMATS[_suffix(path)][1](scene)
    if lost := sorted({name for name, _ in scene.named_parameters()} - GAUSSIAN):
        warnings.warn(f"{path.suffix} can't hold {', '.join(lost)}: left out", stacklevel=2)
    with atomic_path(path) as part:
        part.write_bytes(data)
    return path


def load_capture(path: str | Path) -> Capture:
    """Read the cameras, and the points where there are any, of photographs of a scene.

    Args:
        path: A `transforms.json`; or a folder with it, with a COLMAP model, or with one in
            `sparse/0` or `sparse`.

    Returns:
        The cameras, names and points.

    Raises:
        ValueError: Neither is there, it is damaged, or its images are distorted ("undistort
            first") or of several sizes.
        OSError: A file can't be read.
    """
    path = Path(path)
    for place in (path, path / "transforms.json"):
        if place.is_file():
            return _named(place, read_transforms)
    for folder in (path, path / "sparse" / "0", path / "sparse"):
        if any((folder / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return _named(folder, read_colmap)
    raise ValueError(f"{path}: expected a transforms.json or a COLMAP model")


def _named(path: Path, read: Callable[[Path], Capture]) -> Capture:
    """Call a reader, with the path before what it complains about."""
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: expected a name in {', '.join(FORMATS)}, got {suffix!r}")
    return suffix
