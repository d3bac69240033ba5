"""Discretisation against matrix exponentials, and convolutions against NumPy's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from torch.autograd import gradcheck, gradgradcheck

from torchzoo.ssm.functional import discretise, exprel, fft_conv, log_transition

DOUBLE = torch.complex128


def test_exprel_near_zero_and_far():
    z = torch.tensor([0, 1e-12, 1e-6j, -0.49, 0.49j, 0.51, 0.5 - 0.2j, -3 + 2j], dtype=DOUBLE)
    series = sum(z**k / float(math.factorial(k + 1)) for k in range(60))
    torch.testing.assert_close(exprel(z), series, atol=0, rtol=1e-14)
    real = torch.tensor([0.0, 1e-9, -2.0]).double()
    torch.testing.assert_close(exprel(real), exprel(real.to(DOUBLE)).real)


def test_exprel_gradients():
    z = torch.tensor([0, 1e-7, 0.4 + 0.1j, 0.6j, -2.0], dtype=DOUBLE, requires_grad=True)
    assert gradcheck(exprel, z)
    assert gradgradcheck(exprel, z)
    (slope,) = torch.autograd.grad(exprel(z).real.sum(), z)
    assert abs(slope[0] - 0.5) < 1e-15


@pytest.mark.claim(
    107,
    "ZOH equals the matrix exponential's solution for a held input, with A = 0 too",
    tolerance=1e-12,
)
@pytest.mark.parametrize("dt", [1e-4, 0.03, 1.7])
@pytest.mark.parametrize("A", [0j, -1e-9 + 0j, -0.5 + 3j, -2 - 40j, -7 + 0j])
def test_zoh_equals_expm(A, dt):
    B = 0.7 - 0.2j
    exact = expm(np.array([[A, B], [0, 0]]) * dt)  # of the system with its constant input
    A_bar, B_bar = discretise(*(torch.tensor(t, dtype=DOUBLE) for t in (A, dt, B)))
    assert abs(A_bar.item() - exact[0, 0]) < 1e-12
    assert abs(B_bar.item() - exact[0, 1]) < 1e-12


@pytest.mark.claim(107, "The bilinear rule is the trapezoidal rule of the system", tolerance=1e-14)
def test_bilinear_is_the_trapezoidal_rule():
    A, B, dt = torch.tensor([-0.5 + 3j, 0j]).to(DOUBLE), 0.7 - 0.2j, 0.1
    A_bar, B_bar = discretise(
        A, torch.tensor(dt, dtype=torch.float64), torch.tensor(B, dtype=DOUBLE), "bilinear"
    )
    x, u = 0.3 + 1j, 1.2
    new = A_bar * x + B_bar * u
    torch.testing.assert_close(new - x, dt / 2 * A * (x + new) + dt * B * u, atol=1e-14, rtol=0)


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_log_transition_is_the_logarithm(disc):
    A = torch.complex(-torch.tensor([0.0, 1e-8, 0.5, 4, 60]).double(), torch.tensor([9.0]).double())
    for dt in (1e-3, 0.1, 3.0):
        step = torch.tensor(dt).double()
        A_bar, _ = discretise(A, step, torch.ones(5, dtype=DOUBLE), disc)
        torch.testing.assert_close(
            log_transition(A, step, disc).exp(), A_bar, atol=1e-15, rtol=1e-13
        )


def test_log_transition_keeps_a_slow_decay_in_float32():
    A, dt = torch.tensor([-0.5 + 1j]), torch.tensor(1e-3)
    slow = log_transition(A, dt, "bilinear").to(DOUBLE)
    exact = log_transition(A.to(DOUBLE), dt.double(), "bilinear")
    assert abs(slow.real / exact.real - 1) < 1e-6


def test_helpers_name_what_is_wrong():
    one = torch.ones(1, dtype=DOUBLE)
    for call in (lambda: discretise(one, one, one, "euler"), lambda: log_transition(one, one, "x")):
        with pytest.raises(ValueError, match="disc: expected 'zoh' or 'bilinear'"):
            call()
    with pytest.raises(ValueError, match="u: expected floats"):
        fft_conv(torch.ones(3, dtype=torch.long), torch.ones(3))
    with pytest.raises(ValueError, match="k: expected floats"):
        fft_conv(torch.ones(3), one)
    with pytest.raises(ValueError, match=r"k_reverse: expected shape \(3,\), as k, got \(2,\)"):
        fft_conv(torch.ones(3), torch.ones(3), torch.ones(2))


@pytest.mark.claim(107, "fft_conv equals numpy.convolve", tolerance=1e-5)
@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 70),
    taps=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 9),
)
def test_fft_conv_equals_numpy(length, taps, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(2, 3, length, generator=generator, dtype=dtype)
    k, ahead = torch.randn(2, 3, taps, generator=generator, dtype=dtype)
    y, both = fft_conv(u, k), fft_conv(u, k, ahead)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for b in range(2):
        for h in range(3):
            causal = np.convolve(u[b, h].double(), k[h].double())[:length]
            np.testing.assert_allclose(y[b, h], causal, atol=tolerance * math.sqrt(length))
            later = np.convolve(u[b, h].double().flip(0), ahead[h].double())[: length - 1]
            causal[:-1] += later[::-1]  # what follows, the next one first
            np.testing.assert_allclose(both[b, h], causal, atol=tolerance * math.sqrt(length))


@pytest.mark.claim(
    107, "fft_conv never wraps: an impulse at the end does not reach the start", tolerance=1e-12
)
def test_fft_conv_never_wraps():
    for length in (1, 2, 7, 16):
        impulse, k = torch.zeros(2, 1, length).double(), 5 + torch.rand(1, length).double()
        impulse[0, 0, -1] = impulse[1, 0, 0] = 1
        ends = fft_conv(impulse, k)
        assert ends[0, 0, :-1].abs().max() < 1e-12 if length > 1 else True
        torch.testing.assert_close(ends[0, 0, -1], k[0, 0])
        later = fft_conv(impulse, torch.zeros_like(k), k)
        assert later[1].abs().max() < 1e-12
        torch.testing.assert_close(later[0, 0, :-1], k[0, : length - 1].flip(0))


def test_fft_conv_is_float32_inside():
    torch.manual_seed(0)
    u, k = torch.randn(2, 3, 100), torch.randn(3, 100)
    expected = fft_conv(u, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fft_conv(u, k), expected)
    half = fft_conv(u.bfloat16(), k)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, fft_conv(u.bfloat16().float(), k).bfloat16())


def test_fft_conv_gradcheck():
    u, k, ahead = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 2, 5), (2, 5), (2, 5))
    )
    assert gradcheck(fft_conv, (u, k, ahead))
