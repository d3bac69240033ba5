"""The experiment on diagonal state spaces runs, and its criteria can fail."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.ops import ssm_step
from torchzoo.experiments.ssm import s4d as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 4
    measured = result.measured()
    assert len(measured) == 6 + 3 + 1 + 3
    unit.plot(measured, Figure())


def test_noise_is_band_limited():
    u = unit.noise(50, torch.Generator().manual_seed(0))
    assert u.shape == (50, 512)
    np.testing.assert_allclose(u.square().mean(1).numpy(), 1, rtol=1e-5)
    power = torch.fft.rfft(u).abs().square()
    assert power[:, 27:].max() < 1e-6 * power.max()
    np.testing.assert_allclose(power[:, 1:27].mean(0).std() / power[:, 1:27].mean(), 0, atol=0.3)


def test_delay_error_knows_the_answer():
    u = unit.noise(4, torch.Generator().manual_seed(0))
    exact = nn.ConstantPad1d((unit.DELAY, -unit.DELAY), 0.0)
    assert unit.delay_error(exact, u) < 1e-12
    assert unit.delay_error(nn.ConstantPad1d((unit.DELAY - 3, 3 - unit.DELAY), 0.0), u) > 0.01
    zero = unit.delay_error(torch.zeros_like, u).item()
    assert zero == pytest.approx(1, abs=0.2)


def test_the_gru_is_not_smaller():
    ours, gru = (unit.size(unit.reader(arm)) for arm in ("legs", "GRU"))
    assert ours <= gru < 1.05 * ours


def synthetic(**changed):
    """Measurements of four seeds as the paper has it, some of them changed."""
    means = {"lin": 0.02, "inv": 0.07, "legs": 0.04, "real": 0.95, "random": 0.8, "S4": 0.03}
    accuracies = {"a_lin": 0.93, "a_legs": 0.94, "a_GRU": 0.9}
    values = {**means, **accuracies, **changed}
    figures = {unit.mse_name(arm): values[arm] for arm in means}
    figures |= {unit.accuracy_name(name[2:]): values[name] for name in accuracies}
    figures["seconds of training"] = 3.0
    way = np.array([1.0, -1.0, 0.5, -0.5])
    return {
        name: Measurement(name, tuple(value * (1 + 0.01 * (place + 1) * way)))
        for place, (name, value) in enumerate(figures.items())
    }


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 4),
        (synthetic(real=0.05), [False, True, True, True]),
        (synthetic(inv=0.41), [False, True, True, True]),
        (synthetic(lin=1.0), [False, True, True, True]),
        (synthetic(legs=0.061), [True, False, True, True]),
        (synthetic(a_lin=0.9, a_GRU=0.8), [True, True, False, True]),
        (synthetic(a_GRU=0.99), [True, True, True, False]),
        (synthetic(a_legs=0.88, a_lin=0.9, a_GRU=0.96), [True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_contenders_of_the_step_benchmark_agree():
    calls = ssm_step.contenders(torch.device("cpu"), 3, 4, 8)
    ours, plain = (call() for call in calls.values())
    torch.testing.assert_close(ours, plain)
