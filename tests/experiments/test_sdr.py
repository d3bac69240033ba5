"""The experiment on sparse patterns: its simulation, its criteria, and a short run."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.sparsity import sdr as unit
from torchzoo.sparsity import optimal_threshold


def synthetic(*, off=0, steep=0.0, theta=0, dense=0.6, sparse=1e-6, trials=200_000):
    """Measurements of two seeds: the predictions, the first `off` of them 10 sigma too high."""
    figures = {"inputs a rate": trials}
    for index, (name, p) in enumerate(unit.predictions().items()):
        figures[name] = p + (10 * (p * (1 - p) / trials) ** 0.5 if index >= 42 - off else 0)
    for n in unit.CELLS:
        figures[unit.rate_name(n, 15)] *= (n / 2000) ** steep
    for case in unit.NOISY:
        figures[unit.theta_name(*case)] = unit.predicted_theta(*case)
    figures[unit.theta_name(*unit.NOISY[3])] += theta
    for s in unit.DENSE_SYNAPSES:
        figures[unit.density_name("dense", s)] = dense
        figures[unit.density_name("sparse", s)] = sparse
    return {name: Measurement(name, (value, value)) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True, True]),
        (synthetic(off=2), [True, True, True, True]),
        (synthetic(off=3), [False, True, True, True]),
        (synthetic(steep=0.35), [True, False, True, True]),
        (synthetic(steep=-0.35), [True, False, True, True]),
        (synthetic(theta=1), [True, True, True, True]),
        (synthetic(theta=-2), [True, True, False, True]),
        (synthetic(dense=0.29), [True, True, True, False]),
        (synthetic(sparse=2e-3), [True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_one_seed_in_two_is_not_enough():
    measured = synthetic(off=5)
    for name, found in synthetic().items():
        measured[name] = Measurement(name, (measured[name].values[0], found.values[0]))
    good, number = unit.inside(measured)
    assert (good, number) == (79, 84)
    assert not unit.EXPERIMENT.criteria[0].test(measured)[0]


def test_errors_of_the_noisy_settings_can_be_counted():
    for n, s, noise in unit.NOISY:
        best = optimal_threshold(n, unit.ACTIVE, s, noise)
        assert best.p_fp + best.p_fn > 1e-3


def test_a_simulation_finds_the_predicted_threshold():
    case = unit.NOISY[2]
    found = unit.best_theta(*case, 20_000, torch.Generator().manual_seed(0))
    assert found == unit.predicted_theta(*case) == 3


def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 4
    measured = result.measured()
    assert len(measured) == 1 + 12 + 30 + 4 + 4
    assert measured[unit.union_name(30)].mean > 0.3
    unit.plot(measured, Figure())
