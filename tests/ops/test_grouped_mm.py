"""The grouped product against a product row by row, and what torch asks of an operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.ops import grouped_mm

OP = torch.ops.torchzoo.grouped_mm
DWEIGHT = torch.ops.torchzoo.grouped_mm_dweight


def by_rows(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Each row by itself, in float64: the group of row t is the number of ends at or below t."""
    rows = []
    for t in range(x.shape[0]):
        group = int((offsets <= t).sum())
        zero = torch.zeros(weight.shape[2], dtype=torch.float64)
        past = group == len(offsets)
        rows.append(zero if past else (x[t].double()[:, None] * weight[group].double()).sum(0))
    return torch.stack(rows) if rows else torch.zeros(0, weight.shape[2], dtype=torch.float64)


def problem(sizes, k=3, n=4, surplus=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    x = torch.randn(sum(sizes) + surplus, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(sizes), k, n, generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), offsets


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SIZES = [[2, 0, 3], [0, 0, 0], [5], [0, 1, 0, 4, 0]]


@pytest.mark.claim(69, "The grouped product equals a product row by row", tolerance=1e-13)
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    k=st.integers(0, 5),
    n=st.integers(0, 5),
    surplus=st.integers(0, 3),
    dtype=st.sampled_from(list(TOLERANCE)),
    index=st.sampled_from([torch.int32, torch.int64]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    seed=st.integers(0, 99),
)
def test_equals_rows(sizes, k, n, surplus, dtype, index, layout, seed):
    x, weight, offsets = problem(sizes, k, n, surplus, dtype, seed)
    if layout == "transposed":
        x, weight = x.T.contiguous().T, weight.mT.contiguous().mT
    elif layout == "strided":
        x, weight = x.repeat_interleave(2, 0)[::2], weight.repeat_interleave(3, 2)[..., ::3]
    y = grouped_mm(x, weight, offsets.to(index))
    assert y.dtype == dtype
    expected = by_rows(x, weight, offsets)
    size = by_rows(x.abs(), weight.abs(), offsets)  # rounding is relative to the sum of sizes
    assert ((y.double() - expected).abs() <= TOLERANCE[dtype] * size).all()
    assert (y[int(offsets[-1]) :] == 0).all()


@pytest.mark.claim(69, "Gradients of the grouped product pass gradcheck twice", tolerance=1e-6)
@pytest.mark.parametrize("surplus", [0, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients(sizes, surplus):
    x, weight, offsets = problem(sizes, surplus=surplus)
    inputs = (x.requires_grad_(), weight.requires_grad_(), offsets)
    assert gradcheck(grouped_mm, inputs)
    assert gradgradcheck(grouped_mm, inputs)


def test_gradients_equal_those_of_rows():
    x, weight, offsets = problem([2, 0, 3])
    x.requires_grad_(), weight.requires_grad_()
    upstream = torch.randn(7, 4, dtype=torch.float64)
    ours = torch.autograd.grad((grouped_mm(x, weight, offsets) * upstream).sum(), (x, weight))
    oracle = torch.autograd.grad((by_rows(x, weight, offsets) * upstream).sum(), (x, weight))
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert (ours[1][1] == 0).all()
    assert (ours[0][5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "surplus"), [([2, 0, 3], 2), ([0, 0], 0), ([0, 0], 3)])
def test_opcheck(sizes, surplus, dtype):
    x, weight, offsets = problem(sizes, surplus=surplus, dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    grad = torch.randn(x.shape[0], 4).to(dtype).requires_grad_()
    tolerances = {"atol": 5e-2, "rtol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(OP.default, (x, weight, offsets), **tolerances)
    torch.library.opcheck(DWEIGHT.default, (x, grad, offsets), **tolerances)


@pytest.mark.claim(69, "Weights of empty groups and rows past the last end are never read")
def test_empty_groups_are_not_read():
    x, weight, offsets = problem([2, 0, 3])
    clean = grouped_mm(x, weight, offsets)
    x[5:], weight[1] = torch.nan, torch.nan
    x.requires_grad_(), weight.requires_grad_()
    y = grouped_mm(x, weight, offsets)
    assert torch.equal(y, clean)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert (weight.grad[1] == 0).all()
    assert weight.grad.isfinite().all()


def test_half_precision_accumulates_in_float32():
    x, weight = torch.ones(1, 4096), torch.ones(1, 4096, 1)
    x[0, 0] = 4096.0  # in bfloat16, 4096 + 1 = 4096
    y = grouped_mm(x.bfloat16(), weight.bfloat16(), torch.tensor([1]))
    assert float(y) == 8192.0
    upstream = torch.ops.torchzoo.grouped_mm_dweight(
        x.T.bfloat16().contiguous(), torch.ones(4096, 1).bfloat16(), torch.tensor([4096])
    )
    assert float(upstream) == 8192.0


def test_autocast():
    x, weight, offsets = problem([2, 0, 3], dtype=torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    half = grouped_mm(x.bfloat16(), weight.bfloat16(), offsets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_mm(x, weight, offsets)
        assert grouped_mm(x.double(), weight.double(), offsets).dtype == torch.float64
    assert torch.equal(y, half)
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_autocast_does_not_reach_into_the_operator():
    x, weight, offsets = problem([2, 0, 3], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = OP(x, weight, offsets)
    assert torch.equal(y, grouped_mm(x, weight, offsets))


def test_vmap():
    x, weight, offsets = problem([2, 0, 3])
    xs, weights = torch.stack([x, 2 * x]), torch.stack([weight, -weight], dim=2)
    ends = torch.stack([offsets, torch.tensor([0, 4, 4], dtype=torch.int32)])
    ys = torch.vmap(grouped_mm, in_dims=(0, 2, 0), out_dims=1)(xs, weights, ends)
    for i in range(2):
        assert torch.equal(ys[:, i], grouped_mm(xs[i], weights[:, :, i], ends[i]))


def test_forward_mode_is_refused():
    x, weight, offsets = problem([2, 0, 3])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: grouped_mm(x, weight, offsets), (x,), (x,))


def test_compiles_in_one_graph():
    x, weight, offsets = problem([2, 0, 3])
    torch._dynamo.reset()
    compiled = torch.compile(grouped_mm, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ends in (offsets, torch.tensor([0, 7, 7], dtype=torch.int32)):
            assert torch.equal(compiled(x, weight, ends), grouped_mm(x, weight, ends))


def test_meta():
    x, weight, offsets = (t.to("meta") for t in problem([2, 0, 3]))
    assert grouped_mm(x, weight, offsets).shape == (7, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, r"x: expected floats of shape \(T, K\), got torch.float32 \(3,\)"),
        ({"x": torch.ones(4, 2, dtype=torch.int64)}, "x: expected floats"),
        ({"weight": torch.ones(2, 3, 5)}, r"weight: expected \(E, 2, N\), got \(2, 3, 5\)"),
        ({"weight": torch.ones(2, 2, 5).double()}, "weight: expected the type of x"),
        ({"offsets": torch.tensor([1, 2, 3])}, r"offsets: expected .* shape \(2,\)"),
        ({"offsets": torch.tensor([1.0, 2.0])}, "offsets: expected int32 or int64"),
        ({"offsets": torch.tensor([2, 1])}, "offsets: expected ends that don't decrease"),
        ({"offsets": torch.tensor([1, 5])}, r"within \[0, 4\], got \[1, 5\]"),
        ({"offsets": torch.tensor([-1, 4])}, r"got \[-1, 4\]"),
        ({"offsets": torch.tensor([1, 2], device="meta")}, "expected one device"),
    ],
)
def test_bad_input(change, message):
    good = {
        "x": torch.ones(4, 2),
        "weight": torch.ones(2, 2, 5),
        "offsets": torch.tensor([1, 4], dtype=torch.int32),
    }
    grouped_mm(**good)
    with pytest.raises(ValueError, match=message):
        grouped_mm(**good | change)
