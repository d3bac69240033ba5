"""Initial values of diagonal state spaces: eigenvalues of A and the input vector B.

Of each pair of complex conjugates the one with positive imaginary part is kept, n = 0..N/2-1:

    lin     A_n = -1/2 + i pi n                           B_n = 1
    inv     A_n = -1/2 + i (N/pi) (N/(2n+1) - 1)          B_n = 1
    legs    A = eigenvalues of A_legs + P P^T             B = V^* B_legs / 2
    real    A_n = -(n+1)                                  B_n = 1
    random  A_n = -exp(N(0,1)) + i N(0,1), per channel    B_n = 1

Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state space
models", 2022, section 4; `real` and `random` are its ablations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INITS = ("lin", "inv", "legs", "real", "random")


def s4d_init(
    d_state: int,
    init: str = "lin",
    *,
    d_model: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and input vector of a diagonal state space.

    Args:
        d_state: State size N, even.
        init: `"lin"`, `"inv"`, `"legs"`, `"real"` or `"random"`.
        d_model: Channels H; None for a single one without its axis.
        generator: Draws the values of `"random"`, the only one that is drawn.

    Shape:
        - A, B: `(H, N/2)`, or `(N/2,)` without `d_model`

    Returns:
        A and B in complex128, on the CPU.

    Raises:
        ValueError: An odd or too small `d_state`, a `d_model` below 1, or an unknown `init`.

    Source:
        Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state
        space models", 2022, section 4.

    Example:
        >>> A, B = s4d_init(8, "lin")
        >>> (A.imag / torch.pi).tolist(), A.real.unique().tolist()
        ([0.0, 1.0, 2.0, 3.0], [-0.5])
    """
    check_d_state(d_state)
    if init not in INITS:
        raise ValueError(f"init: expected one of {INITS}, got {init!r}")
    if d_model is not None and d_model < 1:
        raise ValueError(f"d_model: expected a number of at least 1, got {d_model!r}")
    shape = (d_state // 2,) if d_model is None else (d_model, d_state // 2)
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    half = torch.full_like(n, 0.5)
    B = torch.ones_like(n, dtype=torch.complex128)
    if init == "lin":
        A = torch.complex(-half, math.pi * n)
    elif init == "inv":
        A = torch.complex(-half, d_state / math.pi * (d_state / (2 * n + 1) - 1))
    elif init == "legs":
        A, V = legs_normal_part(d_state)
        B = V.mH @ legs_input(d_state).to(V) / 2
    elif init == "real":
        A = torch.complex(-(n + 1), torch.zeros_like(n))
    else:
        parts = torch.randn(2, *shape, dtype=n.dtype, device="cpu", generator=generator)
        A = torch.complex(-parts[0].exp(), parts[1])
    return A.expand(shape).clone(), B.expand(shape).clone()


def legs_input(d_state: int) -> Tensor:
    """B of HiPPO-LegS, `sqrt(2n+1)`, in float64 on the CPU."""
    return (2 * torch.arange(d_state, dtype=torch.float64, device="cpu") + 1).sqrt()


def legs_normal_part(d_state: int) -> tuple[Tensor, Tensor]:
    """Diagonalise the normal part of HiPPO-LegS, `A_legs + P P^T` with `P_n = sqrt(n + 1/2)`.

    It is -1/2 plus a skew-symmetric matrix S, so -iS is Hermitian and its eigenvectors are exactly
    orthonormal, which those of A_legs itself are far from.

    Args:
        d_state: State size N, even.

    Shape:
        - eigenvalues: `(N/2,)`
        - V: `(N, N/2)`

    Returns:
        The eigenvalues with positive imaginary part, rising, and their eigenvectors, each with
        the phase that makes its entry of `V^* B_legs` real and positive; in complex128 on the CPU.

    Example:
        >>> eigenvalues, V = legs_normal_part(4)
        >>> eigenvalues.real.tolist(), V.shape
        ([-0.5, -0.5], torch.Size([4, 2]))
    """
    check_d_state(d_state)
    b = legs_input(d_state)
    outer = torch.outer(b, b) / 2
    skew = outer.triu(1) - outer.tril(-1)
    frequencies, V = torch.linalg.eigh(-1j * skew)  # in rising order, negative ones first
    frequencies, V = frequencies[d_state // 2 :], V[:, d_state // 2 :]
    along = V.mH @ b.to(V)
    V = V * (along / along.abs())  # V c has V^* B multiplied by conj(c)
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies), V


def check_d_state(d_state: int) -> None:
    """Raise a ValueError unless the state is a positive number of conjugate pairs."""
    if d_state < 2 or d_state % 2:
        kind = "an even number" if d_state % 2 else "an even number of at least 2"
        raise ValueError(f"d_state must be even: got {d_state}, expected {kind}")
