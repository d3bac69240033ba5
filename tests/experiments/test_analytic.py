"""The experiment on the analytic kernel runs, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.data.splat_scenes import make_scene
from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.splatting import analytic as unit
from torchzoo.splatting import area_downsample


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 2
    measured = result.measured()
    assert len(measured) == 4 * (4 * 2 + 1)
    unit.plot(measured, Figure())


def test_reduced_pictures_are_those_of_smaller_cameras():
    large = make_scene("stripes", 2, 24, 0, n_points=5, supersample=4)
    small = make_scene("stripes", 2, 12, 0, n_points=5, supersample=8)
    torch.testing.assert_close(area_downsample(large.images, 2), small.images, atol=2e-3, rtol=0)


def test_arms_differ_in_what_they_render_with():
    views = make_scene("stripes", unit.VIEWS, 16, 0, n_points=60, supersample=2)
    cameras, images = views.cameras[views.test_ids], views.images[views.test_ids]
    scores = {}
    for arm in unit.ARMS:
        trainer = unit.train(arm, views, 0, 1).trainer
        assert (trainer.scene.filter_scales > 0).all() == (arm == unit.MIP)
        scores[arm] = trainer.evaluate(cameras, images)["psnr"]
    assert len(set(scores.values())) == 4


def synthetic(reduced=((2, 2, 2), (2, 2, 2), (2, 2, 2)), full=(0.0, 0.0, 0.0)):
    """Measurements of three seeds in which the analytic arm gains this over the plain one."""
    figures = {}
    for arm in unit.ARMS:
        gains = (full, *reduced) if arm == unit.ANALYTIC else ((0, 0, 0),) * 4
        for factor, gain in zip(unit.FACTORS, gains, strict=True):
            figures[unit.figure_name(arm, factor, "psnr")] = tuple(20.0 + g for g in gain)
            figures[unit.figure_name(arm, factor, "ssim")] = (0.5, 0.6, 0.7)
        figures[f"{arm}: ms a step"] = (10.0, 11.0, 12.0)
    return {name: Measurement(name, values) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True]),
        (synthetic(((3, 3, 3), (0.5, 0.5, 0.5), (-0.4, -0.4, -0.4))), [True, True]),
        (synthetic(((1, 1, 1), (1, 1, 1), (0.9, 0.9, 0.9))), [False, True]),
        (synthetic(((9, 9, -3), (9, 9, -3), (9, 9, 5))), [False, True]),
        (synthetic(full=(-0.2, -0.3, 0.0)), [True, True]),
        (synthetic(full=(-0.2, -0.3, -0.2)), [True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_arms_near_the_best_are_named():
    text = unit.EXPERIMENT.criteria[0].test(synthetic(((0.2,) * 3,) * 3))[1]
    assert text.endswith("within 0.3 dB of the best: plain, compensated, Mip, analytic")
    text = unit.EXPERIMENT.criteria[0].test(synthetic())[1]
    assert text.endswith("within 0.3 dB of the best: analytic")
