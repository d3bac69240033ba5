"""`spgemm` of a matrix with itself against scipy, torch's own product and SuiteSparse:GraphBLAS.

Uniformly random matrices, a power-law graph (R-MAT) and a band, with int32 indices as in scipy. The
backward pass is measured against that of the reference. scipy and torch give rows whose
columns are not sorted; ours are. GraphBLAS, which takes part where `python-graphblas` is installed,
puts sorting off until it is told to finish, and so is told to; on the power-law graph it takes more
than 16 GiB and is left out. There the rounds are few, as torch does not free all of a product: of
this one 1.2 GiB stay each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops import _spgemm
from torchzoo.ops.spgemm import spgemm


def uniform(nodes: int, degree: int, seed: int = 0) -> scipy.sparse.csr_matrix:
    """`nodes · degree` entries in random places; those that meet are one."""
    generator = np.random.default_rng(seed)
    row, col = generator.integers(0, nodes, (2, nodes * degree))
    return _matrix(row, col, nodes)


def rmat(
    scale: int, edges: int, seed: int = 0, corners: tuple[float, ...] = (0.57, 0.19, 0.19, 0.05)
) -> scipy.sparse.csr_matrix:
    """A power-law graph of 2^scale nodes: each bit of an edge's ends falls into a corner."""
    generator = np.random.default_rng(seed)
    row, col = np.zeros((2, edges), dtype=np.int64)
    for _ in range(scale):
        corner = generator.choice(4, edges, p=corners)
        row, col = 2 * row + corner // 2, 2 * col + corner % 2
    return _matrix(row, col, 2**scale)


def banded(nodes: int, width: int) -> scipy.sparse.csr_matrix:
    """All entries within `width` / 2 of the diagonal."""
    ones = np.ones(nodes, np.float32)
    offsets = range(-(width // 2), width - width // 2)
    return scipy.sparse.diags([ones] * width, offsets, (nodes, nodes), format="csr", dtype="f4")


def _matrix(row: Any, col: Any, nodes: int) -> scipy.sparse.csr_matrix:
    ones = np.ones(len(row), np.float32)
    matrix = scipy.sparse.csr_matrix((ones, (row, col)), (nodes, nodes))
    matrix.sum_duplicates()
    return matrix


def to_torch(matrix: scipy.sparse.csr_matrix, index: type = np.int64) -> Tensor:
    """The matrix as a CSR tensor."""
    crow, col = (torch.from_numpy(t.astype(index)) for t in (matrix.indptr, matrix.indices))
    values = torch.from_numpy(matrix.data)
    return torch.sparse_csr_tensor(crow, col, values, matrix.shape, check_invariants=False)


def terms(matrix: scipy.sparse.csr_matrix) -> int:
    """How many products the square of a matrix adds up."""
    return int(np.diff(matrix.indptr).astype(np.int64)[matrix.indices].sum())


def contenders(
    device: torch.device, make: Callable[[], scipy.sparse.csr_matrix]
) -> Mapping[str, Callable[[], Any]]:
    """Squares of one matrix."""
    matrix = make()
    a = to_torch(matrix, np.int32).to(device)
    calls: dict[str, Callable[[], Any]] = {OURS: partial(spgemm, a, a), "torch": lambda: a @ a}
    if device.type != "cpu":
        return calls
    calls["scipy"] = lambda: matrix @ matrix
    if terms(matrix) > 1e8:
        return calls
    try:
        import graphblas
    except ImportError:
        return calls
    graphblas.ss.config["nthreads"] = torch.get_num_threads()
    g = graphblas.Matrix.from_csr(matrix.indptr, matrix.indices, matrix.data, ncols=len(a))
    calls["GraphBLAS"] = lambda: g.mxm(g, graphblas.semiring.plus_times).new().wait("materialize")
    return calls


def backward(
    device: torch.device, make: Callable[[], scipy.sparse.csr_matrix]
) -> Mapping[str, Callable[[], Any]]:
    """Gradients of a square in both factors, from gradients that are all 1."""
    a = to_torch(make(), np.int32).to(device)
    pattern, x, columns = [a.crow_indices(), a.col_indices()] * 2, a.values(), a.shape[1]
    pattern += _spgemm.pattern_of(pattern, columns)
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    c = _spgemm.values_of(pattern, x, y, columns)
    ones = torch.ones_like(c)

    def reference() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            da = _spgemm.grad_a._init_fn(pattern, y, ones, columns)
            return da, _spgemm.grad_b._init_fn(pattern, x, ones, columns)

    return {
        OURS: lambda: torch.autograd.grad(c, (x, y), ones, retain_graph=True),
        "reference": reference,
    }


def _case(
    name: str,
    make: Callable[[], scipy.sparse.csr_matrix],
    terms: float,
    entries: float,
    rounds: int | None = None,
) -> Case:
    """A case with the terms and the entries of the square; each entry is a column and a value."""
    calls = partial(contenders, make=make)
    return Case(name, calls, 2 * terms, 12 * entries, 2 * terms, 2.0, rounds=rounds)


BENCH = Bench(
    "spgemm",
    [
        _case("uniform, 20,000 x 16", partial(uniform, 20_000, 16), 5.12e6, 5.09e6),
        _case("uniform, 4,096 x 64", partial(uniform, 4096, 64), 16.5e6, 10.6e6),
        _case("uniform, 100,000 x 8", partial(uniform, 100_000, 8), 6.40e6, 6.40e6),
        _case("R-MAT, 2^16 nodes, 2^20 edges", partial(rmat, 16, 2**20), 401e6, 163e6, 5),
        _case("band, 100,000 x 16", partial(banded, 100_000, 16), 25.6e6, 3.10e6),
        Case(
            "backward, uniform, 20,000 x 16",
            partial(backward, make=partial(uniform, 20_000, 16)),
            4 * 5.12e6,
            8 * 5.12e6,
            4 * 5.12e6,
            2.0,
        ),
    ],
)
