"""Algebraic multigrid by smoothed aggregation, a solver made of sparse products.

For a symmetric positive (semi-)definite A, unknowns are gathered into aggregates, T has a column
for each that holds its part of the near-null vector, and with D = diag(A)

    P = (I − ω D⁻¹ A_F) T,   A' = Pᵀ A P,   ω = 4 / (3 ρ(D⁻¹ A_F)),

where A_F is A without weak couplings. A cycle relaxes, x ← x + ω D⁻¹ (b − A x), solves
A' e = Pᵀ (b − A x) in the same way a level below, adds P e and relaxes again (P. Vaněk, J. Mandel
and M. Brezina, "Algebraic multigrid by smoothed aggregation for second and fourth order elliptic
problems", 1996). The triple product is made of two of `torchzoo.ops.spgemm`, after K. Shivdikar,
"SMASH: Sparse Matrix Atomic Scratchpad Hashing" (2021).

Deviations: aggregates grow around a maximal set of unknowns at least three couplings apart, which
is found in parallel (N. Bell, S. Dalton and L. Olson, "Exposing fine-grained parallelism in
algebraic multigrid methods", 2012).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.common.solvers import Solution
from torchzoo.ops.spgemm import spgemm
from torchzoo.sparsity.csr import (
    add,
    check_symmetric,
    diagonal,
    entries,
    from_entries,
    scale,
    transpose,
)

_POWER_STEPS = 20


class Level(NamedTuple):
    """A level of a hierarchy.

    Attributes:
        a: The matrix, CSR `(N, N)`.
        relax: ω / diag(A), `(N,)`.
        prolong: P to this level from the one below, CSR `(N, N')`.
        restrict: Pᵀ.
    """

    a: Tensor
    relax: Tensor
    prolong: Tensor
    restrict: Tensor


class Aggregates(NamedTuple):
    """A partition of unknowns.

    Attributes:
        label: The aggregate of each unknown, −1 for those without a coupling, `(N,)`.
        roots: The unknown that each aggregate grew from.
    """

    label: Tensor
    roots: Tensor


def galerkin_product(a: Tensor, prolong: Tensor) -> Tensor:
    """Pᵀ A P, a matrix on the space that P spans.

    Args:
        a: CSR or COO.
        prolong: P, CSR.

    Shape:
        - a: `(N, N)`
        - prolong: `(N, M)`
        - output: `(M, M)`

    Returns:
        A CSR matrix, differentiable in both factors' values.

    Raises:
        ValueError: As for `torchzoo.ops.spgemm`.

    Example:
        >>> a = torch.tensor([[2.0, -1.0], [-1.0, 2.0]]).to_sparse_csr()
        >>> galerkin_product(a, torch.ones(2, 1).to_sparse_csr()).to_dense().tolist()
        [[2.0]]
    """
    return spgemm(transpose(prolong), spgemm(a, prolong))


def couplings(a: Tensor, strength: float) -> Tensor:
    """Which entries of a CSR matrix are strong: off the diagonal with |a_ij| > s √(a_ii a_jj).

    Args:
        a: `(N, N)`.
        strength: s ≥ 0.

    Returns:
        A mask of its entries, `(nnz,)`.

    Example:
        >>> couplings(torch.tensor([[1.0, 0.4], [0.4, 1.0]]).to_sparse_csr(), 0.5).tolist()
        [False, False, False, False]
    """
    row, col, values = entries(a)
    size = diagonal(a).abs().sqrt()
    return (row != col) & (values.abs() > strength * size[row] * size[col])


def aggregate(
    row: Tensor, col: Tensor, nodes: int, *, generator: torch.Generator | None = None
) -> Aggregates:
    """Gather the nodes of a graph into aggregates of neighbours.

    Roots are a maximal set of nodes no two of which are within two edges: of the nodes left, each
    with the highest number within two edges becomes one, and those within two edges of it are left
    no more. A root takes its neighbours, and they take theirs.

    Args:
        row: One end of each edge, `(E,)`; both directions of an edge are given.
        col: The other.
        nodes: Nodes N.
        generator: Draws the order of the nodes (on the CPU).

    Returns:
        Label of each node and the roots.

    Example:
        >>> chain = torch.arange(5)
        >>> row, col = torch.cat([chain, chain + 1]), torch.cat([chain + 1, chain])
        >>> len(aggregate(row, col, 6, generator=torch.Generator().manual_seed(0)).roots)
        2
    """
    row, col = row.long(), col.long()

    def highest(value: Tensor) -> Tensor:
        """Of each node and its neighbours."""
        return value.scatter_reduce(0, row, value[col], "amax")

    order = torch.randperm(nodes, generator=generator).to(row.device)
    linked = torch.zeros(nodes, dtype=torch.bool, device=row.device).index_fill(0, row, True)
    root, left = torch.zeros_like(linked), linked
    while bool(left.any()):
        key = torch.where(root, nodes, torch.where(left, order, -1))
        top = highest(highest(key))
        root = root | (left & (top == order))
        left = left & ~root & (top < nodes)
    roots = root.nonzero().squeeze(1)
    label = torch.full((nodes,), -1, device=row.device)
    label[roots] = torch.arange(len(roots), device=row.device)
    for _ in range(2):
        label = torch.where(label < 0, highest(label), label)
    return Aggregates(label, roots)


def prolongator(
    a: Tensor, near_null: Tensor, label: Tensor, strong: Tensor | None
) -> tuple[Tensor, Tensor]:
    """P and the near-null vector of the level below, for aggregates.

    Args:
        a: CSR `(N, N)`.
        near_null: A vector that A almost maps to 0, `(N,)`; P maps the result's onto it exactly.
        label: The aggregate of each unknown, `(N,)`; −1: none.
        strong: The entries that count in A_F, `(nnz,)`; the others are added to its diagonal. None:
            no smoothing, P = T.

    Returns:
        P `(N, M)`, CSR, and the vector `(M,)`.
    """
    nodes = a.shape[0]
    inside = (label >= 0).nonzero().squeeze(1)
    group = label[inside]
    size = int(label.max()) + 1
    norm = near_null.new_zeros(size).index_add(0, group, near_null[inside].square()).sqrt()
    index = a.col_indices().dtype
    tentative = from_entries(
        inside.to(index), group.to(index), near_null[inside] / norm[group], (nodes, size)
    )
    if strong is None:
        return tentative, norm
    row, col, values = entries(a)
    own = torch.arange(nodes, device=row.device, dtype=index)
    diag = diagonal(a).index_add(0, row[~strong & (row != col)], values[~strong & (row != col)])
    filtered = from_entries(
        torch.cat([own, row[strong]]),
        torch.cat([own, col[strong]]),
        torch.cat([diag, values[strong]]),
        (nodes, nodes),
    )
    step = scale(filtered, rows=-damping(filtered, 1 / diagonal(a)) / diagonal(a))
    smoother = add(step, from_entries(own, own, torch.ones_like(diag), (nodes, nodes)))
    return spgemm(smoother, tentative), norm


@dataclass(frozen=True)
class Multigrid:
    """A hierarchy of matrices, made by `smoothed_aggregation`, and its V-cycle.

    Args:
        levels: All levels but the last.
        last: The matrix of the last level, CSR.
        inverse: Its pseudo-inverse, dense.
        sweeps: Relaxations before and after the correction from below.
    """

    levels: tuple[Level, ...]
    last: Tensor
    inverse: Tensor
    sweeps: int

    @property
    def matrices(self) -> list[Tensor]:
        """The matrix of every level, the finest first."""
        return [*(level.a for level in self.levels), self.last]

    @property
    def complexity(self) -> float:
        """Entries of all levels' matrices over those of the finest."""
        return sum(a.values().numel() for a in self.matrices) / self.matrices[0].values().numel()

    def cycle(self, b: Tensor, x: Tensor | None = None) -> Tensor:
        """One V-cycle for A x = b.

        From x = 0, which None stands for, it is linear in `b` and symmetric, and so it can
        precondition conjugate gradients.

        Args:
            b: Right-hand sides.
            x: Where to start.

        Shape:
            - b: `(N,)` or `(N, K)`
            - x: like `b`
            - output: like `b`
        """
        x = torch.zeros_like(b) if x is None else x
        return self._cycle(0, b, x)

    def solve(self, b: Tensor, *, tol: float = 1e-8, max_iter: int = 100) -> Solution:
        """Repeat cycles until the residual is small.

        Args:
            b: Right-hand sides `(N,)` or `(N, K)`; in the range of A where A is singular.
            tol: Norm of the residual, over that of `b`, that counts as solved.
            max_iter: Most cycles.

        Returns:
            The solution, whether it converged, cycles, and the last relative residual.

        Raises:
            ValueError: `b` has another length.
        """
        a = self.matrices[0]
        if b.ndim not in (1, 2) or b.shape[0] != a.shape[0]:
            raise ValueError(
                f"b: expected shape ({a.shape[0]},) or ({a.shape[0]}, K), got {tuple(b.shape)}"
            )
        size = max(float(b.norm()), torch.finfo(b.dtype).tiny)
        x, residual, count = torch.zeros_like(b), float(b.norm()) / size, 0
        while residual > tol and count < max_iter:
            x = self.cycle(b, x)
            residual, count = float((b - a @ x).norm()) / size, count + 1
        return Solution(x, residual <= tol, count, residual)

    def _cycle(self, depth: int, b: Tensor, x: Tensor) -> Tensor:
        if depth == len(self.levels):
            return self.inverse @ b
        a, relax, prolong, restrict = self.levels[depth]
        relax = relax.view(-1, *[1] * (b.ndim - 1))
        for _ in range(self.sweeps):
            x = x + relax * (b - a @ x)
        below = restrict @ (b - a @ x)
        x = x + prolong @ self._cycle(depth + 1, below, torch.zeros_like(below))
        for _ in range(self.sweeps):
            x = x + relax * (b - a @ x)
        return x

    def __repr__(self) -> str:
        sizes = [len(a) for a in self.matrices]
        return f"Multigrid(unknowns={sizes}, complexity={self.complexity:.3g})"


def smoothed_aggregation(
    a: Tensor,
    *,
    near_null: Tensor | None = None,
    strength: float = 0.08,
    smooth: bool = True,
    max_levels: int = 20,
    coarsest: int = 200,
    sweeps: int = 1,
    generator: torch.Generator | None = None,
) -> Multigrid:
    """Build a multigrid hierarchy for a symmetric positive definite or semi-definite matrix.

    Args:
        a: The matrix, CSR, such as a discretised elliptic operator or a graph's Laplacian.
        near_null: A vector that A almost maps to 0; None: all ones.
        strength: Couplings of at most this times √(a_ii a_jj) are weak; halved from level to level.
            Less than 1 over the degree for graphs, whose couplings are all of about that size.
        smooth: Whether to smooth the prolongator; without it, aggregation is plain.
        max_levels: Most levels.
        coarsest: Unknowns from which on a level is solved directly.
        sweeps: Relaxations before and after each correction, ≥ 1.
        generator: Draws the order in which unknowns become roots (on the CPU).

    Shape:
        - a: `(N, N)`
        - near_null: `(N,)`

    Returns:
        The hierarchy.

    Raises:
        ValueError: A matrix that is not symmetric or whose diagonal is not positive, options out of
            range, or a level above `coarsest` without strong couplings.

    Source:
        P. Vaněk, J. Mandel and M. Brezina, "Algebraic multigrid by smoothed aggregation for second
        and fourth order elliptic problems", 1996; products: K. Shivdikar, "SMASH: Sparse Matrix
        Atomic Scratchpad Hashing" (2021).

    Example:
        >>> n = 400
        >>> line = torch.ones(n - 1, dtype=torch.float64)
        >>> a = torch.diag(line.new_full((n,), 2)) - torch.diag(line, 1) - torch.diag(line, -1)
        >>> solver = smoothed_aggregation(a.to_sparse_csr(), coarsest=50)
        >>> solver.solve(torch.ones(n, dtype=torch.float64)).converged
        True
    """
    check_symmetric("a", a)
    if not bool((diagonal(a) > 0).all()):
        raise ValueError(f"a: expected a positive diagonal, got {float(diagonal(a).min()):.3g}")
    for name, value, least in (
        ("strength", strength, 0),
        ("max_levels", max_levels, 1),
        ("coarsest", coarsest, 1),
        ("sweeps", sweeps, 1),
    ):
        if not value >= least:
            raise ValueError(f"{name}: expected a number ≥ {least}, got {value}")
    if near_null is None:
        near_null = a.values().new_ones(a.shape[0])
    elif near_null.shape != a.shape[:1]:
        raise ValueError(f"near_null: expected shape ({a.shape[0]},), got {tuple(near_null.shape)}")
    levels: list[Level] = []
    while len(a) > coarsest and len(levels) + 1 < max_levels:
        strong = couplings(a, strength * 0.5 ** len(levels))
        if not bool(strong.any()):
            raise ValueError(f"a: a level of {len(a)} unknowns has no couplings above `strength`")
        row, col, _ = entries(a)
        label = aggregate(row[strong], col[strong], len(a), generator=generator).label
        prolong, near_null = prolongator(a, near_null, label, strong if smooth else None)
        inverse = 1 / diagonal(a)
        levels.append(Level(a, damping(a, inverse) * inverse, prolong, transpose(prolong)))
        a = spgemm(levels[-1].restrict, spgemm(a, prolong))
    last = torch.linalg.pinv(a.to_dense(), hermitian=True)
    return Multigrid(tuple(levels), a, last, sweeps)


def damping(a: Tensor, inverse: Tensor) -> float:
    """ω = 4 / (3 ρ(D⁻¹ A)) by power iteration; relaxing shrinks errors while ρ is met to a third.

    Args:
        a: CSR `(N, N)`, symmetric.
        inverse: The diagonal of D⁻¹, `(N,)`.
    """
    start = torch.Generator().manual_seed(0)
    x = torch.randn(len(inverse), generator=start, dtype=inverse.dtype).to(inverse.device)
    radius = inverse.new_ones(())
    for _ in range(_POWER_STEPS):
        x = x / x.norm()
        x = inverse * (a @ x)
        radius = x.norm()
    return 4 / (3 * float(radius))
