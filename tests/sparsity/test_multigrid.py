"""Multigrid against dense algebra: products, prolongators, and the exact error operator."""

import networkx as nx
import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.csgraph import shortest_path
from scipy.sparse.linalg import LinearOperator, cg

from torchzoo.sparsity import csr
from torchzoo.sparsity.multigrid import (
    aggregate,
    couplings,
    damping,
    galerkin_product,
    prolongator,
    smoothed_aggregation,
)

DOUBLE = torch.float64
TIGHT = {"rtol": 0, "atol": 1e-11}


def laplacian(n, *, stretch=1.0):
    """Five-point differences on an n by n grid, zero at the border."""
    line = scipy.sparse.diags([-1.0, 2.0, -1.0], [-1, 0, 1], (n, n))
    eye = scipy.sparse.eye(n)
    return scipy.sparse.csr_array(
        scipy.sparse.kron(line, eye) + stretch * scipy.sparse.kron(eye, line)
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vector(n, seed=0):
    return torch.randn(n, generator=seeded(seed), dtype=DOUBLE)


@pytest.mark.claim(135, "The Galerkin product equals scipy's P^T A P", tolerance=1e-12)
@pytest.mark.parametrize("seed", range(5))
def test_galerkin_product(seed):
    generator = np.random.default_rng(seed)
    a = scipy.sparse.random_array((30, 30), density=0.2, rng=generator)
    p = scipy.sparse.random_array((30, 9), density=0.3, rng=generator)
    found = galerkin_product(csr.from_scipy(a), csr.from_scipy(p))
    expected = torch.from_numpy((p.T @ a @ p).toarray())
    torch.testing.assert_close(found.to_dense(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "graph",
    [
        nx.grid_2d_graph(12, 9),
        nx.barabasi_albert_graph(100, 2, seed=0),
        nx.path_graph(31),
        nx.disjoint_union(nx.path_graph(7), nx.empty_graph(4)),
    ],
    ids=["grid", "power law", "path", "isolated nodes"],
)
@pytest.mark.parametrize("seed", range(3))
def test_aggregates_grow_around_a_maximal_set_of_roots(graph, seed):
    """Roots are three edges apart, what has an edge is within two of one; groups hold together."""
    a = nx.to_scipy_sparse_array(graph, dtype=float).tocoo()
    row, col = (torch.from_numpy(t) for t in a.coords)
    label, roots = aggregate(row, col, len(graph), generator=seeded(seed))
    distance = torch.from_numpy(shortest_path(a, unweighted=True))
    between = distance[roots][:, roots] + torch.full((len(roots),), torch.inf).diag()
    assert between.min() >= 3
    linked = torch.zeros(len(graph), dtype=torch.bool).index_fill(0, row.long(), True)
    assert torch.equal(label >= 0, linked)
    assert (distance[roots][:, linked].amin(0) <= 2).all()
    assert torch.equal(label[roots], torch.arange(len(roots)))
    for node in linked.nonzero().flatten().tolist():
        near = distance[roots[label[node]], node]
        assert near <= 2
        if (distance[roots, node] <= 1).any():
            assert near <= 1
    numbered = nx.convert_node_labels_to_integers(graph)
    for group in range(len(roots)):
        assert nx.is_connected(numbered.subgraph((label == group).nonzero().flatten().tolist()))


def test_couplings_are_compared_with_both_diagonals():
    a = torch.tensor([[4.0, 1.0, -2.0], [1.0, 1.0, 0.5], [-2.0, 0.5, 9.0]], dtype=DOUBLE)
    strong = couplings(a.to_sparse_csr(), 0.3).view(3, 3)
    size = a.diagonal().sqrt()
    expected = (a.abs() > 0.3 * size[:, None] * size) & ~torch.eye(3, dtype=torch.bool)
    assert torch.equal(strong, expected)
    assert expected.sum() == 4  # 1 > 0.6 and 2 > 1.8, but not 0.5 > 0.9


@pytest.mark.parametrize("smooth", [True, False])
def test_prolongator_equals_its_dense_formula(smooth):
    """(I - w D^-1 A_F) T, whose range holds the near-null vector where A_F maps it to 0."""
    matrix = laplacian(8, stretch=0.01)  # couplings along one axis are weak
    a = csr.from_scipy(matrix)
    dense = a.to_dense()
    strong = couplings(a, 0.08)
    label, _ = aggregate(*(t[strong] for t in csr.entries(a)[:2]), 64, generator=seeded())
    near_null = vector(64).abs() + 0.5
    p, below = prolongator(a, near_null, label, strong if smooth else None)

    tentative = torch.zeros(64, len(below), dtype=DOUBLE)
    tentative[torch.arange(64), label] = near_null
    torch.testing.assert_close(below, tentative.norm(dim=0), **TIGHT)
    tentative = tentative / tentative.norm(dim=0)
    torch.testing.assert_close(tentative @ below, near_null, **TIGHT)
    if not smooth:
        torch.testing.assert_close(p.to_dense(), tentative, **TIGHT)
        return
    weak = (dense.abs() <= 0.08 * dense.diagonal().sqrt().outer(dense.diagonal().sqrt())) & (
        dense != 0
    )
    filtered = torch.where(weak, 0.0, dense) + (dense * weak).sum(1).diag()
    assert 0 < weak.sum() < dense.count_nonzero()
    torch.testing.assert_close(filtered.sum(1), dense.sum(1), **TIGHT)
    inverse = 1 / dense.diagonal()
    omega = damping(csr.from_scipy(scipy.sparse.csr_array(filtered.numpy())), inverse)
    expected = tentative - omega * inverse[:, None] * (filtered @ tentative)
    torch.testing.assert_close(p.to_dense(), expected, **TIGHT)


def test_damping_finds_the_spectral_radius():
    a = csr.from_scipy(laplacian(20))
    inverse = 1 / csr.diagonal(a)
    radius = torch.linalg.eigvals(inverse[:, None] * a.to_dense()).abs().max()
    assert damping(a, inverse) == pytest.approx(4 / (3 * radius.item()), rel=0.05)
    assert damping(a, inverse) >= 4 / (3 * radius.item())  # the estimate is from below


def error_operator(solver, depth=0):
    """I - B A of a cycle from a level down, by its definition, dense."""
    a = solver.matrices[depth].to_dense()
    if depth == len(solver.levels):
        return torch.eye(len(a), dtype=DOUBLE) - torch.linalg.pinv(a, hermitian=True) @ a
    level = solver.levels[depth]
    eye = torch.eye(len(a), dtype=DOUBLE)
    relaxed = torch.linalg.matrix_power(eye - level.relax[:, None] * a, solver.sweeps)
    p = level.prolong.to_dense()
    below = p.T @ a @ p
    inverse = (torch.eye(len(below), dtype=DOUBLE) - error_operator(solver, depth + 1)) @ (
        torch.linalg.pinv(below, hermitian=True)
    )
    return relaxed @ (eye - p @ inverse @ p.T @ a) @ relaxed


@pytest.mark.claim(
    135, "A two-grid and a V-cycle on Galerkin products equal their exact error operator"
)
@pytest.mark.parametrize("options", [{"max_levels": 2}, {}, {"sweeps": 2}, {"smooth": False}])
def test_cycle_equals_the_exact_operator(options):
    """So that they converge with that operator's spectral radius."""
    a = csr.from_scipy(laplacian(14))
    solver = smoothed_aggregation(a, **{"coarsest": 8, **options}, generator=seeded())
    assert len(solver.levels) == (1 if "max_levels" in options else 2)
    exact = error_operator(solver)
    eye = torch.eye(196, dtype=DOUBLE)
    torch.testing.assert_close(solver.cycle(torch.zeros_like(eye), eye), exact, **TIGHT)
    dense = a.to_dense()
    torch.testing.assert_close(eye - solver.cycle(dense), exact, **TIGHT)  # b = A x from x = 0
    preconditioner = solver.cycle(eye)
    torch.testing.assert_close(preconditioner, preconditioner.T, **TIGHT)

    radius = torch.linalg.eigvals(exact).abs().max().item()
    error, factor = vector(196), 0.0
    for _ in range(120):
        after = solver.cycle(torch.zeros_like(error), error)
        factor = ((after @ dense @ after) / (error @ dense @ error)).sqrt().item()
        error = after / after.norm()
    assert factor == pytest.approx(radius, rel=1e-3)
    assert radius < (0.95 if options == {"smooth": False} else 0.72)


def test_coarse_correction_is_a_projection():
    """Nothing that P spans is left: (I - P A'^-1 P^T A) P = 0."""
    a = csr.from_scipy(laplacian(10))
    solver = smoothed_aggregation(a, max_levels=2, generator=seeded())
    assert not solver.levels  # already small enough
    solver = smoothed_aggregation(a, max_levels=2, coarsest=50, generator=seeded())
    p = solver.levels[0].prolong.to_dense()
    left = p - p @ solver.inverse @ p.T @ a.to_dense() @ p
    torch.testing.assert_close(left, torch.zeros_like(p), **TIGHT)


@pytest.mark.claim(135, "Cycles of smoothed aggregation do not grow with the grid; plain ones do")
def test_cycles_do_not_grow_with_the_grid():
    count = {}
    for smooth in (True, False):
        for n in (16, 64):
            a = csr.from_scipy(laplacian(n))
            solver = smoothed_aggregation(a, smooth=smooth, coarsest=50, generator=seeded())
            x = vector(n * n)
            found = solver.solve(a @ x, tol=1e-6, max_iter=500)
            assert found.converged
            assert solver.complexity < 1.5
            count[smooth, n] = found.iterations
    assert count[True, 64] <= 1.6 * count[True, 16]
    assert count[False, 64] > 2.5 * count[False, 16]
    assert count[True, 64] < count[False, 64] / 3


def test_solution_equals_a_direct_solver():
    matrix = laplacian(24)
    a = csr.from_scipy(matrix)
    b = torch.stack([vector(576, 1), vector(576, 2)], 1)
    solver = smoothed_aggregation(a, coarsest=20, generator=seeded())
    found = solver.solve(b, tol=1e-12)
    expected = torch.from_numpy(scipy.sparse.linalg.spsolve(matrix.tocsc(), b.numpy()))
    assert found.converged
    torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=1e-9)
    assert found.residual == pytest.approx(((b - a @ found.value).norm() / b.norm()).item())
    cut = solver.solve(b, max_iter=2)
    assert (cut.converged, cut.iterations) == (False, 2)
    nothing = solver.solve(torch.zeros_like(b))
    assert (nothing.converged, nothing.iterations) == (True, 0)


def test_singular_laplacian_and_preconditioner():
    """A graph's Laplacian, with a constant null vector; anisotropy under conjugate gradients."""
    graph = nx.random_geometric_graph(500, 0.09, seed=4)
    assert nx.is_connected(graph)
    a = csr.from_scipy(nx.laplacian_matrix(graph).astype(float))
    solver = smoothed_aggregation(a, coarsest=30, strength=0.02, generator=seeded())
    b = vector(500)
    b = b - b.mean()
    found = solver.solve(b, tol=1e-9, max_iter=300)
    assert found.converged
    torch.testing.assert_close(a @ found.value, b, rtol=0, atol=1e-7)

    matrix = laplacian(48, stretch=0.001)
    b = vector(matrix.shape[0])
    solver = smoothed_aggregation(csr.from_scipy(matrix), coarsest=50, generator=seeded())
    operator = LinearOperator(
        matrix.shape, lambda v: solver.cycle(torch.from_numpy(v)).numpy(), dtype=float
    )
    steps = {}
    for name, m in (("plain", None), ("multigrid", operator)):
        seen = []
        _, info = cg(matrix, b.numpy(), rtol=1e-8, M=m, callback=seen.append)
        assert info == 0
        steps[name] = len(seen)
    assert steps["multigrid"] < steps["plain"] / 3


def test_single_precision_and_repeatable():
    a = csr.from_scipy(laplacian(20), dtype=torch.float32)
    first, again = (smoothed_aggregation(a, coarsest=20, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first.inverse, again.inverse)
    found = first.solve(vector(400).float(), tol=1e-5)
    assert found.converged
    assert found.value.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strength": -0.1}, "strength"),
        ({"max_levels": 0}, "max_levels"),
        ({"coarsest": 0}, "coarsest"),
        ({"sweeps": 0}, "sweeps"),
        ({"near_null": torch.ones(3)}, "near_null"),
        ({"strength": 5.0, "coarsest": 2}, "couplings"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        smoothed_aggregation(csr.from_scipy(laplacian(4)), **options)


def test_bad_matrices_are_named():
    lower = torch.ones(3, 3).tril().to_sparse_csr()
    with pytest.raises(ValueError, match="a: expected a symmetric"):
        smoothed_aggregation(lower)
    with pytest.raises(ValueError, match="a: expected a positive diagonal, got -1"):
        smoothed_aggregation((-torch.eye(3)).to_sparse_csr())
    solver = smoothed_aggregation(torch.eye(3).to_sparse_csr())
    with pytest.raises(ValueError, match=r"b: expected shape \(3,\) or \(3, K\), got \(2,\)"):
        solver.solve(torch.ones(2))
