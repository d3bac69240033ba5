"""The experiment on tuned priors: its criteria, its data, its scores and a short run."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import functional_prior as unit


def synthetic(*, ours=0.4, scaled=0.5, last=0.4, gap=0.6):
    """Measurements of two splits; `last` is for the last data set."""
    figures = {"lengthscale before": 1.0, "lengthscale after": 0.6}
    for name in unit.DATA:
        mine = last if name == unit.DATA[-1] else ours
        values = {"tuned": mine, "N(0, 1)": 0.6, "N(0, 1/fan-in)": scaled, "ensemble": 0.7}
        figures |= {f"NLL, {method}, {name}": value for method, value in values.items()}
    figures |= {"gap deviation, tuned": gap, "gap deviation, ensemble": 0.3}
    return {key: Measurement(key, (v, 1.1 * v)) for key, v in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True]),
        (synthetic(ours=0.55), [False, True]),
        (synthetic(scaled=0.35), [False, True]),
        (synthetic(last=0.7), [True, True]),
        (synthetic(last=2.0), [False, True]),
        (synthetic(gap=0.2), [True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected


def test_splits():
    data = unit.table("diabetes")
    assert data.x.shape == (8, 60, 10)
    assert data.x.mean(1).abs().max() < 1e-5
    assert (data.y.std(1) - 1).abs().max() < 1e-5
    assert len(torch.cat([data.x[0], data.x_new[0]]).unique(dim=0)) == 160
    assert not torch.equal(data.y[0], data.y[1])
    assert ((data.noise > 0.2) & (data.noise < 1)).all()
    gap = unit.toy()
    assert gap.x.abs().min() >= 0.7
    assert gap.x_new.abs().min() < 0.1


def test_scores():
    data = unit.toy()
    f = torch.randn(3, 8, 100, 1, generator=torch.Generator().manual_seed(0))
    found = unit.score(f, data)
    density = stats.norm.pdf(data.y_new.numpy(), f.numpy(), math.sqrt(0.1)).mean(0)
    torch.testing.assert_close(found["NLL"].double(), -torch.from_numpy(density).log().mean((1, 2)))
    error = (f.mean(0) - data.y_new).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(found["error"], error)
    classes = unit.table("wine")
    f = torch.randn(3, 8, 100, 3, generator=torch.Generator().manual_seed(0))
    p = f.softmax(-1).mean(0)
    picked = p.gather(-1, classes.y_new[..., None])
    found = unit.score(f, classes)
    torch.testing.assert_close(found["NLL"], -picked.log().mean((1, 2)))
    torch.testing.assert_close(found["error"], (p.argmax(-1) != classes.y_new).float().mean(1))


def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    for method in unit.METHODS:
        assert 0 <= measured[f"error, {method}, wine"].mean < 1
    assert measured["lengthscale before"].mean > 0
    unit.plot(measured, Figure())
