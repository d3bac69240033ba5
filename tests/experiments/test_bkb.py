"""The experiment on adaptive sketching: its games, its criteria and a short run."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.gp import bkb as unit
from torchzoo.experiments.gp.bkb_games import rbf
from torchzoo.gp import BKB


def synthetic(*, ours=100.0, table=100.0, few=200.0, starved=0.001, few_starved=0.5, **long):
    """Measurements of two seeds; the keywords replace good values."""
    figures = {}
    for problem in (unit.PATHS, *unit.TABLES):
        for mark in range(unit.MARKS):
            for method in unit.METHODS:
                figures[f"regret, {method}, {problem}, mark {mark}"] = 100.0
            figures[f"regret, SoR-8, {problem}, mark {mark}"] = few
            figures[f"regret, BKB, {problem}, mark {mark}"] = (
                ours if problem == unit.PATHS else table
            )
        figures[f"starved arms, BKB, {problem}"] = starved
        figures[f"starved arms, SoR-8, {problem}"] = few_starved
        figures[f"inducing points, {problem}"] = long.get("points", 20.0)
        figures[f"distinct arms, {problem}"] = 25.0
    for mark, pulls in enumerate((100, 200, 400, 800, 1500)):
        figures |= {
            f"long, pulls, mark {mark}": pulls,
            f"long, inducing points, mark {mark}": long.get("late", 80.0) if mark == 4 else 60.0,
            f"long, distinct arms, mark {mark}": long.get("distinct", 200.0),
            f"long, effective dimension, mark {mark}": 30.0,
            f"long, ms a round, BKB, mark {mark}": long.get("ms", 5.0) if mark == 4 else 4.0,
            f"long, ms a posterior, all rows, mark {mark}": long.get("rows", 1e-4) * pulls**2,
            f"long, ms a posterior, rows merged, mark {mark}": 3.0,
        }
    return {name: Measurement(name, (value, value)) for name, value in figures.items()}


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({}, []),
        ({"ours": 126.0}, [0]),
        ({"table": 126.0}, [1]),
        ({"few": 129.0}, [2]),
        ({"starved": 0.011}, [3]),
        ({"few_starved": 0.09}, [3]),
        ({"points": 25.0}, [4]),
        ({"distinct": 100.0}, [4]),
        ({"late": 91.0}, [4]),
        ({"late": 39.0}, [4]),
        ({"ms": 6.5}, [5]),
        ({"rows": 2e-6}, [5]),
    ],
)
def test_criteria_can_fail(changed, failing):
    outcomes = [c.test(synthetic(**changed))[0] for c in unit.EXPERIMENT.criteria]
    assert [i for i, holds in enumerate(outcomes) if not holds] == failing


def test_exponents():
    assert unit.exponent(synthetic(), "ms a posterior, all rows") == pytest.approx(2)
    assert unit.exponent(synthetic(), "effective dimension") == pytest.approx(0)


def game():
    arms = unit.uniform_arms(40, 0)
    return unit.Game(arms, unit.sample_path(arms, 0.2, 1), 0.2, 30, 2)


def test_rivals_have_the_posterior_of_the_bandit():
    """The exact one, and a sketch with all pulled arms, are that of BKB with all of them."""
    play = game()
    chosen = [3, 7, 3, 20, 11, 3]
    counts, sums = play.totals(chosen)
    bandit = BKB(play.kernel, noise_variance=play.lam)
    bandit.initialize(play.arms, chosen, [play.reward(arm, t) for t, arm in enumerate(chosen)])
    pulled = counts.nonzero()[:, 0]
    for found in (
        unit.exact_posterior(play.k, counts, sums, play.lam),
        unit.sketch(play.k, counts, sums, play.lam, pulled, True),
        unit._all_rows(play, torch.tensor(chosen)),
    ):
        torch.testing.assert_close(found[0], bandit.means, rtol=0, atol=1e-8)
        torch.testing.assert_close(found[1], bandit.variances, rtol=0, atol=1e-8)
    mean, variance = unit.sketch(play.k, counts, sums, play.lam, pulled, False)
    assert play.starved((mean, variance), chosen) > 0.3
    assert play.starved((bandit.means, bandit.variances), chosen) == 0


def test_rivals_choose_by_the_bound_of_the_bandit():
    play, chosen = game(), [0]
    bandit = BKB(play.kernel, noise_variance=play.lam, beta_scale=0.3, oversampling=1e9)
    bandit.initialize(play.arms, [0], [play.reward(0, 0)])
    for t in range(1, 30):
        chosen.append(bandit.ask())
        bandit.tell(chosen[-1], play.reward(chosen[-1], t))
    assert play.rival(lambda c, s: unit.exact_posterior(play.k, c, s, play.lam)) == chosen


def test_sample_paths_have_the_kernel_of_the_game():
    arms = unit.uniform_arms(4, 0)
    paths = torch.stack([unit.sample_path(arms, 0.2, seed) for seed in range(3000)])
    expected = rbf(0.2)(arms, arms)
    assert (paths.mT @ paths / 3000 - expected).abs().max() < 0.1


@pytest.mark.parametrize(("name", "rows"), [("diabetes", 442), ("wine", 178)])
def test_tables(name, rows):
    x, values, length = unit.table(name)
    assert x.shape == (rows, 10 if name == "diabetes" else 12)
    assert 2 < length < 6
    assert float(values.std()) == pytest.approx(1)


def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert unit.regret(measured, "BKB").mean < 1.5 * unit.regret(measured, "exact").mean
    assert measured[f"starved arms, SoR-8, {unit.PATHS}"].mean > 0.1
    assert measured["long, pulls, mark 4"].mean == 90
    unit.plot(measured, Figure())
