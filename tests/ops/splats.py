"""Scenes of splats, both ways to run their operators, and a renderer that knows no tiles.

The renderer is in float64 and loops over all splats at all pixels, nearest first; derivatives of
the cameras, inverses and eigenvectors are torch's, so that it shares no formula with the operators.
"""

import functools
import math
import sys

import pytest
import torch

from torchzoo.ops import _splat_project, _splat_raster
from torchzoo.ops.spherical_harmonics import splat_sh, splat_sh_backward

DOUBLE = torch.float64
KERNELS = ("gaussian", "generalized_exponential", "analytic")
CAMERAS = ("pinhole", "orthographic", "fisheye")
OPERATORS = {
    "splat_project": _splat_project.splat_project,
    "splat_project_backward": _splat_project.splat_project_backward,
    "splat_intersect": _splat_raster.splat_intersect,
    "splat_raster": _splat_raster.splat_raster,
    "splat_raster_backward": _splat_raster.splat_raster_backward,
    "splat_sh": splat_sh,
    "splat_sh_backward": splat_sh_backward,
}
NAMES = ("means", "quats", "scales", "opacities", "features", "viewmats", "Ks")


def has_kernel(name):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"torchzoo::{name}", "CPU")


def use_references(monkeypatch):
    """Run the operators' PyTorch definitions, where there are kernels too."""
    for module, name, function in (
        ("_splat_project", "splat_project", _splat_project.splat_project._init_fn),
        ("rasterize", "splat_intersect", _splat_raster.splat_intersect._init_fn),
        ("rasterize", "splat_raster", _splat_raster.splat_raster._init_fn),
        ("_splat_project", "splat_project_backward", OPERATORS["splat_project_backward"]._init_fn),
        ("_splat_raster", "splat_raster", _splat_raster.splat_raster._init_fn),
        ("_splat_raster", "splat_raster_backward", OPERATORS["splat_raster_backward"]._init_fn),
        ("spherical_harmonics", "splat_sh", splat_sh._init_fn),
        ("spherical_harmonics", "splat_sh_backward", splat_sh_backward._init_fn),
    ):
        monkeypatch.setattr(sys.modules[f"torchzoo.ops.{module}"], name, function)


@pytest.fixture(params=["reference", "native"])
def backend(request, monkeypatch):
    if request.param == "reference":
        use_references(monkeypatch)
    elif not any(has_kernel(name) for name in OPERATORS):
        pytest.skip("the CPU library has no kernels of splats")
    return request.param


def scene(
    n=12, cameras=1, channels=3, kernel="gaussian", seed=0, dtype=DOUBLE, size=(24, 20), spread=0.5
):
    """Keyword arguments of `rasterize`: splats about 3 in front of cameras that look at them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=DOUBLE)

    turn = 0.15 * normal(cameras, 3, 3)
    views = torch.eye(4, dtype=DOUBLE).repeat(cameras, 1, 1)
    views[:, :3, :3] = torch.linalg.matrix_exp(turn - turn.mT)
    views[:, :3, 3] = 0.1 * normal(cameras, 3) + torch.tensor([0.0, 0.0, 3.0])
    K = torch.tensor([[size[0] * 1.1, 0, size[0] * 0.54], [0, size[0] * 1.2, size[1] * 0.47]])
    K = torch.cat((K, torch.tensor([[0.0, 0.0, 1.0]])))
    problem = {
        "means": spread * normal(n, 3) * torch.tensor([1.0, 1.0, 0.6]),
        "quats": normal(n, 4),
        "scales": torch.exp(0.5 * normal(n, 3) - 2.0),
        "opacities": 0.15 + 0.8 * torch.rand(n, generator=g, dtype=DOUBLE),
        "features": torch.rand(n, channels, generator=g, dtype=DOUBLE),
        "viewmats": views,
        "Ks": K.double().repeat(cameras, 1, 1),
    }
    if kernel == "generalized_exponential":
        problem["beta"] = 1 + 2 * torch.rand(n, generator=g, dtype=DOUBLE)
    problem = {name: value.to(dtype) for name, value in problem.items()}
    return problem | {"width": size[0], "height": size[1], "kernel": kernel}


def focal_of(problem, camera_model):
    """For an orthographic camera a focal length is a scale: a third, as the splats are at 3."""
    if camera_model == "orthographic":
        problem["Ks"] = problem["Ks"] * problem["Ks"].new_tensor(
            [[1 / 3, 1, 1], [1, 1 / 3, 1], [1] * 3]
        )
    return problem | {"camera_model": camera_model}


def _to_pixels(camera_model, K):
    def pinhole(t):
        return torch.stack((t[0] / t[2], t[1] / t[2]))

    def fisheye(t):
        rho = (t[0].square() + t[1].square()).sqrt()
        return t[:2] * torch.atan2(rho, t[2]) / rho

    ray = {"pinhole": pinhole, "orthographic": lambda t: t[:2], "fisheye": fisheye}[camera_model]
    return lambda t: K[:2, :2] @ ray(t) + K[:2, 2]


def project_one(mean, quat, scale, view, K, width, height, camera_model="pinhole", inria=False):
    """Mean `(2,)`, depth and covariance `(2, 2)` of a splat on an image, without blur."""
    w, u = quat[0], quat[1:]
    unit = quat.norm()
    w, u = w / unit, u / unit
    axes = torch.eye(3, dtype=mean.dtype).unbind(0)
    turned = [
        e + 2 * w * torch.linalg.cross(u, e) + 2 * torch.linalg.cross(u, torch.linalg.cross(u, e))
        for e in axes
    ]
    R = torch.stack(turned, 1)
    sigma = R @ torch.diag(scale.square()) @ R.T
    t = view[:3, :3] @ mean + view[:3, 3]
    image = _to_pixels(camera_model, K)
    held = t
    if camera_model == "pinhole":
        low, high = [], []
        for axis, side in enumerate((width, height)):
            f, c = K[axis, axis], K[axis, 2]
            low.append(-1.3 * side / (2 * f) if inria else -c / f - 0.3 * side / (2 * f))
            high.append(1.3 * side / (2 * f) if inria else (side - c) / f + 0.3 * side / (2 * f))
        slope = torch.minimum(torch.maximum(t[:2] / t[2], torch.stack(low)), torch.stack(high))
        held = torch.cat((slope * t[2], t[2:]))
    J = torch.func.jacrev(image)(held) @ view[:3, :3]
    return image(t), t[2], J @ sigma @ J.T


def weights_of(kernel, cov, mean, pixels, beta=None, pixel=1.0):
    """Weights of one splat at pixels `(P, 2)`, and q."""
    d = mean - pixels
    q = torch.einsum("pi,ij,pj->p", d, torch.linalg.inv(cov), d)
    if kernel == "gaussian":
        return torch.exp(-q / 2), q
    if kernel == "generalized_exponential":
        return torch.exp(-0.5 * q.clamp(min=1e-8) ** (beta / 2)), q
    variances, axes = torch.linalg.eigh(cov)
    w = torch.full_like(q, 2 * math.pi / pixel**2)
    for s, along in zip(variances.clamp(min=1e-6).sqrt(), (d @ axes).unbind(1), strict=True):
        high, low = (along + pixel / 2) / s, (along - pixel / 2) / s
        cdf_high, cdf_low = (torch.sigmoid(1.6 * x + 0.07 * x**3) for x in (high, low))
        w = w * s * (cdf_high - cdf_low)
    return w, q


def render(
    means,
    quats,
    scales,
    opacities,
    features,
    viewmats,
    Ks,
    width,
    height,
    *,
    kernel="gaussian",
    beta=None,
    backgrounds=None,
    eps2d=0.3,
    near=0.01,
    antialiased=False,
    inria=False,
    alpha_min=1 / 255,
    alpha_max=0.99,
    t_stop=1e-4,
    camera_model="pinhole",
    tile_size=16,
    window=1e-9,
):
    """Image, alpha, depth, depth at half the light, and where rounding may decide, `(C, H, W)`.

    That is where an opacity or a transmittance is within a fraction `window` of a threshold.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack((columns, rows), -1).reshape(-1, 2).to(means.dtype) + 0.5
    found = []
    for c, (view, K) in enumerate(zip(viewmats, Ks, strict=True)):
        own = opacities if opacities.ndim == 1 else opacities[c]
        colours = features if features.ndim == 2 else features[c]
        one = functools.partial(
            project_one,
            view=view,
            K=K,
            width=width,
            height=height,
            camera_model=camera_model,
            inria=inria,
        )
        screen = list(zip(*torch.vmap(one)(means, quats, scales), strict=True))
        T = torch.ones(len(pixels), dtype=means.dtype)
        image = torch.zeros(len(pixels), colours.shape[1], dtype=means.dtype)
        depth, median = torch.zeros_like(T), torch.zeros_like(T)
        open_, unsure = T > 0, T < 0
        for n in sorted(range(len(means)), key=lambda n: float(screen[n][1].detach())):
            mean, z, cov = screen[n]
            if z < near:
                continue
            o, reachable = own[n], True
            if kernel != "analytic":
                sharp = torch.linalg.det(cov)
                cov = cov + eps2d * torch.eye(2, dtype=cov.dtype)
                if antialiased:
                    o = o * (sharp / torch.linalg.det(cov)).clamp(min=0.005**2).sqrt()
            w, _ = weights_of(kernel, cov, mean, pixels, None if beta is None else beta[n])
            if inria:
                reachable = in_tiles(cov, mean, pixels, tile_size)
            raw = o * w
            alpha = raw.clamp(max=alpha_max)
            after = T * (1 - alpha)
            counts = open_ & (alpha >= alpha_min) & reachable
            ends = counts & ((after < t_stop) if inria else (after <= t_stop))
            open_ = open_ & ~ends
            blended = counts & ~ends
            gain = torch.where(blended, alpha * T, 0)
            image = image + gain[:, None] * colours[n]
            depth = depth + gain * z
            for value, edge in ((raw, alpha_min), (raw, alpha_max), (after, t_stop), (after, 0.5)):
                unsure |= (value / max(edge, 1e-300) - 1).abs() < window
            median = torch.where(blended & (T >= 0.5) & (after < 0.5), z, median)
            T = torch.where(blended, after, T)
        if backgrounds is not None:
            image = image + T[:, None] * (backgrounds if backgrounds.ndim == 1 else backgrounds[c])
        parts = (image, 1 - T, depth, median, unsure)
        found.append([x.unflatten(0, (height, width)) for x in parts])
    return [torch.stack(x) for x in zip(*found, strict=True)]


def in_tiles(cov, mean, pixels, tile_size):
    """Which pixels are in a tile that the square of three sigma of the longer axis meets."""
    middle = (cov[0, 0] + cov[1, 1]) / 2
    spread = (middle**2 - torch.linalg.det(cov)).clamp(min=0.1).sqrt()
    radius = torch.ceil(3 * (middle + spread).sqrt())
    low = torch.floor((mean - radius) / tile_size) * tile_size
    high = torch.ceil((mean + radius) / tile_size) * tile_size
    return ((pixels > low) & (pixels < high)).all(1)


def oracle(problem, **options):
    """`render` of the same problem in float64."""
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in problem.items()}
    return render(**wide, **options)
