"""Graphs, tangent frames and parallel transport on a manifold that is seen as a point cloud.

A graph joins each point to its nearest ones. At point i the first m singular vectors of its nearest
points along the graph, less their mean, span the tangent space: the frame T_i, `(d, m)`.
From j to i a vector in coordinates of the frames is carried by the orthogonal matrix

    O_ij = argmin norm(T_i O - T_j) = U V^T,     T_i^T T_j = U S V^T.

R. L. Peach, M. Vinao-Carl, N. Grossman, M. David, E. Mallas, D. J. Sharp, P. A. Malhotra,
P. Vandergheynst and A. Gosztolai, "Implicit Gaussian process representation of vector fields over
arbitrary latent manifolds", 2024, sections 2 and 3; A. Singer and H.-T. Wu, "Vector diffusion maps
and the connection Laplacian", 2012.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.ops.knn import knn

_ROWS = 512  # sources of shortest paths at a time


def furthest_points(
    points: Tensor, count: int | None = None, *, spacing: float | None = None
) -> Tensor:
    """Choose points of even density: each is the farthest from those chosen before.

    Args:
        points: The points; the first is chosen first.
        count: How many to choose; None: until `spacing` says stop, or all.
        spacing: Stop where the farthest is nearer than this share of the diameter.

    Shape:
        - points: `(n, d)`
        - output: `(count,)`, indices

    Raises:
        ValueError: Points of another shape, or a count out of its range.

    Source:
        Y. Eldar, M. Lindenbaum, M. Porat and Y. Y. Zeevi, "The farthest point strategy for
        progressive image sampling", 1997.

    Example:
        >>> furthest_points(torch.tensor([[0.0], [0.1], [1.0], [0.6]]), 3)
        tensor([0, 2, 3])
    """
    _check_points(points)
    most = len(points) if count is None else count
    if not 1 <= most <= len(points):
        raise ValueError(f"count: expected 1 to {len(points)}, got {count}")
    stop = 0.0
    if spacing is not None:
        stop = spacing * max(float(torch.cdist(rows, points).max()) for rows in points.split(_ROWS))
    chosen = [0]
    nearest = (points - points[0]).norm(dim=-1)
    while len(chosen) < most:
        farthest = int(nearest.argmax())
        if nearest[farthest] < stop:
            break
        chosen.append(farthest)
        nearest = torch.minimum(nearest, (points - points[farthest]).norm(dim=-1))
    return torch.tensor(chosen, device=points.device)


def manifold_graph(points: Tensor, *, k: int = 10) -> Tensor:
    """Join each point to its k nearest ones, and those to it.

    Args:
        points: The points.
        k: Neighbours of each point; a point that others chose has more.

    Shape:
        - points: `(n, d)`
        - output: `(n, n)`

    Returns:
        The symmetric adjacency matrix, sparse, its entries 1.

    Raises:
        ValueError: Points of another shape, not finite or equal, k out of its range, or a graph
            of several components.

    Example:
        >>> manifold_graph(torch.tensor([[0.0], [1.0], [3.0]]), k=1).to_dense()
        tensor([[0., 1., 0.],
                [1., 0., 1.],
                [0., 1., 0.]])
    """
    from scipy.sparse.csgraph import connected_components

    _check_points(points)
    n = len(points)
    if not 1 <= k < n:
        raise ValueError(f"k: expected 1 to {n - 1} neighbours of {n} points, got {k}")
    distances, nearest = knn(points, points, k, exclude_self=True)
    if (distances[:, 0] == 0).any():
        equal = int((distances[:, 0] == 0).sum())
        raise ValueError(f"points: expected distinct points, got {equal} that equal another")
    rows = torch.arange(n, device=points.device).repeat_interleave(k)
    adjacency = _adjacency(rows, nearest.flatten(), n, points.dtype)
    components = connected_components(to_scipy(adjacency), directed=False)[0]
    if components > 1:
        raise ValueError(
            f"points: expected a connected graph, got {components} components; a larger k than "
            f"{k} may join them"
        )
    return adjacency


def mesh_graph(faces: Tensor, n: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Join the corners of each triangle of a mesh.

    Args:
        faces: Corners of the triangles.
        n: Number of vertices.
        dtype: Of the entries.

    Shape:
        - faces: `(F, 3)`, integers below n
        - output: `(n, n)`

    Returns:
        The symmetric adjacency matrix, sparse, its entries 1.

    Raises:
        ValueError: Faces of another shape, or corners that are no vertices.

    Example:
        >>> mesh_graph(torch.tensor([[0, 1, 2]]), 3).to_dense().sum().item()
        6.0
    """
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"faces: expected (F, 3), got {tuple(faces.shape)}")
    if len(faces) and not (faces.min() >= 0 and faces.max() < n):
        raise ValueError(f"faces: expected corners of 0 to {n - 1}, got others")
    corners = torch.cat([faces, faces.roll(1, 1)], 0).long()
    ahead = corners[: len(faces)].flatten(), corners[len(faces) :].flatten()
    return _adjacency(*ahead, n, dtype or torch.get_default_dtype())


def tangent_frames(
    points: Tensor,
    adjacency: Tensor,
    *,
    dim: int | None = None,
    explained: float = 0.9,
    neighbors: int | None = None,
) -> tuple[Tensor, int]:
    """Orthonormal bases of the tangent spaces, from the nearest points along the graph.

    Args:
        points: The points.
        adjacency: Their graph; entries other than 0 are edges.
        dim: Dimension m of the manifold; None: the smallest whose share of the squared singular
            values, mean less standard deviation over all points, is above `explained`.
        explained: That share.
        neighbors: Points taken for each frame, by length of the shortest path; None: 1.5 times
            the median degree.

    Shape:
        - points: `(n, d)`
        - adjacency: `(n, n)`, sparse or dense
        - output: frames `(n, d, m)`

    Returns:
        The frames, and m.

    Raises:
        ValueError: Shapes that don't fit, m out of its range, or points with too few neighbours,
            or neighbours of too low a rank, for m dimensions.

    Example:
        >>> grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0), torch.zeros(1))
        >>> frames, dim = tangent_frames(grid, manifold_graph(grid, k=4))
        >>> dim, bool(frames[:, 2].abs().max() < 1e-6)
        (2, True)
    """
    _check_points(points)
    n, d = points.shape
    adjacency = as_graph(adjacency, n)
    if dim is not None and not 1 <= dim <= d:
        raise ValueError(f"dim: expected 1 to {d}, the dimension of the points, got {dim}")
    if not 0 < explained < 1:
        raise ValueError(f"explained: expected within (0, 1), got {explained}")
    degrees = torch.bincount(adjacency.indices()[0], minlength=n)
    if (degrees == 0).any():
        isolated = int((degrees == 0).sum())
        raise ValueError(f"adjacency: expected edges at every point, got {isolated} without any")
    count = round(1.5 * degrees.median().item()) if neighbors is None else neighbors
    count = min(count, n - 1)
    if count <= (dim or 1):
        raise ValueError(f"neighbors: expected at least {(dim or 1) + 1} for a frame, got {count}")
    return frames_of(points[_nearest_along(points, adjacency, count)], dim, explained)


def frames_of(around: Tensor, dim: int | None = None, explained: float = 0.9) -> tuple[Tensor, int]:
    """Frames from the points around each; see `tangent_frames`.

    Less their mean, which bends out of the tangent space; less the point itself the frames of a
    sphere would be more than twice as far off.

    Shape:
        - around: `(n, neighbors, d)`
        - output: `(n, d, m)`

    Raises:
        ValueError: The points around span fewer than m dimensions.

    Example:
        >>> frames_of(torch.tensor([[[2.0, 0.0], [-1.0, 0.0]]]))[1]
        1
    """
    centred = around - around.mean(1, keepdim=True)
    _, singular, vectors = torch.linalg.svd(centred, full_matrices=False)
    squares = singular.square()
    if dim is None:
        share = squares.cumsum(-1) / squares.sum(-1, keepdim=True)
        sure = share.mean(0) - share.std(0, correction=0)
        dim = 1 + int((sure > explained).int().argmax())
    floor = torch.finfo(singular.dtype).eps ** 0.75 * singular[:, :1]
    flat = int((singular[:, dim - 1 : dim] <= floor).sum()) if dim <= singular.shape[1] else -1
    if flat:
        raise ValueError(
            f"dim: expected neighbours that span {dim} dimensions at each point, got fewer at "
            f"{flat if flat > 0 else len(around)}"
        )
    return vectors[:, :dim].mT.contiguous(), dim


def connections(frames: Tensor, adjacency: Tensor) -> Tensor:
    """The orthogonal matrices O_ij that carry vectors along the edges, from j to i.

    Args:
        frames: Orthonormal frames.
        adjacency: The graph.

    Shape:
        - frames: `(n, d, m)`
        - adjacency: `(n, n)`, sparse or dense
        - output: `(E, m, m)`, an edge (i, j) in each direction, in the order of coalesced indices

    Raises:
        ValueError: Shapes that don't fit.

    Example:
        >>> frames = torch.eye(2).expand(3, 2, 2)
        >>> connections(frames, 1 - torch.eye(3)).shape
        torch.Size([6, 2, 2])
    """
    if frames.ndim != 3 or frames.shape[2] > frames.shape[1]:
        raise ValueError(f"frames: expected (n, d, m), m at most d, got {tuple(frames.shape)}")
    i, j = as_graph(adjacency, len(frames)).indices()
    return transport(frames[i], frames[j])


def transport(to: Tensor, start: Tensor) -> Tensor:
    """The nearest orthogonal matrix to `to^T start`: O of the frames' m coordinates.

    Shape:
        - to, start: `(..., d, m)`
        - output: `(..., m, m)`

    Example:
        >>> transport(torch.eye(2), 3 * torch.eye(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    u, _, vh = torch.linalg.svd(to.mT @ start)
    return u @ vh


def field_index(points: Tensor, vectors: Tensor, faces: Tensor) -> Tensor:
    """Index of a tangent field in each triangle: how often it turns on the way around.

    The vectors at the corners are projected to the triangle's plane; from corner to corner they
    turn by less than half a circle. 1 is a vortex, source or sink, -1 a saddle, 0 no singularity.

    Args:
        points: The vertices.
        vectors: The field at the vertices.
        faces: Corners of the triangles; the sign does not depend on their order.

    Shape:
        - points, vectors: `(n, 3)`
        - faces: `(F, 3)`
        - output: `(F,)`, integers

    Raises:
        ValueError: Shapes that don't fit.

    Example:
        >>> corners = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]])
        >>> faces = torch.tensor([[0, 1, 2]])
        >>> saddle = corners * torch.tensor([1.0, -1.0, 1.0])
        >>> field_index(corners, corners, faces), field_index(corners, saddle, faces)
        (tensor([1]), tensor([-1]))
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points: expected (n, 3), got {tuple(points.shape)}")
    if vectors.shape != points.shape:
        raise ValueError(f"vectors: expected {tuple(points.shape)}, got {tuple(vectors.shape)}")
    a, b, c = points[faces].unbind(1)
    first = torch.nn.functional.normalize(b - a, dim=-1)
    second = c - a
    second = second - (second * first).sum(-1, keepdim=True) * first
    plane = torch.stack([first, torch.nn.functional.normalize(second, dim=-1)], -1)
    x, y = (vectors[faces] @ plane).unbind(-1)
    angles = torch.atan2(y, x)
    turns = (angles.roll(-1, 1) - angles) / (2 * torch.pi)
    return (turns - turns.round()).sum(1).round().long()


def as_graph(adjacency: Tensor, n: int) -> Tensor:
    """A coalesced adjacency matrix without loops, its shape and symmetry checked.

    Example:
        >>> as_graph(torch.ones(2, 2), 2).values()
        tensor([1., 1.])
    """
    if adjacency.shape != (n, n):
        raise ValueError(f"adjacency: expected ({n}, {n}), got {tuple(adjacency.shape)}")
    sparse = adjacency.to_sparse_coo().coalesce()
    kept = (sparse.values() != 0) & (sparse.indices()[0] != sparse.indices()[1])
    i, j = sparse.indices()[:, kept]
    if not torch.equal(i * n + j, (j * n + i).sort().values):
        raise ValueError("adjacency: expected edges in both directions, got some in one only")
    return _adjacency(i, j, n, sparse.dtype)


def to_scipy(matrix: Tensor) -> Any:
    """A sparse matrix for scipy.

    Example:
        >>> to_scipy(torch.eye(2).to_sparse()).nnz
        2
    """
    from scipy.sparse import coo_matrix

    found = matrix.coalesce().cpu()
    return coo_matrix((found.values().numpy(), found.indices().numpy()), matrix.shape).tocsr()


def _nearest_along(points: Tensor, adjacency: Tensor, count: int) -> Tensor:
    """The points nearest to each by the length of the shortest path, `(n, count)`."""
    from scipy.sparse.csgraph import dijkstra

    i, j = adjacency.indices()
    lengths = (points[i] - points[j]).norm(dim=-1)
    graph = to_scipy(sparse_matrix(i, j, lengths, len(points)))
    found = []
    for start in range(0, len(points), _ROWS):
        sources = range(start, min(start + _ROWS, len(points)))
        for limit in (2 * float(lengths.max()), float("inf")):  # near is quicker, and mostly enough
            paths = torch.from_numpy(dijkstra(graph, indices=sources, limit=limit))
            values, nearest = paths.topk(count + 1, largest=False)
            if values.isfinite().all():
                break
        if not values.isfinite().all():
            raise ValueError(f"adjacency: expected {count} points to be reached from each")
        found.append(nearest[:, 1:])
    return torch.cat(found).to(points.device)


def _adjacency(i: Tensor, j: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Ones at the edges, in both directions."""
    both = torch.stack([torch.cat([i, j]), torch.cat([j, i])])
    edges = torch.unique(both[0] * n + both[1])
    ones = torch.ones(len(edges), dtype=dtype, device=i.device)
    return sparse_matrix(edges // n, edges % n, ones, n)


def sparse_matrix(i: Tensor, j: Tensor, values: Tensor, n: int) -> Tensor:
    """A coalesced square matrix by its entries.

    Example:
        >>> sparse_matrix(torch.tensor([1, 1]), torch.tensor([0, 0]), torch.ones(2), 2).to_dense()
        tensor([[0., 0.],
                [2., 0.]])
    """
    indices = torch.stack([i, j])
    return torch.sparse_coo_tensor(indices, values, (n, n), check_invariants=False).coalesce()


def _check_points(points: Tensor) -> None:
    if points.ndim != 2 or not points.numel():
        raise ValueError(f"points: expected (n, d), got {tuple(points.shape)}")
    if not points.isfinite().all():
        raise ValueError("points: expected finite numbers, got NaN or infinity")
