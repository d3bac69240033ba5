"""`lti_scan` against the recurrence and SciPy, and what torch asks of an operator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import dlsim
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from torchzoo.ops import lti_scan

DOUBLE = torch.complex128
OP = torch.ops.torchzoo.lti_scan.default
BACKWARD = torch.ops.torchzoo.lti_scan_backward.default
TOLERANCE = {torch.complex128: 1e-12, torch.complex64: 1e-5}
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


def loop(a_bar, bu, x0):
    """The recurrence, one step after the other."""
    x, states = x0, []
    for step in bu.unbind(-3):
        x = a_bar * x + step
        states.append(x)
    return torch.stack(states, -3)


def problem(batch, length, width, states, dtype=DOUBLE, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=DOUBLE, generator=generator).to(dtype)

    size = 0.5 + 0.5 * torch.rand(width, states, generator=generator).double()
    phase = 6 * torch.rand(width, states, generator=generator).double()
    shape = (*batch, length, width, states)
    return torch.polar(size, phase).to(dtype), normal(*shape), normal(*batch, width, states)


def assert_near(found, expected, dtype):
    size = expected.detach().abs().max().item() if expected.numel() else 0.0
    error = (found.detach().cpu() - expected.detach()).abs().max().item() if size else 0.0
    assert found.shape == expected.shape
    assert error <= TOLERANCE[dtype] * size


@pytest.mark.claim(107, "The scan and its gradients equal the step-by-step loop", tolerance=1e-5)
@devices
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    ("batch", "length", "width", "states"),
    [((2,), 300, 3, 5), ((1,), 70, 1, 600), ((3,), 1, 2, 1), ((2, 2), 129, 1, 33), ((), 5, 1, 4)],
)
def test_equals_the_loop(batch, length, width, states, dtype, device):
    tensors = problem(batch, length, width, states, dtype)
    exact = [t.to(DOUBLE).requires_grad_() for t in tensors]
    leaves = [t.to(device).requires_grad_() for t in tensors]
    expected, found = loop(*exact), lti_scan(*leaves)
    assert found.dtype == dtype
    assert_near(found, expected, dtype)
    grad = torch.randn(expected.shape, dtype=DOUBLE).to(dtype)
    wanted = torch.autograd.grad(expected, exact, grad.to(DOUBLE))
    for a, b in zip(torch.autograd.grad(found, leaves, grad.to(device)), wanted, strict=True):
        assert_near(a, b, dtype)


@pytest.mark.claim(
    107,
    "The scan equals scipy.signal.dlsim, which reads the state before its update",
    tolerance=1e-12,
)
def test_equals_dlsim():
    a_bar, _, _ = problem((), 1, 1, 4)
    generator = torch.Generator().manual_seed(1)
    b, c = torch.randn(2, 4, dtype=DOUBLE, generator=generator)
    d, u = 0.7, torch.randn(50, generator=generator).double()
    x = lti_scan(a_bar, (b * u[:, None])[None, :, None])[0, :, 0]
    y = 2 * (x @ c).real + d * u
    # the system of real and imaginary parts; its output comes before the update
    a, b, c = a_bar[0].numpy(), b.numpy(), c.numpy()
    A = np.block([[np.diag(a.real), -np.diag(a.imag)], [np.diag(a.imag), np.diag(a.real)]])
    B = np.concatenate([b.real, b.imag])[:, None]
    C = 2 * np.concatenate([c.real, -c.imag])[None]
    _, expected, _ = dlsim((A, B, C @ A, C @ B + d, 1.0), u.numpy())
    np.testing.assert_allclose(y.numpy(), expected[:, 0], atol=1e-12)


@pytest.mark.claim(107, "Scans of chunks with the state carried equal the whole", tolerance=1e-12)
@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 200), cut=st.floats(0, 1), seed=st.integers(0, 5))
def test_chunks_equal_the_whole(length, cut, seed):
    a_bar, bu, x0 = problem((2,), length, 2, 3, seed=seed)
    at = int(cut * length)
    whole = lti_scan(a_bar, bu, x0)
    head = lti_scan(a_bar, bu[:, :at], x0)
    tail = lti_scan(a_bar, bu[:, at:], head[:, -1] if at else x0)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, atol=1e-12, rtol=0)


def test_a_state_that_does_not_decay_keeps_its_phase():
    # x_l = a^l of the rounded a, which a power of it in float32 would miss by 1e-3
    a_bar = torch.polar(torch.ones(1, 1), torch.full((1, 1), 2.5))
    bu = torch.zeros(1, 4096, 1, 1, dtype=torch.complex64)
    bu[:, 0] = 1
    size, phase = a_bar.to(DOUBLE).abs().log(), a_bar.to(DOUBLE).angle()
    expected = torch.exp(4095 * torch.complex(size, phase))
    assert (lti_scan(a_bar, bu)[0, -1] - expected).abs().max() < 1e-4


def test_no_state_given_is_zero():
    a_bar, bu, x0 = problem((2,), 9, 2, 3)
    assert torch.equal(lti_scan(a_bar, bu), lti_scan(a_bar, bu, torch.zeros_like(x0)))


@pytest.mark.parametrize(
    ("batch", "length", "width", "states"), [((0,), 4, 2, 3), ((2,), 0, 2, 3), ((2,), 4, 1, 0)]
)
def test_empty(batch, length, width, states):
    leaves = [t.requires_grad_() for t in problem(batch, length, width, states)]
    x = lti_scan(*leaves)
    assert x.shape == leaves[1].shape
    grads = torch.autograd.grad(x.real.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradcheck(batch):
    leaves = [t.requires_grad_() for t in problem(batch, 4, 1, 2)]
    assert gradcheck(lti_scan, leaves)
    assert gradgradcheck(lti_scan, leaves)


def test_opcheck():
    a_bar, bu, x0 = problem((2,), 5, 1, 3)
    real = [torch.view_as_real(t) for t in (a_bar[0], bu[:, :, 0], x0[:, 0])]
    a, rows, start = (t.clone().requires_grad_() for t in real)
    torch.library.opcheck(OP, (a, rows, start))
    arguments = [t.detach() for t in (torch.randn_like(rows), a, rows, start)]
    torch.library.opcheck(BACKWARD, tuple(arguments))


def test_any_layout():
    a_bar, bu, x0 = problem((2,), 20, 3, 4)
    expected = lti_scan(a_bar, bu, x0)
    turned = [t.mT.contiguous().mT for t in (a_bar, bu, x0)]
    lazy = [t.conj().resolve_conj().conj() for t in (a_bar, bu, x0)]
    for other in (turned, lazy):
        assert torch.equal(lti_scan(*other), expected)
    shared = bu[:1, :1].expand(2, 20, 3, 4)
    assert torch.equal(lti_scan(a_bar, shared, x0), lti_scan(a_bar, shared.contiguous(), x0))


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    tensors = problem((3,), 150, 4, 200, torch.complex64)
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in tensors]
            x = lti_scan(*leaves)
            results.append([x, *torch.autograd.grad(x.abs().square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_leaves_it_in_float32():
    tensors = problem((2,), 40, 2, 3, torch.complex64)
    with torch.autocast("cpu", torch.bfloat16):
        found = lti_scan(*tensors)
    assert torch.equal(found, lti_scan(*tensors))


def test_mixed_types_take_the_wider():
    a_bar, bu, x0 = problem((2,), 4, 2, 3)
    assert lti_scan(a_bar, bu.to(torch.complex64), x0).dtype == DOUBLE


def test_compiles_in_one_graph():
    leaves = [t.requires_grad_() for t in problem((2,), 9, 2, 3)]
    compiled = torch.compile(lti_scan, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*leaves), lti_scan(*leaves)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x.abs().square().sum(), leaves) for x in (found, expected)]
    torch.testing.assert_close(*grads)


def test_vmap():
    a_bar, bu, x0 = problem((2,), 9, 2, 3)
    transitions = torch.stack([a_bar, 0.5 * a_bar, -a_bar])
    found = torch.func.vmap(lti_scan, (0, None, None))(transitions, bu, x0)
    expected = torch.stack([lti_scan(a, bu, x0) for a in transitions])
    torch.testing.assert_close(found, expected)


def test_forward_mode_is_refused():
    a_bar, bu, x0 = problem((2,), 3, 1, 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(bu, torch.ones_like(bu))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            lti_scan(a_bar, dual, x0)


def test_meta():
    a_bar, bu, x0 = (t.to("meta") for t in problem((2,), 6, 2, 3))
    assert lti_scan(a_bar, bu, x0).shape == bu.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_bar": torch.ones(2, 3)}, r"a_bar: expected complex numbers of shape \(H, N\)"),
        ({"bu": torch.ones(2, 4, 2, 3)}, r"bu: expected complex numbers of shape \(..., L, 2, 3\)"),
        ({"bu": torch.ones(2, 4, 3, 2, dtype=DOUBLE)}, r"got torch.complex128 \(2, 4, 3, 2\)"),
        ({"x0": torch.ones(3, 2, 3, dtype=DOUBLE)}, r"x0: expected .* shape \(2, 2, 3\)"),
        ({"x0": torch.ones(2, 2, 3, dtype=DOUBLE, device="meta")}, r"x0: expected it on cpu"),
    ],
)
def test_bad_input(change, message):
    names = ("a_bar", "bu", "x0")
    arguments = dict(zip(names, problem((2,), 4, 2, 3), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        lti_scan(**arguments)
