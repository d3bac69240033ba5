"""Cameras: poses, intrinsics and image size, in the conventions of OpenCV.

A camera looks along its z axis with x to the right and y down; `viewmats` take world coordinates to
camera coordinates, and pixel (i, j) has its centre at (i + 0.5, j + 0.5) in the units of `Ks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.splatting.rotations import quat_to_matrix

__all__ = ["CAMERA_MODELS", "Cameras"]

CAMERA_MODELS = ("pinhole", "orthographic", "fisheye")
_FLIP = {"opencv": (1.0, 1.0, 1.0, 1.0), "opengl": (1.0, -1.0, -1.0, 1.0)}
"""Signs of the camera's axes in each convention."""


@dataclass(frozen=True, eq=False)
class Cameras:
    """C cameras with images of one size.

    Args:
        viewmats: World to camera, `(C, 4, 4)`.
        Ks: Intrinsics in pixels, `(C, 3, 3)`.
        width: Columns of the images.
        height: Rows of the images.
        camera_model: `"pinhole"`, `"orthographic"` or `"fisheye"` (equidistant).

    Raises:
        ValueError: Shapes, types or devices that don't fit, a size below 1, an unknown model.

    Example:
        >>> cameras = Cameras.orbit(8, radius=4.0, width=64, height=48)
        >>> len(cameras), cameras[2:4].viewmats.shape
        (8, torch.Size([2, 4, 4]))
    """

    viewmats: Tensor
    Ks: Tensor
    width: int
    height: int
    camera_model: str = "pinhole"

    def __post_init__(self) -> None:
        count = self.viewmats.shape[0] if self.viewmats.dim() else 0
        for name, value, shape in (
            ("viewmats", self.viewmats, (count, 4, 4)),
            ("Ks", self.Ks, (count, 3, 3)),
        ):
            if tuple(value.shape) != shape:
                where = f" with C={count}" if name == "Ks" else ""
                expected = f"(C, {shape[1]}, {shape[2]}){where}"
                raise ValueError(f"{name}: got {tuple(value.shape)}, expected {expected}")
            if not value.is_floating_point():
                raise ValueError(f"{name}: got {value.dtype}, expected floating point")
        if self.Ks.device != self.viewmats.device:
            raise ValueError(f"Ks: got {self.Ks.device}, expected {self.viewmats.device}")
        for name in ("width", "height"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.camera_model not in CAMERA_MODELS:
            raise ValueError(
                f"camera_model: got {self.camera_model!r}, expected one of {CAMERA_MODELS}"
            )

    def __len__(self) -> int:
        return len(self.viewmats)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Cameras:
        """Some of the cameras, as `Cameras`; an int gives one."""
        if isinstance(index, int):
            index = [range(len(self))[index]]  # an IndexError where there is none
        return replace(self, viewmats=self.viewmats[index], Ks=self.Ks[index])

    def __iter__(self) -> Iterator[Cameras]:
        return (self[index] for index in range(len(self)))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cameras:
        """The same cameras on a device and in a dtype."""
        return replace(self, viewmats=self.viewmats.to(device, dtype), Ks=self.Ks.to(device, dtype))

    def resized(self, width: int, height: int) -> Cameras:
        """The same views in images of another size."""
        stretch = [[width / self.width], [height / self.height], [1.0]]
        return replace(self, Ks=self.Ks * self.Ks.new_tensor(stretch), width=width, height=height)

    @property
    def centers(self) -> Tensor:
        """Where the cameras are, `(C, 3)`."""
        return -(self.viewmats[:, :3, :3].mT @ self.viewmats[:, :3, 3:]).squeeze(-1)

    @property
    def scene_scale(self) -> float:
        """1.1 times the largest distance of a camera from the mean of all; 1 where that is 0."""
        centers = self.centers
        reach = (centers - centers.mean(0)).norm(dim=-1).max().item() if len(self) else 0.0
        return 1.1 * reach or 1.0

    def camera_to_world(self, convention: str = "opencv") -> Tensor:
        """Poses `(C, 4, 4)`, whose columns are the camera's axes and place in the world.

        Args:
            convention: `"opencv"` (y down, z forward; COLMAP's as well) or `"opengl"` (y up, z
                backward; that of Blender and NeRF).
        """
        rotation = self.viewmats[:, :3, :3].mT
        poses = torch.zeros_like(self.viewmats)
        poses[:, :3] = torch.cat([rotation, self.centers[..., None]], -1)
        poses[:, 3, 3] = 1
        return poses * _signs(convention, poses)

    @classmethod
    def from_camera_to_world(
        cls,
        poses: Tensor,
        Ks: Tensor,
        width: int,
        height: int,
        *,
        convention: str = "opencv",
        camera_model: str = "pinhole",
    ) -> Self:
        """Cameras from poses `(C, 4, 4)` or `(C, 3, 4)`; the inverse of `camera_to_world`."""
        if poses.dim() != 3 or tuple(poses.shape[1:]) not in ((4, 4), (3, 4)):
            raise ValueError(f"poses: got {tuple(poses.shape)}, expected (C, 4, 4) or (C, 3, 4)")
        poses = poses * _signs(convention, poses)
        return cls(_viewmats(poses[:, :3, :3].mT, poses[:, :3, 3]), Ks, width, height, camera_model)

    @classmethod
    def from_colmap(
        cls,
        qvecs: Tensor,
        tvecs: Tensor,
        Ks: Tensor,
        width: int,
        height: int,
        *,
        camera_model: str = "pinhole",
    ) -> Self:
        """Cameras from COLMAP's world-to-camera quaternions `(C, 4)` and translations `(C, 3)`."""
        viewmats = tvecs.new_zeros(len(tvecs), 4, 4)
        viewmats[:, :3, :3], viewmats[:, :3, 3] = quat_to_matrix(qvecs), tvecs
        viewmats[:, 3, 3] = 1
        return cls(viewmats, Ks, width, height, camera_model)

    @classmethod
    def look_at(
        cls,
        eyes: Tensor,
        target: Tensor | Sequence[float] = (0.0, 0.0, 0.0),
        *,
        width: int,
        height: int,
        up: Sequence[float] = (0.0, 0.0, 1.0),
        fov: float = 45.0,
    ) -> Self:
        """Pinhole cameras at `eyes` that look at a point, with square pixels.

        Args:
            eyes: Camera centres, `(C, 3)`.
            target: The point, or one for each camera.
            width: Columns of the images.
            height: Rows of the images.
            up: The world's direction that is up in the images; another one is taken for cameras
                that look along it.
            fov: Horizontal field of view in degrees.

        Raises:
            ValueError: `eyes` is not `(C, 3)`, or `fov` not between 0 and 180.
        """
        if eyes.dim() != 2 or eyes.shape[1] != 3:
            raise ValueError(f"eyes: got {tuple(eyes.shape)}, expected (C, 3)")
        if not 0 < fov < 180:
            raise ValueError(f"fov: got {fov}, expected between 0 and 180 degrees")
        forward = F.normalize(torch.as_tensor(target).to(eyes) - eyes, dim=-1)
        upward = eyes.new_tensor(up).expand_as(forward)
        along = torch.linalg.cross(forward, upward).norm(dim=-1, keepdim=True) < 1e-6
        upward = torch.where(along, upward.roll(1, -1), upward)
        right = F.normalize(torch.linalg.cross(forward, upward), dim=-1)
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
        focal = width / (2 * math.tan(math.radians(fov) / 2))
        K = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
        Ks = eyes.new_tensor(K).repeat(len(eyes), 1, 1)
        return cls(_viewmats(rotation, eyes), Ks, width, height)

    @classmethod
    def orbit(
        cls,
        count: int,
        *,
        radius: float,
        width: int,
        height: int,
        elevation: float = 20.0,
        target: Sequence[float] = (0.0, 0.0, 0.0),
        fov: float = 45.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Cameras on a circle around the z axis through `target`, `elevation` degrees above it."""
        angle = torch.arange(count, device=device, dtype=dtype or torch.get_default_dtype())
        angle = angle * (2 * math.pi / max(count, 1))
        flat, rise = math.cos(math.radians(elevation)), math.sin(math.radians(elevation))
        around = [flat * angle.cos(), flat * angle.sin(), torch.full_like(angle, rise)]
        center = angle.new_tensor(target)
        eyes = center + radius * torch.stack(around, -1)
        return cls.look_at(eyes, center, width=width, height=height, fov=fov)

    @classmethod
    def for_image(
        cls,
        height: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """One orthographic camera that sees the plane z = 0 as an image.

        The image's middle is the origin and its longer side goes from -1 to 1, y down.
        """
        half = max(width, height) / 2
        K = [[half, 0.0, width / 2], [0.0, half, height / 2], [0.0, 0.0, 1.0]]
        viewmat = torch.eye(4, device=device, dtype=dtype or torch.get_default_dtype())
        viewmat[2, 3] = 1
        return cls(viewmat[None], viewmat.new_tensor([K]), width, height, "orthographic")


def _signs(convention: str, like: Tensor) -> Tensor:
    if convention not in _FLIP:
        raise ValueError(f"convention: got {convention!r}, expected one of {tuple(_FLIP)}")
    return like.new_tensor(_FLIP[convention])


def _viewmats(rotation: Tensor, centers: Tensor) -> Tensor:
    """World to camera from the rotation `(C, 3, 3)` that does it and the cameras' centres."""
    viewmats = rotation.new_zeros(len(rotation), 4, 4)
    viewmats[:, :3, :3] = rotation
    viewmats[:, :3, 3] = -(rotation @ centers[..., None]).squeeze(-1)
    viewmats[:, 3, 3] = 1
    return viewmats
