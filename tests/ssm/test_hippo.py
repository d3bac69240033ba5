"""HiPPO matrices, bases and measures against quadrature, matrix exponentials and SciPy's bases."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre
from scipy.linalg import expm
from scipy.special import eval_laguerre, eval_legendre, roots_laguerre
from scipy.stats import kstest, uniform

from torchzoo.ssm import (
    hippo_basis,
    hippo_from_basis,
    hippo_from_official,
    hippo_matrix,
    hippo_measure,
    hippo_reconstruct,
    hippo_to_official,
    timescale_init,
)

MEASURES = ("legs", "legs_tv", "legt", "fout", "lagt", "lmu")
WINDOWS = ("legs_tv", "legt", "fout", "lmu")


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def scipy_basis(measure, N, t):
    """p_n(t) `(T, N)` by their definitions, from SciPy's polynomials and NumPy's waves."""
    n, t = np.arange(N), np.asarray(t)[:, None]
    if measure == "legs":
        return np.sqrt(2 * n + 1) * eval_legendre(n, 2 * np.exp(-t) - 1)
    if measure in ("legt", "legs_tv"):
        return np.sqrt(2 * n + 1) * eval_legendre(n, 1 - 2 * t)
    if measure == "lmu":
        return eval_legendre(n, 2 * t - 1)
    if measure == "lagt":
        return eval_laguerre(n, t) * np.exp(-t / 2)
    waves = [np.ones_like(t)]
    for j in range(1, N // 2 + 1):
        waves += [
            math.sqrt(2) * np.cos(2 * np.pi * j * t),
            math.sqrt(2) * np.sin(2 * np.pi * j * t),
        ]
    if N % 2 == 0:
        waves.insert(1, np.zeros_like(t))
    return np.concatenate(waves[:N], 1)


def quadrature(measure, nodes=400):
    """Nodes and weights of integrals over the support, exact for the products of the bases."""
    if measure == "lagt":
        t, weights = roots_laguerre(100)
        with np.errstate(over="ignore"):
            return t, weights * np.exp(t)
    x, weights = np.polynomial.legendre.leggauss(nodes)
    x, weights = (x + 1) / 2, weights / 2
    return (-np.log(x), weights / x) if measure == "legs" else (x, weights)


def step_response(A, B, steps, dt):
    """The integrals of exp(sA) B up to 0, dt, 2 dt, ..., `(steps + 1, N)`."""
    N = len(B)
    wide = np.zeros((N + 1, N + 1))
    wide[:N, :N], wide[:N, N] = A, B
    move = expm(dt * wide)
    x, found = np.zeros(N + 1), []
    x[-1] = 1
    for _ in range(steps + 1):
        found.append(x[:N])
        x = move @ x
    return np.array(found)


# Bases and measures


@pytest.mark.claim(62, "The basis functions are those of SciPy at all times", tolerance=1e-12)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [1, 2, 3, 8, 17])
def test_bases_are_the_named_functions(measure, N):
    t = np.linspace(0, 1 if measure in WINDOWS else 7, 41)
    got = hippo_basis(measure, N, torch.from_numpy(t))
    assert got.shape == (41, N)
    np.testing.assert_allclose(got.numpy(), scipy_basis(measure, N, t), atol=1e-12)


@pytest.mark.claim(62, "The basis is orthonormal under the measure, by quadrature", tolerance=1e-8)
@pytest.mark.parametrize(
    ("measure", "N"), [("legs", 16), ("legt", 16), ("fout", 16), ("fout", 17), ("lagt", 16)]
)
def test_orthonormality(measure, N):
    t, weights = quadrature(measure)
    p = hippo_basis(measure, N, torch.from_numpy(t)).numpy()
    w = hippo_measure(measure, torch.from_numpy(t)).numpy()
    expected = np.eye(N)
    if measure == "fout" and N % 2 == 0:
        expected[1, 1] = 0  # the dummy
    np.testing.assert_allclose(np.einsum("t,tn,tm->nm", weights * w, p, p), expected, atol=1e-8)


def test_measures():
    t = times(0, 0.3, 1)
    for measure in MEASURES:
        expected = (-t).exp() if measure == "legs" else torch.ones(3).double()
        torch.testing.assert_close(hippo_measure(measure, t), expected)
    assert hippo_measure("legs", times(40.0)).item() == pytest.approx(math.exp(-40))


# Matrices


@pytest.mark.claim(
    62,
    "exp(tA) B is the basis times the measure: Legendre polynomials of exp(-t) for LegS, Laguerre "
    "functions for LagT",
    tolerance=1e-10,
)
@pytest.mark.parametrize("measure", ["legs", "lagt"])
def test_exponential_is_basis_times_measure(measure):
    A, B = (value.numpy() for value in hippo_matrix(measure, 16))
    t = np.linspace(0, 6, 25)
    kernel = np.stack([expm(s * A) @ B for s in t])
    w = np.exp(-t)[:, None] if measure == "legs" else 1
    np.testing.assert_allclose(kernel, scipy_basis(measure, 16, t) * w, atol=1e-10)


def window_error(measure, N):
    """Largest errors of integrals of the first three kernels over [0, t], t in [0, 2]."""
    A, B = (value.numpy() for value in hippo_matrix(measure, N))
    got = step_response(A, B, 100, 0.02)[:, :3]
    t = np.minimum(np.arange(101) * 0.02, 1)
    if measure == "fout":
        a = 2 * np.pi * t
        waves = [t, math.sqrt(2) * np.sin(a), math.sqrt(2) * (1 - np.cos(a))]
        exact = np.stack([waves[0], waves[1] / (2 * np.pi), waves[2] / (2 * np.pi)], 1)
    else:
        columns = []
        for n in range(3):
            sums = legendre.legint(np.eye(3)[n])  # in x = 1 - 2 t
            value = legendre.legval(1, sums) - legendre.legval(1 - 2 * t, sums)
            scale = math.sqrt(2 * n + 1) if measure == "legt" else (2 * n + 1) * (-1) ** n
            columns.append(scale * value / 2)
        exact = np.stack(columns, 1)
    return np.abs(got - exact).max(0)


@pytest.mark.claim(
    62,
    "Integrals of exp(tA) B tend to those of the window's basis as 1/N: for the first function of "
    "FouT to 2.2e-3, 5.5e-4 and 2.8e-4 at N = 65, 257 and 513",
    tolerance=0.05,
)
def test_fourier_kernel_tends_to_the_window():
    sizes = np.array([65, 257, 513])
    errors = np.array([window_error("fout", N) for N in sizes])
    np.testing.assert_allclose(errors[:, 0], [2.19e-3, 5.54e-4, 2.77e-4], rtol=0.05)
    np.testing.assert_allclose(
        errors * sizes[:, None], errors[:1] * 65 * np.ones((3, 1)), rtol=0.05
    )


@pytest.mark.claim(
    62,
    "Integrals of exp(tA) B tend to those of the window's basis as 1/N: for the first function of "
    "LegT to 2.2e-2 and 5.2e-3 at N = 8 and 32",
    tolerance=0.05,
)
def test_legendre_kernel_tends_to_the_window():
    errors = np.array([window_error("legt", N) for N in (8, 32)])
    np.testing.assert_allclose(errors[:, 0], [2.25e-2, 5.22e-3], rtol=0.05)
    np.testing.assert_allclose(errors[1] * 4, errors[0], rtol=0.1)
    # the same system in coordinates that are not normalised
    scale = np.sqrt(2 * np.arange(3) + 1)
    np.testing.assert_allclose(window_error("lmu", 32), errors[1] * scale, rtol=1e-4)


@pytest.mark.claim(62, "All eigenvalues of A have a negative real part", tolerance=0.0)
@pytest.mark.parametrize("N", [1, 2, 5, 16, 33, 65])
@pytest.mark.parametrize("measure", MEASURES)
def test_eigenvalues_are_stable(measure, N):
    A = hippo_matrix(measure, N)[0].numpy()
    if measure in ("legs", "legs_tv"):  # triangular: eigenvalues found by iteration are rounding
        np.testing.assert_array_equal(A, np.tril(A))
        np.testing.assert_array_equal(np.diag(A), -np.arange(1, N + 1))
        return
    if measure == "lagt":
        np.testing.assert_array_equal(A, np.tril(A))
        np.testing.assert_array_equal(np.diag(A), -0.5)
        return
    if measure == "lmu" and N > 33:
        return  # badly scaled; similar to legt, see below
    if measure == "fout" and N % 2 == 0:
        assert not A[1].any()
        assert not A[:, 1].any()
        A = np.delete(np.delete(A, 1, 0), 1, 1)  # without the dummy
    assert np.linalg.eigvals(A).real.max() < -0.05


def test_fourier_slowest_mode():
    found = [np.linalg.eigvals(hippo_matrix("fout", N)[0].numpy()).real.max() for N in (65, 257)]
    np.testing.assert_allclose(found, [-0.55, -0.38], atol=0.01)


@pytest.mark.claim(
    62,
    "The Legendre memory unit is LegT in coordinates scaled by (-1)^n sqrt(2n+1)",
    tolerance=1e-9,
)
def test_lmu_is_rescaled_legt():
    n = np.arange(12)
    scale = (-1.0) ** n * np.sqrt(2 * n + 1)
    A, B = (value.numpy() for value in hippo_matrix("legt", 12))
    lmu_A, lmu_B = (value.numpy() for value in hippo_matrix("lmu", 12))
    np.testing.assert_allclose(lmu_A, scale[:, None] * A / scale, atol=1e-9)
    np.testing.assert_allclose(lmu_B, scale * B, atol=1e-9)


@pytest.mark.claim(
    62,
    "An even N of FouT has a dummy state of no effect: zero row, column, input and basis function, "
    "and the others are those of N - 1",
    tolerance=0.0,
)
def test_even_fourier_layout():
    A, B = hippo_matrix("fout", 8)
    assert not A[1].any()
    assert not A[:, 1].any()
    assert B[1] == 0
    kept = [0, 2, 3, 4, 5, 6, 7]
    odd_A, odd_B = hippo_matrix("fout", 7)
    assert torch.equal(A[kept][:, kept], odd_A)
    assert torch.equal(B[kept], odd_B)
    t = torch.linspace(0, 1, 9).double()
    basis = hippo_basis("fout", 8, t)
    assert not basis[:, 1].any()
    assert torch.equal(basis[:, kept], hippo_basis("fout", 7, t))


def official_fourier(N, scale):
    """Matrices in the authors' layout by their loops: rotations less an outer product."""
    frequencies = np.stack([np.zeros(N // 2), np.arange(N // 2)], -1).reshape(-1)[1:]
    A = scale * np.pi * (np.diag(frequencies, -1) - np.diag(frequencies, 1))
    B = np.zeros(N)
    B[::2], B[0] = math.sqrt(2), 1
    return A - scale * np.outer(B, B), scale * B


@pytest.mark.claim(
    62,
    "The authors' layouts convert to ours and back: windows of 2 for fout and legt, fourier2 with "
    "a window of 1, both with the dummy",
    tolerance=1e-12,
)
@pytest.mark.parametrize(("layout", "scale"), [("fout", 1), ("fourier2", 2)])
def test_official_fourier_layouts(layout, scale):
    theirs = tuple(map(torch.from_numpy, official_fourier(8, scale)))
    for got, ours in zip(
        hippo_from_official(*theirs, layout), hippo_matrix("fout", 7), strict=True
    ):
        torch.testing.assert_close(got, ours, rtol=0, atol=1e-12)
    for N in (7, 8):
        back = hippo_to_official(*hippo_matrix("fout", N), layout)
        for got, expected in zip(back, theirs, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    A, B = hippo_matrix("legt", 5)
    for got, ours in zip(hippo_to_official(A, B, "legt"), (A / 2, B / 2), strict=True):
        assert torch.equal(got, ours)
    assert torch.equal(hippo_from_official(A / 2, B[:, None] / 2, "legt")[1], B)


@pytest.mark.claim(
    62,
    "The construction from any orthonormal basis gives the matrices of LegS, LagT, LegT and FouT",
    tolerance=1e-7,
)
@pytest.mark.parametrize(
    ("measure", "N", "end", "periodic"),
    [
        ("legs", 16, math.inf, False),
        ("lagt", 12, math.inf, False),
        ("legt", 16, 1.0, False),
        ("fout", 17, 1.0, True),
    ],
)
def test_matrices_follow_from_the_basis(measure, N, end, periodic):
    found = hippo_from_basis(
        lambda t: hippo_basis(measure, N, t),
        lambda t: hippo_measure(measure, t),
        end=end,
        periodic=periodic,
    )
    A, B = hippo_matrix(measure, N)
    torch.testing.assert_close(found.A, A, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.B, B, rtol=0, atol=1e-7)
    assert found.residual.max() < 1e-7


@pytest.mark.claim(
    62,
    "A basis whose derivatives leave its span is told by its residual, and a window of length T "
    "has the matrices of length 1 divided by T",
    tolerance=1e-8,
)
def test_construction_of_other_bases():
    uneven = hippo_from_basis(  # the cosines alone are not closed: their slopes are sines
        lambda t: hippo_basis("fout", 5, t)[:, [0, 1, 3]], torch.ones_like, end=1.0
    )
    np.testing.assert_allclose(uneven.residual.numpy(), [0, 2 * np.pi, 4 * np.pi], atol=1e-9)
    wide = hippo_from_basis(
        lambda t: hippo_basis("legt", 6, (t / 4).clamp(0, 1)),
        lambda t: torch.ones_like(t) / 4,
        end=4.0,
    )
    A, B = hippo_matrix("legt", 6)
    torch.testing.assert_close(wide.A, A / 4, rtol=0, atol=1e-8)
    torch.testing.assert_close(wide.B, B / 4, rtol=0, atol=1e-8)
    fast = hippo_from_basis(  # LegS of time constant 1/2
        lambda t: hippo_basis("legs", 5, 2 * t), lambda t: 2 * (-2 * t).exp()
    )
    torch.testing.assert_close(fast.A, 2 * hippo_matrix("legs", 5)[0], rtol=0, atol=1e-8)


# Reading back, timescales, arguments


@pytest.mark.claim(
    62,
    "A function in the span of the basis is read back exactly from its coefficients",
    tolerance=1e-10,
)
@pytest.mark.parametrize("measure", MEASURES)
def test_reconstruction(measure):
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    t = np.linspace(0, 1, 11)
    expected = x.numpy() @ scipy_basis(measure, 7, t).T
    got = hippo_reconstruct(x, measure, torch.from_numpy(t))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-10)


@pytest.mark.claim(
    62,
    "1/dt is log-uniform on the span, or uniform on request (Kolmogorov-Smirnov)",
    tolerance=None,
)
def test_timescales():
    draw = torch.Generator().manual_seed(0)
    log_dt = timescale_init(5000, generator=draw, dtype=torch.float64)
    inside = (-log_dt.numpy() - math.log(10)) / math.log(100)
    assert kstest(inside, "uniform").pvalue > 0.01
    lengths = (
        timescale_init(5000, span=(10, 500), distribution="uniform", generator=draw).neg().exp()
    )
    assert kstest(lengths.numpy(), uniform(10, 490).cdf).pvalue > 0.01
    assert kstest(lengths.log().numpy(), uniform(math.log(10), math.log(50)).cdf).pvalue < 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo_matrix("legz", 4), "measure: .*legs.*got 'legz'"),
        (lambda: hippo_matrix("legs", 0), "N: .*got 0"),
        (lambda: hippo_basis("legt", 4, times(0.5, 1.1)), r"t: .*\[0, 1\].*1.1"),
        (lambda: hippo_basis("legs", 4, times(-0.1)), r"t: .*\[0, inf\].*-0.1"),
        (lambda: hippo_measure("fout", times(2)), "t: "),
        (lambda: hippo_measure("nothing", times(0)), "measure: "),
        (lambda: hippo_basis("fout", 4, torch.tensor(0.5)), r"t: .*\(T,\)"),
        (lambda: hippo_basis("fout", 4, times(math.nan)), "t: "),
        (lambda: hippo_reconstruct(torch.tensor(1.0), "legs", times(0)), "x: "),
        (lambda: timescale_init(0), "d_model: "),
        (lambda: timescale_init(3, span=(10, 10)), "span: "),
        (lambda: timescale_init(3, span=(0, 10)), "span: "),
        (lambda: timescale_init(3, distribution="normal"), "distribution: "),
        (lambda: hippo_from_basis(torch.ones_like, torch.ones_like, end=0.0), "end: "),
        (lambda: hippo_from_basis(torch.ones_like, torch.ones_like, periodic=True), "periodic: "),
        (lambda: hippo_to_official(*hippo_matrix("legs", 3), "legs"), "layout: "),
        (lambda: hippo_from_official(*hippo_matrix("fout", 3), "fout"), "A: .*even"),
        (lambda: hippo_from_official(torch.ones(2, 3), torch.ones(2), "fout"), "A: "),
        (lambda: hippo_from_official(torch.ones(2, 2), torch.ones(3), "fout"), "B: "),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_basis_that_is_not_orthonormal_is_refused():
    with pytest.raises(ValueError, match="basis: expected orthonormal"):
        hippo_from_basis(lambda t: hippo_basis("lmu", 3, t), torch.ones_like, end=1.0)
