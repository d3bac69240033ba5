"""The experiment on fields with holes: its criteria, its scene and a short run."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import rvgp as unit


def synthetic(*, name="torus", ours=0.02, scalar=0.05, rbf=0.04, count=0.2, off=1.0):
    """Measurements of two seeds; the arguments hold on one surface, good values on the others."""
    figures = {}
    for each in unit.SURFACES:
        here = each == name
        values = {"RVGP": ours if here else 0.02, "scalar": scalar, "RBF": rbf}
        figures |= {f"cosine error, {m}, {each}": value for m, value in values.items()}
        for method in ("RVGP", "scalar"):
            bad = here and method == "RVGP"
            figures[f"singularities off, {method}, {each}"] = count if bad else 0.5
            figures[f"edges off, {method}, {each}"] = off if bad else 1.5
    return {name: Measurement(name, (value, value)) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True]),
        (synthetic(ours=0.06), [False, True, True]),
        (synthetic(name="sphere", ours=0.05), [False, True, True]),
        (synthetic(name="folded sheet", ours=0.041), [True, False, True]),
        (synthetic(count=0.6), [True, True, False]),
        (synthetic(off=1.6), [True, True, False]),
        (synthetic(name="folded sheet", off=9.0), [True, True, True]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected


def test_gains_that_may_be_chance_fail():
    measured = synthetic()
    name = "cosine error, RVGP, folded sheet"
    measured[name] = Measurement(name, (0.0, 0.06))
    assert not unit.EXPERIMENT.criteria[1].test(measured)[0]


def test_lost_singularities():
    """A field turned by a right angle keeps its singularities, one of another axis has none."""
    place = unit.scene("sphere", 240, 80)
    points = place.points
    axis = torch.tensor([1.0, 2.0, 0.5]).double().expand_as(points)
    field = torch.linalg.cross(axis, points)
    top = int((points @ axis[0]).argmax())
    hole = torch.cdist(points, points)[top].argsort()[:15]
    task = unit.Task(field, torch.arange(50), hole, torch.arange(50, 80))
    assert unit.lost(place, torch.linalg.cross(points, field), task) == (0.0, 0.0)
    across = torch.tensor([2.0, -1.0, 0.0]).double().expand_as(points)
    other = torch.linalg.cross(across, points)
    count, off = unit.lost(place, other, task)
    assert count == 1
    assert off > 3
    assert unit.cosine_error(-field, task, hole) == pytest.approx(2)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert len(result.criteria) == 3
    sphere = {m: measured[f"cosine error between, {m}, sphere"].mean for m in unit.METHODS}
    assert sphere["RVGP"] < 0.3
    assert sphere["spline"] < sphere["nearest"]
    unit.plot(measured, Figure())
