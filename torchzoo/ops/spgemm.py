"""Products of sparse matrices, with gradients and a memory bound that forgets the partial products.

Row by row (Gustavson's order), with A (M, K) and B (K, N) in CSR:

    C[i, :] = Σ_k a_ik B[k, :],   u_i = Σ_k nnz(B_k) terms a row, compression = Σ u_i / nnz(C).

A row's terms are merged as they are made, so A is read once, rows of B by use, and only C is kept.
Terms of an entry are added in the order of A's row: results don't depend on threads or devices'
scheduling. The pattern is structural: an entry whose terms cancel stays, as an explicit 0, so a
plan fits all values and every gradient has a place.

Method: K. Shivdikar, "SMASH: Sparse Matrix Atomic Scratchpad Hashing" (2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchzoo.ops import _spgemm
from torchzoo.ops._csr import Factors, block_diagonal, check_same_dtype, csr, factors_of, wide

SEMIRINGS = ("plus_times", "min_plus", "max_times", "or_and")
_BIN_EDGES = (0, 32, 512, 4096, 12288)


def spgemm(
    a: Tensor,
    b: Tensor,
    *,
    semiring: str = "plus_times",
    deterministic: bool | None = None,
    sort_columns: bool = True,
    hash: str = "low",
    _method: str = "auto",
) -> Tensor:
    """Multiply two sparse matrices.

    Differentiable any number of times in the values of both, on their own patterns. Entries that
    are stored twice count as their sum. float16 and bfloat16 are accumulated in float32.

    Args:
        a: Left factor, sparse CSR or COO.
        b: Right factor, of the dtype and device of `a`.
        semiring: `"plus_times"`; `"min_plus"` (shortest paths; a missing entry is +∞) and
            `"max_times"`, whose gradient goes to the term that won, the lowest k on ties; or
            `"or_and"` (1 where some pair of entries is not zero, else 0), without gradient.
        deterministic: False permits an order of additions that changes from run to run. Every
            implementation has a fixed order at present.
        sort_columns: False permits columns of a row in any order.
        hash: Where rows are merged in hash tables: `"low"` mixes the column, for few collisions;
            `"high"` keeps its leading bits, for tables that come out nearly sorted.

    Shape:
        - a: `(M, K)`
        - b: `(K, N)`
        - output: `(M, N)`

    Returns:
        A CSR matrix. Its indices are int64 if those of either factor are, else int32.

    Raises:
        ValueError: Other layouts or shapes, inner sizes, dtypes or devices that don't fit, row
            starts or columns out of range, more entries than int32 indices can count, unknown
            options; duplicate columns where torch checks invariants of sparse tensors.

    Source:
        K. Shivdikar, "SMASH: Sparse Matrix Atomic Scratchpad Hashing" (thesis, 2021).

    Example:
        >>> a = torch.tensor([[0.0, 2.0], [1.0, 3.0]]).to_sparse_csr()
        >>> spgemm(a, a).to_dense().tolist()
        [[2.0, 6.0], [3.0, 11.0]]
    """
    for name, value, known in (
        ("semiring", semiring, SEMIRINGS),
        ("hash", hash, ("low", "high")),
        ("_method", _method, ("auto", "hash", "inner", "esc")),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    f = factors_of(a, b)
    if _method in ("inner", "esc"):
        crow, col, values, _ = _spgemm.dataflow(f.pattern, f.x, f.y, f.columns, _method)
    elif semiring == "plus_times":
        options = (_method == "hash", hash == "high", sort_columns)
        crow, col, values = _counted(_spgemm.product, f.pattern, f.x, f.y, f.columns, *options)
    else:
        crow, col = _counted(_spgemm.pattern_of, f.pattern, f.columns)
        values = _merge(semiring, [*f.pattern, crow, col], f)
    return csr(crow, col, values.to(f.dtype), (f.rows, f.columns))


def spgemm_plan(a: Tensor, b: Tensor) -> SpGEMMPlan:
    """Find the pattern of a product once, for values that change.

    Args:
        a: Left factor, sparse CSR or COO; only its pattern counts.
        b: Right factor.

    Shape:
        - a: `(M, K)`
        - b: `(K, N)`

    Returns:
        The plan: call it with the values of both factors.

    Raises:
        ValueError: As for `spgemm`.

    Example:
        >>> a = torch.tensor([[0.0, 2.0], [1.0, 3.0]]).to_sparse_csr()
        >>> plan = spgemm_plan(a, a)
        >>> plan(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([2.0, 1.0, 3.0]))
        tensor([ 2.,  6.,  3., 11.])
    """
    f = factors_of(a, b)
    terms = _spgemm.terms_of_rows(f.pattern)
    crow, col = _counted(_spgemm.pattern_of, f.pattern, f.columns)
    return SpGEMMPlan((*f.pattern, crow, col), (f.rows, f.columns), int(terms.sum()), _bins(terms))


@dataclass(frozen=True)
class SpGEMMPlan:
    """The pattern of a product C = AB; made by `spgemm_plan`.

    Calling it multiplies: `plan(a_values, b_values)` gives the values of C, differentiable any
    number of times, and works under `torch.compile`, `torch.vmap` and pickle.

    Args:
        pattern: Row starts and columns of A, of B and of C.
        shape: `(M, N)` of C.
        flops: Σ u_i, the number of terms; each is a multiplication and an addition.
        bins: For each row of C, the class of its u_i: 0, up to 32, 512, 4096, 12288, or more.

    Example:
        >>> eye = torch.eye(3).to_sparse_csr()
        >>> spgemm_plan(eye, eye)
        SpGEMMPlan(shape=(3, 3), nnz=3, flops=3, compression=1)
    """

    pattern: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    shape: tuple[int, int]
    flops: int
    bins: Tensor

    @property
    def crow(self) -> Tensor:
        """Row starts of C, `(M + 1,)`."""
        return self.pattern[4]

    @property
    def col(self) -> Tensor:
        """Columns of C, sorted in each row, `(nnz,)`."""
        return self.pattern[5]

    @property
    def nnz(self) -> int:
        return self.col.shape[0]

    @property
    def compression(self) -> float:
        """Terms merged into an entry of C on average."""
        return self.flops / max(self.nnz, 1)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors that the plan keeps."""
        return sum(t.numel() * t.element_size() for t in (*self.pattern, self.bins))

    def __call__(self, a_values: Tensor, b_values: Tensor) -> Tensor:
        """The values of C.

        Args:
            a_values: A value for each entry of A, `(nnz_a,)`.
            b_values: A value for each entry of B, `(nnz_b,)`.

        Returns:
            A value for each entry of C, `(nnz,)`.

        Raises:
            ValueError: Other shapes, dtypes or devices.
        """
        for name, values, col in (
            ("a_values", a_values, self.pattern[1]),
            ("b_values", b_values, self.pattern[3]),
        ):
            if values.shape != col.shape or not values.is_floating_point():
                raise ValueError(
                    f"{name}: expected floats of shape {tuple(col.shape)}, "
                    f"got {values.dtype} {tuple(values.shape)}"
                )
            if values.device != col.device:
                raise ValueError(f"{name}: expected device {col.device}, got {values.device}")
        check_same_dtype("b_values", b_values, "a_values", a_values)
        x, y = wide(a_values), wide(b_values)
        return _spgemm.values_of(self.pattern, x, y, self.shape[1]).to(a_values.dtype)

    def to_csr(self, values: Tensor) -> Tensor:
        """C as a CSR matrix with these values.

        Raises:
            ValueError: `values` is not of shape `(nnz,)`.
        """
        if values.shape != self.col.shape:
            raise ValueError(
                f"values: expected shape {tuple(self.col.shape)}, got {tuple(values.shape)}"
            )
        return csr(self.crow, self.col, values, self.shape)

    def to(self, device: torch.device | str) -> SpGEMMPlan:
        """The plan on another device."""
        first, second, third, fourth, fifth, sixth = (t.to(device) for t in self.pattern)
        pattern = (first, second, third, fourth, fifth, sixth)
        return SpGEMMPlan(pattern, self.shape, self.flops, self.bins.to(device))

    def __repr__(self) -> str:
        return (
            f"SpGEMMPlan(shape={self.shape}, nnz={self.nnz}, flops={self.flops}, "
            f"compression={self.compression:.3g})"
        )


class SpGEMMStats(NamedTuple):
    """What a product will take, known from the patterns of the factors alone.

    Attributes:
        terms: u_i, `(M,)`.
        histogram: How many rows have u_i = 0, 1, 2-3, 4-7, ...
        bins: As in `SpGEMMPlan`.
        table_bytes: Bytes of a hash table for each row, sized for u_i, `(M,)`.
        load: How full such a table can get, and so how likely a collision, `(M,)`.
        result_bytes: The most that C can take.
    """

    terms: Tensor
    histogram: Tensor
    bins: Tensor
    table_bytes: Tensor
    load: Tensor
    result_bytes: int


def spgemm_stats(a: Tensor, b: Tensor) -> SpGEMMStats:
    """Predict work and memory of a product without computing it.

    Args:
        a: Left factor, sparse CSR or COO.
        b: Right factor.

    Shape:
        - a: `(M, K)`
        - b: `(K, N)`

    Returns:
        Terms, bins and table sizes by row, and an upper bound of the result's bytes.

    Raises:
        ValueError: As for `spgemm`.

    Example:
        >>> a = torch.tensor([[0.0, 2.0], [1.0, 3.0]]).to_sparse_csr()
        >>> spgemm_stats(a, a).terms
        tensor([2, 3])
    """
    f = factors_of(a, b)
    terms = _spgemm.terms_of_rows(f.pattern)
    entries = terms.clamp(max=f.columns)
    slots = 2 ** torch.ceil(torch.log2(2.0 * entries + 2)).long()
    entry_bytes = f.pattern[1].element_size() + f.x.element_size()
    return SpGEMMStats(
        terms,
        torch.bincount(torch.ceil(torch.log2(terms + 1.0)).long()),
        _bins(terms),
        slots * entry_bytes,
        entries / slots,
        int(entries.sum()) * entry_bytes + (f.rows + 1) * f.pattern[0].element_size(),
    )


def spgemm_batched(pairs: Sequence[tuple[Tensor, Tensor]], **options: Any) -> list[Tensor]:
    """Multiply pairs of sparse matrices in one product of block-diagonal ones.

    Args:
        pairs: Factors `(a, b)`, of one dtype and device; sizes may differ.
        **options: Options of `spgemm`.

    Returns:
        A product for each pair.

    Raises:
        ValueError: As for `spgemm`.

    Example:
        >>> eye = torch.eye(2).to_sparse_csr()
        >>> [c.values().sum().item() for c in spgemm_batched([(eye, eye), (2 * eye, eye)])]
        [2.0, 4.0]
    """
    if not pairs:
        return []
    factors = [factors_of(a, b) for a, b in pairs]
    left = [(f.pattern[0], f.pattern[1], f.x.to(f.dtype), f.rows, f.inner) for f in factors]
    right = [(f.pattern[2], f.pattern[3], f.y.to(f.dtype), f.inner, f.columns) for f in factors]
    c = spgemm(block_diagonal(left), block_diagonal(right), **options)
    crow, col, values = c.crow_indices(), c.col_indices(), c.values()
    products, row, column = [], 0, 0
    for f in factors:
        starts = crow[row : row + f.rows + 1]
        own = slice(int(starts[0]), int(starts[-1]))
        shape = (f.rows, f.columns)
        products.append(csr(starts - starts[0], col[own] - column, values[own], shape))
        row, column = row + f.rows, column + f.columns
    return products


def _counted(op: Any, *args: Any) -> Any:
    """Call an operator whose result may have more entries than its indices can count."""
    try:
        return op(*args)
    except RuntimeError as error:
        if "int64 indices" in str(error):
            raise ValueError(f"a, b: {str(error).splitlines()[0]}") from error
        raise


def _merge(semiring: str, pattern: Sequence[Tensor], f: Factors) -> Tensor:
    """The values of C in a semiring that selects one term for each entry."""
    x, y = f.x, f.y
    if semiring == "or_and":
        x, y = (x != 0).to(x.dtype), (y != 0).to(y.dtype)
    p, q = _spgemm.select(pattern, x.detach(), y.detach(), f.columns, semiring != "min_plus")
    return x[p] + y[q] if semiring == "min_plus" else x[p] * y[q]


def _bins(terms: Tensor) -> Tensor:
    return torch.bucketize(terms, torch.tensor(_BIN_EDGES, device=terms.device))
