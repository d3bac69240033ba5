"""The kernel of random-feature attention with infinitely many heads.

H. Fu, T. Guo, Y. Bai and S. Mei, What can a Single Attention Layer Learn? A Study Through the
Random Features Lens, 2023. With u_i = x~_0 x~_i^T and W of iid entries N(W_0, s^2),

    K(x, x') = (1/(N N')) sum_ij <x~_i, x~'_j> E relu(a_i) relu(b_j),
    a_i = <W, u_i>,  b_j = <W, u'_j>.

a and b are jointly normal with means m_a = <W_0, u>, m_b = <W_0, u'>, deviations
s_a = s norm(u), s_b = s norm(u') and correlation r = cos t = <u, u'> / (norm(u) norm(u')).
For W_0 = 0 the expectation is the arc-cosine kernel of order one,
`s_a s_b (sin t + (pi - t) cos t) / (2 pi)`; else, with h = m_a / s_a, k = m_b / s_b and q = sin t,
from integration by parts,

    E = (m_a m_b + r s_a s_b) P(h, k; r) + m_a s_b phi(k) Phi((h - r k) / q)
        + m_b s_a phi(h) Phi((k - r h) / q) + s_a s_b q^2 p(h, k; r),

P and p the distribution and density of a standard bivariate normal. P comes from Owen's T.

Deviations from the paper: none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchzoo.attention.random_feature import check_std, homogeneous, mean_weight
from torchzoo.attention.random_feature_model import check_inputs

_PAIRS_AT_ONCE = 2**20  # bounds the pairs of keys whose expectations are held in memory


@torch.no_grad()
def rfa_kernel(
    query: Tensor,
    keys: Tensor,
    query2: Tensor,
    keys2: Tensor,
    *,
    weight_std: float = 0.5,
    bias_mean: Literal["identity"] | Tensor | None = None,
    mask: Tensor | None = None,
    mask2: Tensor | None = None,
) -> Tensor:
    """The limit of `Phi Phi^T / M` for the features Phi of M attention heads with ReLU.

    Computed in float64, without gradients.

    Args:
        query: Queries of the first set.
        keys: Keys of the first set.
        query2: Queries of the second set.
        keys2: Keys of the second set, of another number if need be.
        weight_std: Standard deviation s of the weights' entries.
        bias_mean: Mean W_0 of the weights, as for `RandomFeatureAttention`.
        mask: True for the real keys of the first set.
        mask2: True for the real keys of the second set.

    Shape:
        - query: `(n, d)`; query2: `(m, d)`
        - keys: `(n, N, d)`; keys2: `(m, N2, d)`
        - mask: `(n, N)`, bool; mask2: `(m, N2)`
        - bias_mean: `(d + 1, d + 1)`
        - output: `(n, m)`

    Returns:
        The kernel matrix, in the dtype of the queries.

    Raises:
        ValueError: Shapes that don't fit, no keys, or a deviation that is not above 0.

    Source:
        Fu, Guo, Bai and Mei, What can a Single Attention Layer Learn? A Study Through the Random
        Features Lens, 2023, the limit of many heads. Zero mean: Y. Cho and L. K. Saul, Kernel
        methods for deep learning, 2009, eq. 6.

    Example:
        >>> query, keys = torch.zeros(1, 2), torch.zeros(1, 3, 2)  # every u is 1 in one entry
        >>> rfa_kernel(query, keys, query, keys, weight_std=2.0)  # E relu(2 z)^2
        tensor([[2.]])
    """
    for name, queries, given in (("query", query, keys), ("query2", query2, keys2)):
        if queries.ndim != 2 or queries.shape[-1] != query.shape[-1]:
            wanted = "(n, d)" if name == "query" else f"(m, {query.shape[-1]})"
            raise ValueError(f"{name}: expected {wanted}, got {tuple(queries.shape)}")
        check_inputs(queries, given, mask if given is keys else mask2, suffix=name[5:])
    check_std(weight_std)
    mean = mean_weight(bias_mean, query.shape[-1])
    if mean is not None:
        mean = mean.to(query.device, torch.float64)
    one, two = _Inputs(query, keys, mask, mean), _Inputs(query2, keys2, mask2, mean)
    pairs_a_row = max(1, keys.shape[1] * two.keys[..., 0].numel())
    step = max(1, _PAIRS_AT_ONCE // pairs_a_row)
    rows = [
        _kernel_rows(one.rows(i, i + step), two, weight_std) for i in range(0, len(query), step)
    ]
    kernel = torch.cat(rows) if rows else query.new_zeros(0, len(query2))
    return kernel.to(query.dtype)


class _Inputs:
    """Queries and keys in homogeneous coordinates, float64, with what each pair needs of them.

    Attributes:
        query: x~_0, `(n, d + 1)`.
        keys: x~_i, `(n, N, d + 1)`, 0 where masked.
        share: Each key's share of the mean, `(n, N)`.
        norm: The norms of u_i, `(n, N)`; 1 where masked.
        mean: <W_0, u_i>, `(n, N)`, or None for W_0 = 0.
    """

    def __init__(
        self, query: Tensor, keys: Tensor, mask: Tensor | None, mean: Tensor | None
    ) -> None:
        self.query = torch.nn.functional.pad(query.double(), (0, 1), value=1.0)
        self.keys, self.share = homogeneous(keys.double(), mask)
        norm = self.query.norm(dim=-1, keepdim=True) * self.keys.norm(dim=-1)
        self.norm = norm.where(norm > 0, 1)
        self.mean = None
        if mean is not None:
            self.mean = torch.einsum("na,ab,nib->ni", self.query, mean, self.keys)

    def rows(self, start: int, stop: int) -> _Inputs:
        part = object.__new__(_Inputs)
        for name, value in vars(self).items():
            setattr(part, name, None if value is None else value[start:stop])
        return part


def _kernel_rows(one: _Inputs, two: _Inputs, std: float) -> Tensor:
    """Rows of the kernel; indices n, i are of the first set, m, j of the second."""
    inner = torch.einsum("nia,mja->nimj", one.keys, two.keys)
    across = torch.einsum("na,ma->nm", one.query, two.query)[:, None, :, None]
    norms = one.norm[:, :, None, None] * two.norm
    cosine = (across * inner / norms).clamp(-1, 1)
    if one.mean is None or two.mean is None:
        expected = std**2 * norms * _arc_cosine(cosine)
    else:
        s1, s2 = std * one.norm[:, :, None, None], std * two.norm
        expected = s1 * s2 * relu_moment(one.mean[:, :, None, None] / s1, two.mean / s2, cosine)
    return torch.einsum("ni,mj,nimj->nm", one.share, two.share, inner * expected)


def _arc_cosine(cosine: Tensor) -> Tensor:
    """E relu(X) relu(Y) for standard normals of this correlation."""
    angle = cosine.arccos()
    return (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)


def relu_moment(h: Tensor, k: Tensor, r: Tensor) -> Tensor:
    """`E relu(h + X) relu(k + Y)` for standard normals X, Y of correlation r, in float64.

    Args:
        h: Mean of the first.
        k: Mean of the second.
        r: Correlation, from -1 to 1.

    Shape:
        - h, k, r: `(...)`, broadcast together
        - output: `(...)`

    Returns:
        The expectation, by the formula in the head of this file for unit deviations.

    Example:
        >>> zero = torch.zeros((), dtype=torch.float64)
        >>> relu_moment(zero, zero, zero)  # 1 / (2 pi)
        tensor(0.1592, dtype=torch.float64)
    """
    q = ((1 - r) * (1 + r)).sqrt()
    # Exact zeros stand for small positive numbers, at which Owen's T has the right limit.
    h, k = (x.where(x.abs() > 1e-100, 1e-100) for x in (h, k))
    # Inputs that are multiples of each other have r = 1 and h = k, or r = -1 and h = -k: the ratios
    # are then 0 / 0 with limit 0, up to rounding, which the floor keeps small.
    a, b = ((x - r * y) / q.clamp_min(1e-8) for x, y in ((h, k), (k, h)))
    phi, cdf = _density, torch.special.ndtr
    both = cdf(h) / 2 + cdf(k) / 2 - _owens_t(h, b) - _owens_t(k, a)
    both = both - 0.5 * ((h < 0) != (k < 0))
    density = q / math.sqrt(2 * math.pi) * phi(torch.hypot(h, b))  # q^2 p(h, k; r)
    return (h * k + r) * both + h * phi(k) * cdf(a) + k * phi(h) * cdf(b) + density


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _owens_t(h: Tensor, b: Tensor) -> Tensor:
    """Owen's T(h, a) at a = b / h, for h other than 0.

    T(h, a) + T(a h, 1/a) = (Phi(h) + Phi(a h)) / 2 - Phi(h) Phi(a h) - [a < 0] / 2 brings every a
    into [-1, 1], where Gauss-Legendre quadrature is exact to rounding.
    """
    cdf: Callable[[Tensor], Tensor] = torch.special.ndtr
    swap = b.abs() > h.abs()
    outer, inner = torch.where(swap, b, h), torch.where(swap, h, b)
    ratio = inner / outer
    nodes, weights = (torch.as_tensor(x, device=h.device) for x in _NODES)
    total = torch.zeros_like(ratio)
    for node, weight in zip(nodes, weights, strict=True):
        square = 1 + (node * ratio).square()
        total += weight * torch.exp(-outer.square() * square / 2) / square
    integral = ratio * total / (2 * math.pi)
    swapped = (cdf(h) + cdf(b)) / 2 - cdf(h) * cdf(b) - 0.5 * ((h < 0) != (b < 0)) - integral
    return torch.where(swap, swapped, integral)


_NODES = [
    part / 2 + shift
    for part, shift in zip(np.polynomial.legendre.leggauss(24), (0.5, 0.0), strict=True)
]
"""Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
