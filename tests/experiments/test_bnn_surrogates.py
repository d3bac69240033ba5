"""The study of surrogates: its problems, its criteria and a short run that is interrupted."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.experiment import Context, Measurement
from torchzoo.experiments.gp import bnn_surrogates as unit
from torchzoo.experiments.gp import bnn_surrogates_problems as problems


def synthetic(changes=None, *, others=(-0.5, -0.5)):
    """Measurements of five seeds in which all criteria hold; changes replace final regrets."""
    base = {"HMC": 0.1, "SGHMC": 0.3, "ensemble": 0.4, "DKL": 0.2, "I-BNN": 0.5, "GP": 0.6}
    figures = {}
    for problem in unit.DEFAULT:
        for method in (*unit.SURROGATES, "random"):
            value = base.get(method, 1.0)
            if problem == unit.LARGE and method == "I-BNN":
                value = 0.05
            value = (changes or {}).get((method, problem), value)
            for end in range(unit.ROUNDS + 1):
                name = f"regret, round {end}, {method}, {problem}"
                figures[name] = [value + unit.ROUNDS - end + 0.001 * s * value for s in range(5)]
            figures[f"NLL, {method}, {problem}"] = [1.0] * 5
    other = {"I-BNN": others[0], "GP": others[1] + 0.5}
    for method, value in other.items():
        name = f"regret of other seeds, {method}, {unit.LARGE}"
        figures[name] = [value + 0.01 * s for s in range(5)]
    return {name: Measurement(name, tuple(values)) for name, values in figures.items()}


NEARLY = {("I-BNN", unit.LARGE): 0.1001}


@pytest.mark.parametrize(
    ("changed", "others", "failing"),
    [
        ({}, (-0.5, -0.5), []),
        ({("I-BNN", unit.LARGE): 0.5}, (-0.5, -0.5), [0]),
        ({("SGHMC", p): 0.01 for p in unit.DEFAULT}, (-0.5, -0.5), [0, 1]),
        ({("ensemble", p): 0.01 for p in unit.DEFAULT}, (-0.5, -0.5), [0, 1]),
        ({("DKL", p): 0.9 for p in unit.DEFAULT}, (-0.5, -0.5), [2]),
        ({}, (1.0, -0.5), [3]),
    ],
)
def test_criteria_can_fail(changed, others, failing):
    measured = synthetic(changed, others=others)
    outcomes = [c.test(measured)[0] for c in unit.EXPERIMENT.criteria]
    assert [i for i, holds in enumerate(outcomes) if not holds] == failing


def test_a_swap_needs_both_intervals():
    measured = dict(synthetic())
    name = f"regret, round {unit.ROUNDS}, I-BNN, {unit.LARGE}"
    noisy = tuple(0.05 + 0.8 * (s - 2) for s in range(5))
    measured[name] = Measurement(name, noisy)
    holds, text = unit._depends(measured)
    assert not holds
    assert "no pair" in text


def test_ranks():
    ranks = unit.mean_ranks(synthetic({("SGHMC", "Branin"): 0.1}))
    assert ranks["random"] == 7
    assert ranks["HMC"] == pytest.approx((1.5 + 1 + 2) / 3)
    assert sum(ranks.values()) == pytest.approx(28)


@pytest.mark.parametrize(
    ("name", "point", "value"),
    [
        ("Branin", [(math.pi + 5) / 15, 2.275 / 15], -0.397887),
        ("Branin", [(5 - math.pi) / 15, 12.275 / 15], -0.397887),
        ("Hartmann", [0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573], 3.32237),
        ("Ackley", [0.5] * 10, 0.0),
        ("nonstationary", [0.9], 0.0),
    ],
)
def test_known_values(name, point, value):
    f = problems.PROBLEMS[name][1](0)
    x = torch.tensor(point, dtype=torch.float64)
    assert float(f(x)) == pytest.approx(value, abs=1e-4)
    if name != "nonstationary":
        assert (
            f(x + 0.01 * torch.randn(50, len(point), generator=torch.manual_seed(0))) < value
        ).all()


def test_tables():
    table = problems.Table(problems.LARGE, [0, 1], 16)
    picked = table.candidates[:, [3, 7]]
    assert (table(picked)[..., 0] == table.values[:, [3, 7]]).all()
    again = problems.Table(problems.LARGE, [1], 16)
    assert (again.values[0] == table.values[1]).all()
    assert table.values[0, 0] != table.values[1, 0]
    noisy = problems.Table("Ackley", [0], 256)
    error = (noisy.outcomes - noisy.values) / noisy.spread
    assert float(error.std()) == pytest.approx(0.01, rel=0.2)


def test_smoke_run(tmp_path, monkeypatch):
    """Killed in its sixth run, it goes on with that one and gives what a whole run gives."""
    options = unit.EXPERIMENT.budgets["smoke"]
    played = []
    play = unit.play

    def counted(problem, method, *rest):
        played.append((problem, method))
        if len(played) == 6:
            raise KeyboardInterrupt
        return play(problem, method, *rest)

    monkeypatch.setattr(unit, "play", counted)
    unit.play_all.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        experiment.reproduce(unit.EXPERIMENT, budget="smoke", out=tmp_path)
    (folder,) = tmp_path.glob("bnn_surrogates.runs-*")
    assert len(list(folder.glob("*.json"))) == 5
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke", out=tmp_path)
    runs = len(options["problems"]) * len(options["methods"])
    assert len(played) == runs + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bnn_surrogates.json",
        "bnn_surrogates.png",
    ]
    measured = result.measured()
    assert (
        unit.regret(measured, "GP", "Branin").mean <= unit.regret(measured, "GP", "Branin", 0).mean
    )
    settings = tuple(sorted(options.items()))
    alone = play("Branin", "HMC", [0, 1], dict(settings), None)
    assert tuple(alone["regret, round 6"]) == unit.regret(measured, "HMC", "Branin").values
    unit.plot(measured, Figure())
    assert Context(0, options, torch.device("cpu")).out is None
