"""Gaussian process priors by Fourier coefficients, against dense kernels and samples."""

import math
import warnings

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from torchzoo.gp import FourierGPPrior
from torchzoo.gp.fourier import fourier_basis
from torchzoo.testing import assert_within_se
from torchzoo.testing.work import CountElements

F64 = torch.float64


def make(num_latents=1, num_steps=100, **options):
    return FourierGPPrior(num_latents, num_steps, **{"jitter": 1e-8, "dtype": F64, **options})


def covariance(prior):
    """The covariance over time of the first latent."""
    return prior.basis.mT @ (prior.spectrum()[:, :1] * prior.basis)


def rbf(num_steps, length):
    t = torch.arange(num_steps, dtype=F64)
    return (-((t[:, None] - t) ** 2) / (2 * length**2)).exp()


@pytest.mark.claim(94, "On a circle of T steps the real Fourier basis is orthonormal", 1e-6)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 12])
def test_the_basis_is_orthonormal(num_steps):
    _, basis = fourier_basis(num_steps, num_steps, 0.5)
    assert basis.shape == (num_steps, num_steps)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(num_steps, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.claim(
    94,
    "Coefficients with the spectrum's variances have the RBF covariance over time where the circle "
    "is longer than the steps by four lengths",
    1e-3,
)
@pytest.mark.parametrize(
    ("length", "extension", "error"),
    [(5, 0.2, 1.48e-4), (10, 0.4, 2.24e-4), (25, 1.0, 2.86e-4), (25, "auto", 2.86e-4)],
)
def test_the_covariance_is_that_of_the_kernel(length, extension, error):
    prior = make(min_lengthscale=min(length, 10), extension=extension, lengthscale_init=length)
    found = (covariance(prior) - rbf(100, length)).abs().max().item()
    assert found < 1e-3
    assert found == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(("num_steps", "length", "error"), [(100, 25, 0.703), (60, 30, 0.929)])
def test_a_short_circle_correlates_the_ends(num_steps, length, error):
    """What the automatic extension is for: the fifth of the paper is too short for these."""
    prior = make(num_steps=num_steps, extension=0.2, lengthscale_init=length)
    assert prior.period == round(1.2 * num_steps)
    found = (covariance(prior) - rbf(num_steps, length)).abs().max().item()
    assert found == pytest.approx(error, rel=0.01)


def test_the_matern_covariance():
    prior = make(kernel="matern", lengthscale_init=20.0, min_lengthscale=2.0)
    t = torch.arange(100, dtype=F64)
    around = torch.arange(-3, 4, dtype=F64) * prior.period  # the kernel on the circle
    z = math.sqrt(5) * ((t[:, None] - t)[..., None] + around).abs() / 20
    expected = ((1 + z + z**2 / 3) * (-z).exp()).sum(-1)
    torch.testing.assert_close(covariance(prior), expected, rtol=0, atol=1e-5)


def test_the_jitter_adds_to_the_spectrum():
    one, two = make(jitter=1e-8), make(jitter=1e-2)
    torch.testing.assert_close(
        two.spectrum() - one.spectrum(), torch.full_like(one.spectrum(), 0.01 - 1e-8)
    )
    assert FourierGPPrior(1, 60).jitter == 1e-2


def coefficients(prior, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    shape = (2, *prior.spectrum().shape)
    mean = torch.randn(shape, generator=generator, dtype=F64)
    return mean, scale * torch.randn(shape, generator=generator, dtype=F64) - 1


@pytest.mark.claim(
    94, "The divergence in closed form is the mean of log q - log p over samples of q", 0.01
)
def test_the_divergence_is_that_of_samples():
    prior = make(2, 20, min_lengthscale=5.0, lengthscale_init=6.0, jitter=0.05)
    mean, logstd = (x[0] for x in coefficients(prior))
    q, p = Normal(mean, logstd.exp()), Normal(0.0, prior.spectrum().sqrt())
    torch.manual_seed(0)
    a = q.sample((100_000,))
    sampled = (q.log_prob(a) - p.log_prob(a)).sum(-2).mean(0)
    torch.testing.assert_close(prior.kl(mean, logstd), sampled, rtol=0.01, atol=0)
    torch.testing.assert_close(prior.kl(mean, logstd), kl_divergence(q, p).sum(-2))


def test_the_divergence_has_the_gradient_of_finite_differences():
    prior = make(2, 6, min_lengthscale=3.0, lengthscale_init=3.0, jitter=0.01)
    mean, logstd = (x.requires_grad_() for x in coefficients(prior))
    assert torch.autograd.gradcheck(
        lambda m, s, _: prior.kl(m, s), (mean, logstd, prior.log_lengthscale)
    )


@pytest.mark.claim(94, "Samples of the coefficients have the kernel's covariance over time", None)
def test_samples_have_the_covariance_of_the_kernel():
    prior = make(2, 8, min_lengthscale=2.0, lengthscale_init=3.0)
    draw = torch.randn(20_000, *prior.spectrum().shape, generator=torch.Generator().manual_seed(0))
    z = prior.to_time(draw.double() * prior.spectrum().sqrt())
    assert_within_se(z[:, :, None, 0] * z[:, None, :, 0], rbf(8, 3.0), n_se=5)
    assert_within_se(z[..., 0] * z[..., 1], 0.0)


def test_paths_are_the_moments_of_samples():
    prior = make(2, 8, min_lengthscale=4.0, lengthscale_init=4.0)
    mean, logstd = (x[0] for x in coefficients(prior))
    paths = prior(mean, logstd)
    torch.manual_seed(0)
    z = prior.to_time(Normal(mean, logstd.exp()).sample((20_000,)))
    assert_within_se(z, paths.mean)
    assert_within_se((z - paths.mean).square(), paths.variance)
    torch.testing.assert_close(paths.kl, prior.kl(mean, logstd))


@pytest.mark.claim(
    94, "The length that maximises the prior density of 200 draws is the true one", 0.1
)
def test_lengths_are_learned_from_draws():
    true = make(2, 60, min_lengthscale=5.0, lengthscale_init=8.0, extension=0.8)
    draw = torch.randn(200, *true.spectrum().shape, generator=torch.Generator().manual_seed(0))
    a = (draw.double() * true.spectrum().sqrt()).detach()
    a = a.square().mean(0).sqrt()  # all that the density sees of the draws
    prior = make(2, 60, min_lengthscale=5.0, lengthscale_init=15.0, extension=0.8)
    optimizer = torch.optim.LBFGS(prior.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = prior.kl(a, torch.full_like(a, -30.0)).sum()  # the density, but for constants
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(
        prior.lengthscale.detach(), torch.full((2,), 8.0, dtype=F64), rtol=0.1, atol=0
    )


@pytest.mark.claim(94, "The work of the divergence is linear in the number of coefficients", None)
def test_the_divergence_is_of_linear_work():
    work = []
    for num_steps in (200, 400, 800):
        prior = make(num_steps=num_steps, extension=0.0, min_lengthscale=1.0)
        a = torch.zeros_like(prior.spectrum())
        with CountElements() as count:
            prior.kl(a, a)
        work.append(count.elements / len(a))
    assert max(work) < 1.02 * min(work)


def test_frequencies_below_the_spectrum_of_the_shortest_length_are_left_out():
    prior = make(num_steps=60, lengthscale_init=10.0, min_lengthscale=5.0)
    peak = prior.spectrum()[0, 0].item()
    shortest = (-((5.0 * prior.frequencies) ** 2) / 2).exp()
    assert (prior.period, len(prior.basis)) == (100, 39)
    assert shortest.min() >= 1e-8
    step = 2 * math.pi / prior.period
    assert math.exp(-((5.0 * (prior.frequencies.max() + step)) ** 2) / 2) < 1e-8
    assert peak == pytest.approx(math.sqrt(2 * math.pi) * 10, abs=1e-6)


def test_a_length_that_outgrows_the_circle_is_warned_of():
    prior = make(lengthscale_init=20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.check_extension()
        paper = make(lengthscale_init=30.0, extension=0.2)
        paper.check_extension()
    with torch.no_grad():
        prior.log_lengthscale.add_(0.1)
    with pytest.warns(UserWarning, match="outgrown"):
        prior.check_extension()
