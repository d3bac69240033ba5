"""Sampled posteriors of a linear network against the conjugate ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchzoo.gp import GaussianPriorNet, predict, sample_posterior
from torchzoo.gp.bnn_priors_posterior import log_likelihood


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def sampled(batch_size, noise):
    net = GaussianPriorNet(nn.Linear(1, 1), init_std=1.5, dtype=torch.float64)
    x = normal(2, 12, 1)
    y = torch.stack([2 * x[0] + 1, -x[1]]) + 0.5 * normal(2, 12, 1, seed=1)
    samples = sample_posterior(
        net, x, y, noise=noise, chains=60, batch_size=batch_size, num_samples=20, discard=4,
        burn_in=300, keep_every=20, lr=0.1, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return net, samples, x, y


def exact(x, y, noise, std=1.5):
    """Mean and covariance of (weight, bias)."""
    features = torch.cat([x, torch.ones_like(x)], 1)
    covariance = torch.linalg.inv(features.mT @ features / noise + torch.eye(2) / std**2)
    return covariance @ features.mT @ y[:, 0] / noise, covariance


@pytest.mark.claim(
    13, "Sampled weights of a linear network have the mean and covariance of the exact posterior",
    tolerance=0.15,
)  # fmt: skip
def test_linear_posteriors():
    noise = torch.tensor([0.25, 1.0], dtype=torch.float64)
    net, samples, x, y = sampled(12, noise)
    assert samples["weight"].shape == (20, 60, 2, 1, 1)
    new = normal(5, 1, seed=4).expand(2, 5, 1)
    predicted = predict(net, samples, new, noise=noise)
    for index in range(2):
        draws = torch.stack(
            [samples["weight"][:, :, index, 0, 0], samples["bias"][:, :, index, 0]], -1
        ).flatten(0, 1)
        mean, covariance = exact(x[index], y[index], noise[index])
        scale = covariance.diagonal().sqrt()
        assert ((draws.mean(0) - mean) / scale).abs().max() < 0.15
        error = (draws.mT.cov() - covariance) / torch.outer(scale, scale)
        assert error.abs().max() < 0.15
        features = torch.cat([new[index], torch.ones(5, 1)], 1)
        torch.testing.assert_close(predicted.mean[index, :, 0], features @ draws.mean(0))
        torch.testing.assert_close(
            predicted.variance[index, :, 0],
            ((features @ draws.mT.cov(correction=0)) * features).sum(1),
        )
        assert (predicted.noise[index] == noise[index]).all()


def test_minibatches_stand_for_all_data():
    noise = 1.0
    _, samples, x, y = sampled(4, noise)
    mean, covariance = exact(x[0], y[0], noise)
    draws = samples["weight"][:, :, 0, 0, 0]
    assert abs(draws.mean() - mean[0]) < 0.3 * covariance[0, 0].sqrt()
    assert abs(draws.std() / covariance[0, 0].sqrt() - 1) < 0.5


def test_classes():
    f, y = normal(3, 5, 4), torch.tensor([0, 3, 1, 1, 2]).expand(3, 5)
    found = log_likelihood(f, y, "categorical")
    expected = [-F.cross_entropy(a, b, reduction="sum") for a, b in zip(f, y, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    net = GaussianPriorNet(nn.Linear(1, 2), dtype=torch.float64)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    samples = sample_posterior(
        net, x, (x[:, 0] > 0).long(), likelihood="categorical", num_samples=5, discard=0,
        burn_in=100, keep_every=20, lr=0.05, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    p = predict(net, samples, x, likelihood="categorical")
    torch.testing.assert_close(p.sum(-1), torch.ones(20).double())
    assert (p.argmax(-1) == (x[:, 0] > 0)).all()


def test_gaussian_likelihood():
    f, y = normal(2, 3, 5, 1), normal(3, 5, 1, seed=1)
    noise = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    square = (f - y).square()[..., 0] / noise[:, None]
    expected = -(square + noise.log()[:, None] + math.log(2 * math.pi)).sum(-1) / 2
    torch.testing.assert_close(log_likelihood(f, y, "gaussian", noise), expected)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"y": torch.zeros(5, 1)}, "y"),
        ({"x": torch.zeros(6)}, "x"),
        ({"noise": 0.0}, "noise"),
        ({"likelihood": "poisson"}, "likelihood"),
        ({"chains": 0}, "chains"),
        ({"batch_size": 0}, "batch_size"),
        ({"discard": -1}, "discard"),
    ],
)
def test_wrong_arguments(changes, name):
    given = {"x": torch.zeros(6, 1), "y": torch.zeros(6, 1), **changes}
    with pytest.raises(ValueError, match=f"^{name}: .*got"):
        sample_posterior(GaussianPriorNet([1, 1]), given.pop("x"), given.pop("y"), **given)
