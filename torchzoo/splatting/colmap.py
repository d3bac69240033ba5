"""COLMAP's sparse models: cameras, images and points, from `.bin` or `.txt` files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.splatting.cameras import Cameras

__all__ = ["read_colmap"]

_MODELS = {
    "SIMPLE_PINHOLE": 3,
    "PINHOLE": 4,
    "SIMPLE_RADIAL": 4,
    "RADIAL": 5,
    "OPENCV": 8,
    "OPENCV_FISHEYE": 8,
}
"""How many parameters each camera model has; its place is its number in binary files."""

_TWO_FOCALS = ("PINHOLE", "OPENCV", "OPENCV_FISHEYE")


class _Camera(NamedTuple):
    width: int
    height: int
    intrinsics: tuple[float, float, float, float]
    model: str


class _Image(NamedTuple):
    name: str
    camera: int
    pose: tuple[float, ...]


class Capture(NamedTuple):
    """What photographs of a scene come with.

    Attributes:
        cameras: One for each image.
        names: The images' paths, as the data set writes them.
        points: `(P, 3)`, none where the data set has none.
        colors: `(P, 3)`, from 0 to 1.
    """

    cameras: Cameras
    names: list[str]
    points: Tensor
    colors: Tensor


def read_colmap(folder: str | Path) -> Capture:
    """Read a sparse model; images come in the order of their names.

    Args:
        folder: Has `cameras`, `images` and, if there are points, `points3D`, each as `.bin` or
            `.txt`.

    Raises:
        ValueError: A file is damaged; images are distorted, of several sizes, or of pinhole and
            fisheye cameras at once; or there are none.
        OSError: A file is missing or can't be read.
    """
    folder = Path(folder)
    binary = (folder / "cameras.bin").is_file()
    suffix, end = (".bin", True) if binary else (".txt", False)
    cameras = (_cameras_bin if end else _cameras_txt)((folder / f"cameras{suffix}").read_bytes())
    images = (_images_bin if end else _images_txt)((folder / f"images{suffix}").read_bytes())
    path = folder / f"points3D{suffix}"
    data = path.read_bytes() if path.is_file() else None
    points = (_points_bin if end else _points_txt)(data) if data is not None else []
    return _capture(cameras, images, points)


def _capture(
    cameras: dict[int, _Camera], images: list[_Image], points: list[tuple[float, ...]]
) -> Capture:
    if not images:
        raise ValueError("COLMAP model without images")
    images = sorted(images)
    for image in images:
        if image.camera not in cameras:
            raise ValueError(f"COLMAP image {image.name!r}: there is no camera {image.camera}")
    used = [cameras[image.camera] for image in images]
    kinds = sorted({(camera.width, camera.height, camera.model) for camera in used})
    if len(kinds) > 1:
        raise ValueError(
            f"COLMAP images of {len(kinds)} sizes or models: expected one, got {kinds}"
        )
    width, height, model = kinds[0]
    poses = torch.tensor([image.pose for image in images], dtype=torch.float64)
    table = torch.tensor(points, dtype=torch.float64).reshape(-1, 6)
    whole = Cameras.from_colmap(
        poses[:, :4],
        poses[:, 4:],
        intrinsics([camera.intrinsics for camera in used]),
        width,
        height,
        camera_model=model,
    )
    return Capture(
        whole.to(dtype=torch.float32),
        [image.name for image in images],
        table[:, :3].float(),
        table[:, 3:].float() / 255,
    )


def intrinsics(rows: list[tuple[float, float, float, float]]) -> Tensor:
    """Matrices `(C, 3, 3)` of fx, fy, cx, cy, in float64."""
    Ks = torch.zeros(len(rows), 3, 3, dtype=torch.float64)
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    Ks[:, 0, 0], Ks[:, 1, 1], Ks[:, 0, 2], Ks[:, 1, 2] = values.unbind(-1)
    Ks[:, 2, 2] = 1
    return Ks


def _camera(model: str, width: int, height: int, parameters: list[float]) -> _Camera:
    if width < 1 or height < 1 or width > 1 << 20 or height > 1 << 20:
        raise ValueError(f"COLMAP camera with images of {width} x {height} pixels")
    focals = 2 if model in _TWO_FOCALS else 1
    fx, fy = parameters[0], parameters[focals - 1]
    cx, cy = parameters[focals : focals + 2]
    if any(parameters[focals + 2 :]):
        raise ValueError(f"COLMAP camera of model {model} has distortion: undistort first")
    kind = "fisheye" if model == "OPENCV_FISHEYE" else "pinhole"
    return _Camera(width, height, (fx, fy, cx, cy), kind)


def _unknown_model(what: object) -> ValueError:
    known = ", ".join(_MODELS)
    return ValueError(f"COLMAP camera of model {what}: undistort first (known are {known})")


class _Bytes:
    """Reads values one after the other, and says when the file is too short for them."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name, self.place = data, name, 0

    def take(self, layout: str) -> tuple[float, ...]:
        size = struct.calcsize(layout)
        self.need(1, size)
        values = struct.unpack_from(layout, self.data, self.place)
        self.place += size
        return values

    def count(self, size: int) -> int:
        """A number of records, each of at least `size` bytes, which must fit."""
        (count,) = self.take("<Q")
        self.need(int(count), size)
        return int(count)

    def need(self, count: int, size: int) -> None:
        if count * size > len(self.data) - self.place:
            raise ValueError(f"truncated COLMAP file {self.name}")

    def text(self) -> str:
        end = self.data.find(b"\0", self.place)
        if end < 0:
            raise ValueError(f"truncated COLMAP file {self.name}")
        text = self.data[self.place : end].decode("utf-8", "surrogateescape")
        self.place = end + 1
        return text


def _cameras_bin(data: bytes) -> dict[int, _Camera]:
    source = _Bytes(data, "cameras.bin")
    cameras = {}
    for _ in range(source.count(24)):
        number, model, width, height = (int(value) for value in source.take("<iiQQ"))
        if not 0 <= model < len(_MODELS):
            raise _unknown_model(model)
        name = [*_MODELS][model]
        parameters = list(source.take(f"<{_MODELS[name]}d"))
        cameras[number] = _camera(name, width, height, parameters)
    return cameras


def _images_bin(data: bytes) -> list[_Image]:
    source = _Bytes(data, "images.bin")
    images = []
    for _ in range(source.count(73)):
        _, *pose, camera = source.take("<i7di")
        name = source.text()
        seen = source.count(24)
        source.place += 24 * seen
        images.append(_Image(name, int(camera), tuple(pose)))
    return images


def _points_bin(data: bytes) -> list[tuple[float, ...]]:
    source = _Bytes(data, "points3D.bin")
    points = []
    for _ in range(source.count(51)):
        _, *values, _ = source.take("<Q3d3Bd")
        track = source.count(8)
        source.place += 8 * track
        points.append(tuple(values))
    return points


def _lines(data: bytes) -> Iterator[str]:
    for line in data.decode("utf-8", "surrogateescape").splitlines():
        if not line.lstrip().startswith("#"):
            yield line.strip()


def _cameras_txt(data: bytes) -> dict[int, _Camera]:
    cameras = {}
    for line in filter(None, _lines(data)):
        match line.split():
            case [number, model, width, height, *rest]:
                if model not in _MODELS:
                    raise _unknown_model(model[:40])
                parameters = _floats(rest, line)
                if len(parameters) != _MODELS[model]:
                    raise _bad_line(line)
                size = [_int(value, line) for value in (number, width, height)]
                cameras[size[0]] = _camera(model, size[1], size[2], parameters)
            case _:
                raise _bad_line(line)
    return cameras


def _images_txt(data: bytes) -> list[_Image]:
    """Every image has two lines; the second, its key points, may be empty."""
    images, lines = [], _lines(data)
    for line in lines:
        if line:
            words = line.split(maxsplit=9)
            if len(words) < 10:
                raise _bad_line(line)
            pose = tuple(_floats(words[1:8], line))
            images.append(_Image(words[9], _int(words[8], line), pose))
            next(lines, None)
    return images


def _points_txt(data: bytes) -> list[tuple[float, ...]]:
    points = []
    for line in filter(None, _lines(data)):
        words = line.split(maxsplit=7)
        if len(words) < 7:
            raise _bad_line(line)
        points.append(tuple(_floats(words[1:7], line)))
    return points


def _floats(words: list[str], line: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        raise _bad_line(line) from None


def _int(word: str, line: str) -> int:
    if not word.isdecimal() or len(word) > 18:
        raise _bad_line(line)
    return int(word)


def _bad_line(line: str) -> ValueError:
    return ValueError(f"COLMAP text: can't read the line {line[:80]!r}")
