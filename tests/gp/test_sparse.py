"""Nyström features against dense linear algebra, and inducing points against their odds."""

import gpytorch
import pytest
import torch

from torchzoo.gp import LeverageScoreSampler, inverse_root, nystrom_features
from torchzoo.gp.sparse import as_covariance
from torchzoo.testing import assert_within_se


def points(n, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, d, dtype=torch.float64, generator=generator)


def rbf(a, b):
    return (-torch.cdist(a, b).square() / 0.18).exp()


def test_features_span_the_inducing_points():
    x, s = points(30), points(6, seed=1)
    z = nystrom_features(rbf(s, s), rbf(x, s))
    expected = rbf(x, s) @ torch.linalg.inv(rbf(s, s)) @ rbf(s, x)
    torch.testing.assert_close(z @ z.mT, expected, rtol=1e-9, atol=1e-9)


def test_a_singular_matrix_is_cut_at_its_rank():
    x = points(40, d=3)
    k = x @ x.mT
    root = inverse_root(k)
    assert (root.norm(dim=0) > 0).sum() == 3
    torch.testing.assert_close(root @ root.mT, torch.linalg.pinv(k, hermitian=True))
    z = nystrom_features(k, k)
    torch.testing.assert_close(z @ z.mT, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cut_is_m_eps_times_the_largest_eigenvalue(dtype):
    edge = 4 * torch.finfo(dtype).eps
    values = 3 * torch.tensor([1.0, 0.1, 1.5 * edge, edge / 1.5], dtype=dtype)
    assert (inverse_root(values.diag()).norm(dim=0) > 0).sum() == 3


def test_batches_and_empty_sets():
    s = torch.stack([points(4, seed=i) for i in range(6)]).reshape(2, 3, 4, 2)
    x = points(5)
    z = nystrom_features(rbf(s, s), rbf(x, s))
    torch.testing.assert_close(z[1, 2], nystrom_features(rbf(s, s)[1, 2], rbf(x, s)[1, 2]))
    assert nystrom_features(torch.zeros(0, 0), torch.zeros(5, 0)).shape == (5, 0)
    assert inverse_root(torch.zeros(3, 3)).abs().max() == 0


def test_features_have_gradients():
    x, s = points(3).requires_grad_(), points(4, seed=1)
    assert torch.autograd.gradcheck(lambda x: nystrom_features(rbf(s, s), rbf(x, s)), (x,))


@pytest.mark.claim(
    49,
    "A point pulled n times is drawn with probability min(1, oversampling n sigma²), and can leave",
    tolerance=4,
)
def test_inclusion_frequencies():
    variance = torch.tensor([0.02, 0.05, 0.3, 0.9, 0.01, 0.5], dtype=torch.float64)
    counts = torch.tensor([1.0, 4.0, 1.0, 0.0, 100.0, 2.0], dtype=torch.float64)
    sampler = LeverageScoreSampler(3.0, generator=torch.Generator().manual_seed(0))
    drawn = torch.zeros(2000, 6)
    for row in drawn:
        row[sampler.sample(variance, counts)] = 1
    expected = torch.tensor([0.06, 0.6, 0.9, 0.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(sampler.probabilities(variance, counts), expected)
    assert_within_se(drawn, expected)
    left = (drawn[:-1] == 1) & (drawn[1:] == 0)
    assert left[:, 1].any()
    assert not left[:, 4].any()


def test_points_are_drawn_independently():
    variance = torch.full((2,), 0.5, dtype=torch.float64)
    sampler = LeverageScoreSampler(1.0, generator=torch.Generator().manual_seed(1))
    both = [len(sampler.sample(variance, torch.ones(2))) == 2 for _ in range(2000)]
    assert_within_se(torch.tensor(both).double(), 0.25)


def test_most_inducing_points_are_those_of_highest_probability():
    variance = torch.tensor([0.4, 0.9, 0.1, 0.8, 0.9], dtype=torch.float64)
    sampler = LeverageScoreSampler(1e3, max_inducing=2)
    every = LeverageScoreSampler(1e3)
    assert every.sample(variance, torch.ones(5)).tolist() == [0, 1, 2, 3, 4]
    assert sampler.sample(variance, torch.ones(5)).tolist() == [0, 1]  # all have probability 1
    sampler = LeverageScoreSampler(1.1, max_inducing=2, generator=torch.Generator().manual_seed(4))
    found = [tuple(sampler.sample(variance, torch.ones(5)).tolist()) for _ in range(50)]
    assert max(map(len, found)) == 2
    assert found.count((1, 4)) > 40


def test_kernels_in_any_form():
    x, y = points(4), points(3, seed=1)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.3, 2.0
    known = as_covariance(kernel)
    torch.testing.assert_close(known(x, y), 2 * rbf(x, y))
    torch.testing.assert_close(known.diag(x), torch.full((4,), 2.0, dtype=torch.float64))

    class Linear:
        def __call__(self, a, b):
            return a @ b.mT

        def diag(self, x):
            return 10 * x.square().sum(-1)

    torch.testing.assert_close(as_covariance(Linear()).diag(x), 10 * x.square().sum(-1))
    bare = as_covariance(lambda a, b: a @ b.mT)
    torch.testing.assert_close(bare.diag(x), x.square().sum(-1))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: LeverageScoreSampler(0.0), "oversampling"),
        (lambda: LeverageScoreSampler(float("inf")), "oversampling"),
        (lambda: LeverageScoreSampler(max_inducing=0), "max_inducing"),
        (lambda: inverse_root(torch.zeros(2, 3)), "k_ss"),
        (lambda: nystrom_features(torch.eye(2), torch.zeros(5, 3)), "k_ns"),
        (lambda: as_covariance(3), "kernel"),
    ],
)
def test_bad_arguments(call, name):
    with pytest.raises(ValueError, match=name):
        call()
