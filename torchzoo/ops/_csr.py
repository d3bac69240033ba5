"""Sparse matrices taken apart, checked and put together, for the sparse product.

Kernels trust patterns to some degree and read what they point to, so all that a caller may get
wrong is an error here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Factors(NamedTuple):
    pattern: tuple[Tensor, Tensor, Tensor, Tensor]
    x: Tensor
    y: Tensor
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype


def factors_of(a: Tensor, b: Tensor) -> Factors:
    """Both factors taken apart and checked, with indices of one type and full-precision values."""
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor) or t.layout not in (torch.sparse_csr, torch.sparse_coo):
            kind = t.layout if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name}: expected a sparse CSR or COO matrix, got {kind}")
        if t.ndim != 2 or t.dense_dim():
            raise ValueError(f"{name}: expected a matrix of scalars, got shape {tuple(t.shape)}")
        if not t.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a floating-point matrix, got {t.dtype}")
    if a.device != b.device:
        raise ValueError(f"b: expected the device of a, {a.device}, got {b.device}")
    check_same_dtype("b", b, "a", a)
    if a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a, b: inner sizes don't fit, a.shape[1]={a.shape[1]}, b.shape[0]={b.shape[0]}"
        )
    left = _rows("a", a)
    right = left if b is a else _rows("b", b)
    index = torch.promote_types(left[1].dtype, right[1].dtype)
    pattern = tuple(t.to(index).contiguous() for t in (*left[:2], *right[:2]))
    x, y = wide(left[2]), wide(right[2])
    sizes = (*a.shape, b.shape[1])
    return Factors(pattern, x, y, *sizes, a.dtype)  # type: ignore[arg-type, call-arg]


def _rows(name: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row starts, columns and values of a matrix, checked so that no kernel reads astray."""
    rows, columns = t.shape
    if t.layout == torch.sparse_coo:
        t = t.coalesce()
        row, col = t.indices()
        if not _within(row, rows):
            raise ValueError(f"{name}: expected rows in [0, {rows})")
        crow = F.pad(torch.bincount(row, minlength=rows).cumsum(0), (1, 0))
    else:
        crow, col = t.crow_indices(), t.col_indices()
    values = t.values()
    nnz = col.numel()
    if crow.shape != (rows + 1,) or values.shape != col.shape:
        raise ValueError(
            f"{name}: expected {rows + 1} row starts and a value an entry, got "
            f"{tuple(crow.shape)} row starts, {nnz} columns and {tuple(values.shape)} values"
        )
    if t.device.type == "meta":
        return crow, col, values
    if int(crow[0]) != 0 or int(crow[-1]) != nnz or bool((crow[1:] < crow[:-1]).any()):
        raise ValueError(f"{name}: expected row starts that rise from 0 to {nnz}")
    if not _within(col, columns):
        raise ValueError(f"{name}: expected columns in [0, {columns})")
    if torch.sparse.check_sparse_tensor_invariants.is_enabled():
        place = torch.repeat_interleave(crow.long().diff()) * columns + col
        if place.unique().numel() < nnz:
            raise ValueError(f"{name}: duplicate columns in a row")
    return crow, col, values


def _within(index: Tensor, size: int) -> bool:
    if not index.numel():
        return True
    low, high = index.aminmax()
    return int(low) >= 0 and int(high) < size


def check_same_dtype(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.dtype != other.dtype:
        raise ValueError(
            f"{name}: expected the dtype of {other_name}, {other.dtype}, got {t.dtype}"
        )


def wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def block_diagonal(blocks: Sequence[tuple[Tensor, Tensor, Tensor, int, int]]) -> Tensor:
    """Of blocks (row starts, columns, values, rows, columns)."""
    crows, cols = [blocks[0][0][:1]], []
    rows = columns = entries = 0
    for crow, col, _, height, width in blocks:
        crows.append(crow[1:] + entries)
        cols.append(col + columns)
        rows, columns, entries = rows + height, columns + width, entries + col.numel()
    values = torch.cat([block[2] for block in blocks])
    return csr(torch.cat(crows), torch.cat(cols), values, (rows, columns))
