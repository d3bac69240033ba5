"""The experiment on noisy expected improvement: its criteria and a short run."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import bayesian_optimization as unit
from torchzoo.gp import gaussian


def synthetic(changes=None, *, apart=1e-7):
    """Measurements of five seeds in which all criteria hold; changes replace final regrets."""
    base = {"random": 1.0, unit.EI: 0.4, unit.NOISY: 0.2, unit.KG: 0.3}
    figures = {f"EI and noisy EI apart, {unit.QUIET}": [apart] * 5, "evaluations": [2.0] * 5}
    for name in unit.SETTINGS:
        for method, value in base.items():
            value = (changes or {}).get(method, value)
            for step in range(3):
                values = [value + 2 - step + 0.001 * s * value for s in range(5)]
                figures[f"regret after {step}, {method}, {name}"] = values
    return {name: Measurement(name, tuple(values)) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("changes", "apart", "failing"),
    [
        ({}, 1e-7, []),
        ({unit.EI: 1.0}, 1e-7, [0]),
        ({unit.KG: 1.1}, 1e-7, [0]),
        ({unit.NOISY: 1.1, unit.EI: 0.9}, 1e-7, [0, 1]),
        ({unit.NOISY: 0.4}, 1e-7, [1]),
        ({}, 2e-6, [2]),
    ],
)
def test_criteria_can_fail(changes, apart, failing):
    measured = synthetic(changes, apart=apart)
    outcomes = [c.test(measured) for c in unit.EXPERIMENT.criteria]
    assert [i for i, (holds, _) in enumerate(outcomes) if not holds] == failing
    if changes == {unit.NOISY: 0.4}:
        assert "a tie" in outcomes[1][1]


def test_settings():
    """All methods see the same noise; without it values are the function's in units of its sd."""
    quiet, loud = unit.Setting("Branin", 3, 64), unit.Setting("Branin, noise", 3, 64)
    assert (quiet.points == loud.points).all()
    x = quiet.points[5:6]
    assert quiet.observed(x, 7) == quiet.true(x) == unit.branin(x) / quiet.spread
    assert float(loud.observed(x, 7) - quiet.true(x)) == pytest.approx(float(loud.noise[7]))
    assert float(loud.noise.std()) == pytest.approx(unit.NOISE, rel=0.1)
    best = quiet.points[quiet.values.argmax()]
    assert quiet.regret(best) == 0
    assert quiet.regret(quiet.points[quiet.values.argmin()]) > 1


def test_a_model_without_noise_interpolates():
    x = unit.Setting("Branin", 0, 8).points
    y = unit.branin(x)[:, None]
    found = gaussian(unit.FixedNoiseGP(max_iter=5).fit(x, y), x)
    torch.testing.assert_close(found.mean, y, rtol=1e-6, atol=0)
    assert (found.noise < 1e-8).all()


def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    first = [unit.regret(measured, m, unit.QUIET, 0).values for m in unit.FULL["methods"]]
    assert len(set(first)) == 1  # the initial points are shared
    assert measured[f"EI and noisy EI apart, {unit.QUIET}"].mean < unit.AGREE
    for method in unit.FULL["methods"]:
        assert min(unit.regret(measured, method, unit.QUIET).values) >= 0
    unit.plot(measured, Figure())
