"""The entropy's first variation against closed forms, quadrature and samples."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import differential_entropy
from torch import nn
from torch.autograd import gradcheck
from torch.distributions import (
    AffineTransform,
    Laplace,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
)

from torchzoo.activations import (
    corrected,
    crrelu,
    entropy_correction,
    output_entropy,
    worst_activation,
)

DOUBLE = torch.float64
ZERO, ONE = torch.zeros((), dtype=DOUBLE), torch.ones((), dtype=DOUBLE)
NORMAL = Normal(ZERO, ONE)
LAPLACE = Laplace(ZERO, 1.3 * ONE)
LOGISTIC = TransformedDistribution(
    Uniform(ZERO, ONE), [SigmoidTransform().inv, AffineTransform(0.2 * ONE, 0.8 * ONE)]
)
DENSITIES = {"normal": NORMAL, "laplace": LAPLACE, "logistic": LOGISTIC}
GRID = torch.linspace(-4, 4, 160, dtype=DOUBLE)  # 0, where Laplace has a kink, is not on it


def identity(x):
    return x


@pytest.mark.claim(
    3,
    "The correction of the identity for N(0, 1) is x exp(-x^2/2) / sqrt(2 pi)",
    tolerance=1e-9,
)
def test_gaussian_closed_form():
    expected = GRID * (-GRID.square() / 2).exp() / math.sqrt(2 * math.pi)
    found = entropy_correction(identity, NORMAL, GRID)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    # which is what CRReLU adds on x > 0, up to its size
    added = crrelu(GRID, 1.0) - GRID.relu()
    torch.testing.assert_close(added, found * math.sqrt(2 * math.pi), rtol=0, atol=1e-9)


def laplace(x):
    p = (-x.abs() / 1.3).exp() / 2.6
    return p, -x.sign() / 1.3 * p


def logistic(x):
    s = torch.sigmoid((x - 0.2) / 0.8)
    p = s * (1 - s) / 0.8
    return p, p * (1 - 2 * s) / 0.8


def normal(x):
    p = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    return p, -x * p


SLOPES = {  # f, f', f''
    "identity": (identity, lambda x: (x**0, 0 * x)),
    "tanh": (
        torch.tanh,
        lambda x: (1 / x.cosh() ** 2, -2 * x.tanh() / x.cosh() ** 2),
    ),
    "softplus": (
        F.softplus,
        lambda x: (x.sigmoid(), x.sigmoid() * (-x).sigmoid()),
    ),
}


@pytest.mark.claim(
    3,
    "By automatic differentiation -d/dx [p/f'] equals its closed form for normal, Laplace and "
    "logistic densities and for identity, tanh and softplus",
    tolerance=1e-9,
)
@pytest.mark.parametrize("f", SLOPES)
@pytest.mark.parametrize(
    ("density", "closed"), [("normal", normal), ("laplace", laplace), ("logistic", logistic)]
)
def test_closed_forms(density, closed, f):
    function, derivatives = SLOPES[f]
    (p, dp), (d1, d2) = closed(GRID), derivatives(GRID)
    expected = -(dp / d1 - p * d2 / d1.square())
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    for given in (DENSITIES[density], lambda x: closed(x)[0]):
        found = entropy_correction(function, given, GRID)
        torch.testing.assert_close(found, expected, **tolerance)
    found = entropy_correction(function, DENSITIES[density], GRID, df=lambda x: derivatives(x)[0])
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.claim(
    3, "The correction of the worst activation is 0 for normal, Laplace, logistic", tolerance=1e-6
)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 0.5)])
def test_worst_activation_needs_no_correction(density, bounds):
    f = worst_activation(DENSITIES[density], *bounds)
    found = entropy_correction(f, DENSITIES[density], GRID)
    torch.testing.assert_close(found, torch.zeros_like(GRID), rtol=0, atol=1e-6)
    ends = f(torch.tensor([-60.0, 60.0], dtype=DOUBLE))
    torch.testing.assert_close(ends, torch.tensor(bounds, dtype=DOUBLE), rtol=0, atol=1e-9)
    middle = DENSITIES[density].sample((200,)).sort().values
    assert (f(middle).diff() >= 0).all()
    # another density's is not
    other = NORMAL if density != "normal" else LAPLACE
    assert entropy_correction(f, other, GRID).abs().max() > 0.01


def moved_entropy(f, density, x, t):
    """Entropy of the output where the inverse is moved by t times the correction, by quadrature."""
    x = x.clone().requires_grad_()
    u = x + t * entropy_correction(f, density, x)
    (du,) = torch.autograd.grad(u.sum(), x)
    (df,) = torch.autograd.grad(f(x).sum() + 0 * x.sum(), x)
    u = u.detach()
    p = density(u) if callable(density) else density.log_prob(u).exp()
    mass = p * du  # q dy = p(u) u' dx
    return -torch.trapezoid(mass * (mass / df).log(), x.detach()).item()


def slope_of_entropy(f, density, x):
    """-int (dq/dx)^2 f' dx by quadrature."""
    x = x.clone().requires_grad_()
    eta = entropy_correction(f, density, x).detach()
    (df,) = torch.autograd.grad(f(x).sum() + 0 * x.sum(), x)
    return -torch.trapezoid(eta.square() * df, x.detach()).item()


def half_normal(x):
    return 2 * (-x.square() / 2).exp() / math.sqrt(2 * math.pi)


CASES = {
    # the correction of tanh has tails: on this range they carry no mass
    "identity on (0, inf)": (identity, half_normal, (0.0, 9.0), -0.28209),
    "softplus": (F.softplus, NORMAL, (-9.0, 9.0), -0.27166),
    "tanh": (torch.tanh, NORMAL, (-9.0, 9.0), None),
}


@pytest.mark.claim(
    3,
    "Moving the inverse along the correction lowers the entropy, at the rate -int (dq/dx)^2 f' dx: "
    "-0.28209 for the identity on the half-normal, -0.27166 for softplus and N(0, 1)",
    tolerance=0.01,
)
@pytest.mark.parametrize("case", CASES)
def test_entropy_falls_along_the_correction(case):
    f, density, (low, high), expected = CASES[case]
    x = torch.linspace(low, high, 40001, dtype=DOUBLE)
    t = 1e-4
    slope = (moved_entropy(f, density, x, t) - moved_entropy(f, density, x, -t)) / (2 * t)
    assert slope < 0
    assert slope == pytest.approx(slope_of_entropy(f, density, x), rel=0.01)
    if expected is not None:
        assert slope == pytest.approx(expected, rel=0.01)
        assert slope_of_entropy(f, density, x) == pytest.approx(expected, rel=1e-4)


@pytest.mark.claim(
    3,
    "The normal CDF has output entropy 0, the most on [0, 1]: tanh, sigmoid(4x) and softsign, "
    "scaled to it, have less",
    tolerance=0.02,
)
@pytest.mark.parametrize("method", ["vasicek", "ebrahimi"])
def test_the_worst_activation_has_the_most_entropy(method):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    most = output_entropy(worst_activation(NORMAL), x, method=method)
    assert abs(most) < 0.02
    for f in (
        lambda x: (x.tanh() + 1) / 2,
        lambda x: (4 * x).sigmoid(),
        lambda x: (F.softsign(x) + 1) / 2,
    ):
        assert output_entropy(f, x, method=method) < most - 0.02


def test_output_entropy_of_known_distributions():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    exact = 0.5 * math.log(2 * math.pi * math.e)
    assert output_entropy(identity, x) == pytest.approx(exact, abs=0.02)
    assert output_entropy(lambda x: 3 * x, x) == pytest.approx(exact + math.log(3), abs=0.02)


@pytest.mark.parametrize("method", ["vasicek", "van es", "ebrahimi", "correa"])
def test_output_entropy_by_each_estimator(method):
    x = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    leaky = nn.PReLU(init=0.5, dtype=DOUBLE)  # of learned slope
    expected = differential_entropy(np.where(x > 0, x, 0.5 * x), method=method)
    assert output_entropy(leaky, x, method=method) == pytest.approx(expected, abs=1e-12)


def test_corrected_is_the_first_order_move():
    """f(x) - eps f' eta is f at the inverse's inverse, up to eps^2."""
    x = torch.linspace(-2, 2, 41, dtype=DOUBLE)
    eta = entropy_correction(torch.tanh, NORMAL, x)
    expected = x.tanh() - 0.3 * eta / x.cosh() ** 2
    act = corrected(torch.tanh, NORMAL, 0.3)
    assert isinstance(act, nn.Module)
    torch.testing.assert_close(act(x), expected)
    errors = []
    for t in (1e-2, 1e-3):
        y = x.tanh()  # where the moved inverse x + t eta(x) takes this value, f is y
        moved = corrected(torch.tanh, NORMAL, t)(x + t * eta)
        errors.append((moved - y).abs().max().item())
    assert errors[1] < errors[0] / 50


def test_corrected_relu_is_crrelu_where_relu_rises():
    x = torch.linspace(-3, 3, 50, dtype=DOUBLE)
    act = corrected(torch.relu, NORMAL, -0.01 * math.sqrt(2 * math.pi))
    expected = torch.where(x > 0, crrelu(x, 0.01), 0.0)
    torch.testing.assert_close(act(x), expected)
    leaf = x.clone().requires_grad_()
    assert gradcheck(corrected(torch.tanh, NORMAL, 0.2), leaf)


@pytest.mark.parametrize("f", [torch.relu, lambda x: -x, torch.cos])
def test_flat_and_falling_activations_are_refused(f):
    with pytest.raises(ValueError, match=r"f: expected a derivative above 0 on x, got .* at x = "):
        entropy_correction(f, NORMAL, GRID)


def test_bad_input():
    with pytest.raises(ValueError, match=r"hi: expected a number above lo = 1.0, got 1.0"):
        worst_activation(NORMAL, 1.0, 1.0)
    with pytest.raises(ValueError, match="method: expected one of vasicek"):
        output_entropy(identity, torch.randn(10), method="best")
    with pytest.raises(ValueError, match="samples: expected at least 4, got 3"):
        output_entropy(identity, torch.randn(3))
    assert np.isneginf(output_entropy(torch.relu, torch.randn(1000)))
