"""The fused experts against one slot at a time, and what torch asks of an operator."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.ops import grouped_ffn, library

OP = torch.ops.torchzoo.grouped_ffn
BACKWARD = torch.ops.torchzoo.grouped_ffn_backward


def slot_by_slot(x, w_in, w_out, offsets, src, weights, activation) -> Tensor:
    """Each slot by itself, in float64, written out; differentiable."""
    x, w_in, w_out, weights = (t.double() for t in (x, w_in, w_out, weights))
    y = [0 * row for row in x]
    start = 0
    for e, end in enumerate(offsets.tolist()):
        for n in range(start, end):
            h = (x[src[n], :, None] * w_in[e]).sum(0)
            if activation == "swiglu":
                gate, up = h[: len(h) // 2], h[len(h) // 2 :]
                a = gate / (1 + torch.exp(-gate)) * up
            else:
                a = h * (h > 0)
            y[src[n]] = y[src[n]] + weights[n] * (a[:, None] * w_out[e]).sum(0)
        start = end
    return torch.stack(y) if y else x


def problem(
    sizes, tokens=4, dim=3, hidden=5, past=1, activation="swiglu", dtype=torch.float64, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    count, experts = sum(sizes) + past, len(sizes)
    width = hidden * (2 if activation == "swiglu" else 1)
    x, w_in, w_out, weights = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((tokens, dim), (experts, dim, width), (experts, hidden, dim), (count,))
    )
    src = torch.randint(0, max(tokens, 1), (count,), generator=generator)
    return x, w_in, w_out, torch.tensor(sizes).cumsum(0).to(torch.int32), src, weights


def floats(inputs):
    return [t for t in inputs if t.is_floating_point()]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.claim(
    69, "The fused experts and their gradients equal one slot at a time", tolerance=2e-5
)
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dim=st.integers(1, 40),
    hidden=st.integers(1, 150),
    past=st.integers(0, 2),
    activation=st.sampled_from(["swiglu", "relu"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
def test_equals_slot_by_slot(sizes, dim, hidden, past, activation, dtype, seed):
    inputs = problem(sizes, 5, dim, hidden, past, activation, dtype, seed)
    y = grouped_ffn(*inputs, activation=activation)
    expected = slot_by_slot(*inputs, activation)
    upstream = torch.randn(y.shape, dtype=torch.float64)
    found = torch.autograd.grad(y, floats(inputs), upstream.to(dtype))
    oracle = torch.autograd.grad(expected, floats(inputs), upstream, allow_unused=True)
    # Rounding is relative to the size of what is summed up.
    for ours, theirs in zip((y, *found), (expected, *oracle), strict=True):
        theirs = torch.zeros(ours.shape).double() if theirs is None else theirs.double()
        size = 1 + dim * theirs.abs().max() if theirs.numel() else 1
        assert ((ours.double() - theirs).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("sizes", [[2, 0, 3], [0, 0], [4]])
def test_gradients(sizes, activation):
    inputs = problem(sizes, activation=activation)

    def call(x, w_in, w_out, weights):
        return grouped_ffn(x, w_in, w_out, *inputs[3:5], weights, activation=activation)

    assert gradcheck(call, floats(inputs))
    assert gradgradcheck(call, floats(inputs))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (5,), (0, 5), (1, 2)])
def test_gradients_of_some_inputs_are_those_of_all(wanted):
    inputs = problem([2, 0, 3])
    every = dict(
        zip(
            (0, 1, 2, 5),
            torch.autograd.grad(grouped_ffn(*inputs).sum(), floats(inputs)),
            strict=True,
        )
    )
    some = [
        t.detach().requires_grad_(i in wanted) if t.is_floating_point() else t
        for i, t in enumerate(inputs)
    ]
    found = torch.autograd.grad(grouped_ffn(*some).sum(), [some[i] for i in wanted])
    for i, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, every[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layouts(layout):
    x, w_in, w_out, offsets, src, weights = problem([3, 4, 2])
    expected = grouped_ffn(x, w_in, w_out, offsets, src, weights)
    if layout == "transposed":
        moved = [x.T.contiguous().T, w_in.mT.contiguous().mT, w_out.mT.contiguous().mT, weights]
    else:
        moved = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, w_in, w_out, weights)]
    found = grouped_ffn(*moved[:3], offsets.long(), src, moved[3])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_double(dtype):
    inputs = problem([3, 0, 4], dim=16, hidden=24, dtype=dtype)
    y = grouped_ffn(*inputs)
    expected = slot_by_slot(*inputs, "swiglu")
    assert y.dtype is dtype
    bound = 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert (y.double() - expected).abs().max() < bound
    gradients = torch.autograd.grad(y.float().sum(), floats(inputs))
    oracle = torch.autograd.grad(expected.sum(), floats(inputs))
    for ours, theirs in zip(gradients, oracle, strict=True):
        assert (ours.double() - theirs.double()).abs().max() < 16 * torch.finfo(dtype).eps * (
            1 + theirs.abs().max()
        )


@pytest.mark.parametrize(
    "value", [-200.0, -88.5, -30.0, 0.0, 30.0, 88.5, 200.0, torch.inf, torch.nan]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates(value, dtype):
    x = torch.tensor([[value]], dtype=dtype, requires_grad=True)
    one = torch.ones(1, 1, 1, dtype=dtype)
    y = grouped_ffn(
        x, torch.ones(1, 1, 2, dtype=dtype), one, torch.tensor([1]), torch.tensor([0]), one[0, 0]
    )
    plain = torch.nn.functional.silu(x) * x
    torch.testing.assert_close(y, plain, equal_nan=True, rtol=1e-6, atol=1e-30)
    found, expected = (torch.autograd.grad(out.sum(), x)[0] for out in (y, plain))
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_long_groups_equal_products_of_matrices(activation, dtype):
    """Groups and features that take several blocks of the kernel's products."""
    inputs = problem(
        [205, 0, 17, 101], tokens=90, dim=261, hidden=273, activation=activation, dtype=dtype
    )
    doubles = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    x, w_in, w_out, offsets, src, weights = doubles
    expected = 0 * x
    for e, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        h = x[src[start:end]] @ w_in[e]
        gate, up = h.chunk(2, 1) if activation == "swiglu" else (h, None)
        a = gate.relu() if up is None else gate * gate.sigmoid() * up
        rows = weights[start:end, None] * (a @ w_out[e])
        expected = expected.index_add(0, src[start:end], rows)
    y = grouped_ffn(*inputs, activation=activation)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    found = torch.autograd.grad(y, floats(inputs), upstream)
    wanted = torch.autograd.grad(expected, floats(doubles), upstream.double())
    for f, w in zip((y, *found), (expected, *wanted), strict=True):
        assert (f - w).abs().max() < TOLERANCE[dtype] * w.abs().max()


@pytest.mark.skipif(library.backend("grouped_ffn")[0] != "native", reason="no kernel")
def test_the_same_for_any_number_of_threads():
    inputs = problem([70, 0, 3, 200], tokens=90, dim=130, hidden=200, dtype=torch.float32)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = grouped_ffn(*inputs)
            results.append((y, *torch.autograd.grad(y.square().sum(), floats(inputs))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.claim(69, "Experts without slots and slots past the last end are never read")
def test_what_counts_for_nothing_is_not_read():
    x, w_in, w_out, offsets, src, weights = problem([2, 0, 3], tokens=5)
    with torch.no_grad():
        src[5], src[:5] = 4, src[:5] % 4  # only the slot past the end takes token 4
    expected = grouped_ffn(x, w_in, w_out, offsets, src, weights)
    with torch.no_grad():
        x[4], w_in[1], w_out[1], weights[5] = torch.nan, torch.nan, torch.nan, torch.nan
    y = grouped_ffn(x, w_in, w_out, offsets, src, weights)
    assert torch.equal(y, expected)
    assert (y[4] == 0).all()
    y.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, w_in, w_out, weights))
    assert (w_in.grad[1] == 0).all()
    assert (w_out.grad[1] == 0).all()
    assert weights.grad[5] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("sizes", "past"), [([2, 0, 3], 1), ([0, 0], 0)])
def test_opcheck(sizes, past, dtype):
    inputs = problem(sizes, past=past, dtype=dtype)
    torch.library.opcheck(OP.default, inputs)
    h = OP(*inputs)[1].detach()
    grad = torch.randn(4, 3, dtype=dtype)
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(BACKWARD.default, (grad, plain[0], h, *plain[1:], True, False, True))


def test_autocast():
    inputs = problem([2, 0, 3], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_ffn(*inputs)
    halves = [t.bfloat16() if t.is_floating_point() else t for t in inputs]
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, grouped_ffn(*halves))


def test_vmap():
    x, *rest = (t.detach() for t in problem([2, 0, 3]))
    batch = torch.stack([x, 2 * x, x - 1])
    y = torch.vmap(lambda one: grouped_ffn(one, *rest))(batch)
    for one, expected in zip(batch, y, strict=True):
        torch.testing.assert_close(grouped_ffn(one, *rest), expected, rtol=0, atol=0)


def test_compiles_in_one_graph():
    inputs = problem([2, 0, 3])
    compiled = torch.compile(grouped_ffn, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*inputs), grouped_ffn(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found.sum(), floats(inputs)),
        torch.autograd.grad(expected.sum(), floats(inputs)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_meta_and_forward_mode():
    inputs = [t.to("meta") for t in problem([2, 0, 3])]
    assert grouped_ffn(*inputs).shape == (4, 3)
    x, *rest = problem([2, 0, 3])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="grouped_ffn: no forward-mode"):
            grouped_ffn(dual, *rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation: expected one of"),
        ({"x": torch.ones(4)}, r"x: expected floats of shape \(T, dim\)"),
        ({"x": torch.ones(4, 3)}, "w_in, w_out: expected the type of x, torch.float32"),
        ({"w_out": torch.ones(3, 5, 4).double()}, r"w_out: expected \(E, hidden, 3\)"),
        ({"w_in": torch.ones(3, 3, 5).double()}, r"w_in: expected \(3, 3, 10\), got \(3, 3, 5\)"),
        ({"offsets": torch.tensor([2.0, 2.0, 5.0])}, "offsets: expected int32 or int64"),
        ({"offsets": torch.tensor([2, 1, 5])}, "offsets: expected ends that don't decrease"),
        ({"offsets": torch.tensor([2, 2, 7])}, r"offsets: .* within \[0, 6\]"),
        ({"src": torch.zeros(6, dtype=torch.int32)}, "src: expected int64"),
        (
            {"src": torch.tensor([0, 1, 2, 3, 4, 0])},
            r"src: expected rows of x in \[0, 4\), got 0 to 4",
        ),
        ({"src": torch.tensor([0, 1, 2, 3, -1, 0])}, "src: expected rows of x"),
        ({"weights": torch.ones(5)}, r"weights: expected floats of shape \(6,\)"),
        ({"weights": torch.ones(6, device="meta")}, "expected one device, got cpu"),
    ],
)
def test_bad_input(change, message):
    names = ("x", "w_in", "w_out", "offsets", "src", "weights")
    arguments = dict(zip(names, problem([2, 0, 3]), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        grouped_ffn(**arguments)


@pytest.mark.skipif(library.backend("grouped_ffn")[0] != "native", reason="no kernel")
def test_the_kernel_checks_what_memory_depends_on():
    inputs = [t.detach() for t in problem([2, 0, 3])]
    for place, value in ((3, torch.tensor([2, 2, 9], dtype=torch.int32)), (4, inputs[4] + 4)):
        broken = list(inputs)
        broken[place] = value
        with pytest.raises(RuntimeError, match="expected"):
            OP(*broken)
