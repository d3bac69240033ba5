"""The sparse product against dense ones, scipy and brute force, over several semirings."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.csgraph import shortest_path
from torch import Tensor
from torch.autograd import gradcheck

from tests.ops.sparse_products import (
    assert_all_equal,
    csr,
    edge_cases,
    native_only,
    random_cases,
    raw,
    sparse,
)
from torchzoo.ops.spgemm import spgemm, spgemm_batched, spgemm_plan, spgemm_stats

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


# Values


def check_product(a: Tensor, b: Tensor, dtype, index, **options) -> None:
    a = raw(a.crow_indices().to(index), a.col_indices().to(index), a.values().to(dtype), a.shape)
    b = raw(b.crow_indices().to(index), b.col_indices().to(index), b.values().to(dtype), b.shape)
    c = spgemm(a, b, **options)
    left, right = a.to_dense().double(), b.to_dense().double()
    assert c.shape == (a.shape[0], b.shape[1])
    assert (c.dtype, c.col_indices().dtype, c.crow_indices().dtype) == (dtype, index, index)
    error = (c.to_dense().double() - left @ right).abs()
    assert (error <= TOLERANCE[dtype] * (left.abs() @ right.abs())).all()
    stored = ((left != 0).double() @ (right != 0).double()).nonzero()
    rows = torch.repeat_interleave(c.crow_indices().diff())
    assert int(c.crow_indices()[-1]) == c.col_indices().numel() == len(stored)
    place = rows * c.shape[1] + c.col_indices()
    if not options.get("sort_columns", True):
        place = place.sort().values
    assert torch.equal(place, stored[:, 0] * c.shape[1] + stored[:, 1])


@pytest.mark.claim(135, "The product equals the dense one, in all corner cases", tolerance=1e-12)
@pytest.mark.claim(135, "Its pattern is the boolean product's, with sorted columns")
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_dense(dtype, index):
    for a, b in random_cases():
        check_product(a, b, dtype, index)


@native_only
@pytest.mark.parametrize(
    "options",
    [
        {"_method": "hash"},
        {"_method": "hash", "hash": "high"},
        {"_method": "hash", "sort_columns": False},
        {"_method": "inner"},
        {"_method": "esc"},
    ],
    ids=str,
)
def test_every_method_equals_dense(options):
    for a, b in random_cases()[::3] + edge_cases():
        check_product(a, b, torch.float64, torch.int64, **options)


@pytest.mark.claim(135, "The pattern holds scipy's, which drops entries that cancel")
def test_pattern_holds_that_of_scipy():
    for seed in range(10):
        a, b = sparse(20, 15, seed=seed), sparse(15, 25, seed=seed + 50)
        for t in (a, b):
            t.values().sign_()  # ±1, so that many entries cancel
        c = spgemm(a, b)
        other = to_scipy(a) @ to_scipy(b)
        other.eliminate_zeros()
        ours = to_scipy(c)
        assert ours.nnz > other.nnz
        ones = scipy.sparse.csr_matrix((np.ones(ours.nnz), ours.indices, ours.indptr), ours.shape)
        assert ((abs(other) > 0) > (ones > 0)).nnz == 0
        assert abs(ours - other).max() == 0


def to_scipy(t: Tensor) -> scipy.sparse.csr_matrix:
    parts = (t.values(), t.col_indices(), t.crow_indices())
    return scipy.sparse.csr_matrix(tuple(p.detach().numpy() for p in parts), tuple(t.shape))


@pytest.mark.claim(135, "(AB)v = A(Bv), (AB)ᵀ = BᵀAᵀ; identities and permutations are exact")
def test_algebra():
    a, b = sparse(60, 50, dtype=torch.float32), sparse(50, 70, seed=1, dtype=torch.float32)
    v = torch.randn(70, 1)
    torch.testing.assert_close(spgemm(a, b) @ v, a @ (b @ v), rtol=1e-5, atol=1e-4)
    transposed = spgemm(csr(b.to_dense().T), csr(a.to_dense().T)).to_dense()
    torch.testing.assert_close(spgemm(a, b).to_dense(), transposed.T, rtol=1e-5, atol=1e-5)
    order = torch.randperm(60)
    for left in (torch.eye(60), torch.eye(60)[order]):
        assert torch.equal(spgemm(csr(left), a).to_dense(), left @ a.to_dense())
    assert torch.equal(spgemm(a, csr(torch.eye(50))).values(), a.values())


def test_values_that_are_not_finite_and_duplicates():
    a = raw(torch.tensor([0, 2, 2]), torch.tensor([1, 1]), torch.tensor([1.0, 2.0]), (2, 2))
    b = raw(
        torch.tensor([0, 1, 4]),
        torch.tensor([0, 1, 0, 1]),
        torch.tensor([torch.nan, 1.0, torch.inf, 2.0]),
        (2, 2),
    )
    c = spgemm(a, b)
    assert c.col_indices().tolist() == [0, 1]
    assert c.values().tolist() == [torch.inf, 9.0]  # the NaN's row is not used
    c = spgemm(b, b)
    assert c.values().isnan().tolist() == [True, True, False][: c.values().numel()]
    for semiring in ("min_plus", "max_times"):
        values = spgemm(b, b, semiring=semiring).values()
        assert values[0].isnan()
    with (
        torch.sparse.check_sparse_tensor_invariants(),
        pytest.raises(ValueError, match="duplicate"),
    ):
        spgemm(a, csr(torch.eye(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    a = csr(torch.ones(1, 4000)).to(dtype)
    b = csr(torch.ones(4000, 1)).to(dtype)
    c = spgemm(a, b)
    assert c.dtype == dtype
    assert c.values().tolist() == [torch.tensor(4000.0).to(dtype).item()]
    plan = spgemm_plan(a, b)
    assert torch.equal(plan(a.values(), b.values()), c.values())


def test_mixed_indices_layouts_and_strides():
    a, b = sparse(6, 7), sparse(7, 5, seed=1)
    expected = spgemm(a, b)
    narrow = raw(a.crow_indices().int(), a.col_indices().int(), a.values(), a.shape)
    coo = b.to_sparse_coo()
    strided = raw(
        a.crow_indices(), a.col_indices(), torch.stack([a.values()] * 2, 1)[:, 0], a.shape
    )
    for left, right in ((narrow, b), (a, coo), (a.to_sparse_coo(), coo), (strided, b)):
        c = spgemm(left, right)
        assert c.col_indices().dtype == torch.int64
        assert_all_equal((c.col_indices(), c.values()), (expected.col_indices(), expected.values()))


def test_unsorted_columns_are_served():
    a, b = sparse(9, 8, 0.6), sparse(8, 30, 0.6, seed=1)
    flipped = []
    for t in (a, b):
        order = torch.cat(
            [torch.arange(i, j).flip(0) for i, j in t.crow_indices().unfold(0, 2, 1).tolist()]
        )
        flipped.append(raw(t.crow_indices(), t.col_indices()[order], t.values()[order], t.shape))
    c = spgemm(*flipped)
    assert torch.equal(c.col_indices(), spgemm(a, b).col_indices())
    torch.testing.assert_close(c.to_dense(), a.to_dense() @ b.to_dense())


def test_rows_that_look_like_runs():
    """Reversed columns and repeated ones with the ends and length of a run."""
    crow, col = torch.tensor([0, 3, 6, 9]), torch.tensor([2, 1, 0, 0, 0, 2, 1, 2, 3])
    values = torch.arange(1.0, 10.0)
    b = raw(crow, col, values, (3, 64))
    dense = torch.zeros(3, 64).index_put((torch.arange(9) // 3, col), values, accumulate=True)
    c = spgemm(csr(torch.eye(3)), b)
    assert c.col_indices().tolist() == [0, 1, 2, 0, 2, 1, 2, 3]
    assert torch.equal(c.to_dense(), dense)


def test_batched():
    pairs = [(sparse(4, 3, seed=0), sparse(3, 5, seed=1)), (sparse(2, 6, seed=2), sparse(6, 1))]
    pairs.append((sparse(0, 2), sparse(2, 3)))
    assert spgemm_batched([]) == []
    for (a, b), c in zip(pairs, spgemm_batched(pairs), strict=True):
        assert c.shape == (a.shape[0], b.shape[1])
        torch.testing.assert_close(c.to_dense(), a.to_dense() @ b.to_dense())


# Semirings


def graph(seed: int, nodes: int = 64) -> Tensor:
    """Weights of a directed graph, +∞ where there is no edge, 0 on the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(nodes, nodes, generator=generator, dtype=torch.float64) + 0.1
    weight[torch.rand(nodes, nodes, generator=generator) > 0.05] = torch.inf
    return weight.fill_diagonal_(0.0)


def stored(weight: Tensor) -> Tensor:
    """CSR that keeps what is finite, explicit zeros too."""
    row, col = weight.isfinite().nonzero().unbind(1)
    crow = torch.searchsorted(row, torch.arange(len(weight) + 1))
    return raw(crow, col, weight[row, col], weight.shape)


@pytest.mark.claim(135, "Repeated squaring over (min, +) gives shortest paths", tolerance=1e-12)
def test_min_plus_gives_shortest_paths():
    for seed in range(3):
        weight = graph(seed)
        distance = stored(weight)
        square = spgemm(distance, distance, semiring="min_plus")
        brute = (weight[:, :, None] + weight[None]).amin(1)
        rows = torch.repeat_interleave(square.crow_indices().diff())
        found = torch.full_like(weight, torch.inf)
        found[rows, square.col_indices()] = square.values()
        assert torch.equal(found, brute)
        for _ in range(6):
            distance = spgemm(distance, distance, semiring="min_plus")
        matrix = np.ma.masked_invalid(weight.numpy())
        expected = torch.from_numpy(shortest_path(scipy.sparse.csgraph.csgraph_from_masked(matrix)))
        rows = torch.repeat_interleave(distance.crow_indices().diff())
        torch.testing.assert_close(
            distance.values(), expected[rows, distance.col_indices()], rtol=0, atol=1e-12
        )
        assert distance.values().numel() == expected.isfinite().sum()


def test_selecting_semirings_follow_the_winning_term():
    a, b = sparse(6, 8, 0.5), sparse(8, 5, 0.5, seed=1)
    c = spgemm(a, b, semiring="max_times")
    left, right = a.to_dense(), b.to_dense()
    terms = left[:, :, None] * right[None]
    both = (left != 0)[:, :, None] & (right != 0)[None]
    best = torch.where(both, terms, -torch.inf).amax(1)
    rows = torch.repeat_interleave(c.crow_indices().diff())
    assert torch.equal(c.values(), best[rows, c.col_indices()])
    for semiring in ("max_times", "min_plus"):
        inputs = [t.values().clone().requires_grad_() for t in (a, b)]

        def values(x, y, semiring=semiring):
            left = raw(a.crow_indices(), a.col_indices(), x, a.shape)
            right = raw(b.crow_indices(), b.col_indices(), y, b.shape)
            return spgemm(left, right, semiring=semiring).values()

        assert gradcheck(values, inputs)


def test_ties_go_to_the_lowest_inner_index_whatever_the_order():
    a = raw(torch.tensor([0, 3]), torch.tensor([2, 0, 1]), torch.ones(3), (1, 3)).requires_grad_()
    spgemm(a, csr(torch.ones(3, 1)), semiring="min_plus").values().sum().backward()
    assert a.grad.values().tolist() == [0.0, 1.0, 0.0]


def test_or_and():
    a = raw(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), torch.tensor([0.0, 3.0, 0.0]), (2, 2))
    c = spgemm(a, a, semiring="or_and")
    assert c.values().tolist() == [0.0, 0.0, 0.0][: c.values().numel()]
    b = csr(torch.tensor([[0.0, 2.0], [-1.0, 0.0]]))
    assert spgemm(b, b, semiring="or_and").to_dense().tolist() == [[1.0, 0.0], [0.0, 1.0]]


# Tables and memory


@native_only
@pytest.mark.claim(135, "Tables stay right where all columns collide, under both hashes")
@pytest.mark.parametrize("hash", ["low", "high"])
@pytest.mark.parametrize("columns", ["congruent", "one bucket", "all", "wide"])
def test_collisions(columns, hash):
    width = {"all": 512, "wide": 2**33}.get(columns, 2**20)
    col = {
        "congruent": torch.arange(256) * 1024,
        "one bucket": torch.arange(256) + 5,
        "all": torch.arange(512),
        "wide": torch.arange(300) * 2**24 + 3,
    }[columns]
    rows = 8
    b = raw(
        torch.arange(rows + 1) * len(col),
        col.repeat(rows),
        torch.randn(rows * len(col), dtype=torch.float64),
        (rows, width),
    )
    a = sparse(20, rows, 0.5)
    c = spgemm(a, b, hash=hash, _method="hash")
    expected = a.to_dense() @ b.values().reshape(rows, -1)
    used = (a.crow_indices().diff() > 0).nonzero().squeeze(1)
    assert torch.equal(c.col_indices(), col.repeat(len(used)))
    torch.testing.assert_close(c.values().reshape(len(used), -1), expected[used])
    auto = spgemm(a, b)
    assert torch.equal(auto.values(), c.values())
    plan = spgemm_plan(a, b)
    assert torch.equal(plan(a.values(), b.values()), c.values())


def peak(call) -> int:
    """Bytes that a call adds to the process at most, beyond what it leaves."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not reset the peak of resident memory")

    def kilobytes(key):
        return int(status.read_text().split(key + ":")[1].split()[0])

    before = kilobytes("VmRSS")
    kept = call()
    extra = 1024 * (kilobytes("VmHWM") - before)
    return extra, kept


@native_only
@pytest.mark.claim(135, "Peak memory is that of C and a bounded workspace, not of the terms")
def test_no_partial_products_are_stored():
    generator = torch.Generator().manual_seed(0)
    rows, inner, columns = 300, 2000, 2000
    a_col = torch.rand(rows, inner, generator=generator).argsort(1)[:, :1000].sort(1).values
    b_col = torch.rand(inner, columns, generator=generator).argsort(1)[:, :100].sort(1).values
    a = raw(
        torch.arange(rows + 1) * 1000, a_col.flatten(), torch.ones(a_col.numel()), (rows, inner)
    )
    b = raw(
        torch.arange(inner + 1) * 100, b_col.flatten(), torch.ones(b_col.numel()), (inner, columns)
    )
    spgemm(a, b)
    extra, c = peak(lambda: spgemm(a, b))
    terms = int(spgemm_stats(a, b).terms.sum())
    nnz = c.values().numel()
    assert terms == 50 * nnz
    assert extra <= 12 * nnz + 24 * 2**20 < 8 * terms / 4
    esc, _ = peak(lambda: spgemm(a, b, _method="esc"))
    assert esc > 7 * terms  # the measurement sees what is stored


def test_stats():
    a, b = sparse(30, 40, 0.3), sparse(40, 500, 0.3, seed=1)
    stats = spgemm_stats(a, b)
    terms = ((a.to_dense() != 0).double() @ (b.to_dense() != 0).double()).sum(1)
    assert torch.equal(stats.terms, terms.long())
    assert int(stats.histogram.sum()) == 30
    for u, bin_ in zip(stats.terms.tolist(), stats.bins.tolist(), strict=True):
        assert bin_ == sum(u > edge for edge in (0, 32, 512, 4096, 12288))
    assert (stats.load <= 0.5).all()
    assert (stats.load > 0.24).all()
    c = spgemm(a, b)
    assert stats.result_bytes >= 16 * c.values().numel() + 8 * 31
