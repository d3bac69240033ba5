"""Transfer functions of state spaces, and how far two of them are apart.

In the steady state an input exp(s t) comes out of x' = A x + B u, y = C x multiplied by

    G(s) = C (s - A)^-1 B.

On the imaginary axis that is the response to each frequency. A. Yu, A. Nigmetov, D. Morozov,
M. W. Mahoney and N. B. Erichson, Robustifying State-space Models for Long Sequences via
Approximate Diagonalization, 2023, compare initialisations by the largest gap on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.ssm.dplr import DPLRKernel
from torchzoo.ssm.layer import SSMLayer
from torchzoo.ssm.s4d import S4DKernel

System = tuple[Tensor, Tensor, Tensor]

_AT_ONCE = 64  # dense matrices that are solved with at one time


class TransferGap(NamedTuple):
    """How far two transfer functions are apart on the imaginary axis.

    Attributes:
        max_gap: The largest distance.
        argmax: Index of the frequency where it is.
        curve: The distance at each frequency, `(F,)`.
    """

    max_gap: float
    argmax: int
    curve: Tensor


def transfer_function(ssm: System | SSMLayer, s: Tensor, *, channel: int = 0) -> Tensor:
    """The transfer function `C (s - A)^-1 B` of a continuous-time system.

    Args:
        ssm: A triple (A, B, C), A dense or the diagonal of all eigenvalues; or a layer with
            diagonal or normal-plus-low-rank systems, such as `S4D` and `S4`, in its own
            continuous time: frequency w is w dt radians a step. What passes by the system through
            D is left out.
        s: Points of the complex plane.
        channel: Which feature of a layer; of its kernel's channels it is the first.

    Shape:
        - A: `(n, n)` or `(n,)`; B, C: `(n,)`
        - s: `(...)`
        - output: `(...)`

    Returns:
        G(s) in complex128.

    Raises:
        ValueError: Shapes that don't fit, a layer of another kind, or a channel that it lacks.

    Source:
        Yu, Nigmetov, Morozov, Mahoney and Erichson, Robustifying State-space Models for Long
        Sequences via Approximate Diagonalization, 2023, section 2.

    Example:
        >>> one = torch.ones(1)
        >>> transfer_function((-one, one, one), torch.tensor([0j, 1j]))
        tensor([1.0000+0.0000j, 0.5000-0.5000j], dtype=torch.complex128)
    """
    A, B, C = _layer_system(ssm, channel) if isinstance(ssm, SSMLayer) else ssm
    n = A.shape[-1] if A.ndim else 0
    if A.shape not in ((n,), (n, n)) or B.shape != (n,) or C.shape != (n,):
        raise ValueError(
            "ssm: expected A of shape (n,) or (n, n) and B, C of shape (n,), got "
            f"{tuple(A.shape)}, {tuple(B.shape)} and {tuple(C.shape)}"
        )
    A, B, C, points = (t.to(A.device, torch.complex128) for t in (A, B, C, s.flatten()))
    if A.ndim == 1:
        return (C * B / (points[:, None] - A)).sum(-1).reshape(s.shape)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    parts = [
        torch.linalg.solve(part[:, None, None] * eye - A, B) @ C for part in points.split(_AT_ONCE)
    ]
    return torch.cat(parts).reshape(s.shape)


def _layer_system(layer: SSMLayer, channel: int) -> System:
    """The system of one feature of a layer, real in effect: conjugates, or real and imaginary."""
    kernel = layer.kernel
    if not 0 <= channel < layer.d_model:
        raise ValueError(f"channel: expected 0 to {layer.d_model - 1}, got {channel}")
    if isinstance(kernel, S4DKernel):
        A, B, C, _ = kernel.continuous()
        halves = A[channel], B[channel], C[0, channel]
        return tuple(torch.cat([half, half.conj()]) for half in halves)  # type: ignore[return-value]
    if isinstance(kernel, DPLRKernel):
        poles, P, B, C, _ = kernel.system()
        poles, P, B, C = poles[channel], P[:, channel], B[channel], C[0, channel]
        # with P P^* of the pairs and their conjugates: rank one for each row of (P, P^*)
        low = torch.cat([P, P.conj()], -1)
        A = torch.diag(torch.cat([poles, poles.conj()])) - low.mT @ low.conj()
        return A, torch.cat([B, B.conj()]), torch.cat([C, C.conj()])
    raise ValueError(f"ssm: expected a layer like S4D or S4, got {type(layer).__name__}")


def transfer_gap(
    ssm_a: System | SSMLayer, ssm_b: System | SSMLayer, freqs: Tensor, *, channel: int = 0
) -> TransferGap:
    """The distance of two transfer functions on the imaginary axis.

    Args:
        ssm_a: A system, see `transfer_function`.
        ssm_b: Another one.
        freqs: Frequencies w, in radians a unit of time; the transfer functions are taken at iw.
        channel: Which feature of layers.

    Shape:
        - freqs: `(F,)`

    Returns:
        The `TransferGap`.

    Raises:
        ValueError: No frequencies, or as `transfer_function`.

    Source:
        Yu, Nigmetov, Morozov, Mahoney and Erichson, Robustifying State-space Models for Long
        Sequences via Approximate Diagonalization, 2023, theorems 2 and 3.

    Example:
        >>> one = torch.ones(1)
        >>> gap = transfer_gap((-one, one, one), (-2 * one, one, one), torch.tensor([0.0, 1.0]))
        >>> gap.max_gap, gap.argmax
        (0.5, 0)
    """
    if freqs.ndim != 1 or not len(freqs) or freqs.is_complex():
        raise ValueError(f"freqs: expected real (F,) with F >= 1, got {tuple(freqs.shape)}")
    axis = 1j * freqs.to(torch.complex128)
    curve = (
        transfer_function(ssm_a, axis, channel=channel)
        - transfer_function(ssm_b, axis, channel=channel)
    ).abs()
    worst = int(curve.argmax())
    return TransferGap(curve[worst].item(), worst, curve)
