"""The experiment on excursions: its criteria and a short run."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import slepian as unit


def synthetic(*, ours=0.01, poisson=0.1, exponent=0.0, refused=1.0, density=-0.1):
    """Measurements of two seeds; `ours` and `exponent` are those of the last process."""
    figures = {"refused": refused, "least implied density, oscillating": density}
    for name in unit.PROCESSES:
        figures[f"distance, {name}"] = 0.01
        figures[f"distance of Poisson, {name}"] = poisson
        figures[f"exponent, {name}"] = unit.EXACT.get(name, 0.3)
        figures[f"simulated exponent, {name}"] = 0.3
    figures["distance, matern-5/2"] = ours
    figures["exponent, acceleration"] += exponent
    return {name: Measurement(name, (value, value)) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True]),
        (synthetic(exponent=0.021), [False, True, True]),
        (synthetic(exponent=-0.021), [False, True, True]),
        (synthetic(ours=0.031), [True, False, True]),
        (synthetic(poisson=0.014), [True, False, True]),
        (synthetic(refused=0.0), [True, True, False]),
        (synthetic(density=0.0), [True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected


def test_distance_and_slope_of_a_known_law():
    times = torch.distributions.Exponential(2.0).icdf((torch.arange(1000.0).double() + 0.5) / 1000)
    assert unit.distance(times.flip(0), -torch.expm1(-2 * times.flip(0))) == pytest.approx(
        0.0005, abs=1e-9
    )
    assert unit.distance(times, -torch.expm1(-times)) == pytest.approx(0.25, abs=1e-3)
    assert unit.tail_slope(times) == pytest.approx(2, rel=0.03)


def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert result.criteria[0]["holds"]
    assert result.criteria[2]["holds"]
    assert measured["excursions, gauss"].mean == pytest.approx(5000 / torch.pi, rel=0.1)
    for name in unit.PROCESSES:
        assert measured[f"mean over Rice's, {name}"].mean == pytest.approx(1, abs=0.15)
    unit.plot(measured, Figure())
