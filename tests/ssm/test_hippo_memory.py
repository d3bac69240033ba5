"""Online projections against exact integrals, matrix exponentials and step-by-step recurrences."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.special import eval_legendre

from torchzoo.ssm import (
    HiPPOMemory,
    hippo_basis,
    hippo_matrix,
    hippo_measure,
    hippo_project,
    hippo_reconstruct,
)
from torchzoo.ssm.recurrence import discretize_dense

LTI = ("legs", "legt", "fout", "lagt", "lmu")


def band_noise(length, bins, seed=0):
    """Noise of unit variance in the lowest frequency bins."""
    draw = torch.Generator().manual_seed(seed)
    spectrum = torch.zeros(length // 2 + 1, dtype=torch.complex128)
    spectrum[1 : bins + 1] = torch.randn(bins, generator=draw, dtype=torch.complex128)
    u = torch.fft.irfft(spectrum, n=length)
    return u / u.std()


# The recurrence


@pytest.mark.claim(
    62,
    "zoh is the exact response to an input held over each step, bilinear its second-order "
    "approximation",
    tolerance=1e-10,
)
@pytest.mark.parametrize("measure", LTI)
def test_discretisation(measure):
    A, B = hippo_matrix(measure, 6)
    wide = np.zeros((7, 7))
    wide[:6, :6], wide[:6, 6] = A, B
    exact = expm(0.1 * wide)[:6]
    Abar, Bbar = discretize_dense(A, B, 0.1, "zoh")
    np.testing.assert_allclose(torch.cat([Abar, Bbar[:, None]], 1).numpy(), exact, atol=1e-10)
    A_half, B_half = (A.numpy() * 0.05), (B.numpy() * 0.1)
    Abar, Bbar = discretize_dense(A, B, 0.1)
    inverse = np.linalg.inv(np.eye(6) - A_half)
    np.testing.assert_allclose(Abar.numpy(), inverse @ (np.eye(6) + A_half), atol=1e-10)
    np.testing.assert_allclose(Bbar.numpy(), inverse @ B_half, atol=1e-10)
    if measure == "lmu":
        return  # too stiff for the slope to show at these steps
    gaps = [
        np.abs(
            np.linalg.matrix_power(discretize_dense(A, B, 0.04 / k)[0].numpy(), k)
            - expm(0.04 * A.numpy())
        ).max()
        for k in (4, 8)
    ]
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.claim(
    62,
    "Whole sequences, in chunks, equal the recurrence step by step from any state",
    tolerance=1e-10,
)
@pytest.mark.parametrize("disc", ["bilinear", "zoh"])
@pytest.mark.parametrize("measure", [*LTI, "legs_tv"])
@pytest.mark.parametrize("length", [1, 64, 150])
def test_sequence_is_steps(measure, disc, length):
    memory = HiPPOMemory(measure, 6, 0.03, disc=disc, dtype=torch.float64)
    u = torch.randn(2, length, 3, dtype=torch.float64)
    whole, last = memory(u, return_state=True)
    A, B = (value.numpy() for value in hippo_matrix(measure, 6))
    if measure != "legs_tv":
        A, B = (
            v.numpy()
            for v in discretize_dense(torch.from_numpy(A), torch.from_numpy(B), 0.03, disc)
        )
    state, x = memory.initial_state(2, 3), np.zeros((2, 3, 6))
    for t in range(length):
        y, state = memory.step(u[:, t], state)
        value, k = u[:, t, :, None].numpy(), t + 1
        if measure != "legs_tv":
            x = x @ A.T + value * B
        elif disc == "bilinear":
            inverse = np.linalg.inv(np.eye(6) - A / (2 * k))
            x = (x @ (np.eye(6) + A / (2 * k)).T + value * B / k) @ inverse.T
        else:
            decay = expm(A * math.log(k / (k - 1))) if k > 1 else np.zeros((6, 6))
            x = x @ decay.T + value * (np.linalg.solve(A, (decay - np.eye(6)) @ B))
        np.testing.assert_allclose(y.numpy(), x, atol=1e-10)
        np.testing.assert_allclose(whole[:, t].numpy(), x, atol=1e-10)
    np.testing.assert_allclose(last.coefficients.numpy(), x, atol=1e-10)
    assert last.steps == state.steps == length
    if length > 1:
        first, between = memory(u[:, :40], return_state=True)
        rest = memory(u[:, 40:], between)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=0, atol=1e-10)


def test_project_is_the_memory():
    u = torch.randn(2, 90, dtype=torch.float64)
    for measure in ("fout", "legs_tv"):
        memory = HiPPOMemory(measure, 5, 0.1, disc="zoh", dtype=torch.float64)
        x = hippo_project(u, measure, 5, 0.1, "zoh")
        assert x.shape == (2, 90, 5)
        for row in range(2):
            expected = memory(u[row][:, None])[:, 0]
            torch.testing.assert_close(x[row], expected, rtol=0, atol=1e-12)
    assert hippo_project(u.float(), "legs", 5, 0.1).dtype == torch.float32
    assert hippo_project(u[:, :0], "legs", 5, 0.1).shape == (2, 0, 5)


# What the coefficients mean


@pytest.mark.claim(
    62,
    "The history p_k, sampled at the middle of each step, projects to e_k for LegS",
    tolerance=1e-3,
)
@pytest.mark.parametrize("disc", ["bilinear", "zoh"])
def test_basis_functions_project_to_unit_vectors(disc):
    dt, steps = 1e-3, 12_000
    past = (torch.arange(steps, dtype=torch.float64) + 0.5) * dt
    history = hippo_basis("legs", 16, past).mT.flip(-1)  # u(t - s) = p_k(s), the oldest first
    x = hippo_project(history, "legs", 16, dt, disc)[:, -1]
    torch.testing.assert_close(x, torch.eye(16, dtype=x.dtype), rtol=0, atol=1e-3)


@pytest.mark.claim(
    62,
    "For FouT and LegT the history p_k projects to e_k up to an error that falls more than twofold "
    "from N = 17 to 129 and from 16 to 64: from .074 to .010 and from .084 to .027 for k < 4",
    tolerance=0.1,
)
@pytest.mark.parametrize(
    ("measure", "sizes", "expected"),
    [("fout", (17, 129), (0.074, 0.010)), ("legt", (16, 64), (0.084, 0.027))],
)
def test_windows_project_to_unit_vectors(measure, sizes, expected):
    dt = 1e-3
    past = (torch.arange(1000, dtype=torch.float64) + 0.5) * dt
    errors = []
    for N in sizes:
        history = hippo_basis(measure, N, past)[:, :4].mT.flip(-1)
        x = hippo_project(history, measure, N, dt, "zoh")[:, -1]
        errors.append((x - torch.eye(4, N, dtype=x.dtype)).abs().max().item())
    np.testing.assert_allclose(errors, expected, rtol=0.05)
    assert errors[0] > 2 * errors[1]


@pytest.mark.claim(
    62,
    "A constant signal gives x_0 = 1 - exp(-t) for LegS, and x_0 = 1 once the window is full for "
    "FouT",
    tolerance=5e-3,
)
def test_constant_signal():
    u = torch.ones(3000, dtype=torch.float64)
    t = torch.arange(1, 3001, dtype=torch.float64) * 1e-3
    x = hippo_project(u, "legs", 16, 1e-3, "zoh")
    torch.testing.assert_close(x[:, 0], 1 - (-t).exp(), rtol=0, atol=1e-10)
    x = hippo_project(u, "fout", 65, 1e-3)
    assert (x[1200:, 0] - 1).abs().max() < 5e-3
    assert x[2000:, 1:].abs().max() < 5e-3
    assert x[500, 0].item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.claim(62, "Reconstructions of a band-limited signal get better with N", tolerance=None)
@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_reconstruction_improves(measure):
    u = band_noise(3000, 30)  # ten waves in a window
    dt = 1e-3
    s = (torch.arange(50, 950, dtype=torch.float64) + 0.5) * dt  # not the edge, with its ringing
    past = u.flip(0)[50:950]
    w = hippo_measure(measure, s)
    errors = []
    for N in (17, 33, 65, 129):
        x = hippo_project(u, measure, N, dt)[-1]
        error = hippo_reconstruct(x, measure, s) - past
        errors.append(((w * error.square()).sum() / w.sum()).sqrt().item())
    assert errors[0] > 1.2 * errors[1] > 1.44 * errors[2]
    assert errors[3] < errors[2] * (1 + 1e-6)  # LegT is at what the steps allow
    assert errors[3] < 0.1


def smooth(s):
    return torch.sin(5 * s) + s.square()


@pytest.mark.claim(
    62,
    "Time-varying LegS keeps the whole past with equal weight, at any speed of sampling: its last "
    "state is the Legendre coefficients of the function, while that of LegS at a fixed step "
    "depends on the number of samples",
    tolerance=1e-2,
)
@pytest.mark.parametrize("disc", ["bilinear", "zoh"])
def test_time_varying_is_uniform_and_scale_free(disc):
    x, weights = np.polynomial.legendre.leggauss(60)
    n = np.arange(8)
    values = smooth(torch.from_numpy((x + 1) / 2)).numpy()
    exact = (weights * values / 2) @ (np.sqrt(2 * n + 1) * eval_legendre(n, x[:, None]))
    last, fixed = [], []
    for length in (500, 1000):
        u = smooth((torch.arange(length, dtype=torch.float64) + 0.5) / length)
        last.append(hippo_project(u, "legs_tv", 8, disc=disc)[-1].numpy())
        fixed.append(hippo_project(u, "legs", 8, 1 / 500, disc)[-1].numpy())
        np.testing.assert_allclose(last[-1], exact, atol=1e-2)
        memory = HiPPOMemory("legs", 8, time_varying=True, disc=disc, dtype=torch.float64)
        state = memory(u[:, None])[-1]
        past = memory.reconstruct(state, torch.tensor([0.25, 0.7], dtype=torch.float64))[0]
        expected = smooth(torch.tensor([0.75, 0.3], dtype=torch.float64))
        torch.testing.assert_close(past, expected, rtol=0, atol=1e-2)
    np.testing.assert_allclose(last[0], last[1], atol=1e-2)
    assert np.abs(fixed[0] - fixed[1]).max() > 0.1


@pytest.mark.claim(
    62,
    "Bessel: the squared coefficients add up to at most the weighted mean square of the input, for "
    "smooth and rough inputs and N from 8 to 256",
    tolerance=1e-3,
)
@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_bessel(measure):
    dt, length = 1 / 200, 2000
    draw = torch.Generator().manual_seed(1)
    rough = torch.randn(length, generator=draw, dtype=torch.float64)
    u = torch.stack([band_noise(length, 40), rough, rough.sign()])
    if measure == "legs":
        weights = (-dt * torch.arange(length, dtype=u.dtype)).exp() * (1 - math.exp(-dt))
    else:
        weights = (torch.arange(length) < 200).to(u.dtype) * dt
    gaps = []
    for N in (8, 32, 65, 256):
        x = hippo_project(u, measure, N, dt, "zoh")
        for end in (length, 1371):
            power = (u[:, :end].flip(-1).square() * weights[:end]).sum(-1)
            gap = power - x[:, end - 1].square().sum(-1)
            assert gap.min() > -1e-3
        gaps.append(gap[0].item())
    if measure != "fout":
        assert gaps[0] > 2 * gaps[1]
        assert gaps[3] < gaps[2] < gaps[1]


@pytest.mark.claim(
    62, "The integral of each squared kernel K_n of LegS is 1/2, by quadrature", tolerance=1e-6
)
def test_energy_of_the_kernels():
    A, B = (value.numpy() for value in hippo_matrix("legs", 10))
    x, weights = np.polynomial.legendre.leggauss(80)
    y, weights = (x + 1) / 2, weights / 2  # y = exp(-t)
    kernel = np.stack([expm(-math.log(v) * A) @ B for v in y])
    np.testing.assert_allclose((weights / y) @ kernel**2, 0.5, atol=1e-6)


# The module


def test_memory_has_buffers_and_no_parameters():
    memory = HiPPOMemory("legs", 4, 0.1)
    assert not list(memory.parameters())
    assert {*memory.state_dict()} == {"A", "B"}
    assert "legs, 4, dt=0.1" in repr(memory)
    assert HiPPOMemory("legs", 4, time_varying=True).measure == "legs_tv"


def test_reconstruct_takes_states_and_coefficients():
    memory = HiPPOMemory("legt", 6, 0.02)
    u = torch.linspace(0, 1, 100)[:, None].expand(100, 2)
    coefficients, state = memory(u, return_state=True)
    t = torch.tensor([0.2, 0.5])
    both = memory.reconstruct(state, t)
    assert torch.equal(both, memory.reconstruct(coefficients[-1], t))
    torch.testing.assert_close(both[0], 1 - t * 0.5, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HiPPOMemory("legs", 4), "dt: .*got None"),
        (lambda: HiPPOMemory("legs", 4, -0.1), "dt: .*got -0.1"),
        (lambda: HiPPOMemory("legt", 4, 0.1, time_varying=True), "time_varying: .*legt"),
        (lambda: HiPPOMemory("legs_tv", 4, disc="euler"), "disc: .*got 'euler'"),
        (lambda: hippo_project(torch.ones(3), "legs", 4, 0.0), "dt: "),
        (lambda: hippo_project(torch.ones(3), "legs", 0, 0.1), "N: "),
        (lambda: hippo_project(torch.tensor(1.0), "legs", 4, 0.1), "u: "),
        (lambda: HiPPOMemory("legs", 4, 0.1)(torch.ones(3)), "u: "),
        (
            lambda: HiPPOMemory("legs", 4, 0.1).step(
                torch.ones(3), HiPPOMemory("legs", 4, 0.1).initial_state(2)
            ),
            "state: ",
        ),
        (
            lambda: HiPPOMemory("legs", 4, 0.1)(
                torch.ones(1, 5, 3), HiPPOMemory("legs", 4, 0.1).initial_state(3)
            ),
            "state: ",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
