"""The experiment on AF-KAN runs on equal terms, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.activations import af_kan as unit


def parameters(arm):
    return sum(p.numel() for p in unit.build(arm).parameters())


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    measured = result.measured()
    assert len(measured) == 4 * len(unit.ARMS)
    unit.plot(measured, Figure())


def test_arms_have_the_sizes_that_the_comparison_needs():
    assert parameters(unit.AF) == 2612
    assert parameters("B-spline KAN") == 21312
    assert parameters("B-spline KAN, small") == 2664
    for name, hidden in unit.SMALL.items():
        assert parameters(f"{name}, small") >= 2612
        slimmer = {**unit.SMALL, name: hidden - 1}
        before, unit.SMALL[name] = unit.SMALL[name], slimmer[name]
        try:
            assert parameters(f"{name}, small") < 2612
        finally:
            unit.SMALL[name] = before


@pytest.mark.parametrize("arm", unit.ARMS)
def test_arms_take_digits(arm):
    assert unit.build(arm)(torch.rand(3, 64)).shape == (3, 10)


def measured(**changes):
    """Figures of two seeds that meet every criterion, but for those changed: `name=(a, b)`."""
    found = {}
    for arm in unit.ARMS:
        found[unit.score(arm)] = (0.90, 0.91)
        found[unit.seconds(arm)] = (1.0, 1.0)
        found[unit.size(arm)] = (2612.0,) * 2
    found[unit.score(unit.AF)] = (0.95, 0.97)
    found[unit.seconds(unit.AF)] = (2.0, 2.0)
    found[unit.size("B-spline KAN")] = (21312.0,) * 2
    return {name: Measurement(name, values) for name, values in (found | changes).items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True, True, True]),
        *(
            ({unit.score(f"{name}, small"): (0.95, 0.97)}, [False, True, True])
            for name in unit.RIVALS
        ),
        ({unit.score("MLP, small"): (0.92, 1.0)}, [False, True, True]),  # within the error
        ({unit.score("B-spline KAN"): (0.965, 0.985)}, [True, False, True]),
        ({unit.score("B-spline KAN"): (0.955, 0.975)}, [True, True, True]),
        ({unit.size("B-spline KAN"): (15000.0,) * 2}, [True, False, True]),
        ({unit.seconds("MLP"): (2.5, 2.5)}, [True, True, False]),
    ],
)
def test_criteria_can_fail(changes, expected):
    figures = measured(**changes)
    assert [c.test(figures)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(figures, Figure())
