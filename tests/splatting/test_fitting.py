"""The trainer against a plain loop, its schedules against closed forms, its figures by hand."""

import math

import numpy as np
import pytest
import torch

from tests.splatting.runs import SIZE, VIEWS, l1, splats, trainer, views
from torchzoo.errors import TorchzooError
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.fitting import SplatTrainer
from torchzoo.splatting.protocol import DensifyStrategy
from torchzoo.splatting.scene import GaussianScene
from torchzoo.splatting.schedules import adam, base_rates, means_decay, scaled_steps, set_rates

NAMES = ("means", "quats", "log_scales", "opacity_logits", "sh0", "shN")
FULL = [1.6e-4 * 1.5, 1e-3, 5e-3, 5e-2, 2.5e-3, 1.25e-4]
SHORT = [6.4e-4 * 1.5, 4e-3, 2e-2, 5e-2, 1e-2, 5e-3]


@pytest.mark.parametrize(
    ("rates", "steps", "expected"),
    [
        ("full", 300, FULL),
        ("short", 30_000, SHORT),
        (None, 2_999, SHORT),
        (None, 3_000, FULL),
        ({"quats": 0.7}, 30_000, [FULL[0], 0.7, *FULL[2:]]),
        ({"means": 0.7}, 30_000, [0.7, *FULL[1:]]),
    ],
)
def test_rates(rates, steps, expected):
    found = base_rates(NAMES, rates, steps=steps, scene_scale=1.5)
    assert list(found) == list(NAMES)
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12)


def test_rates_of_other_parameters():
    names = [*NAMES, "raw_shape", "field.0.weight", "field.0.bias"]
    rates = {"raw_shape": 0.1, "field": 0.2, "field.0.bias": 0.3}
    found = base_rates(names, rates, steps=300, scene_scale=1.5)
    assert list(found.values())[-3:] == [0.1, 0.2, 0.3]
    assert base_rates(["features"], None, steps=300, scene_scale=1.5) == {"features": 2.5e-3}
    assert base_rates(["quats"], {"quats": 0.0}, steps=300, scene_scale=1.5) == {"quats": 0.0}
    for given, message in (
        (None, "rates: got none for 'raw_shape'"),
        ({"raw_shape": 0.1, "field": -1.0}, r"rates: got -1.0 for 'field.0.weight'"),
        (rates | {"colour": 1.0}, "rates: got 'colour', expected one of"),
        ("fast", "rates: got 'fast', expected 'full', 'short'"),
    ):
        with pytest.raises(ValueError, match=message):
            base_rates(names, given, steps=300, scene_scale=1.5)


def test_step_counts_are_those_of_30_000_steps_scaled_down_and_rounded():
    assert [scaled_steps(1000, steps) for steps in (30, 200, 250, 29_999)] == [1, 7, 8, 1000]
    assert [scaled_steps(1000, steps) for steps in (30_000, 90_000)] == [1000, 1000]
    assert [scaled_steps(500, steps, 25) for steps in (1499, 1500, 1530)] == [25, 25, 26]


@pytest.mark.parametrize("batch", [1, 2, 4, 20])
def test_the_settings_of_adam_with_a_batch(batch):
    optimizer = adam(splats())
    rates = dict.fromkeys(NAMES, 0.5)
    set_rates(optimizer, rates, means_decay(30, 120), batch)
    for group in optimizer.param_groups:
        decay = 10 ** (-2 * 30 / 120) if group["name"] == "means" else 1.0
        assert group["lr"] == pytest.approx(0.5 * decay * math.sqrt(batch), rel=1e-12)
        assert group["eps"] == pytest.approx(1e-15 / math.sqrt(batch), rel=1e-12, abs=0)
        expected = [max(0.0, 1 - batch * 0.1), 1 - batch * 0.001]
        assert group["betas"] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_run_is_a_plain_loop():
    """The same views, rates and degrees in a loop of torch's own parts."""
    drawn = []
    scene, plain = (splats(dtype=torch.float64) for _ in range(2))
    cameras, images = views(dtype=torch.float64)
    run = SplatTrainer(
        *(scene, cameras, images),
        steps=12,
        loss=l1,
        batch=2,
        sh_every=4,
        background=[0.2, 0.4, 0.6],
        callbacks=[lambda step: drawn.append(step.views)],
    )
    run.fit()
    extent = 1.1 * (cameras.centers - cameras.centers.mean(0)).norm(dim=-1).max().item()
    start = [6.4e-4 * extent, 4e-3, 2e-2, 5e-2, 1e-2, 5e-3]
    optimizers = [
        torch.optim.Adam(
            [getattr(plain, name)], rate * 2**0.5, betas=(0.8, 0.998), eps=1e-15 / 2**0.5
        )
        for name, rate in zip(NAMES, start, strict=True)
    ]
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.01 ** (1 / 12))
    for step in range(12):
        loss = 0
        for view in drawn[step].tolist():
            image = plain.render(
                cameras[view],
                sh_degree=min(step // 4, 1),
                backgrounds=torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64),
            ).image
            loss = loss + l1(image[0], images[view]) / 2
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        decay.step()
        assert run.history["loss"][step] == pytest.approx(loss.item(), rel=1e-9)
    for name in NAMES:
        torch.testing.assert_close(getattr(scene, name), getattr(plain, name), rtol=1e-6, atol=1e-7)


def test_every_view_comes_once_a_round():
    drawn = []
    trainer("none", steps=9, batch=4, callbacks=[lambda s: drawn.extend(s.views.tolist())]).fit()
    assert len(drawn) == 36
    rounds = np.array(drawn).reshape(-1, VIEWS)
    assert (np.sort(rounds, 1) == np.arange(VIEWS)).all()
    assert len({tuple(row) for row in rounds}) > 3
    again = []
    trainer("none", steps=9, batch=4, callbacks=[lambda s: again.extend(s.views.tolist())]).fit()
    assert again == drawn
    other = []
    options = {"callbacks": [lambda s: other.extend(s.views.tolist())], "seed": 4}
    trainer("none", steps=9, batch=4, **options).fit()
    assert other != drawn


def test_the_last_tenth_takes_more_views():
    sizes, rates = [], []

    def note(step):
        sizes.append(len(step.views))
        rates.append(step.optimizer.param_groups[1]["lr"])

    trainer("none", steps=20, batch=1, final_batch=4, callbacks=[note]).fit()
    assert sizes == [1] * 18 + [4] * 2
    np.testing.assert_allclose(rates, [4e-3] * 18 + [8e-3] * 2)
    sizes.clear()
    trainer("none", steps=10, batch=3, final_batch=2, callbacks=[note]).fit()
    assert sizes == [3] * 10


def test_accumulated_views_are_one_step_with_the_mean_gradient():
    """Adam sees the mean of the single views' gradients."""
    cameras, images = views(dtype=torch.float64)
    scene, single = (splats(dtype=torch.float64) for _ in range(2))
    chosen = []
    note = [lambda step: chosen.extend(step.views.tolist())]
    run = SplatTrainer(scene, cameras, images, steps=1, batch=4, loss=l1, callbacks=note)
    run.fit()
    for view in chosen:
        (l1(single.render(cameras[view], sh_degree=0).image[0], images[view]) / 4).backward()
    for name in ("means", "opacity_logits", "sh0"):
        found = run.optimizer.state[run.scene.get_parameter(name)]["exp_avg"] / 0.4
        torch.testing.assert_close(found, single.get_parameter(name).grad, rtol=1e-6, atol=1e-12)


def test_dilated_steps_see_every_pixel_and_the_right_ones():
    offsets = set()
    images = views()[1]

    def note(step):
        view = images[step.views]
        found = [
            (x, y)
            for x in range(3)
            for y in range(3)
            if step.target.shape == view[:, y::3, x::3].shape
            and torch.equal(step.target, view[:, y::3, x::3])
        ]
        assert len(found) == 1
        assert step.output.image.shape == step.target.shape
        assert step.size == (SIZE, SIZE)
        offsets.update(found)

    run = trainer("none", steps=40, dilation=3, callbacks=[note])
    run.fit()
    assert len(offsets) == 9
    assert np.mean(run.history["loss"][-6:]) < np.mean(run.history["loss"][:6])


def test_the_degree_of_the_colours_rises():
    scene, touched = splats(sh_degree=3), []

    def note(step):
        rest = step.scene.shN.detach().abs().amax((0, 2))
        touched.append([bool(rest[a:b].any()) for a, b in ((0, 3), (3, 8), (8, 15))])

    trainer("none", scene=scene, steps=13, sh_every=3, callbacks=[note]).fit()
    one, two, three = (sum(row) for row in ([step > k for step in range(13)] for k in (2, 5, 8)))
    assert [sum(column) for column in zip(*touched, strict=True)] == [one, two, three]
    assert SplatTrainer(splats(), *views(), steps=30_000).sh_every == 1000
    assert SplatTrainer(splats(), *views(), steps=3_000).sh_every == 100
    assert SplatTrainer(splats(), *views(), steps=200).sh_every == 10


def test_history_and_evaluation_by_hand():
    cameras, images = views()
    scene = splats()
    first = scene.render(cameras, sh_degree=0).image.detach()
    seen = []
    run = trainer("none", scene=scene, steps=7, callbacks=[lambda step: seen.append(step)])
    history = run.fit()
    assert {name: len(values) for name, values in history.items()} == dict.fromkeys(
        ("loss", "psnr", "splats", "seconds"), 7
    )
    view = seen[0].views.item()
    error = first[view].clamp(0, 1) - images[view]
    assert history["loss"][0] == pytest.approx((first[view] - images[view]).abs().mean().item())
    assert history["psnr"][0] == pytest.approx(-10 * error.square().mean().log10().item(), abs=1e-4)
    assert history["splats"] == [25.0] * 7
    assert (np.diff(history["seconds"]) > 0).all()
    scene.sh0.data += 3  # so that clamping shows
    found = scene.render(cameras).image.detach().clamp(0, 1)
    scores = [-10 * math.log10((a - b).square().mean()) for a, b in zip(found, images, strict=True)]
    result = run.evaluate(cameras, images)
    assert result["psnr"] == pytest.approx(np.mean(scores), abs=1e-4)
    same = run.evaluate(cameras, found)
    assert same["ssim"] == pytest.approx(1.0, abs=1e-5)
    assert result["ssim"] < 0.9
    assert run.progress == 1.0


def test_the_psnr_of_a_step_is_of_clamped_pictures_and_ends_at_100():
    cameras, _ = views()
    scene = splats()
    scene.sh0.data += 3  # so that clamping shows
    image = scene.render(cameras, sh_degree=0).image.detach()
    assert image.max() > 1.5
    run = SplatTrainer(scene, cameras, image.clamp(0, 1), steps=1, loss=l1)
    assert run.fit()["psnr"] == [pytest.approx(100, abs=1e-3)]


def test_pictures_and_cameras_follow_the_scene_s_precision():
    cameras, images = views()
    run = SplatTrainer(splats(dtype=torch.float64), cameras, images, steps=1, loss=l1)
    run.fit()
    double = views(dtype=torch.float64)[0]
    found, expected = (run.evaluate(one, images)["psnr"] for one in (cameras, double))
    assert found == pytest.approx(expected, rel=1e-5)


def test_progress_is_told_with_a_running_mean():
    told = []
    run = trainer("none", steps=4)
    run.fit(progress=lambda *values: told.append(values))
    mean = run.history["psnr"][0]
    for number, (done, total, text) in enumerate(told, 1):
        mean = 0.95 * mean + 0.05 * run.history["psnr"][number - 1]
        assert (done, total, text) == (number, 4, f"PSNR {mean:.2f}  25 splats")
    assert len(told) == 4


def test_bytes_are_images_too():
    cameras, images = views()
    pixels = (images * 255).round().byte()
    runs = []
    for given in (pixels, pixels.float() / 255):
        run = SplatTrainer(splats(), cameras, given, steps=3, loss=l1)
        runs.append((run.fit()["loss"], run.evaluate(cameras, given)))
    assert runs[0] == runs[1]


def test_a_strategy_is_asked_in_order_and_its_penalty_counts():
    calls = []

    class Spy(DensifyStrategy):
        def begin(self, scene, steps):
            calls.append(("begin", steps))

        def penalty(self, scene):
            return 0.25 * scene.opacities.sum()

        def before_backward(self, step):
            calls.append(("before", step.number, step.scene.means.grad is None))

        def after_backward(self, step):
            calls.append(("after", step.number, step.scene.means.grad is not None))
            calls.append(step.output.info["means2d"].grad is not None)

        def after_step(self, step):
            calls.append(("edit", step.number, step.scene.means.grad is None))
            calls.append(step.means_rate)

    scene = splats()
    opacity = scene.opacities.sum().item()
    cameras, images = views()
    losses = [
        SplatTrainer(splats(), cameras, images, steps=2, loss=l1, strategy=s).fit()["loss"][0]
        for s in (Spy(), None)
    ]
    assert losses[0] - losses[1] == pytest.approx(0.25 * opacity, rel=1e-5)
    rate = 1.6e-4 * cameras.scene_scale
    expected = [("begin", 2)]
    for number, value in ((1, rate), (2, rate * 0.1)):
        expected += [("before", number, True), ("after", number, True), True]
        expected += [("edit", number, True), pytest.approx(value)]
    assert calls == expected


def test_the_rate_of_the_means_that_strategies_see_grows_with_the_batch():
    rates = []
    run = trainer("none", steps=2, batch=4, callbacks=[lambda step: rates.append(step.means_rate)])
    run.fit()
    assert rates == pytest.approx([2 * 1.6e-4 * run.scene_scale * f for f in (1, 0.1)])


def test_a_loss_may_know_the_progress_and_the_scene():
    cameras, images = views()
    scene, seen = splats(), []

    def loss(image, target):
        seen.append(run.progress)
        return l1(image, target) + 0.1 * scene.scales.mean()

    run = SplatTrainer(scene, cameras, images, steps=4, loss=loss)
    run.fit()
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_what_is_frozen_stays():
    scene = splats()
    scene.means.requires_grad_(False)
    before = scene.means.detach().clone()
    trainer("default", scene=scene, strategy=None).fit()
    assert torch.equal(scene.means, before)


def test_a_loss_that_is_not_finite_ends_the_run():
    cameras, images = views()
    images[:] = math.inf
    with pytest.raises(TorchzooError, match=r"the loss is (inf|nan) in step 1; try lower rates"):
        SplatTrainer(splats(), cameras, images, steps=4, loss=l1).fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"batch": 0}, "batch: got 0"),
        ({"final_batch": 0}, "final_batch: got 0"),
        ({"dilation": 0}, "dilation: got 0"),
        ({"dilation": 13}, r"dilation: got 13, expected at most the pictures' \(12, 12\)"),
        ({"sh_every": 0}, "sh_every: got 0"),
        ({"background": [1.0, 0.0]}, r"background: got \(2,\), expected \(3,\)"),
        ({"rates": "quick"}, "rates: got 'quick'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SplatTrainer(splats(), *views(), **({"steps": 5} | options))


def test_bad_images():
    cameras, images = views()
    for given, message in (
        (images[:3], r"images: got \(3, 12, 12, 3\), expected \(6, 12, 12, 3\) as the cameras"),
        (images[..., 0], r"images: got \(6, 12, 12\), expected"),
        (images.int(), "images: got torch.int32, expected floating point or uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            SplatTrainer(splats(), cameras, given, steps=5)
    with pytest.raises(ValueError, match="cameras: got none"):
        SplatTrainer(splats(), cameras[:0], images[:0], steps=5)
    with pytest.raises(ValueError, match="save_every: got 0"):
        SplatTrainer(splats(), cameras, images, steps=5).fit(save_every=0)


def test_no_splats_at_all_train():
    cameras, images = views()
    history = SplatTrainer(GaussianScene(0), cameras, images, steps=2, loss=l1).fit()
    assert history["loss"][0] > 0


def test_one_camera_has_a_scale():
    cameras = Cameras.orbit(1, radius=3.0, width=SIZE, height=SIZE)
    run = SplatTrainer(splats(), cameras, views()[1][:1], steps=2, loss=l1)
    assert run.scene_scale == 1.0
