"""The connection Laplacian of a point cloud: the graph Laplacian of tangent vectors.

In coordinates of tangent frames T_i, and with parallel transport O_ij along the edges,

    (L_c v)_i = sum_j A_ij (v_i - O_ij v_j),

which is symmetric positive semi-definite. Other frames T_i R_i rotate its eigenvectors and leave
T_i u_i, vectors in the ambient space, as they are. With all frames equal it is L kron I_m.

A. Singer and H.-T. Wu, "Vector diffusion maps and the connection Laplacian", 2012; R. L. Peach and
others, "Implicit Gaussian process representation of vector fields over arbitrary latent manifolds",
2024, section 3.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from torchzoo.gp.manifold import (
    as_graph,
    connections,
    frames_of,
    manifold_graph,
    sparse_matrix,
    tangent_frames,
    to_scipy,
    transport,
)
from torchzoo.ops.knn import knn

_DENSE = 2000  # unknowns up to which the eigenproblem is dense
_ALIKE = 1e-6  # relative gap below which eigenvalues count as one


class ConnectionLaplacian:
    """The connection Laplacian of points, with the graph, frames and transport that it is made of.

    Args:
        points: The points; not on the meta device. All is computed in float64.
        k: Neighbours of each point in the graph.
        dim: Dimension m of the manifold; None: estimated, see `tangent_frames`.
        explained: Share of the variance for that.
        adjacency: A graph to use in place of that of the k nearest, as `mesh_graph`.
        frames: Orthonormal frames to use in place of estimated ones. Those of the ambient space,
            the identity, give the graph Laplacian of each component.
        normalization: `"random_walk"` multiplies by the inverse degrees.

    Shape:
        - points: `(n, d)`
        - adjacency: `(n, n)`
        - frames: `(n, d, m)`

    Attributes:
        adjacency: The graph, sparse.
        transport: O_ij for each edge, `(E, m, m)`, in the order of the adjacency's indices.
        degrees: Degrees, `(n,)`.

    Raises:
        ValueError: See `manifold_graph`, `tangent_frames` and `connections`.

    Source:
        A. Singer and H.-T. Wu, "Vector diffusion maps and the connection Laplacian", 2012.

    Example:
        >>> angles = torch.arange(12) * torch.pi / 6
        >>> circle = ConnectionLaplacian(torch.stack([angles.cos(), angles.sin()], 1), k=2)
        >>> values, vectors = circle.eigs(1)
        >>> vectors.shape, bool(values[0].abs() < 1e-9)  # the field that goes around is parallel
        (torch.Size([12, 1]), True)
    """

    def __init__(
        self,
        points: Tensor,
        *,
        k: int = 10,
        dim: int | None = None,
        explained: float = 0.9,
        adjacency: Tensor | None = None,
        frames: Tensor | None = None,
        normalization: Literal["random_walk"] | None = None,
    ):
        if normalization not in (None, "random_walk"):
            raise ValueError(
                f"normalization: expected 'random_walk' or None, got {normalization!r}"
            )
        points = points.detach().double()
        if adjacency is None:
            adjacency = manifold_graph(points, k=k)
        self.points, self.k = points, k
        self.adjacency = as_graph(adjacency.to(points), len(points))
        if frames is None:
            frames, _ = tangent_frames(points, self.adjacency, dim=dim, explained=explained)
        elif frames.ndim != 3 or frames.shape[:2] != points.shape:
            expected = (*points.shape, dim or "m")
            raise ValueError(f"frames: expected {expected}, got {tuple(frames.shape)}")
        self.frames = frames.detach().to(points)
        self.normalization = normalization
        self.transport = connections(self.frames, self.adjacency)
        self.degrees = torch.bincount(self.adjacency.indices()[0], minlength=len(points)).to(points)

    @property
    def dim(self) -> int:
        """Dimension m of the manifold."""
        return self.frames.shape[2]

    def matrix(self) -> Tensor:
        """The Laplacian, a sparse `(n m, n m)` matrix in coordinates of the frames."""
        matrix = self._symmetric(None)
        if self.normalization is None:
            return matrix
        i, j = matrix.indices()
        return sparse_matrix(i, j, matrix.values() / self.degrees[i // self.dim], len(matrix))

    def eigs(self, k: int) -> tuple[Tensor, Tensor]:
        """The smallest eigenvalues of the matrix, and their eigenvectors.

        Eigenvalues come in groups; on an orientable surface each is at least double. A group is
        never cut, as what a part of it spans is the solver's choice: there may be more than k.

        Args:
            k: Number of eigenpairs.

        Shape:
            - outputs: `(K,)`, ascending, and `(n m, K)`, K at least k

        Returns:
            Eigenvalues, and eigenvectors of unit length in coordinates of the frames; for the
            random walk `u^T D u` is the mean degree.

        Raises:
            ValueError: k is out of its range.
        """
        n, m = len(self.points), self.dim
        if not 1 <= k <= n * m:
            raise ValueError(f"k: expected 1 to {n * m} eigenpairs, got {k}")
        weights = self.degrees if self.normalization else None
        values, vectors = _lowest(self._symmetric(weights), k)
        if weights is not None:
            vectors = vectors * (weights.mean() / weights).sqrt().repeat_interleave(m)[:, None]
        return values, vectors

    def lift(self, vectors: Tensor) -> Tensor:
        """Vectors in the ambient space, `T_i u_i`, from coordinates of the frames.

        Shape:
            - vectors: `(n m, K)`
            - output: `(n, d, K)`

        Raises:
            ValueError: Vectors of another shape.
        """
        n, m = len(self.points), self.dim
        if vectors.ndim != 2 or len(vectors) != n * m:
            raise ValueError(f"vectors: expected ({n * m}, K), got {tuple(vectors.shape)}")
        return self.frames @ vectors.unflatten(0, (n, m))

    def smooth(self, vectors: Tensor, time: float = 1.0, *, keep_norm: bool = False) -> Tensor:
        """Let vectors diffuse: `exp(-time L_c)` of them, in the frames.

        Args:
            vectors: Vectors in the ambient space, of which the tangent part is taken.
            time: For how long, in units of the Laplacian.
            keep_norm: Whether norms are those of the vectors after diffusion as scalars, which
                do not decay.

        Shape:
            - vectors: `(n, d)`
            - output: `(n, d)`

        Raises:
            ValueError: Vectors of another shape, or a time below 0.
        """
        from scipy.sparse import diags
        from scipy.sparse.linalg import expm_multiply

        if vectors.shape != self.points.shape:
            expected = tuple(self.points.shape)
            raise ValueError(f"vectors: expected {expected}, got {tuple(vectors.shape)}")
        if not time >= 0:
            raise ValueError(f"time: expected at least 0, got {time}")
        local = torch.einsum("ndm,nd->nm", self.frames, vectors.to(self.points))
        diffused = expm_multiply(-time * to_scipy(self.matrix()), local.flatten().cpu().numpy())
        smooth = torch.from_numpy(diffused).to(local).view_as(local)
        if keep_norm:
            laplacian = diags(self.degrees.cpu().numpy()) - to_scipy(self.adjacency)
            if self.normalization:
                laplacian = diags(1 / self.degrees.cpu().numpy()) @ laplacian
            norms = expm_multiply(-time * laplacian, local.norm(dim=1).cpu().numpy())
            smooth = torch.nn.functional.normalize(smooth, dim=1)
            smooth = smooth * torch.from_numpy(norms).to(local)[:, None]
        return torch.einsum("ndm,nm->nd", self.frames, smooth).to(vectors)

    def extend(self, values: Tensor, vectors: Tensor, points: Tensor) -> Tensor:
        """Continue eigenvectors to new points, by Nyström's formula.

        At a new point x with frame T_x, joined to its k nearest, the eigenvalue equation says
        `u(x) = sum_j O_xj u_j / (k - lambda)`.

        Args:
            values: Eigenvalues, as from `eigs`, all below k (for the random walk, 1).
            vectors: Eigenvectors in the ambient space, from `lift`.
            points: New points.

        Shape:
            - values: `(K,)`
            - vectors: `(n, d, K)`
            - points: `(N, d)`
            - output: `(N, d, K)`

        Raises:
            ValueError: Points of another dimension, or eigenvalues that are too large.
        """
        n, d = self.points.shape
        if points.ndim != 2 or points.shape[1] != d:
            raise ValueError(f"points: expected (N, {d}), got {tuple(points.shape)}")
        k = min(self.k, n)
        unit = 1.0 if self.normalization else float(k)
        if len(values) and not values.max() < unit:
            raise ValueError(f"values: expected below {unit:g}, got {values.max().item():.3g}")
        if not len(points):
            return vectors.new_zeros(0, *vectors.shape[1:])
        x = points.detach().to(self.points)
        wide = knn(x, self.points, min(round(1.5 * self.k), n))[1]
        frames, _ = frames_of(self.points[wide], self.dim)
        near = wide[:, :k]
        there = self.frames[near]
        carried = transport(frames[:, None].expand_as(there), there)
        local = there.mT @ vectors.to(x)[near]
        mean = torch.einsum("njab,njbk->nak", carried, local) / k
        return (frames @ mean * (unit / (unit - values.to(x)))).to(vectors)

    def __repr__(self) -> str:
        n, d = self.points.shape
        return f"ConnectionLaplacian(n={n}, d={d}, m={self.dim}, edges={len(self.transport)})"

    def _symmetric(self, weights: Tensor | None) -> Tensor:
        """D - A in blocks, coalesced; with weights w, entries are divided by sqrt(w_i w_j)."""
        n, m = len(self.points), self.dim
        i, j = self.adjacency.indices()
        node = torch.arange(n, device=i.device)
        row, column = torch.cat([i, node]), torch.cat([j, node])
        eye = torch.eye(m, dtype=self.points.dtype, device=i.device)
        blocks = torch.cat([-self.transport, self.degrees[:, None, None] * eye])
        if weights is not None:
            blocks = blocks * (weights[row] * weights[column]).rsqrt()[:, None, None]
        inner = torch.arange(m, device=i.device)
        rows = (row[:, None, None] * m + inner[:, None]).expand_as(blocks)
        columns = (column[:, None, None] * m + inner).expand_as(blocks)
        return sparse_matrix(rows.flatten(), columns.flatten(), blocks.flatten(), n * m)


def _lowest(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k lowest eigenpairs of a symmetric sparse matrix, and the rest of the last group."""
    size = len(matrix)
    asked = k
    while True:
        asked = size if size <= _DENSE else min(asked + 8, size)
        values, vectors = _eigh(matrix, asked)
        values = values.clamp_min(0)  # rounding
        gaps = values[k:] - values[k - 1 : -1]
        slack = _ALIKE * values[k:] + 1e-12 * matrix.values().abs().max()
        ends = (gaps > slack).nonzero()
        if len(ends) or len(values) == size:
            last = k + int(ends[0]) if len(ends) else size
            return values[:last], vectors[:, :last]


def _eigh(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lowest eigenpairs: all by a dense solver, few of a large matrix by Lanczos' method."""
    if len(matrix) <= max(_DENSE, 2 * count):
        return torch.linalg.eigh(matrix.to_dense())
    import numpy as np
    from scipy.sparse.linalg import eigsh

    start = np.random.default_rng(0).standard_normal(len(matrix))
    scale = float(matrix.values().abs().max())
    shifted = -1e-3 * scale  # below all eigenvalues: that which is factorised is not singular
    values, vectors = eigsh(to_scipy(matrix).tocsc(), count, sigma=shifted, v0=start)
    order = np.argsort(values)
    found = torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order].copy())
    return found[0].to(matrix), found[1].to(matrix)
