"""Kernels as functions of a Gram matrix of features, where the features themselves don't exist.

relu    K_ij = (r_ij + (pi - theta_ij) G_ij) / pi,    r_ij = sqrt(G_ii G_jj - G_ij^2),
        theta_ij the angle whose cosine is G_ij / sqrt(G_ii G_jj), so that K_ii = G_ii,
rbf     K_ij = exp(-(G_ii + G_jj - 2 G_ij) / 2),
linear  K = G.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchzoo.infinite import dual

GramKernelKind = Literal["relu", "rbf", "linear"]
KINDS = ("relu", "rbf", "linear")


class GramBlocks(NamedTuple):
    """A Gram or kernel matrix of P inducing points and B test points, in the blocks needed.

    Attributes:
        ii: Between inducing points, `(..., P, P)`.
        ti: Of test with inducing points, `(..., B, P)`.
        tt: Of each test point with itself, `(..., B)`.
    """

    ii: Tensor
    ti: Tensor
    tt: Tensor


def gram_kernel(
    gram_ii: Tensor, gram_ti: Tensor, gram_tt_diag: Tensor, kind: GramKernelKind
) -> GramBlocks:
    """The kernel of features of which only inner products are known.

    Args:
        gram_ii: Inner products of inducing points.
        gram_ti: Of test with inducing points.
        gram_tt_diag: Of each test point with itself.
        kind: `"relu"`, the arc-cosine kernel of order 1 that keeps the diagonal; `"rbf"`, the
            squared exponential of length 1; or `"linear"`.

    Shape:
        - gram_ii: `(..., P, P)`
        - gram_ti: `(..., B, P)`
        - gram_tt_diag: `(..., B)`
        - output: the same shapes

    Raises:
        ValueError: An unknown kind, or shapes that don't fit.

    Source:
        Y. Cho and L. K. Saul, "Kernel methods for deep learning", 2009, equation 6.

    Example:
        >>> gram = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> kernel = gram_kernel(gram, gram[:1], gram.diagonal()[:1], "relu")
        >>> kernel.ii  # off the diagonal 2 / pi
        tensor([[4.0000, 0.6366],
                [0.6366, 1.0000]])
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    check_blocks(gram_ii, gram_ti, gram_tt_diag)
    if kind == "linear":
        return GramBlocks(gram_ii, gram_ti, gram_tt_diag)
    inducing = gram_ii.diagonal(dim1=-2, dim2=-1)
    tt = gram_tt_diag if kind == "relu" else torch.ones_like(gram_tt_diag)
    between = _relu if kind == "relu" else _rbf
    ii = between(inducing[..., :, None], inducing[..., None, :], gram_ii)
    same = torch.eye(gram_ii.shape[-1], dtype=torch.bool, device=gram_ii.device)
    diagonal = inducing if kind == "relu" else torch.ones_like(inducing)
    ii = torch.where(same, diagonal[..., None, :], ii)  # exact, where rounding has half the digits
    return GramBlocks(ii, between(gram_tt_diag[..., None], inducing[..., None, :], gram_ti), tt)


def check_blocks(gram_ii: Tensor, gram_ti: Tensor, gram_tt_diag: Tensor) -> None:
    """Raise a ValueError unless the blocks are of one Gram matrix."""
    if gram_ii.ndim < 2 or gram_ii.shape[-1] != gram_ii.shape[-2]:
        raise ValueError(f"gram_ii: expected (..., P, P), got {tuple(gram_ii.shape)}")
    batch, count = gram_ii.shape[:-2], gram_ii.shape[-1]
    if gram_ti.ndim < 2 or gram_ti.shape[-1] != count:
        raise ValueError(f"gram_ti: expected (..., B, {count}), got {tuple(gram_ti.shape)}")
    if batch and gram_ti.shape[:-2] != batch:
        raise ValueError(f"gram_ti: expected {(*batch, 'B', count)}, got {tuple(gram_ti.shape)}")
    if gram_tt_diag.shape != gram_ti.shape[:-1]:
        raise ValueError(
            f"gram_tt_diag: expected {tuple(gram_ti.shape[:-1])}, got {tuple(gram_tt_diag.shape)}"
        )


def _relu(d1: Tensor, d2: Tensor, s: Tensor) -> Tensor:
    return 2 * dual("relu").value(d1, d2, s)


def _rbf(d1: Tensor, d2: Tensor, s: Tensor) -> Tensor:
    return torch.exp(s - (d1 + d2) / 2)
