"""Every basis equals an independent definition of its functions, with its gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scipy.interpolate import BSpline

from torchzoo.activations import (
    ActivationBasis,
    BSplineBasis,
    ChebyshevBasis,
    FourierBasis,
    GramBasis,
    JacobiBasis,
    RBFBasis,
    ReLUProductBasis,
    RSWAFBasis,
    WaveletBasis,
    make_basis,
)
from torchzoo.activations.basis import ACTIVATIONS
from torchzoo.activations.kan import _FAMILIES


def numbers(*shape, low=-1.0, high=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def scipy_splines(x, knots, order):
    """All splines on the knots at x, beyond the base interval too: pieces of degree `order`."""
    count = len(knots) - order - 1
    columns = [
        np.nan_to_num(BSpline.basis_element(knots[i : i + order + 2], extrapolate=False)(x))
        for i in range(count)
    ]
    return np.stack(columns, -1)


def uniform_knots(basis):
    low, high = basis.grid_range
    step = (high - low) / basis.grid_size
    return low + step * np.arange(-basis.order, basis.grid_size + basis.order + 1)


@pytest.mark.claim(
    10, "B-splines equal scipy's design matrix in the range of the grid", tolerance=1e-12
)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("own", [False, True])
def test_splines_are_scipys(order, own):
    basis = BSplineBasis(
        6, order, (-2.0, 1.0), in_features=1 if own else None, dtype=torch.float64 if own else None
    )
    x = numbers(300, low=-2.0, high=0.9999)
    design = BSpline.design_matrix(x.numpy(), uniform_knots(basis), order).toarray()
    np.testing.assert_allclose(basis(x[:, None])[:, 0].numpy(), design, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("order", [1, 3, 4])
def test_splines_fade_out_beyond_the_range(order, own):
    basis = BSplineBasis(
        3, order, in_features=1 if own else None, dtype=torch.float64 if own else None
    )
    x = numbers(400, low=-6.0, high=6.0)
    expected = scipy_splines(x.numpy(), uniform_knots(basis), order)
    np.testing.assert_allclose(basis(x[:, None])[:, 0].numpy(), expected, rtol=0, atol=1e-12)


def test_cubic_at_the_knots_is_1_4_1_sixths_and_at_the_middle_1_23_23_1():
    values = BSplineBasis(2, 3, (0.0, 2.0))(torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64))
    expected = torch.tensor(
        [
            [1 / 6, 4 / 6, 1 / 6, 0, 0],
            [1 / 48, 23 / 48, 23 / 48, 1 / 48, 0],
            [0, 0, 1 / 6, 4 / 6, 1 / 6],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-15)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.integers(1, 9),
    order=st.integers(1, 5),
    low=st.floats(-3, 3),
    width=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_splines_sum_to_one_and_are_not_negative(grid, order, low, width, seed):
    basis = BSplineBasis(grid, order, (low, low + width))
    x = low + width * numbers(3, 20, low=0.0, seed=seed)
    values = basis(x)
    assert values.shape == (3, 20, grid + order)
    torch.testing.assert_close(values.sum(-1), torch.ones_like(x), rtol=0, atol=1e-11)
    assert values.min() > -1e-12


@pytest.mark.parametrize("own", [False, True])
def test_support_is_the_sparse_form(own):
    basis = BSplineBasis(4, 3, in_features=2 if own else None)
    if own:
        basis.fit_knots(numbers(200, 2).float() ** 3)
    x = numbers(5, 60, 2, low=-2.5, high=2.5)
    index, values = basis.support(x)
    assert index.shape == values.shape == (5, 60, 2, 4)
    dense = torch.zeros(5, 60, 2, 7, dtype=torch.float64).scatter_add(-1, index, values)
    torch.testing.assert_close(dense, basis(x), rtol=0, atol=1e-12)


def test_fitted_knots_are_quantiles_with_a_little_of_a_uniform_grid():
    x = numbers(4000, 2, low=0.0)
    x[:, 1] = x[:, 1] ** 4
    basis = BSplineBasis(4, 2, in_features=2, dtype=torch.float64)
    basis.fit_knots(x, uniform=0.1, margin=0.5)
    inner = basis.knots[:, 2:-2]
    low, high = x.amin(0) - 0.5, x.amax(0) + 0.5
    share = torch.linspace(0, 1, 5, dtype=torch.float64)
    even = low[:, None] + share * (high - low)[:, None]
    expected = 0.1 * even + 0.9 * torch.quantile(x, share, dim=0).T
    torch.testing.assert_close(inner, expected, rtol=0, atol=1e-12)
    steps = basis.knots.diff(dim=-1)
    mean = (inner[:, -1:] - inner[:, :1]) / 4
    torch.testing.assert_close(steps[:, :2], mean.expand(2, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(steps[:, -2:], mean.expand(2, 2), rtol=0, atol=1e-12)
    values = basis(x)
    torch.testing.assert_close(values.sum(-1), torch.ones_like(x), rtol=0, atol=1e-12)
    for i in range(2):
        expected = scipy_splines(x[:, i].numpy(), basis.knots[i].numpy(), 2)
        np.testing.assert_allclose(values[:, i].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.claim(10, "Chebyshev polynomials equal numpy's chebval of tanh(x)", tolerance=1e-12)
def test_chebyshev_is_numpys():
    x = numbers(50, 3, low=-3.0, high=3.0)
    expected = np.polynomial.chebyshev.chebvander(np.tanh(x.numpy()), 7)
    np.testing.assert_allclose(ChebyshevBasis(7)(x).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.5, -0.25), (0.0, 0.0), (2.0, 0.0)])
def test_jacobi_is_scipys(a, b):
    x = numbers(50, 3, low=-3.0, high=3.0)
    z = np.tanh(x.numpy())
    expected = np.stack([special.eval_jacobi(n, a, b, z) for n in range(6)], -1)
    np.testing.assert_allclose(JacobiBasis(5, a, b)(x).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("points", [6, 16])
def test_gram_polynomials_start_orthogonal_over_equidistant_points(points):
    basis = GramBasis(5, points, dtype=torch.float64)
    inner = torch.linspace(-1, 1, points, dtype=torch.float64)[1:-1]
    values = basis.evaluate(inner.atanh()[:, None])[..., 0]
    # at the ends z = 1 and -1, which no x has: the recurrence by hand
    ends = [torch.ones(2, dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64)]
    for n in range(1, 5):
        ends.append(ends[1] * ends[-1] - basis.beta[n - 1].detach() * ends[-2])
    values = torch.cat([values, torch.stack(ends, -1)]).detach()
    gram = values.T @ values
    norms = gram.diagonal()
    off = gram - torch.diag(norms)
    assert (off.abs() / (norms[:, None] * norms).sqrt()).max() < 1e-12
    torch.testing.assert_close(
        values[:-2, 2] - inner**2, (values[0, 2] - inner[0] ** 2).expand(points - 2)
    )


def test_gaussians_and_switches_are_the_formulas():
    x = numbers(40, 3, low=-2.0, high=2.0)
    offset = (x.numpy()[..., None] - np.linspace(-1.5, 0.5, 5)) / 0.5
    rbf, rswaf = RBFBasis(5, (-1.5, 0.5)), RSWAFBasis(5, (-1.5, 0.5))
    np.testing.assert_allclose(rbf(x).numpy(), np.exp(-(offset**2)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(rswaf(x).numpy(), 1 / np.cosh(offset) ** 2, rtol=0, atol=1e-13)


def test_relu_products_are_bumps_of_height_one_on_their_intervals():
    basis = ReLUProductBasis(4, 2, (-1.0, 1.0))
    x = numbers(300, low=-3.0, high=3.0)
    start = -1 + 0.5 * (np.arange(6) - 2)
    end = start + 1.5
    inside = np.maximum(end - x.numpy()[:, None], 0) * np.maximum(x.numpy()[:, None] - start, 0)
    expected = inside**2 * 16 / (end - start) ** 4
    np.testing.assert_allclose(basis(x[:, None])[:, 0].numpy(), expected, rtol=0, atol=1e-13)
    middle = torch.as_tensor((start + end) / 2)
    torch.testing.assert_close(basis(middle).diagonal(), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["mexican_hat", "morlet", "dog"])
def test_wavelets_are_the_formulas(kind):
    basis = WaveletBasis(3, 4, kind, (-1.0, 2.0), dtype=torch.float64)
    torch.testing.assert_close(basis.shift[:, 0].tolist(), [-1.0, 0.0, 1.0, 2.0])
    torch.testing.assert_close(basis.log_scale.exp(), torch.ones_like(basis.log_scale))
    with torch.no_grad():
        basis.shift.add_(0.1 * numbers(4, 3))
        basis.log_scale.add_(0.3 * numbers(4, 3, seed=1))
    x = numbers(50, 3, low=-3.0, high=3.0)
    shift, scale = basis.shift.detach().numpy(), np.exp(basis.log_scale.detach().numpy())
    for i in range(3):
        for k in range(4):
            u = (x[:, i].numpy() - shift[k, i]) / scale[k, i]
            gauss = np.exp(-(u**2) / 2)
            expected = {
                "mexican_hat": 2 / math.sqrt(3 * math.sqrt(math.pi)) * (1 - u**2) * gauss,
                "morlet": np.cos(5 * u) * gauss,
                "dog": -u * gauss,
            }[kind]
            got = basis(x)[:, i, k].detach().numpy()
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


def test_the_mexican_hat_has_mean_zero_and_norm_one():
    u = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    wave = WaveletBasis(1, 2, grid_range=(0.0, 1.0), dtype=torch.float64)(u[:, None])[:, 0, 0]
    assert abs(wave.sum().item() * 1e-3) < 1e-10
    assert wave.square().sum().item() * 1e-3 == pytest.approx(1, abs=1e-10)


def test_fourier_pairs_and_activations():
    x = numbers(20, 2, low=-4.0, high=4.0)
    values = FourierBasis(5)(x).numpy()
    for k in range(5):
        expected = (np.sin if k % 2 else np.cos)((k // 2 + 1) * x.numpy())
        np.testing.assert_allclose(values[..., k], expected, rtol=0, atol=1e-13)
    names = list(ACTIVATIONS)
    values = ActivationBasis(names)(x)
    for k, name in enumerate(names):
        assert torch.equal(values[..., k], ACTIVATIONS[name](x))


@pytest.mark.claim(10, "Each basis passes gradcheck in float64", tolerance=1e-6)
@pytest.mark.parametrize("name", list(_FAMILIES))
def test_gradients(name):
    torch.manual_seed(0)
    basis = make_basis(name, 3).double()
    x = numbers(6, 3, low=-1.3, high=1.3).requires_grad_()
    assert torch.autograd.gradcheck(basis, (x,), atol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_all_derivatives_of_splines_are_scipys(order):
    basis = BSplineBasis(4, order, (0.0, 2.0))
    x = numbers(40, low=0.01, high=1.99).requires_grad_()
    knots = uniform_knots(basis)
    for k in range(basis.num_basis):
        element = BSpline.basis_element(knots[k : k + order + 2], extrapolate=False)
        value = basis.evaluate(x[:, None])[:, k, 0]
        for derivative in range(1, order + 1):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            expected = np.nan_to_num(element.derivative(derivative)(x.detach().numpy()))
            np.testing.assert_allclose(
                value.detach().numpy(), expected, rtol=0, atol=1e-9 * 2.0**derivative
            )


def test_second_derivatives_and_vmap():
    basis = BSplineBasis(4, 3)
    x = numbers(5, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: basis(x), (x,))
    many = numbers(3, 5, 2)
    torch.testing.assert_close(torch.func.vmap(basis)(many), basis(many))
    slope = torch.func.vmap(torch.func.jacrev(lambda x: basis(x[None])[0]))(x.detach()[:, 0])
    with_grad = x.detach()[:, 0].requires_grad_()
    for k in range(7):
        (expected,) = torch.autograd.grad(basis(with_grad)[:, k].sum(), with_grad)
        torch.testing.assert_close(slope[:, k], expected)


def test_select_keeps_the_inputs_own_wavelets():
    basis = WaveletBasis(5, 3)
    torch.nn.init.normal_(basis.shift)
    index = torch.tensor([4, 1])
    x = numbers(7, 5).float()
    assert torch.equal(basis.select(index)(x[:, index]), basis(x)[:, index])
    shared = RBFBasis(3)
    assert shared.select(index) is shared


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BSplineBasis(0), "grid_size: expected an integer of at least 1, got 0"),
        (lambda: BSplineBasis(3, 0), "order: expected an integer of at least 1"),
        (lambda: BSplineBasis(3, 1, (1.0, 1.0)), "grid_range: expected low < high"),
        (lambda: BSplineBasis(in_features=3)(torch.zeros(2, 4)), r"x: expected .*3\), got"),
        (lambda: BSplineBasis().fit_knots(torch.zeros(2, 4)), "in_features: expected a number"),
        (lambda: BSplineBasis(in_features=3).fit_knots(torch.zeros(0, 3)), "x: expected"),
        (
            lambda: BSplineBasis(in_features=3).fit_knots(torch.zeros(2, 3), uniform=0.0),
            "uniform: expected a weight",
        ),
        (lambda: RBFBasis(1), "num_basis: expected an integer of at least 2"),
        (lambda: RBFBasis(3)(torch.tensor(1.0)), "x: expected floating point"),
        (lambda: RBFBasis(3)(torch.zeros(2, dtype=torch.long)), "x: expected floating point"),
        (lambda: JacobiBasis(3, a=-1.0), "a: expected a number above -1"),
        (lambda: GramBasis(4, 4), "num_points: expected an integer of at least 5"),
        (lambda: WaveletBasis(3, kind="haar"), "kind: expected one of mexican_hat, morlet, dog"),
        (lambda: ActivationBasis([]), "activations: expected at least one"),
        (lambda: make_basis("spline", 3), "basis: expected one of bspline, .*got 'spline'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
