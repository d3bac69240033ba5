"""What products of sparse matrices are for: questions about graphs, and multigrid, against scipy.

Triangles and distances on power-law (R-MAT) and uniformly random graphs, the Galerkin product of a
multigrid level, and a whole solution of Poisson's equation, set-up included, against conjugate
gradients and a direct solver. Scipy's rows have columns in any order; ours are sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.experiments.ops.spgemm import rmat, uniform
from torchzoo.sparsity import galerkin_product, hop_distances, smoothed_aggregation, triangles
from torchzoo.sparsity.csr import entries, from_scipy
from torchzoo.sparsity.multigrid import aggregate, couplings, prolongator

Calls = Mapping[str, Callable[[], Any]]


def undirected(matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_array:
    """The graph with both directions of each edge, each of weight 1, and no loops."""
    both = scipy.sparse.csr_array(matrix + matrix.T)
    both.setdiag(0)
    both.eliminate_zeros()
    both.data[:] = 1
    return both


def poisson(side: int, dims: int = 2) -> scipy.sparse.csr_array:
    """Minus the Laplacian by differences of neighbours on a grid, zero at the border."""
    line = scipy.sparse.diags([-1.0, 2.0, -1.0], [-1, 0, 1], (side, side))
    matrix = scipy.sparse.csr_array(line)
    for _ in range(dims - 1):
        matrix = scipy.sparse.csr_array(scipy.sparse.kronsum(line, matrix, format="csr"))
    return matrix


def scipy_triangles(a: scipy.sparse.csr_array) -> Any:
    """Of each node: paths of two edges that a third closes, each seen from two sides."""
    return (a @ a).multiply(a).sum(1) / 2


def scipy_triangles_by_degree(a: scipy.sparse.csr_array) -> Any:
    """The same with edges directed from low degree to high: each corner of a triangle by itself."""
    order = np.argsort(np.diff(a.indptr), kind="stable")
    up = scipy.sparse.csr_array(scipy.sparse.triu(a[order][:, order], 1))
    closing = (up @ up).multiply(up)
    middle = (up.T @ up).multiply(up).sum(1)  # from a common lower neighbour
    count = np.empty(a.shape[0])
    count[order] = closing.sum(1) + closing.sum(0) + middle
    return count


def scipy_two_hops(a: scipy.sparse.csr_array) -> Any:
    """0 for a node itself, 1 for neighbours, 2 for what else two edges reach."""
    eye = scipy.sparse.eye_array(a.shape[0], format="csr", dtype=a.dtype)
    reach = (a + eye) @ (a + eye)
    reach.data[:] = 2
    return reach - a - 2 * eye


def triangle_calls(device: torch.device, make: Callable[[], scipy.sparse.csr_matrix]) -> Calls:
    graph = undirected(make())
    a = from_scipy(graph, device=device)
    calls: dict[str, Callable[[], Any]] = {OURS: partial(triangles, a)}
    if device.type == "cpu":
        calls["scipy"] = partial(scipy_triangles, graph)
        calls["scipy, by degree"] = partial(scipy_triangles_by_degree, graph)
    else:
        calls["torch"] = lambda: ((a @ a) * a).values().sum() / 2
    return calls


def hop_calls(device: torch.device, make: Callable[[], scipy.sparse.csr_matrix]) -> Calls:
    graph = undirected(make())
    a = from_scipy(graph, device=device)
    calls: dict[str, Callable[[], Any]] = {OURS: partial(hop_distances, a, 2)}
    if device.type == "cpu":
        calls["scipy"] = partial(scipy_two_hops, graph)
    else:
        calls["torch, pattern alone"] = lambda: a @ a
    return calls


def galerkin_calls(device: torch.device, side: int, dims: int) -> Calls:
    """A smoothed prolongator's product, each with the transposition it needs."""
    matrix = poisson(side, dims)
    a = from_scipy(matrix)
    strong = couplings(a, 0.08)
    row, col, values = entries(a)
    seed = torch.Generator().manual_seed(0)
    label = aggregate(row[strong], col[strong], len(a), generator=seed).label
    p, _ = prolongator(a, values.new_ones(len(a)), label, strong)
    parts = (t.numpy() for t in (p.values(), p.col_indices(), p.crow_indices()))
    prolong = scipy.sparse.csr_array(tuple(parts), shape=p.shape)
    a, p = a.to(device), p.to(device)
    calls: dict[str, Callable[[], Any]] = {
        OURS: partial(galerkin_product, a, p),
        "torch": lambda: p.t().to_sparse_csr() @ (a @ p),
    }
    if device.type == "cpu":
        calls["scipy"] = lambda: prolong.T.tocsr() @ (matrix @ prolong)
    return calls


def solver_calls(device: torch.device, side: int) -> Calls:
    """Poisson's equation to a relative residual of 1e-8, from the matrix alone."""
    matrix = poisson(side)
    a = from_scipy(matrix, device=device)
    b = torch.ones(len(a), dtype=torch.float64, device=device)

    def multigrid() -> Tensor:
        seed = torch.Generator().manual_seed(0)
        return smoothed_aggregation(a, generator=seed).solve(b, tol=1e-8, max_iter=200).value

    right, columns = b.cpu().numpy(), matrix.tocsc()
    return {
        OURS: multigrid,
        "scipy, conjugate gradients": lambda: scipy.sparse.linalg.cg(matrix, right, rtol=1e-8)[0],
        "scipy, direct": lambda: scipy.sparse.linalg.spsolve(columns, right),
    }


BENCH = Bench(
    "graph",
    [
        Case(
            "triangles, R-MAT, 2^14 nodes, 2^17 edges",
            partial(triangle_calls, make=partial(rmat, 14, 2**17)),
            4 * 4.46e6,
            12 * 1.51e6,
            4 * 4.46e6,
            1.5,
        ),
        Case(
            "within 2 hops, uniform, 20,000 nodes, degree 16",
            partial(hop_calls, make=partial(uniform, 20_000, 8)),
            2 * 6.10e6,
            12 * 5.42e6,
            2 * 6.10e6,
        ),
        Case(
            "Galerkin product, Poisson, 64^3 unknowns",
            partial(galerkin_calls, side=64, dims=3),
            2 * 13.4e6,
            12 * 2.85e6,
            2 * 13.4e6,
            1.5,
        ),
        Case(
            "Poisson solved, 256^2 unknowns",
            partial(solver_calls, side=256),
            3e9,
            12 * 327e3,
            3e9,
        ),
    ],
)
