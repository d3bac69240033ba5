"""State-space processes against dense Gaussian process algebra and gpytorch."""

import math

import gpytorch
import pytest
import torch

from torchzoo.gp import StateSpaceGP
from torchzoo.gp.state_space import MATERN, MaternSDE, read_chain, run_chain

NU = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def kernel(name, x1, x2, length=0.7, variance=1.3):
    """The covariance of gpytorch."""
    made = gpytorch.kernels.MaternKernel(nu=NU[name]).double()
    made.lengthscale = double(length)
    return variance * made(x1[:, None], x2[:, None]).to_dense().detach()


def scattered(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(n, generator=generator, dtype=torch.float64)


@pytest.mark.claim(
    45, "The covariance of a chain made from A and Q is the Matérn kernel's", tolerance=1e-10
)
@pytest.mark.parametrize("name", MATERN)
def test_chain_covariance_is_the_kernel(name):
    t = scattered(9).sort().values
    sde = MaternSDE(name, double(0.7)[0], double(1.3)[0])
    step, noise = sde.step(t.diff())
    cov = sde.stationary()
    blocks = {(0, 0): cov}
    for n in range(1, 9):
        for s in range(n):
            blocks[s, n] = blocks[s, n - 1] @ step[n - 1].mT
        cov = step[n - 1] @ cov @ step[n - 1].mT + noise[n - 1]
        blocks[n, n] = cov
        torch.testing.assert_close(cov, sde.stationary(), atol=1e-10, rtol=0)
    expected = kernel(name, t, t)
    for (s, n), block in blocks.items():
        assert abs(block[0, 0] - expected[s, n]) < 1e-10


@pytest.mark.parametrize("name", MATERN)
def test_step_is_the_matrix_exponential(name):
    sde = MaternSDE(name, double(0.7)[0], double(1.3)[0])
    order = MATERN[name]
    rate = math.sqrt(2 * order + 1) / 0.7
    drift = torch.diag(torch.ones(order, dtype=torch.float64), 1)
    for j in range(order + 1):
        drift[-1, j] = -math.comb(order + 1, j) * rate ** (order + 1 - j)
    step, noise = sde.step(double(0.31))
    torch.testing.assert_close(step[0], torch.linalg.matrix_exp(0.31 * drift))
    stationary = sde.stationary()
    rest = drift @ stationary + stationary @ drift.mT  # Lyapunov: noise enters the last only
    rest[-1, -1] = 0
    assert rest.abs().max() < 1e-9 * rate ** (2 * order + 1)
    assert torch.linalg.eigvalsh(noise[0]).min() > 0


def test_copies_are_independent():
    one = MaternSDE("matern32", double(0.7)[0], double(1.3)[0])
    two = one._replace(copies=2)
    for single, both in zip(one.step(double(0.2)), two.step(double(0.2)), strict=True):
        torch.testing.assert_close(both[0], torch.block_diag(single[0], single[0]))
    torch.testing.assert_close(two.readout(), torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]]).double())


def dense(name, t, y, at, noise=0.2):
    """Posterior mean and variance, and log evidence."""
    seen = ~y.isnan()
    t, y = t[seen], y[seen]
    total = kernel(name, t, t) + noise * torch.eye(len(t)).double()
    cross = kernel(name, at, t)
    gain = torch.linalg.solve(total, cross.mT).mT
    log_prob = torch.distributions.MultivariateNormal(torch.zeros(len(t)).double(), total).log_prob(
        y
    )
    return gain @ y, 1.3 - (gain * cross).sum(-1), log_prob


@pytest.mark.claim(
    45,
    "Filter and smoother give the dense posterior and evidence, at irregular times with repeats "
    "and missing data, on, between and beyond the times, in sequence and by scan",
    tolerance=1e-8,
)
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", MATERN)
def test_regression_is_dense(name, parallel):
    t = scattered(120)
    t[5] = t[9] = t[17]
    y = (2 * t).sin() + 0.3 * (9 * t).cos()
    y[[3, 9, 40]] = math.nan
    at = torch.cat([double(-1.0, -0.01, 5.5), t[:20], scattered(40, seed=1)])
    gp = StateSpaceGP(
        t, y, kernel=name, lengthscale=0.7, variance=1.3, noise=0.2, parallel=parallel
    )
    mean, variance, log_prob = dense(name, t, y, at)
    found = gp(at)
    torch.testing.assert_close(found.mean, mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(found.variance, variance, atol=1e-8, rtol=0)
    torch.testing.assert_close(gp.log_likelihood(), log_prob, atol=1e-8, rtol=0)


def test_batch_is_a_loop():
    t = scattered(15)
    y = torch.stack([t.sin(), t.cos()])
    y[1, 3] = math.nan
    gp = StateSpaceGP(t, y, noise=0.2)
    at = scattered(6, seed=1).reshape(2, 3)
    for i in range(2):
        one = StateSpaceGP(t, y[i], noise=0.2)
        torch.testing.assert_close(gp(at).mean[i], one(at).mean)
        torch.testing.assert_close(gp(at).variance[i], one(at).variance)
        torch.testing.assert_close(gp.log_likelihood()[i], one.log_likelihood())


def test_fit_finds_the_maximum():
    t = scattered(60)
    noise = torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gp = StateSpaceGP(t, (3 * t).sin() + 0.2 * noise, noise=0.5)
    before = gp.log_likelihood()
    assert gp.fit().converged
    assert gp.log_likelihood() > before + 10
    slopes = torch.autograd.grad(gp.log_likelihood(), list(gp.parameters()))
    assert max(abs(slope) for slope in slopes) < 1e-3


def test_reading_far_away_gives_the_prior():
    sde = MaternSDE("matern32", double(0.7)[0], double(1.3)[0], 2)
    chain = run_chain(sde, double(0.0), torch.ones(1, 2).double(), torch.eye(2)[None].double())
    mean, cov = read_chain(sde, chain, double(-40.0, 40.0))
    torch.testing.assert_close(mean, torch.zeros(2, 2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(cov, 1.3 * torch.eye(2).double().expand(2, 2, 2))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("t: ", {"t": [0.0, math.inf]}),
        ("t: ", {"t": []}),
        ("y: ", {"y": [1.0]}),
        ("kernel: ", {"kernel": "rbf"}),
        ("noise: ", {"noise": 0.0}),
    ],
)
def test_errors(message, options):
    with pytest.raises(ValueError, match=f"^{message}"):
        StateSpaceGP(**{"t": [0.0, 1.0], "y": [1.0, 2.0], **options})
