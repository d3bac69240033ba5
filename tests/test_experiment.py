"""Experiments: verdicts by the stated rule, seeds, resuming, and the saved result."""

import json
import math

import pytest
import torch

from torchzoo import experiment as ex
from torchzoo.errors import UnknownNameError


def make(trial=None, criteria=None, seeds=3):
    return ex.Experiment(
        paper=48,
        claim=ex.Claim("b beats a", "+20 %", "abstract"),
        setup="random numbers",
        baseline="a",
        criteria=criteria
        or [
            ex.Criterion("b > a", lambda m: (m["b"].mean > m["a"].mean, f"{m['b'].mean:.2f}")),
            ex.Criterion("a > 0", lambda m: (m["a"].mean > 0, f"{m['a'].mean:.2f}")),
        ],
        budgets={"full": {"seeds": seeds, "n": 4}, "smoke": {"seeds": 1, "n": 2}},
        trial=trial or (lambda c: {"a": 1.0 + c.seed, "b": 3.0 + 2 * c.seed}),
        plot=lambda m, figure: figure.subplots().bar(list(m), [v.mean for v in m.values()]),
    )


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([True, True], "reproduced"),
        ([True, None], "reproduced"),
        ([True, False], "partly"),
        ([True, False, None], "partly"),
        ([False, True], "not reproduced"),
        ([None, True], "not reproduced"),
        ([], "not reproduced"),
    ],
)
def test_verdict_follows_the_rule(outcomes, expected):
    assert ex.verdict(outcomes) == expected


def test_measurement_statistics_and_paired_difference():
    a = ex.Measurement("a", (1.0, 2.0, 4.0))
    b = ex.Measurement("b", (2.0, 3.0, 6.0))
    assert a.mean == pytest.approx(7 / 3)
    assert a.std_error == pytest.approx(
        math.sqrt(sum((v - 7 / 3) ** 2 for v in a.values) / 2) / math.sqrt(3)
    )
    assert (b - a).values == (1.0, 1.0, 2.0)
    assert ex.Measurement("one", (5.0,)).std_error == 0.0
    low, high = ex.Measurement("m", (1.0, 2.0, 3.0)).interval
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert ex.Measurement("one", (5.0,)).interval == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="zip"):
        _ = a - ex.Measurement("short", (1.0,))


def test_reproduce_runs_every_seed_and_saves_one_object(tmp_path):
    result = ex.reproduce(make(), seed=7, out=tmp_path)
    assert result.seeds == [7, 8, 9]
    assert result.measured()["a"].values == (8.0, 9.0, 10.0)
    assert result.verdict == "reproduced"
    saved = json.loads((tmp_path / "test_experiment.json").read_text())
    assert saved == json.loads(json.dumps(result.to_json()))
    assert saved.keys() >= {
        *("paper", "verdict", "rule", "claim", "measurements", "baseline"),
        *("seeds", "seconds", "versions", "device"),
    }
    assert (tmp_path / "test_experiment.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "test_experiment.partial.json").exists()


def test_trials_are_seeded():
    experiment = make(lambda c: {"a": torch.rand(()).item(), "b": 2.0})
    first = ex.reproduce(experiment, seed=3).measured()["a"].values
    assert ex.reproduce(experiment, seed=3).measured()["a"].values == first
    assert ex.reproduce(experiment, seed=4).measured()["a"].values[:2] == first[1:]


def test_an_interrupted_run_goes_on_after_the_last_finished_seed(tmp_path):
    ran = []

    def trial(context, stop=True):
        if stop and context.seed == 2:
            raise KeyboardInterrupt
        ran.append(context.seed)
        return {"a": float(context.seed), "b": 9.0}

    calls = {"stop": True}
    experiment = make(lambda c: trial(c, calls["stop"]))
    with pytest.raises(KeyboardInterrupt):
        ex.reproduce(experiment, out=tmp_path)
    assert not (tmp_path / "test_experiment.json").exists()
    calls["stop"] = False
    result = ex.reproduce(experiment, out=tmp_path)
    assert ran == [0, 1, 2]
    assert result.measured()["a"].values == (0.0, 1.0, 2.0)


def test_a_partial_file_of_other_options_or_damaged_is_not_used(tmp_path):
    partial = tmp_path / "test_experiment.partial.json"
    for text in (
        '{"fingerprint": "x", "trials": [{"a": 99, "b": 0}], "seconds": 1}',
        "{",
        "[]",
        '{"trials": []}',
    ):
        partial.write_text(text)
        assert ex.reproduce(make(), out=tmp_path).measured()["a"].values == (1.0, 2.0, 3.0)


def test_progress_reports_every_seed():
    seen = []
    experiment = make(lambda c: (c.progress("training"), {"a": 1.0, "b": 2.0})[1])
    ex.reproduce(experiment, progress=lambda *args: seen.append(args))
    assert seen[0] == (0, 3, "")
    assert (1, 3, "training") in seen
    assert seen[-1] == (3, 3, "")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_an_error(value):
    with pytest.raises(ValueError, match="seed 0: the trial gave a"):
        ex.reproduce(make(lambda c: {"a": value, "b": 0.0}))


def test_unknown_budget():
    with pytest.raises(UnknownNameError, match=r"no budget 'smok'.*did you mean smoke"):
        ex.reproduce(make(), budget="smok")


def test_load_of_an_unbuilt_paper():
    from torchzoo.catalogue import Paper

    paper = Paper(1, "T", "neuro", "s", "c")
    with pytest.raises(UnknownNameError, match=r"paper 1 \(T\) has no experiment yet"):
        ex.load(paper)
