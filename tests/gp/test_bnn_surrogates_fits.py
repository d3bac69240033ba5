"""Fits of surrogates against Bayesian linear regression, dense algebra and Gaussian processes."""

import itertools
import math

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from torchzoo.common.linalg import psd_cholesky
from torchzoo.gp import (
    DKLSurrogate,
    EnsembleSurrogate,
    FlatMLP,
    GPSurrogate,
    HMCSampler,
    HMCSurrogate,
    InfiniteWidthReLUKernel,
    InfiniteWidthSurrogate,
    LaplaceSurrogate,
    SGHMCSurrogate,
)
from torchzoo.gp.bnn_surrogates_nets import potential
from torchzoo.testing import assert_within_se

PRIOR, NOISE = 2.0, 0.3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=12, d=2, seed=0):
    options = {"dtype": torch.float64, "generator": seeded(seed)}
    x = torch.rand(n, d, **options)
    y = x.sum(-1, keepdim=True) + 0.3 * torch.randn(n, 1, **options)
    return x, (y - y.mean()) / y.std()


def with_ones(x):
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def regression(x, y, prior=PRIOR, noise=NOISE):
    """Mean and covariance of the weights of Bayesian linear regression, the bias last."""
    a = with_ones(x)
    covariance = torch.linalg.inv(a.mT @ a / noise + torch.eye(a.shape[1], dtype=a.dtype) / prior)
    return covariance @ a.mT @ y / noise, covariance


SETTINGS = {"hidden": (), "prior_var": PRIOR, "noise_var": NOISE}


@pytest.mark.claim(
    4, "HMC over linear networks has the posterior of Bayesian linear regression", tolerance=4.0
)
def test_hmc_is_linear_regression():
    x, y = data()
    surrogate = HMCSurrogate(
        num_chains=150, num_samples=60, burn_in=60, num_leapfrog=6, step_size=0.1,
        pretrain_steps=30, generator=seeded(), **SETTINGS,
    ).fit(x, y)  # fmt: skip
    mean, covariance = regression(x, y)
    theta = surrogate.theta.reshape(150, 60, 3)
    assert (theta.transpose(0, 1) == surrogate.chain.samples.transpose(0, 1)).all()
    centred = theta - mean[:, 0]
    assert_within_se(centred.mean(1), 0.0)
    assert_within_se((centred[..., None] * centred[..., None, :]).mean(1), covariance)
    posterior = surrogate.posterior(x)
    torch.testing.assert_close(posterior.values[..., 0], (theta.flatten(0, 1) @ with_ones(x).mT))
    torch.testing.assert_close(
        posterior.observed_variance, posterior.variance + NOISE, rtol=1e-9, atol=0
    )


def test_sghmc_is_linear_regression():
    x, y = data()
    surrogate = SGHMCSurrogate(
        num_chains=150, num_steps=1100, burn_in=800, lr=0.1, generator=seeded(), **SETTINGS
    ).fit(x, y)
    assert surrogate.theta.shape == (60 * 150, 3)
    mean, covariance = regression(x, y)
    theta = surrogate.theta.reshape(60, 150, 3)
    assert_within_se(theta.mean(0), mean[:, 0])
    found = (theta - mean[:, 0]).flatten(0, 1).mT.cov(correction=0)
    torch.testing.assert_close(found, covariance, rtol=0.25, atol=0.02)


@pytest.mark.claim(
    4, "Laplace's approximation of a linear network is Bayesian linear regression", tolerance=1e-6
)
@pytest.mark.parametrize("structure", ["full", "last_layer", "kron"])
def test_laplace_is_linear_regression(structure):
    x, y = data()
    surrogate = LaplaceSurrogate(structure=structure, tune=False, generator=seeded(), **SETTINGS)
    new, _ = data(5, seed=3)
    posterior = surrogate.fit(x, y).posterior(3 * new)
    mean, covariance = regression(x, y)
    a = with_ones(3 * new)
    torch.testing.assert_close(posterior.mean, a @ mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(posterior.covariance[0], a @ covariance @ a.mT, rtol=0, atol=1e-6)
    assert (posterior.noise == NOISE).all()
    k = PRIOR * with_ones(x) @ with_ones(x).mT + NOISE * torch.eye(len(x), dtype=x.dtype)
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(x)).double(), k)
    evidence = normal.log_prob(y[:, 0])
    torch.testing.assert_close(surrogate.evidence(), evidence, rtol=0, atol=1e-6)


@pytest.mark.claim(
    4, "Laplace's posterior is J Lambda^-1 J^T of the network's Jacobian, by dense algebra", 1e-8
)
@pytest.mark.parametrize("structure", ["full", "last_layer", "kron"])
def test_laplace_of_a_network(structure):
    """Kronecker blocks are dense products, and exact for a single row."""
    x, y = data(1 if structure == "kron" else 9)
    y = torch.cat([y.nan_to_num(0.0), x[:, :1]], 1)
    surrogate = LaplaceSurrogate(
        hidden=(4, 3), structure=structure, prior_var=PRIOR, noise_var=NOISE, tune=False,
        generator=seeded(),
    ).fit(x, y)  # fmt: skip
    net, theta = surrogate.net, surrogate.theta
    new, _ = data(5, seed=3)
    jacobian = torch.func.jacrev(lambda t, x: net(t, x))
    keep = slice(-8, None) if structure == "last_layer" else slice(None)
    j, j_new = jacobian(theta, x)[..., keep], jacobian(theta, new)[..., keep]
    h = j.flatten(0, 1).mT @ j.flatten(0, 1)
    if structure == "kron":
        blocks, at = torch.zeros_like(h), 0
        for out, fan_in in net.shapes:
            size = out * (fan_in + 1)
            blocks[at : at + size, at : at + size] = h[at : at + size, at : at + size]
            at += size
        h = blocks
    precision = h / NOISE + torch.eye(len(h), dtype=h.dtype) / PRIOR
    scale = surrogate._scale[0]
    for output in range(2):
        rows = j_new[:, output]
        expected = scale[output] ** 2 * rows @ torch.linalg.inv(precision) @ rows.mT
        found = surrogate.posterior(new).covariance[output]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_laplace_kron_of_rows():
    """For several rows a block is the product of the two sums over their number."""
    x, y = data(7)
    options = {"hidden": (3,), "prior_var": PRIOR, "noise_var": NOISE, "tune": False}
    surrogate = LaplaceSurrogate(structure="kron", generator=seeded(), **options).fit(x, y)
    new, _ = data(4, seed=3)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for (a, g), (a_new, g_new) in zip(
        surrogate.net.factors(surrogate.theta, x),
        surrogate.net.factors(surrogate.theta, new),
        strict=True,
    ):
        h = torch.kron(g[:, 0].mT @ g[:, 0], a.mT @ a) / 7
        precision = h / NOISE + torch.eye(len(h), dtype=h.dtype) / PRIOR
        rows = (g_new[:, 0, :, None] * a_new[:, None, :]).flatten(1)
        expected += rows @ torch.linalg.inv(precision) @ rows.mT
    torch.testing.assert_close(surrogate.posterior(new).covariance[0], expected)


def test_laplace_tunes_by_the_evidence():
    x, y = data(20)
    surrogate = LaplaceSurrogate(hidden=(4,), prior_var=30.0, noise_var=2.0, generator=seeded())
    surrogate.fit(x, y)
    fixed = LaplaceSurrogate(
        hidden=(4,), prior_var=30.0, noise_var=2.0, tune=False, generator=seeded()
    ).fit(x, y)
    assert surrogate.evidence() > fixed.evidence() + 1
    for factor in (0.8, 1.25):
        prior, noise = surrogate.prior_var, surrogate.noise_var
        assert surrogate.evidence(factor * prior, noise) < surrogate.evidence()
        assert surrogate.evidence(prior, factor * noise) < surrogate.evidence()


@pytest.mark.claim(
    4, "Members of a linear ensemble are ridge regressions on random 80 % of the rows", 1e-3
)
def test_ensemble_is_ridge():
    x, y = data(6)
    surrogate = EnsembleSurrogate(lr=0.05, num_steps=600, generator=seeded(), **SETTINGS)
    surrogate.fit(x, y)
    fits = torch.stack(
        [regression(x[list(s)], y[list(s)])[0][:, 0] for s in itertools.combinations(range(6), 5)]
    )
    distance = (surrogate.theta[:, None] - fits).abs().amax(-1)
    assert len(surrogate.theta) == 10
    assert (distance.min(1).values < 1e-3).all()
    assert len(distance.argmin(1).unique()) > 2
    whole = EnsembleSurrogate(
        fraction=1.0, lr=0.05, num_steps=600, generator=seeded(), **SETTINGS
    ).fit(x, y)
    assert (whole.theta - regression(x, y)[0][:, 0]).abs().max() < 1e-3
    found = whole.posterior(x)
    torch.testing.assert_close(found.observed_variance, found.variance + NOISE)


def sklearn_posterior(kernel, noise, mean, x, y, new):
    found = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(x, y - mean)
    at, covariance = found.predict(new, return_cov=True)
    return torch.from_numpy(at.reshape(-1, 1) + mean), torch.from_numpy(covariance)


@pytest.mark.claim(
    4, "Deep kernel learning on an identity network is an exact Gaussian process", tolerance=1e-8
)
@pytest.mark.parametrize("kind", ["dkl", "gp"])
def test_exact_gaussian_processes(kind):
    x, y = data()
    new, _ = data(5, seed=3)
    if kind == "dkl":
        surrogate = DKLSurrogate(hidden=(), pretrain_steps=5, num_steps=60, lr=0.05)
        base = kernels.RBF
    else:
        surrogate, base = GPSurrogate(), lambda length: kernels.Matern(length, nu=2.5)
    surrogate.fit(x, y)
    model = surrogate.model
    length = model.kernel.base_kernel.lengthscale.detach().flatten().numpy()
    scale, noise = model.kernel.outputscale.item(), model.likelihood.noise.item()
    assert abs(math.log(noise / 0.1)) > 0.01  # was fitted
    mean, covariance = sklearn_posterior(
        kernels.ConstantKernel(scale) * base(length), noise, model.mean.constant.item(),
        x.numpy(), y.numpy(), new.numpy(),
    )  # fmt: skip
    posterior = surrogate.posterior(new)
    torch.testing.assert_close(posterior.mean, mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(posterior.covariance[0], covariance, rtol=0, atol=1e-8)
    assert posterior.noise.item() == pytest.approx(noise)


@pytest.mark.claim(4, "Deep kernels are kernels of features; variances are positive, least at data")
def test_deep_features():
    x, y = data(8)
    surrogate = DKLSurrogate(hidden=(6, 3), pretrain_steps=200, num_steps=50, generator=seeded())
    surrogate.fit(x, y)
    model, net = surrogate.model, FlatMLP((2, 6, 3, 1))
    new, _ = data(5, seed=3)
    theta = model.theta.detach()
    found = sklearn_posterior(
        kernels.ConstantKernel(model.kernel.outputscale.item())
        * kernels.RBF(model.kernel.base_kernel.lengthscale.item()),
        model.likelihood.noise.item(), model.mean.constant.item(),
        net.activations(theta, x)[-1].numpy(), y.numpy(), net.activations(theta, new)[-1].numpy(),
    )  # fmt: skip
    posterior = surrogate.posterior(new)
    torch.testing.assert_close(posterior.mean, found[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(posterior.covariance[0], found[1], rtol=0, atol=1e-7)
    far = surrogate.posterior(x + 3).variance
    assert (posterior.variance > 0).all()
    assert surrogate.posterior(x).variance.mean() < 0.5 * far.mean()
    assert (surrogate.posterior(x).variance < model.kernel.outputscale.item()).all()


def test_infinite_width_is_fitted_by_the_marginal_likelihood():
    """Scale and noise are at a mode of the likelihood with their priors."""
    x, y = data(15)
    surrogate = InfiniteWidthSurrogate(depth=2).fit(x, y)
    k = InfiniteWidthReLUKernel(2, depth=2)(x).to_dense()
    gamma = torch.distributions.Gamma

    def score(scale, noise):
        factor, _ = psd_cholesky(scale * k + noise * torch.eye(15, dtype=k.dtype))
        normal = torch.distributions.MultivariateNormal(torch.zeros(15).double(), scale_tril=factor)
        prior = gamma(2.0, 0.15).log_prob(scale) + gamma(1.1, 0.05).log_prob(noise)
        return float(normal.log_prob(y[:, 0]) + prior)

    scale = surrogate.model.kernel.outputscale.detach()[0]
    noise = surrogate.model.likelihood.noise.detach()[0, 0]
    best = score(scale, noise)
    for factor in (0.95, 1.05):
        assert score(factor * scale, noise) < best
        assert score(scale, factor * noise) < best
    assert {name for name, _ in surrogate.model.named_parameters()} == {
        "likelihood.noise_covar.raw_noise",
        "kernel.raw_outputscale",
    }


def test_networks():
    """Flat networks are torch's, and start as they do; factors are Jacobians."""
    net = FlatMLP((2, 16, 3))
    theta = net.initial((), torch.zeros(1, dtype=torch.float64), seeded())
    layers = [torch.nn.Linear(2, 16).double(), torch.nn.Linear(16, 3).double()]
    for layer, (weight, bias) in zip(layers, net.layers(theta), strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    x, _ = data(5)
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
    torch.testing.assert_close(net(theta, x), model(x).detach())
    first = net.initial((4000,), theta, seeded())
    assert first[:, 0].abs().max() <= 2**-0.5
    assert_within_se(first[:, 0] ** 2, 1 / 6)  # uniform within 1 / sqrt(2)
    assert_within_se(first[:, -1] ** 2, 1 / 48)
    j = torch.func.jacrev(net)(theta, x)
    parts = [(g[..., None] * a[..., None, None, :]).flatten(-2) for a, g in net.factors(theta, x)]
    torch.testing.assert_close(torch.cat(parts, -1), j)
    y = torch.zeros(5, 3, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0]).double()
    found = potential(net, theta, x, y, prior_var=3.0, noise_var=0.5, weight=weight)
    expected = (weight[:, None] * net(theta, x) ** 2).sum() / 1.0 + (theta**2).sum() / 6
    torch.testing.assert_close(found, expected)


@pytest.mark.claim(4, "The grid of variances is chosen by held-out density, for each problem")
def test_grid():
    x, _ = data(20)
    clean = with_ones(x).sum(-1, keepdim=True)
    noisy = torch.randn(20, 1, dtype=torch.float64, generator=seeded(4))
    surrogate = HMCSurrogate(
        hidden=(), grid=[(10.0, 1e-2), (9.0, 1.0)], num_samples=30, burn_in=30, num_leapfrog=5,
        pretrain_steps=100, lr=0.1, num_chains=2, generator=seeded(),
    )  # fmt: skip
    surrogate.fit(torch.stack([x, x]), torch.stack([clean, noisy]))
    assert surrogate.noise.tolist() == [1e-2, 1.0]


def test_warm_start():
    x, y = data()
    options = {"hidden": (3,), "num_leapfrog": 2, "pretrain_steps": 50, "warm_start": True}
    surrogate = HMCSurrogate(
        num_samples=5, burn_in=5, step_size=0.05, num_chains=2, generator=seeded(), **options
    ).fit(x, y)
    last, step = surrogate._last
    surrogate.options |= {"num_samples": 1, "burn_in": 0}
    surrogate._last = last, 1e-9 * step
    surrogate.fit(x, y)
    torch.testing.assert_close(surrogate.chain.samples[..., 0, :], last, rtol=0, atol=1e-6)
    torch.testing.assert_close(surrogate.chain.step_size, 1e-9 * step)


def test_sampler_of_named_parameters():
    """Independent Gaussians of two scales, by name; chains differ, as do their diagnostics."""
    target = {"a": torch.tensor(2.0), "b": torch.tensor([[0.5, -1.0]])}
    start = {"a": torch.tensor(0.0).double(), "b": torch.zeros(1, 2).double()}

    def density(p):
        return -((p["a"] - target["a"]) ** 2 / 0.25 + (p["b"] - target["b"]).square().sum()) / 2

    sampler = HMCSampler(
        density, start, num_samples=80, burn_in=60, step_size=0.3, num_leapfrog=5, num_chains=100,
        mass={"a": torch.tensor([4.0]), "b": torch.ones(1, 2)},
    )  # fmt: skip
    found = sampler.run(seeded())
    assert found.samples["a"].shape == (100, 80)
    assert found.samples["b"].shape == (100, 80, 1, 2)
    assert found.ess["b"].shape == found.rhat["b"].shape == (1, 2)
    assert_within_se(found.samples["a"].mean(1), 2.0)
    assert_within_se(((found.samples["a"] - 2) ** 2).mean(1), 0.25)
    assert_within_se(found.samples["b"].mean(1), target["b"])
    assert 0.6 < found.accept_rate.mean() < 0.95
    with pytest.raises(ValueError, match="params: expected"):
        HMCSampler(density, {}, num_samples=1, burn_in=0, step_size=1.0, num_leapfrog=1)
    with pytest.raises(ValueError, match="mass: expected"):
        HMCSampler(density, start, num_samples=1, burn_in=0, step_size=1.0, mass={})
    with pytest.raises(ValueError, match="num_chains: expected"):
        HMCSampler(density, start, num_samples=1, burn_in=0, step_size=1.0, num_chains=0)
