"""The experiment on massive activations: its rivals, its verdict rules, and a short run."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.sparsity import massive as unit
from torchzoo.sparsity import Architecture, EmergenceParams


def synthetic(*, r2=0.95, forecast=(0.1, 0.2, 0.3, 0.05), share=0.6, ridge=1.0, count=40):
    figures = {"steps": 400.0, "largest final ratio": 30.0}
    for name, error in zip(unit.PARAMETERS, forecast, strict=True):
        figures[f"mean R² of {name}"] = r2
        figures[f"lowest R² of {name}"] = r2 - 0.1
        figures[f"median forecast error of {name}"] = error
    figures["share of layers with lower BIC than the logarithm"] = share
    figures["error of final ratio by ridge"] = ridge
    figures["error of final ratio by mean"] = 2.0
    for place in unit.PLACES:
        figures |= {f"{place}: ratio {i}": 5.0 + i for i in range(count)}
        params = EmergenceParams(50.0, 0.3, 0.02, 1.1, 20.0)
        figures |= {f"{place}: {name}": value for name, value in params._asdict().items()}
    return {name: Measurement(name, (value,)) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True, True]),
        (synthetic(r2=0.89), [False, True, True, True]),
        (synthetic(forecast=(0.25, 0.2, 0.3, 0.3)), [True, False, True, True]),
        (synthetic(forecast=(0.25, 0.3, 0.2, 0.3)), [True, False, True, True]),
        (synthetic(share=0.5), [True, True, False, True]),
        (synthetic(ridge=2.1), [True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_checkpoints_are_spread_over_log_t():
    steps = unit.checkpoints(400, 40)
    assert len(steps) == len(set(steps)) == 40
    assert (steps[0], steps[-1]) == (1, 400)
    late = np.diff(np.log(steps[-20:]))
    assert late.max() < 1.3 * late.min()


def test_rivals_find_curves_of_their_own():
    t = np.array(unit.checkpoints(400, 40), dtype=float)
    curves = {
        unit.LOGISTIC: 3 + 5 * (1 + (t / 40) ** -2.0) ** -0.7,
        unit.POLYNOMIAL: 2 + 0.3 * np.log(t) ** 2 - 0.02 * np.log(t) ** 4,
        unit.LOG: 4 - 1.5 * np.log(t + 20),
    }
    fits = unit.fits(400, 8)
    for name, r in curves.items():
        r2, _, error = unit.judge(fits[name], unit.PARAMETERS[name], t, r)
        assert r2 > 0.9999, name
        assert error < 0.01, name


def test_scores_by_hand():
    t = np.arange(1.0, 9.0)
    r = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 9.0])

    def mean(t, r):
        return lambda at: np.full_like(at, r.mean())

    r2, bic, error = unit.judge(mean, 1, t, r)
    squares = ((r - r.mean()) ** 2).sum()
    assert r2 == pytest.approx(0.0)
    assert bic == pytest.approx(8 * math.log(squares / 8) + math.log(8))
    assert error == pytest.approx(math.sqrt((4.5**2 + 5.5**2) / 2) / 8.5)  # from 1..6: 3.5


def test_prediction_of_a_model_left_out():
    archs = [
        Architecture(layer, depth, width, 4, 4 * width)
        for depth in (2, 4, 6)
        for width in (32, 64)
        for layer in range(1, depth + 1)
    ]
    follows = {arch: 2.0 + arch.layer / arch.layers for arch in archs}
    ridge, mean = unit.predict_finals(follows)
    assert ridge < 0.2 * mean
    generator = np.random.default_rng(0)
    ridge, mean = unit.predict_finals({arch: generator.standard_normal() for arch in archs})
    assert ridge > 0.9 * mean


def test_smoke_run(tmp_path):
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke", out=tmp_path)
    measured = result.measured()
    assert set(measured) == set(synthetic())
    assert measured["first layer: ratio 0"].mean > 1
    assert measured["largest final ratio"].mean > 1
    assert (tmp_path / "massive.png").stat().st_size > 10_000
