"""The fused EvoNorm of batches against float64 by hand, and what torch asks of an operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.ops import _elementwise, evonorm_batch, library
from torchzoo.ops.evonorm_batch import formula, slopes

DOUBLE = torch.float64
TYPES = {DOUBLE: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SHAPES = [
    *((2, 6, 5), (3, 6, 3, 4), (2, 4, 2, 3, 2), (1, 2, 40, 33), (5, 8, 1, 1), (1, 3, 7)),
    *((0, 4, 3), (2, 4, 0), (3, 2, 1100)),
]
KINDS = ("B0", "B1", "B2")
kinds = pytest.mark.parametrize("kind", KINDS)
measured = pytest.mark.parametrize("measured", [True, False])
op, backward = (
    getattr(torch.ops.torchzoo, name).default
    for name in ("evonorm_batch", "evonorm_batch_backward")
)


def problem(shape, dtype, kind="B0", measured=True, seed=0):
    """Input, gradient, and γ, β, v and variance in the type that is computed in, some None."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator, dtype=DOUBLE) for _ in range(2))
    wide = DOUBLE if dtype == DOUBLE else torch.float32
    vectors = 0.5 + torch.randn(4, shape[1], generator=generator, dtype=DOUBLE)
    weight, bias, v, var = vectors.to(wide)
    slope = {"B0": v, "B1": None, "B2": torch.full_like(v, -1.0)}[kind]
    given = None if measured else var.square() + 0.1
    return (1.5 * x + 0.7).to(dtype), grad.to(dtype), [weight, bias, slope, given]


def by_hand(x, weight, bias, v, var, eps, centred):
    """The definition, a channel of a sample at a time, by operations that are differentiated."""
    out = []
    for c, channel in enumerate(x.unbind(1)):
        spread = (channel - channel.mean()).square().mean() if var is None else var[c]
        for plane in channel.unbind():
            middle = plane.mean() if centred else 0.0
            s = ((plane - middle).square().mean() + eps).sqrt()
            larger = torch.maximum((spread + eps).sqrt(), (s if v is None else v[c]) * plane + s)
            out.append(plane / larger * weight[c] + bias[c])
    return torch.stack(out).unflatten(0, x.shape[1::-1]).transpose(0, 1)


def leaves_of(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def run(x, grad, vectors, eps, centred):
    """The outputs of both operators."""
    y, batch, instance = op(x, *vectors, eps, centred)
    weight, _, v, var = vectors
    return y, batch[1], backward(grad, x, weight, v, batch, instance, eps, var is None)


def compare(shape, dtype, kind, measured, tolerance, seed=0, eps=1e-3):
    x, grad, vectors = problem(shape, dtype, kind, measured, seed)
    options = (eps, kind == "B0")
    y, var, found = run(x, grad, vectors, *options)
    assert (y.dtype, found[0].dtype) == (dtype, dtype)
    assert y.is_contiguous()
    assert {t.dtype for t in (var, *found[1:])} == {vectors[0].dtype}
    if not x.numel():
        assert not any(vector.any() for vector in found[1:4])
        return
    leaves = leaves_of(x, *vectors)
    expected = by_hand(*leaves, *options)
    expected.backward(grad.double())
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(y.double(), expected.detach(), **close)
    spread = x.double().transpose(0, 1).flatten(1).var(1, correction=0) if measured else vectors[3]
    torch.testing.assert_close(var.double(), spread.double(), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(
        found[0].double(), leaves[0].grad, rtol=tolerance, atol=4 * tolerance
    )
    size = 1 + grad.double().abs().sum() / shape[1]  # sums over samples and space
    sums = {"rtol": min(tolerance, 3e-6), "atol": min(tolerance, 3e-6) * float(size)}
    for got, leaf in zip(found[1:], leaves[1:], strict=True):
        if leaf is not None:
            torch.testing.assert_close(got.double(), leaf.grad, **sums)


@pytest.mark.claim(
    40, "The fused operator of B0 to B2 equals the definitions, gradients too", tolerance=3e-6
)
@measured
@kinds
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_equals_float64_by_hand(dtype, kind, measured):
    torch.use_deterministic_algorithms(True)  # memory that is not written holds NaN
    try:
        for shape in SHAPES:
            compare(shape, dtype, kind, measured, TYPES[dtype])
    finally:
        torch.use_deterministic_algorithms(False)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(
        st.integers(1, 5), st.integers(1, 4), *[st.integers(1, 7)] * 2, st.integers(1, 40)
    ),
    kind=st.sampled_from(KINDS),
    measured=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, kind, measured, seed):
    compare(shape, DOUBLE, kind, measured, 1e-11, seed)


def function(kind, measured):
    """The public function of those tensors that there are, output alone."""

    def call(x, weight, bias, *rest):
        rest = list(rest)
        v = None if kind == "B1" else rest.pop(0)
        var = None if measured else rest.pop(0)
        return evonorm_batch(x, weight, bias, v, var, centred=kind == "B0")[0]

    return call


@measured
@kinds
def test_derivatives(kind, measured):
    x, _, vectors = problem((2, 3, 2, 2), DOUBLE, kind, measured)
    leaves = [t.requires_grad_() for t in (x, *vectors) if t is not None]
    call = function(kind, measured)
    assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, leaves)


def test_a_gradient_of_some_inputs():
    x, grad, vectors = problem((2, 4, 3), DOUBLE, measured=False)
    leaves = leaves_of(x, *vectors)
    wanted = torch.autograd.grad(evonorm_batch(*leaves)[0], leaves, grad)
    for k, leaf in enumerate(leaves):
        others = [t if i == k else t.detach() for i, t in enumerate(leaves)]
        (found,) = torch.autograd.grad(evonorm_batch(*others)[0], leaf, grad)
        assert torch.equal(found, wanted[k])
        y, var = evonorm_batch(*others)
        assert y.requires_grad
        assert not var.requires_grad


@measured
@kinds
def test_opcheck(kind, measured):
    for dtype in (DOUBLE, torch.bfloat16):
        x, grad, vectors = problem((2, 4, 3), dtype, kind, measured)
        _, batch, instance = op(x, *vectors, 1e-5, True)
        inputs = (grad, x, vectors[0], vectors[2], batch, instance, 1e-5, measured)
        torch.library.opcheck(backward, inputs)
        leaves = [None if t is None else t.requires_grad_() for t in (x, *vectors)]
        torch.library.opcheck(op, (*leaves, 1e-5, True))


def test_layouts():
    x, grad, vectors = problem((2, 4, 3, 5), torch.float32)
    wanted = run(x, grad, vectors, 1e-5, True)
    for view in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.stack([t, t])[1],
    ):
        moved, above = view(x).requires_grad_(), view(grad)
        y, var = evonorm_batch(moved, *vectors)
        assert y.stride() == torch.empty_like(moved).stride()
        (dx,) = torch.autograd.grad(y, moved, above)
        for got, expected in zip((y, var, dx), (*wanted[:2], wanted[2][0]), strict=True):
            torch.testing.assert_close(got, expected)
    whole = evonorm_batch(x[:1].expand(3, 4, 3, 5), *vectors)[0]
    torch.testing.assert_close(whole, evonorm_batch(x[:1].repeat(3, 1, 1, 1), *vectors)[0])
    each = torch.stack([evonorm_batch(part, *vectors)[0] for part in x.split(1)])
    mapped = torch.func.vmap(lambda x: evonorm_batch(x, *vectors)[0])(x.unsqueeze(1))
    torch.testing.assert_close(mapped, each)


@pytest.mark.parametrize(
    ("least", "last", "fused"), [(10**6, False, False), (0, False, True), (0, True, False)]
)
def test_compilers_get_the_operator_for_large_contiguous_inputs(least, last, fused, monkeypatch):
    monkeypatch.setattr(_elementwise, "LARGE", least)
    x, _, vectors = problem((2, 4, 3, 5), torch.float32)
    x = x.to(memory_format=torch.channels_last) if last else x
    targets = set()

    def backend(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    call = torch.compile(lambda x: evonorm_batch(x, *vectors), backend=backend, fullgraph=True)
    torch.testing.assert_close(call(x), evonorm_batch(x, *vectors))
    assert any("torchzoo" in target for target in targets) == fused


@pytest.mark.claim(40, "B0's operator gives one thread and two the same bits", tolerance=0.0)
def test_threads():
    state, why = library.backend("evonorm_batch")
    if state != "native":
        pytest.skip(why)
    x, grad, vectors = problem((9, 8, 30, 31), torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y, var, found = run(x, grad, vectors, 1e-5, True)
            results.append((y, var, *found))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.claim(
    40, "The variances of values far from 0 are as good as those near it", tolerance=2e-6
)
@kinds
def test_large_offsets(kind):
    """Values of 10,000 ± 1: a mean square less the squared mean would have nothing left."""
    x, grad, vectors = problem((5, 3, 37, 41), torch.float32, kind)
    x = 1e4 + x
    y, var, found = run(x, grad, vectors, 1e-5, kind == "B0")
    spread = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
    torch.testing.assert_close(var.double(), spread, rtol=2e-6, atol=0)
    if (
        kind == "B2"
    ):  # its denominator is the root mean square less x, here a ten-thousandth of both
        return
    leaves = leaves_of(x, *vectors)
    expected = by_hand(*leaves, 1e-5, kind == "B0")
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected.detach(), rtol=2e-6, atol=0)
    largest = float(leaves[0].grad.abs().max())
    torch.testing.assert_close(found[0].double(), leaves[0].grad, rtol=0, atol=1e-3 * largest)


def test_equal_branches_share_the_gradient():
    """As `torch.maximum` does it: at 0, b = v x + s = sqrt(eps)."""
    x = torch.zeros(2, 3, 4, dtype=DOUBLE)
    flat = torch.tensor([1.0, -1.0], dtype=DOUBLE).repeat(2, 3, 2)  # b = s = 1, and v is 0
    for values, v in ((x, 2.0), (flat, 0.0)):
        _, grad, vectors = problem(x.shape, DOUBLE)
        vectors[2] = torch.full_like(vectors[2], v)
        leaves = leaves_of(values, *vectors)
        eps = 0.25 if v else 0.0
        by_hand(*leaves, eps, True).backward(grad)
        _, _, found = run(values, grad, vectors, eps, True)
        for k in (0, 3):
            torch.testing.assert_close(found[k], leaves[k].grad)


@measured
def test_nan_stays(measured):
    x, _, vectors = problem((3, 4, 2, 3), torch.float32, measured=measured)
    x[1, 2, 0, 1] = torch.nan
    y, _, _ = op(x, *vectors, 1e-5, True)
    wanted = torch.zeros(3, 4, dtype=torch.bool)
    wanted[slice(None) if measured else 1, 2] = True
    assert torch.equal(y.isnan(), wanted[..., None, None].expand_as(y))
    assert torch.equal(y.isnan(), formula(x, *vectors, 1e-5, True)[0].isnan())


def test_rounding_makes_no_negative_variance():
    one = torch.ones(40)
    for size in (1, 3, 7, 100, 513, 700):
        x = torch.linspace(0.1, 17.3, 40).view(1, 40, 1).repeat(2, 1, size)
        y, batch, instance = op(x, one, 0 * one, one, None, 0.0, True)
        assert batch[1].ge(0).all()
        assert instance[1].ge(0).all()
        torch.testing.assert_close(y, torch.ones_like(x), rtol=1e-5, atol=0)  # x / max(0, x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@measured
@kinds
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_cuda_equals_the_reference(dtype, kind, measured):
    for shape in [*SHAPES, (4, 64, 56, 56), (2, 128, 7, 7)]:
        x, grad, vectors = problem(shape, dtype, kind, measured)
        options, close = (1e-3, kind == "B0"), {"rtol": TYPES[dtype], "atol": 4 * TYPES[dtype]}
        cuda = [None if t is None else t.cuda() for t in vectors]
        (y, var, found), again = (run(x.cuda(), grad.cuda(), cuda, *options) for _ in range(2))
        assert all(torch.equal(one, two) for one, two in zip(found, again[2], strict=True))
        torch.testing.assert_close(y.cpu(), formula(x, *vectors, *options)[0], **close)
        weight, _, v, given = vectors
        _, batch, instance = op(x, *vectors, *options)
        torch.testing.assert_close(var.cpu(), batch[1], rtol=1e-6, atol=0, equal_nan=True)
        expected = slopes(grad, x, weight, v, batch, instance, 1e-3, given is None)
        torch.testing.assert_close(found[0].cpu(), expected[0], **close)
        for got, wanted in zip(found[1:4], expected[1:4], strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4, 3, dtype=torch.int64)}, "x: expected floating point"),
        ({"x": torch.ones(3, 4)}, r"x: expected .* axis of space, got torch.float32 \(3, 4\)"),
        ({"v": torch.ones(3)}, r"v: expected shape \(4,\), got \(3,\)"),
        ({"var": torch.ones(4, 1)}, r"var: expected shape \(4,\), got \(4, 1\)"),
    ],
)
def test_bad_input(change, message):
    good = dict.fromkeys(("weight", "bias"), torch.ones(4))
    with pytest.raises(ValueError, match=message):
        evonorm_batch(**{"x": torch.ones(2, 4, 3), **good, **change})
