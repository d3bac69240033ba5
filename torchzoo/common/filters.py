"""Inference in linear Gaussian state-space models, in sequence or by parallel scans.

    z_1 ~ N(mu0, P0),  z_t = A_t z_(t-1) + N(0, G_t),  f_t = C z_t,

with observations y_t ~ N(f_t, S), or in information form, as factors
exp(-f_t^T Lambda_t f_t / 2 + eta_t^T f_t) with Lambda_t positive semi-definite: Lambda_t = 0 is a
missing row, and what message passing leaves at a time is one such factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Elements = tuple[Tensor, ...]


class Filtered(NamedTuple):
    """Moments of each state given the observations up to its time.

    Attributes:
        mean: `(*batch, T, n)`.
        cov: `(*batch, T, n, n)`.
        log_likelihood: `(*batch)`, of all observations; of factors, the log of their expectation.
    """

    mean: Tensor
    cov: Tensor
    log_likelihood: Tensor


class Smoothed(NamedTuple):
    """Moments of each state given all observations.

    Attributes:
        mean: `(*batch, T, n)`.
        cov: `(*batch, T, n, n)`.
    """

    mean: Tensor
    cov: Tensor


def kalman_filter(
    y: Tensor,
    A: Tensor,
    G: Tensor,
    C: Tensor,
    S: Tensor,
    mu0: Tensor,
    P0: Tensor,
    *,
    parallel: bool = False,
) -> Filtered:
    """Filter observations; a row of y with a NaN in it is missing.

    Args:
        y: Observations.
        A: Transitions, one for all times or one a time; the first of several is not used.
        G: Covariances of the transitions' noise, likewise.
        C: Map from states to observations, one for all times.
        S: Covariance of the observations' noise, one for all times or one a time.
        mu0: Mean of the first state.
        P0: Its covariance.
        parallel: Whether to use an associative scan, of depth log T, instead of a loop over time.

    Shape:
        - y: `(*batch, T, k)`
        - A, G: `(n, n)` or `(*batch, T, n, n)`
        - C: `(k, n)`
        - S: `(k, k)` or `(*batch, T, k, k)`
        - mu0: `(n,)` or `(*batch, n)`
        - P0: `(n, n)` or `(*batch, n, n)`

    Raises:
        ValueError: Shapes that don't fit.

    Source:
        R. E. Kalman, A new approach to linear filtering and prediction problems, 1960; parallel:
        S. Särkkä and A. F. García-Fernández, Temporal parallelization of Bayesian smoothers, 2021.

    Example:
        >>> one = torch.ones(1, 1)
        >>> y = torch.tensor([[2.0], [torch.nan]])
        >>> kalman_filter(y, one, one, one, one, torch.zeros(1), one).mean[:, 0]
        tensor([1., 1.])
    """
    length, k = y.shape[-2:]
    if not length:
        raise ValueError(f"y: expected at least one time, got {tuple(y.shape)}")
    if S.shape[-2:] != (k, k) or (S.ndim > 2 and S.shape[-3] != length):
        raise ValueError(f"S: expected (..., {k}, {k}) or one a time, got {tuple(S.shape)}")
    seen = ~y.isnan().any(-1)
    known = torch.where(seen[..., None], y, 0.0)
    factor = torch.linalg.cholesky(S)
    white = torch.linalg.solve_triangular(factor, known[..., None], upper=False)[..., 0]
    precision = seen[..., None, None] * torch.cholesky_inverse(factor)
    shift = torch.linalg.solve_triangular(factor.mT, white[..., None], upper=True)[..., 0]
    found = information_filter(shift, precision, A, G, C, mu0, P0, parallel=parallel)
    scale = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + k * math.log(2 * math.pi) / 2
    constant = -(white.square().sum(-1) / 2 + seen * scale).sum(-1)
    return found._replace(log_likelihood=found.log_likelihood + constant)


def information_filter(
    shift: Tensor,
    precision: Tensor,
    A: Tensor,
    G: Tensor,
    C: Tensor,
    mu0: Tensor,
    P0: Tensor,
    *,
    parallel: bool = False,
) -> Filtered:
    """Filter factors exp(-f^T Lambda f / 2 + eta^T f) of f = C z, one a time.

    Args:
        shift: The vectors eta.
        precision: The matrices Lambda, positive semi-definite.
        A: See `kalman_filter`, as for the rest.
        G: Covariances of the transitions' noise.
        C: Map from states to f.
        mu0: Mean of the first state.
        P0: Its covariance.
        parallel: Whether to use an associative scan.

    Shape:
        - shift: `(*batch, T, k)`
        - precision: `(*batch, T, k, k)`

    Raises:
        ValueError: Shapes that don't fit.

    Example:
        >>> one = torch.ones(1, 1)
        >>> found = information_filter(2 * one, one, one, one, one, torch.zeros(1), one)
        >>> found.mean.item(), found.cov.item()
        (1.0, 0.5)
    """
    length, n = shift.shape[-2], mu0.shape[-1]
    _check(shift, precision, A, G, C, P0)
    batch = torch.broadcast_shapes(
        shift.shape[:-2], precision.shape[:-3], A.shape[:-3], G.shape[:-3], mu0.shape[:-1]
    )
    A, G = (m.expand(*batch, length, n, n) for m in (A, G))
    shift = shift.expand(*batch, length, -1)
    precision = precision.expand(*batch, length, -1, -1)
    first = _update(
        mu0.expand(*batch, n), P0.expand(*batch, n, n), shift[..., 0, :], precision[..., 0, :, :], C
    )
    run = _filter_scan if parallel else _filter_loop
    mean, cov = run(*first, shift, precision, A, G, C)
    before = torch.cat(
        [mu0[..., None, :].expand(*batch, 1, n), _apply(A, mean.roll(1, -2))[..., 1:, :]], -2
    )
    spread = torch.cat(
        [
            P0[..., None, :, :].expand(*batch, 1, n, n),
            _predict_cov(A, G, cov.roll(1, -3))[..., 1:, :, :],
        ],
        -3,
    )
    terms = _log_normalizer(_apply(C, before), C @ spread @ C.mT, shift, precision)
    return Filtered(mean, cov, terms.sum(-1))


def rts_smoother(
    mean: Tensor, cov: Tensor, A: Tensor, G: Tensor, *, parallel: bool = False
) -> Smoothed:
    """Moments given all observations, from filtered ones.

    Args:
        mean: Filtered means.
        cov: Filtered covariances.
        A: Transitions, as for the filter.
        G: Covariances of their noise.
        parallel: Whether to use an associative scan.

    Shape:
        - mean: `(*batch, T, n)`
        - cov: `(*batch, T, n, n)`
        - A, G: `(n, n)` or `(*batch, T, n, n)`

    Source:
        H. E. Rauch, F. Tung and C. T. Striebel, Maximum likelihood estimates of linear dynamic
        systems, 1965.

    Example:
        >>> one = torch.ones(1, 1)
        >>> y = torch.tensor([[torch.nan], [3.0]])
        >>> mean, cov, _ = kalman_filter(y, one, one, one, one, torch.zeros(1), one)
        >>> rts_smoother(mean, cov, one, one).mean[:, 0]
        tensor([1., 2.])
    """
    A, G = A.expand(cov.shape)[..., 1:, :, :], G.expand(cov.shape)[..., 1:, :, :]
    past, spread = mean[..., :-1, :], cov[..., :-1, :, :]
    ahead = _predict_cov(A, G, spread)
    gain = torch.linalg.solve(ahead, A @ spread).mT
    offset = past - _apply(gain, _apply(A, past))
    rest = _symmetric(spread - gain @ ahead @ gain.mT)
    if parallel:
        elements = (
            torch.cat([gain, torch.zeros_like(cov[..., :1, :, :])], -3),
            torch.cat([offset, mean[..., -1:, :]], -2)[..., None],
            torch.cat([rest, cov[..., -1:, :, :]], -3),
        )
        _, found, found_cov = _scan(_combine_smoothed, elements, reverse=True)
        return Smoothed(found[..., 0], found_cov)
    m, P = mean[..., -1, :], cov[..., -1, :, :]
    means, covs = [m], [P]
    for t in range(mean.shape[-2] - 2, -1, -1):
        m = _apply(gain[..., t, :, :], m) + offset[..., t, :]
        P = gain[..., t, :, :] @ P @ gain[..., t, :, :].mT + rest[..., t, :, :]
        means.append(m)
        covs.append(P)
    return Smoothed(torch.stack(means[::-1], -2), torch.stack(covs[::-1], -3))


def _update(
    mean: Tensor, cov: Tensor, shift: Tensor, precision: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """Condition states on a factor: `P - P C^T (I + L C P C^T)^-1 L C P`; L may be singular."""
    seen = C @ cov
    inner = _eye(precision) + precision @ seen @ C.mT
    residual = shift - _apply(precision, _apply(C, mean))
    solved = torch.linalg.solve(inner, torch.cat([precision @ seen, residual[..., None]], -1))
    cov = _symmetric(cov - seen.mT @ solved[..., :-1])
    return mean + (seen.mT @ solved[..., -1:])[..., 0], cov


def _log_normalizer(mean: Tensor, cov: Tensor, shift: Tensor, precision: Tensor) -> Tensor:
    """Log expectation of a factor where f is normal."""
    scaled = _apply(precision, mean)
    residual = shift - scaled
    inner = _eye(precision) + precision @ cov
    solved = torch.linalg.solve(inner, residual[..., None])[..., 0]
    quadratic = (residual * _apply(cov, solved)).sum(-1)
    linear = (mean * (shift - scaled / 2)).sum(-1)
    return linear + (quadratic - torch.linalg.slogdet(inner)[1]) / 2


def _filter_loop(
    mean: Tensor, cov: Tensor, shift: Tensor, precision: Tensor, A: Tensor, G: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    means, covs = [mean], [cov]
    for t in range(1, shift.shape[-2]):
        step = A[..., t, :, :]
        mean, cov = _update(
            _apply(step, mean),
            _predict_cov(step, G[..., t, :, :], cov),
            shift[..., t, :],
            precision[..., t, :, :],
            C,
        )
        means.append(mean)
        covs.append(cov)
    return torch.stack(means, -2), torch.stack(covs, -3)


def _filter_scan(
    mean: Tensor, cov: Tensor, shift: Tensor, precision: Tensor, A: Tensor, G: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """Elements (A, b, C, eta, J) of Särkkä and García-Fernández, lemma 7; vectors as columns."""
    offset, spread = _update(torch.zeros_like(A[..., 0]), G, shift, precision, C)
    inner = _eye(precision) + precision @ C @ G @ C.mT
    solved = torch.linalg.solve(inner, torch.cat([precision @ C @ A, shift[..., None]], -1))
    back = (C @ A).mT @ solved
    step = A - G @ C.mT @ solved[..., :-1]
    later = (step, offset[..., None], spread, back[..., -1:], back[..., :-1])
    none = torch.zeros_like(cov)
    start = (none, mean[..., None], cov, none[..., :1], none)
    elements = tuple(
        torch.cat([one.unsqueeze(-3), rest[..., 1:, :, :]], -3)
        for one, rest in zip(start, later, strict=True)
    )
    found = _scan(_combine_filtered, elements)
    return found[1][..., 0], found[2]


def _combine_filtered(first: Elements, second: Elements) -> Elements:
    A1, b1, C1, eta1, J1 = first
    A2, b2, C2, eta2, J2 = second
    inner = _eye(C1) + C1 @ J2
    ahead = torch.linalg.solve(inner.mT, A2.mT).mT  # A2 (I + C1 J2)^-1
    back = torch.linalg.solve(inner, A1).mT  # A1^T (I + J2 C1)^-1
    return (
        ahead @ A1,
        ahead @ (b1 + C1 @ eta2) + b2,
        _symmetric(ahead @ C1 @ A2.mT + C2),
        back @ (eta2 - J2 @ b1) + eta1,
        _symmetric(back @ J2 @ A1 + J1),
    )


def _combine_smoothed(later: Elements, earlier: Elements) -> Elements:
    E1, g1, L1 = earlier
    E2, g2, L2 = later
    return E1 @ E2, E1 @ g2 + g1, _symmetric(E1 @ L2 @ E1.mT + L1)


def _scan(
    combine: Callable[[Elements, Elements], Elements], elements: Elements, *, reverse: bool = False
) -> Elements:
    """All prefixes, or suffixes, of `(..., T, n, m)` along T."""
    turned = tuple(e.movedim(-3, 0) for e in elements)
    if reverse:
        found = (e.flip(0) for e in _prefixes(combine, tuple(e.flip(0) for e in turned)))
    else:
        found = (e for e in _prefixes(combine, turned))
    return tuple(e.movedim(0, -3) for e in found)


def _prefixes(combine: Callable[[Elements, Elements], Elements], elements: Elements) -> Elements:
    """All prefixes along the first axis: work of its length, depth of the logarithm."""
    length = elements[0].shape[0]
    if length == 1:
        return elements
    odd = tuple(e[1::2] for e in elements)
    pairs = _prefixes(combine, combine(tuple(e[: length - 1 : 2] for e in elements), odd))
    before = tuple(p[: (length - 1) // 2] for p in pairs)
    rest = combine(before, tuple(e[2::2] for e in elements))
    found = []
    for element, pair, other in zip(elements, pairs, rest, strict=True):
        whole = torch.empty_like(element)
        whole[0], whole[1::2], whole[2::2] = element[0], pair, other
        found.append(whole)
    return tuple(found)


def _predict_cov(A: Tensor, G: Tensor, cov: Tensor) -> Tensor:
    return _symmetric(A @ cov @ A.mT + G)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x[..., None])[..., 0]


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _check(shift: Tensor, precision: Tensor, A: Tensor, G: Tensor, C: Tensor, P0: Tensor) -> None:
    length, k = shift.shape[-2:]
    n = P0.shape[-1]
    for name, matrix, shape in (("A", A, (n, n)), ("G", G, (n, n)), ("C", C, (k, n))):
        if matrix.shape[-2:] != shape:
            raise ValueError(f"{name}: expected (..., {shape}), got {tuple(matrix.shape)}")
    if precision.shape[-2:] != (k, k):
        raise ValueError(f"precision: expected (..., {k}, {k}), got {tuple(precision.shape)}")
    for name, matrix in (("A", A), ("G", G), ("precision", precision)):
        if matrix.ndim > 2 and matrix.shape[-3] not in (1, length):
            raise ValueError(f"{name}: expected {length} times, got {matrix.shape[-3]}")
