"""The shared solvers against closed forms and SciPy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der
from torch import nn

from torchzoo.common.solvers import minimize_lbfgs


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


def test_minimize_lbfgs_refuses_bad_input():
    with pytest.raises(ValueError, match="params: expected at least one tensor"):
        minimize_lbfgs(lambda: torch.zeros(()), [torch.zeros(1)])
    x = torch.tensor([-1.0], requires_grad=True)
    with pytest.raises(ValueError, match="closure: expected a finite value"):
        minimize_lbfgs(lambda: x.log().sum(), [x])
