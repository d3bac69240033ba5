"""Random sparse matrices, corner cases of their products, and whether there are kernels."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from torchzoo.ops.library import backend

NATIVE = backend("spgemm")[0] == "native"
native_only = pytest.mark.skipif(not NATIVE, reason="the kernels are not loaded")


def sparse(rows, columns, density=0.3, seed=0, dtype=torch.float64, index=torch.int64):
    """A random matrix, CSR."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return csr(torch.where(kept, values, 0.0).to(dtype), index)


def csr(dense: Tensor, index=torch.int64) -> Tensor:
    t = dense.to_sparse_csr()
    return raw(t.crow_indices().to(index), t.col_indices().to(index), t.values(), t.shape)


def raw(crow, col, values, shape) -> Tensor:
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def pattern(a: Tensor, b: Tensor) -> list[Tensor]:
    return [a.crow_indices(), a.col_indices(), b.crow_indices(), b.col_indices()]


def edge_cases() -> list[tuple[Tensor, Tensor]]:
    """Empty rows and matrices, one row or column, full ones, no inner dimension."""
    full_row, full_column = torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    full_row[2], full_column[:, 3] = 1.5, -2.5
    some = sparse(6, 6).to_dense()
    dense = [
        (some, torch.zeros(6, 4)),
        (torch.zeros(0, 6), some),
        (some, torch.zeros(6, 0)),
        (torch.zeros(3, 0), torch.zeros(0, 5)),
        (torch.zeros(0, 0), torch.zeros(0, 0)),
        (torch.ones(1, 6), some),
        (some, torch.ones(6, 1)),
        (full_row, some),
        (some, full_row),
        (full_column, some),
        (some, full_column),
        (full_column, full_row),
    ]
    return [(csr(a.double()), csr(b.double())) for a, b in dense]


@cache
def random_cases() -> list[tuple[Tensor, Tensor]]:
    sizes = np.random.default_rng(0)
    cases = []
    for seed in range(50):
        m, k, n = sizes.integers(1, 40, 3)
        n *= 1 + 9 * (seed % 5 == 0)  # some wide enough to be scattered over words of a mask
        density = sizes.choice([0.02, 0.2, 0.7])
        cases.append((sparse(m, k, density, seed), sparse(k, n, density, seed + 100)))
    return cases + edge_cases()


def assert_all_equal(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
