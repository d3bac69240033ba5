"""Dense linear algebra: safe Cholesky factors, and Kronecker products that are never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor


def psd_cholesky(
    matrix: Tensor, *, jitter: float = 1e-6, max_tries: int = 6
) -> tuple[Tensor, Tensor]:
    """Cholesky factor of a positive semi-definite matrix, with as little jitter as it needs.

    The first try adds nothing; then `jitter` times the mean of the diagonal is added to the
    diagonal, ten times as much at each further try, and only to those matrices of a batch that
    still fail.

    Args:
        matrix: Symmetric matrices; only the lower triangles are read.
        jitter: First jitter, relative to the mean of the diagonal.
        max_tries: Tries with jitter.

    Shape:
        - matrix: `(..., n, n)`
        - output: the lower factor `(..., n, n)` and the jitter that was added, `(...)`

    Returns:
        The factor, differentiable, and the absolute jitter, 0 where none was needed.

    Raises:
        ValueError: The matrices are not square, or one is not positive semi-definite.

    Example:
        >>> factor, jitter = psd_cholesky(torch.ones(2, 2, dtype=torch.float64))
        >>> round(jitter.item(), 9), torch.allclose(factor @ factor.mT, torch.ones(2, 2).double())
        (1e-06, True)
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix: expected (..., n, n), got {tuple(matrix.shape)}")
    diagonal = matrix.detach().diagonal(dim1=-2, dim2=-1)
    unit = diagonal.mean(-1) if matrix.shape[-1] else matrix.new_zeros(matrix.shape[:-2])
    added = torch.zeros_like(unit)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    for attempt in range(max_tries):
        if not failed.any():
            break
        added = torch.where(failed > 0, jitter * 10.0**attempt * unit, added)
        shift = torch.diag_embed(added[..., None].expand(diagonal.shape))
        factor, failed = torch.linalg.cholesky_ex(matrix + shift)
    if failed.any():
        lowest = torch.linalg.eigvalsh(matrix.detach()[failed > 0].double()).min().item()
        raise ValueError(
            f"matrix: expected positive semi-definite, got one of shape {tuple(matrix.shape)} "
            f"with an eigenvalue of {lowest:.3g}"
        )
    return factor, added


def kron_matvec(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """`(F_1 kron ... kron F_D) x` in time `N sum n_d`, the product never formed.

    Args:
        factors: The matrices F_d; leading dimensions broadcast with those of x.
        x: Vectors, in the row-major order of the grid `(n_1, ..., n_D)`.

    Shape:
        - factors: `(..., m_d, n_d)`
        - x: `(..., n_1 ... n_D)`
        - output: `(..., m_1 ... m_D)`

    Raises:
        ValueError: The length of x is not the product of the factors' widths.

    Source:
        R. A. Horn and C. R. Johnson, Topics in matrix analysis, 1991, lemma 4.3.1.

    Example:
        >>> flip, scale = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0]])
        >>> kron_matvec([flip, scale], torch.tensor([1.0, 3.0]))
        tensor([6., 2.])
    """
    return _each_mode([_times(f) for f in factors], [f.shape[-1] for f in factors], x)


def kron_solve(
    factors: Sequence[Tensor], x: Tensor, *, lower: bool = False, upper: bool = False
) -> Tensor:
    """`(F_1 kron ... kron F_D)^-1 x`, by a solve with each factor.

    Args:
        factors: Square matrices F_d.
        x: Right-hand sides, in row-major order.
        lower: Whether the factors are lower triangular; what is above their diagonals isn't read.
        upper: Whether they are upper triangular, likewise.

    Shape:
        - factors: `(..., n_d, n_d)`
        - x: `(..., n_1 ... n_D)`
        - output: `(..., n_1 ... n_D)`

    Raises:
        ValueError: A factor that is not square, or x of another length.

    Example:
        >>> kron_solve([2 * torch.eye(2), torch.eye(1)], torch.tensor([1.0, 3.0]))
        tensor([0.5000, 1.5000])
    """
    _check_square(factors)
    solves = [_triangular(f, upper) if lower or upper else _general(f) for f in factors]
    return _each_mode(solves, [f.shape[-1] for f in factors], x)


def kron_logdet(factors: Sequence[Tensor], *, lower: bool = False) -> Tensor:
    """Logarithm of the absolute determinant of `F_1 kron ... kron F_D`.

    Args:
        factors: Square matrices F_d.
        lower: Whether the factors are lower triangular.

    Shape:
        - factors: `(..., n_d, n_d)`
        - output: `(...)`

    Raises:
        ValueError: A factor that is not square.

    Example:
        >>> round(kron_logdet([2 * torch.eye(2), torch.eye(3)]).item(), 4)  # 6 log 2
        4.1589
    """
    _check_square(factors)
    total = math.prod(f.shape[-1] for f in factors)
    logs = [
        f.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1) if lower else torch.linalg.slogdet(f)[1]
        for f in factors
    ]
    terms = [total // max(f.shape[-1], 1) * log for f, log in zip(factors, logs, strict=True)]
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def _each_mode(
    functions: Sequence[Callable[[Tensor], Tensor]], sizes: Sequence[int], x: Tensor
) -> Tensor:
    """Apply each function to the rows of its mode; the layout turns full circle, mode by mode."""
    if x.ndim == 0 or x.shape[-1] != math.prod(sizes):
        raise ValueError(f"x: expected (..., {math.prod(sizes)}), got {tuple(x.shape)}")
    for function, size in zip(functions, sizes, strict=True):
        x = function(rearrange(x, "... (n rest) -> ... rest n", n=size))
        x = rearrange(x, "... rest m -> ... (rest m)")
    return x


def _times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows @ factor.mT


def _triangular(factor: Tensor, upper: bool) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.linalg.solve_triangular(factor.mT, rows, upper=not upper, left=False)


def _general(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.linalg.solve(factor.mT, rows, left=False)


def _check_square(factors: Sequence[Tensor]) -> None:
    for factor in factors:
        if factor.ndim < 2 or factor.shape[-1] != factor.shape[-2]:
            raise ValueError(f"factors: expected (..., n, n), got {tuple(factor.shape)}")
