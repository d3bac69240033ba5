"""Densification strategies on hand-made scenes: which splats they change, and to what."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from torchzoo.splatting.protocol import DensifyStrategy, TrainStep
from torchzoo.splatting.rotations import quat_to_matrix
from torchzoo.splatting.scene import GaussianScene
from torchzoo.splatting.schedules import adam
from torchzoo.splatting.strategy import DefaultStrategy, MCMCStrategy

GROUPS = ("means", "quats", "log_scales", "opacity_logits", "sh0", "shN")


def make_scene(scales, opacities, *, dtype=torch.float64):
    """Splats of these largest scales and opacities, all else random."""
    random = torch.Generator().manual_seed(3)
    count = len(scales)

    def draw(*shape):
        return torch.randn(count, *shape, generator=random, dtype=dtype)

    flat = torch.tensor(scales, dtype=dtype)[:, None] * torch.tensor([0.5, 1.0, 0.25], dtype=dtype)
    opacity = torch.tensor(opacities, dtype=dtype)
    return GaussianScene.from_tensors(draw(3), draw(4), flat.log(), opacity.logit(), draw(4, 3))


def with_moments(scene):
    """An Adam that has done three steps, so that all moments are there and differ."""
    optimizer = adam(scene)
    random = torch.Generator().manual_seed(4)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(3):
        for parameter in scene.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
        optimizer.step()
    return optimizer


def moments(scene, optimizer, name, key="exp_avg"):
    return optimizer.state[scene.get_parameter(name)][key]


def make_step(scene, number, *, gradient=None, visible=None, views=1, optimizer=None, seed=0):
    """A training step whose pictures have 40 × 20 pixels; gradients of places, `(C, N, 2)`."""
    means2d = torch.zeros(
        views, scene.num_gaussians, 2, dtype=scene.means.dtype, requires_grad=True
    )
    means2d.grad = gradient
    if visible is None:
        visible = torch.ones(views, scene.num_gaussians, dtype=torch.bool)
    radii = visible[..., None].expand(-1, -1, 2).int() * 3
    return TrainStep(
        number=number,
        scene=scene,
        optimizer=optimizer or with_moments(scene),
        views=torch.arange(views),
        output=SimpleNamespace(info={"means2d": means2d, "radii": radii}),
        target=torch.zeros(0),
        size=(20, 40),
        scene_scale=2.0,
        means_rate=1e-4,
        generator=torch.Generator().manual_seed(seed),
    )


def refine(strategy, scene, values, number=50, steps=300):
    """One refinement of a scene whose splats have these mean gradients; the step that did it."""
    strategy.begin(scene, steps)
    step = make_step(scene, number)
    strategy.load_state_dict(
        {
            "grad2d": torch.tensor(values, dtype=torch.float64) * 7,
            "count": torch.full((len(values),), 7.0, dtype=torch.float64),
        }
    )
    strategy.after_step(step)
    return step


@pytest.mark.parametrize(
    ("kind", "steps", "expected"),
    [
        (DefaultStrategy, 30_000, (500, 15_000, 100)),
        (DefaultStrategy, 60_000, (500, 15_000, 100)),
        (DefaultStrategy, 9_000, (150, 4_500, 30)),
        (DefaultStrategy, 300, (25, 150, 25)),
        (MCMCStrategy, 30_000, (500, 25_000, 100)),
        (MCMCStrategy, 300, (25, 250, 25)),
    ],
)
def test_step_counts_scale_with_the_run(kind, steps, expected):
    strategy = kind()
    strategy.begin(None, steps)
    assert strategy.schedule() == expected
    start, stop, every = expected
    tried = range(5, steps + 1, 5)
    due = [number for number in tried if strategy.is_due(number)]
    assert due == [number for number in tried if start < number < stop and number % every == 0]
    given = kind(refine_start=3, refine_stop=11, refine_every=4)
    given.begin(None, steps)
    assert [n for n in range(1, 300) if given.is_due(n)] == [4, 8]


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, 30_000, [3000, 6000, 9000, 12_000]),
        ({}, 3_000, [300, 600, 900, 1200]),
        ({}, 2_999, []),
        ({"reset_every": 50}, 300, [50, 100]),
        ({"reset_every": 0}, 30_000, []),
    ],
)
def test_when_opacities_are_reset(options, steps, expected):
    strategy = DefaultStrategy(refine_every=10**6, **options)
    scene = make_scene([0.1, 0.1], [0.9, 0.003])
    strategy.begin(scene, steps)
    optimizer = with_moments(scene)
    done = []
    stride = 50 if steps < 10_000 else 500
    for number in range(stride, steps + 1, stride):
        scene.opacity_logits.data = torch.tensor([0.9, 0.003], dtype=torch.float64).logit()
        strategy.after_step(make_step(scene, number, optimizer=optimizer))
        found = scene.opacities.tolist()
        assert found[1] == pytest.approx(0.003)
        if found[0] < 0.5:
            assert found[0] == pytest.approx(0.01)
            done.append(number)
    assert done == expected
    reset = moments(scene, optimizer, "opacity_logits")
    assert (reset == 0).all() == bool(expected)
    assert (moments(scene, optimizer, "means") != 0).all()


def test_statistics_are_mean_gradients_in_half_pictures_over_the_views_that_show_a_splat():
    scene = make_scene([0.1] * 3, [0.5] * 3)
    strategy = DefaultStrategy()
    strategy.begin(scene, 300)
    random = torch.Generator().manual_seed(0)
    total, count = np.zeros(3), np.zeros(3)
    for number in (1, 2, 3):
        gradient = torch.randn(2, 3, 2, generator=random, dtype=torch.float64)
        visible = torch.tensor([[True, False, True], [number == 2, False, True]])
        step = make_step(scene, number, gradient=gradient, visible=visible, views=2)
        strategy.after_backward(step)
        for view in range(2):
            for splat in range(3):
                if visible[view, splat]:
                    x, y = gradient[view, splat].tolist()
                    total[splat] += math.hypot(x * 40 / 2 * 2, y * 20 / 2 * 2)
                    count[splat] += 1
    np.testing.assert_allclose(strategy.grad2d.numpy(), total, rtol=1e-12)
    assert strategy.count.tolist() == count.tolist() == [4, 0, 6]
    strategy.after_backward(make_step(scene, 150, gradient=gradient, views=2))
    np.testing.assert_allclose(strategy.grad2d.numpy(), total, rtol=1e-12)  # past the stop


def test_the_absolute_gradient_is_another_sum_with_another_threshold():
    scene = make_scene([0.1], [0.5])
    strategy = DefaultStrategy(absgrad=True)
    assert (strategy.threshold, DefaultStrategy().threshold) == (8e-4, 2e-4)
    assert DefaultStrategy(absgrad=True, grow_grad2d=3e-4).threshold == 3e-4
    strategy.begin(scene, 300)
    step = make_step(scene, 1, gradient=torch.zeros(1, 1, 2, dtype=torch.float64))
    step.output.info["means2d"].absgrad = torch.tensor([[[0.3, 0.4]]], dtype=torch.float64)
    strategy.after_backward(step)
    assert strategy.grad2d.item() == pytest.approx(math.hypot(0.3 * 20, 0.4 * 10))


def test_who_is_cloned_split_and_pruned():
    # scene scale 2: up to 0.02 is small, above 0.2 too big once that counts
    scales = [0.02, 0.0201, 0.02, 0.0201, 0.02, 0.5]
    opacities = [0.5, 0.5, 0.5, 0.5, 0.0049, 0.5]
    scene = make_scene(scales, opacities)
    before = {name: value.detach().clone() for name, value in scene.named_parameters()}
    optimizer = with_moments(scene)
    first = {name: moments(scene, optimizer, name).clone() for name in GROUPS}
    second = {name: moments(scene, optimizer, name, "exp_avg_sq").clone() for name in GROUPS}
    strategy = DefaultStrategy(prune_big_after=1000)
    strategy.begin(scene, 300)
    gradients = torch.tensor([2.1e-4, 2.1e-4, 2e-4, 2e-4, 1.0, 1e-9], dtype=torch.float64)
    strategy.load_state_dict({"grad2d": gradients * 3, "count": gradients.new_full((6,), 3.0)})
    strategy.after_step(make_step(scene, 50, optimizer=optimizer))
    # 0 is cloned; 1 split, which leaves its place; 4 and its clone are too transparent
    kept = [0, 2, 3, 5]
    assert scene.num_gaussians == len(kept) + 1 + 2
    for name in GROUPS:
        value = scene.get_parameter(name).detach()
        assert torch.equal(value[:4], before[name][kept]), name
        assert torch.equal(value[4], before[name][0]), name
        for key, old in (("exp_avg", first), ("exp_avg_sq", second)):
            found = moments(scene, optimizer, name, key)
            assert torch.equal(found[:4], old[name][kept]), name
            assert (found[4:] == 0).all(), name
        assert moments(scene, optimizer, name, "step").item() == 3
    child = {name: value.detach()[5:] for name, value in scene.named_parameters()}
    torch.testing.assert_close(child["log_scales"].exp() * 1.6, before["log_scales"][[1, 1]].exp())
    for name in ("quats", "opacity_logits", "sh0", "shN"):
        assert torch.equal(child[name], before[name][[1, 1]]), name
    assert (child["means"] != before["means"][1]).all()
    assert strategy.grad2d.tolist() == strategy.count.tolist() == [0] * 7


def test_the_large_go_late():
    for number, left in ((50, 3), (75, 2)):
        scene = make_scene([0.1, 0.199, 0.201], [0.5] * 3)
        refine(DefaultStrategy(prune_big_after=60), scene, [0.0] * 3, number)
        assert scene.num_gaussians == left
    scene = make_scene([0.1, 0.201], [0.5] * 2)
    refine(DefaultStrategy(), scene, [0.0] * 2, 50, steps=300)  # 3,000 of 30,000 are 30 of 300
    assert scene.num_gaussians == 1


def test_split_splats_are_draws_of_the_old_one():
    count = 20_000
    scene = make_scene([0.5], [0.6])
    scene = scene_of_copies(scene, count)
    mean, covariance = scene.means[0].detach(), scene.covariances()[0].detach()
    refine(DefaultStrategy(prune_big_after=1000), scene, [1.0] * count)
    assert scene.num_gaussians == 2 * count
    offset = scene.means.detach() - mean
    assert offset.mean(0).norm() < 4 * (covariance.trace() / (2 * count)).sqrt()
    torch.testing.assert_close(offset.T @ offset / (2 * count), covariance, rtol=0.05, atol=2e-3)
    halves = offset[:count] * offset[count:]
    assert (halves.mean(0).abs() < 4 * halves.std(0) / count**0.5).all()  # the two are independent
    torch.testing.assert_close(
        scene.covariances().detach(), (covariance / 1.6**2).expand(2 * count, 3, 3)
    )
    assert scene.opacities.unique().item() == pytest.approx(0.6)


def test_the_revised_opacity_lets_as_much_light_through():
    scene = make_scene([0.5], [0.64])
    refine(DefaultStrategy(revised_opacity=True, prune_big_after=1000), scene, [1.0])
    np.testing.assert_allclose(scene.opacities.tolist(), [0.4, 0.4], rtol=1e-12)


def test_at_the_cap_the_highest_gradients_grow():
    scene = make_scene([0.01, 0.5, 0.01, 0.5, 0.01], [0.5, 0.51, 0.52, 0.53, 0.54])
    refine(DefaultStrategy(cap_max=7, prune_big_after=1000), scene, [0.1, 0.9, 0.5, 0.2, 1e-5])
    grown = sorted(round(o, 3) for o in scene.opacities.tolist())
    assert grown == [0.5, 0.51, 0.51, 0.52, 0.52, 0.53, 0.54]
    full = make_scene([0.01] * 3, [0.5] * 3)
    refine(DefaultStrategy(cap_max=2), full, [0.1] * 3)
    assert full.num_gaussians == 3


def test_draws_come_from_the_step_alone():
    def run(seed):
        scene = make_scene([0.5, 0.6], [0.5, 0.6])
        strategy = DefaultStrategy(prune_big_after=1000)
        strategy.begin(scene, 300)
        torch.rand(seed + 1)  # the global generator is somewhere else each time
        strategy.load_state_dict({"grad2d": torch.ones(2), "count": torch.ones(2)})
        strategy.after_step(make_step(scene, 50, seed=seed))
        return scene.means.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_statistics_start_anew_when_the_scene_was_edited_elsewhere():
    scene = make_scene([0.1] * 3, [0.5] * 3)
    strategy = DefaultStrategy()
    strategy.begin(scene, 300)
    strategy.after_backward(make_step(scene, 1, gradient=torch.ones(1, 3, 2).double()))
    optimizer = with_moments(scene)
    scene.keep(torch.tensor([0, 2]), optimizer)
    strategy.after_backward(make_step(scene, 2, gradient=torch.ones(1, 2, 2).double()))
    assert strategy.count.tolist() == [1, 1]


def scene_of_copies(scene, count):
    values = {n: v.detach().expand(count, *v.shape[1:]) for n, v in scene.named_parameters()}
    sh = torch.cat([values.pop("sh0"), values.pop("shN")], 1)
    return GaussianScene.from_tensors(**values, sh=sh)


def held_back(opacity, scale, count):
    """The integral over a line of 1 - (1 - a)^n, a the opacity of one Gaussian."""
    inner = lambda x: 1 - (1 - opacity * math.exp(-(x**2) / (2 * scale**2))) ** count  # noqa: E731
    return integrate.quad(inner, -12 * scale, 12 * scale, epsabs=1e-12, limit=200)[0]


@pytest.mark.parametrize(("opacity", "count"), [(0.9, 3), (0.3, 7), (0.99, 51)])
def test_relocation_keeps_the_integral_of_the_composite(opacity, count):
    """One living splat and `count - 1` dead ones, which all go to it."""
    scene = make_scene([0.4] * count, [opacity] + [0.001] * (count - 1))
    before = scene.scales[0].detach().clone()
    optimizer = with_moments(scene)
    strategy = MCMCStrategy(cap_max=0, noise=0.0)
    strategy.begin(scene, 300)
    strategy.after_step(make_step(scene, 50, optimizer=optimizer))
    assert scene.num_gaussians == count
    for name in GROUPS:
        value = scene.get_parameter(name).detach()
        assert (value == value[0]).all(), name
        assert (moments(scene, optimizer, name)[0] == 0).all(), name
    new, scales = scene.opacities[0].item(), scene.scales[0].detach()
    assert 1 - (1 - new) ** count == pytest.approx(opacity, abs=1e-9)
    for axis in range(3):
        old = held_back(opacity, before[axis].item(), 1)
        assert held_back(new, scales[axis].item(), count) == pytest.approx(old, abs=1e-6)


def test_the_dead_go_to_the_living_by_opacity():
    living, count = [0.2, 0.4, 0.6, 0.8], 4000
    scene = make_scene([0.1] * (4 + count), living + [0.004] * count)
    scene.sh0.data[:, 0, 0] = torch.arange(4 + count)  # a name tag, which is copied
    strategy = MCMCStrategy(cap_max=0, noise=0.0)
    strategy.begin(scene, 300)
    strategy.after_step(make_step(scene, 50))
    owner = scene.sh0.detach()[:, 0, 0].long()
    assert owner.max() == 3
    found = torch.bincount(owner[4:], minlength=4).numpy()
    odds = np.array(living) / sum(living)
    assert stats.chisquare(found, odds * count).pvalue > 1e-3
    assert (scene.opacities >= 0.005 - 1e-12).all()


def test_those_that_are_not_involved_stay():
    scene = make_scene([0.1, 0.2, 0.3], [0.999, 0.001, 1e-2])
    optimizer = with_moments(scene)
    before = {n: moments(scene, optimizer, n)[2].clone() for n in GROUPS}
    opacity = scene.opacities[2].item()
    strategy = MCMCStrategy(cap_max=0, noise=0.0, min_opacity=0.0011)
    strategy.begin(scene, 300)
    scene.opacity_logits.data[2] = -40.0  # never drawn, and alive only for a lower bar
    scene.opacity_logits.data[2] = torch.tensor(opacity, dtype=torch.float64).logit()
    strategy.after_step(make_step(scene, 50, optimizer=optimizer, seed=1))
    assert scene.opacities[2].item() == opacity
    assert all(torch.equal(moments(scene, optimizer, n)[2], before[n]) for n in GROUPS)


def test_growth_is_five_percent_up_to_the_cap():
    for cap, expected in ((1000, 105), (103, 103), (90, 100)):
        scene = make_scene([0.1] * 100, [0.5] * 100)
        optimizer = with_moments(scene)
        strategy = MCMCStrategy(cap_max=cap, noise=0.0)
        strategy.begin(scene, 300)
        total = 100 * held_back(0.5, 0.1, 1)
        strategy.after_step(make_step(scene, 50, optimizer=optimizer))
        assert scene.num_gaussians == expected
        assert (moments(scene, optimizer, "means")[100:] == 0).all()
        strategy.after_step(make_step(scene, 49, optimizer=optimizer))  # not due
        assert scene.num_gaussians == expected
        # every group of a source and its copies holds back what the source did
        groups, sizes = scene.sh0[:, 0, 0].unique(return_counts=True)
        found = 0.0
        for tag, size in zip(groups.tolist(), sizes.tolist(), strict=True):
            row = (scene.sh0[:, 0, 0] == tag).nonzero()[0, 0]
            found += held_back(scene.opacities[row].item(), scene.scales[row, 1].item(), size)
        assert found == pytest.approx(total, rel=1e-6)


def test_noise_has_the_covariance_of_the_splat_times_itself():
    count, rate = 20_000, 1e-4
    for opacity in (0.005, 0.02, 0.3):
        scene = scene_of_copies(make_scene([0.5], [opacity]), count)
        covariance, start = scene.covariances()[0].detach(), scene.means.detach().clone()
        strategy = MCMCStrategy()
        strategy.begin(scene, 300)
        strategy.after_step(make_step(scene, 1))
        offset = scene.means.detach() - start
        size = rate * 5e5 / (1 + math.exp(100 * (opacity - 0.005)))
        expected = covariance @ covariance * size**2
        torch.testing.assert_close(
            offset.T @ offset / count, expected, rtol=0.05, atol=0.02 * expected.abs().max().item()
        )


def test_the_penalty_is_a_hundredth_of_mean_opacity_and_scale():
    scene = make_scene([0.4, 0.8], [0.3, 0.9])
    expected = 0.01 * 0.6 + 0.01 * (0.4 + 0.8) / 2 * (0.5 + 1 + 0.25) / 3
    assert MCMCStrategy().penalty(scene).item() == pytest.approx(expected)
    assert DefaultStrategy().penalty(scene) == 0
    assert MCMCStrategy().penalty(GaussianScene(0)) == 0


@pytest.mark.parametrize("strategy", [DefaultStrategy(), MCMCStrategy(), DensifyStrategy()])
def test_no_splats_at_all(strategy):
    scene = GaussianScene(0, dtype=torch.float64)
    strategy.begin(scene, 300)
    step = make_step(scene, 50, gradient=torch.zeros(1, 0, 2, dtype=torch.float64))
    strategy.before_backward(step)
    strategy.after_backward(step)
    strategy.after_step(step)
    assert scene.num_gaussians == 0


def test_all_dead_splats_stay():
    scene = make_scene([0.1] * 3, [0.001] * 3)
    strategy = MCMCStrategy(noise=0.0)
    strategy.begin(scene, 300)
    strategy.after_step(make_step(scene, 50))
    np.testing.assert_allclose(scene.opacities.tolist(), [0.001] * 3)


def test_options():
    one, other = DefaultStrategy(cap_max=5), DefaultStrategy(cap_max=6)
    assert one.config()["cap_max"] == 5
    assert one.config() != other.config()
    assert one.config() == DefaultStrategy(cap_max=5).config()
    assert DensifyStrategy().config() == {"strategy": "DensifyStrategy"}
    for kind, option in (
        (DefaultStrategy, {"refine_every": 0}),
        (DefaultStrategy, {"refine_start": -1}),
        (DefaultStrategy, {"cap_max": -1}),
        (DefaultStrategy, {"reset_every": -1}),
        (MCMCStrategy, {"cap_max": -1}),
    ):
        (name,) = option
        with pytest.raises(ValueError, match=f"{name}: got"):
            kind(**option)


def test_rotations_count_in_the_noise():
    """A thin splat is shaken along its long axis only."""
    turn = torch.tensor([[math.cos(0.4), 0.0, math.sin(0.4), 0.0]], dtype=torch.float64)
    flat = torch.tensor([[1.0, 1e-6, 1e-6]], dtype=torch.float64)
    scene = GaussianScene.from_tensors(
        torch.zeros(1, 3, dtype=torch.float64),
        turn,
        flat.log(),
        turn.new_zeros(1),
        turn.new_zeros(1, 1, 3),
    )
    scene.opacity_logits.data.fill_(-8.0)
    strategy = MCMCStrategy(refine_start=10**6)
    strategy.begin(scene, 300)
    strategy.after_step(make_step(scene, 1))
    axis = quat_to_matrix(turn)[0] @ turn.new_tensor([1.0, 0.0, 0.0])
    moved = scene.means.detach()[0]
    assert moved.norm() > 1e-3
    assert torch.linalg.cross(moved, axis).norm() < 1e-9 * moved.norm() + 1e-9
