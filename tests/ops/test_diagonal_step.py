"""`diagonal_step` against complex arithmetic in float64, and what torch asks of an operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from torchzoo.ops import diagonal_step

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
OP = torch.ops.torchzoo.diagonal_step.default
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def problem(batch, features, states, channels=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    coefficients = [normal(features, states, 2) for _ in range(2)]
    state = torch.view_as_complex(normal(*batch, features, states, 2))
    return (
        normal(*batch, features),
        state,
        *coefficients,
        normal(channels, features, states, 2),
    )


def formula(u, state, a_bar, b_bar, readout):
    """The step in complex128, feature by feature."""
    x = torch.zeros_like(state, dtype=torch.complex128)
    y = torch.zeros(*u.shape[:-1], len(readout), u.shape[-1], dtype=torch.float64)
    a, b, r = (
        torch.complex(t[..., 0].double(), t[..., 1].double()) for t in (a_bar, b_bar, readout)
    )
    for d in range(u.shape[-1]):
        x[..., d, :] = a[d] * state[..., d, :] + b[d] * u[..., d, None]
        for c in range(len(readout)):
            y[..., c, d] = (r[c, d].conj() * x[..., d, :]).sum(-1).real
    return y, x


def assert_near(found, expected, dtype):
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.shape == wanted.shape
        if wanted.numel():
            size = max(1.0, wanted.abs().max().item())
            assert (ours.to(wanted.dtype) - wanted).abs().max().item() <= TOLERANCE[dtype] * size


@pytest.mark.claim(107, "A step by the kernel equals complex arithmetic", tolerance=1e-5)
@devices
@settings(deadline=None)
@given(
    batch=st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    features=st.integers(1, 5),
    states=st.integers(1, 19),
    channels=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_equals_complex_arithmetic(device, batch, features, states, channels, dtype):
    inputs = problem(batch, features, states, channels, dtype)
    found = diagonal_step(*(t.to(device) for t in inputs))
    assert_near([t.cpu() for t in found], formula(*inputs), dtype)


def test_states_are_given_back_at_many_threads():
    inputs = problem((40,), 64, 33, 2, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(diagonal_step(*inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert_near(results[0], formula(*inputs), torch.float32)


def test_strides_do_not_matter():
    u, state, a_bar, b_bar, readout = problem((4,), 3, 5)
    strange = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (u, state)]
    pairs = [torch.cat([t, t], -2)[..., : t.shape[-2], :] for t in (a_bar, b_bar, readout)]
    assert_near(diagonal_step(*strange, *pairs), formula(u, state, a_bar, b_bar, readout), u.dtype)


def test_gradients_and_what_is_computed_without_them_agree():
    u, state, *coefficients = problem((2,), 2, 3)
    inputs = [t.requires_grad_() for t in (u, torch.view_as_real(state).clone(), *coefficients)]

    def run(u, pairs, *coefficients):
        y, x = diagonal_step(u, torch.view_as_complex(pairs), *coefficients)
        return y, torch.view_as_real(x)

    assert gradcheck(run, inputs, check_forward_ad=True)
    tracked = run(*inputs)
    with torch.no_grad():
        assert all(torch.allclose(a, b) for a, b in zip(run(*inputs), tracked, strict=True))


def test_operator():
    u, state, *coefficients = problem((3,), 2, 4, 2)
    torch.library.opcheck(OP, (u, torch.view_as_real(state), *coefficients))


def test_vmap_and_compile():
    u, state, *coefficients = problem((3,), 2, 4, 2)
    expected = diagonal_step(u, state, *coefficients)
    batched = torch.func.vmap(diagonal_step, (0, 0, None, None, None))(u, state, *coefficients)
    compiled = torch.compile(diagonal_step, fullgraph=True, backend="aot_eager")
    for found in (batched, compiled(u, state, *coefficients)):
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("which", "value", "message"),
    [
        (0, torch.ones(3, 3), "state: expected complex numbers of shape"),
        (1, torch.ones(3, 2, 4), "state: expected complex numbers"),
        (2, torch.ones(2, 5, 2), r"a_bar: expected torch.float64 of shape \(2, 4, 2\)"),
        (3, torch.ones(2, 4, 2), "b_bar: expected torch.float64"),
        (4, torch.ones(2, 4, 2, dtype=torch.float64), r"readout: .* shape \(C, 2, 4, 2\)"),
    ],
)
def test_errors(which, value, message):
    inputs = list(problem((3,), 2, 4))
    inputs[which] = value
    with pytest.raises(ValueError, match=message):
        diagonal_step(*inputs)
