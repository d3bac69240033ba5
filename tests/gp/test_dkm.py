"""Deep kernel machines on all data against closed forms, limits and independent libraries."""

import math

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from torchzoo.gp import DeepKernelMachine, gram_kernel, gram_kl
from torchzoo.gp.gram_kernels import GramBlocks


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def power(matrix, exponent):
    """A real power of a matrix with positive eigenvalues, by its eigenvectors."""
    values, vectors = torch.linalg.eig(matrix)
    return ((vectors * values**exponent) @ torch.linalg.inv(vectors)).real


@pytest.mark.claim(
    7,
    "With linear kernels and a fixed output the optimal Gram matrices lie on the geodesic from "
    "inputs to output",
    tolerance=1e-4,
)
def test_linear_machines_follow_the_geodesic():
    n, depth = 6, 3
    x, y = normal(n, 9), normal(n, 8, seed=1)
    machine = DeepKernelMachine(depth, kernel="linear", nu=8.0, noise=0.0, jitter=0.0)
    machine.fit(x, y, steps=200, method="lbfgs")  # C = nu: the data stand for a layer, Y Y^T / C
    first, last = x @ x.mT / 9, y @ y.mT / 8
    for layer, gram in enumerate(machine.grams, 1):
        expected = first @ power(torch.linalg.solve(first, last), layer / (depth + 1))
        assert (gram - expected).norm() < 1e-4 * expected.norm()


def nngp(x, depth):
    """Arc-cosine kernel matrix of a network of infinite width, by arc cosines."""
    k = x @ x.mT / x.shape[1]
    for _ in range(depth):
        scale = k.diagonal().sqrt()
        cos = (k / torch.outer(scale, scale)).clamp(-1, 1)
        angle = cos.acos()
        value = (angle.sin() + (math.pi - angle) * cos) / math.pi
        k = torch.outer(scale, scale) * value.fill_diagonal_(1)
    return k


@pytest.mark.claim(
    7,
    "For large nu the Gram matrices and predictions are those of the Gaussian process of an "
    "infinitely wide network",
    tolerance=1e-3,
)
def test_large_nu_is_the_wide_limit():
    x, y, new = normal(9, 3), normal(9, 2, seed=1), normal(5, 3, seed=2)
    machine = DeepKernelMachine(2, nu=1e6, noise=0.2)
    machine.fit(x, y, steps=50, method="lbfgs")
    for depth, gram in enumerate(machine.grams, 1):
        torch.testing.assert_close(gram, nngp(x, depth), rtol=1e-3, atol=1e-3)
    k = nngp(torch.cat([x, new]), 3)
    solved = torch.linalg.solve(k[:9, :9] + 0.2 * torch.eye(9, dtype=k.dtype), k[:9, 9:]).mT
    found = machine.predict(new)
    torch.testing.assert_close(found.mean, solved @ y, rtol=1e-3, atol=1e-3)
    variance = k[9:, 9:].diagonal() - (solved * k[9:, :9]).sum(1)
    torch.testing.assert_close(found.variance, variance[:, None].expand(5, 2), rtol=0, atol=1e-3)
    small = DeepKernelMachine(2, nu=0.5, noise=0.2)
    small.fit(x, y, steps=100, method="lbfgs")
    assert (small.grams[1] - nngp(x, 2)).norm() > 0.2 * nngp(x, 2).norm()


@pytest.mark.claim(7, "With no layers it is Gaussian process regression", tolerance=1e-6)
@pytest.mark.parametrize(
    ("kernel", "peer"), [("rbf", kernels.RBF(2.0**0.5)), ("linear", kernels.DotProduct(0.0))]
)
def test_no_layers(kernel, peer):
    x, y, new = normal(12, 2), normal(12, 1, seed=1), normal(5, 2, seed=2)
    machine = DeepKernelMachine(
        0, kernel=kernel, noise=0.3, jitter=1e-10 if kernel == "rbf" else 1e-8
    )
    machine.fit(x, y)
    scale = 1.0 if kernel == "rbf" else 0.5**0.5  # x.x' / 2
    exact = GaussianProcessRegressor(peer, alpha=0.3, optimizer=None)
    exact.fit((scale * x).numpy(), y.numpy())
    mean, std = exact.predict((scale * new).numpy(), return_std=True)
    found = machine.predict(new)
    assert (found.mean[:, 0] - torch.from_numpy(mean)).abs().max() < 1e-6
    assert (found.variance[:, 0] - torch.from_numpy(std) ** 2).abs().max() < 1e-6
    assert (found.noise == 0.3).all()
    likelihood = exact.log_marginal_likelihood_value_
    assert float(machine.objective().detach()) == pytest.approx(likelihood, abs=1e-6)


def test_the_objective_is_its_formula():
    """Likelihood and KL terms by torch.distributions, from the Gram matrices alone."""
    x, y = normal(7, 3), normal(7, 2, seed=1)
    machine = DeepKernelMachine(2, nu=[0.7, 2.5], noise=0.4, inputs=x, targets=y, jitter=0.0)
    with torch.no_grad():
        for layer in machine.layers:
            layer.factor.add_(0.3 * normal(7, 7, seed=3))
    mvn = torch.distributions.MultivariateNormal
    zero = torch.zeros(7, dtype=torch.float64)
    expected, gram = torch.zeros((), dtype=torch.float64), x @ x.mT / 3
    for nu, following in zip((0.7, 2.5), machine.grams, strict=True):
        prior = mvn(zero, kernel_of(gram, "relu"))
        expected -= nu * torch.distributions.kl_divergence(mvn(zero, following), prior)
        gram = following
    noisy = kernel_of(gram, "relu") + 0.4 * torch.eye(7, dtype=torch.float64)
    expected += mvn(zero, noisy).log_prob(y.mT).sum()
    torch.testing.assert_close(machine.objective(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(machine.objective(y), expected, rtol=1e-9, atol=0)


def kernel_of(gram, kind):
    return gram_kernel(gram, gram[:0], gram.diagonal()[:0], kind).ii


@pytest.mark.claim(
    7,
    "The KL term is at least 0, 0 for equal matrices only, and that of dense Gaussians",
    tolerance=1e-9,
)
def test_kl():
    mvn, zero = torch.distributions.MultivariateNormal, torch.zeros(5, dtype=torch.float64)
    for seed in range(10):
        g, k = (normal(5, 9, seed=seed + i) for i in (0, 100))
        g, k = g @ g.mT / 9, k @ k.mT / 9
        dense = torch.distributions.kl_divergence(mvn(zero, g), mvn(zero, k))
        torch.testing.assert_close(gram_kl(g, k), dense, rtol=1e-9, atol=0)
        assert gram_kl(g, k) > 0.01
        assert gram_kl(g, g).abs() < 1e-10


@pytest.mark.claim(
    7,
    "Kernels of Gram matrices are kernels of features: any features with those inner products",
    tolerance=1e-10,
)
def test_kernels_of_features():
    x, test = normal(6, 4), normal(5, 4, seed=1)
    blocks = (x @ x.mT, test @ x.mT, test.square().sum(-1))
    both = torch.cat([x, test])
    linear = both @ both.mT
    rbf = (-torch.cdist(both, both).square() / 2).exp()
    relu = 4 * nngp(both, 1)  # of inner products, not of their mean over 4 features
    for kind, full in {"linear": linear, "rbf": rbf, "relu": relu}.items():
        found = gram_kernel(*blocks, kind)
        assert isinstance(found, GramBlocks)
        torch.testing.assert_close(found.ii, full[:6, :6], rtol=0, atol=1e-10)
        torch.testing.assert_close(found.ti, full[6:, :6], rtol=0, atol=1e-10)
        torch.testing.assert_close(found.tt, full.diagonal()[6:], rtol=0, atol=1e-10)


@pytest.mark.claim(7, "Permuting the data permutes the Gram matrices", tolerance=1e-5)
def test_permutations():
    x, y, order = normal(8, 3), normal(8, 1, seed=1), torch.randperm(8)
    one, two = DeepKernelMachine(2, nu=0.8), DeepKernelMachine(2, nu=0.8)
    one.fit(x, y, steps=400, method="lbfgs")
    two.fit(x[order], y[order], steps=400, method="lbfgs")
    for gram, permuted in zip(one.grams, two.grams, strict=True):
        torch.testing.assert_close(permuted, gram[order][:, order], rtol=0, atol=1e-5)
    new = normal(4, 3, seed=2)
    torch.testing.assert_close(two.predict(new), one.predict(new), rtol=0, atol=1e-5)


@pytest.mark.claim(7, "Gradients are finite where inputs are repeated")
def test_duplicate_rows():
    x = normal(6, 3)
    x = torch.cat([x, x[:2]]).requires_grad_()
    machine = DeepKernelMachine(2, inputs=x, targets=normal(8, 1), jitter=1e-6)
    machine.inputs = x
    grads = torch.autograd.grad(machine.objective(), [x, *machine.parameters()])
    assert all(grad.isfinite().all() for grad in grads)
    assert float(machine.fit(x, normal(8, 1), steps=5)[-1]) < math.inf


def test_adam_and_lbfgs_agree():
    x, y = normal(8, 2), normal(8, 1, seed=1)
    adam, lbfgs = DeepKernelMachine(1, noise=0.3), DeepKernelMachine(1, noise=0.3)
    losses = adam.fit(x, y, steps=300, lr=0.02)
    assert losses.shape == (300,)
    best = lbfgs.fit(x, y, steps=300, method="lbfgs")
    assert float(losses[0]) == pytest.approx(
        float(-DeepKernelMachine(1, noise=0.3, inputs=x, targets=y).objective().detach())
    )
    assert float(best) < float(losses[0]) - 0.1
    assert float(-adam.objective().detach()) == pytest.approx(float(best), abs=1e-3)


def test_predictions_at_the_data_use_the_optimised_gram_matrices():
    """Test points that are data points have the Gram matrices of those, up to jitter."""
    x, y = normal(7, 3), normal(7, 1, seed=1)
    machine = DeepKernelMachine(2, nu=0.5, jitter=1e-12)
    machine.fit(x, y, steps=60, method="lbfgs")
    for blocks in machine._blocks(x)[1:]:
        torch.testing.assert_close(blocks.ti, blocks.ii, rtol=0, atol=1e-7)
        torch.testing.assert_close(blocks.tt, blocks.ii.diagonal(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"depth": -1}, "depth"),
        ({"kernel": "cubic"}, "kernel"),
        ({"noise": -0.1}, "noise"),
        ({"nu": 0.0}, "nu"),
        ({"nu": [1.0]}, "nu"),
        ({"likelihood": "softmax"}, "likelihood"),
        ({"jitter": 1.0}, "jitter"),
        ({"inputs": [[1.0]]}, "inputs"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        DeepKernelMachine(**({"depth": 2} | options))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: m.fit(normal(3), normal(3, 1)), "inputs"),
        (lambda m: m.fit(normal(3, 2), normal(4, 1)), "targets"),
        (lambda m: m.fit(normal(3, 2), normal(3)), "targets"),
        (lambda m: m.fit(normal(3, 2), normal(3, 1) / 0), "targets"),
        (lambda m: m.fit(normal(3, 2), normal(3, 1), method="sgd"), "method"),
        (lambda m: m.fit(normal(5, 2), normal(5, 1)), "inputs: expected a linear kernel matrix"),
    ],
)
def test_bad_data(call, name):
    machine = DeepKernelMachine(1, kernel="linear", jitter=0.0)
    with pytest.raises(RuntimeError, match="no data yet"):
        machine(normal(2, 2))
    with pytest.raises(ValueError, match=name):
        call(machine)


def test_bad_blocks():
    g = torch.eye(3)
    for blocks, name in (
        ((g[:2], g, g[0]), "gram_ii"),
        ((g, g[:, :2], g[0]), "gram_ti"),
        ((g, g, g[0, :2]), "gram_tt_diag"),
        ((g.expand(2, 3, 3), g, g[0]), "gram_ti"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            gram_kernel(*blocks, "relu")
    with pytest.raises(ValueError, match="kind: expected"):
        gram_kernel(g, g, g[0], "cubic")
