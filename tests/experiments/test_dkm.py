"""The experiment on deep kernel machines: its sampler, its criteria and a short run."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import dkm as unit
from torchzoo.testing import assert_within_se


def synthetic(*, near=(0.2, 0.06, 0.02, 0.01), far=0.5, loose=(0.7, 0.01), ours=0.1, worse=4):
    """Measurements of two seeds; ours is that of as many tables as can be worse."""
    figures = {f"from DKM, width {i}": value for i, value in enumerate(near)}
    figures |= {f"from NNGP, width {i}": far for i in range(4)}
    figures |= {f"width, {i}": 2.0**i for i in range(4)}
    figures |= {"from DKM, not copied": loose[0], "from NNGP, not copied": loose[1]}
    for index, name in enumerate(unit.DATA):
        for method in unit.METHODS:
            value = ours if method == "DKM" and index < worse else 0.1
            figures |= {f"error, {method}, {name}": value, f"NLPD, {method}, {name}": value}
        figures |= {f"NLPD, nu {nu:g}, {name}": 1.0 for nu in unit.NUS}
    return {name: Measurement(name, (value, value)) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True, True]),
        ({"near": (0.2, 0.06, 0.051, 0.01)}, [False, True]),
        ({"near": (0.2, 0.03, 0.04, 0.01)}, [False, True]),
        ({"far": 0.019}, [False, True]),
        ({"loose": (0.3, 0.4)}, [False, True]),
        ({"ours": 0.11, "worse": 2}, [True, False]),
        ({"ours": 0.11, "worse": 1}, [True, True]),
    ],
)
def test_criteria_can_fail(changed, expected):
    assert [c.test(synthetic(**changed))[0] for c in unit.EXPERIMENT.criteria] == expected


def test_the_sampler_draws_from_its_density():
    """A Gaussian of unequal scales; every fifth draw, as neighbours depend on each other."""
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    kept = unit.hmc(
        lambda x: -(x / scales).square().sum() / 2,
        torch.zeros(3, dtype=torch.float64),
        3000,
        torch.Generator().manual_seed(0),
    )
    draws = torch.stack(kept)[::5]
    assert_within_se(draws, 0.0)
    assert_within_se(draws.square(), scales**2, n_se=5)


def test_the_density_of_whitened_features():
    """Against the prior and likelihood of the features themselves."""
    x, y = unit.xor_points()
    white = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = unit.deep_gp(x, white)[-1]
    mvn = torch.distributions.MultivariateNormal
    zero = torch.zeros(8, dtype=torch.float64)
    k = unit.relu_kernel(gram) + 0.1 * torch.eye(8, dtype=torch.float64)
    likelihood = mvn(zero, k).log_prob(y.mT).sum() + 4 * math.log(2 * math.pi)
    expected = 3 * likelihood - white.square().sum() / 2
    torch.testing.assert_close(unit.log_density(x, y, white, 3), expected)


def test_splits_are_disjoint_and_standardised():
    x, y, x_val, y_val, x_new, y_new = unit.split("diabetes", 400, 0)
    assert [len(part) for part in (x, x_val, x_new)] == [256, 64, 80]
    assert x.mean(0).abs().max() < 1e-5
    rows = torch.cat([x, x_val, x_new])
    assert len(rows.unique(dim=0)) == 400
    assert (y.shape, y_val.shape, y_new.shape) == ((256, 1), (64, 1), (80, 1))
    assert not torch.equal(unit.split("diabetes", 400, 1)[0], x)


def test_the_baseline_without_nu_keeps_its_layers():
    x, y = torch.randn(30, 2), torch.randn(30, 1)
    options = {"inducing": 5, "steps": 3}
    fixed, free = (unit.fit(x, y, nu, options, 0) for nu in (None, 1.0))
    assert fixed.layers[0].kl() == 0
    assert free.layers[0].kl() > 0
    assert (fixed.mean != 0).any()


def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert 0 < measured["from DKM, width 3"].mean < 1
    assert 0 <= measured["error, SVM, digits"].mean < 0.9
    unit.plot(measured, Figure())


@pytest.mark.slow
@pytest.mark.claim(
    7,
    "In deep Gaussian processes of width 128, data copied as often, Gram matrices are within 5 % "
    "of the optimised ones; without copies they are those of the NNGP",
    tolerance=0.05,
)
def test_wide_deep_gaussian_processes():
    figures = unit.theory((128,), 400)
    assert figures["from DKM, width 0"] < 0.05
    assert figures["from NNGP, width 0"] > 0.3
    assert figures["from NNGP, not copied"] < 0.05
    assert figures["from DKM, not copied"] > 0.3
