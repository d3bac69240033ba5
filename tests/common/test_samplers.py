"""Hamiltonian Monte Carlo against Gaussians, its dynamics against physics, diagnostics by hand."""

import math

import pytest
import torch

from torchzoo.common.samplers import (
    effective_sample_size,
    hmc,
    leapfrog,
    position,
    split_rhat,
)
from torchzoo.testing import assert_within_se


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(dim=10, condition=50.0):
    """A rotated Gaussian: its log density, mean and covariance."""
    options = {"dtype": torch.float64, "generator": seeded(1)}
    basis = torch.linalg.qr(torch.randn(dim, dim, **options))[0]
    precision = basis * torch.logspace(0, math.log10(condition), dim, dtype=torch.float64) @ basis.T
    mean = torch.arange(dim, dtype=torch.float64) / 5
    return (
        lambda x: -((x - mean) @ precision * (x - mean)).sum(-1) / 2,
        mean,
        torch.linalg.inv(precision),
    )


def assert_moments(samples, mean, covariance):
    """Chains are independent draws of their own averages."""
    centred = samples - mean
    assert_within_se(centred.mean(1), 0.0)
    assert_within_se((centred[..., None] * centred[..., None, :]).mean(1), covariance)


@pytest.mark.claim(
    4, "Hamiltonian Monte Carlo has the mean and covariance of a Gaussian of condition 50", 4.0
)
@pytest.mark.parametrize(
    ("options", "most"), [({"num_leapfrog": 9}, 0.9), ({"path_length": 1.2}, 0.95)]
)
def test_gaussian(options, most):
    """The rate is above its target as the mean of log step sizes is below their best."""
    density, mean, covariance = gaussian()
    start = mean + torch.randn(150, 10, dtype=torch.float64, generator=seeded())
    chain = hmc(
        density, start, num_samples=100, burn_in=200, step_size=0.02, generator=seeded(), **options
    )
    assert_moments(chain.samples, mean, covariance)
    assert 0.7 < chain.accept_rate.mean() < most
    torch.testing.assert_close(chain.log_density, density(chain.samples))


@pytest.mark.claim(4, "Without the Metropolis test the covariance of samples is wrong")
def test_metropolis_is_needed():
    density, mean, covariance = gaussian()
    at = position(density, mean.expand(150, 10))
    generator, samples = seeded(), []
    for _ in range(300):
        momentum = torch.randn(150, 10, dtype=torch.float64, generator=generator)
        at, _ = leapfrog(density, at, momentum, step_size=0.26, num_steps=5)
        samples.append(at.x)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_moments(torch.stack(samples[100:], 1), mean, covariance)


@pytest.mark.claim(4, "Leapfrog steps are reversible", tolerance=1e-10)
def test_reversible():
    density = lambda x: -(x**4).sum(-1) - x.prod(-1).cos()  # noqa: E731
    options = {"dtype": torch.float64, "generator": seeded()}
    x, momentum = torch.randn(5, 3, **options), torch.randn(5, 3, **options)
    mass = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    counts, steps = torch.tensor([3, 7, 1, 10, 5]), torch.full((5,), 0.05, dtype=torch.float64)
    settings = {"step_size": steps, "num_steps": counts, "mass": mass}
    end, p = leapfrog(density, position(density, x), momentum, **settings)
    back, p = leapfrog(density, end, -p, **settings)
    assert (end.x - x).abs().amax(-1).min() > 0.01
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(p, -momentum, rtol=0, atol=1e-10)
    for row in range(5):
        alone, _ = leapfrog(
            density, position(density, x[row]), momentum[row],
            step_size=0.05, num_steps=int(counts[row]), mass=mass,
        )  # fmt: skip
        torch.testing.assert_close(alone.x, end.x[row])


@pytest.mark.claim(4, "The energy error of leapfrog steps is of second order", tolerance=0.1)
@pytest.mark.parametrize("mass", [1.0, 3.0])
def test_energy(mass):
    density = lambda x: -x.square().sum(-1) / 2 - x.cos().sum(-1)  # noqa: E731
    start = position(density, torch.tensor([[1.0, -0.4]], dtype=torch.float64))
    momentum = torch.tensor([[0.3, 0.9]], dtype=torch.float64)

    def error(steps):
        end, p = leapfrog(density, start, momentum, step_size=1 / steps, num_steps=steps, mass=mass)
        energy = -end.log_density + (p * p / mass).sum(-1) / 2
        return abs(float(energy + start.log_density - (momentum**2 / mass).sum(-1) / 2))

    assert math.log2(error(20) / error(40)) == pytest.approx(2, abs=0.1)


@pytest.mark.claim(4, "A rejected proposal leaves position, density and gradient as they were")
def test_rejection():
    """Steps far too long: hardly anything is accepted, and what stays is bitwise the same."""
    density, mean, _ = gaussian()
    visited = []

    def spy(x):
        visited.append(x.detach().clone())
        return density(x)

    chain = hmc(
        spy, mean.expand(4, 10) + 0.3, num_samples=40, burn_in=0, step_size=0.27, num_leapfrog=1,
        adapt=False, generator=seeded(),
    )  # fmt: skip
    moved = (chain.samples.diff(dim=1) != 0).any(-1)
    assert 0 < moved.double().mean() < 0.6
    assert ((chain.log_density.diff(dim=1) != 0) == moved).all()
    assert (chain.accept_rate - moved.double().mean(1)).abs().max() <= 1 / 40
    assert (chain.step_size == 0.27).all()
    generator, at = seeded(), position(density, mean.expand(4, 10) + 0.3)
    for index in range(40):  # the end of each trajectory starts at the gradient of what was kept
        momentum = torch.empty(4, 10, dtype=torch.float64).normal_(generator=generator)
        end, _ = leapfrog(density, at, momentum, step_size=0.27, num_steps=1)
        torch.testing.assert_close(visited[index + 1], end.x)
        torch.empty(4, dtype=torch.float64).uniform_(generator=generator)
        at = position(density, chain.samples[:, index])


def test_mass_preconditions():
    """With the precision as mass all coordinates mix alike."""
    scales = torch.tensor([1.0, 20.0, 400.0], dtype=torch.float64)
    density = lambda x: -(x * x * scales).sum(-1) / 2  # noqa: E731
    start = torch.zeros(100, 3, dtype=torch.float64)
    settings = {"num_samples": 100, "burn_in": 100, "num_leapfrog": 4}
    even = hmc(density, start, step_size=0.1, mass=scales, generator=seeded(), **settings)
    rough = hmc(density, start, step_size=0.1, generator=seeded(), **settings)
    assert even.ess.min() > 5 * rough.ess.min()
    assert_moments(even.samples, torch.zeros(3).double(), (1 / scales).diag())
    assert (even.step_size > 5 * rough.step_size).all()


def test_problems_side_by_side():
    """Dimensions before the chains are problems of their own, with diagnostics of their own."""
    centre = torch.tensor([[0.0], [4.0]], dtype=torch.float64)
    start = torch.zeros(2, 3, 1, dtype=torch.float64)
    start[1, 2] = -30.0
    chain = hmc(
        lambda x: -(x - centre[:, None]).square().sum(-1) / 2, start,
        num_samples=100, burn_in=0, step_size=0.01, num_leapfrog=3, generator=seeded(),
    )  # fmt: skip
    assert chain.samples.shape == (2, 3, 100, 1)
    assert chain.rhat.shape == chain.ess.shape == (2, 1)
    assert chain.rhat[1] > 2 * chain.rhat[0]
    path = hmc(
        lambda x: -x.square().sum(-1) / 2, start[:1], num_samples=2, burn_in=3, step_size=0.01,
        path_length=5.0, generator=seeded(),
    )  # fmt: skip
    assert path.samples.shape == (1, 3, 2, 1)


def test_long_paths_are_halved():
    calls = []

    def density(x):
        calls.append(1)
        return -x.square().sum(-1) / 2

    options = {"num_samples": 1, "burn_in": 0, "adapt": False, "generator": seeded()}
    for path, count in ((1.0, 10), (1.01, 11), (20.0, 200), (20.1, 101), (100.0, 200)):
        calls.clear()
        hmc(
            density,
            torch.zeros(1, 1, dtype=torch.float64),
            step_size=0.1,
            path_length=path,
            **options,
        )
        assert len(calls) == count + 1


@pytest.mark.claim(4, "Split R-hat and effective sample sizes are right for autoregressions", 0.15)
def test_diagnostics():
    """An autoregression of coefficient a has n (1 - a) / (1 + a) effective samples."""
    noise = torch.randn(8, 4000, 3, dtype=torch.float64, generator=seeded())
    a = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    rows = [noise[:, 0] / (1 - a * a).sqrt()]
    for index in range(1, 4000):
        rows.append(a * rows[-1] + noise[:, index])
    chain = torch.stack(rows, 1)
    ratio = effective_sample_size(chain) / 32000 / ((1 - a) / (1 + a))
    assert (ratio - 1).abs().max() < 0.15
    assert (split_rhat(chain) - 1).abs().max() < 0.01
    drift = chain + torch.linspace(0, 8, 4000, dtype=torch.float64)[:, None]
    assert (split_rhat(drift) > 1.1).all()  # seen by the halves only
    four = torch.tensor([[0.0, 2.0, 3.0, 5.0]], dtype=torch.float64)[..., None]
    assert float(split_rhat(four)) == pytest.approx(math.sqrt((0.5 * 2 + 4.5) / 2))
    assert split_rhat(four[:, :3]).isnan()
    assert effective_sample_size(four[:, :3]).isnan()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"x0": torch.zeros(3)}, "x0"),
        ({"x0": torch.zeros(1, 3, dtype=torch.int64)}, "x0"),
        ({"x0": torch.full((1, 3), math.nan)}, "x0"),
        ({"num_samples": 0}, "num_samples"),
        ({"burn_in": -1}, "burn_in"),
        ({"step_size": 0.0}, "step_size"),
        ({"num_leapfrog": 0}, "num_leapfrog"),
        ({"num_leapfrog": None}, "num_leapfrog"),
        ({"path_length": 1.0}, "num_leapfrog"),
        ({"num_leapfrog": None, "path_length": 0.0}, "path_length"),
        ({"target_accept": 1.0}, "target_accept"),
        ({"mass": torch.ones(2)}, "mass"),
        ({"mass": torch.zeros(3)}, "mass"),
    ],
)
def test_bad_options(options, name):
    good = {"num_samples": 2, "burn_in": 0, "step_size": 0.1, "num_leapfrog": 2}
    start = options.pop("x0", torch.zeros(1, 3))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        hmc(lambda x: -x.square().sum(-1), start, **(good | options))
