"""The experiment on HiPPO bases runs, and its criteria can fail."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.ssm import hippo as unit
from torchzoo.ssm import hippo_matrix


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    measured = result.measured()
    assert len(measured) == 1 + 4 + 4 + 4 * 3
    unit.plot(measured, Figure())


def test_noise_is_band_limited():
    u = unit.band_noise((2, 2048), torch.Generator().manual_seed(0))
    spectrum = torch.fft.rfft(u).abs()
    assert spectrum[:, 0].max() < 1e-9
    assert spectrum[:, 21:].max() < 1e-9
    assert (spectrum[:, 1:21] > 0.1).all()
    torch.testing.assert_close(u.var(-1), torch.ones(2).double())


def test_random_system_is_stable_and_no_worse_than_said():
    A, B = unit.random_system(30, torch.Generator().manual_seed(3))
    assert np.linalg.eigvals(A.numpy()).real.max() == pytest.approx(-0.1, abs=1e-9)
    assert B.shape == (30,)


def test_ridge_reads_what_is_there():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 5, generator=draw, dtype=torch.float64)
    weights = torch.randn(5, generator=draw, dtype=torch.float64)
    assert unit.ridge_mse(x, x @ weights) < 1e-20
    noise = torch.randn(3, 200, generator=draw, dtype=torch.float64)
    assert unit.ridge_mse(x, noise) == pytest.approx(noise[2].square().mean().item(), rel=0.1)
    # the test sequence is the third: targets changed there alone are not predicted
    targets = x @ weights
    targets[2] = 0
    assert unit.ridge_mse(x, targets) > 1


def test_every_arm_reads_a_slow_past():
    """One slow wave is read back by all; of a random system's states the smallest past is."""
    l = torch.arange(4 * unit.WINDOW, dtype=torch.float64)
    u = torch.sin(2 * np.pi * l / 1000)
    found = unit.reconstructions(u, torch.Generator().manual_seed(0))
    past = u.flip(0)[: unit.WINDOW]
    errors = {name: unit.past_error(past, value) for name, value in found.items()}
    assert errors["LegS"] < 0.05
    assert errors["LegS/t"] < 0.05
    assert errors["FouT"] < 0.3
    assert unit.past_error(past, past + 0 * past) == 0
    assert unit.past_error(past, torch.zeros_like(past)) == pytest.approx(1)


def test_broken_matrices_are_seen(monkeypatch):
    assert unit.kernel_error() < 1e-10

    def sign_flipped(measure, N):
        A, B = hippo_matrix(measure, N)
        return -A, B

    monkeypatch.setattr(unit, "hippo_matrix", sign_flipped)
    assert unit.kernel_error() > 1


def synthetic(right=0.01, wrong=0.5, random=1.0, exact=1e-13, worse=None):
    """Measurements of eight seeds; `worse` replaces those of one arm and factor."""
    way = np.array([1.0, -1.0] * 4)
    figures = {unit.EXACT: exact + 0 * way}
    for name in unit.PAST:
        figures[unit.error_name(name)] = 0.2 + 0.01 * way
    for arm in unit.RECALL:
        for factor in unit.FACTORS:
            value = right if factor == unit.MATCHED else wrong
            value = random if arm == unit.RANDOM else value
            if worse and worse[:2] == (arm, factor):
                value = worse[2]
            figures[unit.mse_name(arm, factor)] = value * (1 + 0.1 * way)
    return {name: Measurement(name, tuple(values)) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True]),
        (synthetic(right=0.6, wrong=2.0), [False, True, True]),
        (synthetic(worse=("FouT", unit.MATCHED, 0.51), wrong=5.0), [False, True, True]),
        (synthetic(random=0.005), [False, True, True]),
        (synthetic(wrong=0.015), [True, False, True]),
        (synthetic(worse=("LegT", unit.WRONG[0], 0.015)), [True, False, True]),
        (synthetic(worse=("LegS", unit.WRONG[1], 0.015)), [True, False, True]),
        (synthetic(exact=1e-9), [True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected


def test_a_noisy_advantage_is_none():
    measured = synthetic()
    noisy = (0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 9.0)
    measured[unit.mse_name(unit.RANDOM, unit.MATCHED)] = Measurement("random", noisy)
    slow = Measurement("slow", (0.5,) * 8)
    measured[unit.mse_name("LegT", unit.MATCHED)] = slow
    assert measured[unit.mse_name(unit.RANDOM, unit.MATCHED)].mean > 2 * slow.mean
    assert unit.EXPERIMENT.criteria[0].test(measured)[0] is False
