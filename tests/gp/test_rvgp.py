"""The Gaussian process of vector fields against dense Gaussian algebra and known symmetries."""

import math

import pytest
import torch
from scipy.stats import ortho_group

from torchzoo.gp import RVGP, ConnectionLaplacian, GraphConnectionKernel, furthest_points
from torchzoo.testing import CountElements


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def sphere(n, seed=0):
    many = torch.nn.functional.normalize(normal(6 * n, 3, seed=seed), dim=1)
    return many[furthest_points(many, n)]


def rotations(n, m, seed=1):
    """Orthogonal matrices, half of them with a reflection."""
    made = ortho_group.rvs(m, size=n, random_state=seed)
    return torch.from_numpy(made).view(n, m, m)


def fitted(points=None, max_iter=0, **options):
    """A process of 50 nodes with vectors at 30 of them, of which some are not tangent."""
    points = sphere(50) if points is None else points
    gp = RVGP(points, **{"num_eigenpairs": 16, "k": 6, "dim": 2, "noise": 0.02, **options})
    known = torch.arange(30) * 7 % 50
    gp.fit(known, normal(30, 3, seed=3), max_iter=max_iter)
    return gp, known


def dense(gp, known):
    """Mean, covariance of all components, and log density, from the full kernel matrix."""
    every = torch.arange(len(gp.vectors))
    k = gp.kernel.matrix(every)
    rows = (3 * known[:, None] + torch.arange(3)).flatten()
    y = gp.vectors[known].flatten()
    noisy = k[rows][:, rows] + gp.noise * torch.eye(len(rows)).double()
    solved = torch.linalg.solve(noisy, k[rows])
    zero = torch.zeros_like(y)
    log_p = torch.distributions.MultivariateNormal(zero, noisy).log_prob(y)
    return y @ solved, k - k[:, rows] @ solved, log_p


@pytest.mark.claim(
    65,
    "The kernel is Phi S Phi^T of the normalised Matérn or squared-exponential spectrum, written "
    "out node by node",
    tolerance=1e-10,
)
@pytest.mark.parametrize(("family", "shift"), [("matern", 0.0), ("matern", 1.0), ("se", 0.0)])
def test_kernel_is_its_formula(family, shift):
    laplacian = ConnectionLaplacian(sphere(40), k=6, dim=2)
    values, local = laplacian.eigs(10)
    vectors = laplacian.lift(local)
    kernel = GraphConnectionKernel(
        values, vectors, nu=2.5, kappa=1.7, outputscale=0.6, family=family, shift=shift
    )
    if family == "matern":
        weights = [(2 * 2.5 / 1.7**2 + v) ** (-2.5 - shift) for v in values.tolist()]
    else:
        weights = [math.exp(-(1.7**2) * v / 2) for v in values.tolist()]
    expected = torch.zeros(3 * 2, 3).double()
    for row, i in enumerate((5, 8)):
        for weight, left, right in zip(weights, vectors[i].T, vectors[31].T, strict=True):
            scaled = 0.6 * 40 * 3 * weight / sum(weights)
            expected[3 * row : 3 * row + 3] += scaled * torch.outer(left, right)
    found = kernel.matrix(torch.tensor([5, 8]), torch.tensor([31]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    every = kernel.matrix(torch.arange(40)).diagonal()
    assert every.mean().item() == pytest.approx(0.6, rel=1e-9)
    assert GraphConnectionKernel(values, vectors).spectrum.equal(
        GraphConnectionKernel(values, vectors, nu=1.5, kappa=5.0, outputscale=1.0).spectrum
    )


@pytest.mark.claim(
    65, "Rotating and reflecting the tangent frames leaves the kernel as it is", tolerance=1e-8
)
@pytest.mark.parametrize("count", [10, 11])
def test_gauge_invariance(count):
    points = sphere(60)
    laplacian = ConnectionLaplacian(points, k=7, dim=2)
    other = ConnectionLaplacian(points, k=7, frames=laplacian.frames @ rotations(60, 2))
    every = torch.arange(60)
    one, two = (RVGP(each, num_eigenpairs=count).kernel for each in (laplacian, other))
    torch.testing.assert_close(one.matrix(every), two.matrix(every), rtol=0, atol=1e-8)
    assert one.matrix(every).abs().max() > 0.5


@pytest.mark.claim(65, "Without transport the kernel depends on the frames", tolerance=None)
@pytest.mark.parametrize("how", ["left out", "transposed"])
def test_wrong_transport_is_not_invariant(how):
    points = sphere(60)
    laplacian = ConnectionLaplacian(points, k=7, dim=2)
    other = ConnectionLaplacian(points, k=7, frames=laplacian.frames @ rotations(60, 2))
    kernels = []
    for each in (laplacian, other):
        eye = torch.eye(2).double().expand_as(each.transport)
        each.transport = eye if how == "left out" else each.transport.mT
        kernels.append(RVGP(each, num_eigenpairs=10).kernel.matrix(torch.arange(60)))
    assert (kernels[0] - kernels[1]).abs().max() > 0.1


@pytest.mark.claim(
    65,
    "Predictions and the marginal likelihood are those of dense Gaussian regression with the "
    "kernel matrix",
    tolerance=1e-8,
)
@pytest.mark.parametrize("family", ["matern", "se"])
def test_prediction_is_dense(family):
    gp, known = fitted(family=family, kappa=1.2)
    mean, covariance, log_p = dense(gp, known)
    found = gp(torch.arange(50))
    torch.testing.assert_close(found.mean.flatten(), mean, rtol=0, atol=1e-8)
    blocks = torch.stack([covariance[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] for i in range(50)])
    torch.testing.assert_close(found.covariance, blocks, rtol=0, atol=1e-8)
    torch.testing.assert_close(gp.log_marginal_likelihood(), log_p, rtol=1e-8, atol=0)
    torch.testing.assert_close(found.variance, covariance.diagonal().view(50, 3))
    one = gp(torch.tensor(4))
    torch.testing.assert_close(one.mean, found.mean[4])
    assert found.mean.abs().max() > 0.1


@pytest.mark.claim(
    65, "Predicted vectors are tangent, in mean and in covariance, and need no projection",
    tolerance=1e-8,
)  # fmt: skip
def test_predictions_are_tangent():
    gp, _ = fitted()
    found = gp(torch.arange(50))
    frames = gp.laplacian.frames
    normals = torch.linalg.cross(frames[..., 0], frames[..., 1])
    assert (found.mean * normals).sum(1).abs().max() < 1e-8
    assert (found.covariance @ normals[..., None]).abs().max() < 1e-8
    assert (gp.vectors[7] * normals[7]).sum().abs() > 0.05  # what it has seen is not


@pytest.mark.claim(
    65, "Rotating points and vectors rotates the predictions after the fit", tolerance=1e-6
)
def test_equivariance():
    points, turn = sphere(50), rotations(1, 3, seed=5)[0]
    known = torch.arange(0, 50, 2)
    vectors = torch.linalg.cross(points, normal(1, 3).expand_as(points)) + 0.1 * points
    models = []
    for frame in (torch.eye(3).double(), turn):
        gp = RVGP(points @ frame.mT, num_eigenpairs=16, k=6)
        gp.fit(known, (vectors @ frame.mT)[known], max_iter=20)
        models.append(gp(torch.arange(50)))
    one, two = models
    torch.testing.assert_close(one.mean @ turn.mT, two.mean, rtol=0, atol=1e-6)
    turned = turn @ one.covariance @ turn.mT
    torch.testing.assert_close(turned, two.covariance, rtol=0, atol=1e-6)


@pytest.mark.claim(
    65,
    "With the full spectrum tangent data are met as the noise goes to 0, in proportion to it",
    tolerance=0.02,
)
def test_interpolation():
    points = sphere(40)
    laplacian = ConnectionLaplacian(points, k=6, dim=2)
    vectors = torch.einsum("ndm,nm->nd", laplacian.frames, normal(40, 2))
    misses = []
    for noise in (1e-6, 1e-8):
        gp = RVGP(laplacian, num_eigenpairs=80, noise=noise)
        gp.fit(torch.arange(40), vectors, max_iter=0)
        misses.append((gp(torch.arange(40)).mean - vectors).norm().item())
    assert misses[0] < 1e-4
    assert misses[1] / misses[0] == pytest.approx(1e-2, rel=0.02)


@pytest.mark.claim(
    65, "The gradient of the marginal likelihood is that of finite differences", tolerance=1e-6
)
def test_gradient():
    gp, _ = fitted()
    names = [name for name, _ in gp.named_parameters()]

    def loss(*values):
        parameters = dict(zip(names, values, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(gp, parameters):
            return gp.log_marginal_likelihood()

    start = [p.detach().clone().requires_grad_() for p in gp.parameters()]
    assert len(start) == 4
    assert torch.autograd.gradcheck(loss, start, atol=1e-6)


@pytest.mark.claim(
    65, "The fit finds the noise and the scale of a field drawn from the prior", tolerance=0.25
)
def test_fit_recovers():
    points = sphere(200)
    truth = RVGP(points, num_eigenpairs=30, kappa=2.0, outputscale=2.0, noise=0.04)
    assert truth.laplacian.dim == 2
    phi = truth.kernel.evecs * truth.kernel.spectrum.detach().sqrt()
    field = phi @ normal(phi.shape[-1], seed=7)
    gp = RVGP(points, num_eigenpairs=30)
    known = torch.arange(0, 200, 2)
    seen = (field + 0.2 * normal(200, 3, seed=8))[known]
    before = gp.fit(known, seen, max_iter=0).value
    found = gp.fit(known, seen)
    assert found.value < before
    assert found.residual < 1e-4
    log_p = gp.log_marginal_likelihood().item()
    assert found.value.item() == pytest.approx(-log_p / 300)  # for each component seen
    assert gp.noise.item() == pytest.approx(0.04, rel=0.25)
    hidden = torch.arange(1, 200, 2)
    after = gp(hidden)
    miss = (after.mean - field[hidden]).norm() / field[hidden].norm()
    assert miss < 0.15
    ratio = (after.mean - field[hidden]).square().sum() / after.variance.sum()
    assert 0.5 < ratio < 2  # its variances are of the right size


@pytest.mark.claim(
    65,
    "At new points the eigenvectors obey Nyström's formula, and continue the known lowest fields "
    "of the sphere",
    tolerance=0.05,
)
def test_extension():
    points = sphere(400)
    gp = RVGP(points, num_eigenpairs=16)
    new = torch.nn.functional.normalize(normal(20, 3, seed=9), dim=1)
    found = gp.extend(new)
    near = torch.cdist(new, points).argsort(1)
    for row in (0, 11):
        around = points[near[row, :15]]
        frame = torch.linalg.svd(around - around.mean(0)).Vh[:2].T
        total = torch.zeros(2, 16).double()
        for j in near[row, :10]:
            u, _, vh = torch.linalg.svd(frame.T @ gp.laplacian.frames[j])
            total += u @ vh @ gp.laplacian.frames[j].T @ gp.kernel.evecs[j]
        expected = frame @ (total / (10 - gp.kernel.evals))
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-10)

    def lowest(x):
        """The gradients of the coordinates, and these turned by a right angle."""
        eye = torch.eye(3).double().expand(len(x), 3, 3)
        gradients = eye - x[:, :, None] * x[:, None]
        return torch.cat(
            [gradients, torch.linalg.cross(x[:, :, None].expand_as(eye), eye, dim=1)], 2
        )

    there = lowest(points).flatten(0, 1)
    mixed = torch.linalg.lstsq(there, gp.kernel.evecs[..., :6].flatten(0, 1)).solution
    error = found[..., :6] - lowest(new) @ mixed
    assert error.norm() / found[..., :6].norm() < 0.05
    posterior = gp.predict(found)
    assert posterior.mean.shape == (20, 3)
    with pytest.raises(ValueError, match="values: expected below 6, got"):
        RVGP(sphere(40), num_eigenpairs=80, k=6, dim=2).extend(new)


@pytest.mark.claim(
    65,
    "With the frames of the ambient space it is the scalar Laplacian's process of each component",
    tolerance=1e-8,
)
def test_ambient_frames_are_channels():
    points = sphere(40)
    frames = torch.eye(3).double().expand(40, 3, 3)
    gp = RVGP(ConnectionLaplacian(points, k=6, frames=frames), num_eigenpairs=15)
    adjacency = gp.laplacian.adjacency.to_dense()
    values, vectors = torch.linalg.eigh(adjacency.sum(1).diag() - adjacency)
    scalar = GraphConnectionKernel(values[:5].clamp_min(0), vectors[:, :5])
    every = torch.arange(40)
    expected = torch.kron(scalar.matrix(every), torch.eye(3).double())
    torch.testing.assert_close(gp.kernel.matrix(every), expected, rtol=0, atol=1e-8)


@pytest.mark.claim(
    65,
    "Likelihood and prediction take work linear in the nodes: the full kernel matrix is not formed",
    tolerance=0.1,
)
def test_work_is_linear():
    counts = []
    for n in (100, 200):
        gp = RVGP(sphere(n), num_eigenpairs=16, k=6, dim=2)
        gp.fit(torch.arange(0, n, 2), normal(n // 2, 3), max_iter=0)
        with CountElements() as work:
            gp.log_marginal_likelihood()
            gp(torch.arange(n))
        counts.append(work.elements)
    assert counts[1] / counts[0] < 2.1


def test_data_are_in_the_state():
    gp, known = fitted(max_iter=5)
    fresh = RVGP(sphere(50), num_eigenpairs=16, k=6, dim=2)
    fresh.load_state_dict(gp.state_dict())
    assert torch.equal(fresh(known).mean, gp(known).mean)
    prior = RVGP(sphere(50))
    assert prior(known).mean.abs().max() == 0
    assert len(prior.kernel.evals) == 50
    assert prior.laplacian.k == 10
    assert prior.noise.item() == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda gp: gp.fit(torch.tensor([0, 50]), normal(2, 3)), "idx_train: expected 0 to 49"),
        (lambda gp: gp.fit(torch.tensor([3, 3]), normal(2, 3)), "idx_train: .* some twice"),
        (lambda gp: gp.fit(torch.tensor([0, 1]), normal(2, 2)), r"vectors: expected \(2, 3\)"),
        (lambda gp: gp.fit(torch.tensor([1]), normal(1, 3) / 0), "vectors: expected finite"),
        (lambda gp: gp.fit(torch.tensor([]), normal(0, 3)), "idx_train: expected indices"),
        (lambda gp: gp(torch.ones(2)), "idx: expected integers, got torch.float32"),
        (lambda gp: gp.smooth(normal(49, 3)), r"vectors: expected \(50, 3\)"),
        (lambda gp: gp.extend(normal(4, 2)), r"points: expected \(N, 3\)"),
        (lambda gp: gp.predict(normal(4, 3, 2)), "encoding: expected"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(fitted()[0])
