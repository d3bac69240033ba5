"""The sampler against exact stationary distributions and a plain loop over its equations."""

import copy
import inspect
import math

import pytest
import torch

from torchzoo.gp import AdaptiveSGHMC, sghmc

SCALES = torch.tensor([1.0, 1e-2, 1e-3], dtype=torch.float64)
CORRELATION = torch.tensor([[1.0, 0.8], [0.8, 2.0]], dtype=torch.float64)


def covariances(noise_estimate, scales, kept):
    """Covariances of correlated normal distributions of several scales, found by the sampler."""
    generator = torch.Generator().manual_seed(0)
    precision = torch.linalg.inv(CORRELATION)
    start = scales[:, None, None] * torch.randn(
        len(scales), 300, 2, dtype=torch.float64, generator=generator
    )

    def potential(x):
        x = x / scales[:, None, None]
        return ((x @ precision) * x).sum(-1) / 2

    draws = sghmc(
        potential,
        start,
        num_samples=(1000 + kept) // 20,
        burn_in=500,
        keep_every=20,
        mdecay=0.02,
        noise_estimate=noise_estimate,
        generator=generator,
    )[50:]
    draws = draws / scales[:, None, None]
    return torch.einsum("nsci,nscj->sij", draws, draws) / (len(draws) * 300)


@pytest.mark.claim(
    13,
    "Samples of correlated normal distributions of scales 1, 0.01 and 0.001 have their covariances",
    tolerance=0.1,
)
def test_covariances():
    found = covariances(0.0, SCALES, 2000)
    scale = CORRELATION.diagonal().sqrt()
    assert ((found - CORRELATION) / torch.outer(scale, scale)).abs().max() < 0.1
    spoilt = covariances(1.0, SCALES[2:], 500)
    assert spoilt[0, 0, 0] < 0.8


@pytest.mark.claim(
    13,
    "With scales held the stationary variance is that of the recursion, whatever the step size",
    tolerance=None,
)
@pytest.mark.parametrize(("lr", "mdecay"), [(1.0, 0.5), (0.5, 0.1)])
def test_stationary_variance(lr, mdecay):
    curvature = torch.tensor([1.0, 2.0], dtype=torch.float64)
    chains = 40000
    found = sghmc(
        lambda x: (curvature * x.square()).sum(-1) / 2,
        torch.zeros(chains, 2, dtype=torch.float64),
        num_samples=1,
        burn_in=0,
        keep_every=120,
        lr=lr,
        mdecay=mdecay,
        generator=torch.Generator().manual_seed(0),
    )
    a = lr**2 * curvature
    expected = (1 + a / (4 - 2 * mdecay - a)) / curvature
    error = found[0].square().mean(0) / expected - 1
    assert error.abs().max() < 4 * math.sqrt(2 / chains)


def test_step_against_a_loop():
    lr, c, burn_in, estimate = 0.3, 0.2, 4, 0.5
    x = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(3)
    sampler = AdaptiveSGHMC(
        [x], lr, c, burn_in, noise_estimate=estimate, generator=torch.Generator().manual_seed(3)
    )
    states = [[value, 0.0, 1.0, 1.0, 1.0] for value in x.tolist()]
    for step in range(7):
        x.grad = 4 * x.detach() ** 3
        sampler.step()
        draws = torch.empty(2, dtype=torch.float64).normal_(generator=generator).tolist()
        for state, draw in zip(states, draws, strict=True):
            at, v, tau, mean, square = state
            g = 4 * at**3
            if step < burn_in:
                rate = 1 / (tau + 1)
                tau = tau - tau * mean**2 / square + 1
                mean, square = mean + rate * (g - mean), square + rate * (g**2 - square)
            m = 1 / math.sqrt(square)
            variance = max(2 * lr**2 * c * m - estimate * lr**4, 1e-16)
            v = v - lr**2 * m * g - c * v + math.sqrt(variance) * draw
            state[:] = at + v, v, tau, mean, square
        torch.testing.assert_close(x.detach(), torch.tensor([s[0] for s in states]).double())


def test_scales_stand_still_after_burn_in_and_state_resumes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    sampler = AdaptiveSGHMC([x], burn_in=3, generator=generator)

    def move(sampler, x, steps):
        for _ in range(steps):
            x.grad = x.detach().clone()
            sampler.step()

    assert sampler.defaults == {"lr": 0.01, "mdecay": 0.05, "burn_in": 3, "noise_estimate": 0.0}
    plain = inspect.signature(sghmc).parameters
    for name in ("lr", "mdecay", "noise_estimate"):
        assert plain[name].default == sampler.defaults[name]
    move(sampler, x, 3)
    frozen = sampler.state[x]["mean_square"].clone()
    assert (frozen != 1).all()
    move(sampler, x, 2)
    assert torch.equal(sampler.state[x]["mean_square"], frozen)
    twin_x = x.detach().clone().requires_grad_()
    twin = AdaptiveSGHMC([twin_x], burn_in=3, generator=torch.Generator())
    twin.generator.set_state(generator.get_state())
    twin.load_state_dict(copy.deepcopy(sampler.state_dict()))
    move(sampler, x, 2)
    move(twin, twin_x, 2)
    assert torch.equal(x, twin_x)


def test_what_is_kept():
    seen = []

    def potential(position):
        seen.append({name: x.detach().clone() for name, x in position.items()})
        return sum(x.square().sum() for x in position.values())

    torch.manual_seed(0)
    state = torch.get_rng_state()
    start = {"a": torch.ones(2, 3), "b": torch.zeros(2)}
    draws = sghmc(
        potential, start, num_samples=3, burn_in=4, keep_every=2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(start["a"], torch.ones(2, 3))
    assert len(seen) == 10
    for name in start:
        assert torch.equal(draws[name][:2], torch.stack([seen[6][name], seen[8][name]]))
        assert draws[name].shape == (3, *start[name].shape)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"mdecay": 1.5},
        {"burn_in": -1},
        {"noise_estimate": -1.0},
        {"keep_every": 0},
        {"num_samples": 0},
    ],
)
def test_wrong_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: .*got"):
        sghmc(lambda x: x.sum(), torch.zeros(1), **{"num_samples": 1, **options})


def test_divergence_is_told():
    with pytest.raises(RuntimeError, match="lr 10"):
        sghmc(lambda x: (x**4).sum(), torch.ones(3), num_samples=1, burn_in=0, lr=10.0)
