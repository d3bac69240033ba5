"""Sampled hyperparameters against gpytorch and importance sampling, and averages over them."""

import math

import pytest
import torch

from torchzoo.gp import (
    AveragedAcquisition,
    FullyBayesianSurrogate,
    GPSurrogate,
    KnowledgeGradient,
    NoisyExpectedImprovement,
    gaussian,
)
from torchzoo.gp.fully_bayesian import log_posterior
from torchzoo.testing import assert_within_se


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=1):
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(seed))


def fitted(**options):
    x = rand(6, 1)
    settings = {"num_samples": 8, "burn_in": 20, "thin": 2, "generator": seeded()} | options
    return x, FullyBayesianSurrogate(**settings).fit(x, 5 + 2 * (6 * x).sin())


@pytest.mark.claim(5, "Hyperparameters have the density of likelihood and priors", 1e-6)
def test_log_posterior():
    """gpytorch's, whose priors are in float32, with the change of variables, up to a constant."""
    x, z = rand(7, 2), rand(7, seed=2)
    theta = torch.randn(5, 5, dtype=torch.float64, generator=seeded(3))
    surrogate = GPSurrogate(max_iter=1).fit(x, z[:, None])
    model, theirs = surrogate._build(x, z[:, None]), []
    for row in theta:
        model.kernel.base_kernel.lengthscale = row[:2].exp()
        model.kernel.outputscale = row[2].exp()
        model.likelihood.noise = row[3].exp() + 1e-4
        model.mean.initialize(constant=row[4])
        model.double().train()
        model.set_train_data(x[None], z[None], strict=False)
        theirs.append(7 * -surrogate_objective(surrogate, model) + row[:4].sum())
    off = log_posterior(theta, x, z) - torch.stack(theirs)
    torch.testing.assert_close(off, off[:1].expand(5), rtol=0, atol=1e-6)
    assert off[0] == pytest.approx(7 * math.log(2 * math.pi) / 2)
    singular = torch.tensor([20.0, 20.0, 40.0, -40.0, 0.0]).double()
    assert log_posterior(singular, x, z) == -math.inf


def surrogate_objective(surrogate, model):
    surrogate.model = model
    return surrogate._objective()().detach()


@pytest.mark.claim(5, "Samples of hyperparameters are from their posterior", 4.0)
def test_samples():
    """Many short chains against weighted draws of a wide normal."""
    x = rand(8, 1)
    y = (6 * x).sin() + rand(8, 1, seed=9)
    found = FullyBayesianSurrogate(
        num_samples=96, chains=96, burn_in=60, thin=25, generator=seeded()
    ).fit(x, y)
    assert found.rhat.max() < 1.1
    z = ((y - y.mean()) / y.std())[:, 0]
    centre, spread = found.theta.mean(0), 1.5 * found.theta.std(0)
    draws = torch.distributions.StudentT(4.0, centre, spread)
    torch.manual_seed(0)
    theta = draws.sample((20_000,))
    weight = (log_posterior(theta, x, z) - draws.log_prob(theta).sum(-1)).softmax(0)
    assert 1 / weight.square().sum() > 1000
    for function in (lambda t: t, torch.square):
        assert_within_se(function(found.theta), weight @ function(theta))


@pytest.mark.claim(5, "A fully Bayesian acquisition is the mean over hyperparameters", 1e-12)
def test_average():
    x, surrogate = fitted()
    assert len(surrogate.members) == 8
    assert len({float(m.model.likelihood.noise) for m in surrogate.members}) > 4
    at = rand(9, 1, 1, seed=4)
    for kind, points in ((NoisyExpectedImprovement, x), (KnowledgeGradient, rand(15, 1, seed=5))):
        found = AveragedAcquisition(surrogate.members, lambda m: kind(m, points))(at)  # noqa: B023
        each = torch.stack([kind(member, points)(at) for member in surrogate.members])
        torch.testing.assert_close(found, each.sum(0) / 8, rtol=1e-12, atol=0)
        logs = AveragedAcquisition(
            surrogate.members,
            lambda m: kind(m, points, log=True),  # noqa: B023
            log=True,
        )
        torch.testing.assert_close(logs(at), found.log())
        assert (kind(surrogate, points)(at) - found).abs().max() > 0.001
    with pytest.raises(ValueError, match="models: expected"):
        AveragedAcquisition([], lambda m: m)


def test_mixture():
    """Mean and covariance of the mixture, noise included; a state has all of it."""
    _, surrogate = fitted(bounds=torch.tensor([[-1.0], [2.0]]))
    at = rand(2, 3, 1, seed=6)
    found, each = surrogate.posterior(at), [gaussian(m, at) for m in surrogate.members]
    means = torch.stack([one.mean[..., 0] for one in each])
    second = torch.stack([one.covariance[..., 0, :, :] + one.mean @ one.mean.mT for one in each])
    mean = means.mean(0)
    torch.testing.assert_close(found.mean[..., 0], mean)
    expected = second.mean(0) - mean[..., None] * mean[..., None, :]
    torch.testing.assert_close(found.covariance[..., 0, :, :], expected)
    noise = torch.stack([one.noise.flatten()[0] for one in each]).mean()
    torch.testing.assert_close(found.noise.flatten()[0], noise)
    again = FullyBayesianSurrogate(num_samples=8, bounds=torch.tensor([[-1.0], [2.0]]))
    again.load_state_dict(surrogate.state_dict())
    assert (again.posterior(at).covariance == found.covariance).all()


@pytest.mark.parametrize(
    "options", [{"num_samples": 6}, {"burn_in": -1}, {"thin": 0}, {"chains": 0}]
)
def test_errors(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        FullyBayesianSurrogate(**options)
    with pytest.raises(ValueError, match="Y: expected"):
        FullyBayesianSurrogate().fit(rand(3, 1), rand(3, 2))
