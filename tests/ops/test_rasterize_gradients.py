"""Gradients of `rasterize` against finite differences and against torch's of the plain renderer."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from tests.ops.splats import (
    CAMERAS,
    DOUBLE,
    KERNELS,
    backend,  # noqa: F401
    focal_of,
    oracle,
    scene,
)
from torchzoo.ops import rasterize

pytestmark = pytest.mark.usefixtures("backend")
kernels = pytest.mark.parametrize("kernel", KERNELS)
SMOOTH = {"alpha_min": 0.0, "t_stop": 0.0}
LEAVES = ("means", "quats", "scales", "opacities", "features", "viewmats", "beta", "backgrounds")


def rows(x):
    """The first three rows of view matrices: the last is never read."""
    return torch.cat((x, x.new_tensor([0, 0, 0, 1.0]).expand(len(x), 1, 4)), 1)


def smooth(problem, render_mode="RGB+ED", **options):
    """Functions of the leaves alone, and the leaves: no threshold is near."""
    problem = dict(problem)
    C, channels = len(problem["viewmats"]), problem["features"].shape[-1]
    problem["backgrounds"] = torch.linspace(0, 1, C * channels, dtype=DOUBLE).view(C, channels)
    names = [name for name in LEAVES if name in problem]
    leaves = [problem[name].clone() for name in names]
    at = names.index("viewmats")
    leaves[at] = leaves[at][:, :3].clone()

    def outputs(*leaves):
        given = dict(zip(names, leaves, strict=True))
        given["viewmats"] = rows(given["viewmats"])
        out = rasterize(**(problem | given), **SMOOTH, render_mode=render_mode, **options)
        return out.image, out.alpha, out.depth

    return outputs, [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize(
    ("kernel", "camera_model"),
    [(kernel, "pinhole") for kernel in KERNELS] + [("gaussian", m) for m in CAMERAS[1:]],
)
def test_finite_differences(kernel, camera_model):
    problem = focal_of(scene(3, 2, 2, kernel, 1, size=(5, 4), spread=0.3), camera_model)
    problem["opacities"] = problem["opacities"] * 0.8
    problem["scales"] = problem["scales"] * 3
    outputs, leaves = smooth(problem)
    assert gradcheck(outputs, leaves, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("antialiased", [False, True])
def test_finite_differences_of_dilated_antialiased_and_clamped(antialiased):
    """The first mean is far to the side, where the camera's derivative is held."""
    problem = scene(3, 1, 1, "gaussian", 2, size=(9, 7), spread=0.2)
    problem["means"][0, 0] += 3.0
    problem["scales"] = problem["scales"] * torch.tensor([[12.0], [1.0], [0.3]], dtype=DOUBLE)
    options = {"antialiased": antialiased, "dilation": 2, "offset": (1, 0)}
    outputs, leaves = smooth(problem, **options)
    assert gradcheck(outputs, leaves, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


@kernels
@pytest.mark.parametrize("channels", [1, 7])
def test_equal_those_of_a_renderer_without_tiles(kernel, channels):
    """In single precision, with all thresholds."""
    problem = scene(12, 1, channels, kernel, 3, torch.float32)
    g = torch.Generator().manual_seed(0)
    above = torch.randn(1, 20, 24, channels, generator=g), torch.randn(1, 20, 24, generator=g)
    *_, unsure = oracle(problem, window=1e-5)
    above = [x * ~(unsure[..., None] if x.ndim == 4 else unsure) for x in above]
    names = [name for name in LEAVES if name in problem]
    found = [problem[name].clone().requires_grad_() for name in names]
    out = rasterize(**(problem | dict(zip(names, found, strict=True))))
    ((out.image * above[0]).sum() + (out.alpha * above[1]).sum()).backward()
    wide = [leaf.detach().double().requires_grad_() for leaf in found]
    image, alpha, *_ = oracle(problem | dict(zip(names, wide, strict=True)))
    ((image * above[0]).sum() + (alpha * above[1]).sum()).backward()
    for name, leaf, exact in zip(names, found, wide, strict=True):
        error = (leaf.grad - exact.grad).norm() / exact.grad.norm()
        assert error <= 1e-4, (name, float(error))


@kernels
def test_of_saturated_and_stopped_pixels(kernel):
    problem = scene(24, 1, 2, kernel, 8, spread=0.2)
    problem["opacities"] = torch.linspace(0.9, 1.2, 24, dtype=DOUBLE)
    problem["scales"] = problem["scales"] * 3
    names = [name for name in LEAVES if name in problem]
    found = [problem[name].clone().requires_grad_() for name in names]
    wide = [leaf.detach().clone().requires_grad_() for leaf in found]
    out = rasterize(**(problem | dict(zip(names, found, strict=True))), render_mode="RGB+D")
    image, _, depth, *_ = oracle(problem | dict(zip(names, wide, strict=True)))
    assert out.alpha.max() > 0.999
    (out.image.square().sum() + out.depth.sum()).backward()
    (image.square().sum() + depth.sum()).backward()
    for name, leaf, exact in zip(names, found, wide, strict=True):
        assert (leaf.grad - exact.grad).norm() <= 1e-8 * exact.grad.norm(), name


@pytest.mark.claim(
    46,
    "With an exponent of 2 the generalised kernel is the Gaussian one, in values and in gradients",
    tolerance=1e-6,
)
def test_exponent_two_is_the_gaussian():
    problem = scene(14, 1, 3, "gaussian", 4, torch.float32)
    results = []
    for kernel in ("gaussian", "generalized_exponential"):
        given = problem | {"kernel": kernel}
        leaves = [given[name].clone().requires_grad_() for name in LEAVES[:6]]
        given |= dict(zip(LEAVES[:6], leaves, strict=True))
        if kernel == "generalized_exponential":
            given["beta"] = torch.full((14,), 2.0)
        out = rasterize(**given)
        out.image.square().sum().backward()
        results.append((out.image, [leaf.grad for leaf in leaves]))
    (image, slopes), (other, others) = results
    assert (image - other).abs().max() <= 1e-6
    for a, b in zip(slopes, others, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.claim(
    46, "At a splat's centre the gradients by exponent and position are finite", tolerance=None
)
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 4.0])
def test_centres_have_finite_gradients(exponent):
    problem = scene(1, 1, 1, "generalized_exponential", 0, size=(9, 9))
    problem["means"], problem["viewmats"] = torch.zeros(1, 3), torch.eye(4)[None].clone()
    problem["viewmats"][0, 2, 3] = 2.0
    problem["Ks"] = torch.tensor([[[9.0, 0, 4.5], [0, 9.0, 4.5], [0, 0, 1]]])
    problem = {k: v.double() if torch.is_tensor(v) else v for k, v in problem.items()}
    leaves = {name: problem[name].clone().requires_grad_() for name in ("means", "scales")}
    leaves["beta"] = torch.tensor([exponent], dtype=DOUBLE, requires_grad=True)
    out = rasterize(**(problem | leaves))
    out.image[0, 4, 4].sum().backward()
    w = math.exp(-0.5 * 1e-8 ** (exponent / 2))
    by_beta = -w * 0.25 * 1e-8 ** (exponent / 2) * math.log(1e-8)
    scale = float(problem["opacities"][0] * problem["features"][0, 0])
    assert math.isclose(leaves["beta"].grad[0], scale * by_beta, rel_tol=1e-9)
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()


@pytest.mark.claim(
    17,
    "The pixel integral's gradients equal finite differences for slanted splats, and are finite "
    "for round ones, which have no axes",
    tolerance=1e-6,
)
def test_round_and_slanted_windows():
    problem = scene(2, 1, 1, "analytic", 1, size=(6, 6), spread=0.05)
    problem["scales"] = torch.tensor([[0.5, 0.15, 0.1], [0.3, 0.6, 0.2]], dtype=DOUBLE)
    turn = torch.tensor([math.cos(math.pi / 8), 0, 0, math.sin(math.pi / 8)], dtype=DOUBLE)
    problem["quats"] = turn.repeat(2, 1)
    outputs, leaves = smooth(problem, "RGB+D")  # expected depths divide by next to nothing
    assert gradcheck(outputs, leaves, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    single = scene(1, 1, 1, "analytic", 1, size=(6, 6))
    single |= {
        "means": torch.zeros(1, 3, dtype=DOUBLE),
        "viewmats": torch.eye(4, dtype=DOUBLE)[None].clone(),
    }
    single["viewmats"][0, 2, 3] = 3.0
    single["Ks"] = torch.tensor([[[6.0, 0, 2.9], [0, 6.0, 3.2], [0, 0, 1]]], dtype=DOUBLE)
    single["scales"] = torch.full((1, 3), 0.3, dtype=DOUBLE)
    leaves = [single[name].requires_grad_() for name in ("means", "quats", "scales")]
    rasterize(**single).image.square().sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
    assert leaves[2].grad.abs().max() > 1e-3


def test_absolute_gradients_sum_over_pixels():
    problem = scene(6, 1, 1, seed=5, size=(10, 8))
    for spacing in (1, 2):
        means = problem["means"].clone().requires_grad_()
        out = rasterize(**(problem | {"means": means}), absgrad=True, dilation=spacing)
        points = out.info["means2d"]
        weights = torch.randn(out.image.shape, generator=torch.Generator().manual_seed(0)).double()
        total = torch.zeros_like(points)
        for y, x in torch.cartesian_prod(*map(torch.arange, out.image.shape[1:3])).tolist():
            part = (out.image * weights)[0, y, x].sum()
            if part.requires_grad:
                total += torch.autograd.grad(part, points, retain_graph=True)[0].abs()
        points.grad = None
        (out.image * weights).sum().backward()
        assert (points.absgrad - total).abs().max() <= 1e-10
        assert (points.absgrad >= points.grad.abs() - 1e-12).all()
        assert (points.absgrad > points.grad.abs() + 1e-6).any()


def test_poses_learn_from_colours_by_direction():
    problem = scene(4, 1, 3, seed=6, size=(5, 4))
    problem["scales"] = problem["scales"] * 3
    g = torch.Generator().manual_seed(0)
    problem["features"] = torch.randn(4, 9, 3, generator=g, dtype=DOUBLE) * 0.2
    views = problem["viewmats"][:, :3].clone().requires_grad_()
    leaves = (problem["means"].requires_grad_(), problem["features"].requires_grad_(), views)

    def image(means, features, views):
        given = problem | {"means": means, "features": features, "viewmats": rows(views)}
        return rasterize(**given, sh_degree=2, **SMOOTH).image

    assert gradcheck(image, leaves, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
