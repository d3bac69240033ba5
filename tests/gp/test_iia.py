"""The independent interval approximation against published values, renewal theory and sampling."""

import math

import gpytorch
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from torchzoo.experiments.gp.slepian import (
    PROCESSES,
    acceleration,
    diffusion,
    gauss,
    matern52,
    oscillating,
)
from torchzoo.gp import check_iia_valid, persistency_exponent, slepian_iia
from torchzoo.gp.iia import _first_increase
from torchzoo.testing import assert_within_se

EXPONENTS = {
    "diffusion, d=1": 0.12033,
    "diffusion, d=2": 0.18621,
    "diffusion, d=3": 0.23577,
    "diffusion, d=4": 0.27691,
    "acceleration": 0.26467,
    "gauss": 0.41150,
    "matern-5/2": 0.21903,
    "matern-3/2": 0.33670,
}


MONOTONE = PROCESSES | {
    "diffusion, d=4": diffusion(4),
    "matern-3/2": lambda t: (1 + t) * torch.exp(-t),
}


class Exponential:
    """E(t) = exp(-a t), for which all is known: r = sin(phi), 1 - r² = cos², r' = -E sqrt lam2 cos.

    So phi' = -sqrt(lam2) E and phi(t) = pi/2 - sqrt(lam2) (1 - exp(-a t)) / a; with
    sqrt(lam2) = a pi / 2 it ends at 0.
    """

    def __init__(self, a):
        self.a = a

    def _angle(self, t):
        return torch.pi / 2 * torch.exp(-self.a * t)

    def r(self, t):
        return torch.sin(self._angle(t))

    def dr(self, t):
        # cos(angle) near angle = pi/2 by its complement, pi/2 (1 - exp(-a t))
        cosine = torch.sin(torch.pi / 2 * -torch.expm1(-self.a * t))
        return -self.a * self._angle(t) * cosine

    @property
    def d2r0(self):
        return torch.tensor(-((self.a * torch.pi / 2) ** 2), dtype=torch.float64)


@pytest.mark.claim(
    151, "The exponents of eight processes are the published and recomputed ones", tolerance=1e-5
)
@pytest.mark.parametrize("name", MONOTONE)
def test_exponents(name):
    assert persistency_exponent(MONOTONE[name]).item() == pytest.approx(EXPONENTS[name], abs=6e-6)


def test_exponent_by_scipy():
    """The root found by adaptive quadrature of the integrand in plain Python."""

    def sign(t):  # of sech(t/2)^(3/2)
        r = math.cosh(t / 2) ** -1.5
        return 0.75 * r * math.tanh(t / 2) / math.sqrt(0.375 * (1 - r * r)) if t > 1e-3 else 1.0

    def excess(theta):
        return theta * quad(lambda t: math.exp(theta * t) * sign(t), 0, 120, limit=400)[0] - 1

    expected = brentq(excess, 0.1, 0.4, xtol=1e-10)
    assert persistency_exponent(diffusion(3)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.claim(151, "The mean excursion is Rice's, pi / sqrt(lam2)", tolerance=1e-6)
@pytest.mark.parametrize("name", MONOTONE)
def test_mean_is_rices(name):
    iia = slepian_iia(MONOTONE[name], num_points=16)
    moment = iia.process.spectral_moment.item()
    assert iia.mean.item() == pytest.approx(math.pi / moment**0.5, rel=1e-9)


@pytest.mark.claim(
    151,
    "Where E is exponential, W and T are, with rates a and a/2, and the exponent is a/2",
    tolerance=1e-5,
)
@pytest.mark.parametrize("a", [1.0, 0.3])
def test_exponential_case(a):
    iia = slepian_iia(Exponential(a), t_max=20 / a, num_points=1024)
    t = torch.linspace(0, 20 / a, 50, dtype=torch.float64)
    torch.testing.assert_close(iia.survival_w(t), torch.exp(-a * t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(iia.survival(t), torch.exp(-a * t / 2), rtol=0, atol=4e-5)
    torch.testing.assert_close(iia.pdf(t), a / 2 * torch.exp(-a * t / 2), rtol=0, atol=5e-5 * a)
    # an exponential time has no memory
    torch.testing.assert_close(
        iia.survival_from_random_time(t), torch.exp(-a * t / 2), rtol=0, atol=1e-4
    )
    assert iia.exponent.item() == pytest.approx(a / 2, rel=1e-9)
    assert iia.mean.item() == pytest.approx(2 / a, rel=1e-9)


def test_second_order_in_the_step():
    t = torch.linspace(0.5, 20, 40, dtype=torch.float64)
    errors = [
        (
            slepian_iia(Exponential(1.0), t_max=20.0, num_points=n + 1).survival(t)
            - torch.exp(-t / 2)
        )
        .abs()
        .max()
        .item()
        for n in (80, 160, 320)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


@pytest.mark.claim(
    151,
    "The geometric sum and the integral equation give one distribution, whose density integrates "
    "to 1",
    tolerance=0.01,
)
@pytest.mark.parametrize("name", ["diffusion, d=2", "gauss", "acceleration"])
def test_samples_follow_the_integral_equation(name):
    iia = slepian_iia(MONOTONE[name])
    draws = iia.sample(100_000, generator=torch.Generator().manual_seed(0))
    assert_within_se(draws, iia.mean)
    inside = draws.sort().values
    inside = inside[inside < iia.t[-1]]
    ranks = torch.arange(1, len(inside) + 1) / len(draws)
    assert (1 - iia.survival(inside) - ranks).abs().max() < 0.01
    assert torch.trapezoid(iia.pdf(iia.t), iia.t).item() == pytest.approx(1, abs=1e-3)
    tail = torch.trapezoid(iia.survival(iia.t), iia.t)
    assert tail.item() == pytest.approx(iia.mean.item(), rel=1e-4)


def test_tail_falls_at_the_exponent():
    iia = slepian_iia(gauss)
    late = iia.survival(torch.tensor([15.0, 25.0]))
    assert math.log(late[0] / late[1]) / 10 == pytest.approx(iia.exponent.item(), rel=2e-3)


@pytest.mark.claim(151, "Speeding a process up by c multiplies its exponent by c", tolerance=1e-10)
@pytest.mark.parametrize("c", [0.01, 3.0, 1e4])
def test_scaling_of_time(c):
    fast = persistency_exponent(lambda t: matern52(c * t)).item()
    assert fast == pytest.approx(c * persistency_exponent(matern52).item(), rel=1e-10)


@pytest.mark.claim(
    151, "The gradient of the exponent is that of finite differences", tolerance=1e-5
)
def test_gradient_of_the_exponent():
    def exponent(p):
        return persistency_exponent(lambda t: (1 + p * t + (p * t) ** 2 / 3) * torch.exp(-p * t))

    p = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(exponent(p), p)
    with torch.no_grad():
        expected = (exponent(p + 1e-4) - exponent(p - 1e-4)) / 2e-4
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    assert got.item() == pytest.approx(EXPONENTS["matern-5/2"], abs=1e-5)  # linear in p

    def mixed(p):  # a shape parameter, which scaling doesn't explain
        return persistency_exponent(lambda t: torch.cosh(t / 2) ** (-p / 2))

    p = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(mixed(p), p)
    with torch.no_grad():
        expected = (mixed(p + 1e-4) - mixed(p - 1e-4)) / 2e-4
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_gradient_reaches_a_kernel():
    kernel = gpytorch.kernels.MaternKernel(nu=2.5)
    kernel.lengthscale = 5**0.5
    theta = persistency_exponent(kernel)
    (slope,) = torch.autograd.grad(theta, kernel.raw_lengthscale)
    chain = torch.sigmoid(kernel.raw_lengthscale)  # d lengthscale / d raw
    expected = -EXPONENTS["matern-5/2"] / 5**0.5 * chain
    torch.testing.assert_close(slope, expected.to(slope), rtol=1e-4, atol=0)


@pytest.mark.claim(151, "Covariances that are not monotone are refused, with the place named")
def test_covariances_that_are_not_monotone_are_refused():
    forced = slepian_iia(oscillating)
    assert not forced.is_valid
    for refused in (
        lambda: check_iia_valid(oscillating),
        lambda: persistency_exponent(oscillating),
        lambda: forced.sample(3),
    ):
        with pytest.raises(ValueError, match=r"not monotone at t=[12]\.\d+, IIA is not a valid"):
            refused()
    assert forced.pdf(forced.t).min() < -1e-3
    for name, cov in MONOTONE.items():
        assert slepian_iia(cov).is_valid, name
        check_iia_valid(cov)


def test_tolerance_of_monotony():
    """A wave far below rounding of E is let through, one above it is not."""

    def waved(size):
        return lambda t: gauss(t) + size * (t / 6) ** 4 * gauss((t - 6) / 0.5)

    assert slepian_iia(waved(1e-12)).is_valid
    assert not slepian_iia(waved(1e-6)).is_valid
    for rise, found in ((1e-10, None), (1e-8, 2), (-0.6, 2)):
        assert _first_increase(torch.tensor([1, 0.5, 0.5 + rise, 0], dtype=torch.float64)) == found


def test_heavy_tails_have_no_exponent():
    with pytest.raises(ValueError, match="exponential tail"):
        persistency_exponent(gpytorch.kernels.RQKernel())


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="num_points"):
        slepian_iia(gauss, num_points=4)
    with pytest.raises(ValueError, match="t_max"):
        slepian_iia(acceleration, t_max=-1.0)
    with pytest.raises(ValueError, match=r"t: expected times in \[0, 5\]"):
        slepian_iia(gauss, t_max=5.0).survival(torch.tensor([1.0, 6.0]))
