"""Experiments: verdicts by the stated rule, seeds, resuming, and the saved result."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchzoo import experiment as ex
from torchzoo.errors import UnknownNameError
from torchzoo.testing.ranks import run_ranks


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


def print_of(experiment):
    options = dict(experiment.budgets["full"])
    return ex._fingerprint(experiment, options, 0, torch.device("cpu"))


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


def drawn(context):
    """Figures that depend on torch's generator, and that tell of the process."""
    context.progress("drawing")
    x = torch.randn(200, 50)
    return {"a": (x.mT @ x).logdet(), "b": torch.get_num_threads(), "process": os.getpid()}


def blocked(context):
    """Seed 0 ends at once; the others as the files in the folder of the results say."""
    if context.seed and (context.out / "hang").exists():
        (context.out / f"{os.getpid()}.pid").touch()
        time.sleep(600)
    if context.seed == 2 and (context.out / "fail").exists():
        partial, deadline = context.out / "test_experiment.partial.json", time.monotonic() + 60
        while not (
            partial.exists() and {"0", "1"} <= json.loads(partial.read_text())["trials"].keys()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        raise ArithmeticError("seed 2 is odd")
    return {"a": context.seed, "b": 9.0}


def meeting(context):
    sizes = run_ranks(dist.get_world_size, 2, timeout=300)
    return {"a": 1.0, "b": sum(sizes)}


def values(result, name):
    return result.measured()[name].values


def test_seeds_side_by_side_have_the_figures_that_they_have_alone(tmp_path):
    seen = []
    experiment = make(drawn)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = ex.reproduce(experiment, seed=4)
    finally:
        torch.set_num_threads(threads)
    both = ex.reproduce(experiment, seed=4, jobs=2, progress=lambda *args: seen.append(args))
    assert values(both, "a") == values(alone, "a")
    assert values(both, "b") == (1, 1, 1)
    assert len(set(values(both, "process"))) == 2
    assert both.device == f"{ex.describe('cpu', threads=1)}, 2 seeds at once"
    assert seen[0] == (0, 3, "")
    assert {text for _, _, text in seen} == {"", *(f"seed {s}: drawing" for s in (4, 5, 6))}
    assert [done for done, _, text in seen if not text] == [0, 1, 2, 3]
    together = ex.reproduce(replace(experiment, together=True), seed=4, jobs=2)
    assert values(together, "a") == values(alone, "a")
    assert len(set(values(together, "process"))) == 1
    assert together.device == ex.describe("cpu", threads=1)


def test_an_error_in_one_seed_ends_the_others_and_keeps_what_is_finished(tmp_path):
    (tmp_path / "fail").touch()
    with pytest.raises(ArithmeticError, match="seed 2 is odd") as caught:
        ex.reproduce(make(blocked), out=tmp_path, jobs=2)
    assert "in blocked" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()
    state = json.loads((tmp_path / "test_experiment.partial.json").read_text())
    assert state["trials"] == {s: {"a": float(s), "b": 9.0} for s in ("0", "1")}
    (tmp_path / "fail").unlink()
    result = ex.reproduce(make(blocked), out=tmp_path)
    assert values(result, "a") == (0.0, 1.0, 2.0)
    assert result.seconds >= round(state["seconds"], 1)


def test_a_run_that_is_killed_goes_on_with_what_is_left(tmp_path):
    script = (
        "import sys; from torchzoo import experiment as ex; from torchzoo.workers import find\n"
        "if __name__ == '__main__':\n"
        "    make, blocked = (find(('killed', sys.argv[1], n)) for n in ('make', 'blocked'))\n"
        "    ex.reproduce(make(blocked), out=sys.argv[2], jobs=2)\n"
    )
    (tmp_path / "main.py").write_text(script)
    (tmp_path / "hang").touch()
    process = subprocess.Popen([sys.executable, tmp_path / "main.py", __file__, tmp_path])
    partial = tmp_path / "killed.partial.json"
    deadline = time.monotonic() + 120
    while not (partial.exists() and len(list(tmp_path.glob("*.pid"))) == 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert json.loads(partial.read_text())["trials"].keys() == {"0"}
    for file in tmp_path.glob("*.pid"):
        while Path(f"/proc/{file.stem}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    (tmp_path / "hang").unlink()
    done = subprocess.run([sys.executable, tmp_path / "main.py", __file__, tmp_path], check=True)
    assert done.returncode == 0
    found = json.loads((tmp_path / "killed.json").read_text())["measurements"][0]
    assert found["values"] == [0.0, 1.0, 2.0]


def test_a_trial_in_a_worker_may_start_processes():
    result = ex.reproduce(make(meeting, seeds=1), jobs=2)
    assert values(result, "b") == (4,)


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "2", None])
def test_a_bad_number_of_jobs_is_refused(jobs):
    with pytest.raises(ValueError, match="jobs: expected an integer at least 1, got"):
        ex.reproduce(make(), jobs=jobs)


def test_a_trial_that_workers_can_not_find_is_refused():
    with pytest.raises(ValueError, match="function: expected one at the top level of a module"):
        ex.reproduce(make(), jobs=2)


def test_a_partial_file_of_other_options_or_damaged_is_not_used(tmp_path):
    partial = tmp_path / "test_experiment.partial.json"
    for text in (
        '{"fingerprint": "x", "trials": [{"a": 99, "b": 0}], "seconds": 1}',
        "{",
        "[]",
        '{"trials": []}',
        json.dumps({"fingerprint": print_of(make()), "trials": [{"a": 99, "b": 0}], "seconds": 1}),
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
