"""Quaternions wxyz and rotation matrices."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["matrix_to_quat", "quat_to_matrix"]


def quat_to_matrix(quats: Tensor) -> Tensor:
    """Rotation matrices of quaternions, which need not have length one.

    Shape:
        - quats: `(..., 4)`, wxyz
        - output: `(..., 3, 3)`

    Returns:
        Matrices R, so that `R @ v` turns a column v. A zero quaternion gives the identity.

    Example:
        >>> quat_to_matrix(torch.tensor([2.0, 0.0, 0.0, 2.0])) @ torch.tensor([1.0, 0.0, 0.0])
        tensor([0., 1., 0.])
    """
    w, x, y, z = quats.unbind(-1)
    twice = 2 / (quats**2).sum(-1).clamp_min(torch.finfo(quats.dtype).tiny)
    rows = [
        1 - twice * (y * y + z * z), twice * (x * y - w * z), twice * (x * z + w * y),
        twice * (x * y + w * z), 1 - twice * (x * x + z * z), twice * (y * z - w * x),
        twice * (x * z - w * y), twice * (y * z + w * x), 1 - twice * (x * x + y * y),
    ]  # fmt: skip
    return rearrange(torch.stack(rows, -1), "... (i j) -> ... i j", i=3)


def matrix_to_quat(matrices: Tensor) -> Tensor:
    """Unit quaternions of rotation matrices, with w at least 0.

    Of the four ways to divide by one component, the one with the largest component is taken, so
    that no turn is near a division by zero.

    Shape:
        - matrices: `(..., 3, 3)`
        - output: `(..., 4)`, wxyz

    Returns:
        The quaternions.

    Example:
        >>> matrix_to_quat(torch.eye(3).flip(0).flip(1)).shape
        torch.Size([4])
    """
    m = matrices
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    wx, wy, wz = (
        m[..., 2, 1] - m[..., 1, 2],
        m[..., 0, 2] - m[..., 2, 0],
        m[..., 1, 0] - m[..., 0, 1],
    )
    xy, xz, yz = (
        m[..., 1, 0] + m[..., 0, 1],
        m[..., 0, 2] + m[..., 2, 0],
        m[..., 2, 1] + m[..., 1, 2],
    )
    # row k is 4 q_k times the quaternion, in the order of its components
    table = torch.stack(
        [
            torch.stack([1 + xx + yy + zz, wx, wy, wz], -1),
            torch.stack([wx, 1 + xx - yy - zz, xy, xz], -1),
            torch.stack([wy, xy, 1 - xx + yy - zz, yz], -1),
            torch.stack([wz, xz, yz, 1 - xx - yy + zz], -1),
        ],
        -2,
    )
    largest = table.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = torch.take_along_dim(table, largest[..., None, None], -2).squeeze(-2)
    quats = row / row.norm(dim=-1, keepdim=True)
    return torch.where(quats[..., :1] < 0, -quats, quats)
