"""The experiment on the sparsing law runs, and its criteria can fail."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.sparsity import law as unit
from torchzoo.sparsity import SparseFFN, SparsingLaw


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    measured = result.measured()
    assert len(measured) == 1 + 2 * (6 + 1 + 1 + 3) + 20 + 2
    unit.plot(measured, Figure())


def test_checkpoints_are_spread_by_logarithm_after_the_first_fifth():
    steps = unit.checkpoints(500, 6)
    assert (steps[0], steps[-1]) == (100, 500)
    np.testing.assert_allclose(np.diff(np.log(steps)), np.log(5) / 5, rtol=0.02)
    assert len(set(unit.checkpoints(500, 20))) == 20


def test_nonzero_counts_neurons():
    model = nn.Sequential(SparseFFN(4, 6, gated=False), SparseFFN(4, 8))
    x = torch.randn(10, 5)
    shown = [model[0].hidden(x[:, :-1]), model[1].hidden(model[0](x[:, :-1]))]
    expected = sum((h != 0).double().mean().item() for h in shown) / 2
    assert unit.nonzero(model, x) == pytest.approx(expected)


def test_forecasts_are_judged_on_points_that_are_not_fitted():
    tokens = np.geomspace(1, 5, 20)
    planted = SparsingLaw("relu")
    planted.alpha, planted.b, planted.c, planted.a0 = 1.5, -1.0, 0.8, 0.1
    law, line = unit.forecast_errors(tokens, planted.predict(tokens).tolist())
    assert law < 1e-5 < 1e-3 < line
    straight = 0.3 - 0.05 * np.log(tokens)
    law, line = unit.forecast_errors(tokens, straight)
    assert line < 1e-12
    straight[15:] += 0.1
    assert unit.forecast_errors(tokens, straight)[1] == pytest.approx(0.1)


def test_rank_correlation():
    assert unit.rank_correlation([0.5, 0.4, 0.2]) == pytest.approx(-1)
    assert unit.rank_correlation([1, 2, 4, 3]) == pytest.approx(0.8)
    assert unit.rank_correlation([1.0, 1.0]) == 0


def synthetic(
    ours=0.5, rivals=(0.3, 0.45), ranks=(-0.8, 0.8), last=(0.2, 0.4), losses=(1.0, 1.0), law=0.01
):
    """Measurements of three seeds."""
    figures = {"forecast error, law": law, "forecast error, a + b log D": 0.02}
    for i, activation in enumerate(unit.ACTIVATIONS):
        for k in range(unit.RATIOS):
            figures[unit.ratio_name(activation, k)] = last[i]
        figures[f"loss, {activation}"] = losses[i]
        figures[f"rank correlation, {activation}"] = ranks[i]
        figures[f"dropped by CETT, {activation}"] = ours
        figures[f"dropped by top_k, {activation}"] = rivals[0]
        figures[f"dropped by epsilon, {activation}"] = rivals[1]
    for k in range(unit.ZEROS):
        figures[unit.nonzero_name(k)] = 0.5 - 0.01 * k
    way = np.array([-1.0, 0.0, 1.0])
    return {
        name: Measurement(name, tuple(value + 1e-3 * way * (-1 if "CETT" in name else 1)))
        for name, value in figures.items()
    }


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True]),
        (synthetic(ours=0.4), [False, True, True]),
        (synthetic(ours=0.4, rivals=(0.45, 0.3)), [False, True, True]),
        (synthetic(ours=0.4501), [False, True, True]),
        (synthetic(ranks=(0.8, 0.8)), [True, False, True]),
        (synthetic(ranks=(-0.8, -0.8)), [True, False, True]),
        (synthetic(ranks=(-0.0001, 0.8)), [True, False, True]),
        (synthetic(last=(0.4, 0.2)), [True, False, True]),
        (synthetic(losses=(1.06, 1.0)), [True, False, True]),
        (synthetic(losses=(0.94, 1.0)), [True, False, True]),
        (synthetic(law=0.03), [True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
