"""Likelihoods and decoders of the multi-modal model, against torch.distributions and samples."""

import pytest
import torch
from torch.distributions import Bernoulli, Normal, Poisson

from torchzoo.gp import (
    BernoulliLikelihood,
    GaussianLikelihood,
    PoissonLikelihood,
    PoissonLoadingDecoder,
    StepMLP,
)

F64 = torch.float64


def outputs():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(3, 4, generator=generator, dtype=F64)
    return output, torch.randint(0, 2, (3, 4), generator=generator).double()


def test_log_probabilities_are_those_of_the_distributions():
    output, target = outputs()
    cases = (
        (PoissonLikelihood(), Poisson(output.exp()), 3 * target),
        (BernoulliLikelihood(), Bernoulli(logits=output), target),
        (GaussianLikelihood(0.3, dtype=F64), Normal(output, 0.3**0.5), target),
    )
    for likelihood, distribution, seen in cases:
        expected = distribution.log_prob(seen).sum(-1)
        torch.testing.assert_close(likelihood(output, seen), expected)
        torch.testing.assert_close(likelihood.mean(output), distribution.mean)


@pytest.mark.claim(
    94, "The Poisson term in closed form is its mean over samples of the latents", 0.01
)
def test_expectations_over_latents():
    torch.manual_seed(0)
    decoder = PoissonLoadingDecoder(2, 3, dtype=F64)
    mean, variance = torch.tensor([0.3, -0.5], dtype=F64), torch.tensor([0.4, 0.2], dtype=F64)
    output = decoder.moments(mean, variance)
    z = Normal(mean, variance.sqrt()).sample((200_000,))
    target = torch.tensor([0.0, 2.0, 1.0], dtype=F64)
    for likelihood in (PoissonLikelihood(), GaussianLikelihood(0.5, dtype=F64)):
        exact = likelihood(output.mean, target, output.variance)
        sampled = likelihood(decoder(z), target.expand(len(z), -1)).mean()
        torch.testing.assert_close(exact, sampled, rtol=0.01, atol=0)


@pytest.mark.claim(
    94,
    "Expected rates exceed those at the mean latents by exp of half the log rates' variance",
    1e-9,
)
def test_the_shift_of_expected_rates():
    torch.manual_seed(0)
    decoder, likelihood = PoissonLoadingDecoder(2, 5, dtype=F64), PoissonLikelihood()
    mean, variance = torch.randn(7, 2, dtype=F64), torch.rand(7, 2, dtype=F64)
    output = decoder.moments(mean, variance)
    weight = decoder.loading.weight
    shift = torch.einsum("np,tp,np->tn", weight, variance, weight) / 2
    ratio = likelihood.mean(output.mean, output.variance) / decoder(mean).exp()
    torch.testing.assert_close(ratio, shift.exp(), rtol=1e-9, atol=0)


def test_rates_start_at_those_of_the_neurons():
    counts = torch.poisson(torch.full((5, 6, 3), 2.0), torch.Generator().manual_seed(0))
    counts[..., 2] = 0
    decoder = PoissonLoadingDecoder(2, 3)
    decoder.init_rates(counts)
    found = decoder(torch.zeros(2)).exp()
    torch.testing.assert_close(found[:2], counts.mean((0, 1))[:2])
    torch.testing.assert_close(found[2].item(), 0.5 / 30)


def test_valid_values():
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, float("nan")])
    assert PoissonLikelihood().valid(values).tolist() == [False, True, False, True, True, False]
    assert BernoulliLikelihood().valid(values).tolist() == [False, True, True, True, False, False]
    assert GaussianLikelihood().valid(values).tolist() == [True] * 5 + [False]


def test_layers_have_elu_between_them_only():
    mlp = StepMLP([2, 3, 4])
    x = torch.randn(5, 2)
    hidden = torch.nn.functional.elu(mlp.layers[0](x))
    torch.testing.assert_close(mlp(x), mlp.layers[1](hidden))
