"""Checks of what the splat operators' public functions are given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchzoo.ops._splat_kernels import KERNELS
from torchzoo.ops._splat_project import CAMERAS
from torchzoo.ops.calling import refuse_forward_mode, values_readable


def check_splats(
    op: str,
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    opacities: Tensor | None,
    beta: Tensor | None,
    kernel: str,
    camera_model: str,
    width: int,
    height: int,
) -> None:
    """Raise ValueError where shapes, dtypes, devices or options don't fit."""
    if means.ndim != 2 or means.shape[1] != 3:
        raise ValueError(f"means: got {tuple(means.shape)}, expected (N, 3)")
    if viewmats.ndim != 3 or viewmats.shape[1:] != (4, 4):
        raise ValueError(f"viewmats: got {tuple(viewmats.shape)}, expected (C, 4, 4)")
    N, C = means.shape[0], viewmats.shape[0]
    expect("quats", quats, (N, 4), f"(N, 4) with N={N}")
    expect("scales", scales, (N, 3), f"(N, 3) with N={N}")
    expect("Ks", Ks, (C, 3, 3), f"(C, 3, 3) with C={C}")
    if opacities is not None and tuple(opacities.shape) != (N,):
        expect("opacities", opacities, (C, N), f"(N,) or (C, N) with N={N}, C={C}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel: got {kernel!r}, expected one of {', '.join(KERNELS)}")
    if camera_model not in CAMERAS:
        raise ValueError(
            f"camera_model: got {camera_model!r}, expected one of {', '.join(CAMERAS)}"
        )
    if width < 1 or height < 1:
        raise ValueError(f"width, height: got {width}, {height}, expected at least 1")
    if kernel == "generalized_exponential":
        if beta is None:
            raise ValueError(f"beta: got None, expected (N,) with N={N} for kernel={kernel!r}")
        expect("beta", beta, (N,), f"(N,) with N={N}")
        if values_readable(beta) and bool((beta <= 0).any()):
            raise ValueError(f"beta: got {beta.min().item():g}, expected all above 0")
    elif beta is not None:
        raise ValueError(f"beta: got a tensor, expected None for kernel={kernel!r}")
    inputs = {"means": means, "quats": quats, "scales": scales, "viewmats": viewmats, "Ks": Ks}
    check_types(op, inputs | {"opacities": opacities, "beta": beta})


def expect(name: str, value: Tensor, shape: tuple[int, ...], words: str) -> None:
    """Raise ValueError where a tensor has another shape."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: got {tuple(value.shape)}, expected {words}")


def check_types(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError for tensors that are not floats, or not on the first one's device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, leader = next(iter(given.items()))
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: got {tensor.dtype}, expected a floating-point dtype")
        if tensor.device != leader.device:
            raise ValueError(f"{name}: got {tensor.device}, expected {leader.device}, as {first}")
    refuse_forward_mode(op, *given.values())


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None and tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def per_camera(x: Tensor, cameras: int, dims: int) -> Tensor:
    """`x` with a leading dimension of cameras, where it has only the other `dims`."""
    if x.ndim != dims:
        return x
    return x[None] if cameras == 1 else x[None].expand(cameras, *x.shape).contiguous()
