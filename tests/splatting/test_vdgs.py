"""Splats corrected by direction: factors by hand, pictures against those of plain scenes."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from torchzoo import ops
from torchzoo.splatting import (
    Cameras,
    DefaultStrategy,
    GaussianScene,
    SplatTrainer,
    VDGSScene,
    ViewDirectionField,
    vdgs_rates,
)
from torchzoo.splatting.compact_color import harmonics
from torchzoo.splatting.vdgs import _sphere

DOUBLE = torch.float64
BOX = [[-1.5, -1.5, -1.5], [1.5, 1.5, 1.5]]
SMALL = {"hidden": 8, "levels": 2, "features": 2, "log2_table": 6, "base": 3}
SMOOTH = {"alpha_min": 0.0, "t_stop": 0.0}


def field_of(target="opacity", *, seed=0, dtype=DOUBLE, **options):
    """A field as after training: its table says something, and so does its last layer."""
    torch.manual_seed(seed)
    field = ViewDirectionField(
        BOX, target=target, dtype=dtype, **{"sh_degree": 1} | SMALL | options
    )
    nn.init.normal_(field.grid.table)
    return field


def scene_of(field=None, *, count=12, dtype=DOUBLE, **options):
    g = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    field = field or field_of(dtype=dtype)
    return VDGSScene.from_tensors(
        0.5 * draw(count, 3),
        draw(count, 4),
        0.4 * draw(count, 3) - 1.2,
        draw(count) + 1,
        0.5 * draw(count, (field.sh_degree + 1) ** 2, 3),
        field=field,
        **options,
    )


def base_of(scene):
    names = ("means", "quats", "log_scales", "opacity_logits", "sh")
    return GaussianScene.from_tensors(*(getattr(scene, name) for name in names))


def cameras(count=3, dtype=DOUBLE, size=14):
    return Cameras.orbit(count, radius=3.0, width=size, height=size, dtype=dtype)


def make_constant(field, value):
    """Let the field's last layer give `value` everywhere."""
    with torch.no_grad():
        field.grid.table.fill_(1.0)
        for layer in (field.mlp[0], field.mlp[2], field.mlp[4]):
            layer.weight.fill_(1 / layer.in_features)
        first = field.mlp[0].weight
        first[:, :3] = 0
        first[:, 3:] = 1 / (first.shape[1] - 3)
        field.mlp[4].weight *= value
    return field


@pytest.mark.claim(
    50, "A factor of 1, or a sum with 0, leaves the pictures of a scene as they are", tolerance=1e-6
)
@pytest.mark.parametrize(("output", "operator"), [("exp", "mul"), ("identity", "add")])
def test_neutral_fields(output, operator):
    field = field_of("both", output=output)
    scene = scene_of(field, operator=operator)
    expected = base_of(scene).render(cameras()).image
    torch.testing.assert_close(scene.render(cameras()).image, expected, atol=1e-6, rtol=0)
    nn.init.normal_(field.mlp[-1].weight)
    assert (scene.render(cameras()).image - expected).abs().max() > 0.05


def gradients(scene, loss):
    found = torch.autograd.grad(loss, list(scene.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.claim(
    50,
    "Pictures of all cameras at once, and their gradients, are those of one camera after another",
    tolerance=1e-6,
)
def test_opacities_of_each_camera():
    scene, view = scene_of(field_of("both")), cameras()
    weights = torch.rand(3, 14, 14, 3, dtype=DOUBLE)
    image = scene.render(view).image
    opacities = scene.appearance(view)[0]
    assert opacities.std(0).max() > 0.02  # it matters which camera's are taken
    alone, parts = [], []
    for k in range(3):
        seen, sh = (value[0] for value in scene.appearance(view[k]))
        torch.testing.assert_close(seen, opacities[k])
        plain = ops.rasterize(
            scene.means, scene.quats, scene.scales, seen, sh,
            view.viewmats[k : k + 1], view.Ks[k : k + 1], 14, 14, sh_degree=1,
        )  # fmt: skip
        alone.append(plain.image[0])
        parts.append(gradients(scene, (plain.image[0] * weights[k]).sum()))
    torch.testing.assert_close(image, torch.stack(alone), atol=1e-6, rtol=0)
    for whole, *each in zip(gradients(scene, (image * weights).sum()), *parts, strict=True):
        torch.testing.assert_close(whole, sum(each), atol=1e-6, rtol=1e-6)


class Picture(nn.Module):
    def __init__(self, scene):
        super().__init__()
        self.scene = scene

    def forward(self):
        return self.scene.render(cameras(2, size=6), **SMOOTH).image


@pytest.mark.claim(
    50, "Gradients of field, means and opacities are those of finite differences", tolerance=1e-5
)
def test_gradcheck():
    picture = Picture(scene_of(field_of("both", seed=3), count=5))
    named = dict(picture.named_parameters())

    def function(*values):
        return functional_call(picture, dict(zip(named, values, strict=True)), ())

    leaves = tuple(value.detach().clone().requires_grad_() for value in named.values())
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-5)


def test_means_may_be_left_out_of_it():
    scene, view = scene_of(), cameras()

    def gradient(**options):
        (found,) = torch.autograd.grad(
            scene.render(view, **options).image.square().sum(), scene.means
        )
        return found

    fixed = gradient(opacities=scene.appearance(view)[0].detach())
    assert (gradient() - fixed).abs().max() > 1e-3
    scene.detach_means = True
    torch.testing.assert_close(gradient(), fixed)


@pytest.mark.claim(
    50,
    "Factors of a sigmoid lie between 0 and 1, so that products cover no more than the base scene",
    tolerance=1e-6,
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_products_attenuate(seed):
    scene, view = scene_of(field_of(seed=seed), count=20), cameras()
    factors = scene.factors(view)["opacity"]
    assert 0 < factors.min() < factors.max() < 1
    torch.testing.assert_close(scene.appearance(view)[0], factors * scene.opacities)
    whole, less = (one.render(view, t_stop=0.0).alpha for one in (base_of(scene), scene))
    assert (less <= whole + 1e-6).all()
    assert (whole - less).max() > 0.1


def test_sums_stay_opacities():
    scene, view = scene_of(field_of("both"), operator="add"), cameras()
    factors, (opacities, sh) = scene.factors(view), scene.appearance(view)
    total = factors["opacity"] + scene.opacities
    assert total.max() > 1
    torch.testing.assert_close(opacities, total.clamp_max(1))
    torch.testing.assert_close(sh, factors["sh"] + scene.sh)
    assert scene.render(view).alpha.max() <= 1


@pytest.mark.claim(
    50,
    "Colour factors multiply each coefficient before 1/2 is added and the sum cut off at 0",
    tolerance=1e-10,
)
def test_colors():
    scene, view = scene_of(field_of("color", sh_degree=0), count=1), cameras()
    scene.means.data.zero_()
    scene.sh0.data.copy_(torch.tensor([1.1, -0.7, -9.0]))
    f = scene.factors(view)["sh"][:, 0, 0]
    expected = (0.5 + 0.5 / math.sqrt(math.pi) * f * scene.sh0[0, 0]).clamp_min(0)
    assert expected[:, :2].min() > 0
    assert not expected[:, 2].any()
    out = scene.render(view)
    middle = out.image[:, 7, 7] / out.alpha[:, 7, 7, None]
    torch.testing.assert_close(middle, expected, atol=1e-10, rtol=0)
    rich = scene_of(field_of("color", sh_degree=2))
    factors = rich.factors(view[1])["sh"][0]
    assert factors.shape == (12, 9, 3)
    plain = base_of(rich)
    plain.sh0.data *= factors[:, :1]
    plain.shN.data *= factors[:, 1:]
    for degree in (1, 2):  # the scene's and, as early in training, a lower one
        pair = [one.render(view[1], sh_degree=degree).image for one in (rich, plain)]
        torch.testing.assert_close(*pair, atol=1e-10, rtol=0)
    assert torch.equal(rich.appearance(view)[0], rich.opacities)


@pytest.mark.claim(
    50,
    "A factor depends on the direction and the splat's place, not on the camera's distance",
    tolerance=1e-6,
)
def test_directions():
    scene = scene_of(count=2)
    scene.field.mlp[-1].weight.data *= 5  # for a factor that varies much
    scene.means.data.copy_(torch.tensor([[0.2, -0.3, 0.1], [-0.6, 0.5, 0.4]]))
    way = nn.functional.normalize(torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE), dim=0)
    side = torch.linalg.cross(way, torch.tensor([0.0, 0.0, 1.0], dtype=DOUBLE))
    turned = math.cos(math.pi / 6) * way + math.sin(math.pi / 6) * side / side.norm()
    mu = scene.means.detach()
    eyes = torch.stack([mu[0] + 2 * way, mu[0] + 5 * way, mu[0] + 2 * turned, mu[1] + 2 * way])
    view = Cameras.look_at(eyes, width=8, height=8)
    near, far, aside, other = (
        f.item() for f in scene.factors(view)["opacity"][[0, 1, 2, 3], [0, 0, 0, 1]]
    )
    assert near == pytest.approx(far, abs=1e-6)
    assert abs(near - aside) > 1e-3
    assert abs(near - other) > 1e-3
    torch.testing.assert_close(
        scene.field(mu[0], -way)["opacity"].item(), near, atol=1e-10, rtol=0
    )  # from the camera to the splat
    flat = Cameras.for_image(8, 8, dtype=DOUBLE)
    axis = flat.viewmats[0, 2, :3].expand(2, 3)
    torch.testing.assert_close(scene.factors(flat)["opacity"][0], scene.field(mu, axis)["opacity"])


@pytest.mark.claim(50, "Splats are pruned and reset by their opacity before the correction")
def test_pruning():
    field = make_constant(field_of(dtype=torch.float32), -8.0)
    scene, view = scene_of(field, dtype=torch.float32), cameras(dtype=torch.float32)
    scene.opacity_logits.data[:3] = math.log(0.004 / 0.996)
    scene.opacity_logits.data[3] = math.log(0.006 / 0.994)
    seen = scene.appearance(view)[0]
    assert seen.max() < 1e-3
    strategy = DefaultStrategy(
        refine_start=1, refine_every=2, refine_stop=9, reset_every=0, prune_scale3d=1e9, cap_max=12
    )
    rates = {name: 0.0 for name, _ in scene.named_parameters()}
    images = torch.zeros(3, 14, 14, 3)
    SplatTrainer(scene, view, images, steps=4, strategy=strategy, rates=rates).fit()
    assert scene.num_gaussians == 9
    scene.reset_opacities(0.01)
    assert scene.opacities.max().item() == pytest.approx(0.01)


def test_the_field_learns_from_the_first_step():
    scene, view = scene_of(dtype=torch.float32), cameras(dtype=torch.float32)
    before = scene.field.mlp[0].weight.detach().clone()
    options = {"steps": 1, "rates": vdgs_rates(1)}
    SplatTrainer(scene, view, torch.ones(3, 14, 14, 3), **options).fit()
    moved = (scene.field.mlp[0].weight - before).abs().max().item()
    assert moved == pytest.approx(0.01, rel=1e-3)  # Adam's first step is the rate


@pytest.mark.claim(
    50,
    "A smooth field is baked into harmonics of degree 3 to 0.05, one linear in d exactly",
    tolerance=0.05,
)
def test_bake():
    scene = scene_of()
    eyes = nn.functional.normalize(torch.randn(60, 3, dtype=DOUBLE), dim=-1)
    ways = (-eyes[:, None]).expand(-1, 12, -1)
    exact = scene.field(scene.means, ways)["opacity"] * scene.opacities
    errors = []
    for degree in range(4):
        baked = scene.bake_opacity_sh(degree)
        assert baked.shape == (12, (degree + 1) ** 2)
        errors.append((harmonics(degree, -eyes) @ baked.T - exact).abs().mean().item())
    assert errors[3] <= 0.05
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(scene.bake_opacity_sh(), baked[:, :9])

    linear = ViewDirectionField(
        BOX, output="identity", layers=1, **SMALL | {"hidden": 6}, dtype=DOUBLE
    )
    a = torch.tensor([0.05, -0.1, 0.15], dtype=DOUBLE)
    linear.mlp[0].weight.data = torch.cat([torch.eye(3), -torch.eye(3)]).to(DOUBLE)
    linear.mlp[0].weight.data = nn.functional.pad(linear.mlp[0].weight.data, (0, 4))
    linear.mlp[2].weight.data = torch.cat([a, -a])[None] / 1.01  # leaky(x) - leaky(-x) = 1.01 x
    scene = scene_of(linear, operator="add")
    scene.opacity_logits.data.fill_(0.0)
    unit = math.sqrt(3 / (4 * math.pi))
    row = [0.5 * math.sqrt(4 * math.pi), 0.1 / unit, 0.15 / unit, -0.05 / unit, 0, 0, 0, 0, 0]
    expected = torch.tensor([row] * 12, dtype=DOUBLE)
    torch.testing.assert_close(scene.bake_opacity_sh(), expected, atol=1e-12, rtol=0)


def test_directions_to_bake_in():
    """Integrals over the sphere of polynomials that a coarser rule would miss."""
    (x, y, z), weights = (part.T for part in _sphere(6))
    assert weights.sum().item() == pytest.approx(4 * math.pi)
    assert (weights @ z**10).item() == pytest.approx(4 * math.pi / 11, rel=1e-12)
    assert (weights @ x**10).item() == pytest.approx(4 * math.pi / 11, rel=1e-12)
    assert (weights @ torch.complex(x, y).pow(6).real).item() == pytest.approx(0, abs=1e-12)


def test_modulated():
    scene, view = scene_of(field_of("both")), cameras()
    plain = scene.modulated(view[2])
    assert type(plain) is GaussianScene
    image = scene.render(view[2]).image
    torch.testing.assert_close(plain.render(view[2]).image, image, atol=1e-6, rtol=0)
    assert (plain.render(view[0]).image - scene.render(view[0]).image).abs().max() > 1e-3
    with pytest.raises(ValueError, match="camera: got 3 cameras"):
        scene.modulated(view)


def test_what_is_given_is_drawn():
    scene, view = scene_of(field_of("both")), cameras()
    options = {"opacities": scene.opacities, "features": scene.means}
    expected = base_of(scene).render(view, **options).image
    torch.testing.assert_close(scene.render(view, **options).image, expected)


def test_further_inputs():
    field = field_of(extra_inputs=("quats", "log_scales"))
    scene, view = scene_of(field), cameras()
    assert field.mlp[0].in_features == 3 + 4 + 7
    extra = torch.cat([scene.quats / scene.quats.norm(dim=1, keepdim=True), scene.log_scales], 1)
    dirs = nn.functional.normalize(scene.means - view.centers[:, None], dim=-1)
    factors = scene.factors(view)["opacity"]
    torch.testing.assert_close(factors, field(scene.means, dirs, extra)["opacity"])
    assert (field(scene.means, dirs, extra.flip(0))["opacity"] - factors).abs().max() > 0.01
    assert scene.bake_opacity_sh(1).shape == (12, 4)
    with pytest.raises(ValueError, match="extra: got None"):
        field(scene.means, dirs)


def test_from_points():
    g = torch.Generator().manual_seed(0)
    xyz = torch.rand(300, 3, generator=g)
    xyz[0] = 100.0
    scene = VDGSScene.from_points(xyz, xyz, sh_degree=2, init_opacity=0.2)
    (low, high), field = scene.field.box, scene.field
    assert 0 <= min(low) < max(low) < 0.05
    assert 0.95 < min(high) < max(high) <= 1.001
    assert (field.target, field.sh_degree, scene.sh_degree) == ("opacity", 2, 2)
    assert scene.opacities[0].item() == pytest.approx(0.2)
    assert VDGSScene.from_points(xyz, xyz, field=field).field is field
    assert VDGSScene.from_points(xyz[:0], xyz[:0]).num_gaussians == 0
    with pytest.raises(ValueError, match="xyz: got"):
        VDGSScene.from_points(xyz[:, :2], xyz)


def test_what_does_not_fit():
    field = field_of("color")
    with pytest.raises(ValueError, match="field: got one for colours of degree 1"):
        VDGSScene(3, field=field)
    for output, operator in (("exp", "add"), ("identity", "mul")):
        with pytest.raises(ValueError, match=f"field: got one with output='{output}'"):
            VDGSScene(3, field=field_of(output=output), operator=operator)
    VDGSScene(3, field=field_of(sh_degree=1), sh_degree=3)  # opacities have no degree
    with pytest.raises(ValueError, match=r"dirs: got lengths like 1\.01"):
        field(torch.zeros(3), torch.tensor([1.01, 0.0, 0.0]))
    field(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="target: got a field for 'color'"):
        VDGSScene(3, field=field, sh_degree=1).bake_opacity_sh()
    with pytest.raises(ValueError, match="degree: got 4"):
        scene_of().bake_opacity_sh(4)
    with pytest.raises(ValueError, match="means, dirs: got"):
        field(torch.zeros(2, 3), torch.zeros(5, 3))
