"""The solver against dense Gaussian densities, normal equations and known solutions."""

import math
from functools import partial

import pytest
import torch

from torchzoo.gp import GPHM, GaussianMixtureKernel, KroneckerGP, StudentTMixtureKernel

few = partial(StudentTMixtureKernel, 3, freq_scale=3.0)


def line(n):
    return torch.linspace(0, 1, n, dtype=torch.float64)


def ends(n):
    mask = torch.zeros(n, dtype=torch.bool)
    mask[0] = mask[-1] = True
    return mask


def drawn(gp):
    """Parameters of no symmetry."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gp.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.3 * noise)
    return gp


def plane(operator=None, **options):
    """A solver on an uneven 4 x 5 grid, parameters and precisions at random."""
    axes = [torch.tensor([0.0, 0.2, 0.5, 0.6]).double(), line(5)]
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0], mask[:, -1] = True, True
    known = torch.linspace(-1, 1, 8, dtype=torch.float64)

    def mixed(f):
        return f.dx(0, 2) - 0.7 * f.dx(1) + 0.3 * f.mixed((1, 1)) * f.x[1] + f.u - f.x[0]

    gp = GPHM(axes, operator or mixed, (mask, known), kernel_factory=few, jitter=1e-4, **options)
    drawn(gp).log_precisions.copy_(torch.tensor([0.4, -0.3]))
    return gp, mask, known


def dense(gp):
    """The prior covariance of the flattened values, and derivative matrices."""
    grams, maps = [], []
    for kernel, grid in zip(gp.kernels, gp.grids, strict=True):
        x = grid[:, None]
        gram = kernel(x).to_dense()
        gram = gram + gp.jitter * torch.eye(len(x)).double()
        grams.append(gram)
        maps.append(
            [torch.eye(len(x)).double()]
            + [kernel.derivative(x, x, m) @ gram.inverse() for m in (1, 2)]
        )
    return torch.kron(*grams), maps


def dense_loss(gp, mask, known, values):
    """The loss from dense matrices and torch's densities, constants dropped."""
    cov, maps = dense(gp)
    prior = torch.distributions.MultivariateNormal(torch.zeros(len(cov)).double(), cov)
    u = values.flatten()
    log_prior = prior.log_prob(u) + len(u) / 2 * math.log(2 * math.pi)
    x, y = torch.meshgrid(*gp.grids, indexing="ij")

    def field(i, j):
        return (torch.kron(maps[0][i], maps[1][j]) @ u).reshape(4, 5)

    residual = field(2, 0) - 0.7 * field(0, 1) + 0.3 * field(1, 1) * y + values - x
    tau, v = gp.log_precisions.exp()
    miss = values[mask] - known
    at_edge = len(known) / 2 * tau.log() - tau / 2 * (miss**2).sum()
    inside = 20 / 2 * v.log() - v / 2 * (residual**2).sum()
    return -(log_prior + 200 * at_edge + inside)


@pytest.mark.claim(
    143,
    "The loss by Kronecker algebra is the dense normal log density with the two likelihoods",
    tolerance=1e-8,
)
def test_loss_is_dense():
    gp, mask, known = plane()
    expected = dense_loss(gp, mask, known, gp.values)
    torch.testing.assert_close(gp.loss(), expected, rtol=1e-8, atol=0)
    cov, _ = dense(gp)
    prior = torch.distributions.MultivariateNormal(torch.zeros(20).double(), cov)
    expected = prior.log_prob(gp.values.flatten())
    torch.testing.assert_close(gp.log_prob(), expected, rtol=1e-8, atol=0)


@pytest.mark.claim(
    143,
    "The minimum of a linear problem in the grid values is that of the dense normal equations",
    tolerance=1e-6,
)
def test_solve_is_the_normal_equations():
    gp, mask, known = plane()
    zero = torch.zeros(4, 5, dtype=torch.float64)

    def loss(u):
        return dense_loss(gp, mask, known, u)

    slope, curvature = torch.func.grad(loss)(zero), torch.func.hessian(loss)(zero)
    expected = -torch.linalg.solve(curvature.reshape(20, 20), slope.flatten()).reshape(4, 5)
    gp.solve()
    torch.testing.assert_close(gp.values.detach(), expected, rtol=1e-6, atol=1e-9)
    assert expected.abs().max() > 0.1


@pytest.mark.claim(
    143,
    "The profile solve has no gradient in the grid values, and its kernel gradient is that of the "
    "profiled loss by finite differences",
    tolerance=1e-6,
)
def test_profile_gradient():
    gp, _, _ = plane()
    start = torch.autograd.grad(gp.loss(), gp.values)[0].norm()
    gp.solve()
    slopes = torch.autograd.grad(gp.loss(), [gp.values, *gp.kernels.parameters()])
    assert slopes[0].norm() < 1e-6 * start
    for parameter, slope in zip(gp.kernels.parameters(), slopes[1:], strict=True):
        sides = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                parameter[1] += h
            gp.solve()
            sides.append(gp.loss().item())
            with torch.no_grad():
                parameter[1] -= h
        difference = (sides[0] - sides[1]) / 2e-5
        assert difference == pytest.approx(slope[1].item(), rel=1e-5, abs=1e-5)


def test_iterative_solve_is_the_dense_one(monkeypatch):
    gp, _, _ = plane()
    gp.solve()
    expected = gp.values.detach().clone()
    monkeypatch.setattr("torchzoo.gp.gp_pde._DENSE", 1)
    gp, _, _ = plane()
    for _ in range(3):
        gp.solve()
    torch.testing.assert_close(gp.values.detach(), expected, rtol=1e-6, atol=1e-8)


def test_nonlinear_solve_is_a_minimum():
    """Allen-Cahn, whose minimum Gauss and Newton find by several steps."""
    x = line(30)
    exact = (6 * x).sin()
    source = -36 * exact + exact * (exact**2 - 1)
    gp = GPHM(
        [x],
        lambda f: f.dx(0, 2) + f.u * (f.u**2 - 1) - source,
        (ends(30), exact[ends(30)]),
        kernel_factory=partial(StudentTMixtureKernel, 5, freq_scale=2.0),
    )
    start = torch.autograd.grad(gp.loss(), gp.values)[0].norm()
    gp.solve()
    assert torch.autograd.grad(gp.loss(), gp.values)[0].norm() < 1e-6 * start
    gp.fit(60)
    assert (gp(x[:, None]) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.claim(
    143,
    "The loss has right gradients and does not depend on the order of components",
    tolerance=None,
)
def test_gradients_and_order_of_components():
    gp, _, _ = plane()
    kernel = gp.kernels[0]
    names = ("log_weights", "raw_frequencies", "log_scales")

    def loss(values, *parameters):
        state = {f"kernels.0.{n}": p for n, p in zip(names, parameters, strict=True)}
        with torch.nn.utils.stateless._reparametrize_module(gp, {"values": values, **state}):
            return gp.loss()

    leaves = [gp.values, *(getattr(kernel, name) for name in names)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(loss, leaves, rtol=1e-4)
    before = gp.loss()
    with torch.no_grad():
        for name in names:
            getattr(kernel, name).copy_(getattr(kernel, name)[[2, 0, 1]])
    torch.testing.assert_close(gp.loss(), before, rtol=1e-12, atol=0)


@pytest.mark.claim(
    143, "At the nodes the mean is the grid values, and derivatives off them are the sine's", 1e-4
)
def test_interpolation():
    x = line(60)
    one = partial(StudentTMixtureKernel, 1, freq_scale=0.0)
    gp = KroneckerGP([x], (2 * math.pi * 4 * x).sin(), kernel_factory=one, jitter=1e-12)
    with torch.no_grad():
        gp.kernels[0].raw_frequencies.fill_(4.0)
        gp.kernels[0].log_scales.fill_(-1.0)
    torch.testing.assert_close(gp(x[:, None]), gp.values, atol=1e-4, rtol=0)
    at = torch.tensor([[0.203], [0.5], [0.77]], dtype=torch.float64)
    omega = 2 * math.pi * 4
    for order, scale in ((1, omega), (2, omega**2)):
        expected = scale * (omega * at[:, 0] + order * math.pi / 2).sin()
        assert (gp.derivative(at, order) - expected).abs().max() < 1e-4 * scale
    variance = gp.variance(x[:, None])
    assert variance.max() < 1e-9
    assert gp.variance(torch.tensor([[1.5]]).double()) > 1e-3


def test_mean_and_variance_are_those_of_dense_conditioning():
    gp, _, _ = plane()
    cov, _ = dense(gp)
    points = torch.rand(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nodes = torch.cartesian_prod(*gp.grids)

    def cross(m, n):
        parts = [
            kernel.derivative(points[:, d, None], nodes[:, d, None], order)
            for d, (kernel, order) in enumerate(zip(gp.kernels, (m, n), strict=True))
        ]
        return parts[0] * parts[1]

    solved = torch.linalg.solve(cov, gp.values.flatten())
    torch.testing.assert_close(gp(points), cross(0, 0) @ solved)
    torch.testing.assert_close(gp.derivative(points, (1, 2)), cross(1, 2) @ solved)
    known = (cross(0, 0) * torch.linalg.solve(cov, cross(0, 0).mT).mT).sum(-1)
    prior = math.prod(kernel.weights.sum().item() for kernel in gp.kernels)
    torch.testing.assert_close(gp.variance(points), prior - known)


def test_even_axes_use_lags():
    """The matrix gathered from its lags is the kernel's own, for even and odd orders."""
    gp = drawn(KroneckerGP([line(9)], kernel_factory=few))
    x = line(9)[:, None]
    for order in range(4):
        direct = gp.kernels[0].derivative(x, x, order)
        torch.testing.assert_close(gp.covariance(0, order), direct, rtol=1e-9, atol=1e-9)


def test_batch_is_a_loop():
    speeds = torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None]
    x = line(20)

    def family(f, c=speeds):
        return f.dx(0, 2) + c * f.u

    known = torch.tensor([[0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    gp = GPHM([x], family, (ends(20), known), kernel_factory=few, batch_shape=(2,))
    gp.solve()
    alone = []
    for i in range(2):
        one = GPHM([x], partial(family, c=speeds[i]), (ends(20), known[i]), kernel_factory=few)
        one.solve()
        torch.testing.assert_close(gp.values[i], one.values, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gp(x[::3, None])[i], one(x[::3, None]), rtol=1e-5, atol=1e-7)
        alone.append(one.loss())
    torch.testing.assert_close(gp.loss(), sum(alone))


def poisson(exact, source, n, **options):
    x = line(n)
    return GPHM([x], lambda f: f.dx(0, 2) - source(x), (ends(n), exact(x)[ends(n)]), **options)


@pytest.mark.claim(
    143,
    "A fit of a sine of frequency 15 puts 90 % of the weight within 1 % of it, and keeps less than "
    "a third of the components",
    tolerance=0.1,
)
def test_frequency_of_a_sine_is_found():
    omega = 2 * math.pi * 15
    gp = poisson(lambda x: (omega * x).sin(), lambda x: -(omega**2) * (omega * x).sin(), 200)
    gp.fit(450)
    kernel = gp.kernels[0]
    near = (kernel.frequencies - 15).abs() < 0.15
    assert kernel.weights[near].sum() >= 0.9 * kernel.weights.sum()
    assert (kernel.weights > 1e-2 * kernel.weights.max()).sum() < 10


@pytest.mark.claim(
    143, "A fit of sin 6x cos 100x finds both sidebands, (100 ± 6)/(2 pi)", tolerance=0.01
)
def test_sidebands_are_found():
    def exact(x):
        return (6 * x).sin() * (100 * x).cos()

    def source(x):
        return -10036 * exact(x) - 1200 * (6 * x).cos() * (100 * x).sin()

    gp = poisson(exact, source, 120)
    gp.fit(150)
    kernel = gp.kernels[0]
    for omega in (94, 106):
        mu = omega / (2 * math.pi)
        near = (kernel.frequencies - mu).abs() < 0.01 * mu
        assert kernel.weights[near].sum() > 0.15 * kernel.weights.sum()
    x = line(301)
    assert (gp(x[:, None]) - exact(x)).norm() < 0.01 * exact(x).norm()


@pytest.mark.claim(
    143, "In single precision a jitter above 1e-3 comes with a clear warning", tolerance=None
)
def test_warning_of_large_jitter():
    def smooth(**options):
        kernel = GaussianMixtureKernel(1, freq_scale=0.0, **options)
        torch.nn.init.constant_(kernel.log_scales, -9.0)
        return kernel

    gp = KroneckerGP([torch.linspace(0, 1, 2000)], kernel_factory=smooth, jitter=1e-8)
    with pytest.warns(UserWarning, match=r"dimension 0: .*jitter of .* in float32; use float64"):
        gp.log_prob()
    assert gp.jitters[0] > 1e-3
    assert gp(torch.tensor([[0.5]])).isfinite()


def test_joint_fit_lowers_the_loss():
    gp = poisson(lambda x: (6 * x).sin(), lambda x: -36 * (6 * x).sin(), 20, kernel_factory=few)
    losses = gp.fit(60, method="joint", optimizer=partial(torch.optim.Adam, lr=0.02))
    assert losses[-1] < losses[0] - 10
    assert gp.values.abs().max() > 0.05


def test_precisions_have_a_ceiling():
    gp = poisson(lambda x: 0 * x, lambda x: 0 * x, 12, kernel_factory=few)
    gp.fit(40, optimizer=partial(torch.optim.Adam, lr=0.5))
    assert gp.log_precisions.tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"grids\[0\]: .*increasing", lambda: GPHM([[0.0, 0.0]])),
        ("grids: ", lambda: GPHM([])),
        ("values: ", lambda: KroneckerGP([[0.0, 1.0]], [1.0])),
        ("jitter: ", lambda: GPHM([[0.0, 1.0]], jitter=-1.0)),
        ("boundary: .*mask", lambda: GPHM([[0.0, 1.0]], boundary=([True], [0.0]))),
        ("boundary: .*values", lambda: GPHM([[0.0, 1.0]], boundary=([True, False], [0.0, 1.0]))),
        ("boundary_weight: ", lambda: GPHM([[0.0, 1.0]], boundary_weight=-1.0)),
        (r"operator: .*\(2,\), got \(1,\)", lambda: GPHM([[0.0, 1.0]], lambda f: f.u[:1]).loss()),
        ("method: ", lambda: GPHM([[0.0, 1.0]]).fit(method="other")),
        ("steps: ", lambda: GPHM([[0.0, 1.0]]).fit(0)),
        ("points: ", lambda: GPHM([[0.0, 1.0]])(torch.ones(3, 2))),
        ("order: ", lambda: GPHM([[0.0, 1.0]]).derivative(torch.ones(3, 1), (1, 1))),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
