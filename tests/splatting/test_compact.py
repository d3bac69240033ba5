"""Compact scenes: masks, colours and codebooks against their definitions."""

import math

import pytest
import torch

from torchzoo import ops
from torchzoo.data.splat_scenes import make_scene
from torchzoo.splatting import Cameras, CompactStrategy, GaussianScene, SplatTrainer, compact_rates
from torchzoo.splatting.compact import Compact3DGS
from torchzoo.splatting.compact_color import HashGridColor, contract, harmonics
from torchzoo.splatting.compact_mask import LearnableGaussianMask, hard_mask

SMALL = {"levels": 3, "log2_table": 6, "hidden": 8, "base": 4}


def scene(count=30, *, dtype=torch.float64, **options):
    random = torch.Generator().manual_seed(0)
    xyz = 0.5 * torch.randn(count, 3, generator=random, dtype=dtype)
    torch.manual_seed(1)
    made = Compact3DGS.from_points(xyz, torch.rand(count, 3), field=SMALL, **options)
    made.quats.data = torch.randn(count, 4, generator=random, dtype=dtype)
    made.log_scales.data += 0.5 * torch.randn(count, 3, generator=random, dtype=dtype)
    made.opacity_logits.data = torch.randn(count, generator=random, dtype=dtype)
    made.color.grid.table.data *= 3000  # as after training
    return made


def cameras(dtype=torch.float64, size=24):
    return Cameras.orbit(2, radius=3.0, width=size, height=size, dtype=dtype)


def psnr(a, b):
    return -10 * (a.clamp(0, 1) - b.clamp(0, 1)).square().mean().log10().item()


@pytest.mark.claim(
    26,
    "The mask's gradient is sigmoid'(m) (o g_o' + sum of s g_s') + lambda sigmoid'(m) / N",
    tolerance=1e-7,
)
def test_mask_gradient():
    plain, weight = scene(), 0.3
    plain.mask_logits.data[::4] = -6.0
    target = torch.rand(2, 24, 24, 3, dtype=torch.float64)
    mask = LearnableGaussianMask(30, dtype=torch.float64)
    mask.logits.data.copy_(plain.mask_logits)
    strategy = CompactStrategy(mask_weight=weight)
    strategy.begin(plain, 400)
    image = plain.render(cameras()).image
    ((image - target).square().sum() + strategy.penalty(plain)).backward()
    # the same picture from scales and opacities that are leaves
    open_ = (plain.mask_logits > -4.6).double()
    s = (plain.log_scales.exp() * open_[:, None]).detach().requires_grad_()
    o = (plain.opacity_logits.sigmoid() * open_).detach().requires_grad_()
    again = plain.render(cameras(), scales=s, opacities=o).image
    assert torch.equal(again, image)
    (again - target).square().sum().backward()
    m = plain.mask_logits.detach()
    slope = m.sigmoid() * (1 - m.sigmoid())
    own = plain.opacity_logits.detach().sigmoid() * o.grad
    sizes = (plain.log_scales.detach().exp() * s.grad).sum(-1)
    assert own.abs().max() > 1e-3  # both carry gradient
    assert sizes.abs().max() > 1e-3
    expected = slope * (own + sizes) + weight * slope / 30
    torch.testing.assert_close(plain.mask_logits.grad, expected, atol=1e-7, rtol=1e-7)
    assert torch.equal(mask(), open_)
    (penalty,) = torch.autograd.grad(mask.loss(), mask.logits)
    torch.testing.assert_close(penalty, slope / 30)


@pytest.mark.claim(26, "A mask is 0 or 1, and 0 just where m <= -4.595", tolerance=1e-3)
def test_mask_values():
    edge = math.log(0.01 / 0.99)
    m = torch.tensor([-50.0, edge - 1e-3, edge + 1e-3, 0.0, 50.0], dtype=torch.float64)
    assert hard_mask(m).tolist() == [0, 0, 1, 1, 1]
    mask = LearnableGaussianMask(5, dtype=torch.float64)
    assert mask().tolist() == [1] * 5
    assert mask.loss().item() == pytest.approx(1 / (1 + math.exp(-1)))
    mask.logits.data.copy_(m)
    assert mask.keep().tolist() == [False, False, True, True, True]
    assert LearnableGaussianMask(0).loss().item() == 0


@pytest.mark.claim(
    26,
    "Masks of a wall that is seen rise; splats of the same opacity behind five walls are removed",
)
def test_masks_tell_what_opacities_cannot():
    side, layers = 6, 7
    grid = torch.linspace(-0.6, 0.6, side)
    walls = [
        torch.cartesian_prod(grid, torch.tensor([0.1 * depth]), grid) for depth in range(layers)
    ]
    xyz = torch.cat(walls)
    made = Compact3DGS.from_points(xyz, torch.rand(len(xyz), 3), field=SMALL, init_opacity=0.9)
    made.log_scales.data.fill_(math.log(0.2))
    made.requires_grad_(False)
    made.mask_logits.requires_grad_(True)
    color = torch.where(torch.arange(len(xyz)) < side**2, 1.0, 0.2)[:, None].expand(-1, 3)
    camera = Cameras.look_at(torch.tensor([[0.0, -4.0, 0.0]]), width=16, height=16, fov=20.0)
    front = torch.arange(len(xyz)) < side**2
    target = made.render(camera, features=color, opacities=front.float()).image.detach()
    optimizer = torch.optim.Adam([made.mask_logits], lr=0.1)
    for _ in range(300):
        image = made.render(camera, features=color).image
        loss = (image - target).abs().mean() + 4e-3 * made.mask_logits.sigmoid().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    m = made.mask_logits.detach().view(layers, -1)
    assert (m[0] > 1).all()
    assert not made.kept.view(layers, -1)[5:].any()
    assert made.opacity_logits.unique().numel() == 1


@pytest.mark.claim(26, "A masked scene looks like the scene without those splats", tolerance=1e-6)
def test_masked_equals_pruned():
    made = scene()
    whole = made.render(cameras()).image
    made.mask_logits.data[::3] = -5.0
    image = made.render(cameras()).image
    assert (whole - image).abs().max() > 0.05
    kept = made.kept
    made.keep(kept)
    assert made.num_gaussians == 20
    torch.testing.assert_close(made.render(cameras()).image, image, atol=1e-6, rtol=0)
    made.mask_logits.data.fill_(1.0)
    assert made.kept.all()


def monomials(d):
    """Nine real harmonics with the Condon-Shortley phase, written out."""
    x, y, z = (d / d.norm(dim=-1, keepdim=True)).unbind(-1)
    a, b = math.sqrt(3 / (4 * math.pi)), math.sqrt(15 / math.pi)
    first = [torch.full_like(x, 0.5 / math.sqrt(math.pi)), -a * y, a * z, -a * x]
    second = [
        b / 2 * x * y,
        -b / 2 * y * z,
        math.sqrt(5 / math.pi) / 4 * (3 * z * z - 1),
        -b / 2 * x * z,
        b / 4 * (x * x - y * y),
    ]
    return torch.stack(first + second, -1)


@pytest.mark.claim(
    26,
    "Colours are max(0, 1/2 + MLP(grid(contract(mean)), nine harmonics) / (2 sqrt(pi)))",
    tolerance=1e-10,
)
def test_colors():
    torch.manual_seed(0)
    box = torch.tensor([[-1.0, -2.0, 0.0], [1.0, 2.0, 6.0]], dtype=torch.float64)
    color = HashGridColor(box, **SMALL, dtype=torch.float64)
    torch.nn.init.normal_(color.grid.table)
    means, dirs = (3 * torch.randn(40, 3, dtype=torch.float64) for _ in range(2))
    # the contraction, by hand
    unit = (means - torch.tensor([0.0, 0.0, 3.0])) / torch.tensor([1.0, 2.0, 3.0])
    for row in unit:
        if (length := row.norm()) > 1:
            row *= (2 - 1 / length) / length
    place = unit / 4 + 0.5
    torch.testing.assert_close(contract(means, box), place, atol=1e-12, rtol=0)
    assert place.min() > 0
    assert place.max() < 1
    torch.testing.assert_close(harmonics(2, dirs), monomials(dirs), atol=1e-10, rtol=0)
    hidden = torch.cat([color.grid(place), monomials(dirs)], -1)
    for layer in (color.mlp[0], color.mlp[2]):
        hidden = (hidden @ layer.weight.T + layer.bias).clamp_min(0)
    out = hidden @ color.mlp[4].weight.T + color.mlp[4].bias
    expected = (0.5 + out * (0.5 / math.sqrt(math.pi))).clamp_min(0)
    torch.testing.assert_close(color(means, dirs), expected, atol=1e-10, rtol=0)
    assert len(color.mlp) == 5
    assert harmonics(3, dirs).shape == (40, 16)
    assert color(means, dirs.repeat(2, 1, 1)).shape == (2, 40, 3)


@pytest.mark.claim(26, "No gradient of a colour reaches the means through the grid", tolerance=0)
def test_colors_leave_the_means():
    color = HashGridColor([[-1.0] * 3, [1.0] * 3], **SMALL)
    means = torch.rand(5, 3, requires_grad=True)
    dirs = torch.rand(5, 3, requires_grad=True)
    color(means, dirs).sum().backward()
    assert means.grad is None
    assert dirs.grad.abs().max() > 0
    assert color.grid.table.grad.abs().max() > 0


def test_scene_without_masks_is_a_plain_one():
    made = scene()
    view = cameras()
    plain = ops.rasterize(
        made.means,
        made.quats,
        made.log_scales.exp(),
        made.opacity_logits.sigmoid(),
        made.color(made.means, made.means - view.centers[:, None]),
        view.viewmats,
        view.Ks,
        24,
        24,
    )
    torch.testing.assert_close(made.render(view).image, plain.image)
    torch.testing.assert_close(made(view.viewmats, view.Ks).shape, torch.Size([2, 64, 64, 3]))
    flat = Cameras.for_image(24, 24, dtype=torch.float64)
    assert torch.equal(
        made.colors(flat), made.color(made.means, flat.viewmats[:, 2:3, :3])
    )  # seen along its axis
    names = {name for name, _ in made.named_parameters(recurse=False)}
    assert names == {"means", "quats", "log_scales", "opacity_logits", "mask_logits"}
    made.clone(torch.tensor([3]))
    assert torch.equal(made.mask_logits[-1], made.mask_logits[3])


def test_codebooks_see_what_is_kept():
    made = scene(codebook_size=8)
    with pytest.raises(ValueError, match="use_vq: got True without codebooks"):
        made.render(cameras(), use_vq=True)
    image = made.render(cameras()).image
    made.mask_logits.data[10:] = -9.0
    made.log_scales.data[10:] = 5.0
    made.start_vq(generator=torch.Generator().manual_seed(0))
    assert made.use_vq
    assert made.scale_vq.codebooks.max() < 5  # exp(5) would be 148
    assert (made.rotation_vq.codebooks[0][:, 0] >= 0).all()  # turned to w >= 0
    # the geometry is that of the codes, and straight through
    q = made.quats.detach() / made.quats.detach().norm(dim=-1, keepdim=True)
    q = q * torch.where(q[:, :1] < 0, -1, 1)
    coded = made.rotation_vq.decode(made.rotation_vq.encode(q))
    expected = coded / coded.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(made.unit_quats, expected)
    s = made.log_scales.detach().exp()
    coded = made.scale_vq.decode(made.scale_vq.encode(s)).abs()
    torch.testing.assert_close(made.scales[:10], coded[:10])
    assert not made.scales[10:].any()
    total = made.scale_vq(s[:10])[2] + made.rotation_vq(q[:10])[2]
    torch.testing.assert_close(made.codebook_loss(), total)
    strategy = CompactStrategy(mask_weight=0.0)
    strategy.begin(made, 400)
    torch.testing.assert_close(strategy.penalty(made), total)
    made.mask_logits.data.fill_(1.0)
    assert not torch.equal(made.render(cameras()).image, image)
    made.log_scales.grad = None
    made.scales.sum().backward()
    sign = made.scale_vq.decode(made.scale_vq.encode(s)).sign()
    torch.testing.assert_close(made.log_scales.grad, s * sign)


@pytest.mark.claim(
    26, "A baked scene of degree 3 looks like the compact one to 35 dB", tolerance=None
)
def test_bake():
    views = make_scene("glossy", 10, 24, n_points=300)
    made = Compact3DGS.from_points(views.points, views.colors, field=SMALL)
    trainer = SplatTrainer(
        made,
        views.cameras,
        views.images,
        steps=60,
        strategy=CompactStrategy(cap_max=300),
        rates=compact_rates(60),
    )
    trainer.fit()
    made.mask_logits.data[::10] = -9.0
    baked = made.bake()
    assert type(baked) is GaussianScene
    assert baked.num_gaussians == made.kept.sum()
    with torch.no_grad():
        live, plain = (s.render(views.cameras).image for s in (made, baked))
        first = baked.render(views.cameras, sh_degree=0).image
    assert psnr(live, plain) >= 35
    assert psnr(live, first) < psnr(live, plain)  # it needs the directions


def test_training_removes_closed_masks():
    made = scene(40, dtype=torch.float32)
    images = torch.rand(2, 24, 24, 3)
    strategy = CompactStrategy(refine_start=1000, mask_weight=0.5)
    view = cameras(torch.float32)
    trainer = SplatTrainer(
        made, view, images, steps=20, strategy=strategy, rates=compact_rates(20), seed=1
    )
    assert trainer.rates["mask_logits"] == 0.1
    made.mask_logits.data[::4] = -9.0
    rates = []

    def note(step):
        groups = {group["name"]: group["lr"] for group in step.optimizer.param_groups}
        rates.append(groups["color.grid.table"])
        assert groups["scale_vq.codebooks"] == 1e-4

    trainer.callbacks = (note,)
    trainer.fit()
    assert made.num_gaussians <= 30  # at the end at the latest
    assert made.use_vq
    assert strategy.codebooks_from == 18
    # rises from 1 % over 10 steps, and falls to a third at steps 3, 10 and 17
    factors = [0.01 + 0.99 * min(1, k / 10) for k in range(20)]
    falls = [sum(k >= at for at in (3, 10, 17)) for k in range(20)]
    expected = [0.01 * f * 0.33**n for f, n in zip(factors, falls, strict=True)]
    assert rates == pytest.approx(expected, rel=1e-6)
    full = CompactStrategy()
    full.begin(scene(4), 30_000)
    assert (full.weight, full.codebooks_from) == (5e-4, 29_000)
    assert compact_rates(30_000)["mask_logits"] == 0.01
    with pytest.raises(ValueError, match="scene: got GaussianScene"):
        CompactStrategy().begin(GaussianScene(3), 10)
    with pytest.raises(ValueError, match="mask_weight"):
        CompactStrategy(mask_weight=-1.0)


def test_a_resumed_run_ends_the_same(tmp_path):
    view, images = cameras(torch.float32), torch.rand(2, 24, 24, 3)

    def run(made, folder, stop):
        options = {"refine_start": 1, "refine_every": 3, "refine_stop": 8, "vq_start": 6}
        trainer = SplatTrainer(
            made, view, images, steps=12, strategy=CompactStrategy(**options),
            rates=compact_rates(12),
        )  # fmt: skip

        def halt(step):
            if step.number == stop:
                raise KeyboardInterrupt

        trainer.callbacks = (halt,)
        trainer.fit(out=folder, save_every=4, resume=True)

    with pytest.raises(KeyboardInterrupt):
        run(scene(dtype=torch.float32), tmp_path / "a", 9)
    ends = [scene(dtype=torch.float32), scene(dtype=torch.float32)]
    run(ends[0], tmp_path / "a", 0)
    run(ends[1], tmp_path / "b", 0)
    assert ends[0].use_vq
    for name, value in ends[1].state_dict().items():
        assert torch.equal(ends[0].state_dict()[name], value), name
