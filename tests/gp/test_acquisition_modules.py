"""One-step acquisition functions against simulated observations and dense algebra."""

import numpy as np
import pytest
import torch

from tests.gp.gp_models import dense, problem
from torchzoo.gp import (
    CostAwareKG,
    EntropySearch,
    GPSurrogate,
    IntegratedEnvironment,
    KnowledgeGradient,
    NoisyExpectedImprovement,
    expected_improvement,
    gaussian,
    posterior_lines,
)
from torchzoo.testing import assert_within_se

NOISE = 0.05


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=1):
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(seed))


def moments(model, x):
    found = gaussian(model, x[:, None])
    return found.mean[:, 0, 0], found.variance[:, 0, 0].sqrt()


def simulated(x, y, at, points, draws=100_000, noise=NOISE):
    """Posterior means at points once y at one more point is there, by refitting, `(S, n)`."""
    now, covariance = dense(x, y, at, noise)
    spread = (covariance[0, 0] + noise).sqrt()
    new = now + spread * torch.randn(draws, 1, dtype=torch.float64, generator=seeded(9))
    everything = torch.cat([y.expand(draws, len(y)), new], 1)
    return dense(torch.cat([x, at]), everything, points, noise)[0]


@pytest.mark.claim(5, "Without noise noisy expected improvement is expected improvement", 1e-8)
@pytest.mark.parametrize("log", [False, True])
def test_no_noise(log):
    x, y, model = problem(noise=1e-13)
    at = rand(200, 2)
    mean, std = moments(model, at)
    expected = expected_improvement(mean, std, y.max())
    found = NoisyExpectedImprovement(model, x, log=log)(at[:, None])
    counts = expected > 1e-12
    assert counts.sum() > 50
    found = found.exp() if log else found
    torch.testing.assert_close(found[counts], expected[counts], rtol=1e-8, atol=0)


@pytest.mark.claim(5, "Noisy expected improvement is what refitting to a simulated y gains", 4.0)
def test_noisy_improvement_is_simulated():
    x, y, model = problem()
    mean, std = moments(model, rand(200, 2, seed=4))
    incumbent = dense(x, y, x, NOISE)[0].max()
    acquisition = NoisyExpectedImprovement(model, x)
    for at in (rand(2, 2, seed=2)[:1], rand(1, 2, seed=3), x[y.argmax()][None]):
        gain = simulated(x, y, at, torch.cat([x, at])).amax(1) - incumbent
        assert_within_se(gain, acquisition(at))
    at = rand(200, 2, seed=4)
    plug_in = expected_improvement(mean, std, y.max())
    assert (acquisition(at[:, None]) - plug_in).abs().max() > 0.02
    plug_in = expected_improvement(mean, std, incumbent)
    assert (acquisition(at[:, None]) - plug_in).abs().max() > 0.01


@pytest.mark.claim(5, "A mean above all evaluated ones is itself part of the improvement")
def test_the_first_part():
    x, y, model = problem(mean=5.0)
    far = torch.full((1, 1, 2), 30.0, dtype=torch.float64)
    ahead = 5.0 - dense(x, y, x, NOISE, 5.0)[0].max()
    assert ahead > 1
    found = NoisyExpectedImprovement(model, x)(far)
    assert found >= ahead
    logs = NoisyExpectedImprovement(model, x, log=True)(far)
    torch.testing.assert_close(logs.exp(), found)


@pytest.mark.claim(5, "No acquisition is below 0, and more points to report are worth more", 1e-10)
def test_order():
    x, y, model = problem()
    at, grid = rand(60, 1, 2), torch.cat([x, rand(60, 1, 2)[:, 0], rand(20, 2, seed=8)])
    noisy, gradient = NoisyExpectedImprovement(model, x), KnowledgeGradient(model, grid)
    entropy = EntropySearch(model, grid[:20], num_samples=64, generator=seeded())
    for acquisition in (noisy, gradient, entropy):
        assert (acquisition(at) >= -1e-10).all()
    best_grid, best_x = dense(x, y, grid, NOISE)[0].max(), dense(x, y, x, NOISE)[0].max()
    assert (gradient(at) + best_grid >= noisy(at) + best_x - 1e-10).all()


@pytest.mark.claim(5, "The discrete knowledge gradient is what refitting gains over the set", 4.0)
def test_knowledge_gradient_is_simulated():
    x, y, model = problem()
    grid, at = rand(15, 2, seed=5), rand(1, 2, seed=6)
    gain = simulated(x, y, at, grid).amax(1) - dense(x, y, grid, NOISE)[0].max()
    acquisition = KnowledgeGradient(model, grid)
    assert_within_se(gain, acquisition(at))
    torch.testing.assert_close(KnowledgeGradient(model, grid, log=True)(at), acquisition(at).log())
    costly = CostAwareKG(model, grid, lambda x: 2 + x[..., 0])
    torch.testing.assert_close(costly(at), acquisition(at) / (2 + at[:, 0].sum()))
    logs = CostAwareKG(model, grid, lambda x: 2 + x[..., 0], log=True)
    torch.testing.assert_close(logs(at), costly(at).log())


@pytest.mark.claim(5, "Gradients of simulated knowledge gradients are unbiased", 4.0)
def test_stochastic_gradient():
    _, _, model = problem()
    acquisition = KnowledgeGradient(model, rand(15, 2, seed=5))
    at = rand(50, 2, seed=6)
    at = at[acquisition(at[:, None]).argmax()][None]
    z = torch.randn(2000, dtype=torch.float64, generator=seeded(3))
    slopes = []
    for part in z.split(100):
        where = at.expand(100, 1, 2).clone().requires_grad_()
        values = acquisition.simulate(where, part).diagonal()
        slopes += torch.autograd.grad(values.sum(), where)
    step = 1e-5 * torch.eye(2, dtype=torch.float64)
    expected = (acquisition((at + step)[:, None]) - acquisition((at - step)[:, None])) / 2e-5
    assert_within_se(torch.cat(slopes)[:, 0], expected)
    assert expected.abs().min() > 1e-3


def test_gradients_by_position():
    """Through the model: by x, of all differentiable ones."""
    x, _, model = problem()
    at = rand(3, 1, 2, seed=12).requires_grad_()
    for acquisition in (
        NoisyExpectedImprovement(model, x),
        KnowledgeGradient(model, rand(15, 2, seed=5), log=True),
    ):
        assert torch.autograd.gradcheck(acquisition, at)


@pytest.mark.claim(
    5, "The posterior of an integral over environments is that of its quadrature", 1e-8
)
def test_integrated_environment():
    """Against the Gaussian process of the average itself, whose kernel is an average."""
    x, y, model = problem(9)
    w, p = rand(4, 1, seed=31), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    average = IntegratedEnvironment(model, w, p)
    at = rand(3, 1, seed=32)
    even = [IntegratedEnvironment(model, w, q) for q in (None, torch.full_like(p, 0.25))]
    means = [each.posterior(at).mean for each in even]
    torch.testing.assert_close(*means, rtol=0, atol=1e-12)
    pairs = torch.stack([torch.cat([a, b]) for a in at for b in w])
    weight = torch.zeros(3, 12, dtype=torch.float64)
    for i in range(3):
        weight[i, 4 * i : 4 * i + 4] = p
    mean, covariance = dense(x, y, pairs, NOISE)
    found = average.posterior(at)
    torch.testing.assert_close(found.mean[:, 0], weight @ mean, rtol=0, atol=1e-8)
    expected = weight @ covariance @ weight.mT
    torch.testing.assert_close(found.covariance[0], expected, rtol=0, atol=1e-8)
    observe = rand(1, 2, seed=33)
    gain = (simulated(x, y, observe, pairs) @ weight.mT).amax(1) - (weight @ mean).max()
    assert_within_se(gain, KnowledgeGradient(average, at)(observe))
    with pytest.raises(ValueError, match="model: expected"):
        NoisyExpectedImprovement(average, at)


def test_batches_and_kinds_of_models():
    """Any batch is one by one; a surrogate's scaling is undone; noise may be given."""
    x, y, model = problem()
    at = rand(2, 3, 1, 2, seed=7)
    for acquisition in (
        NoisyExpectedImprovement(model, x),
        KnowledgeGradient(model, x),
        EntropySearch(model, x, num_samples=32, generator=seeded()),
    ):
        one = torch.stack([acquisition(a) for a in at.flatten(0, 1)]).reshape(2, 3)
        torch.testing.assert_close(acquisition(at), one)
        assert acquisition(at[:0]).shape == (0, 3)
    surrogate = GPSurrogate(bounds=torch.tensor([[-1.0, 0.0], [1.0, 2.0]])).fit(x, 100 * y[:, None])
    scaled = NoisyExpectedImprovement(surrogate, x)(at)
    lines = posterior_lines(surrogate, x, at[..., 0, :], noise=surrogate.posterior(x).noise[0, 0])
    torch.testing.assert_close(lines.slope, posterior_lines(surrogate, x, at[..., 0, :]).slope)
    assert scaled.mean() > 0.1
    less = NoisyExpectedImprovement(model, x, noise=0.0)(at)
    assert (less > NoisyExpectedImprovement(model, x)(at)).all()
    assert np.isfinite(less.numpy()).all()


def test_errors():
    x, y, model = problem()
    for make in (
        lambda: NoisyExpectedImprovement(model, x[0]),
        lambda: KnowledgeGradient(model, x[:0]),
        lambda: EntropySearch(model, x, num_nodes=0),
        lambda: KnowledgeGradient(model, x)(x[None]),
        lambda: IntegratedEnvironment(model, x[:, 0]),
        lambda: IntegratedEnvironment(model, x, y[:2]),
        lambda: gaussian(object(), x),
        lambda: gaussian(GPSurrogate().fit(x, x), x),
    ):
        with pytest.raises(ValueError, match=": expected"):
            make()
