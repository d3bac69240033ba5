"""The experiment on growth curves runs, and its criteria can fail."""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.moe import growth as unit
from torchzoo.moe import fit_growth_moe


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 4
    measured = result.measured()
    assert len(measured) == (2 + 6 + 12 + 2) + (2 + 6) + 3 + 2 + 3
    unit.plot(measured, Figure())


def test_the_data_are_those_of_the_truth():
    panel, classes = unit.draw(20000, 0)
    t, true = panel["t"], unit.truth()
    assert (t.diff(dim=-1) > 0).all()
    assert (t - torch.arange(10)).abs().max() <= 0.25
    assert torch.equal(t[:, [0, 9]], torch.tensor([0.0, 9.0]).double().expand(20000, 2))
    x = panel["expert_x"]
    np.testing.assert_allclose(torch.corrcoef(x.T).numpy(), [[1, 0.3], [0.3, 1]], atol=0.03)
    np.testing.assert_allclose(x.var(0).numpy(), 1, atol=0.05)
    # covariates and residuals of the growth factors make up variances of 25, 1 and 1
    correlation = torch.tensor([[1.0, 0.3], [0.3, 1.0]]).double()
    explained = (true.beta @ correlation @ true.beta.mT).diagonal(dim1=-2, dim2=-1)
    total = explained + true.psi.diagonal(dim1=-2, dim2=-1)
    np.testing.assert_allclose(total.numpy(), [[25, 1, 1]] * 2, rtol=5e-3)
    first = panel["y"][:, 0]
    for k in range(2):
        assert first[classes == k].mean().item() == pytest.approx(100, abs=0.3)
        assert first[classes == k].var().item() == pytest.approx(26, rel=0.05)
    odds = (panel["gate_x"] @ torch.tensor([1.5, 1.7]).double().log()).sigmoid()
    assert classes.double().mean().item() == pytest.approx(odds.mean().item(), abs=0.015)


def test_true_means_are_at_the_mean_covariates():
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).double()
    moved = unit.true_values(x)["alpha"] - unit.truth().alpha
    np.testing.assert_allclose(
        moved[0].numpy(), np.array([0.885, 0.177, 0.177]) * 2 + np.array([1.327, 0.265, 0.265])
    )


def test_coverage_counts_free_parameters():
    panel, _ = unit.draw(200, 1)
    fit = fit_growth_moe(num_classes=2, init=unit.truth(), **panel)
    own = {**fit.params._asdict()}
    assert unit.coverage(fit, own) == 1
    own["theta"] = own["theta"] + 100
    assert unit.coverage(fit, own) == pytest.approx(1 - 2 / fit.num_parameters)
    own["psi"] = own["psi"] + 1000
    assert unit.coverage(fit, own) == pytest.approx(1 - 14 / fit.num_parameters)


def synthetic(bias=0.02, coverage=0.95, gain=0.1, bic=(5, 20, 30), worst=None):
    """Measurements of ten panels: relative biases, one of them worse if asked for."""
    figures, way = {}, np.array([1.0, -1.0] * 5)
    for model in (unit.FULL, unit.MIXTURE):
        for name, true, label in unit.entries(model):
            size = worst[1] if worst and worst[0] == label else bias
            figures[name] = abs(true) * (size + 0.01 * way)
    figures["coverage"] = coverage + 0 * way
    figures[f"{unit.MIXTURE}: adjusted Rand index"] = 0.5 + 0.01 * way
    figures[f"{unit.FULL}: adjusted Rand index"] = 0.5 + gain + 0.02 * way
    for name, gap in zip(unit.RIVALS, bic, strict=True):
        figures[f"BIC of {name} model less full"] = gap + way
    return {name: Measurement(name, tuple(values)) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 4),
        (synthetic(bias=0.11), [False, True, True, True]),
        (synthetic(worst=("gamma[1, 0]", -0.2)), [False, True, True, True]),
        (synthetic(worst=("gate_weight[1, 1]", 0.11)), [False, True, True, True]),
        (synthetic(coverage=0.87), [True, False, True, True]),
        (synthetic(coverage=0.995), [True, False, True, True]),
        (synthetic(gain=0.0), [True, True, False, True]),
        (synthetic(bic=(0, 20, 30)), [True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_a_small_bias_counts_only_beyond_chance():
    measured = synthetic()
    name = unit.figure_name(unit.FULL, "beta", (0, 1, 0))
    noisy = tuple(0.177 * (0.3 + 2.0 * way) for way in (1, -1, 1, -1, 1, -1))
    measured[name] = Measurement(name, noisy)
    assert unit.bias_text(measured, unit.FULL)[0]
    assert unit.rmse(measured[name]) == pytest.approx(0.177 * math.sqrt(0.09 + 4))
