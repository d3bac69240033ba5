"""HiPPO: state matrices whose states are the coefficients of the past in an orthogonal basis.

Gu, Johnson, Timalsina, Rudra and Re, "How to train your HiPPO: state space models with generalized
orthogonal basis projections", 2022. With s >= 0 the time into the past, a pair (A, B) belongs to
the basis p_n and the measure w when

    e_n^T exp(sA) B = p_n(s) w(s),   integral of p_n p_m w = delta_nm,                         (1)

so that the state of x' = A x + B u is a projection of the history and can be read back:

    x_n(t) = integral of u(t - s) p_n(s) w(s) ds,   u(t - s) ~ sum_n x_n(t) p_n(s).            (2)

Times are in units of the window, or of the time constant where the measure has no end:

    legs     w = exp(-s)     p_n = sqrt(2n+1) P_n(2 exp(-s) - 1)        exact
    lagt     w = 1           p_n = L_n(s) exp(-s/2)                     exact
    legt     w = 1 on [0,1]  p_n = sqrt(2n+1) P_n(1 - 2s)               (1) in the limit of N
    fout     w = 1 on [0,1]  1, sqrt2 cos 2 pi s, sqrt2 sin 2 pi s, ..  (1) in the limit of N
    lmu      w = 1 on [0,1]  p_n = P_n(2s - 1), kernel (2n+1) p_n w     `legt` rescaled
    legs_tv  w = 1 on [0,1]  p_n = sqrt(2n+1) P_n(1 - 2s)           exact

The last is x' = (A x + B u) / t with A and B of `legs`, whose past is all since the start, t time
units, in units of t.

Deviations: all windows have length 1, where the authors' code has length 2 for `legt` and `fout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MEASURES = ("legs", "legs_tv", "legt", "fout", "lagt", "lmu")
_ENDLESS = ("legs", "lagt")


def hippo_matrix(
    measure: str, N: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The state matrix A and input vector B of a measure, in continuous time x' = A x + B u.

    The states of `"fout"` are in the order 1, cos_1, sin_1, cos_2, ..., for odd N. An even N would
    leave the last cosine without its sine, its row a multiple of row 0 and A singular, so there a
    dummy state follows the constant: 1, dummy, cos_1, sin_1, ..., with row, column and input 0.

    Args:
        measure: `"legs"`, `"legs_tv"` (for x' = (A x + B u) / t), `"legt"`, `"fout"`, `"lagt"` or
            `"lmu"`.
        N: Number of states.
        dtype: Dtype of the result, computed in float64.

    Shape:
        - A: `(N, N)`
        - B: `(N,)`

    Returns:
        A and B, on the CPU.

    Raises:
        ValueError: An unknown measure, or N below 1.

    Source:
        Gu et al., "How to train your HiPPO", 2022, equation 2 and section 3; `lmu`: Voelker,
        Kajic and Eliasmith, "Legendre memory units", 2019.

    Example:
        >>> A, B = hippo_matrix("legs", 3)
        >>> A.diagonal().tolist(), B.square().round().tolist()
        ([-1.0, -2.0, -3.0], [1.0, 3.0, 5.0])
    """
    _check(measure, N)
    n = torch.arange(N, dtype=torch.float64, device="cpu")
    ones = torch.ones(N, N, dtype=torch.float64, device="cpu")
    signs = (-1) ** n
    if measure == "fout":
        A, B = _truncated_fourier(N)
    elif measure == "lagt":
        A, B = torch.eye(N, dtype=n.dtype, device="cpu") / 2 - ones.tril(), torch.ones_like(n)
    elif measure == "lmu":
        alternating = torch.outer(signs, signs)  # (-1)^(n-k)
        A, B = -(2 * n + 1)[:, None] * (ones.triu(1) + alternating.tril()), (2 * n + 1) * signs
    else:
        B = (2 * n + 1).sqrt()
        if measure == "legt":
            A = -torch.outer(B, B) * (ones.tril() + torch.outer(signs, signs).triu(1))
        else:
            A = -(torch.outer(B, B).tril(-1) + torch.diag(n + 1))
    return A.to(dtype), B.to(dtype)


def _truncated_fourier(N: int) -> tuple[Tensor, Tensor]:
    """Rotations by 2 pi j, and the boundary terms of u(t - 1) ~ 2 sum_k x_k p_k(1) - u(t)."""
    end = _fourier(N, torch.zeros(1, dtype=torch.float64, device="cpu"))[0]  # p(1) = p(0)
    A = -2 * torch.outer(end, end)
    for j, cos in enumerate(range(1 + (N + 1) % 2, N - 1, 2), start=1):
        A[cos + 1, cos] = 2 * math.pi * j
        A[cos, cos + 1] = -2 * math.pi * j
    return A, 2 * end


def hippo_basis(measure: str, N: int, t: Tensor) -> Tensor:
    """The basis functions p_0, ..., p_(N-1) at times into the past.

    Args:
        measure: A measure of `hippo_matrix`.
        N: Number of functions.
        t: Times into the past, 0 = now, in units of the window or time constant.

    Shape:
        - t: `(T,)`
        - output: `(T, N)`

    Returns:
        The values; for `"fout"` with even N the dummy's column is 0.

    Raises:
        ValueError: An unknown measure, N below 1, or a time outside the measure's support.

    Source:
        Gu et al., "How to train your HiPPO", 2022, section 3.

    Example:
        >>> hippo_basis("legt", 2, torch.tensor([0.0, 0.5, 1.0])).square().round()
        tensor([[1., 3.],
                [1., 0.],
                [1., 3.]])
    """
    _check(measure, N)
    t = _times(measure, t)
    if measure == "fout":
        return _fourier(N, t)
    if measure == "lagt":
        return _laguerre(N, t) * (-t / 2).exp()[:, None]
    if measure == "lmu":
        return _legendre(N, 2 * t - 1)
    n = torch.arange(N, dtype=t.dtype, device=t.device)
    x = 2 * (-t).exp() - 1 if measure == "legs" else 1 - 2 * t
    return (2 * n + 1).sqrt() * _legendre(N, x)


def hippo_measure(measure: str, t: Tensor) -> Tensor:
    """The weight w(t) that the measure gives to the time t into the past.

    Args:
        measure: A measure of `hippo_matrix`.
        t: Times into the past, 0 = now, in units of the window or time constant.

    Shape:
        - t: `(T,)`; output the same

    Returns:
        The weights; for `"lagt"` 1, which does not integrate to 1 as the others do.

    Raises:
        ValueError: An unknown measure, or a time outside the measure's support.

    Source:
        Gu et al., "How to train your HiPPO", 2022, section 3.

    Example:
        >>> hippo_measure("legt", torch.tensor([0.0, 1.0]))
        tensor([1., 1.])
    """
    _check(measure, 1)
    t = _times(measure, t)
    return (-t).exp() if measure == "legs" else torch.ones_like(t)


def hippo_reconstruct(x: Tensor, measure: str, t: Tensor) -> Tensor:
    """Read the past back from a state: u(now - t) ~ sum_n x_n p_n(t).

    Args:
        x: Coefficients, as `hippo_project` gives them.
        measure: The measure that they belong to.
        t: Times into the past, 0 = now, in units of the window or time constant; for `"legs_tv"`
            of the time since the start.

    Shape:
        - x: `(..., N)`
        - t: `(T,)`
        - output: `(..., T)`

    Returns:
        The reconstruction, in the dtype of `x`.

    Raises:
        ValueError: An unknown measure, or a time outside the measure's support.

    Source:
        Gu et al., "How to train your HiPPO", 2022, section 2.

    Example:
        >>> hippo_reconstruct(torch.tensor([2.0, 0.0, 0.0]), "legs", torch.tensor([0.0, 3.0]))
        tensor([2., 2.])
    """
    if x.ndim < 1:
        raise ValueError(f"x: expected shape (..., N), got {tuple(x.shape)}")
    return x @ hippo_basis(measure, x.shape[-1], t.to(x.device)).mT.to(x.dtype)


def timescale_init(
    d_model: int,
    *,
    span: Sequence[float] = (10, 1000),
    distribution: str = "loguniform",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw step sizes such that the memories 1/dt of the channels cover a span of lengths.

    A measure of time constant or window 1, advanced by dt a step, remembers about 1/dt steps.

    Args:
        d_model: Number of channels.
        span: Shortest and longest memory, in steps.
        distribution: `"loguniform"` or `"uniform"`, of the memory length.
        generator: Source of the random numbers.
        device: Device of the result.
        dtype: Dtype of the result.

    Shape:
        - output: `(d_model,)`

    Returns:
        log dt.

    Raises:
        ValueError: `d_model` below 1, a span that is not 0 < shortest < longest, or an unknown
            distribution.

    Source:
        Gu et al., "How to train your HiPPO", 2022, section 3.3.

    Example:
        >>> log_dt = timescale_init(100, span=(10, 1000))
        >>> bool(((-log_dt).exp() >= 9.99).all() and ((-log_dt).exp() <= 1001).all())
        True
    """
    if d_model < 1:
        raise ValueError(f"d_model: expected a number of at least 1, got {d_model}")
    if len(span) != 2 or not 0 < span[0] < span[1] < math.inf:
        raise ValueError(f"span: expected (shortest, longest), 0 < shortest < longest, got {span}")
    if distribution not in ("loguniform", "uniform"):
        raise ValueError(f"distribution: expected 'loguniform' or 'uniform', got {distribution!r}")
    share = torch.rand(d_model, generator=generator, device=device, dtype=dtype)
    shortest, longest = span
    if distribution == "loguniform":
        return -(math.log(shortest) + share * math.log(longest / shortest))
    return -(shortest + share * (longest - shortest)).log()


def _check(measure: str, N: int) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {MEASURES}, got {measure!r}")
    if N < 1:
        raise ValueError(f"N: expected a number of at least 1, got {N}")


def _times(measure: str, t: Tensor) -> Tensor:
    if t.ndim != 1:
        raise ValueError(f"t: expected shape (T,), got {tuple(t.shape)}")
    t = t if t.is_floating_point() else t.to(torch.get_default_dtype())
    end = math.inf if measure in _ENDLESS else 1.0
    rounding = 4 * torch.finfo(t.dtype).eps
    if not bool(((t >= -rounding) & (t <= end + rounding)).all()):
        raise ValueError(
            f"t: expected times in the support [0, {end:g}] of {measure!r}, got "
            f"{t.min().item():g} to {t.max().item():g}"
        )
    return t


def _fourier(N: int, t: Tensor) -> Tensor:
    angles = 2 * math.pi * t[:, None] * torch.arange(N // 2 + 1, dtype=t.dtype, device=t.device)
    pairs = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], -1)  # (T, N//2 + 1, 2)
    constant = torch.stack([torch.ones_like(t), torch.zeros_like(t)], -1)
    columns = torch.cat([constant[:, None], pairs[:, 1:]], 1).flatten(1)
    if N % 2 == 0:
        return columns[:, :N]
    return torch.cat([columns[:, :1], columns[:, 2:]], 1)


def _legendre(N: int, x: Tensor) -> Tensor:
    values = [torch.ones_like(x), x]
    for n in range(1, N - 1):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[:N], -1)


def _laguerre(N: int, t: Tensor) -> Tensor:
    values = [torch.ones_like(t), 1 - t]
    for n in range(1, N - 1):
        values.append(((2 * n + 1 - t) * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[:N], -1)
