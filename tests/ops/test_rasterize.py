"""`rasterize` against closed forms and a renderer without tiles, and what peers' users ask for."""

import math

import pytest
import torch

from tests.ops.splats import (
    CAMERAS,
    DOUBLE,
    KERNELS,
    backend,  # noqa: F401
    focal_of,
    oracle,
    scene,
)
from torchzoo.ops import rasterize, spherical_harmonics
from torchzoo.ops.rasterize import sh_to_rgb

pytestmark = pytest.mark.usefixtures("backend")
kernels = pytest.mark.parametrize("kernel", KERNELS)


def single(z=2.0, scale=0.1, opacity=0.8, dtype=torch.float32, f=60.0):
    """One round splat on the axis of a camera of 33 pixels by 33."""
    K = torch.tensor([[[f, 0, 16.5], [0, f, 16.5], [0, 0, 1]]])
    values = {
        "means": torch.tensor([[0.0, 0.0, z]]),
        "quats": torch.tensor([[2.0, 0.0, 0.0, 0.0]]),
        "scales": torch.full((1, 3), scale),
        "opacities": torch.tensor([opacity]),
        "features": torch.tensor([[1.0, 0.5]]),
        "viewmats": torch.eye(4)[None],
        "Ks": K,
    }
    return {k: v.to(dtype) for k, v in values.items()} | {"width": 33, "height": 33}


def squares(size):
    at = torch.arange(size) - (size - 1) / 2
    return (at[:, None] ** 2 + at[None, :] ** 2).double()


def assert_same_pixels(found, expected, unsure, tolerance, allowed=0.001):
    error = (found.double() - expected.double()).abs()
    if error.ndim > unsure.ndim:
        error = error.amax(-1)
    assert unsure.double().mean() <= allowed
    assert error[~unsure].max() <= tolerance


def test_one_round_splat_has_the_closed_form():
    problem = single()
    out = rasterize(**problem, backgrounds=torch.tensor([0.25, 0.0]))
    variance = (0.1 * 60 / 2) ** 2 + 0.3
    alpha = 0.8 * torch.exp(-squares(33) / (2 * variance))
    alpha = torch.where(alpha >= 1 / 255, alpha, 0)
    assert (out.alpha[0] - alpha).abs().max() <= 1e-6
    expected = alpha[..., None] * torch.tensor([1.0, 0.5]) + (1 - alpha[..., None]) * torch.tensor(
        [0.25, 0.0]
    )
    assert (out.image[0] - expected).abs().max() <= 1e-6
    outside = alpha == 0
    assert outside.any()
    assert (out.image[0][outside] == torch.tensor([0.25, 0.0])).all()


@pytest.mark.claim(
    46,
    "A splat's weight is exp(-q^(beta/2) / 2): nearly flat and then cut at q = (2 ln 255 o)^(1/6) "
    "for beta = 12, a cusp with long tails for beta = 1/2",
    tolerance=1e-6,
)
def test_exponents_shape_the_profile():
    problem = single(opacity=0.98, scale=0.2, f=50.0) | {"kernel": "generalized_exponential"}
    q = squares(33) / ((0.2 * 50 / 2) ** 2 + 0.3)
    for beta in (12.0, 0.5):
        alpha = rasterize(**problem, beta=torch.tensor([beta])).alpha[0]
        w = torch.exp(-0.5 * q.clamp(min=1e-8) ** (beta / 2))
        expected = torch.where(0.98 * w >= 1 / 255, 0.98 * w, 0)
        assert (alpha - expected).abs().max() <= 1e-6
        if beta == 12:
            assert (alpha[q < 0.55] - 0.98).abs().max() <= 0.014
            edge = (2 * math.log(255 * 0.98)) ** (1 / 6)
            assert ((alpha > 0) == (q < edge)).all()


def test_covers_every_pixel_where_nothing_is_cut_off():
    alpha = rasterize(**single(scale=0.01, dtype=DOUBLE), alpha_min=0.0, t_stop=0.0).alpha[0]
    expected = 0.8 * torch.exp(-squares(33) / (2 * (0.3**2 + 0.3)))
    assert (alpha / expected - 1)[16, 12:21].abs().max() <= 1e-6
    assert (alpha - expected).abs().max() <= 1e-7


@kernels
@pytest.mark.parametrize("channels", [1, 4, 33])
def test_equals_a_renderer_without_tiles(kernel, channels):
    background = torch.linspace(0, 1, channels)
    found, expected = [], []
    for seed in range(6):
        problem = scene(14, 1, channels, kernel, seed, torch.float32)
        out = rasterize(**problem, backgrounds=background, render_mode="RGB+D")
        found.append((out.image, out.alpha, out.depth, out.info["median_depth"]))
        expected.append(oracle(problem, backgrounds=background.double(), window=1e-5))
    *parts, unsure = (torch.cat(x) for x in zip(*expected, strict=True))
    assert parts[1].amax() > 0.9
    images = (torch.cat(x) for x in zip(*found, strict=True))
    for image, part, tolerance in zip(images, parts, (1e-5, 1e-5, 3e-5, 1e-5), strict=True):
        assert_same_pixels(image, part, unsure, tolerance)


@kernels
@pytest.mark.parametrize("camera_model", CAMERAS)
def test_equals_it_for_every_camera_model(kernel, camera_model):
    problem = focal_of(scene(12, 2, 3, kernel, 5, spread=0.8), camera_model)
    out = rasterize(**problem)
    image, alpha, _, _, unsure = oracle(problem)
    assert_same_pixels(out.image, image, unsure, 1e-9)
    assert_same_pixels(out.alpha, alpha, unsure, 1e-9)


@kernels
def test_stops_and_saturates_like_it(kernel):
    """Forty opaque splats: pixels end early, and many are at the largest opacity."""
    problem = scene(40, 1, 3, kernel, 8, spread=0.3)
    problem["opacities"] = torch.linspace(0.7, 1, 40, dtype=DOUBLE)
    problem["scales"] = problem["scales"] * 3
    out = rasterize(**problem)
    image, alpha, _, _, unsure = oracle(problem)
    assert alpha.max() > 0.998
    assert_same_pixels(out.image, image, unsure, 1e-9)
    assert out.alpha.max() < 1 - 1e-4
    strict = rasterize(**problem, alpha_max=0.9, t_stop=2e-2, alpha_min=0.05)
    expected = oracle(problem, alpha_max=0.9, t_stop=2e-2, alpha_min=0.05)
    assert_same_pixels(strict.image, expected[0], expected[4], 1e-9)


def test_antialiasing_lowers_opacities():
    problem = scene(12, seed=3)
    problem["scales"] = problem["scales"] * 0.2
    found, plain = rasterize(**problem, antialiased=True), rasterize(**problem)
    image, _, _, _, unsure = oracle(problem, antialiased=True)
    assert_same_pixels(found.image, image, unsure, 1e-9)
    assert found.alpha.sum() < 0.8 * plain.alpha.sum()


def test_inria_preset_ends_at_tiles_and_nearer():
    problem = scene(14, seed=2, spread=0.4, size=(48, 36))
    problem["scales"] = problem["scales"] * 1.5
    problem["opacities"] = torch.full((14,), 0.95, dtype=DOUBLE)
    out = rasterize(**problem, preset="inria", tile_size=4)
    image, _, _, _, unsure = oracle(problem, inria=True, near=0.2, tile_size=4)
    assert_same_pixels(out.image, image, unsure, 1e-9)
    assert (out.image - rasterize(**problem).image).abs().max() > 1e-4
    near = single(z=0.15, scale=0.001)
    assert rasterize(**near).alpha.max() > 0.1
    assert rasterize(**near, preset="inria").alpha.max() == 0


def test_inria_preset_counts_the_splat_that_reaches_the_stop():
    problem = single(opacity=0.5, scale=10.0, dtype=DOUBLE)
    assert rasterize(**problem, t_stop=0.5).alpha[0, 16, 16] == 0
    out = rasterize(**problem, t_stop=0.5, preset="inria")
    assert out.alpha[0, 16, 16] == 0.5


@kernels
def test_white_on_black_is_alpha_and_backgrounds_fill_the_rest(kernel):
    problem = scene(12, 2, 2, kernel, 4, torch.float32)
    problem["features"] = torch.ones(12, 2)
    plain = rasterize(**problem)
    assert (plain.image - plain.alpha[..., None]).abs().max() <= 1e-6
    behind = torch.tensor([[0.3, 2.0], [-1.0, 0.5]])
    filled = rasterize(**problem, backgrounds=behind)
    expected = plain.image + (1 - plain.alpha[..., None]) * behind[:, None, None]
    assert (filled.image - expected).abs().max() <= 1e-6


def test_depth_modes():
    problem = single(z=2.5, dtype=DOUBLE)
    out = rasterize(**problem, render_mode="RGB+ED")
    covered = out.alpha > 0
    assert (out.depth[covered] - 2.5).abs().max() <= 1e-12
    assert (out.depth[~covered] == 0).all()
    accumulated = rasterize(**problem, render_mode="D")
    assert accumulated.image is None
    assert (accumulated.depth - 2.5 * out.alpha).abs().max() <= 1e-12
    assert rasterize(**problem).depth is None
    assert (rasterize(**problem, render_mode="ED").depth == out.depth).all()
    half = out.alpha > 0.5
    assert (out.info["median_depth"][half] == 2.5).all()
    assert (out.info["median_depth"][~half] == 0).all()
    assert half.any()


@kernels
def test_order_of_splats_does_not_matter(kernel):
    problem = scene(20, 1, 3, kernel, 6, torch.float32)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    turned = dict(problem)
    for name in ("means", "quats", "scales", "opacities", "features", "beta"):
        if name in problem:
            turned[name] = problem[name][order]
    assert (rasterize(**problem).image - rasterize(**turned).image).abs().max() <= 1e-6


def test_equal_depths_are_in_order_of_index():
    problem = single(dtype=DOUBLE)
    two = {
        k: torch.cat((v, v)) if k not in ("viewmats", "Ks") and torch.is_tensor(v) else v
        for k, v in problem.items()
    }
    two["features"] = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    first, second = rasterize(**two).image[0, 16, 16]
    assert math.isclose(first, 0.8, rel_tol=1e-6)
    assert math.isclose(second, 0.2 * 0.8, rel_tol=1e-6)


@kernels
def test_moving_all_together_changes_nothing(kernel):
    problem = scene(12, 2, 3, kernel, 7)
    axis = torch.tensor([0.0, 0.6, 0.8], dtype=DOUBLE)
    quat = torch.cat((torch.tensor([math.cos(0.7)], dtype=DOUBLE), math.sin(0.7) * axis))
    cross = torch.linalg.cross(axis.expand(3, 3), torch.eye(3, dtype=DOUBLE)).T
    R = torch.linalg.matrix_exp(1.4 * cross)
    shift = torch.tensor([3.0, -1.0, 0.5], dtype=DOUBLE)
    motion = torch.eye(4, dtype=DOUBLE)
    motion[:3, :3], motion[:3, 3] = R, shift
    w, v = problem["quats"][:, :1], problem["quats"][:, 1:]
    cw, cv = quat[0], quat[1:]
    moved = problem | {
        "means": problem["means"] @ R.T + shift,
        "quats": torch.cat(
            (
                cw * w - (v @ cv)[:, None],
                cw * v + w * cv + torch.linalg.cross(cv.expand_as(v), v),
            ),
            1,
        ),
        "viewmats": problem["viewmats"] @ torch.linalg.inv(motion),
    }
    assert (rasterize(**problem).image - rasterize(**moved).image).abs().max() <= 1e-10


def test_what_cannot_be_seen_counts_for_nothing():
    problem = scene(8, seed=1, dtype=torch.float32)
    expected = rasterize(**problem)
    nan, inf = math.nan, math.inf
    bad = {
        "means": [[nan, 0, 0], [inf, 0, 0], [0, 0, -9], [90, 0, 0], [0, 0, 1e38], *[[0, 0, 0]] * 5],
        "scales": [*[[0.1] * 3] * 5, [inf, 1, 1], [nan, 1, 1], *[[0.1] * 3] * 3],
        "quats": [*[[1.0, 0, 0, 0]] * 7, [0.0] * 4, *[[1.0, 0, 0, 0]] * 2],
        "opacities": [*[0.9] * 8, nan, 0.0],
        "features": [[nan] * 3] * 10,
    }
    leaves = {k: torch.cat((problem[k], torch.tensor(v))).requires_grad_() for k, v in bad.items()}
    out = rasterize(**(problem | leaves))
    assert torch.equal(out.image, expected.image)
    assert (out.info["radii"][0, 8:] == 0).all()
    out.image.square().sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad[8:] == 0).all(), name
        assert leaf.grad[:8].abs().sum() > 0


def test_needles_and_huge_splats():
    problem = scene(6, seed=9, spread=0.3)
    problem["scales"] = torch.tensor(
        [
            [3.0, 1e-4, 1e-4],
            [1e-6] * 3,
            [50.0, 50.0, 50.0],
            [2.0, 1e-3, 0.5],
            [0.0] * 3,
            [0.2, 2.0, 0.0],
        ],
        dtype=DOUBLE,
    )
    problem["opacities"] = torch.full((6,), 0.4, dtype=DOUBLE)
    out = rasterize(**problem)
    image, _, _, _, unsure = oracle(problem)
    assert_same_pixels(out.image, image, unsure, 1e-8)
    single_precision = {k: v.float() if torch.is_tensor(v) else v for k, v in problem.items()}
    assert_same_pixels(rasterize(**single_precision).image, image, unsure, 1e-4)


@kernels
@pytest.mark.parametrize(("d", "offset"), [(2, (0, 0)), (2, (1, 0)), (3, (2, 1)), (3, (0, 2))])
def test_dilated_pixels_are_those_of_the_full_image(kernel, d, offset):
    problem = scene(14, 1, 3, kernel, 10, size=(37, 29))
    ox, oy = offset
    full, some = rasterize(**problem), rasterize(**problem, dilation=d, offset=offset)
    assert some.image.shape == full.image[:, oy::d, ox::d].shape
    assert (some.image - full.image[:, oy::d, ox::d]).abs().max() <= 1e-9
    assert (some.alpha - full.alpha[:, oy::d, ox::d]).abs().max() <= 1e-9
    assert torch.equal(some.info["radii"], full.info["radii"])


def test_masked_pixels_show_the_background():
    problem = scene(12, 2, 3)
    mask = torch.rand(2, 20, 24, generator=torch.Generator().manual_seed(0)) < 0.4
    behind = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    full = rasterize(**problem, backgrounds=behind)
    some = rasterize(**problem, backgrounds=behind, pixel_mask=mask)
    assert torch.equal(some.image[mask], full.image[mask])
    assert (some.image[~mask] == behind).all()
    assert (some.alpha[~mask] == 0).all()
    assert (some.info["last_ids"][~mask] == 0).all()


@pytest.mark.parametrize("tile_size", [4, 8, 16, 32])
@kernels
def test_tiles_do_not_show(kernel, tile_size):
    problem = scene(20, 1, 3, kernel, 12, size=(45, 33))
    out = rasterize(**problem, tile_size=tile_size)
    assert (out.image - rasterize(**problem, tile_size=64).image).abs().max() <= 1e-12


def test_opacities_and_features_of_each_camera():
    problem = scene(10, 3, 2)
    g = torch.Generator().manual_seed(0)
    opacities = torch.rand(3, 10, generator=g, dtype=DOUBLE)
    features = torch.rand(3, 10, 2, generator=g, dtype=DOUBLE)
    out = rasterize(**(problem | {"opacities": opacities, "features": features}))
    for c in range(3):
        alone = {"opacities": opacities[c], "features": features[c]}
        views = {name: problem[name][c : c + 1] for name in ("viewmats", "Ks")}
        assert torch.equal(rasterize(**(problem | alone | views)).image[0], out.image[c])


@pytest.mark.parametrize("camera_model", ["pinhole", "orthographic"])
def test_colours_by_direction(camera_model):
    problem = focal_of(scene(10, 2, 3), camera_model)
    g = torch.Generator().manual_seed(0)
    sh = torch.randn(10, 9, 3, generator=g, dtype=DOUBLE)
    out = rasterize(**(problem | {"features": sh}), sh_degree=2)
    centres = torch.linalg.inv(problem["viewmats"])[:, :3, 3]
    directions = problem["means"] - centres[:, None]
    if camera_model == "orthographic":
        directions = problem["viewmats"][:, None, 2, :3].expand(-1, 10, -1)
    colours = (spherical_harmonics(2, directions, sh) + 0.5).clamp(min=0)
    assert (colours == 0).any()
    expected = rasterize(**(problem | {"features": colours}))
    assert (out.image - expected.image).abs().max() <= 1e-12
    lower = rasterize(**(problem | {"features": sh}), sh_degree=0)
    flat = sh_to_rgb(0.28209479177387814 * sh[:, 0])
    assert (lower.image - rasterize(**(problem | {"features": flat})).image).abs().max() <= 1e-12
