"""Closed forms of acquisition functions against quadrature, simulation and other libraries."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from torchzoo.gp import (
    expected_improvement,
    expected_max_piecewise_linear,
    expected_rise,
    max_value_entropy,
)
from torchzoo.testing import assert_within_se

NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def by_quadrature(a, b):
    """E max_i (a_i + b_i Z), piece by piece between all points where two lines meet."""
    a, b = np.asarray(a), np.asarray(b)
    meet = {(a[i] - a[j]) / (b[j] - b[i]) for i in range(len(a)) for j in range(i) if b[i] != b[j]}
    ends = sorted({*np.linspace(-12, 12, 25), *(m for m in meet if abs(m) < 12)})
    total = 0.0
    for low, high in pairwise(ends):
        z = (low + high) / 2 + (high - low) / 2 * NODES
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        total += (high - low) / 2 * ((a[:, None] + b[:, None] * z).max(0) * density * WEIGHTS).sum()
    return total


@pytest.mark.claim(5, "Expected improvement is the mean of simulated improvements", 4.0)
def test_improvement_is_simulated():
    mean, std, best = torch.tensor([-0.3, 0.2, 2.0]), torch.tensor([1.0, 0.1, 3.0]), 0.25
    draws = mean + std * randn(1_000_000, 3)
    found = expected_improvement(mean.double(), std.double(), best)
    assert_within_se((draws - best).clamp_min(0), found)


@pytest.mark.claim(5, "Expected improvement is scipy's closed form, and max(D, 0) at s = 0", 1e-12)
def test_improvement_is_the_closed_form():
    gain = torch.linspace(-8, 8, 41, dtype=torch.float64)
    std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None]
    u = (gain / std).numpy()
    expected = torch.from_numpy(gain.numpy() * norm.cdf(u) + std.numpy() * norm.pdf(u))
    torch.testing.assert_close(
        expected_improvement(gain + 3, std, 3.0), expected, atol=1e-12, rtol=0
    )
    none = expected_improvement(gain, torch.zeros_like(gain), 0.0)
    assert (none == gain.clamp_min(0)).all()


@pytest.mark.claim(5, "Log improvement is the logarithm where that exists, finite at -40 sd", 1e-9)
def test_logarithm():
    gain = torch.linspace(-5, 30, 200, dtype=torch.float64, requires_grad=True)
    one = torch.ones_like(gain)
    plain = expected_improvement(gain, one, 0.0).log()
    logs = expected_improvement(gain, one, 0.0, log=True)
    torch.testing.assert_close(logs, plain, atol=1e-9, rtol=0)
    far = torch.tensor([-40.0, -99.9, -100.1, -1e6], dtype=torch.float64, requires_grad=True)
    found = expected_improvement(far, torch.ones_like(far), 0.0, log=True)
    # h(z) = phi(z) / z^2 (1 - 3/z^2 + 15/z^4 - ...) far below 0
    expected = norm.logpdf(far.detach()) - 2 * np.log(-far.detach().numpy())
    expected += np.log1p(-3 / far.detach().numpy() ** 2 + 15 / far.detach().numpy() ** 4)
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected), atol=3e-8, rtol=0)
    (slope,) = torch.autograd.grad(found.sum(), far)
    assert (slope / far.detach().abs() - 1).abs().max() < 2e-3
    points = torch.tensor([-150.0, -60.0, -1.5, -0.5, 2.0], dtype=torch.float64, requires_grad=True)
    check = lambda x: expected_improvement(x, torch.ones_like(x), 0.0, log=True)  # noqa: E731
    assert torch.autograd.gradcheck(check, points, rtol=1e-5)


LINE = torch.linspace(-2, 2, 15, dtype=torch.float64)
CASES = {
    "random": (randn(9), randn(9, seed=1)),
    "one": (randn(1), randn(1, seed=1)),
    "same": (torch.full((5,), 0.3).double(), torch.full((5,), -0.7).double()),
    "parallel": (randn(6), torch.full((6,), 0.4).double()),
    "tied slopes": (randn(8), randn(8, seed=1).round()),
    "three through a point": (torch.zeros(3).double(), torch.tensor([-1.0, 0.5, 2.0]).double()),
    "dominated": (torch.tensor([0.0, -5.0, 0.0]).double(), torch.tensor([-1.0, 0.0, 1.0]).double()),
    "all on the envelope": (1 - LINE**2, LINE),
}  # fmt: skip


@pytest.mark.claim(
    5, "The expected maximum of lines is its integral, whatever lines coincide", 1e-8
)
@pytest.mark.parametrize("name", CASES)
def test_expected_maximum(name):
    a, b = CASES[name]
    found = expected_max_piecewise_linear(a, b)
    assert abs(float(found) - by_quadrature(a, b)) < 1e-8
    order = torch.randperm(len(a), generator=seeded())
    torch.testing.assert_close(expected_max_piecewise_linear(a[order], b[order]), found)
    if len(set(b.tolist())) > 1:
        rise = expected_rise(a, b)
        torch.testing.assert_close(expected_rise(a, b, log=True), rise.log())
        torch.testing.assert_close(rise, found - a.max(), atol=1e-12, rtol=0)
    else:
        assert expected_rise(a, b) == 0


@pytest.mark.claim(5, "The expected maximum of lines is that of simulated maxima", 4.0)
def test_simulated_maximum():
    a, b = randn(3, 6), randn(3, 6, seed=1)
    draws = (a + b * randn(300_000, 1, 1, seed=2)).amax(-1)
    assert_within_se(draws, expected_max_piecewise_linear(a, b))


@pytest.mark.claim(5, "Gradients of the expected maximum are finite differences", 1e-6)
@pytest.mark.parametrize("log", [False, True])
def test_gradients(log):
    a, b = randn(4, 7).requires_grad_(), randn(4, 7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: expected_rise(a, b, log=log), (a, b), atol=1e-6)
    tie = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    value = expected_max_piecewise_linear(tie, torch.tensor([-1.0, 1.0]).double())
    assert torch.autograd.grad(value, tie)[0].tolist() == [0.5, 0.5]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 1000), st.sampled_from([1e-14, 1e-3, 1.0]))
def test_batches_of_near_copies(n, seed, apart):
    """Batches are one by one, and copies within rounding neither matter nor vanish."""
    a, b = randn(3, n, seed=seed), randn(3, n, seed=seed + 1)
    found = expected_max_piecewise_linear(a, b)
    one = torch.stack([expected_max_piecewise_linear(*rows) for rows in zip(a, b, strict=True)])
    torch.testing.assert_close(found, one, atol=1e-13, rtol=0)
    more_a = torch.cat([a, a - apart * randn(3, n, seed=5).abs()], -1)
    more_b = torch.cat([b, b + (1e-15 * randn(3, n, seed=6) if apart < 1e-10 else 0)], -1)
    torch.testing.assert_close(
        expected_max_piecewise_linear(more_a, more_b), found, atol=1e-12, rtol=0
    )


def test_lines_of_smooth_functions():
    """Hundreds of nearly equal neighbours, by their maxima at many quantiles."""
    x = torch.linspace(-3, 3, 400, dtype=torch.float64)
    a, b = (3 * x).sin(), torch.exp(-(x[::80, None] - x).square())
    z = torch.linspace(-9, 9, 6001, dtype=torch.float64)
    top = (a + b[:, None] * z[:, None]).amax(-1)
    expected = torch.trapezoid(top * torch.exp(-z.square() / 2), z) / math.sqrt(2 * math.pi)
    found = expected_max_piecewise_linear(a.expand(b.shape), b)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.claim(5, "Max-value entropy search is the entropy lost by truncation", 1e-9)
def test_max_value_entropy():
    """Entropies of a normal and of a truncated one, by quadrature."""
    mean, std = torch.tensor([0.0, 0.7]).double(), torch.tensor([1.0, 2.0]).double()
    maxima = torch.tensor([-0.5, 1.2, 3.0]).double()
    found = max_value_entropy(mean, std, maxima)
    for m, s, value in zip(mean.tolist(), std.tolist(), found.tolist(), strict=True):
        lost = []
        for top in maxima.tolist():
            mass = norm.cdf(top, m, s)
            entropy = quad(
                lambda y, m=m, s=s, mass=mass: -norm.pdf(y, m, s) / mass
                * (norm.logpdf(y, m, s) - math.log(mass)), m - 12 * s, top, epsabs=1e-11,
            )[0]  # fmt: skip
            lost.append(norm.entropy(m, s) - entropy)
        assert value == pytest.approx(np.mean(lost), abs=1e-9)
    sure = max_value_entropy(mean, std, torch.full((1,), 100.0).double())
    assert (sure.abs() < 1e-10).all()


@pytest.mark.parametrize(
    ("shapes", "name"), [(((0,), (0,)), "a"), (((), ()), "a"), (((3,), (2,)), "b")]
)
def test_bad_lines(shapes, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        expected_max_piecewise_linear(*(torch.zeros(shape) for shape in shapes))


def test_no_rows():
    empty = torch.zeros(0, 3)
    assert expected_max_piecewise_linear(empty, empty).shape == (0,)
