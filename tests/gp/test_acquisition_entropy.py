"""Entropy search from both sides against quadrature and against simulation."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, norm

from tests.gp.gp_models import dense, problem
from torchzoo.gp import EntropySearch, PredictiveEntropySearch, gaussian, posterior_lines

NOISE = 0.05


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=1):
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(seed))


def pair_problem():
    """Two candidates, whose information has one integral: model, candidates, x, values."""
    _, _, model = problem(4)
    pair, at = rand(2, 2, seed=21), rand(3, 1, 2, seed=22)
    pair = torch.cat([pair[:1], pair[:1] + 0.2])
    joint = gaussian(model, pair)
    lines = posterior_lines(model, pair, at[:, 0])
    side = torch.tensor([1.0, -1.0], dtype=torch.float64)
    gap, total = float(side @ joint.mean[:, 0]), float(side @ joint.covariance[0] @ side)
    z, weight = np.polynomial.hermite_e.hermegauss(200)
    weight /= weight.sum()
    values = []
    for slope in (lines.slope @ side).tolist():
        first = norm.cdf((gap + slope * z) / math.sqrt(total - slope**2))
        p = np.stack([first, 1 - first])
        values.append(entropy(p @ weight) - entropy(p) @ weight)
    return model, pair, at, values


@pytest.mark.claim(5, "Entropy search is the mutual information of maximiser and observation", 0.01)
def test_entropy_search():
    """Of two candidates the probability to be the maximiser given Z is known."""
    model, pair, at, expected = pair_problem()
    found = EntropySearch(model, pair, num_samples=20_000, num_nodes=30, generator=seeded())(at)
    assert found.tolist() == pytest.approx(expected, abs=0.01)
    assert max(expected) > 0.03


@pytest.mark.claim(
    5, "Predictive entropy search is the fall of an observation's entropy, simulated", 0.004
)
def test_predictive_entropy_search():
    """Functions are drawn by the hundred thousand, and sorted by their maximiser."""
    x, y, model = problem(5)
    grid, at = rand(8, 2, seed=5), rand(5, 2, seed=6)
    mean, covariance = dense(x, y, torch.cat([grid, at]), NOISE)
    factor = torch.linalg.cholesky(covariance + 1e-10 * torch.eye(13))
    f = mean + torch.randn(100_000, 13, dtype=torch.float64, generator=seeded(2)) @ factor.mT
    top = f[:, :8].argmax(1)
    observed = f[:, 8:] + NOISE**0.5 * torch.randn(f[:, 8:].shape, generator=seeded(3))
    expected = observed.var(0).log() / 2
    for k in range(8):
        rows = observed[top == k]
        if len(rows) > 1:
            expected = expected - len(rows) / 100_000 * rows.var(0).log() / 2
    found = PredictiveEntropySearch(model, grid, num_samples=8192, generator=seeded())(at[:, None])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.004)
    assert expected.max() > 0.05


@pytest.mark.claim(5, "Predictive entropy search is near the mutual information, and below it")
def test_both_sides():
    """A Gaussian has the most entropy of its variance, so it tells the least."""
    model, pair, at, expected = pair_problem()
    acquisition = PredictiveEntropySearch(model, pair, num_samples=8192, generator=seeded())
    for value, most in zip(acquisition(at).tolist(), expected, strict=True):
        assert 0.8 * most - 0.002 < value < most + 0.002
    few = PredictiveEntropySearch(model, rand(15, 2), num_samples=64, generator=seeded())
    where = rand(3, 1, 2, seed=12).requires_grad_()
    assert torch.autograd.gradcheck(few, where)
    assert (few(rand(40, 1, 2, seed=3)) >= 0).all()
    for other in (seeded(), seeded(1)):
        again = PredictiveEntropySearch(model, rand(15, 2), num_samples=64, generator=other)
        assert (again(where) == few(where)).all() == (other.initial_seed() == 0)
    with pytest.raises(ValueError, match="num_samples: expected"):
        PredictiveEntropySearch(model, pair, num_samples=0)


def test_what_cannot_be_learned():
    """A single candidate, or an observation that is all noise, has no information."""
    _, _, model = problem(5)
    at = rand(3, 1, 2)
    for points, noise in ((rand(1, 2), None), (rand(9, 2), 1e12)):
        found = PredictiveEntropySearch(model, points, noise=noise, generator=seeded())(at)
        assert (found < 1e-6).all()
