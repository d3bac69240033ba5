"""`project_gaussians` against closed forms, derivatives of the cameras and finite differences."""

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
    project_one,
    scene,
    weights_of,
)
from torchzoo.ops import project_gaussians

pytestmark = pytest.mark.usefixtures("backend")
cameras = pytest.mark.parametrize("camera_model", CAMERAS)


def problem_of(n=10, number=2, kernel="gaussian", camera_model="pinhole", **options):
    problem = focal_of(scene(n, number, 1, kernel, **options), camera_model)
    del problem["features"]
    return problem


def at(x, **options):
    """A splat at `x` in front of a camera with different focal lengths, centred in 40 x 30."""
    K = torch.tensor([[[30.0, 0, 20], [0, 25.0, 15], [0, 0, 1]]], dtype=DOUBLE)
    given = {
        "means": torch.tensor([x], dtype=DOUBLE),
        "quats": torch.tensor([[1.0, 0, 0, 0]], dtype=DOUBLE),
        "scales": torch.full((1, 3), 0.1, dtype=DOUBLE),
        "viewmats": torch.eye(4, dtype=DOUBLE)[None],
        "Ks": K,
        "width": 40,
        "height": 30,
    }
    return project_gaussians(**(given | options))


@cameras
def test_equals_derivatives_of_the_camera(camera_model):
    problem = problem_of(12, 2, camera_model=camera_model, spread=1.2, size=(40, 30))
    found = project_gaussians(**problem, antialiased=True)
    seen = (found.radii > 0).all(-1)
    assert 8 < seen.sum() < 24
    for c, n in seen.nonzero().tolist():
        splat = [problem[name][n] for name in ("means", "quats", "scales")]
        view = problem["viewmats"][c], problem["Ks"][c]
        mean, depth, sharp = project_one(*splat, *view, 40, 30, camera_model)
        cov = sharp + 0.3 * torch.eye(2, dtype=DOUBLE)
        assert (found.means2d[c, n] - mean).abs().max() <= 1e-10
        assert (found.depths[c, n] - depth).abs() <= 1e-12
        entries = cov.flatten()[[0, 1, 3]]
        assert (found.covs2d[c, n] - entries).abs().max() <= 1e-9 * entries.abs().max()
        assert (found.conics[c, n] - torch.linalg.inv(cov).flatten()[[0, 1, 3]]).abs().max() <= 1e-9
        ratio = (torch.linalg.det(sharp) / torch.linalg.det(cov)).sqrt().clamp(min=0.005)
        assert (found.compensations[c, n] - ratio).abs() <= 1e-9
    for part in found:
        assert (part[~seen] == 0).all()


def test_known_places():
    x = [0.4, -0.3, 2.0]
    assert torch.allclose(at(x).means2d[0, 0], torch.tensor([26.0, 11.25], dtype=DOUBLE))
    flat = at(x, camera_model="orthographic")
    assert torch.allclose(flat.means2d[0, 0], torch.tensor([32.0, 7.5], dtype=DOUBLE))
    assert torch.allclose(flat.covs2d[0, 0], torch.tensor([9.3, 0.0, 6.55], dtype=DOUBLE))
    bent = at([1.0, 0.0, 1.0], camera_model="fisheye", width=60)
    assert math.isclose(bent.means2d[0, 0, 0], 20 + 30 * math.pi / 4, rel_tol=1e-12)
    centre = at([0.0, 0.0, 2.0], camera_model="fisheye")
    assert torch.allclose(centre.covs2d[0, 0], at([0.0, 0.0, 2.0]).covs2d[0, 0])


def test_fisheye_is_smooth_where_its_series_ends():
    edge = math.sqrt(0.1)
    below, above = (
        at([2 * edge + step, 0.0, 2.0], camera_model="fisheye") for step in (-1e-9, 1e-9)
    )
    for a, b in zip(below[1:], above[1:], strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("kernel", "camera_model", "antialiased"),
    [("gaussian", m, True) for m in CAMERAS] + [("analytic", m, False) for m in CAMERAS],
)
def test_finite_differences(kernel, camera_model, antialiased):
    """The first mean is so far to the side that the derivative of the pinhole is held."""
    problem = problem_of(5, 2, kernel, camera_model, spread=0.3, seed=3)
    problem["means"][0, 0] += 2.5
    problem["means"][1] = 0  # near the axis of the fisheye, by its series
    problem["scales"] = problem["scales"] * 3
    names = ("means", "quats", "scales", "viewmats")
    leaves = [problem[name].clone() for name in names]
    leaves[3] = leaves[3][:, :3].clone()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    bottom = torch.tensor([0, 0, 0, 1.0], dtype=DOUBLE).expand(2, 1, 4)

    def outputs(means, quats, scales, views):
        given = {"means": means, "quats": quats, "scales": scales}
        given["viewmats"] = torch.cat((views, bottom), 1)
        return tuple(project_gaussians(**(problem | given), antialiased=antialiased)[1:])

    assert (project_gaussians(**problem).radii > 0).all()
    assert gradcheck(outputs, leaves, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_boxes_hold_all_that_can_be_seen(kernel):
    """No pixel outside a box has an opacity of 1/255, and boxes are not larger than need be."""
    problem = problem_of(30, 1, kernel, spread=0.4, size=(64, 48))
    problem["opacities"] = torch.linspace(0.002, 1, 30, dtype=DOUBLE)
    found = project_gaussians(**problem)
    span = torch.arange(-200, 264, dtype=DOUBLE) + 0.5
    pixels = torch.cartesian_prod(span, span)
    for n in range(30):
        mean, radius, (xx, xy, yy) = found.means2d[0, n], found.radii[0, n], found.covs2d[0, n]
        if radius[0] == 0:
            assert problem["opacities"][n] < 1 / 255
            continue
        beta = problem["beta"][n] if "beta" in problem else None
        cov = torch.stack((xx, xy, xy, yy)).view(2, 2)
        alpha = problem["opacities"][n] * weights_of(kernel, cov, mean, pixels, beta)[0]
        away = (pixels[alpha >= 1 / 255] - mean).abs()
        if len(away):
            assert (away <= radius).all()
            assert (radius - away.amax(0)).max() <= (3.5 if kernel == "analytic" else 2.0)


def test_what_is_culled():
    seen = {"opacities": torch.tensor([0.9], dtype=DOUBLE)}
    assert (at([0.0, 0.0, 1.0], **seen).radii > 0).all()
    for x in ([0.0, 0.0, 0.005], [0.0, 0.0, -1.0], [9.0, 0.0, 1.0], [0.0, math.nan, 1.0]):
        assert (at(x, **seen).radii == 0).all()
    assert (at([0.0, 0.0, 1.0], far=0.5).radii == 0).all()
    assert (at([0.0, 0.0, 1.0], near=2.0).radii == 0).all()
    assert (at([0.0, 0.0, 1.0], opacities=torch.tensor([0.0039], dtype=DOUBLE)).radii == 0).all()
    size = int(at([0.0, 0.0, 1.0]).radii.max())
    assert (at([0.0, 0.0, 1.0], radius_clip=size).radii == 0).all()
    assert (at([0.0, 0.0, 1.0], radius_clip=size - 1).radii > 0).all()
    assert (at([0.0, 0.0, 1.0], quats=torch.zeros(1, 4, dtype=DOUBLE)).radii == 0).all()
    huge = at([0.0, 0.0, 1.0], scales=torch.full((1, 3), 1e12, dtype=DOUBLE))
    assert (huge.radii == 2**30).all()
    behind = at([0.0, 0.0, -1.0], camera_model="orthographic", near=-5.0)
    assert (behind.radii > 0).all()


def test_needles_keep_their_inverse_in_single_precision():
    """A covariance of 1e6 by 1e-4 before the blur: its determinant by a difference has no digit."""
    turn = torch.tensor([[math.cos(0.3), 0.0, 0.0, math.sin(0.3)]])
    given = {"quats": turn, "scales": torch.tensor([[40.0, 4e-4, 4e-4]])}
    wide = {k: v.double() for k, v in given.items()}
    exact = at([0.0, 0.0, 1.0], **wide)
    K, single = torch.tensor([[[30.0, 0, 20], [0, 25.0, 15], [0, 0, 1]]]), torch.zeros(1, 3)
    single[0, 2] = 1.0
    found = project_gaussians(single, *given.values(), torch.eye(4)[None], K, 40, 30)
    assert torch.allclose(found.conics.double(), exact.conics, rtol=1e-5)


def test_packs_what_can_be_seen():
    problem = problem_of(20, 3, spread=1.5)
    dense = project_gaussians(**problem)
    packed = dense.pack()
    seen = (dense.radii > 0).all(-1)
    assert 0 < len(packed.camera_ids) == seen.sum() < seen.numel()
    assert (packed.radii > 0).all()
    for whole, part in zip(dense, packed[2:], strict=True):
        assert torch.equal(whole[packed.camera_ids, packed.gaussian_ids], part)


def test_threads_give_the_same_bits():
    problem = problem_of(1500, 2)
    problem = {k: v.float() if torch.is_tensor(v) else v for k, v in problem.items()}
    names, results, before = ("means", "quats", "scales", "viewmats"), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [problem[name].clone().requires_grad_() for name in names]
            found = project_gaussians(**(problem | dict(zip(names, leaves, strict=True))))
            sum(x.square().sum() for x in found[1:]).backward()
            results.append([*found, *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
