"""`vandermonde` against dense sums in extended precision, and what torch asks of an operator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from torchzoo.ops import vandermonde

DOUBLE = torch.complex128
OP = torch.ops.torchzoo.vandermonde.default
TRANSPOSED = torch.ops.torchzoo.vandermonde_transposed.default
TOLERANCE = {torch.complex128: 1e-10, torch.complex64: 1e-5}
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
TWO_PI = 8 * np.arctan(np.longdouble(1))


def powers(log_x, length):
    """All x^l, `(..., N, L)`, with phases reduced in extended precision."""
    log_x = log_x.detach().cpu().numpy().astype(np.clongdouble)
    lags = np.arange(length).astype(np.longdouble)
    phase = np.fmod(log_x.imag[..., None] * lags, TWO_PI).astype(np.float64)
    size = np.exp((log_x.real[..., None] * lags).astype(np.float64))
    return size * (np.cos(phase) + 1j * np.sin(phase))


def dense(v, log_x, length, conj):
    y = (v.detach().cpu().numpy()[..., None] * powers(log_x, length)).sum(-2)
    return 2 * y.real if conj else y


def problem(lead, own, states, dtype=DOUBLE, fastest=130.0, slowest=1e-4, seed=0):
    """Coefficients, and stable bases with phases up to `fastest` radians a step."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(*lead, states, dtype=DOUBLE, generator=generator)
    size = -slowest * 10 ** (2 * torch.rand(*own, states, generator=generator).double())
    phase = fastest * torch.rand(*own, states, generator=generator).double()
    return v.to(dtype), torch.complex(size, phase).to(dtype)


def assert_near(found, expected, dtype, after=1000):
    """Relative to the largest of all numbers, and of the later ones alone."""
    found = found.detach().cpu().numpy()
    for part in (slice(None), slice(after, None)):
        size = np.abs(expected[..., part]).max(initial=0.0)
        error = np.abs(found[..., part] - expected[..., part]).max(initial=0.0)
        assert error <= TOLERANCE[dtype] * size


@pytest.mark.claim(
    107,
    "Kernels equal dense sums of the same numbers, at late lags alone too, with L = 16384 and 130 "
    "radians a step",
    tolerance=1e-5,
)
@devices
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("conj", [True, False])
@pytest.mark.parametrize("length", [1, 64, 1001, 16384])
def test_equals_dense_sums(length, conj, dtype, device):
    v, log_x = problem((2, 3), (3,), 19, dtype)
    y = vandermonde(v.to(device), log_x.to(device), length, conj=conj)
    assert y.shape == (2, 3, length)
    assert y.dtype == (dtype.to_real() if conj else dtype)
    assert_near(y, dense(v, log_x, length, conj), dtype)


@pytest.mark.claim(
    107,
    "The gradients of kernels equal dense sums, with L = 16384 and 130 radians a step",
    tolerance=1e-5,
)
@devices
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("conj", [True, False])
def test_gradients_equal_dense_sums(conj, dtype, device):
    length = 16384
    v, log_x = (t.to(device).requires_grad_() for t in problem((2, 3), (3,), 19, dtype))
    y = vandermonde(v, log_x, length, conj=conj)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=generator).to(device)
    found = torch.autograd.grad(y, (v, log_x), grad)
    g = (2 if conj else 1) * grad.cpu().numpy()
    table = powers(log_x, length).conj()
    lags = np.arange(length)
    for late in (False, True):  # the later lags have the gradients that are hard to get right
        kept = np.where(late & (lags <= 1000), 0.0, g)
        if late:
            y = vandermonde(v, log_x, length, conj=conj)
            kept_grad = torch.from_numpy(kept / (2 if conj else 1)).to(grad)
            found = torch.autograd.grad(y, (v, log_x), kept_grad)
        dv = np.einsum("chl,hnl->chn", kept, table)
        by_lag = np.einsum("chl,hnl->chn", kept * lags, table)
        dlog_x = (v.detach().cpu().numpy().conj() * by_lag).sum(0)
        assert_near(found[0], dv, dtype, after=0)
        assert_near(found[1], dlog_x, dtype, after=0)


def test_phases_are_those_of_the_slowest_decay_at_the_last_lag():
    # one state that does not decay: |y| is 2 |cos| of a phase of two million radians
    log_x = torch.tensor([130.125j], dtype=torch.complex64)
    y = vandermonde(torch.ones(1, dtype=torch.complex64), log_x, 16384)
    expected = [2 * math.cos(math.fmod(130.125 * l, 2 * math.pi)) for l in (16381, 16382, 16383)]
    np.testing.assert_allclose(y[-3:].numpy(), expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.sampled_from(
        [
            ((), ()),
            ((3,), (3,)),
            ((2, 3), (3,)),
            ((3,), (2, 3)),
            ((2, 1), (3,)),
            ((2, 3), (2, 1)),
            ((4, 2, 3), (1, 2, 3)),
            ((0, 3), (3,)),
            ((2, 0), (0,)),
            ((1, 1), (1,)),
        ]
    ),
    states=st.sampled_from([0, 1, 2, 7, 8, 9, 33]),
    length=st.sampled_from([1, 2, 63, 64, 65, 130, 400]),
    conj=st.booleans(),
    seed=st.integers(0, 9),
)
def test_shapes_broadcast(shapes, states, length, conj, seed):
    v, log_x = problem(*shapes, states, fastest=3.0, seed=seed)
    y = vandermonde(v, log_x, length, conj=conj)
    expected = dense(v, log_x, length, conj)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-11)
    leaves = [t.clone().requires_grad_() for t in (v, log_x)]
    grads = torch.autograd.grad(vandermonde(*leaves, length, conj=conj).real.sum(), leaves)
    assert [g.shape for g in grads] == [v.shape, log_x.shape]


def test_halves_of_conjugate_pairs_equal_the_full_sum():
    v, log_x = problem((3,), (3,), 6)
    pairs = vandermonde(v, log_x, 200)
    both = [torch.cat([t, t.conj()], -1) for t in (v, log_x)]
    full = vandermonde(*both, 200, conj=False)
    torch.testing.assert_close(pairs, full.real, atol=1e-12, rtol=0)
    assert full.imag.abs().max() < 1e-12


@pytest.mark.claim(107, "vandermonde has the gradients of finite differences", tolerance=1e-6)
@pytest.mark.parametrize("conj", [True, False])
@pytest.mark.parametrize(("lead", "own"), [((2, 2), (2,)), ((), ()), ((0,), (1,))])
def test_gradcheck(lead, own, conj):
    v, log_x = problem(lead, own, 1 + len(own), fastest=3.0)
    leaves = [t.requires_grad_() for t in (v, log_x)]

    def kernel(v, log_x):
        return vandermonde(v, log_x, 66, conj=conj)

    assert gradcheck(kernel, leaves)
    assert gradgradcheck(kernel, leaves)


@pytest.mark.parametrize("conj", [True, False])
def test_opcheck(conj):
    v, log_x = problem((2, 3), (3,), 3, fastest=3.0)
    v, log_x = (torch.view_as_real(t).requires_grad_() for t in (v, log_x))
    torch.library.opcheck(OP, (v, log_x, 70, conj))
    grad = torch.randn(2, 3, 70, *([] if conj else [2]), dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(TRANSPOSED, (grad, log_x, conj))


def test_any_layout():
    v, log_x = problem((5, 3), (3,), 4)
    expected = vandermonde(v, log_x, 100)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (v, log_x)]
    turned = [t.mT.contiguous().mT for t in (v, log_x)]
    lazy = [t.conj().resolve_conj().conj() for t in (v, log_x)]
    for other in (strided, turned, lazy):
        assert torch.equal(vandermonde(*other, 100), expected)


@pytest.mark.parametrize("conj", [True, False])
def test_threads_do_not_change_a_bit(conj):
    threads = torch.get_num_threads()
    v, log_x = problem((2, 7), (7,), 21, torch.complex64)
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in (v, log_x)]
            y = vandermonde(*leaves, 700, conj=conj)
            results.append([y, *torch.autograd.grad(y.real.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_leaves_it_in_float32():
    v, log_x = (t.requires_grad_() for t in problem((3,), (3,), 8, torch.complex64))
    expected = vandermonde(v, log_x, 300)
    with torch.autocast("cpu", torch.bfloat16):
        y = vandermonde(v, log_x, 300)
        found = torch.autograd.grad(y.square().sum(), (v, log_x))
    assert torch.equal(y, expected)
    plain = torch.autograd.grad(expected.square().sum(), (v, log_x))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_compiles_in_one_graph():
    leaves = [t.requires_grad_() for t in problem((2, 3), (3,), 4, fastest=3.0)]
    compiled = torch.compile(vandermonde, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*leaves, 70), vandermonde(*leaves, 70)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)]
    torch.testing.assert_close(*grads)


def test_vmap():
    v, log_x = problem((4, 3), (3,), 5, fastest=3.0)
    found = torch.func.vmap(lambda v: vandermonde(v, log_x, 70))(v)
    torch.testing.assert_close(found, vandermonde(v, log_x, 70))


def test_forward_mode_is_refused():
    v, log_x = problem((3,), (3,), 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v, torch.ones_like(v))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            vandermonde(dual, log_x, 3)


def test_meta():
    v, log_x = (t.to("meta") for t in problem((2, 3), (3,), 4))
    assert vandermonde(v, log_x, 70).shape == (2, 3, 70)
    assert vandermonde(v, log_x, 70, conj=False).is_complex()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.ones(2, 3)}, r"v: expected complex numbers .*got torch.float32 \(2, 3\)"),
        ({"log_x": torch.ones(3)}, r"log_x: expected complex numbers"),
        ({"v": torch.tensor(1j)}, r"v: expected complex numbers"),
        ({"log_x": torch.ones(4, dtype=DOUBLE)}, r"log_x: expected \(..., 3\), as v, got \(4,\)"),
        ({"log_x": torch.ones(5, 3, dtype=DOUBLE)}, r"leading dimensions that broadcast"),
        ({"log_x": torch.ones(3, dtype=DOUBLE, device="meta")}, r"log_x: expected it on cpu"),
        ({"L": 0}, r"L: expected at least 1, got 0"),
    ],
)
def test_bad_input(change, message):
    v, log_x = problem((2,), (), 3)
    arguments = {"v": v, "log_x": log_x, "L": 4} | change
    with pytest.raises(ValueError, match=message):
        vandermonde(**arguments)
