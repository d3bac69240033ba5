"""Scenes of generalised exponentials: how they are drawn, edited, densified and exported."""

import math

import pytest
import torch

import torchzoo
from torchzoo.ops import project_gaussians
from torchzoo.splatting import (
    Cameras,
    GaussianScene,
    GeneralizedExponentialScene,
    GESStrategy,
    SplatTrainer,
    gef_variance_scale,
    ges_shape_modulation,
    l1,
)

DOUBLE = torch.float64
SMOOTH = {"alpha_min": 0.0, "t_stop": 0.0}


def tensors(count=8, *, dtype=torch.float32, seed=0):
    """Values of a scene around the origin."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=DOUBLE).to(dtype)

    return {
        "means": 0.5 * draw(count, 3),
        "quats": draw(count, 4),
        "log_scales": 0.4 * draw(count, 3) - 1.3,
        "opacity_logits": 1 + draw(count),
        "sh": 0.5 * draw(count, 4, 3),
    }


def scene_of(mode="exact", raw=None, *, count=8, dtype=torch.float32, **options):
    values = tensors(count, dtype=dtype)
    raw = torch.linspace(-0.5, 1.0, count, dtype=dtype) if raw is None else raw
    return GeneralizedExponentialScene.from_tensors(**values, raw_shape=raw, mode=mode, **options)


def cameras(count=2, size=24, dtype=torch.float32):
    return Cameras.orbit(count, radius=4.0, width=size + 3, height=size, dtype=dtype)


def orthographic(scale, size):
    view = torch.eye(4, dtype=DOUBLE)[None].clone()
    view[:, 2, 3] = 5
    K = torch.tensor([[[scale, 0, size / 2], [0, scale, size / 2], [0, 0, 1]]], dtype=DOUBLE)
    return Cameras(view, K, size, size, "orthographic")


@pytest.mark.claim(
    46,
    "A scene whose raw shapes are 0 looks like Gaussians in both modes, with the same gradients",
    tolerance=1e-6,
)
@pytest.mark.parametrize("mode", ["exact", "approx"])
def test_raw_shapes_of_zero_are_gaussians(mode):
    scene = GeneralizedExponentialScene.from_tensors(**tensors(), mode=mode)
    plain = GaussianScene.from_tensors(**tensors())
    assert not scene.raw_shape.any()
    images = [one.render(cameras()).image for one in (scene, plain)]
    assert (images[0] - images[1]).abs().max() <= 1e-6
    for image in images:
        image.square().sum().backward()
    for name, parameter in plain.named_parameters():
        error = (scene.get_parameter(name).grad - parameter.grad).norm()
        assert error <= 1e-5 * parameter.grad.norm(), name
    assert scene.raw_shape.grad.abs().min() > 0


@pytest.mark.claim(
    46,
    "The picture's gradient by the shapes is that of central differences, in both modes",
    tolerance=1e-6,
)
@pytest.mark.parametrize("mode", ["exact", "approx"])
def test_gradients_by_the_shapes(mode):
    scene, view = scene_of(mode, dtype=DOUBLE), cameras(dtype=DOUBLE)
    above = torch.randn(2, 24, 27, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)

    def value():
        return (scene.render(view, **SMOOTH).image * above).sum()

    value().backward()
    for k in range(8):
        raw, sides = scene.raw_shape.data[k].item(), []
        for step in (1e-5, -1e-5):
            scene.raw_shape.data[k] = raw + step
            sides.append(value().item())
        scene.raw_shape.data[k] = raw
        slope = (sides[0] - sides[1]) / 2e-5
        assert scene.raw_shape.grad[k].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


def one_splat(beta, *, opacity=0.98, scale=1.0, quat=(1.0, 0, 0, 0), **options):
    """A splat of these scales in the origin."""
    scales = torch.as_tensor(scale, dtype=DOUBLE).expand(1, 3)
    return GeneralizedExponentialScene.from_tensors(
        torch.zeros(1, 3, dtype=DOUBLE),
        torch.tensor([quat], dtype=DOUBLE),
        scales.log(),
        torch.tensor([opacity], dtype=DOUBLE).logit(),
        torch.zeros(1, 1, 3, dtype=DOUBLE),
        raw_shape=torch.tensor([beta / 2], dtype=DOUBLE).log(),
        **options,
    )


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_shapes_have_finite_gradients_at_a_pixel_in_the_centre(beta):
    scene = one_splat(beta, beta_range=(0.4, 12.0))
    scene.render(orthographic(3.0, 9), render_mode="RGB").alpha.sum().backward()
    for name, parameter in scene.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    assert scene.raw_shape.grad.abs() > 0


@pytest.mark.claim(
    46,
    "At an exponent of 12 a splat is a box: nearly o for q below 0.55 and nothing from "
    "(2 ln 255 o)^(1/6) on; at 1/2 it is a cusp with tails of 0.42 at q = 9",
    tolerance=0.014,
)
def test_profiles():
    pixels = (torch.arange(65, dtype=DOUBLE) - 32) / 8
    q = pixels[:, None] ** 2 + pixels**2
    box = one_splat(12.0).render(orthographic(8.0, 65), eps2d=0.0).alpha[0]
    assert (box[q < 0.55] - 0.98).abs().max() <= 0.014
    edge = (2 * math.log(255 * 0.98)) ** (1 / 6)
    assert edge == pytest.approx(1.492, abs=1e-3)
    assert torch.equal(box > 0, q < edge)
    cusp = one_splat(0.5, beta_range=(0.5, 12.0)).render(orthographic(8.0, 65), eps2d=0.0).alpha[0]
    assert cusp[32, 32 + 24].item() / 0.98 == pytest.approx(0.421, abs=5e-4)
    slopes = (cusp[32, 32:40].diff() * 8).abs()
    assert slopes[0] > 2 * slopes[1]


@pytest.mark.claim(46, "No pixel where a splat's opacity reaches 1/255 is left out", tolerance=1e-9)
@pytest.mark.parametrize("beta", [1.0, 1.5, 4.0])
def test_culling_is_conservative(beta):
    view = cameras(size=40, dtype=DOUBLE)
    y, x = (torch.arange(n, dtype=DOUBLE) + 0.5 for n in (40, 43))
    seen = 0
    for k in range(8):
        raw = torch.full((8,), math.log(beta / 2), dtype=DOUBLE)
        scene = scene_of(raw=raw, dtype=DOUBLE)
        scene.keep(torch.tensor([k]))
        shown = scene.render(view).alpha
        found = project_gaussians(
            scene.means,
            scene.quats,
            scene.scales,
            view.viewmats,
            view.Ks,
            43,
            40,
            opacities=scene.opacities,
            kernel="generalized_exponential",
            beta=scene.beta,
        )
        place, (a, b, c) = found.means2d[:, 0], found.conics[:, 0].unbind(-1)
        dx = (x - place[:, :1])[:, None, :]
        dy = (y - place[:, 1:])[:, :, None]
        a, b, c = (part[:, None, None] for part in (a, b, c))
        q = a * dx * dx + 2 * b * dx * dy + c * dy * dy
        dense = scene.opacities * torch.exp(-0.5 * q.clamp_min(1e-8) ** (beta / 2))
        dense = torch.where(dense >= 1 / 255, dense.clamp_max(0.99), 0)
        torch.testing.assert_close(shown, dense, rtol=0, atol=1e-9)
        seen += int((dense > 0).sum())
    assert seen > 1000


@pytest.mark.claim(
    46,
    "Drawn as by the authors, a scene looks like Gaussians of other scales, to which it is folded",
    tolerance=1e-6,
)
def test_approximate_mode_is_gaussians_of_other_scales():
    scene = scene_of("approx", torch.linspace(-30, 30, 8))
    folded = scene.to_gaussian()
    assert type(folded) is GaussianScene
    image, other = (one.render(cameras()).image for one in (scene, folded))
    assert (image - other).abs().max() <= 1e-6
    plain = GaussianScene.from_tensors(**tensors()).render(cameras()).image
    assert (image - plain).abs().max() > 0.1
    phi = 2 / (1 + torch.exp(-0.1 * (scene.beta - 2)))
    torch.testing.assert_close(scene.effective_scales, scene.scales * phi[:, None])
    torch.testing.assert_close(ges_shape_modulation(scene.raw_shape), phi)


@pytest.mark.claim(
    46,
    "As a Gaussian, an exactly drawn splat keeps the variances of its picture, and its opacity",
    tolerance=2e-3,
)
@pytest.mark.parametrize(("beta", "pixels"), [(1.3, 6.0), (4.0, 20.0), (12.0, 24.0)])
def test_gaussians_for_exported_splats_have_the_same_variances(beta, pixels):
    scene = one_splat(beta, scale=[1.0, 0.6, 0.8], quat=(0.9, 0.1, -0.2, 0.6))
    options = SMOOTH | {"eps2d": 0.0, "alpha_max": 1.0}
    size = 241
    variances = []
    for one in (scene, scene.to_gaussian()):
        alpha = one.render(orthographic(pixels, size), **options).alpha[0].detach()
        assert alpha[size // 2, size // 2].item() == pytest.approx(0.98, abs=1e-5)
        place = torch.arange(size, dtype=DOUBLE) - size // 2
        total = alpha.sum()
        xx = (alpha.sum(0) * place.square()).sum() / total
        yy = (alpha.sum(1) * place.square()).sum() / total
        xy = (alpha * place[:, None] * place).sum() / total
        variances.append(torch.stack([xx, yy, xy]) / pixels**2)
    torch.testing.assert_close(variances[0], variances[1], rtol=2e-3, atol=2e-3)
    factor = gef_variance_scale(torch.tensor(beta, dtype=DOUBLE), 2)
    torch.testing.assert_close(scene.to_gaussian().scales, scene.scales * factor)


def test_shapes():
    scene = scene_of(raw=torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.5, 2.0, 9.0, 0.1]))
    expected = [1.0, 2 * math.exp(-0.5), 2, 2 * math.exp(0.5), 2 * math.exp(1.5), 12, 12]
    assert scene.beta[:7].tolist() == pytest.approx(expected)
    assert torch.equal(scene.effective_scales, scene.scales)
    assert scene_of("approx", scene.raw_shape).beta.tolist() == (2 + scene.raw_shape).tolist()
    options = GeneralizedExponentialScene(1)
    assert (options.mode, options.shape_strength) == ("exact", 0.1)
    assert options.beta_range == (1.0, 12.0)


def test_other_kernels_draw_without_shapes():
    scene, plain = scene_of(), GaussianScene.from_tensors(**tensors())
    for kernel in ("gaussian", "analytic"):
        shown = [one.render(cameras(), kernel=kernel).image for one in (scene, plain)]
        assert torch.equal(*shown)
    beta = torch.full((8,), 3.0)
    given = scene.render(cameras(), beta=beta).image
    raw = (beta / 2).log()
    torch.testing.assert_close(given, scene_of(raw=raw).render(cameras()).image)


def test_edits_keep_the_shapes():
    scene = scene_of()
    old = scene.raw_shape.detach().clone()
    optimizer = torch.optim.Adam(scene.parameters())
    scene.clone(torch.tensor([1, 6]), optimizer)
    assert torch.equal(scene.raw_shape, old[[*range(8), 1, 6]])
    scene.split(torch.tensor([3]), optimizer)
    assert torch.equal(scene.raw_shape, old[[0, 1, 2, 4, 5, 6, 7, 1, 6, 3, 3]])
    scene.relocate(torch.tensor([2]), optimizer, dead=torch.tensor([0]))
    assert torch.equal(scene.raw_shape[:2], old[[2, 1]])


def test_saving_and_loading(tmp_path):
    scene = scene_of(count=9, shape_strength=0.2, beta_range=(0.5, 8.0), mode="approx")
    scene.keep(torch.arange(7))
    again = torchzoo.from_pretrained(scene.save_pretrained(tmp_path / "scene"))
    assert type(again) is GeneralizedExponentialScene
    assert torch.equal(again.render(cameras()).image, scene.render(cameras()).image)
    assert (again.mode, again.shape_strength, again.beta_range) == ("approx", 0.2, (0.5, 8.0))


def train(strategy, mode="approx", raw=None, steps=12):
    """The shapes and their first moments after each step of a run, and the scene."""
    scene, seen = scene_of(mode, raw), []
    view = cameras(3, 12)

    def note(step):
        moment = step.optimizer.state[step.scene.raw_shape]["exp_avg"]
        seen.append((step.scene.raw_shape.detach().clone(), moment.clone()))

    options = {"strategy": strategy, "loss": l1, "rates": {"raw_shape": 1e-3}, "callbacks": [note]}
    SplatTrainer(scene, view, torch.full((3, 12, 15, 3), 0.5), steps=steps, **options).fit()
    return scene, seen


def quiet(**options):
    """A strategy that neither grows nor prunes by opacity."""
    options = {"grow_grad2d": 1e9, "prune_opacity": 0.0, "prune_scale3d": 1e9} | options
    return GESStrategy(refine_start=1, refine_stop=10, refine_every=4, reset_every=0, **options)


def test_shapes_are_reset_from_time_to_time():
    _, seen = train(quiet(reset_shapes_every=3))
    for number, (raw, moment) in enumerate(seen, 1):
        assert raw.any() == moment.any() == (number not in (3, 6, 9)), number
    for strategy, mode in ((quiet(), "approx"), (quiet(reset_shapes_every=3), "exact")):
        _, seen = train(strategy, mode)
        assert all(raw.all() for raw, _ in seen)


def test_splats_of_vanishing_modulation_are_pruned():
    raw = torch.tensor([0.0, -70.0, -55.0, 0.0, -61.0, 0.0, 0.0, 3.0])
    scene, seen = train(quiet(reset_shapes_every=0), raw=raw)
    assert [len(raw) for raw, _ in seen] == [8] * 3 + [6] * 9
    assert scene.raw_shape[1].item() == pytest.approx(-55, abs=0.1)
    scene, _ = train(quiet(), "exact", raw)
    assert scene.num_gaussians == 8


def test_the_authors_figures():
    strategy = GESStrategy()
    assert strategy.threshold == 3e-4
    strategy.begin(None, 40_000)
    resets = [n for n in range(1, 40_001) if strategy._resets_shapes(n)]
    assert resets == list(range(1000, 15_000, 1000))
    assert strategy.prune_modulation == 0.005
    strategy.begin(None, 300)
    assert not any(strategy._resets_shapes(n) for n in range(1, 301))
    assert "prune_modulation" in strategy.config()
    with pytest.raises(ValueError, match="reset_shapes_every: got -1"):
        GESStrategy(reset_shapes_every=-1)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"raw_shape: got \(7,\), expected \(8,\)"):
        scene_of(raw=torch.zeros(7))
    for wrong in ((0.0, 3.0), (2.5, 3.0), (1.0, 1.5), (1.0,), (1.0, math.inf)):
        with pytest.raises(ValueError, match="beta_range: got"):
            GeneralizedExponentialScene(3, beta_range=wrong)
