"""Gaussian processes of values and gradients against autograd and gpytorch."""

import gpytorch
import pytest
import torch

from torchzoo.gp import DerivativeGP, derivative_covariance

LENGTHS = torch.tensor([0.4, 0.9], dtype=torch.float64)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def plain(a, b, kernel):
    """The covariance of two points' values, from its definition."""
    q = ((a - b) / LENGTHS).square().sum()
    if kernel == "rbf":
        return (-q / 2).exp()
    s = (5 * q).sqrt()
    return (1 + s + s**2 / 3) * (-s).exp()


@pytest.mark.claim(5, "Blocks of the derivative kernel are derivatives of the kernel", 1e-10)
@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_blocks(kernel):
    x1, x2 = rand(3, 2), rand(4, 2, seed=1)
    found = derivative_covariance(x1, x2, LENGTHS, kernel=kernel)
    for i, a in enumerate(x1):
        for j, b in enumerate(x2):
            f = lambda a, b: plain(a, b, kernel)  # noqa: E731
            rows, columns = slice(3 + 2 * i, 5 + 2 * i), slice(4 + 2 * j, 6 + 2 * j)
            for at, value in (
                ((i, j), f(a, b)),
                ((rows, j), torch.func.grad(f)(a, b)),
                ((i, columns), torch.func.grad(f, 1)(a, b)),
                ((rows, columns), torch.func.jacfwd(torch.func.grad(f), 1)(a, b)),
            ):
                torch.testing.assert_close(found[at], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_the_same_point(kernel):
    """Gpytorch's kernels of values and gradients, whose order is by points."""
    x = rand(3, 2)
    kind = {"rbf": gpytorch.kernels.RBFKernelGrad, "matern52": gpytorch.kernels.Matern52KernelGrad}
    other = kind[kernel](ard_num_dims=2).double()
    other.lengthscale = LENGTHS
    order = torch.arange(9).reshape(3, 3).T
    order = torch.cat([order[0], order[1:].T.flatten()])
    expected = other(x).to_dense().detach()[order][:, order]
    found = derivative_covariance(x, x, LENGTHS, kernel=kernel)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    point = x.clone().requires_grad_()  # a copy of a point has finite derivatives
    slope = torch.autograd.grad(
        derivative_covariance(point, point, LENGTHS, kernel=kernel).sum(), point
    )
    assert slope[0].isfinite().all()


def wave(x):
    value = (5 * x[:, :1]).sin() + x[:, 1:].square()
    return value, torch.cat([5 * (5 * x[:, :1]).cos(), 2 * x[:, 1:]], 1)


BOUNDS = torch.tensor([[-1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)


@pytest.mark.claim(5, "Given gradients without noise, predicted gradients are the given ones", 1e-4)
@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_gradients_are_learned(kernel):
    x = BOUNDS[0] + 2 * rand(8, 2)
    y, grad = wave(x)
    gp = DerivativeGP(kernel=kernel, noise_var=1e-9, grad_noise_var=1e-9, bounds=BOUNDS)
    found = gp.fit(x, y, grad).gradient(x)
    torch.testing.assert_close(found.mean, grad, rtol=0, atol=1e-4)
    assert (found.variance < 1e-5).all()
    torch.testing.assert_close(gp.posterior(x).mean, y, rtol=0, atol=1e-5)
    at = BOUNDS[0] + 2 * rand(40, 2, seed=3)
    moving = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(gp.posterior(moving).mean.sum(), moving)
    torch.testing.assert_close(gp.gradient(at).mean, slope, rtol=0, atol=1e-8)
    without = DerivativeGP(kernel=kernel, noise_var=1e-9, bounds=BOUNDS).fit(x, y)
    error, worse = ((g.posterior(at).mean - wave(at)[0]).square().mean() for g in (gp, without))
    assert error < 0.3 * worse


def test_states_and_missing_gradients():
    x = BOUNDS[0] + 2 * rand(6, 2)
    y, grad = wave(x)
    grad[::2] = torch.nan
    gp = DerivativeGP(bounds=BOUNDS, max_iter=10).fit(x, y, grad)
    other = DerivativeGP(bounds=BOUNDS)
    other.load_state_dict(gp.state_dict())
    assert (other.posterior(x).covariance == gp.posterior(x).covariance).all()
    assert other.posterior(x.expand(3, 6, 2)).mean.shape == (3, 6, 1)
    for bad in (grad[:2], grad[:, :1]):
        with pytest.raises(ValueError, match="grad: expected"):
            gp.fit(x, y, bad)
    for options in ({"kernel": "cosine"}, {"noise_var": -1.0}, {"max_iter": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            DerivativeGP(**options)
