"""Sparse CSR matrices of torch taken apart and put together, as work on graphs needs it.

Everything is made of entries (row, column, value), so gradients of the values pass through, and
works on any device. Products are `torchzoo.ops.spgemm`, or `a @ x` for a dense x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import scipy.sparse


class Entries(NamedTuple):
    """The stored entries of a matrix, each `(nnz,)`, row after row."""

    row: Tensor
    col: Tensor
    values: Tensor


def entries(a: Tensor) -> Entries:
    """The entries of a CSR matrix.

    Raises:
        ValueError: `a` is not a CSR matrix of floating-point scalars.

    Example:
        >>> entries(torch.tensor([[0.0, 2.0], [1.0, 3.0]]).to_sparse_csr()).row.tolist()
        [0, 1, 1]
    """
    if a.layout != torch.sparse_csr or a.ndim != 2 or not a.dtype.is_floating_point:
        raise ValueError(
            f"a: expected a floating-point CSR matrix, got {a.layout} {a.dtype} {tuple(a.shape)}"
        )
    row = torch.repeat_interleave(a.crow_indices().diff())
    return Entries(row.to(a.col_indices().dtype), a.col_indices(), a.values())


def from_entries(row: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The CSR matrix with these entries; those of one place are added up, columns are sorted.

    Args:
        row: Rows, integers `(nnz,)`.
        col: Columns, `(nnz,)`.
        values: Values, `(nnz,)`.
        shape: `(M, N)`.

    Returns:
        A CSR matrix with indices of the type of `col`.

    Raises:
        ValueError: Lengths that differ, or entries outside of `shape`.

    Example:
        >>> place = torch.tensor([1, 0, 1])
        >>> from_entries(place, place, torch.tensor([1.0, 2.0, 3.0]), (2, 2)).to_dense().tolist()
        [[2.0, 0.0], [0.0, 4.0]]
    """
    if not row.shape == col.shape == values.shape or row.ndim != 1:
        found = [tuple(t.shape) for t in (row, col, values)]
        raise ValueError(f"row, col, values: expected one length, got {found}")
    for name, index, size in (("row", row, shape[0]), ("col", col, shape[1])):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(f"{name}: expected indices in [0, {size})")
    place, where = (row.long() * shape[1] + col).unique(return_inverse=True)
    values = values.new_zeros(place.numel()).index_add(0, where, values)
    starts = torch.arange(shape[0] + 1, device=row.device) * shape[1]
    crow = torch.searchsorted(place, starts).to(col.dtype)
    return _csr(crow, (place % max(shape[1], 1)).to(col.dtype), values, shape)


def with_values(a: Tensor, values: Tensor) -> Tensor:
    """A matrix of the pattern of `a` with other values `(nnz,)`.

    Example:
        >>> with_values(torch.eye(2).to_sparse_csr(), torch.tensor([5.0, 6.0])).values().tolist()
        [5.0, 6.0]
    """
    return _csr(a.crow_indices(), a.col_indices(), values, (a.shape[0], a.shape[1]))


def from_scipy(
    matrix: scipy.sparse.spmatrix | scipy.sparse.sparray,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A scipy matrix of any format as a CSR tensor, which shares no memory with it.

    Args:
        matrix: The matrix; it is left as it is.
        device: Where to put it.
        dtype: Type of the values; None: theirs.

    Shape:
        - matrix: `(M, N)`
        - output: `(M, N)`

    Returns:
        A CSR tensor, columns sorted, with indices of the type that scipy has.

    Example:
        >>> import scipy.sparse
        >>> from_scipy(scipy.sparse.eye(3)).values()
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    matrix = matrix.tocsr().copy()
    matrix.sum_duplicates()
    crow, col = (torch.tensor(t, device=device) for t in (matrix.indptr, matrix.indices))
    values = torch.tensor(matrix.data, device=device, dtype=dtype)
    return _csr(crow, col, values, matrix.shape)


def to_scipy(a: Tensor) -> scipy.sparse.csr_array:
    """A CSR tensor as a scipy array, which shares no memory with it.

    Example:
        >>> to_scipy(torch.eye(3).to_sparse_csr()).trace()
        np.float32(3.0)
    """
    import scipy.sparse

    parts = (entries(a).values.detach(), a.col_indices(), a.crow_indices())
    return scipy.sparse.csr_array(tuple(t.cpu().numpy() for t in parts), shape=a.shape, copy=True)


def transpose(a: Tensor) -> Tensor:
    """The transposed matrix, in CSR as well.

    Shape:
        - a: `(M, N)`
        - output: `(N, M)`

    Example:
        >>> transpose(torch.tensor([[0.0, 2.0], [0.0, 3.0]]).to_sparse_csr()).to_dense().tolist()
        [[0.0, 0.0], [2.0, 3.0]]
    """
    crow, row, order = _by_column(a)
    return _csr(crow, row, a.values()[order], (a.shape[1], a.shape[0]))


def _by_column(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each column starts, the rows of its entries, and where those are stored."""
    row, col, _ = entries(a)
    if a.device.type != "cpu":
        order = col.argsort(stable=True)
        count = torch.bincount(col, minlength=a.shape[1])
        return torch.cat([count.new_zeros(1), count.cumsum(0)]).to(col.dtype), row[order], order
    import scipy.sparse  # which counts instead of sorting, tens of times faster

    parts = (t.numpy() for t in (torch.arange(len(col)), col, a.crow_indices()))
    moved = scipy.sparse.csr_array(tuple(parts), shape=a.shape).tocsc()
    crow, row, order = (torch.from_numpy(t) for t in (moved.indptr, moved.indices, moved.data))
    return crow.to(col.dtype), row.to(col.dtype), order


def scale(a: Tensor, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """diag(rows) · A · diag(columns), on the pattern of A.

    Args:
        a: The matrix.
        rows: A factor for each row; None: 1.
        columns: A factor for each column; None: 1.

    Shape:
        - a: `(M, N)`
        - rows: `(M,)`
        - columns: `(N,)`
        - output: `(M, N)`

    Raises:
        ValueError: Factors of another length.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [0.0, 3.0]]).to_sparse_csr()
        >>> scale(a, rows=torch.tensor([10.0, 1.0])).values().tolist()
        [10.0, 20.0, 3.0]
    """
    row, col, values = entries(a)
    for name, factor, index, size in (
        ("rows", rows, row, a.shape[0]),
        ("columns", columns, col, a.shape[1]),
    ):
        if factor is not None:
            if factor.shape != (size,):
                raise ValueError(f"{name}: expected shape ({size},), got {tuple(factor.shape)}")
            values = values * factor[index]
    return with_values(a, values)


def diagonal(a: Tensor) -> Tensor:
    """The main diagonal, `(min(M, N),)`; 0 where nothing is stored.

    Example:
        >>> diagonal(torch.tensor([[1.0, 2.0], [4.0, 0.0]]).to_sparse_csr()).tolist()
        [1.0, 0.0]
    """
    row, col, values = entries(a)
    on = row == col
    return values.new_zeros(min(a.shape)).index_add(0, row[on], values[on])


def add(a: Tensor, b: Tensor) -> Tensor:
    """A + B; an entry that cancels stays, as an explicit 0.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> eye = torch.eye(2).to_sparse_csr()
        >>> add(eye, eye).values().tolist()
        [2.0, 2.0]
    """
    if a.shape != b.shape:
        raise ValueError(f"b: expected the shape of a, {tuple(a.shape)}, got {tuple(b.shape)}")
    row, col, values = (torch.cat(parts) for parts in zip(entries(a), entries(b), strict=True))
    return from_entries(row, col, values, (a.shape[0], a.shape[1]))


def kron(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product: `b` once for each entry of `a`, times that entry.

    Shape:
        - a: `(M, N)`
        - b: `(K, L)`
        - output: `(M K, N L)`

    Example:
        >>> kron(torch.eye(2).to_sparse_csr(), torch.ones(1, 2).to_sparse_csr()).to_dense().tolist()
        [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    first, second = entries(a), entries(b)
    row = (first.row[:, None] * b.shape[0] + second.row).flatten()
    col = (first.col[:, None] * b.shape[1] + second.col).flatten()
    values = (first.values[:, None] * second.values).flatten()
    return from_entries(row, col, values, (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]))


def check_symmetric(name: str, a: Tensor) -> None:
    """Raise a ValueError for a matrix that is not its own transpose, up to rounding."""
    if a.shape[0] != a.shape[1]:
        raise ValueError(f"{name}: expected a square matrix, got shape {tuple(a.shape)}")
    other = transpose(a.detach())
    one = transpose(other)  # with sorted columns
    if not torch.equal(one.crow_indices(), other.crow_indices()) or not torch.equal(
        one.col_indices(), other.col_indices()
    ):
        raise ValueError(f"{name}: expected a symmetric matrix, an entry has no counterpart")
    off = (one.values() - other.values()).abs()
    size = one.values().abs().max() if len(off) else 0.0
    if bool((off > 1e3 * torch.finfo(a.dtype).eps * size).any()):
        raise ValueError(f"{name}: expected a symmetric matrix, entries differ by {off.max():.3g}")


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)
