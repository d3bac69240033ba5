"""Helpers for CSR matrices against scipy and dense arithmetic."""

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from torchzoo.sparsity import csr


def random_matrix(rows, columns, seed, density=0.3):
    generator = np.random.default_rng(seed)
    return scipy.sparse.random_array((rows, columns), density=density, rng=generator, format="csr")


sizes = st.integers(0, 6)
matrices = st.builds(random_matrix, sizes, sizes, st.integers(0, 99))


@settings(max_examples=40, deadline=None)
@given(matrices)
def test_there_and_back_again(matrix):
    a = csr.from_scipy(matrix)
    assert (a.layout, a.dtype) == (torch.sparse_csr, torch.float64)
    assert np.array_equal(a.to_dense().numpy(), matrix.toarray())
    back = csr.to_scipy(a)
    assert (back != matrix).nnz == 0
    assert back.has_sorted_indices


def test_scipy_formats_and_memory():
    matrix = random_matrix(5, 4, 0)
    for kind in ("coo", "csc", "lil", "bsr"):
        a = csr.from_scipy(matrix.asformat(kind), dtype=torch.float32)
        assert a.dtype == torch.float32
        np.testing.assert_allclose(a.to_dense().numpy(), matrix.toarray(), rtol=1e-6)
    doubled = scipy.sparse.coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(2, 2))
    assert csr.from_scipy(doubled).values().tolist() == [3.0]
    kept = matrix.toarray()
    a = csr.from_scipy(matrix)
    a.values().zero_()
    assert np.array_equal(matrix.toarray(), kept)
    back = csr.to_scipy(a)
    back.data[:] = 1
    assert not a.values().any()


@settings(max_examples=40, deadline=None)
@given(matrices, matrices, st.integers(0, 99))
def test_equals_dense_arithmetic(first, second, seed):
    a, b = csr.from_scipy(first), csr.from_scipy(second)
    dense, other = a.to_dense(), b.to_dense()
    assert torch.equal(csr.transpose(a).to_dense(), dense.T)
    assert csr.transpose(a).crow_indices().dtype == a.crow_indices().dtype
    assert torch.equal(csr.diagonal(a), dense.diagonal())
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, generator=generator, dtype=torch.float64) for n in a.shape)
    scaled = csr.scale(a, rows=left, columns=right)
    torch.testing.assert_close(scaled.to_dense(), left[:, None] * dense * right, rtol=0, atol=1e-15)
    torch.testing.assert_close(csr.kron(a, b).to_dense(), torch.kron(dense, other), rtol=0, atol=0)
    assert torch.equal(
        csr.add(a, csr.scale(a, rows=left)).to_dense(), dense + left[:, None] * dense
    )


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(-5, 5)), max_size=20))
@settings(max_examples=40, deadline=None)
def test_entries_in_any_order_add_up(places):
    row, col, value = (torch.tensor([p[i] for p in places], dtype=torch.long) for i in range(3))
    a = csr.from_entries(row, col.int(), value.double(), (3, 4))
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i, j, v in places:
        expected[i, j] += v
    assert torch.equal(a.to_dense(), expected)
    assert a.crow_indices().dtype == a.col_indices().dtype == torch.int32
    assert a.values().numel() == len({(i, j) for i, j, _ in places})
    for low, high in zip(a.crow_indices()[:-1], a.crow_indices()[1:], strict=True):
        assert (a.col_indices()[low:high].diff() > 0).all()


def test_gradients_pass_through():
    a = csr.from_scipy(random_matrix(4, 4, 1, 0.5))

    def pass_through(values, factors):
        b = csr.scale(csr.transpose(csr.with_values(a, values)), rows=factors, columns=factors)
        c = csr.add(csr.kron(b, b), csr.kron(b, csr.transpose(b)))
        return c.values(), csr.diagonal(b)

    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(4, generator=generator, dtype=torch.float64)
    leaves = [t.detach().clone().requires_grad_() for t in (a.values(), factors)]
    assert gradcheck(pass_through, leaves)


def test_symmetry_is_checked():
    a = torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    csr.check_symmetric("m", a.to_sparse_csr())
    csr.check_symmetric("m", (a * (1 + 1e-7 * torch.randn(2, 2))).to_sparse_csr())
    for bad, named in (
        (torch.tensor([[1.0, 2.0], [2.1, 0.0]]), "m: .* differ by 0.1"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "m: .* counterpart"),
        (torch.ones(2, 3), "m: expected a square"),
    ):
        with pytest.raises(ValueError, match=named):
            csr.check_symmetric("m", bad.to_sparse_csr())


def test_bad_arguments_are_named():
    a, index, ones = torch.eye(3).to_sparse_csr(), torch.arange(3), torch.ones(3)
    for bad in (torch.eye(3), torch.eye(3).to_sparse_coo(), torch.eye(3).int().to_sparse_csr()):
        with pytest.raises(ValueError, match="a: expected a floating-point CSR"):
            csr.entries(bad)
    with pytest.raises(ValueError, match="row: expected indices in \\[0, 2\\)"):
        csr.from_entries(index, index, ones, (2, 3))
    with pytest.raises(ValueError, match="col: expected indices in \\[0, 2\\)"):
        csr.from_entries(index, index, ones, (3, 2))
    with pytest.raises(ValueError, match="row, col, values"):
        csr.from_entries(index, index[:2], ones, (3, 3))
    with pytest.raises(ValueError, match="rows: expected shape \\(3,\\)"):
        csr.scale(a, rows=torch.ones(2))
    with pytest.raises(ValueError, match="columns: expected shape \\(3,\\)"):
        csr.scale(a, columns=torch.ones(2))
    with pytest.raises(ValueError, match="b: expected the shape of a"):
        csr.add(a, torch.eye(2).to_sparse_csr())
