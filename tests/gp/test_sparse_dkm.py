"""Sparse deep kernel machines against the full ones, dense formulas and sampling."""

import math

import pytest
import torch
from torch.nn import functional as F

from torchzoo.gp import DeepKernelMachine, DKMLayer, GaussianPosterior, SparseDKM, gram_kernel
from torchzoo.gp.dkm_layer import whiten
from torchzoo.testing import assert_within_se


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def machine(p=6, seed=0, **options):
    """A machine of 3 inputs and 2 outputs whose parameters are all off their start."""
    torch.manual_seed(seed)
    options = {"num_layers": 2, "nu": [0.7, 2.5], "jitter": 1e-10} | options
    found = SparseDKM(3, 2, num_inducing=p, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return found


@pytest.mark.claim(
    7,
    "With all points inducing and the posterior at its optimum the sparse objective is the full "
    "one at the same Gram matrices, and below it for any other posterior",
    tolerance=1e-8,
)
def test_all_points_inducing_is_the_full_machine():
    x, y = normal(7, 3), normal(7, 2, seed=1)
    full = DeepKernelMachine(2, nu=[0.7, 2.5], noise=0.4, inputs=x, targets=y, jitter=1e-10)
    sparse = machine(7, noise=0.4)
    with torch.no_grad():
        sparse.inducing.copy_(x)
        sparse.log_scale.zero_()
        sparse.log_noise.fill_(math.log(0.4))
        for ours, theirs in zip(full.layers, sparse.layers, strict=True):
            ours.factor.copy_(theirs.factor)
        root, _, _ = whiten(*sparse.grams(x)[-1], "relu", 1e-10)
        cov = torch.linalg.inv(torch.eye(7, dtype=x.dtype) + root.mT @ root / 0.4)
        sparse.factor.copy_(torch.linalg.cholesky(cov))
        sparse.mean.copy_(cov @ root.mT @ y / 0.4)
        best = full.objective()
        torch.testing.assert_close(sparse.elbo(x, y, 7), best, rtol=1e-8, atol=0)
        for parameter in (sparse.mean, sparse.factor):
            start = parameter.clone()
            for seed in range(5):
                parameter.copy_(start + 0.05 * normal(*start.shape, seed=seed).tril())
                assert sparse.elbo(x, y, 7) < best - 1e-4
            parameter.copy_(start)
    found, exact = sparse(x).mean, full(x).mean
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(sparse(x).variance, full(x).variance, rtol=0, atol=1e-6)


@pytest.mark.claim(
    7,
    "Gram matrices at inducing points, as of test points, are those of the inducing points",
    tolerance=1e-7,
)
def test_test_points_at_inducing_points():
    found = machine()
    for blocks in found.grams(found.inducing):
        torch.testing.assert_close(blocks.ti, blocks.ii, rtol=0, atol=1e-7)
        torch.testing.assert_close(blocks.tt, blocks.ii.diagonal(), rtol=0, atol=1e-7)


def test_a_layer_is_its_formulas():
    x = normal(9, 4)
    blocks = (x[:5] @ x[:5].mT, x @ x[:5].mT, x.square().sum(-1))
    layer = DKMLayer(5, nu=0.3, jitter=0.0, dtype=torch.float64)
    with torch.no_grad():
        layer.factor.add_(0.4 * normal(5, 5, seed=1))
    k, found = gram_kernel(*blocks, "relu"), layer(*blocks)
    along = k.ti @ torch.linalg.inv(k.ii)
    torch.testing.assert_close(found.ti, along @ found.ii, rtol=0, atol=1e-9)
    tt = k.tt + (along @ (found.ii - k.ii) * along).sum(-1)
    torch.testing.assert_close(found.tt, tt, rtol=0, atol=1e-9)
    mvn, zero = torch.distributions.MultivariateNormal, torch.zeros(5, dtype=torch.float64)
    dense = torch.distributions.kl_divergence(mvn(zero, found.ii), mvn(zero, k.ii))
    torch.testing.assert_close(layer.kl(), dense, rtol=1e-9, atol=0)
    assert (layer.factor.tril() != layer.factor).any()
    layer.reset_parameters()
    torch.testing.assert_close(layer(*blocks).ii, k.ii)
    assert layer.kl() == 0
    assert DKMLayer(2).nu == 5.0


def test_predictions_are_their_formulas():
    found, x = machine(), normal(4, 3, seed=2)
    k = gram_kernel(*found.grams(x)[-1], "relu")
    root = torch.linalg.cholesky(k.ii)
    scale, b = found.log_scale.exp(), found.factor.tril()
    mu, s = scale.sqrt() * root @ found.mean, root @ b @ b.mT @ root.mT
    along = k.ti @ torch.linalg.inv(k.ii)
    posterior = found(x)
    torch.testing.assert_close(posterior.mean, along @ mu, rtol=0, atol=1e-7)
    variance = scale * (k.tt - (along @ (k.ii - s) * along).sum(-1))
    torch.testing.assert_close(
        posterior.variance, variance[:, None].expand(4, 2), rtol=0, atol=1e-7
    )
    observed = posterior.observed()
    torch.testing.assert_close(observed.variance, posterior.variance + found.noise)
    torch.testing.assert_close(found.noise, found.log_noise.exp())


def test_the_elbo_is_its_formula():
    found, x, y = machine(), normal(5, 3, seed=2), normal(5, 2, seed=3)
    mean, variance, noise = found(x)
    draws = GaussianPosterior(mean, variance).rsample((200_000,), generator=torch.manual_seed(0))
    fit = torch.distributions.Normal(draws, noise.sqrt()).log_prob(y).sum((1, 2)) / 5
    mvn = torch.distributions.MultivariateNormal
    b, zero = found.factor.tril(), torch.zeros(6, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    kl = sum(
        torch.distributions.kl_divergence(mvn(m, b @ b.mT), mvn(zero, eye)) for m in found.mean.mT
    )
    kl = kl + sum(layer.nu * layer.kl() for layer in found.layers)
    torch.testing.assert_close(found.kl(), kl)
    assert_within_se(50 * fit.detach(), (found.elbo(x, y, 50) + kl).detach())
    assert [layer.nu for layer in found.layers] == [0.7, 2.5]


@pytest.mark.claim(
    7, "The objective of mini-batches is that of all data on average", tolerance=1e-9
)
def test_mini_batches():
    found, x, y = machine(), normal(12, 3, seed=2), normal(12, 2, seed=3)
    parts = [found.elbo(a, b, 12) for a, b in zip(x.split(4), y.split(4), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), found.elbo(x, y, 12), rtol=1e-9, atol=0)


def test_at_the_start_it_is_the_prior():
    found = SparseDKM(3, 1, num_inducing=5, dtype=torch.float64)
    x = normal(6, 3)
    posterior = found(x)
    assert posterior.mean.abs().max() == 0
    torch.testing.assert_close(posterior.variance[:, 0], x.square().sum(-1) / 3)
    assert found.kl() == 0
    assert float(found.noise) == pytest.approx(0.1)
    assert len(found.layers) == 3
    assert found.layers[0].nu == 5.0
    assert not SparseDKM(3, 1, train_inducing_inputs=False).inducing.requires_grad


def test_softmax():
    found = machine(likelihood="softmax")
    x, classes = normal(4, 3, seed=2), torch.tensor([0, 1, 1, 0])
    assert found(x).shape == (10, 4, 2)
    assert found.eval()(x).shape == (100, 4, 2)
    assert found(x[0]).shape == (100, 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        rows = [found.elbo(x, classes, 4, generator=generator) for _ in range(400)]
    draws = found.latent(x).rsample((200_000,), generator=generator)
    expected = F.log_softmax(draws, -1)[:, range(4), classes].sum(-1).mean() - found.kl()
    assert_within_se(torch.stack(rows), expected.detach(), n_se=5)
    assert not hasattr(found, "log_noise")


def test_training_learns_a_curve():
    torch.manual_seed(0)
    x = torch.rand(200, 1) * 4 - 2
    x = torch.cat([x, torch.ones_like(x)], 1)
    y = (3 * x[:, :1]).sin() + 0.1 * torch.randn(200, 1)
    found = SparseDKM(2, 1, num_layers=1, num_inducing=20, nu=0.5)
    found.init_inducing(x)
    optimizer = torch.optim.Adam(found.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (-found.elbo(x, y, 200) / 200).backward()
        optimizer.step()
    assert (found(x).mean - (3 * x[:, :1]).sin()).square().mean() < 0.03


@pytest.mark.parametrize("method", ["kmeans", "subset"])
def test_inducing_inputs_from_data(method):
    x = torch.cat([normal(30, 3), normal(30, 3, seed=1) + 20])
    found = machine(2)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    found.init_inducing(x, method, generator=generators[0])
    first = found.inducing.detach().clone()
    if method == "kmeans":
        expected = torch.stack([x[:30].mean(0), x[30:].mean(0)])
        torch.testing.assert_close(first[first[:, 0].argsort()], expected)
    else:
        assert all((row == x).all(-1).any() for row in first)
        assert (first[0] != first[1]).any()
    found.init_inducing(x, method, generator=generators[1])
    assert (found.inducing == first).all()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: m.init_inducing(normal(5, 3)), "x"),
        (lambda m: m.init_inducing(normal(9, 2)), "x"),
        (lambda m: m.init_inducing(normal(9, 3), "grid"), "method"),
        (lambda m: m.elbo(normal(4, 3), normal(4), 4), "y"),
        (lambda m: m.elbo(normal(4, 3), torch.zeros(4, 2, dtype=torch.int64), 4), "y"),
        (lambda m: machine(likelihood="softmax").elbo(normal(4, 3), normal(4), 4), "y"),
        (lambda m: GaussianPosterior(normal(2), normal(2)).observed(), "noise"),
    ],
)
def test_bad_calls(call, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        call(machine())
