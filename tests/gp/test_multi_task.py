"""Coregionalisation against Kronecker products and dense algebra."""

import pytest
import torch

from torchzoo.gp import GPSurrogate, MultiTaskSurrogate

B = torch.tensor([[1.0, -0.6, 0.2], [-0.6, 0.9, 0.1], [0.2, 0.1, 0.5]], dtype=torch.float64)
LENGTHS = torch.tensor([0.5, 1.2], dtype=torch.float64)


def rand(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def matern(a, b):
    s = 5**0.5 * torch.cdist(a / LENGTHS, b / LENGTHS)
    return (1 + s + s**2 / 3) * (-s).exp()


def with_task(x, task):
    return torch.cat([x, torch.as_tensor(task).to(x).expand(len(x))[:, None]], 1)


def known(n=9):
    """A surrogate with hyperparameters that are known: it, its data, scaled inputs, and values."""
    box = torch.tensor([[0.0, -1.0], [2.0, 3.0]], dtype=torch.float64)
    u, task = rand(n, 2), torch.arange(n) % 3
    x = with_task(box[0] + (box[1] - box[0]) * u, task)
    y = rand(n, 1, seed=2)
    surrogate = MultiTaskSurrogate(3, bounds=box, max_iter=1).fit(x, y)
    model = surrogate.model
    model.kernel.kernels[0].lengthscale = LENGTHS
    values, vectors = torch.linalg.eigh(B - 0.05 * torch.eye(3))
    model.kernel.kernels[1].initialize(covar_factor=(vectors * values.sqrt())[None])
    model.kernel.kernels[1].var = torch.full((1, 3), 0.05).double()
    model.likelihood.noise = 0.03
    model.mean.constant.data = torch.tensor([[0.5, -1.0, 2.0]]).double()
    return surrogate, box, u, task, y


@pytest.mark.claim(
    5, "The multi-task covariance is the Kronecker product of tasks and points", 1e-10
)
def test_kronecker():
    surrogate, _, _, _, _ = known()
    torch.testing.assert_close(surrogate.task_covariance, B)
    points = rand(4, 2, seed=3)
    rows = torch.cat([with_task(points, task) for task in range(3)])
    found = surrogate.model.kernel(rows[None]).to_dense()[0].detach()
    expected = torch.kron(B, matern(points, points))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.claim(5, "The multi-task posterior is that of dense algebra", 1e-8)
def test_posterior():
    surrogate, box, u, task, y = known()
    surrogate.load_state_dict(surrogate.state_dict())  # which drops what gpytorch has cached
    points, other = rand(5, 2, seed=3), torch.tensor([0, 1, 2, 2, 0])
    at = with_task(box[0] + (box[1] - box[0]) * points, 0)
    at[:, -1] = other
    mean = torch.tensor([0.5, -1.0, 2.0]).double()
    k = B[task][:, task] * matern(u, u) + 0.03 * torch.eye(len(u))
    cross = B[other][:, task] * matern(points, u)
    shift, scale = y.mean(), y.std()
    z = (y[:, 0] - shift) / scale - mean[task]
    expected = shift + scale * (mean[other] + cross @ torch.linalg.solve(k, z))
    found = surrogate.posterior(at)
    torch.testing.assert_close(found.mean[:, 0], expected, rtol=0, atol=1e-8)
    left = B[other][:, other] * matern(points, points) - cross @ torch.linalg.solve(k, cross.mT)
    torch.testing.assert_close(found.covariance[0], scale**2 * left, rtol=0, atol=1e-8)
    with torch.random.fork_rng():
        again = MultiTaskSurrogate(3, bounds=box, max_iter=1)
        again.load_state_dict(surrogate.state_dict())
    assert (again.posterior(at).mean == found.mean).all()


@pytest.mark.claim(5, "A task is learned from another one, be it upside down")
def test_transfer():
    x, few = rand(10, 1), torch.tensor([[0.1], [0.55], [0.9]], dtype=torch.float64)
    wave = lambda x: (7 * x).sin()  # noqa: E731
    rows = torch.cat([with_task(x, 0), with_task(few, 1)])
    y = torch.cat([10 - 3 * wave(x), wave(few)])
    surrogate = MultiTaskSurrogate(2, rank=1, max_iter=40).fit(rows, y)
    again = MultiTaskSurrogate(2, rank=1, max_iter=40).fit(rows, y)
    grid = rand(50, 1, seed=5)
    found = surrogate.posterior(with_task(grid, 1)).mean
    alone = GPSurrogate().fit(few, wave(few)).posterior(grid).mean
    errors = [float((mean - wave(grid)).square().mean().sqrt()) for mean in (found, alone)]
    assert errors[0] < 0.3 * errors[1]
    assert (again.posterior(with_task(grid, 1)).mean == found).all()


def test_errors():
    x = with_task(rand(4, 1), torch.tensor([0, 1, 0, 1]))
    for make in (
        lambda: MultiTaskSurrogate(0),
        lambda: MultiTaskSurrogate(2, rank=3),
        lambda: MultiTaskSurrogate(2, max_iter=0),
        lambda: MultiTaskSurrogate(2).fit(x[:, 1:], x[:, :1]),
        lambda: MultiTaskSurrogate(1).fit(x, x[:, :1]),
        lambda: MultiTaskSurrogate(2).fit(x + 0.5, x[:, :1]),
    ):
        with pytest.raises(ValueError, match=": expected"):
            make()
