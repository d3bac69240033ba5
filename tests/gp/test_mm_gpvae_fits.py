"""What the multi-modal autoencoder finds in simulated data whose latents are known."""

import math

import pytest
import torch

from torchzoo.gp import (
    MMGPVAE,
    FourierGPPrior,
    GaussianLikelihood,
    PoissonLikelihood,
    PoissonLoadingDecoder,
    StepMLP,
)

STEPS = 30


def paths(trials, count, generator):
    """Gaussian processes of length 6, `(trials, STEPS, count)`."""
    t = torch.arange(float(STEPS))
    covariance = (-((t[:, None] - t) ** 2) / 72).exp() + 1e-4 * torch.eye(STEPS)
    root = torch.linalg.cholesky(covariance)
    return root @ torch.randn(trials, STEPS, count, generator=generator)


def fit(model, data, steps=300):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-model.elbo(data).mean()).backward()
        optimizer.step()
        schedule.step()


def prior(latents):
    return FourierGPPrior(latents, STEPS, min_lengthscale=4.0, lengthscale_init=8.0)


@pytest.mark.claim(
    94, "As GP factor analysis it finds the loadings' true subspace in 100 trials, in degrees", 10
)
def test_factor_analysis_finds_the_subspace():
    generator = torch.Generator().manual_seed(0)
    weights = 0.5 * torch.randn(20, 2, generator=generator)
    rates = (paths(100, 2, generator) @ weights.mT).exp()
    counts = torch.poisson(rates, generator)
    torch.manual_seed(0)
    decoder = PoissonLoadingDecoder(2, 20)
    decoder.init_rates(counts)
    model = MMGPVAE(
        {"spikes": (StepMLP([20, 20, 4]), decoder, PoissonLikelihood())},
        num_private={"spikes": 2},
        num_shared=0,
        num_steps=STEPS,
        prior=prior(2),
    )
    fit(model, {"spikes": counts})
    bases = [torch.linalg.qr(w.detach()).Q for w in (weights, decoder.loading.weight)]
    cosines = torch.linalg.svdvals(bases[0].mT @ bases[1])
    assert math.degrees(math.acos(cosines.min().clamp_max(1))) < 10


def determination(x, y):
    """R^2 of the affine map from latents `(..., P)` to one of the true ones."""
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1)
    rest = y.flatten() - x @ torch.linalg.lstsq(x, y.flatten()[:, None]).solution[:, 0]
    return 1 - (rest.var() / y.var()).item()


@pytest.mark.claim(
    94,
    "Each block finds its own latents up to sign and scale, and the shared one says less than 0.2 "
    "of the variance of private ones",
    0.2,
)
def test_latents_are_identified():
    generator = torch.Generator().manual_seed(1)
    z = paths(100, 3, generator)  # of "a", shared, of "b"
    loadings = torch.randn(2, 20, 2, generator=generator)
    counts = torch.poisson((0.5 * z[..., :2] @ loadings[0].mT).exp(), generator)
    values = z[..., 1:] @ loadings[1].mT
    values = values + torch.randn(values.shape, generator=generator)
    torch.manual_seed(0)
    model = MMGPVAE(
        {
            "a": (StepMLP([20, 20, 4]), PoissonLoadingDecoder(2, 20), PoissonLikelihood()),
            "b": (StepMLP([20, 20, 4]), PoissonLoadingDecoder(2, 20), GaussianLikelihood()),
        },
        num_private={"a": 1, "b": 1},
        num_shared=1,
        num_steps=STEPS,
        prior=prior(3),
    )
    data = {"a": counts, "b": values}
    fit(model, data)
    with torch.no_grad():
        found = model.infer(data).mean
    own = [determination(found[..., [k]], z[..., k]) for k in range(3)]
    leaked = [determination(found[..., [1]], z[..., k]) for k in (0, 2)]
    assert min(own) > 0.8
    assert max(leaked) < 0.2
