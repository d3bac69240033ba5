"""Sums over blocks of weights against the dense sum with zeros in between."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.ops import block_sparse_log_einsum_exp
from torchzoo.ops.block_log_einsum_exp import _block_log_einsum_exp

DOUBLE = torch.float64
ROW_PTR = torch.tensor([0, 2, 2, 3, 6, 8])  # rows of 2, 0, 1, 3 and 2 edges
COL_IDX = torch.tensor([3, 1, 0, 1, 3, 2, 0, 0])  # the last row meets fold 0 twice


def problem(b=5, o=2, k=3, dtype=DOUBLE, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    a = spread * torch.randn(4, b, k, generator=generator, dtype=DOUBLE)
    w = torch.rand(len(COL_IDX), o, k, generator=generator, dtype=DOUBLE)
    return a.to(dtype), w.to(dtype)


def dense(a, w_blocks):
    """Each edge's terms side by side, for each row: logsumexp of them all."""
    rows = []
    for start, end in zip(ROW_PTR[:-1].tolist(), ROW_PTR[1:].tolist(), strict=True):
        if start == end:
            rows.append(a.new_full((a.shape[1], w_blocks.shape[1]), -torch.inf))
            continue
        edges = range(start, end)
        terms = [a[COL_IDX[e]][:, None] + w_blocks[e].log()[None] for e in edges]
        rows.append(torch.logsumexp(torch.cat(terms, -1), -1))
    return torch.stack(rows)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [(5, 2, 3), (0, 2, 3), (50, 17, 9), (3, 1, 1)])
def test_equals_dense(sizes, dtype, tolerance, index):
    a, w = problem(*sizes, dtype=dtype, spread=100.0)
    w[::2] *= (w[::2] > 0.5).to(dtype)
    a[1, ::2] = -torch.inf
    out = block_sparse_log_einsum_exp(a, w, ROW_PTR.to(index), COL_IDX.to(index))
    assert out.dtype == dtype
    expected = dense(a.double(), w.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert (out[1] == -torch.inf).all()


def test_largest_value_of_another_row_hides_nothing():
    a = torch.tensor([[[0.0]], [[-400.0]], [[-400.0]], [[-400.0]]])
    out = block_sparse_log_einsum_exp(a, torch.ones(8, 1, 1), ROW_PTR, COL_IDX)
    torch.testing.assert_close(out, dense(a, torch.ones(8, 1, 1)))


def test_gradients():
    a, w = problem()
    leaves = a.requires_grad_(), w.requires_grad_()
    kept = torch.tensor([0, 2, 3, 4])  # row 1 is minus infinity
    run = lambda a, w: block_sparse_log_einsum_exp(a, w, ROW_PTR, COL_IDX)[kept]  # noqa: E731
    assert gradcheck(run, leaves, check_batched_grad=True)
    assert gradgradcheck(run, leaves)
    grad = torch.randn(5, 5, 2, dtype=DOUBLE)
    whole = block_sparse_log_einsum_exp(a, w, ROW_PTR, COL_IDX)
    found = torch.autograd.grad(whole, leaves, grad)
    expected = torch.autograd.grad(dense(a, w)[kept], leaves, grad[kept])
    torch.testing.assert_close(found, expected)


def test_opcheck_and_compile():
    a, w = problem()
    leaves = a.requires_grad_(), w.requires_grad_()
    torch.library.opcheck(_block_log_einsum_exp._opoverload, (*leaves, ROW_PTR, COL_IDX, False))
    torch._dynamo.reset()
    compiled = torch.compile(block_sparse_log_einsum_exp, fullgraph=True, backend="aot_eager")
    found = compiled(a, w, ROW_PTR, COL_IDX)
    torch.testing.assert_close(found, block_sparse_log_einsum_exp(a, w, ROW_PTR, COL_IDX))
    assert block_sparse_log_einsum_exp(*(x.to("meta") for x in (a, w, ROW_PTR, COL_IDX))).shape == (
        5,
        5,
        2,
    )


def test_vmap():
    a, w = problem()
    run = lambda a: block_sparse_log_einsum_exp(a, w, ROW_PTR, COL_IDX)  # noqa: E731
    found = torch.func.vmap(run)(torch.stack([a, 2 * a]))
    torch.testing.assert_close(found, torch.stack([run(a), run(2 * a)]))


def test_a_sample_has_the_same_bits_in_every_batch():
    a, w = problem(130, 9, 21, torch.float32, spread=30.0)
    run = lambda a: block_sparse_log_einsum_exp(a, w, ROW_PTR, COL_IDX, deterministic=True)  # noqa: E731
    whole = run(a)
    for rows in (slice(0, 1), slice(95, 98), slice(129, None)):
        assert torch.equal(run(a[:, rows]), whole[:, rows])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(3, 4)}, r"a: expected floats of shape"),
        ({"w_blocks": torch.ones(8, 2, 4)}, r"w_blocks: expected \(E, O, 3\), got \(8, 2, 4\)"),
        ({"row_ptr": torch.tensor([0, 3, 2, 8])}, "row_ptr: expected pointers that rise from 0 to"),
        ({"row_ptr": torch.tensor([0, 9])}, r"row_ptr: expected pointers .* 8, got \[0, 9\]"),
        ({"row_ptr": torch.tensor([]).long()}, r"row_ptr: expected R \+ 1 pointers, got none"),
        ({"row_ptr": torch.ones(2)}, "row_ptr: expected int32 or int64"),
        ({"col_idx": torch.zeros(7).long()}, r"col_idx: expected \(8,\), got \(7,\)"),
        ({"col_idx": torch.full((8,), 4)}, r"col_idx: expected folds in \[0, 4\), got 4 to 4"),
        ({"col_idx": COL_IDX.to("meta")}, "col_idx: expected it on cpu"),
    ],
)
def test_bad_input(change, message):
    a, w = problem()
    good = {"a": a, "w_blocks": w, "row_ptr": ROW_PTR, "col_idx": COL_IDX}
    block_sparse_log_einsum_exp(**good)
    with pytest.raises(ValueError, match=message):
        block_sparse_log_einsum_exp(**good | change)
