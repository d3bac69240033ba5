"""The experiment on lazy neurons: its figures, its verdict rules, and a short run."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.patches import PatchTransformer
from torchzoo.experiments.sparsity import lazy as unit

SPREAD = (-1.0, 0.0, 1.0)


def synthetic(*, end=(30.0, 30.0), narrow=35.0, clean=0.0, gains=(0.02, 0.02, 0.02)):
    """Three seeds; standard errors of differences are a fiftieth of the spread of the figures."""
    figures = {}

    def add(name, mean, wobble=0.0, size=1.0):
        values = tuple(mean + size * s + wobble * s**2 for s in SPREAD)
        figures[name] = Measurement(name, values)

    for labels, value in zip((unit.TRUE, unit.SHUFFLED), end, strict=True):
        add(unit.percent_name(unit.WIDE, labels, unit.START), 50.0, 0.5)
        add(unit.percent_name(unit.WIDE, labels, unit.END), value)
    add(unit.percent_name(unit.NARROW, unit.TRUE, unit.START), 50.0, 0.5)
    add(unit.percent_name(unit.NARROW, unit.TRUE, unit.END), narrow, 0.5)
    for figure, gain in zip(("accuracy", *unit.ROBUST), (clean, *gains), strict=True):
        sign = -1 if figure == unit.ROBUST[2] else 1
        add(f"{unit.DENSE}: {figure}", 0.5, size=0.1)
        add(f"{unit.TOPK}: {figure}", 0.5 + sign * gain, 0.003, size=0.1)
    return figures


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True, True]),
        (synthetic(end=(49.9, 30.0)), [False, False, True, True]),
        (synthetic(end=(30.0, 49.9)), [False, True, True, True]),
        (synthetic(end=(30.0, 55.0)), [False, True, True, True]),
        (synthetic(narrow=29.0), [True, False, True, True]),
        (synthetic(clean=-0.01), [True, True, False, True]),
        (synthetic(clean=-0.002), [True, True, True, True]),
        (synthetic(gains=(0.02, -0.02, -0.02)), [True, True, True, False]),
        (synthetic(gains=(0.02, -0.02, 0.02)), [True, True, True, True]),
        (synthetic(gains=(-0.002, -0.002, 0.02)), [True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_calibration_error_by_hand():
    """Three of four guesses at 0.75 right, and one of one at 0.55: gaps of 0 and 0.45."""
    confidence = torch.tensor([0.75, 0.75, 0.75, 0.75, 0.55])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], -1)
    labels = torch.tensor([0, 0, 1, 0, 0])
    found = unit.calibration_error(nn.Identity(), logits, labels)
    assert found == pytest.approx(0.45 / 5)
    certain = torch.tensor([[100.0, 0.0]])
    assert unit.calibration_error(nn.Identity(), certain, torch.tensor([1])) == 1.0


def test_label_noise_draws_a_share_anew():
    labels = torch.zeros(20_000, dtype=torch.int64)
    noisy = unit.with_label_noise(labels, 0)
    assert (noisy != 0).double().mean().item() == pytest.approx(0.4 * 0.9, abs=0.01)
    assert torch.equal(noisy, unit.with_label_noise(labels, 0))


def test_patches_are_squares_of_neighbours():
    model = PatchTransformer(8, 1, 16, activation=nn.Tanh)
    tokens = []
    model.embed.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    image = torch.arange(64.0).view(1, 1, 8, 8)
    assert model(image).shape == (1, 10)
    assert tokens[0].shape == (1, 16, 4)
    assert tokens[0][0, 0].tolist() == [0, 1, 8, 9]
    assert tokens[0][0, 5].tolist() == [18, 19, 26, 27]
    assert isinstance(model.blocks[0].activation, nn.Tanh)


def test_smoke_run(tmp_path):
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke", out=tmp_path)
    measured = result.measured()
    assert set(measured) == set(synthetic())
    start = measured[unit.percent_name(unit.WIDE, unit.TRUE, unit.START)].mean
    assert 30 < start < 70  # half of the units of an untrained relu layer
    assert (tmp_path / "lazy.png").stat().st_size > 10_000
