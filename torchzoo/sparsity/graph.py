"""Questions about graphs that products of sparse matrices answer: triangles, nodes within reach.

With a graph's adjacency matrix A (N, N), entry (i, j) of A² counts the paths i → k → j, and in the
semiring (min, +) it is the length of the shortest of them:

    triangles through the edge (i, j) = (A A)_ij,   D⁽²⁾_ij = min_k (d_ik + d_kj),  d_ii = 0.

The products are those of K. Shivdikar, "SMASH: Sparse Matrix Atomic Scratchpad Hashing" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.ops.spgemm import spgemm, spgemm_plan
from torchzoo.sparsity.csr import check_symmetric, entries, from_entries


def triangles(adjacency: Tensor) -> Tensor:
    """Count the triangles that each node of an undirected graph is a corner of.

    Edges are directed from the node of lower degree to that of higher, which makes a matrix U whose
    rows are short even at hubs. A triangle a < b < c is one path a → b → c that the edge a → c
    closes, so Σ (UU)_ac over edges counts each once, and the derivative of that sum in the edge
    a → b counts the triangles of which it is the first edge.

    Args:
        adjacency: A symmetric CSR matrix; entries that are not zero are edges, loops are left out.

    Shape:
        - adjacency: `(N, N)`
        - output: `(N,)`, int64; a third of its sum is the number of triangles

    Returns:
        The counts, exact.

    Raises:
        ValueError: A matrix of another layout or type, or one that is not symmetric.

    Source:
        K. Shivdikar, "SMASH: Sparse Matrix Atomic Scratchpad Hashing" (2021), for the product;
        T. Schank and D. Wagner, "Finding, counting and listing all triangles in large graphs",
        2005, for the order by degree.

    Example:
        >>> paw = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 0.0]])
        >>> triangles(paw.to_sparse_csr()).tolist()
        [1, 1, 1, 0]
    """
    check_symmetric("adjacency", adjacency)
    nodes = adjacency.shape[0]
    row, col, values = entries(adjacency.detach())
    edge = (values != 0) & (row != col)
    row, col = row[edge], col[edge]
    rank = torch.bincount(row, minlength=nodes).argsort(stable=True).argsort().to(col.dtype)
    low, high = rank[row], rank[col]
    up = low < high
    one = torch.ones(int(up.sum()), dtype=torch.float64, device=row.device)
    u = from_entries(low[up], high[up], one, (nodes, nodes))
    low, high = entries(u).row.long(), entries(u).col.long()

    plan = spgemm_plan(u, u)
    if not plan.nnz:
        return torch.zeros(nodes, dtype=torch.long, device=row.device)
    at, closed = _find(plan.crow, plan.col, low, high, nodes)
    with torch.enable_grad():
        first = u.values().clone().requires_grad_()
        paths = plan(first, u.values())[at] * closed
        (on_first,) = torch.autograd.grad(paths.sum(), first)
    count = one.new_zeros(nodes).index_add(0, high, paths.detach())
    count = count.index_add(0, low, on_first).index_add(0, high, on_first)
    return count.round().long()[rank.long()]


def hop_distances(adjacency: Tensor, hops: int = 2) -> Tensor:
    """Lengths of the shortest paths of at most `hops` edges, for all pairs that have one.

    Args:
        adjacency: A CSR matrix; a stored entry is an edge and its value the edge's length, loops
            are left out. With lengths of 1 the result says how many hops apart two nodes are.
        hops: The most edges of a path, ≥ 1.

    Shape:
        - adjacency: `(N, N)`
        - output: `(N, N)`

    Returns:
        A CSR matrix: row i holds the nodes within reach of node i, itself with 0 among them, and
        how far they are. Gradients go to the edges of the shortest path.

    Raises:
        ValueError: Another layout or type, a matrix that is not square, or `hops` below 1.

    Source:
        K. Shivdikar, "SMASH: Sparse Matrix Atomic Scratchpad Hashing" (2021), for the product.

    Example:
        >>> path = torch.diag(torch.ones(3), 1).to_sparse_csr()
        >>> hop_distances(path, 2).to_dense().tolist()[0]
        [0.0, 1.0, 2.0, 0.0]
    """
    row, col, values = entries(adjacency)
    nodes = adjacency.shape[0]
    if adjacency.shape[1] != nodes:
        raise ValueError(f"adjacency: expected a square matrix, got {tuple(adjacency.shape)}")
    if hops < 1:
        raise ValueError(f"hops: expected a number ≥ 1, got {hops}")
    keep = row != col
    self_ = torch.arange(nodes, device=col.device, dtype=col.dtype)
    step = from_entries(
        torch.cat([row[keep], self_]),
        torch.cat([col[keep], self_]),
        torch.cat([values[keep], values.new_zeros(nodes)]),
        (nodes, nodes),
    )
    reach = None
    while True:  # the power by repeated squaring
        if hops % 2:
            reach = step if reach is None else spgemm(reach, step, semiring="min_plus")
        hops //= 2
        if hops == 0:
            assert reach is not None
            return reach
        step = spgemm(step, step, semiring="min_plus")


def _find(
    crow: Tensor, col: Tensor, row: Tensor, column: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    """Where places (row, column) are in a sorted pattern, not an empty one; whether they are."""
    stored = torch.repeat_interleave(crow.diff()).long() * columns + col
    wanted = row * columns + column
    at = torch.searchsorted(stored, wanted).clamp(max=stored.numel() - 1)
    return at, stored[at] == wanted
