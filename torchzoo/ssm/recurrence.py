"""Recurrences x_l = Abar x_(l-1) + Bbar u_l with dense matrices, and where they come from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

DISCS = ("bilinear", "zoh")
CHUNK = 64
"""Steps that are computed at once; the recurrence goes from chunk to chunk."""


def discretize_dense(
    A: Tensor, B: Tensor, dt: float | None, disc: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Turn x' = A x + B u, with u held over each step, into x_l = Abar x_(l-1) + Bbar u_l.

    Args:
        A: State matrix.
        B: Input vector.
        dt: Length of a step.
        disc: `"bilinear"`, or `"zoh"`, which is exact.

    Shape:
        - A, Abar: `(N, N)`
        - B, Bbar: `(N,)`

    Returns:
        Abar and Bbar.

    Raises:
        ValueError: `dt` missing or not above 0, or an unknown `disc`.

    Example:
        >>> discretize_dense(torch.tensor([[-1.0]]), torch.tensor([1.0]), 2.0)
        (tensor([[0.]]), tensor([1.]))
    """
    dt = check_step(dt, disc)
    N = len(B)
    if disc == "zoh":  # as part of a larger exponential, since A may be singular
        both = torch.cat([A, B[:, None]], 1) * dt
        both = torch.cat([both, torch.zeros_like(both[:1])]).matrix_exp()
        return both[:N, :N], both[:N, N]
    eye = torch.eye(N, dtype=A.dtype, device=A.device)
    left = eye - dt / 2 * A
    return torch.linalg.solve(left, eye + dt / 2 * A), torch.linalg.solve(left, dt * B)


def linear_recurrence(Abar: Tensor, Bbar: Tensor, u: Tensor, start: Tensor) -> Tensor:
    """States after each step, a chunk of K steps at once.

    Within a chunk the inputs act through the Toeplitz matrix of Abar^i Bbar, for all chunks
    together; the state before a chunk acts through the powers of Abar.

    Args:
        Abar: Transition matrix.
        Bbar: Input vector.
        u: Signals of at least one step.
        start: States before the first step.

    Shape:
        - Abar: `(N, N)`
        - Bbar: `(N,)`
        - u: `(M, L)`
        - start: `(M, N)`
        - output: `(M, L, N)`

    Example:
        >>> Abar, Bbar = torch.tensor([[0.5]]), torch.tensor([1.0])
        >>> linear_recurrence(Abar, Bbar, torch.ones(1, 3), torch.zeros(1, 1)).flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    size = min(CHUNK, u.shape[-1])
    powers = Abar[None]  # Abar^1, ..., Abar^K
    while len(powers) < size:
        powers = torch.cat([powers, powers @ powers[-1]])
    powers = powers[:size]
    kernel = torch.cat([Bbar[None], powers[:-1] @ Bbar])  # (K, N)
    lag = torch.arange(size, device=u.device)[None] - torch.arange(size, device=u.device)[:, None]
    toeplitz = kernel[lag.clamp_min(0)] * (lag >= 0)[..., None]  # (K, K, N), from step to step
    padded = F.pad(u, (0, -u.shape[-1] % size))
    chunks = rearrange(padded, "m (c i) -> m c i", i=size)
    driven = torch.einsum("mci,ijn->mcjn", chunks, toeplitz)
    x, before = start, []
    for last in driven[:, :, -1].unbind(1):
        before.append(x)
        x = x @ powers[-1].mT + last
    states = driven + torch.einsum("mck,jnk->mcjn", torch.stack(before, 1), powers)
    return rearrange(states, "m c j n -> m (c j) n")[:, : u.shape[-1]]


def check_step(dt: float | None, disc: str) -> float:
    """The step size; a ValueError unless there is one above 0, and a known rule."""
    if dt is None or not 0 < dt < math.inf:
        raise ValueError(f"dt: expected a number above 0, got {dt}")
    if disc not in DISCS:
        raise ValueError(f"disc: expected one of {DISCS}, got {disc!r}")
    return dt
