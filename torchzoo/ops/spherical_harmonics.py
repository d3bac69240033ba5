"""Colours that depend on the direction they are seen from, as sums of real spherical harmonics.

The basis has the Condon-Shortley phase: of the complex harmonics, sqrt(2) Im Y_l^abs(m) for m < 0,
Y_l^0, and sqrt(2) Re Y_l^m for m > 0, in order of l and then of m.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchzoo.ops._splat_checks import check_types, common_dtype
from torchzoo.ops.calling import below_autograd, no_autocast

MAX_DEGREE = 3


def spherical_harmonics(degree: int, dirs: Tensor, coeffs: Tensor) -> Tensor:
    """Sum spherical harmonics at directions.

    Nothing is added or cut off: `sh_to_rgb` does so. Differentiable once, in both inputs; at a
    direction of length 0 only degree 0 is left, and it gets no gradient.

    Args:
        degree: Highest degree to sum, 0 to 3; coefficients of higher ones are left out.
        dirs: Directions, of any length.
        coeffs: One coefficient a basis function and channel; K is 1, 4, 9 or 16.

    Shape:
        - dirs: `(..., 3)`
        - coeffs: `(..., K, 3)`; leading dimensions broadcast
        - output: `(..., 3)`

    Returns:
        The sums, in the widest dtype of the inputs, float32 at least.

    Raises:
        ValueError: Shapes, dtypes, devices or a degree that don't fit.
        NotImplementedError: An input has a forward-mode tangent.

    Source:
        Ramamoorthi, Hanrahan, An Efficient Representation for Irradiance Environment Maps, 2001;
        in splatting, Kerbl et al., 3D Gaussian Splatting, 2023, section 4.

    Example:
        >>> coeffs = torch.zeros(4, 3)
        >>> coeffs[2] = 1.0
        >>> spherical_harmonics(1, torch.tensor([0.0, 0.0, 5.0]), coeffs)
        tensor([0.4886, 0.4886, 0.4886])
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"degree: got {degree}, expected 0 to {MAX_DEGREE}")
    if dirs.ndim < 1 or dirs.shape[-1] != 3:
        raise ValueError(f"dirs: got {tuple(dirs.shape)}, expected (..., 3)")
    check_coefficients("coeffs", coeffs, degree)
    check_types("spherical_harmonics", {"dirs": dirs, "coeffs": coeffs})
    lead, items = dirs.shape[:-1], coeffs.shape[:-2]
    try:
        if lead[max(0, len(lead) - len(items)) :] != items:  # a slow function is next
            lead = torch.broadcast_shapes(lead, items)
    except RuntimeError:
        expected = f"leading dimensions that broadcast with {tuple(dirs.shape[:-1])}"
        raise ValueError(f"coeffs: got {tuple(coeffs.shape)}, expected {expected}") from None
    dtype = common_dtype(dirs, coeffs)
    flat = _spread(dirs.to(dtype), lead, 1).contiguous()
    weights = _spread(coeffs.to(dtype), lead, 2).contiguous()
    return _differentiable_sh(degree, flat, weights, None, None).reshape(*lead, 3)


def view_colors(
    degree: int, means: Tensor, viewmats: Tensor, radii: Tensor, coeffs: Tensor
) -> Tensor:
    """`sh_to_rgb` of the harmonics along the rays from the cameras to the splats: `(C, N, 3)`.

    Of one type, means `(N, 3)`, world to camera `(C, 4, 4)`, and coefficients `(N, K, 3)` or
    `(C, N, K, 3)`. Where a radius `(C, N, 2)` is 0 there is no direction, and no gradient by it.
    """
    lead = tuple(radii.shape[:2])
    weights = _spread(coeffs, lead, 2).contiguous()
    return _differentiable_sh(degree, means, weights, viewmats, radii)


def _spread(x: Tensor, lead: tuple[int, ...], own: int) -> Tensor:
    """Broadcast the leading dimensions of x to these, and make one of them."""
    tail, count = x.shape[-own:], math.prod(lead)
    if math.prod(x.shape[:-own]) != count:  # else a sum of gradients would be a copy
        x = x.expand(*lead, *tail)
    return x if x.ndim == own + 1 else x.reshape(count, *tail)


def check_coefficients(name: str, coeffs: Tensor, degree: int) -> None:
    """Raise ValueError unless they are `(..., K, 3)`, with K of a degree not below this one."""
    fits = coeffs.ndim >= 2 and coeffs.shape[-1] == 3 and coeffs.shape[-2] in (1, 4, 9, 16)
    if not fits or coeffs.shape[-2] < (degree + 1) ** 2:
        least = (degree + 1) ** 2
        raise ValueError(
            f"{name}: got {tuple(coeffs.shape)}, expected (..., K, 3) with K in (1, 4, 9, 16), "
            f"at least {least} for degree {degree}"
        )


def _basis(degree: int, dirs: Tensor) -> Tensor:
    """The `(degree + 1)^2` functions at directions `(M, 3)`: `(M, K)`."""
    square = dirs.square().sum(-1, keepdim=True)
    null = square == 0
    x, y, z = (dirs * torch.where(null, 0, torch.where(null, 1, square).rsqrt())).unbind(-1)
    values = [torch.full_like(x, 0.28209479177387814)]
    if degree > 0:
        values += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    xx, yy, zz = x * x, y * y, z * z
    if degree > 1:
        values += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
        ]
    if degree > 2:
        values += [
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ]
    return torch.stack(values, -1)


def _directions(points: Tensor, viewmats: Tensor | None, radii: Tensor | None) -> Tensor:
    """`(M, 3)`: the points themselves, or from each camera's centre to each point it sees."""
    if viewmats is None or radii is None:
        return points
    R, t = viewmats[:, :3].split((3, 1), 2)
    centres = -(t * R).sum(1)
    seen = (radii > 0).all(-1, keepdim=True)
    return torch.where(seen, points - centres[:, None], 0).reshape(-1, 3)


def _sum(degree: int, dirs: Tensor, coeffs: Tensor) -> Tensor:
    return torch.einsum("mk,mkc->mc", _basis(degree, dirs), coeffs[:, : (degree + 1) ** 2])


@torch.library.custom_op("torchzoo::splat_sh", mutates_args=())
def splat_sh(
    degree: int, points: Tensor, coeffs: Tensor, viewmats: Tensor | None, radii: Tensor | None
) -> Tensor:
    with no_autocast(points):
        values = _sum(degree, _directions(points, viewmats, radii), coeffs)
        return values if viewmats is None else torch.relu(values + 0.5)


@splat_sh.register_fake
def _(degree: int, points: Tensor, coeffs: Tensor, *_: Tensor | None) -> Tensor:
    return points.new_empty(coeffs.shape[0], 3)


@torch.library.custom_op("torchzoo::splat_sh_backward", mutates_args=())
def splat_sh_backward(
    degree: int,
    points: Tensor,
    coeffs: Tensor,
    viewmats: Tensor | None,
    radii: Tensor | None,
    colors: Tensor | None,
    g: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients by the directions `(M, 3)` and the coefficients; `colors` were cut off at 0."""
    with no_autocast(points):
        dirs = _directions(points, viewmats, radii)
        pull = torch.func.vjp(lambda d, c: _sum(degree, d, c), dirs, coeffs)[1]
        g_dirs, g_coeffs = pull(g if colors is None else torch.where(colors <= 0, 0, g))
        if radii is not None:
            g_dirs = torch.where((radii > 0).all(-1).reshape(-1, 1), g_dirs, 0)
    return g_dirs, g_coeffs


@splat_sh_backward.register_fake
def _(degree: int, points: Tensor, coeffs: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return points.new_empty(coeffs.shape[0], 3), coeffs.new_empty(coeffs.shape)


class Harmonics(torch.autograd.Function):
    """`splat_sh` with gradients; of points that cameras see, `(C, N, 3)`."""

    @staticmethod
    def forward(ctx: Any, degree: int, *inputs: Tensor | None) -> Tensor:
        found = _values(degree, *inputs)
        ctx.degree = degree
        ctx.save_for_backward(*inputs, None if inputs[2] is None else found)
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        points, coeffs, viewmats, radii, colors = ctx.saved_tensors
        flat = None if colors is None else colors.view(-1, 3)
        given = (points, coeffs, viewmats, radii, flat, g.reshape(-1, 3))
        with below_autograd(*given):
            g_dirs, g_coeffs = splat_sh_backward(ctx.degree, *given)
        if viewmats is None:
            return None, g_dirs, g_coeffs, None, None
        g_points = g_dirs if len(radii) == 1 else g_dirs.view(*radii.shape[:2], 3).sum(0)
        g_views = None
        if ctx.needs_input_grad[3]:
            g_views = _by_viewmats(viewmats, g_dirs.view(*radii.shape[:2], 3).sum(1, keepdim=True))
        return None, g_points, g_coeffs, g_views, None


def _by_viewmats(viewmats: Tensor, g: Tensor) -> Tensor:
    """`(C, 4, 4)`, from gradients `(C, 1, 3)` by what starts at the centres `-R^T t`."""
    R, t = viewmats[:, :3].split((3, 1), 2)
    rows = torch.cat((t * g, (R * g).sum(2, keepdim=True)), 2)
    return torch.nn.functional.pad(rows, (0, 0, 0, 1))


def _values(degree: int, *inputs: Tensor | None) -> Tensor:
    radii = inputs[3]
    with below_autograd():
        found: Tensor = splat_sh(degree, *inputs)
        return found if radii is None else found.view(*radii.shape[:2], 3)


def _differentiable_sh(degree: int, *inputs: Tensor | None) -> Tensor:
    """`splat_sh`, with gradients where there are some to record."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return _values(degree, *inputs)
    found: Tensor = Harmonics.apply(degree, *inputs)
    return found
