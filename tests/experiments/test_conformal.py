"""The experiment on certified coverage runs, its parts are right, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.circuits import KnowledgeCircuit, ball_bounds
from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.circuits import certified_sets as sets
from torchzoo.experiments.circuits import conformal as unit
from torchzoo.experiments.circuits import detectors


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 5
    measured = result.measured()
    for r in unit.RADII:
        for name in ("COLEP", "baseline", "baseline, equal size"):
            assert f"{name}: certified at {r}" in measured
    unit.plot(measured, Figure())


def test_rules_say_what_attributes_hold():
    table = detectors.attribute_table()
    assert len({tuple(row) for row in table.tolist()}) == 10
    assert table[8].tolist() == [True, True, True, False, True, False]
    found = detectors.rules(1.0)
    assert len(found) == 60
    assert (8, 10, 1.0) in found
    assert (8, ~13, 1.0) in found


def test_sets_of_a_size():
    torch.manual_seed(0)
    p = torch.rand(50, 10)
    for size in (1.0, 2.42, 7.0):
        assert sets.of_size(p, size).size(p) == pytest.approx(size, abs=0.011)


def test_single_threshold_is_split_conformal():
    torch.manual_seed(0)
    p, y = torch.rand(99, 10), torch.randint(0, 10, (99,))
    rule = sets.single_threshold(p, y)
    chance = p.gather(1, y[:, None])[:, 0]
    assert rule.covered(chance, y).sum() == 90


def test_worst_is_the_bound_of_the_true_class():
    torch.manual_seed(0)
    reasoner = KnowledgeCircuit(16, detectors.rules(1.0)[:9])
    lo = 0.4 * torch.rand(4, 16).double() + 0.1
    y = torch.tensor([0, 1, 1, 7])
    found = sets.reasoned_worst(reasoner, lo, lo + 0.2, y, 0.1)
    ends = ball_bounds(lo, lo + 0.2, sigma=detectors.SIGMA, radius=0.1)
    low, _ = reasoner.bounds(*ends, concepts=[0, 1, 7])
    torch.testing.assert_close(found, low[torch.arange(4), torch.tensor([0, 1, 1, 2])])


def test_attack_stays_in_the_ball_and_lowers_the_chance():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.Softmax(-1))
    with torch.no_grad():
        model[0].weight *= 20
    x, y = torch.rand(30, 64), torch.randint(0, 10, (30,))
    moved = detectors.attack(model, lambda pi: pi, x, y, 0.5, steps=5)
    assert ((moved - x).norm(dim=1) <= 0.5 + 1e-5).all()
    before, after = (model(v).gather(1, y[:, None]).mean() for v in (x, moved))
    assert after < 0.7 * before


GOOD = {
    "COLEP: certified at 0.125": 0.8,
    "COLEP: certified at 0.25": 0.7,
    "COLEP: certified at 0.5": 0.5,
    "baseline: certified at 0.125": 0.7,
    "baseline: certified at 0.25": 0.6,
    "baseline: certified at 0.5": 0.5,
    "baseline, equal size: certified at 0.125": 0.72,
    "baseline, equal size: certified at 0.25": 0.62,
    "baseline, equal size: certified at 0.5": 0.5,
    "permuted: certified at 0.25": 0.58,
    "COLEP: set size": 1.3,
    "baseline: set size": 1.0,
    "permuted: set size": 1.4,
    "baseline, equal size: set size": 1.3,
    "utility: single model": 0.49,
} | {f"utility: quality {q}": 0.45 + 0.7 * (q - 0.5) for q in unit.QUALITIES}
GOOD |= {f"{name}: attacked at {r}": 0.9 for name in ("COLEP", "baseline") for r in unit.RADII}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True, True, True, True, True]),
        ({"baseline: certified at 0.125": 0.81}, [False, True, True, True, True]),
        ({"baseline: certified at 0.25": 0.7}, [False, True, True, None, True]),
        ({"baseline: attacked at 0.5": 0.49}, [True, False, True, True, True]),
        ({"COLEP: attacked at 0.125": 0.79}, [True, False, True, True, True]),
        ({"baseline, equal size: certified at 0.25": 0.7}, [True, True, False, True, True]),
        ({"permuted: certified at 0.25": 0.65}, [True, True, True, False, True]),
        ({"utility: quality 0.8": 0.5}, [True, True, True, True, False]),
        ({"utility: single model": 0.6}, [True, True, True, True, False]),
        ({"utility: single model": 0.44}, [True, True, True, True, False]),
    ],
)
def test_criteria_can_fail(changed, expected):
    figures = GOOD | changed
    measured = {n: Measurement(n, (v - 1e-4, v, v + 1e-4)) for n, v in figures.items()}
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_a_gain_within_the_noise_is_none():
    measured = {n: Measurement(n, (v, v, v)) for n, v in GOOD.items()}
    name = "COLEP: certified at 0.25"
    measured[name] = Measurement(name, (0.5, 0.7, 0.9))
    assert not unit.EXPERIMENT.criteria[0].test(measured)[0]
