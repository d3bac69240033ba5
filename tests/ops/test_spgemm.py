"""The sparse product against dense ones, scipy and brute force, and what torch asks of it."""

import copy
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import shortest_path
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.ops import _spgemm
from torchzoo.ops.library import backend
from torchzoo.ops.spgemm import spgemm, spgemm_batched, spgemm_plan, spgemm_stats

NATIVE = backend("spgemm")[0] == "native"
native_only = pytest.mark.skipif(not NATIVE, reason="the kernels are not loaded")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def sparse(rows, columns, density=0.3, seed=0, dtype=torch.float64, index=torch.int64):
    """A random matrix, CSR."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return csr(torch.where(kept, values, 0.0).to(dtype), index)


def csr(dense: Tensor, index=torch.int64) -> Tensor:
    t = dense.to_sparse_csr()
    return raw(t.crow_indices().to(index), t.col_indices().to(index), t.values(), t.shape)


def raw(crow, col, values, shape) -> Tensor:
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def pattern(a: Tensor, b: Tensor) -> list[Tensor]:
    return [a.crow_indices(), a.col_indices(), b.crow_indices(), b.col_indices()]


def edge_cases() -> list[tuple[Tensor, Tensor]]:
    """Empty rows and matrices, one row or column, full ones, no inner dimension."""
    full_row, full_column = torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    full_row[2], full_column[:, 3] = 1.5, -2.5
    some = sparse(6, 6).to_dense()
    dense = [
        (some, torch.zeros(6, 4)),
        (torch.zeros(0, 6), some),
        (some, torch.zeros(6, 0)),
        (torch.zeros(3, 0), torch.zeros(0, 5)),
        (torch.zeros(0, 0), torch.zeros(0, 0)),
        (torch.ones(1, 6), some),
        (some, torch.ones(6, 1)),
        (full_row, some),
        (some, full_row),
        (full_column, some),
        (some, full_column),
        (full_column, full_row),
    ]
    return [(csr(a.double()), csr(b.double())) for a, b in dense]


@cache
def random_cases() -> list[tuple[Tensor, Tensor]]:
    sizes = np.random.default_rng(0)
    cases = []
    for seed in range(50):
        m, k, n = sizes.integers(1, 40, 3)
        n *= 1 + 9 * (seed % 5 == 0)  # some wide enough to be scattered over words of a mask
        density = sizes.choice([0.02, 0.2, 0.7])
        cases.append((sparse(m, k, density, seed), sparse(k, n, density, seed + 100)))
    return cases + edge_cases()


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


@pytest.mark.claim(135, "Gradients of a plan pass gradcheck twice, also where values cancel")
def test_gradients_of_a_plan():
    a, b = sparse(5, 6, 0.5), sparse(6, 4, 0.5, seed=1)
    plan = spgemm_plan(a, b)
    for values in (torch.randn, torch.ones):
        x = values(a.values().shape, dtype=torch.float64)
        y = values(b.values().shape, dtype=torch.float64)
        if values is torch.ones:
            y[b.crow_indices()[1] :] *= -1
        x.requires_grad_(), y.requires_grad_()
        assert gradcheck(plan, (x, y))
        assert gradgradcheck(plan, (x, y))
    assert (plan(x, y) == 0).any()  # stored entries whose terms cancel


@pytest.mark.claim(135, "Gradients of sparse leaves equal dense ones on the leaf's own pattern")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_gradients_of_sparse_leaves(layout):
    dense = [sparse(7, 5, 0.4).to_dense(), sparse(5, 6, 0.4, seed=1).to_dense()]
    leaves = [t.to_sparse(layout=layout).requires_grad_() for t in dense]
    upstream = torch.randn(7, 6, dtype=torch.float64)
    c = spgemm(*leaves)
    rows = torch.repeat_interleave(c.crow_indices().diff())
    (c.values() * upstream[rows, c.col_indices()]).sum().backward()
    expected = (upstream @ dense[1].T, dense[0].T @ upstream)
    for leaf, before, full in zip(leaves, dense, expected, strict=True):
        assert leaf.grad.layout == layout
        torch.testing.assert_close(leaf.grad.to_dense(), full * (before != 0), rtol=0, atol=1e-13)
        entries = leaf.grad.values() if layout == torch.sparse_csr else leaf.grad._values()
        assert entries.numel() == (before != 0).sum()


@pytest.mark.claim(135, "One and two threads, array and table give the same bits")
def test_same_bits_for_any_number_of_threads():
    a = sparse(600, 500, 0.1, dtype=torch.float32)
    b = sparse(500, 700, 0.1, seed=1, dtype=torch.float32)
    upstream = torch.randn(600 * 700)
    found = []
    before = torch.get_num_threads()
    try:
        for threads, options in [(1, {}), (2, {}), (3, {}), (2, {"_method": "hash"})]:
            torch.set_num_threads(threads)
            leaves = [a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()]
            c = spgemm(*leaves, deterministic=True, **options)
            (c.values() * upstream[: c.values().numel()]).sum().backward()
            found.append([c.col_indices(), c.values(), *(leaf.grad.values() for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.claim(135, "Two runs on CUDA give the same bits, and the CPU's values")
def test_cuda_repeats_itself_and_equals_the_cpu():
    for dtype in (torch.float32, torch.float64):
        a = sparse(700, 900, 0.05, dtype=dtype)
        b = sparse(900, 5000, 0.05, seed=1, dtype=dtype)
        first, second = (spgemm(a.cuda(), b.cuda(), deterministic=True) for _ in range(2))
        expected = spgemm(a, b)
        assert torch.equal(first.values(), second.values())
        assert torch.equal(first.col_indices().cpu(), expected.col_indices())
        torch.testing.assert_close(first.values().cpu(), expected.values())


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


@native_only
def test_native_equals_the_reference():
    for index in (torch.int32, torch.int64):
        for a, b in random_cases()[::3]:
            known, columns = [t.to(index) for t in pattern(a, b)], b.shape[1]
            x, y = a.values(), b.values()
            crow, col = _spgemm.pattern_of(known, columns)
            assert_all_equal((crow, col), _spgemm.pattern_of._init_fn(known, columns))
            known += [crow, col]
            g = torch.randn(col.shape, dtype=torch.float64)
            for op, first, second in (
                (_spgemm.values_of, x, y),
                (_spgemm.grad_a, y, g),
                (_spgemm.grad_b, x, g),
            ):
                ours = op(known, first, second, columns)
                theirs = op._init_fn(known, first, second, columns)
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            for product in (False, True):
                args = (known, x.round(), y.round(), columns, product)
                assert_all_equal(_spgemm.select(*args), _spgemm.select._init_fn(*args))


def assert_all_equal(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


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


def test_plan():
    a, b = sparse(8, 9), sparse(9, 7, seed=1)
    plan = spgemm_plan(a, b)
    c = spgemm(a, b)
    assert torch.equal(plan.crow, c.crow_indices())
    assert torch.equal(plan.col, c.col_indices())
    assert torch.equal(plan.to_csr(plan(a.values(), b.values())).to_dense(), c.to_dense())
    terms = (a.to_dense() != 0).double() @ (b.to_dense() != 0).double()
    assert (plan.flops, plan.nnz) == (terms.sum(), (terms > 0).sum())
    assert plan.compression == pytest.approx(plan.flops / plan.nnz)
    assert plan.memory_bytes == 8 * (9 + 10 + 9 + 8 + a._nnz() + b._nnz() + plan.nnz)
    for twin in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan), plan.to("cpu")):
        assert torch.equal(twin(a.values(), b.values()), c.values())
    for change in ({"a_values": a.values()[1:]}, {"b_values": b.values().float()}):
        good = {"a_values": a.values(), "b_values": b.values()}
        with pytest.raises(ValueError, match=next(iter(change))):
            plan(**good | change)
    with pytest.raises(ValueError, match="values: expected shape"):
        plan.to_csr(a.values()[:1])


def test_plan_compiles_and_batches():
    a, b = sparse(8, 9), sparse(9, 7, seed=1)
    plan = spgemm_plan(a, b)
    compiled = torch.compile(lambda x, y: plan(x, y), fullgraph=True, backend="aot_eager")
    x, y = a.values().clone().requires_grad_(), b.values().clone().requires_grad_()
    ours = torch.autograd.grad(compiled(x, y).square().sum(), (x, y))
    assert_all_equal(ours, torch.autograd.grad(plan(x, y).square().sum(), (x, y)))
    xs = torch.stack([x, 2 * x, -x])
    rows = torch.vmap(plan, in_dims=(0, None))(xs, y)
    assert torch.equal(rows, torch.stack([plan(row, y) for row in xs]))


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


def test_batched():
    pairs = [(sparse(4, 3, seed=0), sparse(3, 5, seed=1)), (sparse(2, 6, seed=2), sparse(6, 1))]
    pairs.append((sparse(0, 2), sparse(2, 3)))
    assert spgemm_batched([]) == []
    for (a, b), c in zip(pairs, spgemm_batched(pairs), strict=True):
        assert c.shape == (a.shape[0], b.shape[1])
        torch.testing.assert_close(c.to_dense(), a.to_dense() @ b.to_dense())


def test_opcheck():
    a, b = sparse(5, 6, 0.5), sparse(6, 4, 0.5, seed=1)
    known, columns = pattern(a, b), b.shape[1]
    x, y = a.values().clone().requires_grad_(), b.values().clone().requires_grad_()
    ops = torch.ops.torchzoo
    torch.library.opcheck(ops.spgemm_pattern.default, (known, columns))
    torch.library.opcheck(  # the rest of opcheck can't add up outputs of several types
        ops.spgemm.default,
        (known, x, y, columns, False, False, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    known += _spgemm.pattern_of(known, columns)
    g = torch.randn(known[5].shape, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.spgemm_values.default, (known, x, y, columns))
    torch.library.opcheck(ops.spgemm_grad_a.default, (known, y, g, columns))
    torch.library.opcheck(ops.spgemm_grad_b.default, (known, x, g, columns))
    torch.library.opcheck(ops.spgemm_select.default, (known, x, y, columns, True))


GOOD = csr(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]))
EYE = csr(torch.eye(3))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.eye(3), EYE, "a: expected a sparse CSR or COO matrix, got torch.strided"),
        (GOOD, None, "b: expected a sparse CSR or COO matrix, got NoneType"),
        (torch.ones(2, 2, 2).to_sparse(), EYE, r"a: expected a matrix .* \(2, 2, 2\)"),
        (GOOD, csr(torch.eye(4)), r"a.shape\[1\]=3, b.shape\[0\]=4"),
        (GOOD, EYE.double(), "b: expected the dtype of a, torch.float32, got torch.float64"),
        (GOOD, EYE.to("meta"), "b: expected the device of a"),
        (GOOD.int(), EYE, "a: expected a floating-point matrix, got torch.int32"),
        (
            GOOD,
            raw(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 3]), torch.ones(3), (3, 3)),
            r"b: expected columns in \[0, 3\)",
        ),
        (
            raw(torch.tensor([0, 1, 1]), torch.tensor([-1]), torch.ones(1), (2, 3)),
            EYE,
            r"a: expected columns in \[0, 3\)",
        ),
        (
            raw(torch.tensor([0, 2, 1]), torch.tensor([1]), torch.ones(1), (2, 3)),
            EYE,
            "a: expected row starts that rise from 0 to 1",
        ),
        (
            raw(torch.tensor([0, 1]), torch.tensor([1]), torch.ones(1), (2, 3)),
            EYE,
            "a: expected 3 row starts",
        ),
    ],
)
def test_bad_matrices(a, b, message):
    with pytest.raises(ValueError, match=message):
        spgemm(a, b)


@pytest.mark.parametrize("option", ["semiring", "hash", "_method"])
def test_bad_options(option):
    with pytest.raises(ValueError, match=f"{option}: expected one of .*, got 'x'"):
        spgemm(GOOD, EYE, **{option: "x"})


def test_too_many_entries_for_int32_is_a_value_error():
    def op():
        raise RuntimeError("the result has 2147483648 entries: use int64 indices")

    from torchzoo.ops.spgemm import _counted

    with pytest.raises(ValueError, match="2147483648"):
        _counted(op)


indices = st.integers(-2, 6)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(indices, min_size=1, max_size=6),
    st.lists(indices, max_size=8),
    st.lists(indices, min_size=1, max_size=6),
    st.lists(indices, max_size=8),
    st.integers(0, 6),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_broken_patterns_raise_and_never_crash(a_crow, a_col, b_crow, b_col, columns, index):
    """What is served has a valid pattern; all else is an error, in the operators too."""
    parts = [torch.tensor(t, dtype=index) for t in (a_crow, a_col, b_crow, b_col)]
    inner = len(b_crow) - 1
    a = raw(*parts[:2], torch.ones(len(a_col)), (len(a_crow) - 1, inner))
    b = raw(*parts[2:], torch.ones(len(b_col)), (inner, columns))
    valid = all(
        crow[0] == 0 and crow == sorted(crow) and crow[-1] == len(col)
        for crow, col in ((a_crow, a_col), (b_crow, b_col))
    )
    valid &= all(0 <= k < inner for k in a_col) and all(0 <= j < columns for j in b_col)
    if valid:
        assert spgemm(a, b).values().sum() == spgemm_stats(a, b).terms.sum()
        return
    with pytest.raises(ValueError, match="expected"):
        spgemm(a, b)
    if NATIVE:
        with pytest.raises(RuntimeError):
            _spgemm.pattern_of(parts, columns)
        with pytest.raises(RuntimeError):
            _spgemm.product(parts, a.values(), b.values(), columns, False, False, True)


@native_only
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=2),
    st.lists(st.integers(-(2**62), 2**62) | indices, max_size=8),
    st.sampled_from([torch.int64]),
)
def test_wrong_result_patterns_never_crash(sizes, c_col, index):
    a, b = sparse(2, 5, 0.6), sparse(5, 6, 0.6, seed=1)
    crow = torch.tensor([0, sizes[0], sizes[0] + sizes[1]], dtype=index)
    known = [*pattern(a, b), crow, torch.tensor(c_col, dtype=index)]
    g = torch.randn(len(c_col), dtype=torch.float64)
    calls = [
        lambda: _spgemm.values_of(known, a.values(), b.values(), 6),
        lambda: _spgemm.grad_a(known, b.values(), g, 6),
        lambda: _spgemm.grad_b(known, a.values(), g, 6),
        lambda: _spgemm.select(known, a.values(), b.values(), 6, True),
    ]
    for call in calls:
        if int(crow[-1]) == len(c_col):
            call()
        else:
            with pytest.raises(RuntimeError, match="c: row starts"):
                call()
