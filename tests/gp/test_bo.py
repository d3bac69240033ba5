"""Expected improvement of samples against closed forms and search, and rounds that survive."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.distributions import Normal

from torchzoo.gp import (
    EnsembleSurrogate,
    GPSurrogate,
    InfiniteWidthSurrogate,
    greedy_batch,
    run_rounds,
    sample_qei,
)
from torchzoo.testing import assert_within_se


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.claim(4, "qEI of samples is the closed form at one point of a Gaussian process", 4.0)
def test_expected_improvement():
    x = torch.rand(6, 1, dtype=torch.float64, generator=seeded())
    posterior = GPSurrogate().fit(x, (6 * x).sin()).posterior(torch.tensor([[0.15], [0.9]]))
    best = 0.4
    mean, spread = posterior.mean[:, 0], posterior.variance[:, 0].sqrt()
    z = (mean - best) / spread
    normal = Normal(torch.zeros_like(z), 1.0)
    expected = (mean - best) * normal.cdf(z) + spread * normal.log_prob(z).exp()
    draws = posterior.rsample((100000,), generator=seeded())[..., 0]
    assert_within_se((draws - best).clamp_min(0), expected.detach())
    found = sample_qei(draws[..., None], torch.full((2,), best))
    torch.testing.assert_close(found, (draws - best).clamp_min(0).mean(0))


def test_joint_improvement():
    """A copy of a point adds nothing; the order doesn't matter; points need common samples."""
    values = torch.randn(500, 4, dtype=torch.float64, generator=seeded())
    pair = sample_qei(values[:, [0, 1]], 0.3)
    assert sample_qei(values[:, [1, 0, 1]], 0.3) == pair
    by_hand = (torch.maximum(values[:, 0], values[:, 1]) - 0.3).clamp_min(0).mean()
    torch.testing.assert_close(pair, by_hand)
    shuffled = torch.stack([values[:, 0], values[:, 0][torch.randperm(500)]], 1)
    assert sample_qei(shuffled, 0.3) > 1.2 * sample_qei(values[:, :1], 0.3)


@pytest.mark.parametrize("q", [1, 2, 3])
def test_greedy_batch(q):
    """Each point is the best addition by `sample_qei`, so 1 - 1/e of the best batch."""
    values = torch.randn(40, 2, 7, dtype=torch.float64, generator=seeded(3))
    best = torch.tensor([0.1, 0.6], dtype=torch.float64)
    taken = torch.zeros(2, 7, dtype=torch.bool)
    taken[1, 2] = True
    found = greedy_batch(values, best, q, taken=taken)
    for problem in range(2):
        rows, open_ = values[:, problem], [i for i in range(7) if not taken[problem, i]]
        chosen = []
        for _ in range(q):
            left = [i for i in open_ if i not in chosen]
            chosen.append(max(left, key=lambda i: sample_qei(rows[:, [*chosen, i]], best[problem])))
        assert found[problem].tolist() == chosen
        top = max(
            sample_qei(rows[:, list(s)], best[problem]) for s in itertools.combinations(open_, q)
        )
        assert sample_qei(rows[:, chosen], best[problem]) >= 0.63 * top
    with pytest.raises(ValueError, match="q: expected"):
        greedy_batch(values, best, 8)


def hill(x):
    return -(x - 0.63).square().sum(-1, keepdim=True)


def grid(batch=2, n=60):
    return torch.rand(batch, n, 2, dtype=torch.float64, generator=seeded(5))


def run(surrogate, **options):
    settings = {"initial": 4, "rounds": 3, "q": 2, "generator": seeded(1)} | options
    return run_rounds(surrogate, hill, grid(), **settings)


def test_rounds():
    """Better than random, no candidate twice, the surrogate fitted to all."""
    surrogate = GPSurrogate()
    found, random = run(surrogate), run(None)
    for history in (found, random):
        assert history.chosen.shape == (2, 10)
        assert (history.chosen[:, :4] == torch.arange(4)).all()
        assert all(len(row.unique()) == 10 for row in history.chosen)
        wide = history.chosen[..., None].expand(2, 10, 2)
        torch.testing.assert_close(history.y, hill(grid().gather(1, wide)))
    assert (surrogate.y == found.y).all()
    assert found.y.amax(1).mean() > random.y.amax(1).mean()
    best = hill(grid()).amax(1)
    assert (best - found.y.amax(1)).max() < 0.02


@pytest.mark.claim(4, "A run that is killed goes on as if it had not been")
@pytest.mark.parametrize("kind", ["ensemble", "ibnn", "random"])
def test_resume(tmp_path, kind):
    def made():
        if kind == "random":
            return None
        if kind == "ibnn":
            return InfiniteWidthSurrogate(generator=seeded(2))
        return EnsembleSurrogate(hidden=(4,), num_steps=20, generator=seeded(2))

    whole = run(made())
    path = tmp_path / "state.safetensors"
    calls = []

    def stops(x):
        calls.append(x)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hill(x)

    settings = {"initial": 4, "rounds": 3, "q": 2, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        run_rounds(made(), stops, grid(), generator=seeded(1), **settings)
    again = run_rounds(made(), hill, grid(), generator=seeded(9), **settings)
    assert (again.chosen == whole.chosen).all()
    assert (again.y == whole.y).all()
    surrogate = made()
    done = run_rounds(surrogate, stops, grid(), generator=seeded(9), **settings)
    assert (done.y == whole.y).all()
    assert len(calls) == 3
    if surrogate is not None:
        assert surrogate.posterior(grid()).mean.shape == (2, 60, 1)


@pytest.mark.slow
def test_resume_after_a_kill(tmp_path):
    """The process is killed at its second round; another one ends with the same history."""
    program = """
        import os, signal, sys, torch
        from torchzoo.gp import EnsembleSurrogate, run_rounds
        calls = []
        def hill(x):
            calls.append(1)
            if len(calls) == 3 and sys.argv[2] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            return -(x - 0.63).square().sum(-1, keepdim=True)
        seeded = lambda s: torch.Generator().manual_seed(s)
        x = torch.rand(2, 60, 2, dtype=torch.float64, generator=seeded(5))
        surrogate = EnsembleSurrogate(hidden=(4,), num_steps=20, generator=seeded(2))
        found = run_rounds(
            surrogate, hill, x, initial=4, rounds=3, q=2, generator=seeded(1),
            checkpoint=sys.argv[1],
        )
        print(found.chosen.tolist())
    """

    def start(path, how):
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / path), how]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    whole = start("whole", "live")
    assert start("part", "die").returncode == -signal.SIGKILL
    assert start("part", "live").stdout == whole.stdout != ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part", "whole"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"initial": 0}, "initial"),
        ({"rounds": -1}, "rounds"),
        ({"q": 0}, "q"),
        ({"rounds": 40}, "candidates"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=f"{name}.*: expected"):
        run(None, **options)
