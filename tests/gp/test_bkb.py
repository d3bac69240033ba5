"""The bandit's posterior, widths and rounds against exact Gaussian processes and dense algebra."""

import math
import statistics

import gpytorch
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from torchzoo.gp import BKB, BudgetedKernelBandit
from torchzoo.testing.work import CountElements


def points(n, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, d, dtype=torch.float64, generator=generator)


def rbf(a, b):
    return (-torch.cdist(a, b).square() / (2 * 0.2**2)).exp()


def linear(a, b):
    return a @ b.mT


def bandit(kernel=rbf, seed=0, **options):
    return BKB(kernel, generator=torch.Generator().manual_seed(seed), **options)


def pulled(arms, count, seed=0, **options):
    """A bandit that was told about arms pulled at random; all of them are inducing points."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(arms), (count,), generator=generator)
    y = (5 * arms[index]).sin().sum(-1) + torch.randn(count, generator=generator).double()
    found = bandit(seed=seed, **options)
    found.initialize(arms, index, y)
    return found


def with_inducing(found, index):
    """Change the inducing points by way of the state."""
    index = torch.as_tensor(index, dtype=torch.int64)
    columns = found.kernel(found.arms, found.arms[index])
    found.load_state_dict(found.state_dict() | {"inducing_index": index, "columns": columns})
    return found


def dense(found, x, correct=True):
    """Mean and variance by their formulas, on stacked rows, in pseudo-inverses."""
    lam, s = found.lam, found.arms[found.inducing_index]
    rows = found.arms[found.pulled_index]
    values, vectors = torch.linalg.eigh(rbf(s, s))
    root = vectors @ (values.rsqrt()[:, None] * vectors.mT)
    z, zx = rbf(rows, s) @ root, rbf(x, s) @ root
    v = z.mT @ z + lam * torch.eye(len(s), dtype=z.dtype)
    mean = zx @ torch.linalg.solve(v, z.mT @ found.pulled_y)
    variance = (zx @ torch.linalg.inv(v) * zx).sum(-1)
    return mean, variance + (1 - zx.square().sum(-1)) / lam if correct else variance


def effective_dimension(found):
    k = rbf(found.arms[found.pulled_index], found.arms[found.pulled_index])
    ridge = found.lam * torch.eye(len(k), dtype=k.dtype)
    return torch.linalg.solve(k + ridge, k).trace()


KERNELS = {
    "rbf": (gpytorch.kernels.RBFKernel(), kernels.RBF(0.3)),
    "matern": (gpytorch.kernels.MaternKernel(nu=1.5), kernels.Matern(0.3, nu=1.5)),
    "linear": (linear, kernels.DotProduct(0.0)),
}


@pytest.mark.claim(
    49,
    "With all pulled points as inducing points the posterior is that of an exact Gaussian process",
    tolerance=1e-8,
)
@pytest.mark.parametrize("name", KERNELS)
def test_all_points_inducing_is_exact(name):
    kernel, peer = KERNELS[name]
    if isinstance(kernel, gpytorch.kernels.Kernel):
        kernel = kernel.double()
        kernel.lengthscale = torch.tensor(0.3, dtype=torch.float64)
    arms, x = points(60), points(9, seed=5)
    found = pulled(arms, 40, kernel=kernel, lam=0.3)
    exact = GaussianProcessRegressor(peer, alpha=0.3, optimizer=None)
    exact.fit(arms[found.pulled_index].numpy(), found.pulled_y.numpy())
    for at in (arms, x):
        mean, std = (torch.from_numpy(part) for part in exact.predict(at.numpy(), return_std=True))
        ours = found.posterior(None if at is arms else at)
        torch.testing.assert_close(ours.mean.detach(), mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(ours.variance.detach(), std**2 / 0.3, rtol=0, atol=1e-8)
        plain = found.posterior(at, scaled=False).variance.detach()
        torch.testing.assert_close(plain, std**2, rtol=0, atol=1e-8)


@pytest.mark.parametrize("inducing", [[3], [0, 7, 11, 30], list(range(20))])
def test_posterior_of_a_sketch(inducing):
    found = with_inducing(pulled(points(40), 60, lam=0.7), inducing)
    x = points(8, seed=3)
    for ours, at in ((found.posterior(), found.arms), (found.posterior(x), x)):
        mean, variance = dense(found, at)
        torch.testing.assert_close(ours.mean, mean, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(ours.variance, variance, rtol=1e-7, atol=1e-8)
    covariance = found.covariance(x)
    torch.testing.assert_close(covariance.diagonal(), 0.7 * found.posterior(x).variance)
    pair = torch.stack([x[:2], x[2:4]])
    torch.testing.assert_close(found.covariance(pair)[1], covariance[2:4, 2:4])
    assert torch.linalg.eigvalsh(covariance).min() > -1e-10


@pytest.mark.claim(
    49,
    "The scaled variance lies within [0, k / lambda], is at least that without its first term, and "
    "is k / lambda without inducing points",
    tolerance=1e-12,
)
def test_bounds_of_the_variance():
    arms = points(50)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found = pulled(arms, 80, seed=seed, lam=0.2)
        with_inducing(found, torch.randperm(50, generator=generator)[: 1 + seed])
        assert (found.variances >= 0).all()
        assert (found.variances <= 1 / 0.2).all()
        assert (found.variances >= dense(found, arms, correct=False)[1] - 1e-12).all()
    with_inducing(found, [])
    assert (found.variances - 1 / 0.2).abs().max() < 1e-12
    assert found.means.abs().max() == 0


@pytest.mark.claim(
    49,
    "At pulled points the variance is within 3 times that of the exact Gaussian process, at 10 "
    "times oversampling, for 20 seeds",
    tolerance=3,
)
def test_accuracy_of_the_variance():
    for seed in range(20):
        found = pulled(points(120, seed=seed), 400, seed=seed, lam=1.0, oversampling=10.0)
        for arm in range(12):
            found.tell(arm, 0.0)
        assert len(found.inducing_index) < len(found.pulled_index.unique())
        exact = bandit(lam=1.0)
        exact.initialize(found.arms, found.pulled_index, found.pulled_y)
        seen = found.pulled_index
        ratio = found.variances[seen] / exact.variances[seen]
        assert ratio.min() > 1 / 3
        assert ratio.max() < 3


@pytest.mark.claim(49, "The confidence width is the formula of the method", tolerance=1e-10)
@pytest.mark.parametrize("t", [1, 50])
def test_width(t):
    found = pulled(points(30), t, lam=0.4, noise_variance=0.3, fnorm=2.0, delta=0.1)
    dimension = float(found.variances[found.pulled_index].sum())
    spread = (math.log(t) * dimension if t > 1 else 0.0) + math.log(10)
    expected = math.sqrt(0.4) * 2 + math.sqrt(0.3 * spread)
    assert float(found.beta) == pytest.approx(expected, abs=1e-10)
    scaled = pulled(
        points(30), t, lam=0.4, noise_variance=0.3, fnorm=2.0, delta=0.1, beta_scale=0.3
    )
    assert float(scaled.beta) == pytest.approx(0.3 * expected, abs=1e-10)


def test_width_of_the_theory():
    found = pulled(
        points(30), 50, lam=0.4, noise_variance=0.3, fnorm=2.0, delta=0.1, constants="theory"
    )
    dimension = float(found.variances[found.pulled_index].sum())
    spread = 3 * math.log(50 / 0.4) * dimension + math.log(10)  # alpha = 1.5 / 0.5
    expected = 2 * math.sqrt(0.3 * spread) + (1 + math.sqrt(2)) * math.sqrt(0.4) * 2
    assert float(found.beta) == pytest.approx(expected, abs=1e-10)


@pytest.mark.claim(
    49,
    "Far from all inducing points the variance keeps 99 % of the prior's, where that without its "
    "first term starves below 1 %",
    tolerance=0.01,
)
def test_no_variance_starvation():
    arms = torch.cat([0.1 * points(20), torch.full((1, 2), 3.0, dtype=torch.float64)])
    found = bandit(lam=0.1)
    found.initialize(arms, list(range(20)) * 3, torch.zeros(60))
    with_inducing(found, [0, 5, 9])
    assert found.variances[-1] > 0.99 / 0.1
    assert dense(found, arms, correct=False)[1][-1] < 0.01 / 0.1


@pytest.mark.claim(
    49,
    "The sum of variances over pulls is the effective dimension within a factor of 1.5, and exact "
    "with all pulled points as inducing points",
    tolerance=1.5,
)
def test_effective_dimension():
    for seed in range(20):
        found = pulled(points(80, seed=seed), 100, seed=seed, lam=0.5, oversampling=20.0)
        exact = effective_dimension(found)
        torch.testing.assert_close(found.effective_dimension, exact, rtol=1e-8, atol=0)
        for arm in range(10):
            found.tell(arm, 0.0)
        ratio = found.effective_dimension / effective_dimension(found)
        assert 1 / 1.5 < ratio < 1.5


@pytest.mark.claim(
    49,
    "Inducing points are at most 3 times oversampling times the effective dimension in every round "
    "and level off: at most 1.5 times as many after 500 rounds as after 250",
    tolerance=1.5,
)
def test_inducing_points_follow_the_effective_dimension():
    arms = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
    early, late = [], []
    for seed in range(5):
        noise = torch.Generator().manual_seed(seed)
        found = bandit(seed=seed, noise_variance=0.25, oversampling=5.0)
        found.initialize(arms, [seed], [0.0])
        for t in range(2, 501):
            arm = found.ask()
            value = (9 * arms[arm]).sin() + 0.5 * torch.randn(1, generator=noise)
            found.tell(arm, value.item())
            assert len(found.inducing_index) <= 15 * found.effective_dimension
            if t % 100 == 0:
                assert len(found.inducing_index) <= 15 * effective_dimension(found)
            if t == 250:
                early.append(len(found.inducing_index))
        late.append(len(found.inducing_index))
    assert statistics.mean(late) <= 1.5 * statistics.mean(early)
    assert statistics.mean(late) > 3


@pytest.mark.claim(
    49, "Counting repeated pulls of an arm is stacking their rows, for any sketch", tolerance=1e-8
)
def test_counts_are_stacked_rows():
    found = with_inducing(pulled(points(12), 90, lam=0.3), [1, 4, 8])
    assert len(found.pulled_index.unique()) < 20
    mean, variance = dense(found, found.arms)
    torch.testing.assert_close(found.means, mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.variances, variance, rtol=0, atol=1e-8)


@pytest.mark.claim(
    49,
    "With a linear kernel, repeated pulls and identical arms it is Bayesian linear regression",
    tolerance=1e-8,
)
def test_linear_kernel_is_bayesian_linear_regression():
    arms = points(30, d=3)
    arms = torch.cat([arms, arms[:5], arms[:5]])
    found = pulled(arms, 100, kernel=linear, lam=0.6, oversampling=50.0)
    for arm in (0, 30, 35, 0):
        found.tell(arm, 1.5)
    x = arms[found.pulled_index]
    precision = x.mT @ x + 0.6 * torch.eye(3, dtype=x.dtype)
    mean = arms @ torch.linalg.solve(precision, x.mT @ found.pulled_y)
    variance = (arms @ torch.linalg.inv(precision) * arms).sum(-1)
    assert len(found.inducing_index) > 3
    torch.testing.assert_close(found.means, mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.variances, variance, rtol=0, atol=1e-8)


def play(found, rounds):
    for _ in range(rounds):
        arm = found.ask()
        found.tell(arm, math.sin(arm))
    return found.pulled_index.tolist()


@pytest.mark.claim(49, "One seed gives one trajectory, and a restored state goes on the same")
def test_trajectories_repeat():
    arms = points(80)

    def start(seed):
        found = bandit(seed=seed, noise_variance=0.1, oversampling=2.0)
        found.initialize(arms, [0, 0, 9], [0.1, 0.0, -0.2])
        return found

    whole, other = start(0), start(1)
    play(whole, 60)
    assert play(other, 60) != play(start(0), 60)
    half = start(0)
    play(half, 25)
    state = half.state_dict()
    play(half, 3)  # the state shares nothing with the bandit
    again = bandit(seed=7, noise_variance=0.1, oversampling=2.0)
    again.load_state_dict(state)
    play(again, 35)
    assert again.pulled_index.tolist() == whole.pulled_index.tolist()
    assert (again.means == whole.means).all()
    assert (again.variances == whole.variances).all()


def test_a_round():
    """Arms of the highest bound; coins against the last variances with the new counts."""
    found = pulled(points(60), 30, lam=0.3, oversampling=1.5, beta_scale=0.5)
    rival = found.means + found.beta * found.variances.sqrt()
    arm = found.ask()
    assert arm == rival.argmax()
    counts = torch.bincount(torch.cat([found.pulled_index, torch.tensor([arm, 3])]), minlength=60)
    coins = torch.Generator()
    coins.set_state(found.sampler.generator.get_state())
    draws = torch.rand(60, dtype=torch.float64, generator=coins)
    expected = (draws < 1.5 * found.variances * counts).nonzero()[:, 0]
    found.tell([arm, 3], [0.5, 0.1])
    assert found.inducing_index.tolist() == expected.tolist()
    assert found.pulled_y[-2:].tolist() == [0.5, 0.1]
    assert (len(expected), found.t) == (len(expected), 32)


def test_kernel_columns_are_kept():
    calls = []

    def counted(a, b):
        calls.append(b.shape[-2] if a.ndim == 2 else 0)
        return rbf(a, b)

    found = bandit(counted, noise_variance=0.1, oversampling=5.0)
    found.initialize(points(100), [0], [0.0])
    play(found, 40)
    columns = found.state_dict()["columns"]
    torch.testing.assert_close(columns, rbf(found.arms, found.arms[found.inducing_index]))
    sizes = len(found.inducing_index)
    assert sum(calls) < 0.5 * 40 * sizes / 2


def test_the_first_of_equal_arms():
    found = bandit()
    found.initialize(torch.zeros(5, 2).double(), [3], [0.0])
    assert found.ask() == 0
    assert BudgetedKernelBandit is BKB


def test_defaults():
    found = bandit()
    assert (found.lam, found.noise_variance, found.fnorm, found.delta) == (1.0, 1.0, 1.0, 0.5)
    assert (found.sampler.oversampling, found.beta_scale, found.constants) == (
        5.0,
        1.0,
        "practical",
    )
    assert bandit(noise_variance=0.3).lam == 0.3


def test_candidates_of_a_round():
    """Candidates that are pulled become arms; it is as if they had been arms from the start."""
    arms, fresh = points(10), points(40, seed=2)
    found, whole = (bandit(lam=0.2, oversampling=1e6) for _ in range(2))
    found.initialize(arms, [0, 1], [0.5, 0.2])
    whole.initialize(torch.cat([arms, fresh]), [0, 1], [0.5, 0.2])
    for part in fresh.split(10):
        choice = found.ask(part)
        bound = whole.means + whole.beta * whole.variances.sqrt()
        places = [int((row == whole.arms).all(-1).nonzero()) for row in part]
        assert choice == bound[places].argmax()
        found.tell(choice, 0.3)
        whole.tell(places[choice], 0.3)
        assert (found.arms[-1] == part[choice]).all()
    torch.testing.assert_close(found.posterior(fresh), whole.posterior(fresh))
    choice = found.ask(fresh)
    again = bandit(lam=0.2, oversampling=1e6)
    again.load_state_dict(found.state_dict())
    again.tell(choice, 0.0)
    assert (again.arms[-1] == fresh[choice]).all()
    found.ask()
    found.tell(0, 0.0)
    assert found.pulled_index[-1] == 0


def test_posterior_is_differentiable():
    found = with_inducing(pulled(points(30), 40, lam=0.5), [2, 9, 17])
    x = points(3, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: found.posterior(x)[:2], (x,))
    assert not found.means.requires_grad


def test_single_precision():
    exact = with_inducing(pulled(points(50), 60, lam=0.2), [1, 5, 20, 33])
    found = pulled(points(50), 60, lam=0.2, dtype=torch.float32)
    with_inducing(found, [1, 5, 20, 33])
    assert found.means.dtype == torch.float32
    torch.testing.assert_close(found.means.double(), exact.means, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.variances.double(), exact.variances, rtol=0, atol=1e-4)


@pytest.mark.claim(
    49,
    "At a fixed number of inducing points a round touches as much memory late as early",
    tolerance=1.1,
)
def test_work_of_a_round_is_independent_of_pulls():
    arms = points(400)
    touched = []
    for t in (2000, 16000):  # every arm was pulled before
        found = pulled(arms, t, lam=0.1, max_inducing=40)
        with CountElements() as work:
            for arm in range(20):
                found.tell(arm, 0.0)
                found.ask()
                assert len(found.inducing_index) == 40
        touched.append(work.elements)
    assert touched[1] < 1.1 * touched[0]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lam": 0.0}, "lam"),
        ({"lam": -1.0}, "lam"),
        ({"noise_variance": 0.0}, "noise_variance"),
        ({"fnorm": -1.0}, "fnorm"),
        ({"beta_scale": -0.1}, "beta_scale"),
        ({"delta": 1.0}, "delta"),
        ({"delta": 0.0}, "delta"),
        ({"constants": "best"}, "constants"),
        ({"oversampling": 0.0}, "oversampling"),
        ({"max_inducing": 0}, "max_inducing"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        bandit(**options)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda b: b.initialize(torch.zeros(3), [0], [0.0]), "arms"),
        (lambda b: b.initialize(torch.zeros(0, 2), [0], [0.0]), "arms"),
        (lambda b: b.tell(30, 0.0), "index"),
        (lambda b: b.tell(-1, 0.0), "index"),
        (lambda b: b.tell(1.5, 0.0), "index"),
        (lambda b: b.tell([], []), "index"),
        (lambda b: b.tell(1, math.nan), "y"),
        (lambda b: b.tell([1, 2], [0.0]), "y"),
        (lambda b: b.ask(torch.zeros(4, 3)), "candidates"),
        (lambda b: b.posterior(torch.zeros(4, 3)), "x"),
        (lambda b: b.load_state_dict({"arms": torch.zeros(2, 2)}), "state"),
    ],
)
def test_bad_calls(call, name):
    found = pulled(points(30), 5)
    before = found.means.clone()
    with pytest.raises(ValueError, match=f"{name}: expected"):
        call(found)
    assert (found.means == before).all()


def test_before_initialize():
    calls = (BKB.ask, BKB.posterior, BKB.state_dict, lambda b: b.tell(0, 0.0), lambda b: b.beta)
    for call in calls:
        with pytest.raises(RuntimeError, match="initialize first"):
            call(bandit())
