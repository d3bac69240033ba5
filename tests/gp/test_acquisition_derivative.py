"""The knowledge gradient with gradients against refitting, closed forms, and the plain one."""

import gpytorch
import pytest
import torch

from torchzoo.gp import (
    DerivativeGP,
    DerivativeKnowledgeGradient,
    KnowledgeGradient,
    expected_improvement,
    gaussian_with_gradient,
)
from torchzoo.testing import assert_within_se

LENGTHS = torch.tensor([0.4, 0.9], dtype=torch.float64)
NOISE = torch.tensor([0.02, 0.3], dtype=torch.float64)  # of values and of gradients


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=1):
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(seed))


class GradGP(gpytorch.models.ExactGP):
    """Values and gradients in gpytorch's own terms."""

    def __init__(self, x, y):
        likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=3)
        super().__init__(x, y, likelihood)
        self.mean = gpytorch.means.ConstantMeanGrad()
        self.kernel = gpytorch.kernels.RBFKernelGrad(ard_num_dims=2)
        self.double().eval()
        self.kernel.lengthscale = LENGTHS
        likelihood.noise = torch.tensor(1e-4, dtype=torch.float64)
        likelihood.task_noises = NOISE[[0, 1, 1]] - 1e-4
        self.requires_grad_(False)

    def forward(self, x):
        kind = gpytorch.distributions.MultitaskMultivariateNormal
        return kind(self.mean(x), self.kernel(x))


def covariance(a, b):
    """Of values and gradients, by points."""
    kernel = gpytorch.kernels.RBFKernelGrad(ard_num_dims=2).double()
    kernel.lengthscale = LENGTHS
    return kernel(a, b).to_dense().detach()


def both(seed=0, n=5):
    """The same model twice, from data of mean 0 and standard deviation 1."""
    x = rand(n, 2, seed=seed)
    y, grad = (6 * x).sin().sum(1), 6 * (6 * x).cos() / 3
    y = (y - y.mean()) / y.std()
    ours = DerivativeGP(
        kernel="rbf", noise_var=float(NOISE[0]), grad_noise_var=float(NOISE[1]), max_iter=1
    ).fit(x, y[:, None], grad=grad)
    theta = torch.cat([LENGTHS.log(), torch.zeros(4, dtype=torch.float64)])
    ours.load_state_dict(ours.state_dict() | {"theta": theta})
    return x, torch.cat([y[:, None], grad], 1), ours, GradGP(x, torch.cat([y[:, None], grad], 1))


def test_two_kinds_of_models():
    _, _, ours, theirs = both()
    at = rand(4, 2, seed=3)
    first, second = gaussian_with_gradient(ours, at), gaussian_with_gradient(theirs, at)
    for name in ("mean", "covariance", "noise"):
        found, expected = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(found, expected.reshape_as(found), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.mean[4:].reshape(4, 2), ours.gradient(at).mean)
    acquisitions = [
        DerivativeKnowledgeGradient(model, rand(9, 2), generator=seeded())
        for model in (ours, theirs)
    ]
    torch.testing.assert_close(*(a(at[:, None]) for a in acquisitions), rtol=0, atol=1e-5)


def test_units():
    """A box and a scale of values change nothing but the units."""
    x, y = rand(5, 2), rand(5, 1, seed=2)
    grad = rand(5, 2, seed=3)
    box = torch.tensor([[1.0, 0.0], [3.0, 10.0]], dtype=torch.float64)
    plain = DerivativeGP(max_iter=20).fit(x, y, grad=grad)
    width = box[1] - box[0]
    scaled = DerivativeGP(max_iter=20, bounds=box).fit(
        box[0] + width * x, 7 * y + 3, grad=7 * grad / width
    )
    at = rand(4, 2, seed=4)
    ours, theirs = plain.joint(at), scaled.joint(box[0] + width * at)
    unit = torch.cat([torch.full((4,), 7.0), (7 / width).repeat(4)]).double()
    shift = torch.cat([torch.full((4,), 3.0), torch.zeros(8)]).double()
    torch.testing.assert_close(ours.mean[:, 0] * unit + shift, theirs.mean[:, 0])
    torch.testing.assert_close(ours.covariance * unit * unit[:, None], theirs.covariance)
    torch.testing.assert_close(ours.noise[:, 0] * unit**2, theirs.noise[:, 0])


@pytest.mark.claim(5, "d-KG is what refitting to a simulated value and gradient gains", 4.0)
@pytest.mark.parametrize("q", [1, 2])
def test_simulated(q):
    """By gpytorch's kernel of values and gradients, and dense algebra."""
    x, y, ours, _ = both()
    grid, at = rand(10, 2, seed=5), rand(q, 2, seed=6)

    def noise(n):
        return NOISE[[0, 1, 1]].repeat(n).diag()

    k = covariance(x, x) + noise(len(x))
    gain = torch.linalg.solve(k, covariance(x, at)).mT
    mean = gain @ y.flatten()
    spread = covariance(at, at) + noise(q) - gain @ covariance(x, at)
    draws = torch.randn(40_000, 3 * q, dtype=torch.float64, generator=seeded(7))
    new = mean + draws @ torch.linalg.cholesky(spread).mT
    everything = torch.cat([x, at])
    k = covariance(everything, everything) + noise(len(everything))
    weights = torch.linalg.solve(k, covariance(everything, grid)[:, ::3]).mT
    values = torch.cat([y.flatten().expand(len(new), -1), new], 1) @ weights.mT
    before = torch.linalg.solve(k[:15, :15], covariance(x, grid)[:, ::3]).mT @ y.flatten()
    acquisition = DerivativeKnowledgeGradient(ours, grid, num_samples=2048, generator=seeded())
    assert_within_se(values.amax(1) - before.max(), acquisition(at))


@pytest.mark.claim(5, "Of two points d-KG has a closed form", 0.01)
def test_two_points():
    """The difference of two means is Gaussian, with a variance that is the squared slope."""
    _, _, ours, _ = both()
    pair, at = rand(2, 2, seed=9), rand(6, 1, 2, seed=10)
    acquisition = DerivativeKnowledgeGradient(ours, pair, num_samples=1024, generator=seeded())
    for value, x in zip(acquisition(at), at, strict=True):
        joint = ours.joint(torch.cat([pair, x]))  # values of 3, then gradients
        index = [2, 7, 8]
        gap = joint.mean[0, 0] - joint.mean[1, 0]
        c = joint.covariance[0]
        cross = c[0, index] - c[1, index]
        block = c[index][:, index] + NOISE[[0, 1, 1]].diag()
        spread = (cross @ torch.linalg.solve(block, cross)).sqrt()
        expected = expected_improvement(-gap.abs(), spread, 0.0)
        torch.testing.assert_close(value, expected, rtol=0.01, atol=1e-9)


@pytest.mark.claim(5, "d-KG is at least KG, and KG where gradients are all noise", 1e-6)
def test_gradients_are_worth_something():
    x, y, ours, _ = both()
    grid, at = rand(20, 2, seed=5), rand(12, 1, 2, seed=6)
    plain = KnowledgeGradient(ours, grid)(at)
    found = DerivativeKnowledgeGradient(ours, grid, generator=seeded())(at)
    assert (found > plain - 1e-3 * plain.max()).all()
    assert (found - plain).max() > 0.1 * plain.max()
    blind = DerivativeGP(kernel="rbf", noise_var=0.02, grad_noise_var=1e12, max_iter=1)
    blind.fit(x, y[:, :1])
    blind.load_state_dict(ours.state_dict() | {"grad": torch.full_like(x, torch.nan)})
    found = DerivativeKnowledgeGradient(blind, grid, num_samples=2)(at)
    torch.testing.assert_close(found, KnowledgeGradient(blind, grid)(at), rtol=0, atol=1e-6)
    assert (plain - found).abs().max() > 1e-3


def test_batches_and_gradients():
    _, _, ours, _ = both()
    acquisition = DerivativeKnowledgeGradient(ours, rand(9, 2), num_samples=4, generator=seeded())
    at = rand(2, 3, 2, 2, seed=7)
    found = acquisition(at)
    one = torch.stack([acquisition(a) for a in at.flatten(0, 1)]).reshape(2, 3)
    torch.testing.assert_close(found, one)
    assert (found >= 0).all()
    assert acquisition(at[:0]).shape == (0, 3)
    swapped = DerivativeKnowledgeGradient(ours, rand(9, 2), num_samples=2048, generator=seeded())
    torch.testing.assert_close(swapped(at), swapped(at.flip(-2)), rtol=0.02, atol=1e-4)
    assert (swapped(at) > 0.98 * swapped(at[..., :1, :])).all()
    assert torch.autograd.gradcheck(acquisition, rand(2, 1, 2, seed=8).requires_grad_())
    for make in (
        lambda: DerivativeKnowledgeGradient(ours, rand(9, 2), num_samples=3),
        lambda: DerivativeKnowledgeGradient(ours, rand(2)),
        lambda: acquisition(rand(2, 1, 3)),
        lambda: gaussian_with_gradient(object(), rand(2, 2)),
    ):
        with pytest.raises(ValueError, match=": expected"):
            make()
