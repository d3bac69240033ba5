"""The shared solvers against closed forms and SciPy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der
from sklearn.linear_model import Ridge
from torch import nn

from torchzoo.common import solvers
from torchzoo.common.solvers import (
    conjugate_gradient,
    minimize_lbfgs,
    minimize_with_slopes,
    ridge,
)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def test_minimize_lbfgs_finds_scipys_minimum_of_rosenbrock():
    start = np.array([1.3, 0.7, 0.8, 1.9, 1.2])
    x = torch.tensor(start, requires_grad=True)
    found = minimize_lbfgs(lambda: rosenbrock(x), [x], tol=1e-8)
    peer = minimize(rosen, start, jac=rosen_der, method="BFGS", options={"gtol": 1e-9})
    assert found.converged
    assert found.residual <= 1e-8
    np.testing.assert_allclose(x.detach().numpy(), peer.x, atol=1e-6)
    assert found.value.item() == pytest.approx(peer.fun, abs=1e-12)


def test_minimize_lbfgs_solves_least_squares_over_several_parameters():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(50, generator=generator, dtype=torch.float64)
    layer = nn.Linear(3, 1, dtype=torch.float64)
    minimize_lbfgs(lambda: (layer(x).squeeze(-1) - y).square().mean(), layer.parameters())
    design = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    exact = np.linalg.lstsq(design.numpy(), y.numpy(), rcond=None)[0]
    got = torch.cat([layer.weight.flatten(), layer.bias]).detach().numpy()
    np.testing.assert_allclose(got, exact, atol=1e-8)


def test_minimize_lbfgs_never_ends_above_its_start():
    # Past 1 the objective is infinite, so that the first steps of the line search overflow.
    x = torch.tensor([0.999], dtype=torch.float64, requires_grad=True)
    value = minimize_lbfgs(lambda: (1e3 * x - torch.log(1 - x) * 1e-3).sum() ** 2, [x], max_iter=5)
    assert value.value <= (1e3 * 0.999 - np.log(1 - 0.999) * 1e-3) ** 2
    assert torch.isfinite(x).all()


def test_minimize_lbfgs_leaves_gradients_and_frozen_tensors_alone():
    x = torch.tensor([3.0], requires_grad=True)
    frozen = torch.tensor([1.0])
    x.grad = torch.tensor([7.0])
    with torch.no_grad():
        minimize_lbfgs(lambda: ((x - frozen) ** 2).sum(), [x, frozen])
    assert x.item() == pytest.approx(1.0, abs=1e-6)
    assert x.grad.item() == 7.0
    assert frozen.item() == 1.0


def test_minimize_lbfgs_stops_at_max_iter_and_says_so():
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    found = minimize_lbfgs(lambda: rosenbrock(x), [x], max_iter=3)
    assert found.iterations == 3
    assert not found.converged


def test_minimize_lbfgs_gives_up_at_a_jump():
    """Halving steps towards a jump gains less and less and never ends by itself."""
    evaluations = {}
    for min_gain in (0.0, 1e-13):
        x, count = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True), []

        def closure(x=x, count=count):
            count.append(x.detach().clone())
            return (x * torch.tensor([1.0, 0.3])).square().sum() + 5 * (x[0] < 1)

        found = minimize_lbfgs(closure, [x], max_iter=300, min_gain=min_gain)
        evaluations[min_gain] = len(count), found.value.item()
    assert evaluations[1e-13][0] < 0.7 * evaluations[0.0][0]
    assert evaluations[1e-13][1] == pytest.approx(evaluations[0.0][1], abs=1e-9)


def test_slopes_that_are_given_lead_where_those_of_autograd_lead():
    def known():
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            loss = rosenbrock(leaf)
        return loss.detach(), torch.autograd.grad(loss, leaf)

    x, y = (torch.tensor([1.3, 0.7, -0.8], requires_grad=True) for _ in range(2))
    found = minimize_lbfgs(lambda: rosenbrock(x), [x], max_iter=30)
    same = minimize_with_slopes(known, [y], max_iter=30)
    assert torch.equal(x, y)
    assert found == same
    assert y.grad is None
    with pytest.raises(ValueError, match="params: expected at least one tensor"):
        minimize_with_slopes(known, [])


def test_minimize_lbfgs_refuses_bad_input():
    with pytest.raises(ValueError, match="params: expected at least one tensor"):
        minimize_lbfgs(lambda: torch.zeros(()), [torch.zeros(1)])
    x = torch.tensor([-1.0], requires_grad=True)
    with pytest.raises(ValueError, match="closure: expected a finite value"):
        minimize_lbfgs(lambda: x.log().sum(), [x])


def regression(n, size, k=2, batch=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(*batch, n, size + k, generator=generator, dtype=torch.float64)
    return draw[..., :size], draw[..., size:]


SOLVERS = ("auto", "primal", "dual", "cg")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [5, 40])
def test_ridge_is_scikit_learns(solver, size):
    features, y = regression(20, size)
    weight = torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for given in (None, weight):
        peer = Ridge(alpha=0.7, fit_intercept=False, solver="cholesky")
        peer.fit(features.numpy(), y.numpy(), None if given is None else given.numpy())
        found = ridge(features, y, 0.7, solver=solver, sample_weight=given)
        np.testing.assert_allclose(found.numpy(), peer.coef_.T, atol=1e-9)
        one = ridge(features, y[:, 0], 0.7, solver=solver, sample_weight=given)
        torch.testing.assert_close(one, found[:, 0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_ridge_in_batches_and_in_single_precision(solver):
    features, y = regression(9, 4, batch=(3, 2))
    found = ridge(features, y, 0.1, solver=solver)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(found[i, j], ridge(features[i, j], y[i, j], 0.1))
    single = ridge(features.float(), y.float(), 0.1, solver=solver)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=1e-5)


def test_ridge_of_zero_is_least_squares_and_is_refused_for_deficient_rank():
    features, y = regression(20, 5)
    exact = np.linalg.lstsq(features.numpy(), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(ridge(features, y, 0.0).numpy(), exact, atol=1e-10)
    with pytest.raises(ValueError, match="ridge: too small"):
        ridge(torch.ones(4, 2), torch.ones(4), 0.0)


def test_ridge_has_gradients():
    features, y = regression(6, 3)
    inputs = features.requires_grad_(), y.requires_grad_()
    for solver in ("primal", "dual"):
        assert torch.autograd.gradcheck(lambda f, t, s=solver: ridge(f, t, 0.5, solver=s), inputs)


def test_conjugate_gradient_solves_systems_of_different_difficulty():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    a = root @ root.mT + torch.eye(12)
    b = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    b[1] = 0
    found = conjugate_gradient(lambda x: x @ a, b, tol=1e-12)
    assert found.converged
    assert found.residual < 1e-11
    np.testing.assert_allclose(found.value.numpy(), np.linalg.solve(a, b.T).T, atol=1e-9)
    assert (found.value[1] == 0).all()


def test_conjugate_gradient_with_a_preconditioner_needs_fewer_iterations():
    scale = torch.logspace(0, 6, 50, dtype=torch.float64)
    b = torch.ones(50, dtype=torch.float64)
    plain = conjugate_gradient(lambda x: scale * x, b, max_iter=30)
    found = conjugate_gradient(lambda x: scale * x, b, preconditioner=lambda r: r / scale)
    assert not plain.converged
    assert plain.iterations == 30
    assert found.converged
    assert found.iterations <= 2
    torch.testing.assert_close(found.value, 1 / scale)


def test_ridge_says_when_conjugate_gradients_did_not_converge(monkeypatch):
    monkeypatch.setattr(
        solvers,
        "conjugate_gradient",
        lambda *args, max_iter, **kwargs: conjugate_gradient(*args, max_iter=1, **kwargs),
    )
    with pytest.warns(UserWarning, match="relative residual"):
        ridge(*regression(9, 4), 0.1, solver="cg")


def test_linear_solvers_refuse_bad_input():
    features, y = regression(6, 3)
    with pytest.raises(ValueError, match="y: expected"):
        ridge(features, y[:5], 1.0)
    with pytest.raises(ValueError, match="ridge: expected at least 0, got -1"):
        ridge(features, y, -1.0)
    with pytest.raises(ValueError, match=r"solver: expected .* got 'lu'"):
        ridge(features, y, 1.0, solver="lu")
    for weight in (torch.ones(5), -torch.ones(6)):
        with pytest.raises(ValueError, match="sample_weight: expected"):
            ridge(features, y, 1.0, sample_weight=weight)
    with pytest.raises(ValueError, match="b: expected"):
        conjugate_gradient(lambda x: x, torch.ones(()))
