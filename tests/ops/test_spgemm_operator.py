"""What torch asks of the sparse product: gradients, the same bits, plans, compilation."""

import copy
import pickle

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.ops.sparse_products import assert_all_equal, native_only, pattern, random_cases, sparse
from torchzoo.ops import _spgemm
from torchzoo.ops.spgemm import spgemm, spgemm_plan


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
