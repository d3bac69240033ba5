"""The experiment on spikes and images: its criteria, its baselines and a short run."""

import pytest
import torch
from matplotlib.figure import Figure
from torch.distributions import MultivariateNormal, kl_divergence

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import mm_gpvae as unit


def synthetic(*, ours=(0.8, 0.9), other="GPFA", rival=(0.5, 0.6), private=0.1, count=10.0):
    """Measurements of two seeds; rival is the R^2 of the other model."""
    figures = {}
    for kind in unit.MODELS:
        value = ours if kind == unit.OURS else rival if kind == other else (0.1, 0.2)
        figures[f"{kind}: shared from {unit.source(kind)}"] = value
        figures[f"{kind}: variational parameters"] = (20.0, 20.0)
    figures[f"{unit.OURS}: variational parameters"] = (count, count)
    figures[f"{unit.OURS}: shared from private blocks"] = (private, private)
    return {name: Measurement(name, values) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True, True, True]),
        ({"rival": (0.81, 0.91)}, [False, True, True]),
        ({"rival": (0.5, 0.95)}, [False, True, True]),
        ({"other": "GP-VAE", "rival": (0.81, 0.91)}, [False, True, True]),
        ({"other": "N(0, I) VAE", "rival": (0.81, 0.91)}, [False, True, True]),
        ({"other": "time domain", "rival": (0.81, 0.91)}, [True, True, False]),
        ({"private": 0.86}, [True, False, True]),
        ({"count": 20.0}, [True, True, False]),
    ],
)
def test_criteria_can_fail(changed, expected):
    assert [c.test(synthetic(**changed))[0] for c in unit.EXPERIMENT.criteria] == expected


def test_the_dense_divergence():
    """That of full Gaussians over the steps, by torch.distributions."""
    prior = unit.StepPrior(2, 7, dense=True, lengthscale_init=3.0).double()
    torch.manual_seed(0)
    mean, logstd = torch.randn(2, 4, 7, 2, dtype=torch.float64).unbind()
    t = torch.arange(7.0, dtype=torch.float64)
    covariance = (-((t[:, None] - t) ** 2) / 18).exp() + 0.01 * torch.eye(7, dtype=torch.float64)
    p = MultivariateNormal(torch.zeros(7, dtype=torch.float64), covariance)
    q = MultivariateNormal(mean.mT, torch.diag_embed((2 * logstd.mT).exp()))
    torch.testing.assert_close(prior.kl(mean, logstd), kl_divergence(q, p))


def test_determination_is_of_an_affine_map():
    torch.manual_seed(0)
    x = torch.randn(6, 10, 2)
    y = 3 * x[..., 0] - x[..., 1] + 5
    assert unit.determination(x[:4], y[:4], x[4:], y[4:]) == pytest.approx(1, abs=1e-6)
    noise = torch.randn(6, 10)
    assert unit.determination(x[:4], noise[:4], x[4:], noise[4:]) < 0.2


def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert measured["MM-GPVAE: variational parameters"].mean == 2 * 39 * 3
    assert measured["time domain: variational parameters"].mean == 2 * 60 * 3
    for kind in unit.MODELS:
        assert measured[f"{kind}: shared from {unit.source(kind)}"].mean < 1
    unit.plot(measured, Figure())
