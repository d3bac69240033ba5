"""Projection of splats onto images: the raw operators `splat_project` and its backward.

A camera takes the mean to `t = R mu + t_v` and that to the image; with J the derivative there, the
covariance on the image is that of `J R` times the splat's own axes,

    H = J R R_q diag(s)  (2, 3),   S = H H^T + eps2d I,

and `det S = det(H H^T) + eps2d tr(H H^T) + eps2d^2`, where `det(H H^T)` is the sum of the squares
of the minors of H: no term is subtracted, so that needles keep their inverse.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchzoo.ops._splat_kernels import (
    ANALYTIC,
    GROWN,
    SMALLEST_VARIANCE,
    support,
)
from torchzoo.ops.calling import below_autograd, no_autocast

CameraModel = Literal["pinhole", "orthographic", "fisheye"]
CAMERAS = {"pinhole": 0, "orthographic": 1, "fisheye": 2}

SMALLEST_COMPENSATION = 0.005
LARGEST_RADIUS = 2**30
SERIES_BELOW, SERIES_TERMS = 0.1, 16
"""The fisheye's functions of `(rho / z)^2` are power series below the first, of so many terms."""


class Screen(NamedTuple):
    """Splats on an image, before any is culled."""

    mean: Tensor
    depth: Tensor
    conic: Tensor
    cov: Tensor
    compensation: Tensor
    det: Tensor


def rotations(quats: Tensor) -> Tensor:
    """Rotation matrices `(..., 3, 3)` of quaternions wxyz, which are normalised here."""
    w, x, y, z = (quats / quats.norm(dim=-1, keepdim=True)).unbind(-1)
    entries = (
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    )
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def _pinhole(
    t: Tensor, K: Tensor, width: int, height: int, inria: bool
) -> tuple[Tensor, list[Tensor]]:
    x, y, z = t.unbind(-1)
    zero = torch.zeros_like(z)
    point, rows = [], []
    for axis, (along, size) in enumerate(((x, width), (y, height))):
        focal, centre = K[..., axis, axis], K[..., axis, 2]
        margin = 0.15 * size / focal
        low, high = -centre / focal - margin, (size - centre) / focal + margin
        if inria:
            high = 0.65 * size / focal
            low = -high
        slope = along / z
        held = slope.clamp(low, high) / z
        point.append(focal * slope + centre)
        row = [focal / z, zero] if axis == 0 else [zero, focal / z]
        rows += [*row, -focal * held]
    return torch.stack(point, -1), rows


def _orthographic(
    t: Tensor, K: Tensor, width: int, height: int, inria: bool
) -> tuple[Tensor, list[Tensor]]:
    zero = torch.zeros_like(t[..., 0])
    fx, fy = K[..., 0, 0] + zero, K[..., 1, 1] + zero
    point = torch.stack((fx * t[..., 0] + K[..., 0, 2], fy * t[..., 1] + K[..., 1, 2]), -1)
    return point, [fx, zero, zero, zero, fy, zero]


def _fisheye(
    t: Tensor, K: Tensor, width: int, height: int, inria: bool
) -> tuple[Tensor, list[Tensor]]:
    """Equidistant: `u = fx x h + cx` with `h = theta / rho`, theta the angle from the axis."""
    x, y, z = t.unbind(-1)
    fx, fy = K[..., 0, 0], K[..., 1, 1]
    h, p = _angle_per_radius(x * x + y * y, z)
    slope_z = -1 / (x * x + y * y + z * z)
    point = torch.stack((fx * x * h + K[..., 0, 2], fy * y * h + K[..., 1, 2]), -1)
    return point, [
        fx * (h + x * x * p),
        fx * (x * y * p),
        fx * (x * slope_z),
        fy * (x * y * p),
        fy * (h + y * y * p),
        fy * (y * slope_z),
    ]


def _angle_per_radius(square: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """`h = atan2(rho, z) / rho` and `p = dh/drho / rho` from rho^2: of x h, p gives the slopes."""
    near = (square < SERIES_BELOW * z * z) & (z > 0)
    ratio = torch.where(near, square / torch.where(near, z, 1).square(), 0)
    h_series, p_series = torch.zeros_like(ratio), torch.zeros_like(ratio)
    for k in range(SERIES_TERMS, 0, -1):
        h_series = (-1) ** k / (2 * k + 1) + ratio * h_series
        p_series = (-1) ** k * 2 * k / (2 * k + 1) + ratio * p_series
    safe_z = torch.where(near, z, 1)
    far = torch.where(near, 1, square)
    rho = far.sqrt()
    h = torch.atan2(rho, torch.where(near, 1, z)) / rho
    p = (z / (far + z * z) - h) / far
    h = torch.where(near, (1 + ratio * h_series) / safe_z, h)
    return h, torch.where(near, p_series / (safe_z * safe_z * safe_z), p)


_MODELS = (_pinhole, _orthographic, _fisheye)


def _screen(
    mean: Tensor,
    quat: Tensor,
    scale: Tensor,
    view: Tensor,
    K: Tensor,
    options: tuple[int, int, int, int, float, bool, bool],
) -> Screen:
    """Splats on the image; leading dimensions broadcast."""
    width, height, kernel, camera, eps2d, antialiased, inria = options
    R = view[..., :3, :3]
    t = (R @ mean[..., None])[..., 0] + view[..., :3, 3]
    point, rows = _MODELS[camera](t, K, width, height, inria)
    J = torch.stack(torch.broadcast_tensors(*rows), -1).unflatten(-1, (2, 3))
    H = J @ (R @ (rotations(quat) * scale[..., None, :]))
    xx, yy = H.square().sum(-1).unbind(-1)
    xy = (H[..., 0, :] * H[..., 1, :]).sum(-1)
    det = torch.linalg.cross(H[..., 0, :], H[..., 1, :]).square().sum(-1)
    blur = 0.0 if kernel == ANALYTIC else eps2d
    blurred = det + blur * (xx + yy) + blur * blur
    compensation = torch.ones_like(det)
    if antialiased and blur > 0:
        compensation = (det / blurred).clamp(min=SMALLEST_COMPENSATION**2).sqrt()
    cov = torch.stack((xx + blur, xy, yy + blur), -1)
    if kernel == ANALYTIC:
        conic = torch.zeros_like(cov)
    else:
        conic = torch.stack((yy + blur, -xy, xx + blur), -1) / blurred[..., None]
    return Screen(point, t[..., 2], conic, cov, compensation, blurred)


def _radii(
    screen: Screen,
    opacities: Tensor,
    beta: Tensor | None,
    kernel: int,
    alpha_min: float,
    inria: bool,
) -> Tensor:
    """Half-sides of the boxes in which splats can be seen, NaN or 0 where they can't."""
    reach = support(kernel, opacities, beta, alpha_min)[..., None]
    variances = screen.cov[..., ::2]
    if inria:
        middle = variances.sum(-1, keepdim=True) / 2
        spread = (middle.square() - screen.det[..., None]).clamp(min=0.1)
        side = 3 * (middle + spread.sqrt()).sqrt().expand_as(variances)
        side = torch.where(reach.isnan(), reach, side)
    elif kernel == ANALYTIC:
        side = (reach * (variances + SMALLEST_VARIANCE)).sqrt() + GROWN
    else:
        side = (reach * variances).sqrt()
    return side.ceil().clamp(1, LARGEST_RADIUS)


@torch.library.custom_op("torchzoo::splat_project", mutates_args=())
def splat_project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    beta: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    kernel: int,
    camera: int,
    eps2d: float,
    near: float,
    far: float,
    radius_clip: float,
    alpha_min: float,
    antialiased: bool,
    inria: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = (width, height, kernel, camera, eps2d, antialiased, inria)
    with no_autocast(means):
        screen = _screen(means, quats, scales, viewmats[:, None], Ks[:, None], options)
        radii = _radii(screen, opacities * screen.compensation, beta, kernel, alpha_min, inria)
    depth, box = screen.depth, torch.stack((screen.mean - radii, screen.mean + radii), -1)
    seen = (depth >= near) & (depth <= far)
    if camera == CAMERAS["pinhole"]:
        seen &= depth > 0
    if kernel != ANALYTIC:
        seen &= screen.det > 0
    for number in (screen.mean, screen.conic, screen.cov, radii):
        seen &= number.isfinite().all(-1)
    seen &= (radii > radius_clip).any(-1)
    size = box.new_tensor((width, height))
    seen &= ((box[..., 1] > 0) & (box[..., 0] < size)).all(-1)
    each = seen[..., None]
    return (
        torch.where(each, radii, 0).to(torch.int32),
        torch.where(each, screen.mean, 0),
        torch.where(seen, depth, 0),
        torch.where(each, screen.conic, 0),
        torch.where(each, screen.cov, 0),
        torch.where(seen, screen.compensation, 0),
    )


@splat_project.register_fake
def _(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    beta: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    each = (viewmats.shape[0], means.shape[0])
    return (
        means.new_empty(*each, 2, dtype=torch.int32),
        means.new_empty(*each, 2),
        means.new_empty(each),
        means.new_empty(*each, 3),
        means.new_empty(*each, 3),
        means.new_empty(each),
    )


@torch.library.custom_op("torchzoo::splat_project_backward", mutates_args=())
def splat_project_backward(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    kernel: int,
    camera: int,
    eps2d: float,
    antialiased: bool,
    inria: bool,
    radii: Tensor,
    conics: Tensor,
    compensations: Tensor,
    g_means2d: Tensor | None,
    g_depths: Tensor | None,
    g_conics: Tensor | None,
    g_covs2d: Tensor | None,
    g_compensations: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c, n = (radii > 0).all(-1).nonzero().unbind(1)
    options = (width, height, kernel, camera, eps2d, antialiased, inria)

    def project(means: Tensor, quats: Tensor, scales: Tensor, views: Tensor) -> tuple[Tensor, ...]:
        return _screen(means, quats, scales, views, Ks[c], options)[:5]

    with no_autocast(means):
        screen, pull = torch.func.vjp(project, means[n], quats[n], scales[n], viewmats[c])[:2]
        above = (g_means2d, g_depths, g_conics, g_covs2d, g_compensations)
        given = zip(screen, above, strict=True)
        slopes = pull(tuple(torch.zeros_like(x) if g is None else g[c, n] for x, g in given))
    found = []
    for whole, at, slope in zip(
        (means, quats, scales, viewmats), (n, n, n, c), slopes, strict=True
    ):
        found.append(torch.zeros_like(whole).index_add_(0, at, slope))
    return tuple(found)  # type: ignore[return-value]


@splat_project_backward.register_fake
def _(
    means: Tensor, quats: Tensor, scales: Tensor, viewmats: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (means, quats, scales, viewmats)
    return tuple(x.new_empty(x.shape) for x in inputs)  # type: ignore[return-value]


class Projection(torch.autograd.Function):
    """`splat_project` with gradients.

    Where they are registered with an operator, or with a `setup_context`, torch looks up the
    defaults of arguments at every call, in Python.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            found: tuple[Tensor, ...] = splat_project(*inputs)
        means, quats, scales, _, _, viewmats, Ks, *options = inputs
        radii, _, _, conics, _, compensations = found
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)  # most need no depths, covariances, compensations
        ctx.save_for_backward(means, quats, scales, viewmats, Ks, radii, conics, compensations)
        width, height, kernel, camera, eps2d, _, _, _, _, antialiased, inria = options
        ctx.options = (width, height, kernel, camera, eps2d, antialiased, inria)
        return found

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, *above: Tensor | None) -> tuple[Tensor | None, ...]:
        *splats, radii, conics, compensations = ctx.saved_tensors
        given = tuple(None if g is None else g.contiguous() for g in above)
        with below_autograd(*splats, conics, compensations, *given):
            g_means, g_quats, g_scales, g_views = splat_project_backward(
                *splats, *ctx.options, radii, conics, compensations, *given
            )
        return g_means, g_quats, g_scales, None, None, g_views, *(None,) * 12


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    beta: Tensor | None,
    viewmats: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`splat_project`, with gradients where there are some to record."""
    inputs = (means, quats, scales, opacities, beta, viewmats, *rest)
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (means, quats, scales, viewmats)):
        found = Projection.apply(*inputs)
        return found
    with below_autograd():
        found = splat_project(*inputs)
    return found
