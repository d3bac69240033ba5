"""Dual activations against quadrature in polar coordinates, sampling and finite differences."""

import math

import pytest
import torch

from torchzoo.infinite import arc_cosine, dual
from torchzoo.testing import assert_within_se

CASES = [(1.3, 0.7, 0.4), (1.0, 1.0, -0.6), (0.2, 5.0, 0.9), (2.0, 2.0, 0.0), (1.0, 4.0, -1.9)]


def double(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def polar(d1, d2, s, order):
    """E[u+^n v+^n] with u, v = R (a cos t, b cos(t - theta)): E[R^2n] times a mean over angles.

    The mean is over the angles at which both are above 0, by Gauss-Legendre.
    """
    import numpy as np

    theta = math.acos(s / math.sqrt(d1 * d2))
    low, high = theta - math.pi / 2, math.pi / 2
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t = (low + high) / 2 + (high - low) / 2 * nodes
    inner = ((d1 * d2) ** 0.5 * np.cos(t) * np.cos(t - theta)) ** order
    radius = 2**order * math.factorial(order)  # E[R^2n] for R² exponential of mean 2
    return radius * float((weights * inner).sum()) * (high - low) / 2 / (2 * math.pi)


@pytest.mark.claim(
    7, "Arc-cosine kernels are the Gaussian expectations that they stand for", tolerance=1e-12
)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_closed_forms(order):
    for case in CASES:
        found = float(arc_cosine(*double(*case), order=order))
        assert found == pytest.approx(polar(*case, order), rel=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_samples(order):
    d1, d2, s = 1.3, 0.7, 0.4
    noise = torch.randn(2, 10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = d1**0.5 * noise[0]
    v = s / d1**0.5 * noise[0] + (d2 - s * s / d1) ** 0.5 * noise[1]
    product = (u > 0) * (v > 0) * (u * v) ** order
    assert_within_se(product, arc_cosine(*double(d1, d2, s), order=order))


def test_relu():
    """The derivative is that in s, by Price's theorem; diagonals are limits of parallel inputs."""
    relu = dual("relu")
    for case in CASES:
        d1, d2, s = double(*case)
        s.requires_grad_()
        (slope,) = torch.autograd.grad(relu.value(d1, d2, s), s)
        torch.testing.assert_close(slope, relu.derivative(d1, d2, s), rtol=1e-12, atol=0)
        d = d1.expand(3)
        torch.testing.assert_close(relu.diagonal(d), relu.value(d, d, d))
        torch.testing.assert_close(relu.derivative_diagonal(d), relu.derivative(d, d, d))


def test_erf():
    """By samples, by Price's theorem, and diagonals as limits."""
    erf = dual("erf")
    noise = torch.randn(2, 10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = 1.3**0.5 * noise[0]
    v = 0.4 / 1.3**0.5 * noise[0] + (0.7 - 0.4**2 / 1.3) ** 0.5 * noise[1]
    assert_within_se(u.erf() * v.erf(), erf.value(*double(1.3, 0.7, 0.4)))
    for case in CASES:
        d1, d2, s = double(*case)
        s.requires_grad_()
        (slope,) = torch.autograd.grad(erf.value(d1, d2, s), s)
        torch.testing.assert_close(slope, erf.derivative(d1, d2, s), rtol=1e-12, atol=0)
        torch.testing.assert_close(erf.diagonal(d1), erf.value(d1, d1, d1))
        torch.testing.assert_close(erf.derivative_diagonal(d1), erf.derivative(d1, d1, d1))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_gradients(order):
    for case in CASES:
        leaves = [x.requires_grad_() for x in double(*case)]
        assert torch.autograd.gradcheck(lambda *x: arc_cosine(*x, order=order), leaves)


@pytest.mark.parametrize("c", [1.0, -1.0, 1 - 1e-8, 1 + 1e-16, 1 - 1e-15])
def test_gradients_of_parallel_inputs(c):
    d1, d2 = double(1.3, 0.7)
    s = (c * (d1 * d2).sqrt()).requires_grad_()
    d1.requires_grad_()
    value = arc_cosine(d1, d2, s)
    by_s, by_d1 = torch.autograd.grad(value, (s, d1))
    assert float(by_s) == pytest.approx(0.5 if c > 0 else 0.0, abs=1e-4)
    assert float(by_d1) == pytest.approx(0.0, abs=1e-4)
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(arc_cosine(zero, zero, zero).sum(), zero)
    assert grads[0].isfinite().all()


def test_a_matrix_of_kernels_is_positive_semi_definite():
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s, d = x @ x.mT, x.square().sum(-1)
    for order in (0, 1, 2):
        k = arc_cosine(d[:, None], d[None], s, order=order)
        assert torch.linalg.eigvalsh(k).min() > -1e-7 * k.trace()
        scaled = arc_cosine(4 * d[:, None], d[None], 2 * s, order=order)
        torch.testing.assert_close(scaled, 2**order * k)


def test_single_precision():
    exact = arc_cosine(*double(1.3, 0.7, 0.4))
    found = arc_cosine(*(x.float() for x in double(1.3, 0.7, 0.4)))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="order: expected 0, 1 or 2, got 3"):
        arc_cosine(*double(1.0, 1.0, 0.0), order=3)
    with pytest.raises(ValueError, match=r"name: expected .*'relu'.*, got 'tanh'"):
        dual("tanh")
