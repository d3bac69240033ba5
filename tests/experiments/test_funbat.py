"""The experiment on tensors with real indexes: its criteria, its data and a short run."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import funbat as unit


def synthetic(*, ours=0.4, gp=0.5, coverage=0.9, angle=10.0):
    """Measurements of two seeds; the arguments hold for one tensor, good values for the other."""
    figures = {}
    for name in unit.TENSORS:
        last = name == "field"
        figures |= {f"rmse, {method}, {name}": 0.5 for method in unit.METHODS}
        figures[f"rmse, FunBaT, {name}"] = ours if last else 0.4
        figures[f"rmse, GP, {name}"] = gp if last else 0.5
        figures[f"coverage, FunBaT, {name}"] = coverage if last else 0.9
        figures[f"angle, {name}"] = 90.0 if last else angle
    return {name: Measurement(name, (value, value)) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True]),
        (synthetic(ours=0.51), [False, True, True]),
        (synthetic(gp=0.37), [False, True, True]),
        (synthetic(gp=0.39), [True, True, True]),
        (synthetic(coverage=0.84), [True, False, True]),
        (synthetic(coverage=0.96), [True, False, True]),
        (synthetic(angle=16.0), [True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected


def test_paths_have_the_covariance_of_the_kernel():
    times = torch.tensor([[0.5, 0.1, 0.9]]).double().expand(1000, -1)
    paths = unit.drawn_factors(times, torch.Generator().manual_seed(0))
    found = torch.einsum("nar,nbr->ab", paths, paths) / 2000
    apart = math.sqrt(3) * (times[0][:, None] - times[0]).abs() / 0.3
    expected = (1 + apart) * (-apart).exp()
    assert (found - expected).abs().max() < 4 * math.sqrt(2 / 2000)


def test_splits():
    data = unit.make("field", 50, 3, 0)
    assert data.train.sum(-1).tolist() == [40, 40, 40]
    assert not torch.equal(data.train[0], data.train[1])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    for method in unit.METHODS:
        assert 0.2 < measured[f"rmse, {method}, matrix"].mean < 5
    assert "coverage, GP, field" in measured
    unit.plot(measured, Figure())
