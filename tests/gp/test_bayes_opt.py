"""The loop: it optimises, it is the same again, and it survives being killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from torchzoo.gp import (
    BayesOpt,
    DerivativeGP,
    FullyBayesianSurrogate,
    GPSurrogate,
    KnowledgeGradient,
    MultiTaskSurrogate,
    NoisyExpectedImprovement,
    optimize_acqf,
)
from torchzoo.gp.bayes_opt import ACQUISITIONS

BOUNDS = torch.tensor([[-1.0], [2.0]])
POINTS = torch.rand(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 - 1


def hill(x):
    return -(x[:, 0] - 0.63).square()


def hill_with_gradient(x):
    return hill(x), -2 * (x - 0.63)


def made(**options):
    settings = {"acquisition": "noisy_ei", "candidates": POINTS, "refit_every": 3, "seed": 4}
    return BayesOpt(BOUNDS, **settings | options)


@pytest.mark.claim(5, "The seed determines a search, and a stopped one goes on as if it had not")
@pytest.mark.parametrize("acquisition", ACQUISITIONS)
def test_resume(tmp_path, acquisition):
    whole, part = made(acquisition=acquisition), made(acquisition=acquisition)
    function = hill_with_gradient if acquisition == "dkg" else hill
    whole.run(function, 8)
    path = tmp_path / "state.json"

    def stops(x):
        if len(part.y) == 6:
            raise KeyboardInterrupt
        return function(x)

    with pytest.raises(KeyboardInterrupt):
        part.run(stops, 8, checkpoint=path)
    again = made(acquisition=acquisition)
    again.run(function, 8, checkpoint=path)
    loaded = BayesOpt.load(path)
    for other in (again, loaded):
        assert (other.x == whole.x).all()
        assert (other.y == whole.y).all()
        assert (other.suggest(2) == whole.suggest(2)).all()
        assert (other.suggest() == other.suggest()).all()
    assert json.loads(path.read_text()) == json.loads(json.dumps(loaded.state()))
    with pytest.raises(ValueError, match="seed: expected"):
        made(acquisition=acquisition, seed=5).load_state(loaded.state())
    if acquisition != "random":
        assert (loaded.best()[0] - 0.63).abs() < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "acquisition='mes'",
        "acquisition='dkg'",
        "acquisition='pes'",
        "acquisition='kg', surrogate=FullyBayesianSurrogate(burn_in=20, thin=2, generator=seed)",
        "acquisition='kg', surrogate=MultiTaskSurrogate(2, generator=seed), fidelities=COSTS",
    ],
    ids=["mes", "dkg", "pes", "fully_bayesian", "multi_task"],
)
def test_resume_after_a_kill(tmp_path, options):
    """The process is killed in an evaluation; another one ends with the same points."""
    program = """
        import os, signal, sys, torch
        from torchzoo.gp import BayesOpt, FullyBayesianSurrogate, MultiTaskSurrogate
        COSTS = {0.0: 1.0, 1.0: 5.0}
        seed = torch.Generator().manual_seed(0)
        points = torch.linspace(0, 1, 31, dtype=torch.float64)[torch.arange(31) * 7 % 31, None]
        search = BayesOpt(torch.tensor([[0.0], [1.0]]), candidates=points, OPTIONS)
        if os.path.exists(sys.argv[1]):
            search = BayesOpt.load(sys.argv[1], surrogate=search.surrogate)
        while len(search.y) < 8:
            x = search.suggest()
            if len(search.y) == 6 and sys.argv[2] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            y = -(x[:, 0] - 0.63).square()
            grad = -2 * (x - 0.63) if search.acquisition == "dkg" else None
            task = x[:, 1] if search.fidelities else None
            search.observe(x[:, :1], y, grad=grad, fidelity=task)
            search.save(sys.argv[1])
        print(search.data.inputs.tolist(), search.best())
    """
    program = textwrap.dedent(program).replace("OPTIONS", options)

    def start(path, how):
        command = [sys.executable, "-c", program, str(tmp_path / path), how]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    whole = start("whole", "live")
    assert start("part", "die").returncode == -signal.SIGKILL
    assert start("part", "live").stdout == whole.stdout != ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part", "whole"]


@pytest.mark.claim(5, "A fully Bayesian search averages over hyperparameters, and resumes")
def test_fully_bayesian():
    surrogate = FullyBayesianSurrogate(
        num_samples=4, burn_in=10, thin=2, bounds=BOUNDS, generator=torch.Generator().manual_seed(0)
    )
    search = made(surrogate=surrogate, refit_every=2)
    search.run(hill, 7)
    model, at = search.surrogate_given_data(), POINTS[:, None]
    assert len(model.x) == 7
    each = [NoisyExpectedImprovement(member, search.x)(at) for member in model.members]
    assert (search.suggest()[0] == POINTS[torch.stack(each).mean(0).argmax()]).all()
    other = FullyBayesianSurrogate(num_samples=4, burn_in=10, thin=2, bounds=BOUNDS)
    again = made(surrogate=other, refit_every=2)
    again.load_state(json.loads(json.dumps(search.state())))
    for one in (search, again):
        one.run(hill, 9)
    assert (search.x == again.x).all()
    assert (search.best()[0] - 0.63).abs() < 0.2


@pytest.mark.claim(5, "Tasks are asked by what they tell of the last one for their cost")
def test_multi_task():
    """The first task is upside down and cheap; the last one is rarely asked."""
    points = POINTS[:20]
    surrogate = MultiTaskSurrogate(2, max_iter=20, bounds=BOUNDS)
    search = made(
        acquisition="kg", fidelities={0.0: 1.0, 1.0: 20.0}, surrogate=surrogate, candidates=points
    )
    for _ in range(9):
        x = search.suggest()
        search.observe(x[:, :1], hill(x) * (2 * x[:, 1] - 1), fidelity=x[:, 1])
    tasks = search.data.fidelity
    assert (tasks[4:] == 0).sum() >= 3
    rows = torch.cat([torch.cat([points, torch.full_like(points, s)], 1) for s in (0.0, 1.0)])
    gain = KnowledgeGradient(search.surrogate_given_data(), rows[20:])(rows[:, None])
    cost = torch.where(rows[:, 1] == 1.0, 20.0, 1.0)
    assert (search.suggest()[0] == rows[(gain / cost).argmax()]).all()


def test_minimising_is_maximising_upside_down():
    up, down = made(), made(maximize=False)
    up.run(hill, 7)
    down.run(lambda x: -hill(x), 7)
    assert (up.x == down.x).all()
    assert up.best()[1] == -down.best()[1]
    assert up.best("posterior")[1] >= up.best()[1]


def test_reports_the_highest_mean_not_the_highest_value():
    search = made(num_initial=1)
    x = torch.tensor([-0.9, -0.89, -0.88, 0.5, 0.51, 0.52], dtype=torch.float64)[:, None]
    search.observe(x, torch.tensor([2.1, -2.0, -1.9, 1.0, 1.1, 0.9]))
    assert search.best()[0] > 0.4


def test_batches_spread():
    search = made()
    search.run(hill, 5)
    batch = search.suggest(3)
    assert batch.shape == (3, 1)
    assert len(batch.unique(dim=0)) == 3
    assert search.suggest(1) == batch[0]


def test_constraints():
    """The maximum is out of bounds; before anything is feasible only that counts."""
    search = made(acquisition="ei")
    for _ in range(9):
        x = search.suggest()
        search.observe(x, hill(x), constraints=x - 0.1)
    x, _ = search.best()
    assert -0.25 < x <= 0.1
    none = made(acquisition="ei", num_initial=2)
    none.observe(torch.tensor([[0.5], [1.5]]), [1.0, 2.0], constraints=torch.tensor([[0.5], [2.5]]))
    assert none.suggest() < 0.5
    with pytest.raises(RuntimeError, match="feasible"):
        none.best()


def test_fidelities():
    """Both are used at first; then what gains most by a unit of cost is suggested."""
    search = made(acquisition="kg", fidelities={1.0: 50.0, 0.5: 1.0})
    for _ in range(8):
        x = search.suggest()
        search.observe(x[:, :1], hill(x) + 0.01 * (1 - x[:, 1]), fidelity=x[:, 1])
    levels = search.data.fidelity
    assert levels[:4].tolist() == [0.5, 1.0, 0.5, 1.0]
    rows = torch.cat([torch.cat([POINTS, torch.full_like(POINTS, s)], 1) for s in (0.5, 1.0)])
    gain = KnowledgeGradient(search.surrogate_given_data(), rows[40:])(rows[:, None])
    cost = torch.where(rows[:, 1] == 1.0, 50.0, 1.0)
    assert (search.suggest()[0] == rows[(gain / cost).argmax()]).all()
    assert (search.best()[0] - 0.63).abs() < 0.3
    again = made(acquisition="kg", fidelities={1.0: 50.0, 0.5: 1.0})
    again.load_state(json.loads(json.dumps(search.state())))
    assert (again.suggest() == search.suggest()).all()


def test_gradients():
    search = made(acquisition="ei", surrogate=DerivativeGP(bounds=BOUNDS), maximize=False)
    for _ in range(6):
        x = search.suggest()
        search.observe(x, -hill(x), grad=2 * (x - 0.63))
    assert (search.best()[0] - 0.63).abs() < 0.1
    slope = search.surrogate_given_data().gradient(search.x).mean
    assert ((slope + 2 * (search.x - 0.63)).abs() < 0.3).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"acquisition": "ucb"}, "acquisition"),
        ({"num_initial": 0}, "num_initial"),
        ({"refit_every": 0}, "refit_every"),
        ({"candidates": POINTS[:3]}, "candidates"),
        ({"candidates": POINTS + 3}, "candidates"),
        ({"fidelities": {1.0: 1.0}}, "fidelities"),
        ({"acquisition": "dkg", "surrogate": GPSurrogate()}, "surrogate"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        made(**options)


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        (([5.0], 1.0), {}, "x"),
        (([0.0], [1.0, 2.0]), {}, "y"),
        (([0.0], float("nan")), {}, "y"),
        (([0.0], 1.0), {"constraints": torch.ones(1, 1)}, "constraints"),
        (([0.0], 1.0), {"fidelity": [1.0]}, "fidelity"),
        (([0.0], 1.0), {"grad": torch.ones(1, 1)}, "grad"),
    ],
)
def test_bad_observations(arguments, options, name):
    search = made()
    with pytest.raises(ValueError, match=f"{name}: expected"):
        search.observe(torch.tensor(arguments[0]), arguments[1], **options)
    assert not len(search.y)


def test_optimisation_of_acquisition_functions():
    bowl = lambda x: -(x - 0.3).square().sum((-2, -1))  # noqa: E731
    x, value = optimize_acqf(bowl, candidates=torch.tensor([[0.0], [0.4], [1.0]]), q=2)
    assert x.flatten().tolist() == pytest.approx([0.4, 0.4])
    assert float(value) == pytest.approx(-0.02)
    for bounds, candidates in ((None, None), (BOUNDS, POINTS)):
        with pytest.raises(ValueError, match="bounds: expected"):
            optimize_acqf(bowl, bounds, candidates=candidates)
    with pytest.raises(ValueError, match="bounds: expected"):
        optimize_acqf(bowl, BOUNDS.flip(0))
    with pytest.raises(ValueError, match="q: expected"):
        optimize_acqf(bowl, BOUNDS, 0)


def test_a_box():
    pytest.importorskip("botorch")
    found = [made(candidates=None, surrogate=GPSurrogate(bounds=BOUNDS)) for _ in range(2)]
    for search in found:
        search.run(hill, 7)
    assert (found[0].x == found[1].x).all()
    assert (found[0].best("posterior")[0] - 0.63).abs() < 0.05
