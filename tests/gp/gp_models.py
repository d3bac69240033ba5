"""A plain gpytorch model, and the same posterior by dense algebra."""

import gpytorch
import torch

LENGTH = 0.3


class PlainGP(gpytorch.models.ExactGP):
    """Gaussian kernel of length 0.3 and unit variance, constant mean."""

    def __init__(self, x, y, noise, mean=0.0):
        likelihood = gpytorch.likelihoods.GaussianLikelihood(
            noise_constraint=gpytorch.constraints.GreaterThan(1e-14)
        )
        super().__init__(x, y, likelihood)
        self.mean = gpytorch.means.ConstantMean()
        self.kernel = gpytorch.kernels.RBFKernel()
        self.double()
        self.mean.constant.data.fill_(mean)
        self.kernel.lengthscale = torch.tensor(LENGTH, dtype=torch.float64)
        self.likelihood.noise = torch.tensor(noise, dtype=torch.float64)
        self.eval().requires_grad_(False)

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


def rbf(a, b):
    return (-0.5 * torch.cdist(a, b).square() / LENGTH**2).exp()


def dense(x, y, at, noise, mean=0.0):
    """Posterior means and covariance; y may have leading dimensions."""
    k = rbf(x, x) + noise * torch.eye(len(x), dtype=x.dtype)
    cross = rbf(at, x)
    return mean + (y - mean) @ torch.linalg.solve(k, cross.mT), rbf(
        at, at
    ) - cross @ torch.linalg.solve(k, cross.mT)


def problem(n=7, noise=0.05, seed=0, mean=0.0):
    """Data, and the model of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, dtype=torch.float64, generator=generator)
    y = (6 * x).sin().sum(1)
    y = y + noise**0.5 * torch.randn(n, dtype=torch.float64, generator=generator)
    return x, y, PlainGP(x, y, noise, mean)
