"""Graphs, frames, transport and the connection Laplacian, against loops and known spectra."""

import numpy as np
import pytest
import torch
from scipy.linalg import expm, orthogonal_procrustes
from scipy.spatial import ConvexHull
from scipy.stats import ortho_group

from torchzoo.gp import (
    ConnectionLaplacian,
    connections,
    field_index,
    furthest_points,
    manifold_graph,
    mesh_graph,
    tangent_frames,
)
from torchzoo.gp import manifold_laplacian as module
from torchzoo.gp.manifold import frames_of


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def sphere(n, seed=0):
    """Points of even density on the unit sphere."""
    many = torch.nn.functional.normalize(normal(6 * n, 3, seed=seed), dim=1)
    return many[furthest_points(many, n)]


def rotations(n, m, seed=1):
    """Orthogonal matrices, half of them with a reflection."""
    made = ortho_group.rvs(m, size=n, random_state=seed)
    return torch.from_numpy(made).view(n, m, m)


def loops(laplacian):
    """The matrix, block by block."""
    t, a = laplacian.frames.numpy(), laplacian.adjacency.to_dense().numpy()
    n, _, m = t.shape
    found = np.zeros((n, m, n, m))
    for i in range(n):
        found[i, :, i, :] = a[i].sum() * np.eye(m)
        for j in range(n):
            if a[i, j] and i != j:
                found[i, :, j, :] = -orthogonal_procrustes(t[i], t[j])[0]
    return found.reshape(n * m, n * m)


@pytest.mark.claim(
    65,
    "The connection Laplacian is the matrix of Procrustes rotations built in loops, symmetric and "
    "positive semi-definite",
    tolerance=1e-10,
)
def test_matrix_is_loops():
    laplacian = ConnectionLaplacian(sphere(40), k=6, dim=2)
    matrix = laplacian.matrix().to_dense()
    np.testing.assert_allclose(matrix.numpy(), loops(laplacian), atol=1e-10)
    assert (matrix - matrix.mT).abs().max() < 1e-10
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10


@pytest.mark.claim(
    65,
    "On a flat plane it is the graph Laplacian kron I, its eigenvalues those of the graph "
    "Laplacian, each m times, also for estimated frames",
    tolerance=1e-8,
)
def test_flat_plane():
    basis = rotations(1, 3)[0][:, :2]
    points = normal(30, 2) @ basis.mT
    same = ConnectionLaplacian(points, k=5, frames=basis.expand(30, 3, 2))
    adjacency = same.adjacency.to_dense()
    scalar = adjacency.sum(1).diag() - adjacency
    expected = torch.kron(scalar, torch.eye(2).double())
    torch.testing.assert_close(same.matrix().to_dense(), expected, rtol=0, atol=1e-10)
    estimated = ConnectionLaplacian(points, k=5)
    assert estimated.dim == 2
    values = torch.linalg.eigvalsh(scalar).repeat_interleave(2)
    torch.testing.assert_close(estimated.eigs(60)[0], values, rtol=0, atol=1e-8)


def spectrum_groups(values):
    """Sizes of the first two groups, cut at the two largest relative gaps, and their means."""
    ratios = values[1:] / values[:-1]
    first, second = sorted(ratios[:18].topk(2).indices.tolist())
    low, high = values[: first + 1], values[first + 1 : second + 1]
    return len(low), len(high), float(high.mean() / low.mean())


def sphere_holds(laplacian):
    adjacency = laplacian.adjacency.to_dense()
    scalar = torch.linalg.eigvalsh(adjacency.sum(1).diag() - adjacency)
    values = laplacian.eigs(26)[0]
    first, second, ratio = spectrum_groups(values)
    half = float(values[:6].mean() / scalar[1:4].mean())
    return abs(half - 0.5) < 0.03 and (first, second) == (6, 10) and abs(ratio / 5 - 1) < 0.06


@pytest.mark.claim(
    65,
    "On a sphere the spectrum is l(l+1)-1: groups of 6 and 10 in ratio 1 to 5, the lowest half of "
    "the lowest of functions, and no parallel field",
    tolerance=0.06,
)
def test_sphere_spectrum():
    ball = ConnectionLaplacian(sphere(512), k=10)
    assert ball.dim == 2
    assert sphere_holds(ball)


@pytest.mark.claim(
    65, "With transport left out, or transposed, the sphere's spectrum is lost", tolerance=None
)
def test_wrong_transport():
    ball = ConnectionLaplacian(sphere(300), k=10)
    frames = ball.frames @ rotations(300, 2)
    wrong = ConnectionLaplacian(ball.points, frames=frames, adjacency=ball.adjacency)
    right = wrong.transport
    assert sphere_holds(wrong)  # so far only another gauge
    for transport in (torch.eye(2).double().expand_as(right), right.mT):
        wrong.transport = transport
        assert not sphere_holds(wrong)


@pytest.mark.claim(
    65,
    "On the flat torus in four dimensions the spectrum is that of functions, doubled, with two "
    "parallel fields",
    tolerance=0.05,
)
def test_clifford_torus():
    generator = torch.Generator().manual_seed(0)
    u, v = 2 * torch.pi * torch.rand(2, 3000, dtype=torch.float64, generator=generator)
    many = torch.stack([u.cos(), u.sin(), v.cos(), v.sin()], 1)
    laplacian = ConnectionLaplacian(many[furthest_points(many, 500)], k=10)
    adjacency = laplacian.adjacency.to_dense()
    scalar = torch.linalg.eigvalsh(adjacency.sum(1).diag() - adjacency)
    values = laplacian.eigs(18)[0]
    assert laplacian.dim == 2
    assert values[0] < 0.01 * scalar[1]
    expected = scalar[1:9].repeat_interleave(2)
    torch.testing.assert_close(values[2:18], expected, rtol=0.05, atol=0)


@pytest.mark.claim(
    65,
    "A pair of equal eigenvalues is never parted, and a sparse solver finds the same eigenvalues "
    "and subspaces as a dense one",
    tolerance=1e-7,
)
def test_groups_and_sparse_solver(monkeypatch):
    laplacian = ConnectionLaplacian(sphere(150), k=8)
    values, vectors = laplacian.eigs(7)
    assert len(values) == 8
    assert values[6] == pytest.approx(float(values[7]), rel=1e-8)
    monkeypatch.setattr(module, "_DENSE", 0)
    monkeypatch.setattr(torch.linalg, "eigh", None)  # not to be fallen back to
    sparse_values, sparse_vectors = laplacian.eigs(7)
    torch.testing.assert_close(sparse_values, values, rtol=1e-7, atol=1e-9)
    kernel, other = (v @ v.mT for v in (vectors, sparse_vectors))
    torch.testing.assert_close(kernel, other, rtol=0, atol=1e-7)


def test_random_walk():
    laplacian = ConnectionLaplacian(sphere(60), k=6, dim=2, normalization="random_walk")
    plain = ConnectionLaplacian(laplacian.points, k=6, dim=2)
    matrix = laplacian.matrix().to_dense()
    expected = plain.matrix().to_dense() / laplacian.degrees.repeat_interleave(2)[:, None]
    torch.testing.assert_close(matrix, expected)
    values, vectors = laplacian.eigs(6)
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=1e-10)
    weighted = vectors.mT @ (plain.degrees.repeat_interleave(2)[:, None] * vectors)
    expected = plain.degrees.mean() * torch.eye(6).double()
    torch.testing.assert_close(weighted, expected, rtol=0, atol=1e-10)
    every = ConnectionLaplacian(laplacian.points, k=6, dim=2).lift(vectors)
    torch.testing.assert_close(every[7], laplacian.frames[7] @ vectors[14:16])


def test_smooth():
    laplacian = ConnectionLaplacian(sphere(40), k=6, dim=2)
    vectors = normal(40, 3)
    local = torch.einsum("ndm,nd->nm", laplacian.frames, vectors)
    flow = torch.from_numpy(expm(-0.7 * laplacian.matrix().to_dense().numpy()))
    expected = (flow @ local.flatten()).view_as(local)
    ambient = torch.einsum("ndm,nm->nd", laplacian.frames, expected)
    torch.testing.assert_close(laplacian.smooth(vectors, 0.7), ambient, rtol=0, atol=1e-10)
    adjacency = laplacian.adjacency.to_dense()
    flow = torch.from_numpy(expm(-0.7 * (adjacency.sum(1).diag() - adjacency).numpy()))
    norms = laplacian.smooth(vectors, 0.7, keep_norm=True).norm(dim=1)
    torch.testing.assert_close(norms, flow @ local.norm(dim=1), rtol=0, atol=1e-10)


def test_frames_span_the_tangent_space():
    points = sphere(300)
    frames, dim = tangent_frames(points, manifold_graph(points))
    assert dim == 2
    eye = torch.eye(2).double().expand(300, 2, 2)
    torch.testing.assert_close(frames.mT @ frames, eye, rtol=0, atol=1e-12)
    assert torch.einsum("nd,ndm->nm", points, frames).abs().mean() < 0.03


def test_frames_take_neighbors_along_the_graph():
    """Two lines that nearly touch: the shortest path leads along a line, not across."""
    x = torch.arange(12.0).double()
    near, far = (torch.stack([x, x.new_full((12,), y)], 1) for y in (0.0, 0.4))
    points = torch.cat([near, far])
    line = torch.arange(11)
    i = torch.cat([line, line + 12, torch.tensor([11])])
    j = torch.cat([line + 1, line + 13, torch.tensor([23])])
    adjacency = torch.zeros(24, 24).double()
    adjacency[i, j] = adjacency[j, i] = 1
    frames, dim = tangent_frames(points, adjacency, neighbors=3)
    assert dim == 1
    assert frames[:9, 0].abs().min() > 1 - 1e-6


def test_dimension_is_by_mean_less_deviation():
    """Half of the points lie on a line, half in a plane: shares 1 and 0.7 of one dimension."""
    around = torch.full((2, 4, 3), 5.0).double()
    around[0, :, 0] += torch.tensor([1.0, -1.0, 2.0, -2.0])
    around[1, :2, 0] += torch.tensor([7**0.5, -(7**0.5)])
    around[1, 2:, 1] += torch.tensor([3**0.5, -(3**0.5)])
    assert frames_of(around, explained=0.69)[1] == 1  # 0.85 - 0.15 = 0.7
    with pytest.raises(ValueError, match=r"dim: .* span 2 dimensions at each point, got .* 1"):
        frames_of(around, explained=0.71)


def test_furthest_points():
    points = normal(50, 2)
    chosen = furthest_points(points, 12).tolist()
    for count in range(1, 12):
        gaps = torch.cdist(points, points[chosen[:count]]).amin(1)
        assert chosen[count] == int(gaps.argmax())
    spaced = points[furthest_points(points, spacing=0.2)]
    gaps = torch.cdist(spaced, spaced) + 1e3 * torch.eye(len(spaced)).double()
    diameter = torch.cdist(points, points).max()
    assert gaps.min() >= 0.2 * diameter > torch.cdist(points, spaced).amin(1).max()


@pytest.mark.claim(
    65,
    "Indices of a field on a sphere add up to 2, a vortex or source counting 1, a saddle -1",
    tolerance=None,
)
def test_index():
    points = sphere(300)
    faces = torch.from_numpy(ConvexHull(points.numpy()).simplices).long()
    assert mesh_graph(faces, 300).sum() == 2 * (3 * 300 - 6)  # Euler's formula
    axis, form = normal(3, seed=1), torch.diag(torch.tensor([1.0, 2.0, 4.0]).double())
    vortices = torch.linalg.cross(axis.expand_as(points), points)
    found = field_index(points, vortices, faces)
    assert found.abs().sum() == found.sum() == 2
    downhill = -points @ form
    downhill = downhill - (downhill * points).sum(1, keepdim=True) * points
    found = field_index(points, downhill, faces)
    assert found[found != 0].sort().values.tolist() == [-1, -1, 1, 1, 1, 1]
    assert torch.equal(field_index(points, downhill, faces.flip(1)), found)


def line(n):
    return torch.arange(float(n)).double()[:, None] * torch.tensor([1.0, 0.0]).double()


ISOLATED = torch.eye(5).roll(1, 0)[:4, :4]
ISOLATED = torch.nn.functional.pad(ISOLATED + ISOLATED.mT, (0, 1, 0, 1))


@pytest.mark.claim(
    65, "Points that are equal, isolated or in pieces are refused by name", tolerance=None
)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: manifold_graph(torch.zeros(5, 2), k=2), "points: expected distinct.* got 5"),
        (lambda: manifold_graph(line(4) / 0, k=2), "points: expected finite"),
        (lambda: manifold_graph(line(4), k=4), "k: expected 1 to 3 .* got 4"),
        (lambda: manifold_graph(torch.cat([line(4), line(3) + 50]), k=2), "got 2 components"),
        (lambda: tangent_frames(normal(5, 2), ISOLATED), "adjacency: .* got 1 without any"),
        (lambda: tangent_frames(line(5), 1 - torch.eye(5), dim=3), "dim: expected 1 to 2.* got 3"),
        (lambda: tangent_frames(line(5), 1 - torch.eye(5), dim=2), "span 2 dimensions.* at 5"),
        (
            lambda: tangent_frames(line(3), 1 - torch.eye(3), dim=2, neighbors=1),
            "neighbors: .*least 3.* got 1",
        ),
        (lambda: connections(torch.eye(2)[None], torch.ones(2, 2)), "adjacency: .*got \\(2, 2\\)"),
        (lambda: connections(torch.ones(2, 2, 1), torch.ones(2, 2).tril()), "both directions"),
        (lambda: mesh_graph(torch.tensor([[0, 1, 3]]), 3), "faces: expected corners"),
        (lambda: furthest_points(normal(5, 2), 6), "count: expected 1 to 5, got 6"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
