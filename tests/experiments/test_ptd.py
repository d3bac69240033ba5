"""The experiment on perturbed HiPPO matrices runs, and its criteria can fail."""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Context, Measurement, reproduce
from torchzoo.experiments.ssm import ptd as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    measured = result.measured()
    assert len(measured) == 4 * (3 + 2) + 5 * (1 + 4 * 3)
    unit.plot(measured, Figure())


def test_gaps_are_those_of_the_paper():
    """S4D-LegS has spikes where the perturbed systems have none, as was measured elsewhere."""
    options = {"descent": 3, "frequencies": 20}
    for n, least in ((16, 1.0), (64, 3.0)):
        figures = unit.gaps(n, Context(0, options, torch.device("cpu")))
        spike, random, optimised = (figures[unit.gap_name(name, n)] for name in unit.DIAGONALS)
        assert spike > least
        assert random < 0.05
        assert optimised < 0.05


def test_tones_have_the_amplitude_asked_for():
    x = torch.full((50, 256, 1), 2.0)
    noisy = unit.with_tone(x, unit.SPIKE, 0.3, 0) - x
    assert noisy.abs().max().item() == pytest.approx(0.6, rel=0.01)
    spectrum = torch.fft.rfft(noisy[:, :, 0]).abs().mean(0)
    assert int(spectrum.argmax()) == round(unit.SPIKE / (2 * math.pi) * 256)
    assert pytest.approx(1.62, abs=0.005) == unit.SPIKE
    assert len((noisy[:, 0, 0]).unique()) == 50


def test_sequences_keep_pixels_in_order():
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert torch.equal(unit.sequences(images)[0, ::4, 0], torch.arange(64.0))
    assert unit.sequences(images).shape == (1, 256, 1)


@pytest.mark.parametrize("arm", list(unit.ARMS))
def test_dynamics_are_frozen_and_shared(arm):
    for learned in (False, True):
        kernel = unit.Classifier(arm, learned=learned).block.ssm.kernel
        learn = {name for name, p in kernel.named_parameters() if p.requires_grad}
        assert learn == ({"C", "log_dt"} if learned else {"C"})
        steps = kernel.log_dt.exp()
        assert bool((steps - 0.02).abs().max() < 1e-6) is not learned


def synthetic(ours=0.02, theirs=0.4, control=(0.05, 0.05), clean=0.0, random=0.01, spike=3.0):
    """Measurements of three seeds: drops at the spike and elsewhere, clean difference, gaps."""
    way = np.array([1.0, -1.0, 0.5])
    figures = {}
    drops = {"S4-PTD": (ours, control[0]), "S4D-LegS": (theirs, control[1]), "S4D-Lin": (0, 0)}
    for arm, (at_spike, elsewhere) in drops.items():
        level = 0.9 + (clean if arm == "S4-PTD" else 0) + 0.001 * way
        for name in (arm, f"{arm}, learned dt"):
            figures[unit.figure_name(name, "clean")] = level
            for tone in unit.TONES:
                lost = (at_spike if tone == "spike" else elsewhere) + 0.002 * way
                for a in unit.AMPLITUDES:
                    figures[unit.figure_name(name, tone, a)] = level - lost * (level - 0.1)
    for n in unit.ORDERS:
        for name, gap in zip(unit.DIAGONALS, (spike, random, 0.01), strict=True):
            figures[unit.gap_name(name, n)] = gap + 0 * way
    return {name: Measurement(name, tuple(values)) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 3),
        (synthetic(ours=0.21), [False, True, True]),
        (synthetic(theirs=0.0, ours=-0.1), [False, True, True]),
        (synthetic(control=(0.1, 0.05)), [False, True, True]),
        (synthetic(control=(0.05, 0.1)), [False, True, True]),
        (synthetic(clean=-0.03), [True, False, True]),
        (synthetic(random=2.0), [True, True, False]),
        (synthetic(spike=0.15), [True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_a_drop_is_the_share_above_chance():
    measured = synthetic(theirs=0.5)
    lost = unit.drop(measured, "S4D-LegS", "spike")
    np.testing.assert_allclose(lost.values, [0.502, 0.498, 0.501], atol=1e-9)
