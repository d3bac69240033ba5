"""The experiment on random-feature attention runs, and its criteria can fail."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import Ridge

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.attention import random_feature as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    measured = result.measured()
    assert len(measured) == 3 * 4 * 4 + 2
    assert len({m.values for m in measured.values()}) == len(measured)
    unit.plot(measured, Figure())


def test_arms_have_as_many_trained_parameters():
    sizes = {sum(p.numel() for p in unit.build(arm, 8, 5, 0).parameters()) for arm in unit.ARMS}
    assert sizes == {55}


def test_inputs_are_on_the_sphere():
    query, keys = unit.draw(200, 8, torch.Generator().manual_seed(0))
    assert query.shape == (200, 10)
    assert keys.shape == (200, 8, 10)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(200, 8))
    torch.testing.assert_close(query.norm(dim=-1), torch.ones(200))


@pytest.mark.parametrize("size", [7, 60])
def test_ridge_errors_are_scikit_learns(size):
    """Dual and primal; the penalty is that of the least validation error, not of the test."""
    rng = np.random.default_rng(0)
    x, parts, n = rng.normal(size=(90, size)), (50, 15, 25), 30
    y = x[:, :2] + 0.5 * rng.normal(size=(90, 2)) + 3
    got = unit.ridge_errors(torch.tensor(x), torch.tensor(y), n, parts)
    train, val, test = (slice(0, n), slice(50, 65), slice(65, 90))
    gram = x[train] @ x[train].T if n < size else x[train].T @ x[train]
    scale = np.linalg.eigvalsh(gram).mean()
    for column in range(2):
        centre = y[train, column].mean()
        errors = []
        for penalty in unit.PENALTIES.numpy() * scale:
            peer = Ridge(alpha=penalty, fit_intercept=False, solver="svd")
            peer.fit(x[train], y[train, column] - centre)
            residuals = [peer.predict(x[p]) + centre - y[p, column] for p in (val, test)]
            errors.append([np.mean(r**2) for r in residuals])
        best = min(errors)[1] / y[test, column].var()
        assert got[column].item() == pytest.approx(best, rel=1e-6)


def synthetic(ours=0.1, theirs=1.0, gain=0.1, growth=(1.1, 3.0), worst=None):
    """Measurements of four seeds, the last seed's RFA on the quadratic mean given by `worst`."""
    way = np.array([1.0, -1.0, 1.0, -1.0])
    figures = {
        unit.figure_name(arm, kind, power, n): 0.5 + 0.001 * way
        for arm in unit.ARMS
        for kind, power in unit.TARGETS
        for n in unit.SIZES
    }
    quadratic = ours + 0 * way
    quadratic[-1] = worst or ours
    figures[unit.figure_name("RFA", "mean", 2, 800)] = quadratic
    figures[unit.figure_name("RFMLP", "mean", 2, 800)] = theirs + 0 * way
    for n in (800, 1600):
        figures[unit.figure_name("BRFA", "correlation", 3, n)] = 0.5 - gain + 0.02 * way
    for arm, factor in zip(("RFA", "RFMLP"), growth, strict=True):
        figures[unit.figure_name(arm, "mean", 1, 200, 16)] = 0.5 * factor + 0 * way
    return {name: Measurement(name, tuple(values)) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 3),
        (synthetic(ours=0.26, theirs=2.0), [False, True, True]),
        (synthetic(theirs=0.39), [False, True, True]),
        (synthetic(worst=0.3), [False, True, True]),
        (synthetic(gain=0.005), [True, False, True]),
        (synthetic(gain=-0.1), [True, False, True]),
        (synthetic(growth=(1.6, 3.0)), [True, True, False]),
        (synthetic(growth=(0.6, 3.0)), [True, True, False]),
        (synthetic(growth=(1.1, 1.4)), [True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_bias_must_help_at_both_sizes():
    measured = synthetic()
    name = unit.figure_name("BRFA", "correlation", 3, 1600)
    measured[name] = Measurement(name, (0.6,) * 4)
    assert not unit.bias_helps(measured)[0]
