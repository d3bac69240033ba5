"""The experiment on clicks: its criteria, its pictures and players, and a short run."""

import re

import pytest
import torch
from matplotlib.figure import Figure
from scipy import ndimage

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import gpcis as unit
from torchzoo.experiments.gp.gpcis_scenes import Scenes, iou, next_clicks, scenes


def synthetic(*, ours=0.0, conv=0.1, gain=(0.1, 0.11, 0.12), trivial=0.01, ms=1.4):
    """Measurements of three seeds."""
    base = (0.5, 0.6, 0.4)
    better = tuple(b + g for b, g in zip(base, gain, strict=True))
    figures = {
        "violations, GPCIS": (0.0, 0.0, ours),
        "violations, conv": (0.2, 0.3, conv),
        "IoU@3, GPCIS": better,
        "IoU@3, conv": base,
        "IoU@3, conv, overwritten": tuple(b + trivial for b in base),
        "ms a click, GPCIS": (ms,) * 3,
        "ms a click, conv": (1.0,) * 3,
    }
    return {name: Measurement(name, values) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True, True]),
        (synthetic(ours=0.01), [False, True, True, True]),
        (synthetic(conv=0.0), [False, True, True, True]),
        (synthetic(gain=(-0.1, 0.2, 0.3)), [True, False, False, True]),
        (synthetic(gain=(-0.1, -0.1, -0.1)), [True, False, False, True]),
        (synthetic(trivial=0.1), [True, True, False, True]),
        (synthetic(ms=1.6), [True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected


def test_clicks_are_in_the_middle_of_the_largest_error():
    masks = torch.zeros(3, 9, 9, dtype=torch.bool)
    masks[0, 1:6, 2:7] = True
    masks[0, 8, 8] = True
    found = torch.zeros_like(masks)
    found[1, 0, 3:6] = True
    points, labels = unit.no_clicks(3)
    for middles in ([3, 4, 1], [3, 5, 1]):
        points, labels = next_clicks(found, masks, points, labels)
        row, column, label = *points[0, -1].tolist(), labels[0, -1].item()
        if middles == [3, 4, 1]:
            assert [row, column, label] == middles
    assert points[0, 0].tolist() != points[0, 1].tolist()  # a click that was in vain
    assert labels[1].tolist() == [-1, -1]
    assert labels[2].tolist() == [0, 0]
    assert iou(found, masks)[:2].tolist() == [0, 0]
    assert iou(masks, masks)[0] == 1


def test_players_know_only_what_they_should():
    data = scenes(4, 16, 0)
    assert ndimage.label(data.masks[0].numpy())[1] == 1
    assert 0.03 < data.masks.float().mean() < 0.5

    def truth(images, points, labels):
        return (2.0 * data.masks - 1)[:, None]

    perfect = unit.score(truth, data, 5)
    assert (perfect["IoU@1"], perfect["NoC@85"], perfect["violations"]) == (1, 1, 0)
    wrong = unit.score(lambda *inputs: -truth(*inputs), data, 5)
    assert (wrong["IoU@5"], wrong["NoC@85"], wrong["violations"]) == (0, 5, 1)
    net = unit.ProcessNet().eval()
    points, labels, _ = unit.play(net, data, 3)[-1]
    with torch.no_grad():
        near = unit.nearest_click(net)(data.images, points, labels)
        zero = unit.without_prior(net)(data.images, points, labels)
        kept = net(data.images, points, labels)
        fixed = unit.overwritten(unit.ConvNet())(data.images, points, labels)
    for logits in (near, fixed):
        assert not unit.click_violations(logits, points, labels).any()
    assert set(near.unique().tolist()) <= {-1.0, 1.0}
    net.head.omega_mean.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(net(data.images, points, labels), zero)
    assert not torch.allclose(zero, kept)


def test_pages(tmp_path):
    unit.pages(unit.ProcessNet().eval(), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["gpcis-china.html", "gpcis-flower.html"]
    assert re.search(r"<title>Segment china.jpg</title>", (tmp_path / names[0]).read_text())


def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert len(result.criteria) == 4
    assert measured["violations, GPCIS"].mean == 0
    assert measured["IoU@5, GPCIS"].mean > measured["IoU@1, GPCIS"].mean - 0.1
    unit.plot(measured, Figure())
    assert isinstance(scenes(1, 16, 0), Scenes)
