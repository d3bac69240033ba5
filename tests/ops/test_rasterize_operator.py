"""`rasterize` as an operator: checks, empty scenes, threads, compiling, and torch's own tests."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ops.splats import DOUBLE, KERNELS, OPERATORS, backend, has_kernel, scene  # noqa: F401
from torchzoo.ops import rasterize

OPS = torch.ops.torchzoo
kernels = pytest.mark.parametrize("kernel", KERNELS)
LEAVES = ("means", "quats", "scales", "opacities", "features", "viewmats")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quats": torch.zeros(10, 3)}, r"quats: got \(10, 3\), expected \(N, 4\) with N=10"),
        ({"scales": torch.zeros(9, 3)}, r"scales: got \(9, 3\), expected \(N, 3\) with N=10"),
        ({"opacities": torch.zeros(3, 10)}, r"opacities: got \(3, 10\), expected \(N,\) or"),
        ({"features": torch.zeros(9, 3)}, r"features: got \(9, 3\), expected \(N, F\) or"),
        ({"means": torch.zeros(10, 2)}, r"means: got \(10, 2\), expected \(N, 3\)"),
        ({"means": torch.zeros(10, 3, dtype=torch.int64)}, "means: got torch.int64"),
        ({"viewmats": torch.eye(4)}, r"viewmats: got \(4, 4\), expected \(C, 4, 4\)"),
        ({"Ks": torch.eye(3)}, r"Ks: got \(3, 3\), expected \(C, 3, 3\) with C=2"),
        ({"width": 0}, "width, height: got 0, 20"),
        ({"kernel": "box"}, "kernel: got 'box'"),
        ({"kernel": "generalized_exponential"}, "beta: got None"),
        ({"kernel": "generalized_exponential", "beta": torch.zeros(10)}, "beta: got 0"),
        ({"beta": torch.ones(10)}, "beta: got a tensor"),
        ({"sh_degree": 1}, r"features: got \(10, 3\), expected \(..., K, 3\)"),
        ({"sh_degree": 1, "features": torch.zeros(10, 7, 3)}, "K in"),
        ({"sh_degree": 2, "features": torch.zeros(10, 4, 3)}, "at least 9 for degree 2"),
        ({"backgrounds": torch.zeros(4)}, r"backgrounds: got \(4,\), expected \(F,\) or"),
        ({"pixel_mask": torch.ones(2, 5, 5, dtype=torch.bool)}, "pixel_mask: got"),
        ({"pixel_mask": torch.ones(2, 20, 24)}, "pixel_mask: got torch.float32"),
        ({"dilation": 0}, "dilation: got 0"),
        ({"dilation": 21}, "dilation: got 21"),
        ({"dilation": 2, "offset": (2, 0)}, "offset: got"),
        ({"tile_size": 0}, "tile_size: got 0"),
        ({"render_mode": "rgb"}, "render_mode: got 'rgb'"),
        ({"preset": "other"}, "preset: got 'other'"),
        ({"camera_model": "ortho"}, "camera_model: got 'ortho'"),
        ({"means": torch.zeros(10, 3, device="meta")}, "quats: got cpu, expected meta"),
    ],
)
def test_what_does_not_fit(change, words):
    problem = scene(10, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match=words):
        rasterize(**(problem | change))


def test_the_analytic_kernel_has_no_blur():
    problem = scene(3, kernel="analytic")
    with pytest.warns(UserWarning, match="eps2d"):
        out = rasterize(**problem, eps2d=5.0)
    assert torch.equal(out.image, rasterize(**problem).image)


@kernels
@pytest.mark.usefixtures("backend")
def test_no_splats(kernel):
    problem = scene(0, 2, 3, kernel)
    for name in LEAVES:
        problem[name].requires_grad_()
    behind = torch.tensor([0.2, 0.3, 0.4], dtype=DOUBLE, requires_grad=True)
    out = rasterize(**problem, backgrounds=behind, render_mode="RGB+ED")
    assert (out.image == behind).all()
    assert (out.depth == 0).all()
    assert (out.info["median_depth"] == 0).all()
    assert out.info["n_isects"] == 0
    out.image.sum().backward()
    assert (behind.grad == 2 * 20 * 24).all()
    for name in LEAVES:
        assert problem[name].grad.shape == problem[name].shape
        assert (problem[name].grad == 0).all()


@pytest.mark.usefixtures("backend")
def test_no_cameras():
    problem = scene(4, 0)
    leaves = {name: problem[name].requires_grad_() for name in LEAVES}
    out = rasterize(**(problem | leaves))
    assert out.image.shape == (0, 20, 24, 3)
    out.image.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves.values())


@kernels
def test_threads_and_runs_give_the_same_bits(kernel):
    if not has_kernel("splat_raster"):
        pytest.skip("the PyTorch reference leaves the order of sums to torch")
    problem = scene(30, 2, 3, kernel, 3, torch.float32, size=(50, 40))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8, 2):
            torch.set_num_threads(threads)
            leaves = [problem[name].clone().requires_grad_() for name in LEAVES]
            given = problem | dict(zip(LEAVES, leaves, strict=True))
            out = rasterize(**given, absgrad=True, tile_size=4)  # many tiles a splat
            out.image.square().sum().backward()
            results.append(
                [out.image, *(leaf.grad for leaf in leaves), out.info["means2d"].absgrad]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_half_precision_is_computed_in_single():
    problem = scene(8, dtype=torch.float32)
    out = rasterize(**(problem | {"features": problem["features"].bfloat16()}))
    assert out.image.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = rasterize(**problem)
    assert torch.equal(inside.image, rasterize(**problem).image)


def test_strides_do_not_matter():
    problem = scene(8, 2)
    strided = {
        k: v.mT.contiguous().mT if torch.is_tensor(v) and v.ndim > 1 else v
        for k, v in problem.items()
    }
    assert not strided["means"].is_contiguous()
    assert torch.equal(rasterize(**strided).image, rasterize(**problem).image)


@kernels
def test_compiles_whole(kernel):
    torch._dynamo.reset()
    problem = scene(8, 1, 3, kernel, size=(10, 8))
    tensors = {k: v for k, v in problem.items() if torch.is_tensor(v)}
    fixed = {k: v for k, v in problem.items() if not torch.is_tensor(v)}
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def image(tensors):
        out = rasterize(**tensors, **fixed, render_mode="RGB+ED")
        return out.image, out.depth, out.info["median_depth"]

    for shift in (0.0, 0.3):  # other pairs of splats and tiles, the same graph
        given = tensors | {"means": (tensors["means"] + shift).requires_grad_()}
        expected = given | {"means": given["means"].detach().clone().requires_grad_()}
        out, plain = image(given), rasterize(**expected, **fixed, render_mode="RGB+ED")
        assert torch.equal(out[0], plain.image)
        assert torch.equal(out[1], plain.depth)
        assert torch.equal(out[2], plain.info["median_depth"])
        (out[0].square().sum() + out[1].sum()).backward()
        (plain.image.square().sum() + plain.depth.sum()).backward()
        assert (given["means"].grad - expected["means"].grad).abs().max() <= 1e-12
    assert counter.frame_count == 1


@kernels
def test_torch_accepts_the_operators(kernel):
    problem = scene(4, 2, 2, kernel, size=(9, 7))
    code = KERNELS.index(kernel)
    means, quats, scales, opacities, features, views, Ks = (
        problem[name]
        for name in ("means", "quats", "scales", "opacities", "features", "viewmats", "Ks")
    )
    beta, opacities = problem.get("beta"), opacities.expand(2, -1).contiguous()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")

    def check(name, *args):
        if has_kernel(name) or not name.endswith("backward"):  # torch.func allows no such modes
            torch.library.opcheck(getattr(OPS, name).default, args, test_utils=tests)
        return getattr(OPS, name)(*args)

    leaves = [x.clone().requires_grad_() for x in (means, quats, scales)]
    options = (9, 7, code, 0, 0.3, 0.01, 1e10, 0.0, 1 / 255, False, False)
    given = (*leaves, opacities, beta, views, Ks, *options)
    projected = check("splat_project", *given)
    radii, means2d, depths, conics, covs, compensations = (x.detach() for x in projected)
    slopes = [torch.randn_like(x) for x in (means2d, depths, conics, covs, compensations)]
    inputs = (means, quats, scales, views, Ks, 9, 7, code, 0, 0.3, False, False)
    known = (*inputs, radii, conics, compensations)
    check("splat_project_backward", *known, *slopes)
    for i in range(len(slopes)):  # a slope that isn't there is 0
        some = [None if i == j else slope for j, slope in enumerate(slopes)]
        zeros = [torch.zeros_like(slope) if i == j else slope for j, slope in enumerate(slopes)]
        found = check("splat_project_backward", *known, *some)
        expected = OPS.splat_project_backward(*known, *zeros)
        assert all(map(torch.equal, found, expected))
    shape = covs if kernel == "analytic" else conics
    lists = check(
        "splat_intersect",
        *(means2d, radii, depths, shape, opacities, beta, 9, 7, 4, code, 1.0, 1 / 255, False),
    )
    behind = torch.ones(2, 2, dtype=DOUBLE)
    splats = (means2d, shape, opacities, features[None], beta, behind)
    end = (code, 1.0, 1 / 255, 0.99)
    image, alpha, final_t, last, _ = check(
        "splat_raster", *splats, depths, None, *lists, 9, 7, 4, *end, 1e-4, False
    )
    assert torch.equal(alpha, 1 - final_t)
    known = (*splats, *lists, 9, 7, 4, *end, final_t, last, torch.randn_like(image))
    check("splat_raster_backward", *known, torch.randn_like(alpha), True, True)
    found = check("splat_raster_backward", *known, None, True, True)
    expected = OPS.splat_raster_backward(*known, torch.zeros_like(alpha), True, True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_are_registered_where_the_library_is_loaded(name):
    from torchzoo.ops import library

    if library.backend(name)[0] != "native":
        pytest.skip(library.backend(name)[1])
    assert has_kernel(name)
