"""The experiment on temperatures runs, and its statistics are what they say."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.integrate import simpson
from scipy.special import expit
from scipy.stats import linregress, norm

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.moe import dense_to_sparse as unit
from torchzoo.moe import GaussianMoE


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 6
    measured = result.measured()
    assert len(measured) == 2 * (4 * 5 + 1)
    unit.plot(measured, Figure())


def test_slope_is_a_regression_of_the_log_median():
    values = np.exp(np.random.default_rng(0).normal(size=(5, 4)))
    exact = linregress(np.log(unit.SIZES), np.log(np.median(values, axis=0))).slope
    assert unit.slope(values) == pytest.approx(exact)
    low, high = unit.interval(values)
    assert low < exact < high
    rate = np.array(unit.SIZES)[None] ** -0.5 * np.ones((3, 1))
    assert unit.interval(rate) == pytest.approx((-0.5, -0.5))


def synthetic(linear_rate, activation_rate, density_rate=-0.5, ratios=(3.0, 1.0)):
    """Measurements of two seeds with given slopes and start ratios."""
    figures = {}
    rates = dict(zip(unit.GATES, (linear_rate, activation_rate), strict=True))
    for gate, ratio in zip(unit.GATES, ratios, strict=True):
        for error in unit.ERRORS:
            rate = density_rate if error == "Hellinger" else rates[gate]
            for n in unit.SIZES:
                figures[unit.figure_name(gate, error, n)] = float(n) ** rate
        last = figures[unit.figure_name(gate, "gating", unit.SIZES[-1])]
        figures[unit.near_name(gate)] = last / ratio
    return {name: Measurement(name, (value, value)) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(-0.1, -0.5), [True] * 6),
        (synthetic(-0.19, -0.38), [False, True, True, True, True, True]),
        (synthetic(-0.3, -0.6), [True, False, True, True, True, True]),
        (synthetic(-0.05, -0.3), [True, True, False, True, True, True]),
        (synthetic(-0.1, -0.5, density_rate=-0.3), [True, True, True, False, True, True]),
        (synthetic(-0.1, -0.5, ratios=(3, 1.2)), [True, True, True, True, False, True]),
        (synthetic(-0.1, -0.5, ratios=(1.9, 1)), [True, True, True, True, True, False]),
    ],
)
def test_criteria_judge_slopes_and_starts(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected


def test_hellinger_is_the_integral_of_scipys_densities():
    near = unit.start_near(unit.truth(), torch.ones(9, dtype=torch.float64), 0.3)
    x, y = np.linspace(-1, 1, 2001)[:, None], np.linspace(-6, 6, 601)

    def root(p):
        weight = expit((np.tanh(p.beta1[0].item() * x) + p.beta0[0].item()) / p.temperature.item())
        lines = zip(p.a.flatten().tolist(), p.b.tolist(), p.var.tolist(), strict=True)
        first, second = (norm.pdf(y, a * x + b, var**0.5) for a, b, var in lines)
        return np.sqrt(weight * first + (1 - weight) * second)

    inner = simpson((root(near) - root(unit.truth())) ** 2, x=y)
    exact = np.sqrt(simpson(inner, x=x[:, 0]) / 4)
    models = [
        GaussianMoE.from_params(p, gate=unit.make_gate("activation")) for p in (near, unit.truth())
    ]
    with torch.no_grad():
        assert unit.hellinger(*models) == pytest.approx(exact, rel=1e-3)


def test_the_second_experts_gate_stays_at_zero():
    generator = torch.Generator().manual_seed(0)
    true = GaussianMoE.from_params(unit.truth(), gate=unit.make_gate("activation"))
    x = 2 * torch.rand(200, 1, generator=generator, dtype=torch.float64) - 1
    y = true.sample(x, generator=generator)
    draws = torch.randn(9, generator=generator, dtype=torch.float64)
    fitted = unit.fit_from(unit.start_near(unit.truth(), draws, 0.3), "activation", x, y, 50)
    assert sum(p.numel() for p in fitted.parameters()) == 9
    assert fitted.params().beta0[1] == 0
    assert fitted.params().beta1[1] == 0
    assert fitted.log_prob(x, y).mean() > true.log_prob(x, y).mean()
