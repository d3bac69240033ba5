"""The experiment on Poisson equations: its criteria and a short run."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import gp_pde as unit


def synthetic(*, ours=1e-4, nets=0.5, one=0.1, off=0.001, failing=2):
    """Measurements of two seeds; the arguments hold for some problems, good values for the rest."""
    figures = {}
    for index, name in enumerate(unit.PROBLEMS):
        bad = index < failing
        figures[f"error, GP-HM, {name}"] = ours if bad else 1e-4
        for method in unit.BASELINES[:2]:
            figures[f"error, {method}, {name}"] = nets if bad else 0.5
        for method in unit.BASELINES[2:]:
            figures[f"error, {method}, {name}"] = one if bad else 0.1
        figures[f"off the top frequency, {name}"] = off if index == 3 else 0.0
    return {name: Measurement(name, (value, value)) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True]),
        (synthetic(ours=0.011), [False, True]),
        (synthetic(ours=0.011, failing=1), [True, True]),
        (synthetic(nets=0.9e-3), [False, True]),
        (synthetic(one=4.9e-4), [False, True]),
        (synthetic(off=0.011), [True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected


@pytest.mark.parametrize("name", unit.PROBLEMS)
def test_sources_are_laplacians(name):
    problem = unit.PROBLEMS[name]
    points = torch.rand(5, problem.dims, dtype=torch.float64)
    h, total = 1e-5, torch.zeros(5, dtype=torch.float64)
    for d in range(problem.dims):
        step = h * torch.eye(problem.dims, dtype=torch.float64)[d]
        sides = problem.solution(points + step) + problem.solution(points - step)
        total += (sides - 2 * problem.solution(points)) / h**2
    torch.testing.assert_close(total, problem.source(points), rtol=1e-4, atol=0.02)


def test_top_frequency():
    gp = unit.solver(unit.PROBLEMS["sin 6x cos 100x"], 8, unit.StudentTMixtureKernel)
    kernel = gp.kernels[0]
    known = torch.tensor([94.0, 106.0], dtype=torch.float64) / (2 * torch.pi)
    with torch.no_grad():
        kernel.log_weights.fill_(-20)
        kernel.raw_frequencies[:2] = known * torch.tensor([1.0, 1.005])
        kernel.log_weights[:2] = 0
    assert unit.off_top(gp, (94.0, 106.0)) == pytest.approx(0.005)
    assert unit.effective(gp) == pytest.approx(2, abs=1e-3)
    kernel.log_weights.data[1] = -8
    assert unit.off_top(gp, (94.0, 106.0)) > 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert measured["error, GP-HM, sin 6x cos 100x"].mean < 0.1
    assert measured["error, PINN, sin 100x"].mean > 0.5
    assert measured["error, finite differences, sin 100x"].mean == pytest.approx(0.156, abs=0.01)
    unit.plot(measured, Figure())
