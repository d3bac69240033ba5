"""The fused mixtures of SiLU pairs against float64 by hand, and what torch asks of an operator."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import silu

from torchzoo.ops import library, pair_mixtures
from torchzoo.ops.pair_mixtures import formula, slopes

DOUBLE = torch.float64
op, backward = (
    getattr(torch.ops.torchzoo, name).default
    for name in ("pair_mixtures", "pair_mixtures_backward")
)
# n, D, K, M: rows within a vector, of several, and of several stretches; many mixtures
SHAPES = [(3, 5, 8, 2), (4, 37, 3, 1), (2, 9001, 2, 3), (1, 1, 1, 1), (5, 16, 1, 4), (0, 4, 2, 2)]
# beyond 16 in float32, and beyond 100 in float64, an exponential a SiLU is computed
SHIFTS = [0.0, 14.5, -14.5, 40.0, -98.0, 700.0]


def problem(shape, dtype, shift=0.0, spread=1.0, layout="contiguous", seed=0):
    """x, low, high and weight, what goes to the mixtures, and to the ends."""
    n, D, K, M = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=DOUBLE)

    low = shift + (torch.arange(K) - 3) / 5 + 0.1 * draw(K)
    tensors = [shift + spread * draw(n, D), low, low + 0.8 + 0.1 * draw(K), draw(M, K)]
    tensors = [t.to(dtype) for t in (*tensors, draw(n, M, D), draw(n, 2))]
    if layout == "transposed":
        tensors = [t.mT.contiguous().mT if t.ndim > 1 else t for t in tensors]
    if layout == "strided":
        tensors = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    return tensors


class ByHand:
    """Functions (n, K, D) and their derivatives in float64, with a bound on errors of each."""

    def __init__(self, x, low, high, dtype):
        x, low, high = (t.double().numpy() for t in (x, low, high))
        s, t = x[..., None, :] - low[:, None], high[:, None] - x[..., None, :]
        with np.errstate(over="ignore"):
            gates = [1 / (1 + np.exp(-v)) for v in (s, t)]
            (p, n), shut = (s * gates[0], t * gates[1]), [1 / (1 + np.exp(v)) for v in (s, t)]
        slopes = [g * (1 + v * h) for v, g, h in zip((s, t), gates, shut, strict=True)]
        sizes = [g * (1 + np.abs(v) * h) for v, g, h in zip((s, t), gates, shut, strict=True)]
        self.phi, self.low, self.high = (
            (p * n) ** 2,
            -2 * p * n**2 * slopes[0],
            2 * p**2 * n * slopes[1],
        )
        # some roundings, and those of the exponents; nothing where a function can't be told from 0
        eps = torch.finfo(dtype).eps
        self.eps = 6 * eps * (1 + np.maximum(np.abs(s), np.abs(t)))
        self.slack = torch.finfo(dtype).smallest_normal ** 0.5
        self.low_size, self.high_size = (
            2 * np.abs(p) * n**2 * sizes[0],
            2 * p**2 * np.abs(n) * sizes[1],
        )


def assert_within(found, expected, bound):
    error = np.abs(found.double().numpy() - expected)
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


def check_gradients(tensors, places, found):
    """Gradients for given places of the ends, against sums by hand."""
    x, low, high, weight, grad, grad_ends = tensors
    one, w = ByHand(x, low, high, x.dtype), weight.double().numpy()
    g, above_ends = grad.double().numpy(), grad_ends.double().numpy()
    above, size = np.einsum("mk,nmd->nkd", w, g), np.einsum("mk,nmd->nkd", np.abs(w), np.abs(g))
    for row, at in enumerate(places.tolist()):
        for end, (place, best) in enumerate(zip(at, (np.min, np.max), strict=True)):
            tied = one.phi[row, :, place] == best(one.phi[row, :, place])
            above[row, tied, place] += above_ends[row, end] / tied.sum()
            size[row, tied, place] += np.abs(above_ends[row, end]) / tied.sum()
    steps = 2 * torch.finfo(x.dtype).eps * min(x.shape[1], 4096) ** 0.5  # of sums over a stretch
    low_size, high_size = size * one.low_size, size * one.high_size
    both = (one.eps * (low_size + high_size)).sum(1) + one.slack * (1 + size.sum(1))
    assert_within(found[0], -(above * (one.low + one.high)).sum(1), both)
    for got, slope, each in ((found[1], one.low, low_size), (found[2], one.high, high_size)):
        bound = ((one.eps + steps) * each).sum((0, 2)) + one.slack * (1 + size.sum((0, 2)))
        assert_within(got, (above * slope).sum((0, 2)), bound)
    bound = np.einsum("nmd,nkd->mk", np.abs(g), (one.eps + steps) * one.phi + one.slack)
    assert_within(found[3], np.einsum("nmd,nkd->mk", g, one.phi), bound + one.slack)


@pytest.mark.claim(
    8, "The fused mixtures equal their formula in float64, and so do all gradients", tolerance=5e-6
)
@settings(max_examples=120, deadline=None)
@given(
    shape=st.sampled_from(SHAPES)
    | st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 3)),
    dtype=st.sampled_from([DOUBLE, torch.float32]),
    shift=st.sampled_from(SHIFTS),
    spread=st.sampled_from([0.5, 4.0, 60.0]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    seed=st.integers(0, 9),
)
def test_equals_float64_by_hand(shape, dtype, shift, spread, layout, seed):
    tensors = problem(shape, dtype, shift, spread, layout, seed)
    x, low, high, weight, grad, grad_ends = tensors
    before = [t.clone() for t in tensors]
    mixed, ends, places = op(x, low, high, weight)
    n, D, _, M = shape
    assert (mixed.shape, ends.shape, places.shape) == ((n, M, D), (n, 2), (n, 2))
    assert {mixed.dtype, ends.dtype} == {dtype}
    one, w = ByHand(x, low, high, dtype), weight.double().numpy()
    bound = one.eps * one.phi + one.slack**2
    assert_within(
        mixed,
        np.einsum("mk,nkd->nmd", w, one.phi),
        np.einsum("mk,nkd->nmd", np.abs(w), bound) + one.slack**2,
    )
    worst = one.eps.max(initial=0.0)
    for end, best in enumerate((np.min, np.max)):  # and their places, but for rounding
        at = np.take_along_axis(one.phi, places[:, None, end : end + 1].numpy(), -1)
        for expected in (best(one.phi, (1, 2)), best(at, (1, 2))):
            assert_within(ends[:, end], expected, worst * expected + one.slack**2)
    check_gradients(tensors, places, backward(grad, grad_ends, x, low, high, weight, places))
    assert all(torch.equal(one, two) for one, two in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(
    "shifts",
    [(-0.6, 0.2), (300.0, 301.0), (-1e3, 1e3), (0.2, -14.0), (-15.0, 15.5), (0.0, torch.nan)],
)
def test_extreme_inputs_give_what_the_formula_gives(shifts, dtype):
    top, inf = torch.finfo(dtype).max, torch.inf
    x = [1e4, -1e4, 1e30, -1e30, top, -top, inf, -inf, torch.nan, 88.5, -88.5, 104.0, -750.0, 0.3]
    x = torch.tensor(x, dtype=dtype).unsqueeze(-1)
    low, high = torch.tensor(shifts, dtype=dtype).split(1)
    one = torch.ones(1, 1, dtype=dtype)
    mixed, ends, places = op(x, low, high, one)
    phi = (silu(x - low) * silu(high - x)).square()
    close = {"rtol": 1e-11 if dtype == DOUBLE else 2e-4, "atol": 1e-37, "equal_nan": True}
    torch.testing.assert_close(mixed[:, 0], phi, **close)
    torch.testing.assert_close(ends, phi.expand(-1, 2), **close)
    assert not places.any()
    found = backward(torch.ones_like(mixed), torch.zeros_like(ends), x, low, high, one, places)
    assert torch.equal(found[0].isfinite(), phi.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("D", [3, 40])
def test_one_nan_makes_both_ends_nan_and_no_other_mixture(dtype, D):
    x, low, high, weight, *_ = problem((3, D, 4, 2), dtype)
    whole, ends, _ = op(x, low, high, weight)
    x[1, 2] = torch.nan
    mixed, found, places = op(x, low, high, weight)
    assert found.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert places[1].tolist() == [2, 2]
    assert mixed[1, :, 2].isnan().all()
    mixed[1, :, 2], found[1] = whole[1, :, 2], ends[1]
    assert torch.equal(mixed, whole)
    assert torch.equal(found, ends)


@pytest.mark.claim(
    8,
    "An end's gradient goes to its first input, in equal parts to functions equal there",
    tolerance=1e-12,
)
@pytest.mark.parametrize("shift", [0.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_ties(shift, dtype):
    """Inputs and functions come more than once; amin and amax would share among inputs too."""
    generator = torch.Generator().manual_seed(1)
    for D, end in itertools.product((4, 37), (0, 1)):
        x = (shift + torch.rand(3, D, generator=generator, dtype=DOUBLE)).to(dtype)
        x = x.repeat(1, 2).requires_grad_()
        low = torch.tensor([0.1, -0.2, 0.1, -0.2, 0.1], dtype=dtype) + shift
        high = (low + 0.7).requires_grad_()
        low.requires_grad_()
        _, ends = pair_mixtures(x, low, high, torch.ones(1, 5, dtype=dtype))
        dx, dlow, dhigh = torch.autograd.grad(ends[:, end].sum(), (x, low, high))
        one = ByHand(x.detach(), low.detach(), high.detach(), dtype)
        keys = one.phi if end else -one.phi
        wanted, shares = np.zeros(x.shape), np.zeros((2, 5))
        for row, key in enumerate(keys):
            at = key.max(0).argmax()
            tied = np.isclose(key[:, at], key.max(), rtol=1e-9, atol=0)
            assert tied.sum() in (2, 3)
            wanted[row, at] = -(one.low + one.high)[row, tied, at].mean()
            shares[0] += tied / tied.sum() * one.low[row, :, at]
            shares[1] += tied / tied.sum() * one.high[row, :, at]
        tolerance = {"rtol": 0, "atol": 1e-12 if dtype == DOUBLE else 1e-5}
        for found, expected in zip((dx, dlow, dhigh), (wanted, *shares), strict=True):
            np.testing.assert_allclose(found.numpy(), expected, **tolerance)


def test_derivatives():
    for shift in (0.0, 300.0):
        leaves = [t.requires_grad_() for t in problem((2, 3, 3, 2), DOUBLE, shift)[:4]]
        assert gradcheck(pair_mixtures, leaves, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(pair_mixtures, leaves)


def test_the_written_slopes_are_those_of_the_formula():
    *given, grad, grad_ends = problem((3, 7, 4, 3), DOUBLE)
    leaves = [t.requires_grad_() for t in given]
    mixed, ends, places = formula(*leaves)
    expected = torch.autograd.grad((mixed, ends), leaves, (grad, grad_ends))
    for found, wanted in zip(slopes(grad, grad_ends, *given, places), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (0, 4, 2, 1)])
def test_opcheck(shape, dtype):
    x, low, high, weight, grad, grad_ends = problem(shape, dtype)
    places = torch.zeros(shape[0], 2, dtype=torch.int64)
    torch.library.opcheck(backward, (grad, grad_ends, x, low, high, weight, places))
    torch.library.opcheck(op, [t.requires_grad_() for t in (x, low, high, weight)])


def test_compilers_and_vmap():
    x, low, high, weight, *_ = problem((6, 5, 3, 2), torch.float32)
    expected, graphs = pair_mixtures(x, low, high, weight), []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(pair_mixtures, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, low, high, weight), expected)
    assert not any("torchzoo" in target for target in graphs[0])
    parts, dims = x.view(3, 2, 5), (0, None, None, None)
    for call in (pair_mixtures, op):
        mapped = torch.func.vmap(call, dims)(parts, low, high, weight)
        for found, wanted in zip(mapped, expected, strict=False):
            torch.testing.assert_close(found.flatten(0, 1), wanted)


def test_half_precision_is_computed_in_single():
    x, low, high, weight, *_ = problem((3, 5, 4, 2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = pair_mixtures(x.bfloat16(), low, high, weight)
    for one, two in zip(found, pair_mixtures(x.bfloat16().float(), low, high, weight), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)
    assert pair_mixtures(x, low.double(), high, weight)[0].dtype == DOUBLE


@pytest.mark.claim(8, "The fused mixtures have the same bits for one thread or two", tolerance=0.0)
def test_threads():
    state, why = library.backend("pair_mixtures")
    if state != "native":
        pytest.skip(why)
    x, low, high, weight, grad, grad_ends = problem((90, 777, 8, 3), torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made = op(x, low, high, weight)
            results.append((*made, *backward(grad, grad_ends, x, low, high, weight, made[2])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_places_outside_are_refused():
    x, low, high, weight, grad, grad_ends = problem((2, 5, 3, 2), torch.float32)
    for place in (-1, 5):
        places = torch.full((2, 2), place)
        with pytest.raises(RuntimeError):
            backward(grad, grad_ends, x, low, high, weight, places)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4)}, r"x: got \(4,\), expected \(n, D\)"),
        ({"x": torch.ones(4, 0)}, r"x: got \(4, 0\), expected \(n, D\) with D above 0"),
        (
            {"x": torch.ones(4, 2, dtype=torch.int64)},
            "x: got torch.int64 on cpu, expected floating",
        ),
        ({"weight": torch.ones(2, 0)}, r"weight: got \(2, 0\), expected \(M, K\) with K above 0"),
        ({"weight": torch.ones(0, 3)}, "weight: got no mixture, expected at least one"),
        ({"low": torch.ones(2)}, r"low: got \(2,\), expected \(3,\), as weight has 3 columns"),
        ({"high": torch.ones(1, 3)}, r"high: got \(1, 3\), expected \(3,\)"),
        (
            {"high": torch.ones(3, device="meta")},
            "high: got torch.float32 on meta, expected .* cpu",
        ),
    ],
)
def test_bad_input(change, message):
    good = {"x": torch.ones(4, 2), "low": torch.ones(3), "high": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        pair_mixtures(**{**good, "weight": torch.ones(2, 3), **change})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("shift", [0.0, 300.0])
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 784, 8, 2), (70, 5, 40, 1), (5000, 3, 2, 2)])
def test_cuda_equals_the_reference(shape, shift, dtype):
    tensors = problem(shape, dtype, shift)
    on_device = [t.cuda() for t in tensors]
    mixed, ends, places = op(*on_device[:4])
    expected = formula(*(t.double() for t in tensors[:4]))
    close = {"rtol": 1e-11 if dtype == DOUBLE else 1e-4, "atol": 1e-11 if dtype == DOUBLE else 1e-5}
    torch.testing.assert_close(mixed.cpu().double(), expected[0], **close)
    torch.testing.assert_close(ends.cpu().double(), expected[1], **close)
    arguments = (*on_device[4:], *on_device[:4], places)
    found, again = backward(*arguments), backward(*arguments)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    check_gradients(tensors, places.cpu(), [t.cpu() for t in found])
