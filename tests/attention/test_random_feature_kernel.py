"""The kernel of random-feature attention against Monte Carlo, quadrature and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import owens_t
from scipy.stats import norm

from torchzoo.attention import RandomFeatureAttention, rfa_kernel
from torchzoo.attention.random_feature_kernel import _owens_t, relu_moment
from torchzoo.testing import assert_within_se

PAPER = 168
DOUBLE = torch.float64


def inputs(n, num_keys, dim, seed=0):
    """Queries and keys of various lengths, in double precision."""
    draw = torch.randn(
        n, num_keys + 1, dim, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE
    )
    return draw[:, 0], draw[:, 1:]


KERNELS = pytest.mark.parametrize("mean", [None, "identity"])


def per_head_products(heads, mean, seed):
    """For each head the products of features of two sets of inputs, and their kernel.

    The last input of the first set is one of the second.
    """
    (q1, k1), (q2, k2) = inputs(3, 4, 2, seed=1), inputs(2, 6, 2, seed=2)
    q1, k1 = 0.7 * q1, 0.7 * k1
    first = RandomFeatureAttention(2, heads, bias_mean=mean, seed=seed, dtype=DOUBLE)
    phi1, phi2 = first.features(q1, k1), first.features(q2, k2)
    products = torch.cat(
        [torch.einsum("ima,jma->mij", phi1, phi2), torch.einsum("ima,jma->mij", phi1, phi1)], -1
    )
    kernels = [rfa_kernel(q1, k1, *two, bias_mean=mean) for two in ((q2, k2), (q1, k1))]
    return products, torch.cat(kernels, -1)


@pytest.mark.claim(PAPER, "Phi Phi^T / M is the kernel on average, within 4 standard errors")
@KERNELS
def test_kernel_is_the_expectation(mean):
    products, kernel = per_head_products(50000, mean, seed=3)
    assert_within_se(products, kernel)
    assert (products.std(0) / 50000**0.5 < 0.02 * kernel.abs().max()).all()


@pytest.mark.claim(
    PAPER, "Phi Phi^T / M tends to the kernel as M^(-1/2), M from 100 to 10,000", tolerance=0.1
)
@KERNELS
def test_kernel_error_falls_as_the_root_of_heads(mean):
    products, kernel = per_head_products(100000, mean, seed=4)
    sizes, errors = [100, 300, 1000, 3000, 10000], []
    for size in sizes:
        blocks = products[: len(products) // size * size].unflatten(0, (-1, size)).mean(1)
        errors.append((blocks - kernel).square().mean().sqrt().item())
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


@pytest.mark.claim(PAPER, "the biased kernel at W_0 = 0 is the arc-cosine kernel", tolerance=1e-8)
def test_biased_kernel_at_zero_mean():
    one, two = inputs(4, 3, 2), inputs(3, 5, 2, seed=1)
    for sets in ((*one, *two), (*one, *one)):
        biased = rfa_kernel(*sets, bias_mean=torch.zeros(3, 3), weight_std=0.8)
        np.testing.assert_allclose(biased, rfa_kernel(*sets, weight_std=0.8), atol=1e-8)


@pytest.mark.claim(PAPER, "kernel matrices have no negative eigenvalue", tolerance=1e-8)
@KERNELS
def test_kernel_is_positive_semidefinite(mean):
    query, keys = inputs(40, 3, 3)
    query[20:], keys[20:] = query[:20], keys[:20].flip(1)  # equal inputs, in other orders
    kernel = rfa_kernel(query, keys, query, keys, bias_mean=mean)
    np.testing.assert_allclose(kernel, kernel.mT, atol=1e-10)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-8


def test_kernel_with_masks_and_in_pieces(monkeypatch):
    (q1, k1), (q2, k2) = inputs(5, 4, 2), inputs(3, 6, 2, seed=1)
    mask1, mask2 = torch.rand(5, 4) > 0.4, torch.rand(3, 6) > 0.4
    mask1[0] = False
    whole = rfa_kernel(q1, k1, q2, k2, bias_mean="identity", mask=mask1, mask2=mask2)
    assert (whole[0] == 0).all()
    for i in range(1, 5):
        for j in range(3):
            kept = (q1[i : i + 1], k1[i : i + 1, mask1[i]], q2[j : j + 1], k2[j : j + 1, mask2[j]])
            one = rfa_kernel(*kept, bias_mean="identity")
            assert whole[i, j].item() == pytest.approx(one.item(), rel=1e-12)
    monkeypatch.setattr("torchzoo.attention.random_feature_kernel._PAIRS_AT_ONCE", 150)
    pieces = rfa_kernel(q1, k1, q2, k2, bias_mean="identity", mask=mask1, mask2=mask2)
    torch.testing.assert_close(pieces, whole, rtol=1e-14, atol=0)


def test_owens_t_is_scipys():
    generator = torch.Generator().manual_seed(0)
    h, b, spread = 3 * torch.randn(3, 5000, generator=generator, dtype=DOUBLE)
    b = b * spread.exp()
    np.testing.assert_allclose(_owens_t(h, b), owens_t(h.numpy(), (b / h).numpy()), atol=1e-14)


@pytest.mark.parametrize("r", [-0.99, -0.4, 0.0, 0.7, 0.999])
@pytest.mark.parametrize(("h", "k"), [(0.3, -0.8), (0.0, 1.2), (-1.0, 0.0), (2.5, 2.4), (0.0, 0.0)])
def test_relu_moment_is_the_integral(h, k, r):
    def integrand(x):
        mean, std = k + r * x, math.sqrt(1 - r * r)
        inner = mean * norm.cdf(mean / std) + std * norm.pdf(mean / std)
        return (h + x) * norm.pdf(x) * inner

    turn = -k / r if r else 0.0
    points = [turn] if -h < turn < 9 else None
    expected = quad(integrand, -h, 12, points=points, epsabs=1e-13, epsrel=1e-13, limit=900)[0]
    got = relu_moment(*(torch.tensor(x, dtype=DOUBLE) for x in (h, k, r)))
    assert got.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("h", [-1.3, 0.0, 0.7])
def test_relu_moment_of_equal_and_opposite_inputs(h):
    x, one = torch.tensor(h, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE)
    second = (1 + h * h) * norm.cdf(h) + h * norm.pdf(h)
    assert relu_moment(x, x, one).item() == pytest.approx(second, abs=1e-12)
    assert relu_moment(x, x, one - 1e-16).item() == pytest.approx(second, abs=1e-8)
    assert relu_moment(x, -x, -one).item() == pytest.approx(0, abs=1e-8)
