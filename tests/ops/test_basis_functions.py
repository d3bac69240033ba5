"""The fused bases of functions against float64 by hand, and what torch asks of operators."""

import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.ops import basis_functions, library, mexican_hats

DOUBLE = torch.float64
TOLERANCE = {DOUBLE: 1e-13, torch.float32: 4e-6}  # of a function; offsets are up to 20 steps
LOW, SPACING = -1.1, 0.45


def splines_by_hand(x, count, order):
    """Values and slopes by the recursions of Cox and de Boor: (n, D) to (n, K, D)."""
    knots = LOW + SPACING * np.arange(-order, count + 1)
    x = x[:, None]
    left = [knots[k : len(knots) - 1 + k, None] for k in (0, 1)]
    values = ((x >= left[0]) & (x < left[1])).astype(float)
    for n in range(1, order + 1):
        t = knots[:, None]
        below = values
        rise, fall = (x - t[: -n - 1]) / (n * SPACING), (t[n + 1 :] - x) / (n * SPACING)
        values = rise * below[:, :-1] + fall * below[:, 1:]
    return values, (below[:, :-1] - below[:, 1:]) / SPACING


def gaussians_by_hand(x, count, order):
    s = (x[:, None] - LOW) / SPACING - np.arange(count)[:, None]
    return np.exp(-(s**2)), -2 * s * np.exp(-(s**2)) / SPACING


def chebyshev_by_hand(x, count, order):
    """The cosines of k t for t = arccos z, and their slopes."""
    t, k = np.arccos(np.tanh(x))[:, None], np.arange(count)[:, None]
    return np.cos(k * t), k * np.sin(k * t) * np.sin(t)


def hats_by_hand(x, shift, rate):
    """Values, and slopes by u = (x - shift) rate."""
    u = (x[:, None] - shift) * rate
    bell = 2 / np.sqrt(3 * np.sqrt(np.pi)) * np.exp(-(u**2) / 2)
    return (1 - u**2) * bell, u * (u**2 - 3) * bell


class Case(NamedTuple):
    """A family of functions of `basis_functions`, or the wavelets with their parameters."""

    family: str
    count: int = 6
    order: int = 3

    @property
    def name(self):
        return "mexican_hats" if self.family == "hats" else "basis_functions"

    @property
    def module(self):
        return sys.modules[f"torchzoo.ops.{self.name}"]

    @property
    def op(self):
        return getattr(torch.ops.torchzoo, self.name).default

    @property
    def backward(self):
        return getattr(torch.ops.torchzoo, f"{self.name}_backward").default

    def rest(self, inputs, dtype):
        """What the operators take after x."""
        if self.family != "hats":
            family = self.module.FAMILIES.index(self.family)
            return family, self.count, self.order, LOW, SPACING
        generator = torch.Generator().manual_seed(5)
        numbers = torch.rand(2, self.count, inputs, generator=generator, dtype=DOUBLE)
        return (4 * numbers[0] - 2).to(dtype), (0.5 + 2 * numbers[1]).to(dtype)

    def call(self, x, *rest):
        """The public function."""
        if self.family == "hats":
            return mexican_hats(x, *rest)
        return basis_functions(
            x, self.family, self.count, order=self.order, low=LOW, spacing=SPACING
        )

    def by_hand(self, x, grad, rest):
        """The functions, and the gradients by x and by the parameters."""
        if self.family == "hats":
            shift, rate = (t.double().numpy() for t in rest)
            values, to_u = hats_by_hand(x, shift, rate)
            each = grad * to_u
            gradients = (each * rate).sum(1), -(each * rate).sum(0)
            return values, *gradients, (each * (x[:, None] - shift)).sum(0)
        hand = {"splines": splines_by_hand, "gaussians": gaussians_by_hand}
        found = hand.get(self.family, chebyshev_by_hand)(x, self.count, self.order)
        return found[0], (grad * found[1]).sum(1)


CASES = [
    *(Case("splines", 8), Case("splines", 3, 1), Case("splines", 5, 2), Case("splines", 9, 5)),
    *(Case("gaussians", 8), Case("gaussians", 1), Case("chebyshev", 5), Case("chebyshev", 1)),
    *(Case("chebyshev", 2), Case("hats", 8), Case("hats", 1)),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.count}-{c.order}")
SHAPES = [(0, 5), (3, 0), (1, 1), (5, 7), (2, 16), (37, 29), (200, 131), (2, 16_400)]


def problem(case, shape, dtype, layout="contiguous", seed=0):
    """x, a gradient, and what else the operators take."""
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 * torch.randn(shape, generator=generator, dtype=DOUBLE)
    grad = torch.randn(shape[0], case.count, shape[1], generator=generator, dtype=DOUBLE)
    x, grad = x.to(dtype), grad.to(dtype)
    rest = case.rest(shape[1], dtype)
    if layout == "transposed":
        x, grad = (t.mT.contiguous().mT for t in (x, grad))
        rest = tuple(t.mT.contiguous().mT if isinstance(t, torch.Tensor) else t for t in rest)
    if layout == "strided":
        x, grad = (t.repeat_interleave(2, -1)[..., ::2] for t in (x, grad))
    return x, grad, rest


def gradients(found):
    return found if isinstance(found, tuple) else (found,)


@cases
@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(list(TOLERANCE)),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    seed=st.integers(0, 9),
)
def test_equals_float64_by_hand(case, shape, dtype, layout, seed):
    x, grad, rest = problem(case, shape, dtype, layout, seed)
    above = grad.double().numpy()
    exact = case.by_hand(x.double().numpy(), above, rest)
    y, found = case.op(x, *rest), gradients(case.backward(grad, x, *rest))
    assert {t.dtype for t in (y, *found)} == {dtype}
    assert y.is_contiguous()
    np.testing.assert_allclose(y.double().numpy(), exact[0], rtol=0, atol=TOLERANCE[dtype])
    for got, wanted in zip(found, exact[1:], strict=True):
        axes = 1 if wanted.shape == x.shape else 0
        # what is added up, times the slopes' own slopes
        size = 20 * (1 + np.abs(above).sum(axes)) / SPACING
        assert got.shape == wanted.shape
        assert (np.abs(got.double().numpy() - wanted) <= TOLERANCE[dtype] * size).all()


@cases
def test_the_reference_equals_float64_by_hand(case):
    x, grad, rest = problem(case, (37, 29), DOUBLE)
    exact = case.by_hand(x.numpy(), grad.numpy(), rest)
    found = case.module.formula(x, *rest), *gradients(case.module.slopes(grad, x, *rest))
    for got, wanted in zip(found, exact, strict=True):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("family", ["splines", "gaussians", "chebyshev", "hats"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_nan_and_what_is_infinite_or_large_are_the_formulas(family, order, dtype):
    case = Case(family, 4, order)
    far = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 100.0, -100.0, 1e-30, 0.0]
    x = torch.tensor([far, far[::-1]], dtype=dtype)
    rest, grad = case.rest(len(far), dtype), torch.ones(2, 4, len(far), dtype=dtype)
    close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(case.op(x, *rest), case.module.formula(x, *rest), **close)
    found = gradients(case.backward(grad, x, *rest))
    expected = gradients(case.module.slopes(grad, x, *rest))
    torch.testing.assert_close(found, expected, **close)


def test_tanh_to_three_units_in_the_last_place():
    x = torch.cat([torch.linspace(-12, 12, 400_001), torch.logspace(-20, 0, 1001)]).view(1, -1)
    found = basis_functions(x, "chebyshev", 2)[0, 1].double().numpy()
    exact = np.tanh(x[0].double().numpy())
    assert (np.abs(found - exact) <= 3 * np.spacing(np.abs(exact).astype(np.float32))).all()


@cases
def test_first_and_second_derivatives(case):
    x = problem(case, (3, 4), DOUBLE)[0].requires_grad_()
    leaves = [x]
    if case.family == "hats":
        leaves += [t.requires_grad_() for t in case.rest(4, DOUBLE)]
    assert gradcheck(case.call, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(case.call, leaves)


@cases
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_opcheck(case, dtype, layout):
    x, grad, rest = problem(case, (3, 5), dtype, layout)
    torch.library.opcheck(case.backward, (grad, x, *rest))
    rest = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in rest]
    torch.library.opcheck(case.op, (x.requires_grad_(), *rest))


@cases
def test_threads(case):
    state, why = library.backend(case.name)
    if state != "native":
        pytest.skip(why)
    x, grad, rest = problem(case, (300, 331), torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((case.op(x, *rest), *gradients(case.backward(grad, x, *rest))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@cases
def test_every_element_is_written(case):
    torch.use_deterministic_algorithms(True)  # memory that is not written holds NaN
    try:
        for shape in SHAPES:
            x, grad, rest = problem(case, shape, torch.float32)
            found = case.op(x, *rest), *gradients(case.backward(grad, x, *rest))
            assert not any(value.isnan().any() for value in found)
    finally:
        torch.use_deterministic_algorithms(False)


@cases
def test_leading_dimensions_and_vmap(case):
    x, _, rest = problem(case, (12, 5), DOUBLE)
    y = case.call(x, *rest)
    assert torch.equal(case.call(x.view(3, 2, 2, 5), *rest), y.view(3, 2, 2, case.count, 5))
    for function in (case.call, case.op):
        mapped = torch.func.vmap(lambda x: function(x, *rest))(x.view(3, 4, 5))  # noqa: B023
        torch.testing.assert_close(mapped, y.view(3, 4, -1, 5))
    grad = torch.ones(3, 4, case.count, 5, dtype=DOUBLE)
    rows = (grad, x.view(3, 4, 5))
    found = gradients(torch.func.vmap(lambda g, x: case.backward(g, x, *rest))(*rows))
    each = [gradients(case.backward(g, x, *rest)) for g, x in zip(*rows, strict=True)]
    for got, wanted in zip(found, zip(*each, strict=True), strict=True):
        assert torch.equal(got, torch.stack(wanted))


@cases
def test_compilers_see_the_formula(case):
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    x, _, rest = problem(case, (4, 3), DOUBLE)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: case.call(x, *rest), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), case.call(x, *rest))
    assert not any("torchzoo" in target for target in graphs[0])


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(case, dtype):
    x, _, rest = problem(case, (9, 7), dtype)
    wide = [t.float() for t in rest if isinstance(t, torch.Tensor)]
    y = case.call(x, *rest)
    assert y.dtype == dtype
    assert torch.equal(y, case.call(x.float(), *wide).to(dtype))
    leaf = x.clone().requires_grad_()
    case.call(leaf, *rest).sum().backward()
    assert leaf.grad.dtype == dtype
    assert case.call(x.to("meta"), *(t.to("meta") for t in rest[: len(wide)])).shape == y.shape


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@cases
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_equals_the_reference(case, dtype, shape):
    x, grad, rest = problem(case, shape, dtype, "strided")
    close = {"rtol": 20 * TOLERANCE[dtype], "atol": 20 * TOLERANCE[dtype]}
    cuda = [t.cuda() if isinstance(t, torch.Tensor) else t for t in (grad, x, *rest)]
    torch.testing.assert_close(case.op(*cuda[1:]).cpu(), case.module.formula(x, *rest), **close)
    found, again = (gradients(case.backward(*cuda)) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    expected = gradients(case.module.slopes(grad, x, *rest))
    sums = {"rtol": close["rtol"], "atol": close["atol"] * (1 + grad.abs().sum(0).max().item())}
    for k, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(got.cpu(), wanted, **(sums if k else close))


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: basis_functions(ONES.long(), "splines", 3), "x: expected floating point"),
        (lambda: basis_functions(torch.tensor(1.0), "splines", 3), r"x: .* got torch.float32 \(\)"),
        (lambda: basis_functions(ONES, "hats", 3), "family: expected one of splines, .* 'hats'"),
        (lambda: basis_functions(ONES, "splines", 0), "count: expected at least 1, got 0"),
        (lambda: basis_functions(ONES, "splines", 3, order=32), "order: expected 1 to 31, got 32"),
        (
            lambda: basis_functions(ONES, "gaussians", 3, spacing=0.0),
            "spacing: expected a number above 0",
        ),
        (lambda: mexican_hats(torch.tensor(1.0), ONES, ONES), "x: expected floating point"),
        (
            lambda: mexican_hats(ONES, ONES[0], ONES),
            r"shift: expected shape \(K, 3\), got \(3,\)",
        ),
        (
            lambda: mexican_hats(ONES, ONES, ONES[:1]),
            r"rate: expected shape \(2, 3\), got \(1, 3\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
