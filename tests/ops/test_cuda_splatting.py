"""The splat operators' CUDA kernels against their definitions on the CPU in float64."""

import pytest
import torch

from tests.ops.splats import CAMERAS, KERNELS, OPERATORS, focal_of, scene
from torchzoo.ops import library, rasterize
from torchzoo.ops._splat_kernels import KERNELS as CODES
from torchzoo.ops._splat_project import CAMERAS as CAMERA_CODES

DEVICE = "cuda"
HAS_KERNELS = torch.cuda.is_available() and library.load()["cuda"].loaded
REASON = "no CUDA device" if not torch.cuda.is_available() else library.load()["cuda"].error
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HAS_KERNELS, reason=REASON)]

DOUBLE, SINGLE = torch.float64, torch.float32
TOLERANCE = {DOUBLE: 1e-12, SINGLE: 2e-5}
CHANNELS = [1, 2, 3, 4, 7, 16, 33, 70]
SEEN = (0.3, 0.01, 1e10, 0.0, 1 / 255)  # eps2d, near, far, radius_clip, alpha_min


def native(name, *inputs, dtype=DOUBLE):
    """The operator on the device, with all numbers of one type, and its results back in float64."""

    def there(x):
        if not isinstance(x, torch.Tensor):
            return x
        return (x.to(dtype) if x.is_floating_point() else x).to(DEVICE)

    found = getattr(torch.ops.torchzoo, name)(*map(there, inputs))
    if isinstance(found, torch.Tensor):
        found = (found,)
    return [x.cpu().double() if x.is_floating_point() else x.cpu() for x in found]


def expected(name, *inputs):
    """The operator's definition, in float64."""
    found = OPERATORS[name]._init_fn(*inputs)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def assert_near(found, wanted, dtype):
    assert found.shape == wanted.shape
    error, size = (found - wanted).norm(), wanted.norm()
    assert error <= TOLERANCE[dtype] * size + TOLERANCE[dtype], f"off by {error / size:.2g}"


def rounded(problem, dtype):
    """Numbers that the type has, so that the definition and the kernels work on the same."""
    return {
        k: v.to(dtype).double() if isinstance(v, torch.Tensor) else v for k, v in problem.items()
    }


def projection(p, camera="pinhole", antialiased=False, inria=False):
    """The inputs of `splat_project`."""
    views = p["viewmats"]
    alphas = p["opacities"].expand(len(views), -1)
    options = (p["width"], p["height"], CODES[p["kernel"]], CAMERA_CODES[camera], *SEEN)
    splats = (p["means"], p["quats"], p["scales"], alphas, p.get("beta"), views, p["Ks"])
    return *splats, *options, antialiased, inria


def compositing(p, dtype, *, tile_size=16, inria=False, pixel=1.0, masked=False, ground=True):
    """What the rasteriser takes but for the lists, all of it representable in `dtype`."""
    radii, means2d, depths, conics, covs2d, _ = expected(
        "splat_project", *projection(p, inria=inria)
    )
    shape2d = covs2d if p["kernel"] == "analytic" else conics
    tensors = {"means2d": means2d, "depths": depths, "shape2d": shape2d}
    cameras, features = len(radii), p["features"]
    g = torch.Generator().manual_seed(5)
    if ground:
        shape = (cameras, features.shape[-1])
        tensors["backgrounds"] = torch.rand(shape, generator=g, dtype=DOUBLE)
    tensors |= {"features": features.reshape(-1, *features.shape[-2:])}
    tensors |= {"opacities": p["opacities"].expand(cameras, -1), "beta": p.get("beta")}
    size = (cameras, p["height"], p["width"])
    return rounded(tensors, dtype) | {
        "radii": radii,
        "mask": torch.rand(size, generator=g) > 0.3 if masked else None,
        "size": (p["width"], p["height"], tile_size),
        "look": (CODES[p["kernel"]], pixel, 1 / 255),
        "inria": inria,
        "g_image": torch.randn(*size, features.shape[-1], generator=g, dtype=DOUBLE),
        "g_alpha": torch.randn(size, generator=g, dtype=DOUBLE),
    }


def lists(run, t):
    boxes = (t["means2d"], t["radii"], t["depths"], t["shape2d"], t["opacities"], t["beta"])
    return run("splat_intersect", *boxes, *t["size"], *t["look"], t["inria"])


def draw(run, t, found):
    splats = (t["means2d"], t["shape2d"], t["opacities"], t["features"], t["beta"])
    ground = (t.get("backgrounds"), t["depths"], t["mask"])
    return run(
        "splat_raster", *splats, *ground, *found, *t["size"], *t["look"], 0.99, 1e-4, t["inria"]
    )


def pull(run, t, found, images, absgrad, deterministic):
    splats = (t["means2d"], t["shape2d"], t["opacities"], t["features"], t["beta"])
    options = (t.get("backgrounds"), *found, *t["size"], *t["look"], 0.99)
    above = (images[2], images[3], t["g_image"], t["g_alpha"])
    return run("splat_raster_backward", *splats, *options, *above, absgrad, deterministic)


def check_compositing(t, dtype, absgrad=False, deterministic=False):
    """Images and gradients; the definition's lists need not be the kernel's."""

    def run(name, *inputs):
        return native(name, *inputs, dtype=dtype)

    wanted_lists, found_lists = lists(expected, t), lists(run, t)
    if dtype == DOUBLE:
        assert torch.equal(found_lists[0], wanted_lists[0])
        assert torch.equal(found_lists[1], wanted_lists[1])
    wanted, found = draw(expected, t, wanted_lists), draw(run, t, found_lists)
    for one, other in zip(found[:3], wanted[:3], strict=True):
        assert_near(one, other, dtype)
    assert (found[4] == wanted[4]).all()  # the same splats are in the middle
    grads = pull(run, t, found_lists, found, absgrad, deterministic)
    oracle = pull(expected, t, wanted_lists, wanted, absgrad, deterministic)
    for one, other in zip(grads, oracle, strict=True):
        assert_near(one, other, dtype)


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize(("antialiased", "inria"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_projection(kernel, camera, antialiased, inria, dtype):
    p = rounded(focal_of(scene(300, 3, kernel=kernel, spread=2.0), camera), dtype)
    inputs = projection(p, camera, antialiased, inria)
    wanted, found = (
        expected("splat_project", *inputs),
        native("splat_project", *inputs, dtype=dtype),
    )
    assert 0 < (wanted[0] > 0).all(-1).sum() < 900
    assert torch.equal(found[0] > 0, wanted[0] > 0)
    assert (found[0] - wanted[0]).abs().max() <= (dtype == SINGLE)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert_near(one, other, dtype)
    radii, _, _, conics, _, compensations = wanted
    g = torch.Generator().manual_seed(1)
    above = [torch.randn(x.shape, generator=g, dtype=DOUBLE) for x in wanted[1:]]
    splats = (p["means"], p["quats"], p["scales"], p["viewmats"], p["Ks"], *inputs[7:12])
    inputs = (*splats, antialiased, inria, radii, conics, compensations, *above)
    found = native("splat_project_backward", *inputs, dtype=dtype)
    for one, other in zip(found, expected("splat_project_backward", *inputs), strict=True):
        assert_near(one, other, dtype)
    assert all(map(torch.equal, found, native("splat_project_backward", *inputs, dtype=dtype)))
    some = (*inputs[:-4], None, inputs[-3], None, None)  # depths, covariances, compensations
    zeros = [torch.zeros_like(x) if y is None else y for x, y in zip(inputs, some, strict=True)]
    found, known = (native("splat_project_backward", *i, dtype=dtype) for i in (some, zeros))
    assert all(map(torch.equal, found, known))


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("count", [0, 1, 1000])
@pytest.mark.parametrize(("degree", "functions"), [(0, 1), (0, 16), (1, 4), (2, 16), (3, 16)])
def test_spherical_harmonics(degree, functions, count, dtype):
    g = torch.Generator().manual_seed(2)
    shapes = ((count, 3), (count, functions, 3), (count, 3))
    dirs, coeffs, above = (torch.randn(s, generator=g, dtype=dtype).double() for s in shapes)
    dirs[: count // 500] = 0
    for name, inputs in (("splat_sh", ()), ("splat_sh_backward", (None, above))):
        given = (degree, dirs, coeffs, None, None, *inputs)
        for one, other in zip(
            native(name, *given, dtype=dtype), expected(name, *given), strict=True
        ):
            assert_near(one, other, dtype)


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("count", [0, 1, 700])
@pytest.mark.parametrize(("degree", "functions"), [(0, 1), (1, 16), (3, 16)])
def test_colours_from_cameras(degree, functions, count, dtype):
    g = torch.Generator().manual_seed(3)
    shapes = ((count, 3), (2 * count, functions, 3), (2, 4, 4), (2 * count, 3))
    points, coeffs, viewmats, above = (
        torch.randn(s, generator=g, dtype=dtype).double() for s in shapes
    )
    radii = torch.randint(0, 3, (2, count, 2), generator=g, dtype=torch.int32)
    given = (degree, points, coeffs, viewmats, radii)
    (colors,) = native("splat_sh", *given, dtype=dtype)
    (wanted,) = expected("splat_sh", *given)
    assert_near(colors, wanted, dtype)
    slopes = (*given, colors, above)
    found = native("splat_sh_backward", *slopes, dtype=dtype)
    for one, other in zip(found, expected("splat_sh_backward", *slopes), strict=True):
        assert_near(one, other, dtype)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compositing(kernel, channels, dtype, deterministic):
    p = scene(40, 2, channels, kernel, size=(45, 37))
    if channels % 2:
        p["features"] = p["features"] + torch.zeros(2, 1, 1, dtype=DOUBLE)
    t = compositing(p, dtype, masked=channels == 4, ground=channels != 7)
    check_compositing(t, dtype, absgrad=channels != 3, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tile_size", [1, 5, 8, 24, 32])
def test_tiles_of_any_size(tile_size, deterministic):
    t = compositing(scene(30, 2, size=(45, 37)), DOUBLE, tile_size=tile_size)
    check_compositing(t, DOUBLE, deterministic=deterministic)


@pytest.mark.parametrize("kernel", KERNELS)
def test_options(kernel):
    p = scene(30, 1, kernel=kernel, size=(45, 37))
    check_compositing(compositing(p, SINGLE, inria=kernel == "gaussian"), SINGLE)
    check_compositing(compositing(p, SINGLE, pixel=0.5), SINGLE)


def test_lists_longer_than_a_batch():
    p = scene(900, 1, size=(24, 20))
    p["opacities"] = p["opacities"] * 0.1
    for dtype in (DOUBLE, SINGLE):
        check_compositing(compositing(p, dtype), dtype, deterministic=True)
        check_compositing(compositing(p, dtype), dtype)


def test_splats_over_all_tiles():
    p = scene(60, 2, size=(130, 75))
    p["scales"] = p["scales"] * torch.where(torch.arange(60) % 3 == 0, 40.0, 1.0)[:, None]
    t = compositing(p, DOUBLE, tile_size=4)
    assert (t["radii"][0] > 130).any()
    check_compositing(t, DOUBLE)


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("kernel", KERNELS)
def test_deterministic_gradients_are_the_same_bits(kernel, dtype):
    t = compositing(scene(400, 2, kernel=kernel, size=(64, 48)), dtype)

    def run(name, *inputs):
        return native(name, *inputs, dtype=dtype)

    found = lists(run, t)
    assert all(map(torch.equal, found, lists(run, t)))
    images = draw(run, t, found)
    first, *others = (pull(run, t, found, images, True, True) for _ in range(5))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_lists_from_elsewhere_do_no_harm():
    t = compositing(scene(20, size=(45, 37)), SINGLE)
    offsets, ids = lists(expected, t)
    for bad in ((offsets + 10**12, ids), (-offsets, ids), (offsets, ids + 10**9), (offsets, -ids)):
        images = draw(lambda *x: native(*x, dtype=SINGLE), t, bad)
        for deterministic in (False, True):
            pull(lambda *x: native(*x, dtype=SINGLE), t, bad, images, True, deterministic)


def there(problem, dtype=SINGLE):
    return {
        k: v.to(DEVICE, dtype) if isinstance(v, torch.Tensor) else v for k, v in problem.items()
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_splats(kernel):
    p = there(scene(0, 2, kernel=kernel))
    for name in ("means", "quats", "scales", "opacities", "features", "viewmats"):
        p[name].requires_grad_()
    backgrounds = torch.rand(2, 3, device=DEVICE)
    found = rasterize(**p, backgrounds=backgrounds)
    assert torch.equal(found.image, backgrounds[:, None, None].expand_as(found.image))
    assert (found.alpha == 0).all()
    (found.image.sum() + found.alpha.sum()).backward()
    assert p["means"].grad.shape == (0, 3)
    assert (p["viewmats"].grad == 0).all()


def test_the_callers_stream_is_used():
    p = there(scene(200, 2, size=(128, 96)))
    wanted = rasterize(**p).image
    inputs = {name: torch.zeros_like(p[name]) for name in ("means", "features")}
    work = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):  # the inputs come late
            work = work @ work * 1e-3
        for name, value in inputs.items():
            value.copy_(p[name])
        found = rasterize(**p | inputs).image
        event = torch.cuda.current_stream().record_event()
    event.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_rendering_and_its_gradients(kernel, camera):
    p = rounded(focal_of(scene(60, 2, 5, kernel, size=(45, 37)), camera), SINGLE)
    options = {"render_mode": "RGB+ED", "antialiased": kernel == "gaussian"}
    learnt = ("means", "quats", "scales", "opacities", "features", "viewmats", "beta")[
        : 6 + ("beta" in p)
    ]
    grads, images = [], []
    for q in (there(p), dict(p)):
        for name in learnt:
            q[name] = q[name].detach().clone().requires_grad_()
        found = rasterize(**q, **options)
        loss = (found.image.square() * 3).sum() + found.alpha.sum() + found.depth.sum()
        grads.append([g.double().cpu() for g in torch.autograd.grad(loss, [q[k] for k in learnt])])
        images.append([x.detach().double().cpu() for x in found[:3]])
    for one, other in zip(images[0], images[1], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    for one, other in zip(grads[0], grads[1], strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize(("cameras", "size"), [(1, (45, 37)), (3, (640, 360))])
def test_the_images_are_those_of_gsplat(cameras, size):
    gsplat = pytest.importorskip("gsplat")
    p = there(scene(500, cameras, size=size))
    learnt = ("means", "quats", "scales", "opacities", "features")
    p |= {name: p[name].requires_grad_() for name in learnt}
    backgrounds = torch.rand(cameras, 3, device=DEVICE)
    ours = rasterize(**p, backgrounds=backgrounds)
    p["colors"] = p["features"]
    splats = {name: p[name] for name in ("means", "quats", "scales", "opacities", "colors")}
    cameras = {name: p[name] for name in ("viewmats", "Ks", "width", "height")}
    image, alpha, _ = gsplat.rasterization(
        **splats, **cameras, backgrounds=backgrounds, packed=False
    )
    away = ((ours.image - image).abs().amax(-1) > 1e-4) | (
        (ours.alpha - alpha[..., 0]).abs() > 1e-4
    )
    assert away.double().mean() <= 1e-3  # pixels at which rounding flips a splat at a cut-off
    g = torch.randn_like(image) * ~away[..., None]
    inputs = [p[name] for name in learnt]
    found = torch.autograd.grad((ours.image * g).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad((image * g).sum(), inputs), strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()
