"""Where Turbo-GS adds splats, on hand-made gradients and in small runs."""

import pytest
import torch

from tests.splatting.runs import l1, splats, trainer, views
from tests.splatting.turbo_steps import DOUBLE, OFTEN, scene_of, step_of
from torchzoo.ops import rasterize, sh_to_rgb, spherical_harmonics
from torchzoo.splatting import (
    Cameras,
    ConvergenceBudget,
    SplatTrainer,
    TurboStrategy,
    densify_points,
)

LARGE, SMALL = 0.1, 0.01  # the scenes' scale is 2, the limit of cloning 0.02


def chosen(places, colors, *, visible=None, scales=None, cap=100, seed=0, runs=3, **options):
    """Rows that are cloned and split at a refinement after steps with these gradients."""
    scene = scene_of(scales or [SMALL] * len(places))
    strategy = TurboStrategy(cap_max=cap, **{"color_prob": 1.0, "visit_quantile": 0.0} | options)
    strategy.begin(scene, 300)
    for number in range(1, runs + 1):
        seen = None if visible is None else [number <= times for times in visible]
        step = step_of(scene, number, places, colors, seen, seed)
        strategy.after_backward(step)
    step.number = 149  # nearly all is allowed
    return tuple(mask.nonzero().flatten().tolist() for mask in strategy.select(step))


@pytest.mark.claim(
    159,
    "Candidates are splats whose mean gradient of the place reaches 2e-4, or of the colour 2e-6; "
    "large ones are split, small ones cloned",
    tolerance=0.01,
)
def test_thresholds():
    places = [1.99e-4, 2.01e-4, 0, 0, 3e-4, 0]
    colors = [0, 0, 1.99e-6, 2.01e-6, 0, 4e-6]
    scales = [SMALL, SMALL, SMALL, SMALL, LARGE, LARGE]
    assert chosen(places, colors, scales=scales) == ([1, 3], [4, 5])
    assert chosen(places, colors, scales=scales, color_prob=0.0) == ([1], [4])
    assert chosen(places, colors, scales=scales, color_ratio=0.015) == ([1], [4, 5])
    defaults = TurboStrategy(cap_max=9)
    assert (defaults.grow_grad2d, defaults.color_ratio, defaults.color_prob) == (2e-4, 0.01, 0.2)
    assert (defaults.visit_quantile, defaults.prune_share) == (0.5, 0.0)
    with pytest.raises(TypeError, match="cap_max"):
        TurboStrategy()


def test_the_strongest_by_both_gradients_come_first():
    places = [4e-4, 8e-4, 0, 2.2e-4, 5e-4]  # 2, 4, 0, 1.1 and 2.5 thresholds
    colors = [6e-6, 0, 7e-6, 1e-6, 0]  # 3, 0, 3.5, 0.5 and 0
    assert chosen(places, colors, cap=8)[0] == [0, 1, 2]
    assert chosen(places, colors, cap=6)[0] == [0]
    assert chosen(places, colors, cap=7, color_prob=0.0)[0] == [1, 4]
    assert chosen(places, colors, cap=5)[0] == []


@pytest.mark.claim(
    159, "Splats seen less than half as often as the median splat never spawn", tolerance=0
)
def test_rarely_seen_splats_do_not_spawn():
    visible = [10, 8, 7, 4, 3, 1, 0, 0, 0, 0, 9, 10]  # of the seen the median is 7 to 8
    places = [1e-3] * 12
    found = chosen(places, [1e-3] * 12, visible=visible, runs=10, visit_quantile=0.5)
    assert found == ([0, 1, 2, 3, 10, 11], [])
    found = chosen(places, [0] * 12, visible=visible, runs=10, visit_quantile=0.1)
    assert found == ([0, 1, 2, 3, 4, 5, 10, 11], [])
    assert chosen([1e-3] * 3, [1e-3] * 3, visible=[0, 0, 0], visit_quantile=0.5) == ([], [])


@pytest.mark.claim(
    159,
    "A textureless splat of the wrong colour, whose place has no gradient, is a candidate by its "
    "colour, and never without the colours; the same draws give the same splats",
    tolerance=None,
)
def test_colors_find_what_places_do_not():
    """A splat on the axis of a picture that is symmetric about it."""
    picked = []
    for probability, seeds in ((1.0, (0,)), (0.0, (0,)), (0.2, range(60)), (0.2, range(60))):
        rows = []
        for seed in seeds:
            scene = scene_of([0.4])
            scene.means.data.zero_()
            view = Cameras(
                torch.eye(4, dtype=DOUBLE)[None], torch.eye(3, dtype=DOUBLE)[None] * 20, 20, 20
            )
            view.viewmats[:, 2, 3], view.Ks[:, :2, 2], view.Ks[:, 2, 2] = 4, 10, 1
            output = scene.render(view)
            draws = torch.Generator().manual_seed(seed)
            strategy = TurboStrategy(cap_max=2, color_prob=probability, generator=draws)
            strategy.begin(scene, 300)
            step = step_of(scene, 3, [0], [0])
            step.output, step.size = output, (20, 20)
            strategy.before_backward(step)
            (output.image - 0.9).abs().mean().backward()
            strategy.after_backward(step)
            assert strategy.grad2d.max() < 1e-12 * strategy.color.min()
            step.number = 149
            rows.append(strategy.select(step)[1].tolist())
        picked.append(rows)
    always, never, sometimes, again = picked
    assert (always, never) == ([[True]], [[False]])
    assert sometimes == again
    assert 5 <= sometimes.count([True]) <= 20  # 12 expected


@pytest.mark.claim(
    159,
    "The gradient of a colour is the length of the loss's derivative by the blended colour, for "
    "each view that shows it, times the number of views",
    tolerance=1e-9,
)
def test_gradients_of_colors():
    cameras, images = views(3, dtype=DOUBLE)
    scene, strategy = splats(dtype=DOUBLE), TurboStrategy(cap_max=100)
    strategy.begin(scene, 300)
    step = step_of(scene, 3, [0] * 25, [0] * 25)
    step.output, step.views = scene.render(cameras), torch.arange(3)
    strategy.before_backward(step)
    l1(step.output.image, images).backward()
    strategy.after_backward(step)
    means = scene.means.detach()
    shown = [sh_to_rgb(spherical_harmonics(1, means - o, scene.sh)) for o in cameras.centers]
    shown = torch.stack(shown).detach().requires_grad_()
    found = scene.render(cameras, features=shown, sh_degree=None)
    (gradient,) = torch.autograd.grad(l1(found.image, images), shown)
    visible = (found.info["radii"] > 0).all(-1)
    expected = 3 * (gradient.square().sum(-1).sqrt() * visible).sum(0)
    assert expected.min() > 0
    torch.testing.assert_close(strategy.color, expected, rtol=1e-9, atol=0)
    assert torch.equal(strategy.count, visible.sum(0).double())
    resumed = TurboStrategy(cap_max=100)
    resumed.load_state_dict(strategy.state_dict())
    assert torch.equal(resumed.color, strategy.color)


@pytest.mark.claim(
    159,
    "In a run there are never more splats than the budget allows by then, nor than the cap, and "
    "it is used",
    tolerance=0,
)
@pytest.mark.parametrize("lam", [0.0, 0.9])
def test_runs_keep_to_the_budget(lam):
    budget = ConvergenceBudget(25, 70, lam=lam)
    strategy = TurboStrategy(
        cap_max=60, grow_grad2d=1e-9, prune_opacity=0.0, budget=budget, **OFTEN
    )
    counts, allowed = [], []

    def note(step):
        counts.append(step.scene.num_gaussians)
        allowed.append(strategy.allowed(step.number))
        if strategy.is_due(step.number):
            at = (step.number - 2) / 16
            t, alpha = 1 + 99 * at, budget.alpha
            curve = 25 + (t**alpha - 1) / (100**alpha - 1) * 45
            assert counts[-1] >= min(60, int(curve)), "room was left"

    losses = trainer(strategy=strategy, callbacks=[note]).fit()["loss"]
    same = ConvergenceBudget(25, 70, lam=lam)
    for number, loss in enumerate(losses[:17], 1):  # as long as splats are added
        same.update(number, loss)
    assert budget.exponents() == same.exponents() != (0.0, 0.0)
    assert all(n <= most <= 60 for n, most in zip(counts, allowed, strict=True))
    assert counts[0] == 25
    assert counts[-1] == (60 if lam == 0 else min(60, allowed[14]))
    events = [k + 1 for k in range(1, 20) if counts[k] > counts[k - 1]]
    assert events == [n for n in (3, 6, 9, 12, 15) if n in events]
    assert len(events) >= 4
    assert allowed[0] == 25
    assert lam or counts[5] == round(25 + 45 * 4 / 16)


@pytest.mark.claim(
    159,
    "A step on four views in the last tenth is the step on the mean of their gradients, at twice "
    "the rate",
    tolerance=1e-6,
)
def test_final_batches_are_mean_gradients():
    cameras, images = views(dtype=DOUBLE)
    scene = splats(sh_degree=0, dtype=DOUBLE)
    before, drawn = {}, []

    def note(step):
        drawn.append(step.views)
        if step.number == 9:
            for name, p in scene.named_parameters():
                state = step.optimizer.state[p]
                before[name] = [
                    x.detach().clone() for x in (p, state["exp_avg"], state["exp_avg_sq"])
                ]

    run = SplatTrainer(scene, cameras, images, steps=10, final_batch=4, callbacks=[note])
    run.fit()
    assert [len(one) for one in drawn] == [1] * 9 + [4]
    start = splats(sh_degree=0, dtype=DOUBLE)
    for name, (value, _, _) in before.items():
        start.get_parameter(name).data.copy_(value)
    for view in drawn[-1]:
        one = cameras[view[None]]
        (run.loss(start.render(one).image, images[view[None]]) / 4).backward()
    for name, (value, mean, square) in before.items():
        gradient = start.get_parameter(name).grad
        decays = 1 - 4 * (1 - 0.9), 1 - 4 * (1 - 0.999)
        mean = decays[0] * mean + (1 - decays[0]) * gradient
        square = decays[1] * square + (1 - decays[1]) * gradient**2
        rate = 2 * run.rates[name] * (0.01**0.9 if name == "means" else 1)
        root = (square / (1 - decays[1] ** 10)).sqrt() + 1e-15 / 2
        expected = value - rate * mean / (1 - decays[0] ** 10) / root
        torch.testing.assert_close(scene.get_parameter(name).detach(), expected, rtol=0, atol=1e-6)
        assert name == "shN" or (expected - value).abs().max() > 2e-5, name


def test_resumed_runs_are_the_same(tmp_path):
    options = {"cap_max": 60, "grow_grad2d": 1e-5, "prune_share": 0.2, "color_prob": 0.5}

    def run(**more):
        strategy = TurboStrategy(generator=torch.Generator().manual_seed(5), **options, **OFTEN)
        return trainer(strategy=strategy, dilation=2, final_batch=2, **more)

    whole, killed, rest = run(), run(), run()
    whole.fit()

    def stop(done, *_):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.fit(out=tmp_path, save_every=4, progress=stop)
    rest.fit(out=tmp_path, resume=True)
    assert rest.history["splats"] == whole.history["splats"]
    assert len(set(whole.history["splats"])) > 3
    for name, value in whole.scene.state_dict().items():
        assert torch.equal(rest.scene.state_dict()[name], value), name


def test_more_points():
    xyz = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1.25, 0, 0], [3.25, 0, 0]])
    rgb = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    points, colors = densify_points(xyz, rgb, factor=1.5)
    expected = torch.tensor([[0.5, 0, 0], [2.25, 0, 0]])
    torch.testing.assert_close(points, torch.cat([xyz, expected]))
    torch.testing.assert_close(colors[4:], torch.tensor([[0.5, 0, 0], [0, 0.5, 0.5]]))
    pair = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [4, 0, 0], [5, 0, 0]])  # one midpoint a pair
    assert densify_points(pair, rgb, factor=1.25)[0][4:].tolist() == [[4.5, 0, 0]]
    cloud = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    points, _ = densify_points(cloud, torch.rand(300, 3))
    assert 600 <= len(points) < 900
    assert torch.equal(points[:300], cloud)
    for few in (torch.zeros(0, 3), torch.zeros(1, 3), torch.ones(5, 3)):
        assert torch.equal(densify_points(few, few)[0], few)
    with pytest.raises(ValueError, match=r"rgb: got \(2, 3\), expected \(4, 3\)"):
        densify_points(xyz, rgb[:2])
    with pytest.raises(ValueError, match=r"factor: got 0.5"):
        densify_points(xyz, rgb, factor=0.5)


def test_schedule_and_progress():
    strategy = TurboStrategy(cap_max=100)
    strategy.begin(splats(), 10_000)
    assert strategy.schedule() == (167, 5000, 33)
    assert strategy.progress(0) == strategy.progress(167) == 0
    assert strategy.progress(5000) == strategy.progress(9000) == 1
    assert strategy.progress(2000) == pytest.approx(1833 / 4833)
    assert not any(strategy._resets(n) for n in range(1, 10_001))
    assert TurboStrategy(cap_max=7).config()["budget"] == "None"


def test_colors_that_views_and_processes_share():
    cameras, images = views(2, dtype=DOUBLE)
    scene, strategy = splats(dtype=DOUBLE), TurboStrategy(cap_max=100)
    strategy.begin(scene, 300)
    step = step_of(scene, 3, [0] * 25, [0] * 25)
    shared = torch.rand(25, 3, dtype=DOUBLE, requires_grad=True) * 1
    step.output, step.views = scene.render(cameras, features=shared), torch.arange(2)
    step.total = lambda tensor: 2 * tensor  # of two equal processes
    strategy.before_backward(step)
    l1(step.output.image, images).backward()
    strategy.after_backward(step)
    visible = (step.output.info["radii"] > 0).all(-1).sum(0)
    torch.testing.assert_close(strategy.color, 2 * shared.grad.norm(dim=-1) * visible)
    depth = rasterize(
        *(getattr(scene, name) for name in ("means", "quats", "scales", "opacities")),
        shared, cameras.viewmats, cameras.Ks, 12, 12, render_mode="D",
    )  # fmt: skip
    assert "colors" not in depth.info


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cap_max": -1}, "cap_max: got -1"),
        ({"color_ratio": 0.0}, "color_ratio: got 0.0"),
        ({"grow_grad2d": 0.0}, "grow_grad2d: got 0.0"),
        ({"color_prob": 1.1}, "color_prob: got 1.1"),
        ({"visit_quantile": -0.1}, "visit_quantile: got -0.1"),
        ({"prune_share": 1.5}, "prune_share: got 1.5"),
        ({"refine_every": 0}, "refine_every: got 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        TurboStrategy(**{"cap_max": 50} | options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cap_max": 24}, "cap_max: got 24, expected at least the scene's 25 splats"),
        ({"cap_max": 50, "budget": ConvergenceBudget(20, 40)}, "budget: got 20, expected at least"),
        ({"cap_max": 50, "steps": 30}, "steps: got 30, expected those of the run, 20"),
    ],
)
def test_runs_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        trainer(strategy=TurboStrategy(**options))
