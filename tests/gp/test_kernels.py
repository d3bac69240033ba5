"""Mixture kernels against finite differences, autograd, gpytorch and closed forms."""

import math
import pickle

import gpytorch
import pytest
import torch
from scipy.special import gamma, kv

from torchzoo.gp import GaussianMixtureKernel, StudentTMixtureKernel

KINDS = [
    pytest.param(StudentTMixtureKernel, {}, id="matern-5/2"),
    pytest.param(StudentTMixtureKernel, {"nu": 4.5}, id="matern-9/2"),
    pytest.param(GaussianMixtureKernel, {}, id="gauss"),
]


def drawn(kind, count=3, **options):
    """A kernel with parameters of no symmetry."""
    kernel = kind(count, freq_scale=1.5, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in kernel.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return kernel


def column(values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5, 3.5, 4.5])
def test_envelope_is_matern(nu):
    kernel = StudentTMixtureKernel(1, freq_scale=0.0, nu=nu, dtype=torch.float64)
    kernel.log_scales.data.fill_(0.4)
    r = column([0.05, 0.3, 1.1, 2.7])
    z = math.sqrt(2 * nu) * math.exp(0.4) * r[:, 0].numpy()
    expected = 2 ** (1 - nu) / gamma(nu) * z**nu * kv(nu, z)
    got = kernel(r, column([0.0])).to_dense()[:, 0]
    torch.testing.assert_close(got.detach(), torch.from_numpy(expected))


@pytest.mark.claim(
    143,
    "Closed-form derivatives of the kernel are those of autograd and of finite differences off the "
    "diagonal",
    tolerance=1e-8,
)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_derivatives_off_the_diagonal(kind, options):
    kernel = drawn(kind, **options)
    x, y = column([0.3, -0.71, 1.9]), column([0.11, 0.52])
    for first in range(4):
        for second in range(4 - first):
            low, high = kernel.derivative(x, y, first, second), None
            moved = x.clone().requires_grad_()
            value = kernel.derivative(moved, y, first, second)
            (slope,) = torch.autograd.grad(value.sum(), moved)
            exact = kernel.derivative(x, y, first + 1, second).sum(-1)
            torch.testing.assert_close(slope[:, 0], exact, rtol=1e-10, atol=1e-9)
            h = 1e-5
            high = kernel.derivative(x, y + h, first, second)
            low = kernel.derivative(x, y - h, first, second)
            exact = kernel.derivative(x, y, first, second + 1)
            error = ((high - low) / (2 * h) - exact).abs().max()
            assert error < 1e-7 * exact.abs().max() + 1e-8


@pytest.mark.claim(
    143,
    "On the diagonal the second derivative of the kernel has both the envelope's and the cosine's "
    "part, which autograd of abs(r) loses",
    tolerance=1e-8,
)
def test_derivatives_on_the_diagonal():
    kernel = drawn(StudentTMixtureKernel)
    a, mu, w = kernel.inverse_lengthscale, kernel.frequencies, kernel.weights
    x = column([0.0, 0.4])
    second = -(w * (5 / 3 * a**2 + (2 * math.pi * mu) ** 2)).sum()
    for orders, sign in (((2, 0), 1), ((0, 2), 1), ((1, 1), -1)):
        got = kernel.derivative(x, x, *orders).diagonal()
        torch.testing.assert_close(got, sign * second.expand(2), rtol=1e-8, atol=0)
    omega = 2 * math.pi * mu
    fourth = (w * (25 * a**4 + 6 * 5 / 3 * a**2 * omega**2 + omega**4)).sum()
    torch.testing.assert_close(kernel.derivative(x, x, 4).diagonal(), fourth.expand(2))
    assert kernel.derivative(x, x, 1).diagonal().abs().max() == 0
    assert kernel.derivative(x, x, 3).diagonal().abs().max() == 0
    moved = x.clone().requires_grad_()  # an odd order is differentiable there, too
    (slope,) = torch.autograd.grad(kernel.derivative(moved, x, 1).diagonal().sum(), moved)
    torch.testing.assert_close(slope[:, 0], second.expand(2))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_diagonal_is_the_limit(kind, options):
    kernel = drawn(kind, **options)
    for order in range(5):
        at = kernel.derivative(column([0.0]), column([0.0]), order)
        near = kernel.derivative(column([1e-8]), column([0.0]), order)
        torch.testing.assert_close(at, near, rtol=1e-5, atol=1e-2)


@pytest.mark.claim(
    143,
    "The Gaussian mixture is gpytorch's spectral mixture kernel of scale sqrt(2 exp(ls))/(2 pi)",
    tolerance=1e-6,
)
def test_gaussian_mixture_is_gpytorchs():
    ours = drawn(GaussianMixtureKernel, 4)
    peer = gpytorch.kernels.SpectralMixtureKernel(num_mixtures=4).double()
    peer.mixture_weights = ours.weights.detach()
    peer.mixture_means = ours.frequencies.detach()[:, None, None]
    peer.mixture_scales = ((2 * ours.log_scales.exp()).sqrt() / (2 * math.pi)).detach()[
        :, None, None
    ]
    x, y = column([0.0, 0.2, 1.4]), column([0.1, 0.9])
    torch.testing.assert_close(ours(x, y).to_dense(), peer(x, y).to_dense(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        ours.inverse_lengthscale / (2 * math.pi), peer.mixture_scales.flatten()
    )


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_dimensions_multiply_and_batches_are_a_loop(kind, options):
    kernel = drawn(kind, ard_num_dims=2, batch_shape=torch.Size([3]), **options)
    assert kernel.weights.shape == (3, 2, 3)
    x = torch.rand(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    full = kernel(x).to_dense()
    diagonal = kernel(x, diag=True)
    mixed = kernel.derivative(x, x, (2, 1), (0, 1))
    for b in range(3):
        parts, slopes = [], []
        for d in range(2):
            one = kind(3, dtype=torch.float64, **options)
            for name, parameter in one.named_parameters():
                parameter.data.copy_(getattr(kernel, name)[b, d])
            at = x[b, :, d : d + 1]
            parts.append(one(at).to_dense())
            slopes.append(one.derivative(at, at, *((2, 0), (1, 1))[d]))
        torch.testing.assert_close(full[b], parts[0] * parts[1])
        torch.testing.assert_close(diagonal[b], full[b].diagonal())
        torch.testing.assert_close(mixed[b], slopes[0] * slopes[1])


def test_start():
    kernel = StudentTMixtureKernel()
    torch.testing.assert_close(kernel.weights, torch.full((30,), 1 / 30))
    torch.testing.assert_close(kernel.frequencies, torch.linspace(0, 20, 30))
    torch.testing.assert_close(kernel.inverse_lengthscale, torch.ones(30))


def test_prune_keeps_what_weighs():
    kernel = StudentTMixtureKernel(4, dtype=torch.float64)
    kernel.log_weights.data = torch.tensor([1.0, 9e-4, 0.5, 1.1e-3], dtype=torch.float64).log()
    assert kernel.prune() == 1
    torch.testing.assert_close(kernel.weights.detach(), torch.tensor([1, 0.5, 1.1e-3]).double())
    expected = torch.tensor([0.0, 40 / 3, 20.0], dtype=torch.float64)
    torch.testing.assert_close(kernel.frequencies.detach(), expected)
    assert pickle.loads(pickle.dumps(kernel)).num_components == 3


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("num_components", lambda: StudentTMixtureKernel(0)),
        ("freq_scale", lambda: StudentTMixtureKernel(freq_scale=-1.0)),
        ("nu", lambda: StudentTMixtureKernel(nu=2.0)),
        ("ard_num_dims", lambda: GaussianMixtureKernel(ard_num_dims=0)),
        ("threshold", lambda: GaussianMixtureKernel().prune(2.0)),
        ("x1", lambda: GaussianMixtureKernel().derivative(torch.ones(2, 2), torch.ones(2, 1), 1)),
        (
            "order1",
            lambda: GaussianMixtureKernel().derivative(torch.ones(2, 1), torch.ones(2, 1), 5),
        ),
        ("order1", lambda: StudentTMixtureKernel(nu=1.5).derivative(*[torch.ones(2, 1)] * 2, 3)),
        ("order2", lambda: StudentTMixtureKernel().derivative(*[torch.ones(2, 1)] * 2, 0, -1)),
    ],
)
def test_errors(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: .*got"):
        call()
