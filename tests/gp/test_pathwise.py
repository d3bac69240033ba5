"""Paths of Gaussian processes against exact posteriors, spectra, and gpytorch."""

import gpytorch
import pytest
import torch

from torchzoo.gp import PathwiseSparseGP, random_features
from torchzoo.gp.pathwise import draw_spectrum

KERNELS = {
    "rbf": gpytorch.kernels.RBFKernel,
    "matern12": lambda: gpytorch.kernels.MaternKernel(0.5),
    "matern32": lambda: gpytorch.kernels.MaternKernel(1.5),
    "matern52": lambda: gpytorch.kernels.MaternKernel(2.5),
}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def reference(kind, length, scale):
    kernel = gpytorch.kernels.ScaleKernel(KERNELS[kind]()).double()
    kernel.base_kernel.lengthscale = length
    kernel.outputscale = scale
    return lambda a, b: kernel(a, b).to_dense().detach()


@pytest.mark.claim(
    67,
    "A process conditioned at its inducing points is the exact posterior, as dense algebra with "
    "gpytorch's kernels gives it",
    tolerance=1e-6,
)
@pytest.mark.parametrize("kind", KERNELS)
def test_posterior_is_exact(kind):
    x, y, new = normal(7, 2), normal(7, seed=1), normal(4, 2, seed=2)
    gp = PathwiseSparseGP(x, kernel=kind, lengthscale=0.8, outputscale=1.7, jitter=1e-9)
    k = reference(kind, 0.8, 1.7)
    torch.testing.assert_close(gp(new).variance, torch.full((4,), 1.7).double())
    gp.condition(x, y, 0.05)
    solved = torch.linalg.solve(k(x, x) + 0.05 * torch.eye(7).double(), k(x, new))
    found = gp(new)
    torch.testing.assert_close(found.mean, y @ solved, rtol=0, atol=1e-6)
    variance = (k(new, new) - k(new, x) @ solved).diagonal()
    torch.testing.assert_close(found.variance, variance, rtol=0, atol=1e-6)


@pytest.mark.claim(
    67,
    "Mean and covariance of 5000 paths are the posterior's, within 4 standard errors, for few "
    "waves a path",
    tolerance=None,
)
@pytest.mark.parametrize("kind", ["rbf", "matern32"])
def test_moments_of_paths(kind):
    x, y, new = normal(4, 2), normal(4, seed=1), normal(3, 2, seed=2)
    gp = PathwiseSparseGP(x, kernel=kind, lengthscale=0.8, outputscale=1.7)
    gp.condition(x, y, 0.3)
    k = reference(kind, 0.8, 1.7)
    solved = torch.linalg.solve(k(x, x) + 0.3 * torch.eye(4).double(), k(x, new))
    covariance = k(new, new) - k(new, x) @ solved
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        drawn = gp.sample_paths(5000, num_basis=8, generator=generator)(new)
    centred = drawn - y @ solved
    products = centred[:, :, None] * centred[:, None, :]
    for sample, expected in ((centred, torch.zeros(3)), (products, covariance)):
        error = sample.std(0) / 5000**0.5
        assert ((sample.mean(0) - expected).abs() < 4 * error).all()
    assert (products.std(0) / 5000**0.5 < 0.06).all()


def test_paths_are_functions():
    """The same point has the same value, slopes are those of the values, and data are kept."""
    x = normal(5, 1)
    gp = PathwiseSparseGP(x, kernel="matern52", lengthscale=0.7)
    gp.condition(x, normal(5, seed=1), 1e-8)
    paths = gp.sample_paths(3)
    assert torch.equal(paths(x), paths(x))
    torch.testing.assert_close(paths(x), normal(5, seed=1).expand(3, 5), rtol=0, atol=1e-2)
    at = torch.tensor([[0.3]]).double().requires_grad_()
    slope = torch.autograd.grad(paths(at).sum(), at)[0]
    step = (paths(at + 1e-5) - paths(at - 1e-5)).sum() / 2e-5
    assert slope.item() == pytest.approx(step.item(), rel=1e-5)
    assert paths(x.reshape(1, 5, 1)).shape == (3, 1, 5)


def test_more_data_than_inducing_points():
    """Titsias' optimum: the gradient of his bound is 0 there."""
    x, y = normal(12, 1), normal(12, seed=1)
    gp = PathwiseSparseGP(x[:4], lengthscale=0.9)
    gp.condition(x, y, 0.2)
    found = gp(x)
    fit = -((y - found.mean).square() + found.variance).sum() / 0.4
    one, two = torch.autograd.grad(fit - gp.kl(), [gp.white_mean, gp.white_root])
    assert one.abs().max() < 1e-7
    assert two.abs().max() < 1e-7
    prior = PathwiseSparseGP(x[:4])
    assert prior.kl().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KERNELS)
def test_spectra(kind):
    """The mean wave over the spectrum is the kernel, along a diagonal of the plane."""
    kernel = gpytorch.kernels.ScaleKernel(KERNELS[kind]()).double()
    kernel.base_kernel.lengthscale = 0.6
    kernel.outputscale = 2.0
    generator = torch.Generator().manual_seed(0)
    waves = random_features(kernel, 40_000, 2, generator=generator)
    x = torch.linspace(0, 2, 6).double()[:, None].expand(-1, 2)
    found = (waves(x) @ waves(x).mT).detach()
    expected = kernel(x).to_dense().detach()
    assert (found - expected).abs().max() < 4 * 2 / 40_000**0.5
    assert waves.amplitude.requires_grad


def test_errors():
    gp = PathwiseSparseGP(normal(3, 2))
    with pytest.raises(ValueError, match="kernel: expected one RBF or Matern"):
        random_features(gpytorch.kernels.PeriodicKernel(), 3, 1)
    with pytest.raises(ValueError, match="num_features"):
        random_features(gpytorch.kernels.RBFKernel(), 0, 1)
    with pytest.raises(ValueError, match="y: expected"):
        gp.condition(normal(4, 2), normal(3), 0.1)
    with pytest.raises(ValueError, match="noise"):
        gp.condition(normal(4, 2), normal(4), 0.0)
    with pytest.raises(ValueError, match="x: expected"):
        gp.sample_paths(1)(normal(4, 3))
    assert draw_spectrum(0.5, (2, 3, 1), torch.zeros(()))[1].shape == (2, 3)
