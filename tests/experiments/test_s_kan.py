"""The experiment on S-KAN runs on equal terms, and its criteria can fail."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.activations import PrunedKANLinear
from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.activations import s_kan as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    measured = result.measured()
    assert len(measured) == (2 * 7 + 1) * len(unit.ARMS)
    unit.plot(measured, Figure())


def test_the_functions_are_the_ones_named():
    x = torch.tensor([[0.25, -0.5, 0.1, 0.9]])
    pi, a, b = math.pi, 0.25, -0.5
    assert len(unit.FUNCTIONS) == 7
    expected = {
        "J0(20 x)": -0.17759677131433830,  # J0(5)
        "exp(sin(pi x) + y^2)": math.exp(math.sin(pi * a) + b * b),
        "x y": a * b,
        "sin(pi x) cos(2 pi y) + step(x)": math.sin(pi * a) * math.cos(2 * pi * b) + 1,
        "sign(x) sqrt(abs(x))": 0.5,
        "exp of sines of 4 squares": math.exp(
            0.5 * math.sin(pi * (a * a + b * b)) + 0.5 * math.sin(pi * (0.01 + 0.81))
        ),
        "bump + chirp": math.exp(-1) + 0.5 * math.sin(2 * pi * 1.25**2),
    }
    for name, (width, function) in unit.FUNCTIONS.items():
        assert function(x[:, :width]).item() == pytest.approx(expected[name], abs=1e-6)
        data, values = unit.draw(name, 50, 3)
        assert data.shape == (50, width)
        assert data.abs().max() <= 1
        torch.testing.assert_close(values, function(data))
    assert unit.FUNCTIONS["sign(x) sqrt(abs(x))"][1](-x).item() == -0.5
    no_step = unit.FUNCTIONS["sin(pi x) cos(2 pi y) + step(x)"][1](-x[:, :2])
    assert no_step.item() == pytest.approx(
        -expected["sin(pi x) cos(2 pi y) + step(x)"] + 1, abs=1e-6
    )


def test_arms_have_the_same_steps_and_the_mlp_the_same_size(monkeypatch):
    x, y = unit.draw("x y", 20, 0)
    taken = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a, **k: taken.append(1) or step(self, *a, **k)
    )
    for arm in unit.ARMS:
        taken.clear()
        model = unit.fit_arm(arm, x, y, (3, 4, 2), parameters=200)
        assert len(taken) == 9
        if arm == "S-KAN":
            assert all(isinstance(layer, PrunedKANLinear) for layer in model.layers)
    for wanted in (60, 100, 300):
        assert abs(unit.count(unit.mlp(2, wanted)) - wanted) <= 16


def measured(**rows):
    """Errors of two seeds: S-KAN 1, others 2, but for those given as `arm=[seven values]`."""
    found = {}
    for arm in unit.ARMS:
        values = rows.get(arm.replace("-", ""), [1.0 if arm == "S-KAN" else 2.0] * 7)
        for name, value in zip(unit.FUNCTIONS, values, strict=True):
            found[unit.error(name, arm)] = Measurement("", (value, 1.1 * value))
    return found


def outcomes(**rows):
    figures = measured(**rows)
    unit.plot(figures, Figure())
    return [criterion.test(figures)[0] for criterion in unit.EXPERIMENT.criteria]


def test_criteria_can_fail():
    assert outcomes() == [True, True, True]
    assert outcomes(rbf=[0.5] * 6 + [9.0]) == [False, True, True]
    assert outcomes(SKAN=[1.0] * 6 + [3.0]) == [True, False, True]
    assert outcomes(MLP=[0.5] * 2 + [2.0] * 5) == [True, True, False]
    assert outcomes(MLP=[0.5] + [2.0] * 6) == [True, True, True]


def test_ranks_and_ratios():
    figures = measured(SKAN=[1, 1, 1, 1, 1, 1, 4], rbf=[2] * 6 + [1])
    assert unit.mean_rank(figures, "S-KAN").values == pytest.approx((12 / 7,) * 2)
    assert unit.worst_ratio(figures, "S-KAN") == pytest.approx(4)
    assert unit.worst_ratio(figures, "bspline") == pytest.approx(2)
    ranks = [unit.mean_rank(figures, arm).mean for arm in unit.ARMS]
    assert sum(ranks) == pytest.approx(21)
