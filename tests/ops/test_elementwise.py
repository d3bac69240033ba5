"""The fused elementwise operators against float64 by hand, and what torch asks of an operator."""

import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.activations import crrelu, hyrelu
from torchzoo.ops import _elementwise, bounded_relu, library

DOUBLE = torch.float64
TYPES = [DOUBLE, torch.float32, torch.bfloat16, torch.float16]
# a rounding or two of the result, which the wide types' kernels may make inside too
TOLERANCE = {
    DOUBLE: 1e-14,
    torch.float32: 5e-7,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def crrelu_by_hand(x, eps):
    """Value and derivatives by x and by the parameter."""
    with np.errstate(over="ignore", invalid="ignore"):
        bell = np.exp(-np.square(x) / 2)
        near = np.where(np.isinf(x), 0.0, x)
        slope = (x > 0) + eps * np.where(bell == 0, 0.0, (1 - np.square(near)) * bell)
        return np.maximum(x, 0) + eps * near * bell, slope, near * bell


def hyrelu_by_hand(x, bound, kappa=20.0):
    with np.errstate(over="ignore", invalid="ignore"):
        passed = np.where((x > 0) & (x < np.inf), x, 0.0)
        t = kappa * (bound - passed)
        low = np.where(t < 0, np.exp(np.minimum(t, 0)), 1) / (1 + np.exp(-np.abs(t)))
        high = np.where(t < 0, 1, np.exp(np.minimum(-t, 0))) / (1 + np.exp(-np.abs(t)))
        fall = kappa * (passed * low * high)
        return passed * low, np.where(passed == 0, 0.0, low - fall), fall


def saturate_by_hand(x, bound):
    inside, beyond = (x > 0) & (x <= bound), x > bound
    return np.clip(x, 0, bound), inside * 1.0, beyond * 1.0


class Case(NamedTuple):
    """An operator: its public function, further arguments, and the function by hand."""

    name: str
    call: object
    options: tuple
    by_hand: object

    @property
    def op(self):
        return getattr(torch.ops.torchzoo, self.name).default

    @property
    def backward(self):
        return getattr(torch.ops.torchzoo, f"{self.name}_backward").default

    @property
    def module(self):
        return sys.modules[f"torchzoo.ops.{self.name}"]


CASES = [
    Case("crrelu", crrelu, (), crrelu_by_hand),
    Case("hyrelu", hyrelu, (20.0, True), hyrelu_by_hand),
    Case("bounded_relu", bounded_relu, (2,), saturate_by_hand),
]
cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
SHAPES = [  # of x and of the parameter
    *(((), ()), ((0,), ()), ((7,), ()), ((3, 5, 7), ()), ((40_000,), ()), ((2, 0), ())),
    *(((5,), (5,)), ((3, 4), (4,)), ((70, 3), (3,)), ((6, 3, 4), (3, 4)), ((33, 1300), (1300,))),
    *(((0, 4), (4,)), ((4, 0), (0,)), ((300, 1, 2), (1, 2)), ((2, 20_000), (20_000,))),
]


def problem(shape, features, dtype, layout="contiguous", seed=0):
    """Inputs, large ones among them; a parameter in the type that is computed in; a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=DOUBLE)
    if x.numel() > 6:
        top = torch.finfo(dtype).max
        x.view(-1)[:6] = torch.tensor([torch.inf, -torch.inf, top, -top, 0.0, -0.0])
    grad = torch.randn(shape, generator=generator, dtype=DOUBLE)
    x, grad = x.to(dtype), grad.to(dtype)
    if layout == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and x.ndim:
        x, grad = (t.repeat_interleave(2, -1)[..., ::2] for t in (x, grad))
    wide = DOUBLE if dtype == DOUBLE else torch.float32
    return x, torch.rand(features, generator=generator, dtype=wide) + 0.5, grad


def assert_near(found, expected, dtype, size=1.0):
    np.testing.assert_allclose(
        found.double().numpy(),
        expected,
        rtol=TOLERANCE[dtype],
        atol=np.max(size, initial=0.0) * max(TOLERANCE[dtype] / 8, 1e-45),
    )


@pytest.mark.claim(3, "The operator agrees with float64 by hand", tolerance=5e-7)
@pytest.mark.claim(121, "The operator agrees with float64 by hand", tolerance=5e-7)
@cases
@settings(max_examples=60, deadline=None)
@given(
    shapes=st.sampled_from(SHAPES),
    dtype=st.sampled_from(TYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    seed=st.integers(0, 9),
)
def test_equals_float64_by_hand(case, shapes, dtype, layout, seed):
    x, p, grad = problem(*shapes, dtype, layout, seed)
    before = x.clone()
    exact = case.by_hand(x.double().numpy(), p.double().numpy())
    y = case.op(x, p, *case.options)
    assert y.dtype == dtype
    assert_near(y, np.where(np.isfinite(exact[0]), exact[0], np.inf), dtype)
    dx, dp = case.backward(grad, x, p, *case.options)
    assert (dx.dtype, dp.dtype) == (dtype, p.dtype)
    above = grad.double().numpy()
    assert_near(dx, above * exact[1], dtype, 8 * (np.abs(above) * (1 + np.abs(exact[2]))))
    leading = tuple(range(x.ndim - p.ndim))
    total = (above * exact[2]).sum(leading)
    spread = np.abs(above * exact[2]).sum(leading) * (1e-13 if dtype == DOUBLE else 2e-5)
    assert dp.shape == p.shape
    assert (np.abs(dp.double().numpy() - total) <= spread + 1e-30).all()
    assert torch.equal(x, before)


@cases
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shapes", [((33, 70), ()), ((33, 70), (70,)), ((33, 2, 70), (2, 70))])
def test_equals_the_reference(case, shapes, dtype):
    x, p, grad = problem(*shapes, dtype)
    tolerance = {"rtol": 2 * TOLERANCE[dtype], "atol": 4 * TOLERANCE[dtype]}
    expected = case.module.formula(x, p, *case.options)
    torch.testing.assert_close(case.op(x, p, *case.options), expected, **tolerance)
    dx, dp = case.backward(grad, x, p, *case.options)
    expected_x, expected_p = case.module.slopes(grad, x, p, *case.options)
    torch.testing.assert_close(dx, expected_x, **tolerance)
    torch.testing.assert_close(dp, expected_p, rtol=1e-5, atol=1e-4)


@pytest.mark.claim(121, "Bounds are compared with exactly, NaN and ties too", tolerance=0.0)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("features", [(), (8,)])
def test_comparisons_with_a_bound(dtype, features):
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([nan, -inf, -1.0, 0.0, 0.25, 0.5, 0.75, inf], dtype=dtype)
    bound = torch.full(features, 0.5, dtype=DOUBLE if dtype == DOUBLE else torch.float32)
    expected = {
        "above": [nan, 0, 0, 0, 0, 0, 0.75, inf],
        "below": [0, 0, 0, 0, 0.25, 0.5, 0, 0],
        "saturate": [0, 0, 0, 0, 0.25, 0.5, 0.5, 0.5],
    }
    for kind, values in expected.items():
        wanted = torch.tensor(values, dtype=dtype)
        for leaf in (x, x.clone().requires_grad_()):
            y = bounded_relu(leaf, bound, kind=kind)
            torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
        passed = (y.detach() == x) & (x != 0) | (x.isnan() & (kind == "above"))
        y.sum().backward()
        assert torch.equal(leaf.grad, passed.to(dtype))
    with pytest.raises(ValueError, match="kind: expected one of above, below, saturate, got 'x'"):
        bounded_relu(x, bound, kind="x")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@cases
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_cuda_equals_the_reference(case, shapes, dtype, layout):
    x, p, grad = problem(*shapes, dtype, layout)
    tolerance = {"rtol": 4 * TOLERANCE[dtype], "atol": 8 * TOLERANCE[dtype]}
    on_device = [tensor.cuda() for tensor in (grad, x, p)]
    y = case.op(*on_device[1:], *case.options)
    expected = case.module.formula(x, p, *case.options)
    torch.testing.assert_close(y.cpu(), expected, **tolerance)
    found = case.backward(*on_device, *case.options)
    again = case.backward(*on_device, *case.options)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    expected_x, expected_p = case.module.slopes(grad, x, p, *case.options)
    torch.testing.assert_close(found[0].cpu(), expected_x, **tolerance)
    torch.testing.assert_close(found[1].cpu(), expected_p, rtol=1e-5, atol=1e-3)


@cases
def test_nan_passes_or_is_stopped(case):
    x = torch.tensor([torch.nan, 1.0])
    y = case.op(x, torch.tensor(0.5), *case.options)
    assert y.isnan().tolist() == [case.name == "crrelu", False]
    if case.name == "hyrelu":
        kept = case.op(x, torch.tensor(0.5), 20.0, False)
        assert kept.isnan().tolist() == [True, False]


@cases
@pytest.mark.parametrize("shapes", [((3, 4), ()), ((3, 4), (4,)), ((2, 3, 4), (3, 1)), ((), ())])
def test_first_and_second_derivatives(case, shapes):
    x = torch.randn(shapes[0], dtype=DOUBLE)
    x = (x + 0.1 * x.sign()).requires_grad_()
    p = (torch.rand(shapes[1], dtype=DOUBLE) + 0.5).requires_grad_()
    options = {"sharpness": 3.0} if case.name == "hyrelu" else {}
    call = lambda *args: case.call(*args, **options)  # noqa: E731
    assert gradcheck(call, (x, p), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, (x, p))


@cases
@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        (((3, 4), ()), "contiguous"),
        (((3, 4), (4,)), "contiguous"),
        (((2, 3, 4), ()), "transposed"),
        (((2, 3, 4), (3, 4)), "strided"),
        (((0, 4), (4,)), "contiguous"),
    ],
)
def test_opcheck(case, shapes, layout, dtype):
    x, p, grad = problem(*shapes, dtype, layout)
    x = x.clamp(-3, 3)
    torch.library.opcheck(case.backward, (grad, x, p, *case.options))
    leaves = (x.detach().requires_grad_(), p.requires_grad_())
    torch.library.opcheck(case.op, (*leaves, *case.options))


@cases
@pytest.mark.parametrize("dims", [(0, None), (1, 0), (None, 0)])
def test_vmap(case, dims):
    x, p = torch.randn(4, 3, 3), torch.rand(3, 3) + 0.5
    x = x[0] if dims[0] is None else x
    p = p[0] if dims[1] is None else p
    found = torch.func.vmap(case.call, dims)(x, p)
    xs = [x] * 3 if dims[0] is None else x.unbind(dims[0])
    ps = [p] * len(xs) if dims[1] is None else p.unbind(dims[1])
    expected = torch.stack([case.call(*row) for row in zip(xs, ps, strict=True)])
    torch.testing.assert_close(found, expected)
    plain = torch.func.vmap(lambda x, p: case.op(x, p, *case.options), dims)(x, p)
    torch.testing.assert_close(plain, expected)
    backward = lambda x, p: case.backward(torch.ones_like(x), x, p, *case.options)  # noqa: E731
    pairs = [backward(*row) for row in zip(xs, ps, strict=True)]
    found = torch.func.vmap(backward, dims)(x, p)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*pairs, strict=True))))
    grad = torch.func.grad(lambda x, p: case.call(x, p).sin().sum(), (0, 1))
    found = torch.func.vmap(grad, dims)(x, p)
    rows = [grad(*row) for row in zip(xs, ps, strict=True)]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*rows, strict=True))))


@pytest.mark.claim(3, "One thread or two: the same bits", tolerance=0.0)
@pytest.mark.claim(121, "One thread or two: the same bits", tolerance=0.0)
@cases
@pytest.mark.parametrize(
    "shapes", [((300_001,), ()), ((700, 600), (600,)), ((3, 90_000), (90_000,))]
)
def test_threads(case, shapes):
    x, p, grad = problem(*shapes, torch.float32)
    backend, why = library.backend(case.name)
    if backend != "native":
        pytest.skip(why)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = case.op(x, p, *case.options)
            results.append((y, *case.backward(grad, x, p, *case.options)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@cases
def test_memory_format_is_kept(case):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = case.call(x, 0.5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    each = case.call(x, torch.rand(3, 1, 1))
    assert each.is_contiguous()
    torch.testing.assert_close(case.call(x.contiguous(), 0.5), y.contiguous())


@cases
def test_every_element_is_written(case):
    torch.use_deterministic_algorithms(True)  # memory that is not written holds NaN
    try:
        for shapes in (((1001,), ()), ((17, 530), (530,)), ((5, 3), (3,)), ((0, 3), (3,))):
            x, p, grad = problem(*shapes, torch.float32)
            found = (case.op(x, p, *case.options), *case.backward(grad, x, p, *case.options))
            assert not any(value.isnan().any() for value in found)
    finally:
        torch.use_deterministic_algorithms(False)


def compiled_targets(call, x):
    """What a compiled call computes, and the names of all that its graph calls."""
    targets = set()

    def backend(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    return torch.compile(call, backend=backend, fullgraph=True)(x), targets


@cases
def test_compilers_see_the_formula_of_small_inputs(case, monkeypatch):
    monkeypatch.setattr(_elementwise, "LARGE", 12)
    for shape in ((4, 3), (11,)):
        x = torch.randn(shape)
        found, targets = compiled_targets(lambda x: case.call(x, 0.5), x)
        torch.testing.assert_close(found, case.call(x, 0.5))
        assert any("torchzoo" in target for target in targets) == (x.numel() == 12)


@cases
def test_compiled_gradients_of_large_inputs(case, monkeypatch):
    monkeypatch.setattr(_elementwise, "LARGE", 0)
    torch.compiler.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    x, p, grad = problem((9, 5), (5,), DOUBLE)
    leaves = [x.requires_grad_(), p.requires_grad_()]
    found, expected = (
        torch.autograd.grad(call(x, p), leaves, grad) for call in (compiled, case.call)
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@cases
def test_exported_programs_hold_the_formula(case, monkeypatch):
    monkeypatch.setattr(_elementwise, "LARGE", 0)

    class Module(torch.nn.Module):
        def forward(self, x):
            return case.call(x, 0.5)

    graph = torch.export.export(Module(), (torch.randn(4, 3),)).graph
    assert not any("torchzoo" in str(node.target) for node in graph.nodes)


@cases
def test_meta_and_autocast(case):
    x, p = torch.randn(2, 3), torch.rand(3)
    assert case.call(x.to("meta"), p.to("meta")).shape == (2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.call(x, p), case.call(x, p))
        assert case.call(x.bfloat16(), p).dtype == torch.bfloat16


@cases
def test_the_type_is_that_of_x(case):
    p = torch.rand(3, dtype=DOUBLE, requires_grad=True)
    y = case.call(torch.randn(2, 3), p)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert p.grad.dtype == DOUBLE


@cases
@pytest.mark.parametrize(
    ("x", "p", "message"),
    [
        (torch.ones(3, dtype=torch.int64), 0.5, "x: expected a floating-point tensor"),
        (torch.ones(2, 3), torch.ones(2), r"x: expected one whose last .*\(2,\).*got \(2, 3\)"),
        (torch.ones(3), torch.ones(2, 3), r"x: expected one whose last .*got \(3,\)"),
        (torch.ones(2, 1), torch.ones(3), r"x: expected one whose last .*got \(2, 1\)"),
        (torch.ones(3), torch.ones(3, device="meta"), ": expected it on cpu, as x is, got meta"),
    ],
)
def test_bad_input(case, x, p, message):
    with pytest.raises(ValueError, match=message):
        case.call(x, p)
