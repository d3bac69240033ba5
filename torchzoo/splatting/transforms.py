"""`transforms.json`, the cameras of NeRF data sets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.colmap import Capture, intrinsics
from torchzoo.splatting.ply import read_vertices

__all__ = ["read_transforms"]

_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
_IMAGES = ("", ".png", ".jpg", ".jpeg")


def read_transforms(path: str | Path) -> Capture:
    """Read a `transforms.json`, and the points of the PLY file that it may name.

    Sizes and focal lengths may be given once or for each frame, focal lengths as an angle of view
    as well. Where no size is given, that of the first image is taken.

    Raises:
        ValueError: The file is damaged or lacks something; images are distorted or of several
            sizes.
        OSError: A file that it names can't be read.
    """
    path = Path(path)
    try:
        whole = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    frames = whole.get("frames") if isinstance(whole, dict) else None
    if not isinstance(frames, list) or not frames:
        raise ValueError("transforms: expected an object with a list of frames")
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise ValueError(f"frame {index}: expected an object with a file_path")
    settings = [{**whole, **frame} for frame in frames]
    sizes = [_size(one, path.parent) for one in settings]
    kinds = sorted({(*size, _model(one)) for size, one in zip(sizes, settings, strict=True)})
    if len(kinds) > 1:
        raise ValueError(f"images of {len(kinds)} sizes or models: expected one, got {kinds}")
    width, height, model = kinds[0]
    cameras = Cameras.from_camera_to_world(
        torch.stack([_pose(frame, index) for index, frame in enumerate(frames)]),
        intrinsics([_intrinsics(one, width, height) for one in settings]),
        width,
        height,
        convention="opengl",
        camera_model=model,
    )
    names = [frame["file_path"] for frame in frames]
    return Capture(cameras.to(dtype=torch.float32), names, *_points(whole, path.parent))


def _number(settings: dict[str, Any], *names: str) -> float | None:
    """The first of some settings that is there."""
    for name in names:
        if name in settings:
            value = settings[name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}: got {str(value)[:40]!r}, expected a number")
            if not abs(value) < 1e30:
                raise ValueError(f"{name}: got {str(value)[:40]}, expected a finite number")
            return float(value)
    return None


def _size(settings: dict[str, Any], folder: Path) -> tuple[int, int]:
    width, height = _number(settings, "w"), _number(settings, "h")
    if width is None or height is None:
        from PIL import Image

        name = settings["file_path"]
        found = [path for end in _IMAGES if (path := folder / f"{name}{end}").is_file()]
        if not found:
            raise ValueError(f"w and h are missing, and so is the image {name!r}")
        with Image.open(found[0]) as image:
            return image.size
    if not (1 <= width < 1 << 20 and 1 <= height < 1 << 20):
        raise ValueError(f"w and h: got {width:g} and {height:g}, expected a size in pixels")
    return int(width), int(height)


def _model(settings: dict[str, Any]) -> str:
    if any(_number(settings, name) for name in _DISTORTION):
        raise ValueError("images have lens distortion: undistort first")
    name = settings.get("camera_model", "PINHOLE")
    if name not in ("SIMPLE_PINHOLE", "PINHOLE", "OPENCV", "OPENCV_FISHEYE"):
        raise ValueError(f"camera_model: got {str(name)[:40]!r}: undistort first")
    return "fisheye" if name == "OPENCV_FISHEYE" else "pinhole"


def _intrinsics(
    settings: dict[str, Any], width: int, height: int
) -> tuple[float, float, float, float]:
    fx = _number(settings, "fl_x")
    if fx is None:
        angle = _number(settings, "camera_angle_x")
        if angle is None or not 0 < angle < math.pi:
            raise ValueError(f"camera_angle_x: got {angle}, expected 0 to pi, or fl_x")
        fx = width / 2 / math.tan(angle / 2)
    fy, cx, cy = (_number(settings, name) for name in ("fl_y", "cx", "cy"))
    return (
        fx,
        fx if fy is None else fy,
        width / 2 if cx is None else cx,
        height / 2 if cy is None else cy,
    )


def _pose(frame: dict[str, Any], index: int) -> Tensor:
    rows = frame.get("transform_matrix")
    try:
        pose = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        pose = np.empty(0)
    if pose.shape not in ((4, 4), (3, 4)) or not np.isfinite(pose).all():
        raise ValueError(f"transform_matrix of frame {index}: expected 4 rows of 4 numbers")
    return torch.from_numpy(pose[:3])


def _points(whole: dict[str, Any], folder: Path) -> tuple[Tensor, Tensor]:
    name = whole.get("ply_file_path")
    if not isinstance(name, str):
        return torch.zeros(0, 3), torch.zeros(0, 3)
    columns = read_vertices((folder / name).read_bytes())
    if not {"x", "y", "z"} <= columns.keys():
        raise ValueError(f"{name}: its vertices have no x, y, z")
    xyz = torch.from_numpy(np.stack([columns[axis] for axis in "xyz"], 1)).float()
    if not {"red", "green", "blue"} <= columns.keys():
        return xyz, torch.full_like(xyz, 0.5)
    rgb = np.stack([columns[channel] for channel in ("red", "green", "blue")], 1)
    return xyz, torch.from_numpy(rgb).float() / 255
