"""The diagonal inits against their closed forms and the HiPPO-LegS matrix."""

import math

import numpy as np
import pytest
import torch

from torchzoo.ssm import S4DKernel, legs_normal_part, s4d_init


def legs(n):
    """HiPPO-LegS, entry by entry."""
    A, B = np.zeros((n, n)), np.sqrt(2 * np.arange(n) + 1)
    for row in range(n):
        for column in range(row):
            A[row, column] = -math.sqrt(2 * row + 1) * math.sqrt(2 * column + 1)
        A[row, row] = -(row + 1)
    return A, B


@pytest.mark.claim(
    107, "S4D-Lin has A_n = -1/2 + i pi n: A_imag / pi are the integers from 0", tolerance=1e-12
)
@pytest.mark.parametrize("N", [2, 16, 64])
def test_lin(N):
    A, B = s4d_init(N, "lin")
    np.testing.assert_allclose(A.imag.numpy() / math.pi, range(N // 2), rtol=0, atol=1e-12)
    assert (A.real == -0.5).all()
    assert (B == 1).all()


@pytest.mark.claim(107, "S4D-Inv has A_n = -1/2 + i (N/pi)(N/(2n+1) - 1)", tolerance=1e-12)
def test_inv():
    for N, largest in ((16, [76.394, 22.069, 11.205]), (64, [1283.43, 414.23])):
        A, B = s4d_init(N, "inv")
        exact = [N / math.pi * (N / (2 * n + 1) - 1) for n in range(N // 2)]
        np.testing.assert_allclose(A.imag.numpy(), exact, rtol=1e-12)
        np.testing.assert_allclose(A.imag[: len(largest)].numpy(), largest, rtol=1e-4)
        assert (A.real == -0.5).all()
        assert (B == 1).all()


@pytest.mark.claim(
    107,
    "S4D-LegS has the eigenvalues of A_legs + P P^T, all of real part -1/2, and B = V^* B_legs / 2",
    tolerance=1e-9,
)
@pytest.mark.parametrize("N", [2, 16, 64])
def test_legs(N):
    A_legs, B_legs = legs(N)
    P = np.sqrt(np.arange(N) + 0.5)
    normal = A_legs + np.outer(P, P)
    A, B = s4d_init(N, "legs")
    exact = np.linalg.eigvals(normal)  # by another algorithm, of a general matrix
    np.testing.assert_allclose(exact.real, -0.5, atol=1e-9)
    np.testing.assert_allclose(A.real.numpy(), -0.5, atol=1e-9)
    exact = np.sort(exact.imag)[N // 2 :]
    np.testing.assert_allclose(A.imag.numpy(), exact, rtol=1e-9, atol=1e-9)
    _, V = legs_normal_part(N)
    np.testing.assert_allclose(normal @ V.numpy(), (V * A).numpy(), atol=1e-9)
    np.testing.assert_allclose(B.numpy(), V.numpy().conj().T @ B_legs / 2, atol=1e-9)
    pairs = torch.cat([V, V.conj()], 1)
    np.testing.assert_allclose((pairs.mH @ pairs).numpy(), np.eye(N), atol=1e-9)
    assert (B.real > 0).all()
    assert B.imag.abs().max() < 1e-9


@pytest.mark.claim(
    107, "S4D-Inv approximates S4D-LegS and is no alias of it: 76.39 against 80.97 at N = 16"
)
def test_inv_and_legs_differ():
    inv, legs_ = (s4d_init(16, name)[0].imag for name in ("inv", "legs"))
    assert inv.max().item() == pytest.approx(76.39, abs=0.005)
    assert legs_.max().item() == pytest.approx(80.97, abs=0.005)
    ratio = inv.sort().values[-4:] / legs_.sort().values[-4:]
    assert (ratio > 0.75).all()
    assert (ratio < 1).all()
    assert legs_normal_part(64)[0].imag.min().item() == pytest.approx(0.264, abs=0.001)


@pytest.mark.claim(107, "The B of S4D-LegS is not ones; that of the other inits is")
def test_input_vectors():
    assert (s4d_init(16, "legs")[1] - 1).abs().min() > 0.05
    for name in ("lin", "inv", "real", "random"):
        assert (s4d_init(16, name)[1] == 1).all()


@pytest.mark.claim(
    107,
    "The ablations: S4D-Real has A_n = -(n+1), random ones real parts -exp(N(0,1)) and imaginary "
    "parts N(0,1), drawn for each channel",
)
def test_ablations():
    A, _ = s4d_init(16, "real")
    assert A.tolist() == [complex(-(n + 1)) for n in range(8)]
    A, B = s4d_init(64, "random", d_model=200, generator=torch.Generator().manual_seed(0))
    assert A.shape == B.shape == (200, 32)
    for sample in ((-A.real).log(), A.imag):  # both N(0, 1), 6400 draws
        assert abs(sample.mean().item()) < 4 / 80
        assert sample.var().item() == pytest.approx(1, abs=4 * math.sqrt(2) / 80)
    assert (A[0] != A[1]).all()
    again, _ = s4d_init(64, "random", d_model=200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(A, again)


def zoh_errors(N, dt=1e-2, steps=300):
    """Largest error of the step-averaged LegS kernel for n = 0..3, and of its sums for n = 0."""
    kernel = S4DKernel(1, N, init="legs", channels=4, dtype=torch.float64)
    with torch.no_grad():
        kernel.log_dt.fill_(math.log(dt))
        kernel.C.copy_(torch.view_as_real(legs_normal_part(N)[1][:4, None].resolve_conj()))
        average = kernel(steps)[:, 0].numpy() / dt
    x = np.exp(-dt * np.arange(steps + 1))  # integrals of the basis over a step, by x = exp(-t)
    basis = [np.polynomial.Legendre.basis(n, domain=[0, 1]) for n in range(4)]
    exact = np.stack([-math.sqrt(2 * n + 1) * np.diff(p.integ()(x)) for n, p in enumerate(basis)])
    response = np.abs(np.cumsum(average[0] * dt) - np.cumsum(exact[0])).max()
    return np.abs(average - exact / dt).max(1), response


@pytest.mark.claim(
    107,
    "The S4D-LegS kernel, averaged over steps of 0.01, approaches the LegS basis as N grows, "
    "n = 0..3: for n = 0 it is off by 0.71, 0.28, 0.047 at N = 16, 64, 256",
    tolerance=0.05,
)
def test_legs_kernel_approaches_the_basis():
    errors, responses = zip(*(zoh_errors(N) for N in (16, 64, 256)), strict=True)
    errors = np.stack(errors)
    assert (np.diff(errors, axis=0) < 0).all()
    np.testing.assert_allclose(errors[:, 0], [0.71, 0.28, 0.047], rtol=0.05)
    np.testing.assert_allclose(errors[2], [0.047, 0.081, 0.105, 0.126], rtol=0.05)
    np.testing.assert_allclose(responses, [2.4e-2, 2.9e-3, 3.7e-4], rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_state": 63}, "d_state must be even: got 63, expected an even number"),
        ({"d_state": 0}, "d_state"),
        ({"init": "hippo"}, "init: expected one of"),
        ({"d_model": 0}, "d_model"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        s4d_init(**{"d_state": 8, **arguments})
    with pytest.raises(ValueError, match="d_state"):
        legs_normal_part(7)
