"""The shared linear algebra against dense products and decompositions."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.common.linalg import kron_logdet, kron_matvec, kron_solve, psd_cholesky


def positive(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return root @ root.mT + torch.eye(shape[-1], dtype=torch.float64)


def dense(factors):
    return functools.reduce(torch.kron, factors)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.lists(st.integers(1, 4), min_size=4))
def test_kron_matvec_is_the_dense_product(widths, heights):
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    factors = [draw(heights[d], n) for d, n in enumerate(widths)]
    x = draw(2, 3, dense(factors).shape[1])
    torch.testing.assert_close(kron_matvec(factors, x), x @ dense(factors).mT, atol=1e-12, rtol=0)


def test_kron_solve_and_logdet_are_dense():
    factors = [positive(n, seed=n) for n in (3, 1, 4)]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    full = dense(factors)
    expected = torch.linalg.solve(full, x.mT).mT
    torch.testing.assert_close(kron_solve(factors, x), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(kron_logdet(factors), torch.logdet(full))
    roots = [torch.linalg.cholesky(f) for f in factors]
    white = kron_solve(roots, x, lower=True)
    torch.testing.assert_close((white**2).sum(-1), (x * expected).sum(-1))
    back = kron_solve([r.mT for r in roots], white, upper=True)
    torch.testing.assert_close(back, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(kron_logdet(roots, lower=True), torch.logdet(full) / 2)


def test_lower_triangular_factors_are_not_symmetrised():
    lower = torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    x = torch.tensor([2.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(kron_solve([lower], x, lower=True), x.new_tensor([1.0, 2.0]))
    torch.testing.assert_close(kron_solve([lower], x), x.new_tensor([1.0, 2.0]))


def test_batches_of_factors_are_a_loop():
    factors = [positive(2, 3, n, seed=n) for n in (2, 3)]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            one = [f[i, j] for f in factors]
            for function in (kron_matvec, kron_solve):
                torch.testing.assert_close(function(factors, x)[i, j], function(one, x[i, j]))
            torch.testing.assert_close(kron_logdet(factors)[i, j], kron_logdet(one))


def test_gradients():
    roots = [torch.linalg.cholesky(positive(n, seed=n)).requires_grad_() for n in (2, 3)]
    x = torch.arange(6, dtype=torch.float64).requires_grad_()

    def density(a, b, x):
        return kron_solve([a.tril(), b.tril()], x, lower=True), kron_logdet([a, b], lower=True)

    assert torch.autograd.gradcheck(density, (*roots, x))
    assert torch.autograd.gradcheck(lambda a, b, x: kron_matvec([a, b], x), (*roots, x))


def test_psd_cholesky_adds_nothing_where_nothing_is_needed():
    matrix = positive(5)
    factor, jitter = psd_cholesky(matrix)
    assert jitter == 0
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix))


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_jitter_is_relative_to_the_diagonal(scale):
    """Duplicate rows; the indefinite one needs a second try, ten times the first."""
    ones = torch.ones(3, 3, dtype=torch.float64) * scale
    _, jitter = psd_cholesky(ones)
    torch.testing.assert_close(jitter, torch.tensor(1e-6 * scale, dtype=torch.float64))
    worse = torch.diag(torch.tensor([2.0, -5e-6, 1.0], dtype=torch.float64)) * scale
    factor, jitter = psd_cholesky(worse)
    mean = (3 - 5e-6) / 3
    torch.testing.assert_close(jitter.item(), 1e-5 * mean * scale)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.mT, worse + jitter * eye)


def test_only_failing_matrices_of_a_batch_get_jitter():
    batch = torch.stack([positive(3), torch.ones(3, 3, dtype=torch.float64)])
    _, jitter = psd_cholesky(batch)
    assert jitter[0] == 0
    assert jitter[1] == pytest.approx(1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"matrix: .*\(2, 2\) with an eigenvalue of -1"):
        psd_cholesky(torch.diag(torch.tensor([3.0, -1.0])))
    with pytest.raises(ValueError, match=r"matrix: .*got \(2, 3\)"):
        psd_cholesky(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 4\), got \(3,\)"):
        kron_matvec([torch.eye(2), torch.eye(2)], torch.ones(3))
    with pytest.raises(ValueError, match=r"factors: .*got \(2, 3\)"):
        kron_solve([torch.ones(2, 3)], torch.ones(3))
