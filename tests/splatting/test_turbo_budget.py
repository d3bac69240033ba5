"""The number of splats that the convergence allows, against power laws in closed form."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest

from torchzoo.splatting import ConvergenceBudget


def fed(losses, **options):
    budget = ConvergenceBudget(100, 2100, **options)
    for step, loss in enumerate(losses, 1):
        budget.update(step, loss)
    return budget


def power_law(steps, a=0.3, slow_from=1.0, slow=0.5):
    """Losses `t^-a` whose exponent is `slow` times as much after a share of the steps."""
    t, turn = np.arange(1, steps + 1), slow_from * steps
    late = turn**-a * (t / turn) ** (-a * slow)
    return np.where(t <= turn, t**-a, late)


@pytest.mark.claim(
    159,
    "Losses t^-a give a for both exponents, no correction, and the growth of alpha_base",
    tolerance=1e-3,
)
@pytest.mark.parametrize("steps", [200, 3000])
@pytest.mark.parametrize("a", [0.1, 0.3, 1.2])
def test_power_laws_are_recognised(steps, a):
    budget = fed(3.7 * power_law(steps, a), alpha_base=1.3)
    assert budget.exponents() == pytest.approx((a, a), abs=1e-3)
    assert budget.alpha == pytest.approx(1.3, abs=1e-3)


@pytest.mark.claim(
    159,
    "The exponents are the slopes, since the warm-up and over its last fifth, of equally smoothed "
    "logarithms",
    tolerance=1e-9,
)
@pytest.mark.parametrize(("steps", "warm_up"), [(170, 17), (1500, 100)])
def test_exponents_of_noisy_losses(steps, warm_up):
    random = np.random.default_rng(0)
    losses = power_law(steps, 0.4) * np.exp(0.3 * random.standard_normal(steps))
    weights = 0.98 ** (np.arange(steps)[:, None] - np.arange(steps))
    weights = np.tril(weights) / np.tril(weights).sum(1, keepdims=True)
    x, y = weights @ np.log(np.arange(1, steps + 1)), weights @ np.log(losses)
    x, y = x[warm_up:], y[warm_up:]
    last = math.ceil(0.2 * len(x))
    expected = -np.polyfit(x, y, 1)[0], -np.polyfit(x[-last:], y[-last:], 1)[0]
    budget = fed(losses)
    assert budget.exponents() == pytest.approx(expected, rel=1e-9)
    eps = (expected[0] - expected[1]) / abs(expected[0])
    assert budget.alpha == pytest.approx(1 + 0.5 * math.tanh(eps), rel=1e-9)


@pytest.mark.claim(
    159,
    "The budget is N0 at the start, the cap at the end, and grows like t^alpha over t from 1 to "
    "100; it is never taken back",
    tolerance=0.5,
)
def test_the_curve():
    budget = fed(power_law(400, 0.5, slow_from=0.5, slow=0.1))
    alpha = budget.alpha
    assert 1.2 < alpha < 1.5
    progress = np.linspace(0, 1, 41)
    counts = [budget.allowed(p) for p in progress]
    t = 1 + 99 * progress
    expected = 100 + (t**alpha - 1) / (100**alpha - 1) * 2000
    assert np.abs(counts - expected).max() <= 0.5
    assert (counts[0], counts[-1]) == (100, 2100)
    assert all(a <= b for a, b in pairwise(counts))
    assert budget.allowed(0) == 100  # what was allowed later counts later
    for step in range(401, 801):  # a standstill: the curve sinks, what was allowed stays
        budget.update(step, 0.1)
    assert budget.alpha > alpha
    assert [budget.allowed(p) for p in progress] == counts
    budget.reset()
    assert budget.allowed(0.5) == 1100


@pytest.mark.claim(
    159,
    "Where the loss has slowed down in the last fifth, fewer splats are allowed half-way; where "
    "it has sped up, more",
    tolerance=None,
)
@pytest.mark.parametrize("steps", [200, 3000])
def test_a_slowdown_lowers_the_budget(steps):
    even = fed(power_law(steps)).allowed(0.5)
    assert even == 1100
    assert fed(power_law(steps, slow_from=0.8)).allowed(0.5) < even - 20
    assert fed(power_law(steps, slow_from=0.8, slow=2.0)).allowed(0.5) > even + 20
    assert fed(power_law(steps, slow_from=0.8), lam=0.0).allowed(0.5) == even


@pytest.mark.claim(159, "Losses that are not a number are left out, with a warning", tolerance=0)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_bad_losses_are_left_out(bad):
    losses = power_law(300, slow_from=0.7)
    budget, clean = (ConvergenceBudget(100, 2100) for _ in range(2))
    for step, loss in enumerate(losses, 1):
        if step % 50 == 0:
            with pytest.warns(UserWarning, match=f"loss {bad} of step {step} is left out"):
                budget.update(step, bad)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            budget.update(step, loss)
        clean.update(step, loss)
    assert budget.exponents() == clean.exponents() != (0.0, 0.0)


def test_too_few_steps_tell_nothing():
    budget = ConvergenceBudget(10, 20)
    for step in range(1, 6):
        assert budget.exponents() == (0.0, 0.0)
        assert budget.alpha == 1
        budget.update(step, 1 / step)
    for _ in range(20):
        budget.update(5, 0.3)
    assert all(map(math.isfinite, budget.exponents()))


def test_saving_and_loading():
    losses = power_law(250, slow_from=0.6)
    whole, half, again = fed(losses), fed(losses[:120]), ConvergenceBudget(100, 2100)
    counts = [half.allowed(p) for p in (0.2, 0.4)]
    again.load_state_dict(half.state_dict())
    for step, loss in enumerate(losses[120:], 121):
        again.update(step, loss)
    assert again.exponents() == whole.exponents()
    assert again.allowed(0.4) == max(counts[1], whole.allowed(0.4))
    empty = ConvergenceBudget(1, 2)
    empty.load_state_dict(ConvergenceBudget(1, 2).state_dict())
    assert empty.allowed(0.0) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n0": -1, "cap": 3}, "n0: got -1"),
        ({"n0": 5, "cap": 4}, "cap: got 4, expected at least n0 = 5"),
        ({"n0": 1, "cap": 4, "lam": 1.0}, "lam: got 1.0"),
        ({"n0": 1, "cap": 4, "lam": -0.1}, "lam: got -0.1"),
        ({"n0": 1, "cap": 4, "ema": 1.0}, "ema: got 1.0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        ConvergenceBudget(**options)


def test_bad_calls():
    budget = ConvergenceBudget(1, 2)
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress: got"):
            budget.allowed(progress)
    with pytest.raises(ValueError, match="step: got 0"):
        budget.update(0, 1.0)
    assert repr(budget) == "ConvergenceBudget(1, 2, alpha_base=1.0, lam=0.5, ema=0.98)"
