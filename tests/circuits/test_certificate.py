"""Smoothing bounds against closed forms of linear classifiers, and confidence intervals."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import nn

from torchzoo.circuits import (
    ball_bounds,
    certified_coverage,
    mean_bounds,
    smoothed_bounds,
    smoothed_mean,
)

SIGMA = 0.5


class Linear(nn.Module):
    """Votes of half-spaces, or soft outputs Phi(w x + b), whose smoothing has a closed form."""

    def __init__(self, soft):
        super().__init__()
        self.weight = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, 0.1]])
        self.bias, self.soft = torch.tensor([0.2, -0.1]), soft

    def margin(self, x):
        return x @ self.weight.T + self.bias

    def forward(self, x):
        margin = self.margin(x)
        return torch.special.ndtr(margin) if self.soft else (margin > 0).float()

    def smoothed(self, x):
        """E over the noise: Phi(m / sqrt(sigma^2 |w|^2 + s^2)), s = 1 for soft and 0 for votes."""
        spread = (SIGMA**2 * self.weight.square().sum(1) + float(self.soft)).sqrt()
        return torch.special.ndtr(self.margin(x) / spread)

    def moved(self, x, radius, way):
        """For each output the point of the ball where it is least or most."""
        step = self.weight / self.weight.norm(dim=1, keepdim=True)
        return [x + way * radius * step[j] for j in range(2)]


def points(seed, n):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.claim(
    21,
    "Bounds of a smoothed linear classifier contain its closed form over the ball, and fail no "
    "more often than stated",
)
@pytest.mark.parametrize("output", ["vote", "soft"])
@pytest.mark.parametrize("radius", [0.0, 0.4])
def test_linear_closed_form(output, radius):
    model, x = Linear(output == "soft"), points(0, 1500)
    lo, hi = smoothed_bounds(
        model,
        x,
        sigma=SIGMA,
        radius=radius,
        num_samples=200,
        alpha_cert=0.02,
        output=output,
        batch_size=60_000,
        generator=torch.Generator().manual_seed(1),
    )
    worst = torch.stack([model.smoothed(p)[:, j] for j, p in enumerate(model.moved(x, radius, -1))])
    best = torch.stack([model.smoothed(p)[:, j] for j, p in enumerate(model.moved(x, radius, 1))])
    held = (lo - 1e-6 <= worst.T) & (hi + 1e-6 >= best.T)
    failed = 1 - held.double().mean().item()
    assert failed <= 0.02 + 3 * math.sqrt(0.02 / 3000)
    if output == "vote":
        # for half-spaces the ball's bound is the closed form at the ball's edge
        exact = model.smoothed(x)
        low, high = ball_bounds(exact, exact, sigma=SIGMA, radius=radius)
        torch.testing.assert_close(low, worst.T, rtol=0, atol=1e-5)
        torch.testing.assert_close(high, best.T, rtol=0, atol=1e-5)


@pytest.mark.claim(
    21, "A projected-gradient attack within the radius never leaves the smoothed bounds"
)
def test_attack_stays_inside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4), nn.Sigmoid())
    with torch.no_grad():
        model[2].weight *= 12
    x, radius = torch.randn(40, 6), 0.4
    lo, hi = smoothed_bounds(
        model, x, sigma=SIGMA, radius=radius, alpha_cert=1e-4, output="soft", batch_size=40_000
    )
    noise = SIGMA * torch.randn(4000, 1, 6)
    moved = 0
    for way in (-1, 1):
        delta = torch.zeros_like(x)
        for _ in range(12):
            delta.requires_grad_()
            value = model(x + delta + noise[:200])[..., 0].mean(0)
            (slope,) = torch.autograd.grad(value.sum(), delta)
            delta = delta.detach() + way * 0.1 * slope / slope.norm(dim=1, keepdim=True)
            delta = delta * (radius / delta.norm(dim=1, keepdim=True)).clamp_max(1)
        with torch.no_grad():
            found = model(x + delta + noise).mean(0)
            moved += (found - model(x + noise).mean(0)).abs()[:, 0].mean().item()
        slack = 4 / math.sqrt(4 * 4000)  # of the mean that the attack is judged by
        assert (found >= lo - slack).all()
        assert (found <= hi + slack).all()
    assert moved > 0.1  # the attack does something


def test_smoothed_mean_is_the_expectation():
    model, x = Linear(True), points(3, 4)
    draw = {"sigma": SIGMA, "num_samples": 40_000, "output": "soft"}
    found = smoothed_mean(model, x, **draw, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.float(), model.smoothed(x), rtol=0, atol=0.01)
    counted = smoothed_mean(Linear(False), x, sigma=SIGMA, num_samples=7, batch_size=3)
    assert torch.equal(counted * 7, (counted * 7).round())
    assert smoothed_mean(model, torch.zeros(2, 3), sigma=1e-6, num_samples=3).shape == (2, 2)


def test_votes_are_of_outputs_above_a_half():
    """The votes of soft half-spaces are those of hard ones, whose mean has a closed form."""
    x = points(3, 4)
    draw = {"sigma": SIGMA, "num_samples": 40_000, "output": "vote"}
    found = smoothed_mean(Linear(True), x, **draw, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.float(), Linear(False).smoothed(x), rtol=0, atol=0.01)


@pytest.mark.parametrize("n", [1, 20, 1000])
def test_vote_interval_is_clopper_pearson(n):
    counts = torch.tensor([0, n // 3, n])
    low, high = mean_bounds(counts / n, n, 0.01)
    for k, a, b in zip(counts.tolist(), low.tolist(), high.tolist(), strict=True):
        assert a == 0 if k == 0 else binom.sf(k - 1, n, a) == pytest.approx(0.005, rel=1e-6)
        assert b == 1 if k == n else binom.cdf(k, n, b) == pytest.approx(0.005, rel=1e-6)


def test_soft_interval_inverts_kl():
    mean, n, level = torch.tensor([0.0, 0.02, 0.5, 1.0]).double(), 300, 0.01
    low, high = mean_bounds(mean, n, level, output="soft")

    def kl(p, q):
        return sum(a * np.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)

    budget = math.log(2 / level) / n
    for p, a, b in zip(mean.tolist(), low.tolist(), high.tolist(), strict=True):
        assert a == pytest.approx(0, abs=1e-12) or kl(p, a) == pytest.approx(budget, rel=1e-6)
        assert b == 1 or kl(p, b) == pytest.approx(budget, rel=1e-6)
    vote = mean_bounds(mean, n, level)
    assert (low <= vote[0] + 1e-12).all()
    assert (high >= vote[1] - 1e-12).all()


def test_ball_bounds_are_probits():
    lo, hi = (torch.tensor(end, dtype=torch.float64) for end in ([0.2, 0.0], [0.6, 1.0]))
    low, high = ball_bounds(lo, hi, sigma=0.25, radius=0.5)
    assert low[0].item() == pytest.approx(norm.cdf(norm.ppf(0.2) - 2), rel=1e-9)
    assert high[0].item() == pytest.approx(norm.cdf(norm.ppf(0.6) + 2), rel=1e-9)
    assert (low[1], high[1]) == (0, 1)


def test_certified_coverage_is_one_sided():
    covered = torch.arange(50) < 45
    found = certified_coverage(covered, beta=0.02)
    assert binom.sf(44, 50, found) == pytest.approx(0.02, rel=1e-6)
    assert certified_coverage(covered, beta=0.02, loss=0.016) == pytest.approx(found - 0.016)
    assert certified_coverage(torch.zeros(5, dtype=torch.bool)) == 0
    assert certified_coverage(covered, beta=0.5, loss=0.1) == pytest.approx(0.8)  # no interval


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: smoothed_mean(Linear(True), x, sigma=0), "sigma: got 0"),
        (lambda x: smoothed_mean(Linear(True), x, sigma=1, num_samples=0), "num_samples: got 0"),
        (lambda x: smoothed_mean(Linear(True), x, sigma=1, output="hard"), "output: got 'hard'"),
        (lambda x: mean_bounds(x, 10, 0.0), "level: got 0.0"),
        (lambda x: mean_bounds(x, 0, 0.1), "num_samples: got 0"),
        (lambda x: ball_bounds(x, x, sigma=1, radius=-1), "radius: got -1"),
        (lambda x: certified_coverage(x), "covered: got torch.float32"),
        (lambda x: certified_coverage(x[:, 0] > 0, beta=1.0), "beta: got 1.0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(points(0, 3))
