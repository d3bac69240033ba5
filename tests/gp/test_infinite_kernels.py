"""Kernels of networks of infinite width against wide random networks and closed forms."""

import math

import gpytorch
import pytest
import torch

from torchzoo.gp import InfiniteWidthErfKernel, InfiniteWidthReLUKernel
from torchzoo.testing.work import CountElements

KINDS = [
    pytest.param(InfiniteWidthReLUKernel, torch.relu, id="relu"),
    pytest.param(InfiniteWidthErfKernel, torch.erf, id="erf"),
]


def points(n=4, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator)


def wide_networks(x, phi, depth, *, var_w, var_b, width, nets):
    """`var_b + var_w h(x) h(x') / width` of the last hidden layer, averaged over networks.

    Given the layer below, units are independent Gaussians: drawing those is drawing the weights.
    """
    generator = torch.Generator().manual_seed(1)
    gram = (x @ x.mT / x.shape[1]).expand(nets, -1, -1)
    for _ in range(depth):
        factor = torch.linalg.cholesky(var_b + var_w * gram)
        noise = torch.randn(nets, len(x), width, dtype=x.dtype, generator=generator)
        hidden = phi(factor @ noise)
        gram = hidden @ hidden.mT / width
    return (var_b + var_w * gram).mean(0)


@pytest.mark.claim(
    4,
    "Infinite-width kernels are the mean of v_b + v_w h(x) h(x') / width over networks of width "
    "4096",
    tolerance=0.01,
)
@pytest.mark.parametrize(("kind", "phi"), KINDS)
@pytest.mark.parametrize("depth", [1, 3])
def test_wide_networks(kind, phi, depth):
    x = points()
    options = {"var_w": 2.5, "var_b": 0.7}
    expected = wide_networks(x, phi, depth, width=4096, nets=200, **options)
    found = kind(3, depth=depth, **options)(x).to_dense()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(("kind", "phi"), KINDS)
def test_a_real_network(kind, phi):
    """Weights drawn for themselves, in torch's layers."""
    x, kernel = points(), kind(3, var_w=2.0, var_b=0.5, depth=1)
    torch.manual_seed(0)
    found = []
    for _ in range(200):
        layer = torch.nn.Linear(3, 4096, dtype=torch.float64)
        torch.nn.init.normal_(layer.weight, std=math.sqrt(2.0 / 3))
        torch.nn.init.normal_(layer.bias, std=math.sqrt(0.5))
        hidden = phi(layer(x)).detach()
        found.append(0.5 + 2.0 * hidden @ hidden.mT / 4096)
    torch.testing.assert_close(torch.stack(found).mean(0), kernel(x).to_dense(), rtol=0.01, atol=0)


@pytest.mark.claim(4, "With depth 0 the kernels are linear, and defaults are 10, 1.6 and 3", 1e-12)
@pytest.mark.parametrize(("kind", "phi"), KINDS)
def test_depth_zero_and_defaults(kind, phi):
    x, y = points(), points(5, seed=3)
    found = kind(3, depth=0)(x, y).to_dense()
    torch.testing.assert_close(found, 1.6 + 10 * x @ y.mT / 3, rtol=1e-12, atol=1e-12)
    full = kind(3, var_w=10.0, var_b=1.6, depth=3)(x, y).to_dense()
    assert (kind(3)(x, y).to_dense() == full).all()


@pytest.mark.claim(
    4, "Diagonals follow k = v_b + v_w k / 2 (ReLU), and are those of the matrix", tolerance=1e-12
)
def test_diagonals():
    x = points(6)
    k = 1.6 + 10 * x.square().sum(-1) / 3
    for _ in range(3):
        k = 1.6 + 5 * k
    kernel = InfiniteWidthReLUKernel(3)
    torch.testing.assert_close(kernel(x, diag=True), k, rtol=1e-12, atol=0)
    torch.testing.assert_close(kernel(x).to_dense().diagonal(), k, rtol=1e-12, atol=0)
    erf = InfiniteWidthErfKernel(3)
    torch.testing.assert_close(erf(x, diag=True), erf(x).to_dense().diagonal())
    y = points(6, seed=5)
    for each in (kernel, erf):
        pairs = each(x, y, diag=True)
        torch.testing.assert_close(pairs, each(x, y).to_dense().diagonal())


@pytest.mark.claim(4, "Kernel matrices are positive semi-definite", tolerance=1e-12)
@pytest.mark.parametrize(("kind", "phi"), KINDS)
def test_positive_semi_definite(kind, phi):
    x = torch.cat([points(40), points(3), 1e-3 * points(10, seed=2)])
    k = kind(3)(x).to_dense()
    assert torch.linalg.eigvalsh(k).min() > -1e-12 * k.trace()
    assert (k - k.mT).abs().max() <= 1e-12 * k.max()


@pytest.mark.claim(4, "Work doesn't grow with the product of both numbers of points and dimensions")
def test_work():
    x = torch.rand(60, 3000, dtype=torch.float64)
    with CountElements() as work:
        InfiniteWidthReLUKernel(3000)(x).to_dense()
    assert work.elements < 60 * 60 * 3000 / 4


@pytest.mark.parametrize(("kind", "phi"), KINDS)
def test_in_gpytorch(kind, phi):
    """Batches are loops, gradients are right, and scales multiply."""
    kernel = kind(2, depth=2)
    x = points(12, 2).reshape(3, 4, 2)
    batch = kernel(x).to_dense()
    for index in range(3):
        torch.testing.assert_close(batch[index], kernel(x[index]).to_dense())
    scaled = gpytorch.kernels.ScaleKernel(kernel).double()
    scaled.outputscale = 3.0
    torch.testing.assert_close(scaled(x).to_dense(), 3 * batch)
    y = points(2, 2, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: kernel(x[0], y).to_dense(), (y,))
    leaf = x[0].clone().requires_grad_()
    kernel(leaf).to_dense().sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"in_dim": 0}, "in_dim"),
        ({"var_w": 0.0}, "var_w"),
        ({"var_b": -0.1}, "var_b"),
        ({"depth": -1}, "depth"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        InfiniteWidthReLUKernel(**({"in_dim": 2} | options))
    with pytest.raises(ValueError, match="x1: expected"):
        InfiniteWidthReLUKernel(2)(points()).to_dense()
