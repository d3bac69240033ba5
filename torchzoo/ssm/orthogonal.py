"""State matrices of any orthonormal basis, and conversions from and to the authors' layouts.

With s >= 0 the time into the past and K_n = p_n w on [0, T], integration by parts of
x_n(t) = integral of u(t - s) K_n(s) ds gives

    x_n' = K_n(0) u(t) - K_n(T) u(t - T) + integral of u(t - s) K_n'(s) ds.                    (1)

The last term is the state again where K_n' = sum_k M_nk K_k, M_nk = integral of K_n' p_k, which
is the condition for a time-invariant system of finite size. The far edge is read from the state,

    u(t - T) ~ sum_k p_k(T) x_k,   or   2 sum_k p_k(T) x_k - u(t) for a periodic basis,        (2)

whose series gives the mean of both ends there. So with c = 1, or 2 for a periodic basis,

    A_nk = M_nk - c K_n(T) p_k(T),   B_n = K_n(0) + (c - 1) K_n(T).                            (3)

Gu, Johnson, Timalsina, Rudra and Re, "How to train your HiPPO: state space models with generalized
orthogonal basis projections", 2022, section 3, whose matrices are the cases of Legendre polynomials
in exp(-s), of Legendre polynomials and of Fourier series. Deviations: integrals are quadratures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ORTHONORMAL = 1e-6
_WINDOW = {"legt": 2.0, "fout": 2.0, "fourier2": 1.0}


class OrthogonalSSM(NamedTuple):
    """The system of a basis.

    Attributes:
        A: State matrix `(N, N)`.
        B: Input vector `(N,)`.
        residual: For each n the part of K_n' that no function of the basis holds, `(N,)`, in the
            norm of the projection. Where it is not 0 the system does not belong to the basis.
    """

    A: Tensor
    B: Tensor
    residual: Tensor


def hippo_from_basis(
    basis: Callable[[Tensor], Tensor],
    measure: Callable[[Tensor], Tensor],
    *,
    end: float = math.inf,
    periodic: bool = False,
    nodes: int = 400,
) -> OrthogonalSSM:
    """The state matrices under which a state is the projection of the past onto a basis.

    Args:
        basis: From times `(T,)` in float64 to the functions' values `(T, N)`, differentiable.
        measure: From times `(T,)` to weights `(T,)`, not negative.
        end: Where the measure ends; infinite for one that decays, together with the basis.
        periodic: The basis repeats after `end`, so that its series meets the mean of both ends.
        nodes: Nodes of the Gauss-Legendre quadrature.

    Returns:
        A, B and the residual in float64, on the CPU.

    Raises:
        ValueError: The basis is not orthonormal under the measure, `end` is not above 0, or the
            basis is called periodic without an end.

    Source:
        Gu et al., "How to train your HiPPO", 2022, section 3.

    Example:
        >>> laguerre = lambda t: torch.stack([(-t / 2).exp(), (1 - t) * (-t / 2).exp()], -1)
        >>> A, B, residual = hippo_from_basis(laguerre, torch.ones_like)
        >>> A.round(decimals=6) + 0.0, B
        (tensor([[-0.5000,  0.0000],
                [-1.0000, -0.5000]], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """
    if not end > 0:
        raise ValueError(f"end: expected a number above 0, got {end}")
    if periodic and math.isinf(end):
        raise ValueError("periodic: expected False without an end, got True")

    def kernel(t: Tensor) -> Tensor:
        return basis(t) * measure(t)[:, None]

    t, weights = _quadrature(end, nodes)
    p, w = basis(t), measure(t)
    N = p.shape[-1]
    gram = torch.einsum("t,tn,tk->nk", weights * w, p, p)
    error = (gram - torch.eye(N, dtype=gram.dtype)).abs().max().item()
    if not error < ORTHONORMAL:
        raise ValueError(f"basis: expected orthonormal functions, got products off by {error:.2g}")
    slope = torch.autograd.functional.jvp(kernel, t, torch.ones_like(t))[1]  # K_n', (T, N)
    M = torch.einsum("t,tn,tk->nk", weights, slope, p)
    rest = (slope - w[:, None] * (p @ M.mT)).square() / w[:, None]
    residual = (weights @ torch.where(w[:, None] > 0, rest, 0)).sqrt()
    B = kernel(torch.zeros(1, dtype=t.dtype))[0]
    if math.isinf(end):
        return OrthogonalSSM(M, B, residual)
    edge = torch.full((1,), end, dtype=t.dtype)
    far, share = kernel(edge)[0], 2 if periodic else 1
    return OrthogonalSSM(
        M - share * torch.outer(far, basis(edge)[0]), B + (share - 1) * far, residual
    )


def _quadrature(end: float, nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, end], where there is no end through s = x / (1 - x)."""
    import numpy as np

    x, weights = (torch.from_numpy(part) / 2 for part in np.polynomial.legendre.leggauss(nodes))
    x = x + 0.5
    if math.isinf(end):
        return x / (1 - x), weights / (1 - x).square()
    return end * x, end * weights


def hippo_from_official(A: Tensor, B: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Matrices of the authors' code in the layout of `hippo_matrix`.

    Theirs have a window of length 2 for `"legt"` and `"fout"`, and a dummy sine of frequency 0 in
    both Fourier layouts, which is left out here.

    Args:
        A: State matrix `(N, N)`; N is even in Fourier layouts.
        B: Input vector `(N,)` or `(N, 1)`.
        layout: `"legt"`, `"fout"` or `"fourier2"`.

    Returns:
        A and B, with N - 1 states for the Fourier layouts.

    Raises:
        ValueError: An unknown layout, or tensors of other shapes.

    Example:
        >>> theirs = torch.tensor([[-1.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0])
        >>> hippo_from_official(*theirs, "fout")
        (tensor([[-2.]]), tensor([2.]))
    """
    _check(A, B, layout)
    A, B = A * _WINDOW[layout], B.reshape(-1) * _WINDOW[layout]
    if layout == "legt":
        return A, B
    if len(A) % 2:
        raise ValueError(f"A: expected an even number of states, got shape {tuple(A.shape)}")
    kept = [0, *range(2, len(A))]
    return A[kept][:, kept], B[kept]


def hippo_to_official(A: Tensor, B: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Matrices of `hippo_matrix` in a layout of the authors' code, see `hippo_from_official`.

    Args:
        A: State matrix `(N, N)`. For the Fourier layouts an odd N gets the dummy state, an even N
            has it.
        B: Input vector `(N,)`.
        layout: `"legt"`, `"fout"` or `"fourier2"`.

    Returns:
        A and B.

    Raises:
        ValueError: An unknown layout, or tensors of other shapes.

    Example:
        >>> hippo_to_official(torch.tensor([[-2.0]]), torch.tensor([2.0]), "fout")
        (tensor([[-1.,  0.],
                [ 0.,  0.]]), tensor([1., 0.]))
    """
    _check(A, B, layout)
    A, B = A / _WINDOW[layout], B.reshape(-1) / _WINDOW[layout]
    if layout == "legt" or len(A) % 2 == 0:
        return A, B
    N = len(A)
    kept = torch.tensor([0, *range(2, N + 1)], device=A.device)
    wide = A.new_zeros(N + 1, N + 1)
    wide[kept[:, None], kept] = A
    return wide, B.new_zeros(N + 1).index_copy(0, kept, B)


def _check(A: Tensor, B: Tensor, layout: str) -> None:
    if layout not in _WINDOW:
        raise ValueError(f"layout: expected one of {[*_WINDOW]}, got {layout!r}")
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"A: expected shape (N, N), got {tuple(A.shape)}")
    if B.shape not in ((len(A),), (len(A), 1)):
        raise ValueError(f"B: expected shape ({len(A)},), as A, got {tuple(B.shape)}")
