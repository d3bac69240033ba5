"""SDM activation: a softmax that is sharp only near training points that were got right.

Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025. For logits z (magnitude),
a count q >= 0 (similarity) and a quantile d in [0, 1] (distance)

    SDM(z)_i = (2 + q)^(d z_i) / sum_c (2 + q)^(d z_c) = softmax(d ln(2 + q) z)_i
    loss     = -log_(2+q) SDM(z)_y

q = e - 2 and d = 1 give the ordinary softmax, d = 0 the uniform distribution. With h(x) the
exemplar, on which the logits are linear, and neighbours by distance in h among the training points

    q(x) = length of the run, from the nearest on, of neighbours whose label and whose own
           prediction are both argmax z(x)
    d(x) = min_c (1 - F_c(distance to the nearest)),

F_c the empirical distribution of that distance over points of class c with q > 0: those of the
training set while training, those of a calibration set afterwards.

Deviations from the paper: none in the formulas; distances are not squared, which changes no q or d,
and logarithms need no small constant.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from torchzoo.ops import scaled_softmax

SOFTMAX_Q = math.e - 2
"""The similarity that, with a distance quantile of 1, gives the ordinary softmax."""


def sdm_softmax(
    z: Tensor, q: Tensor, d: Tensor, *, log: bool = False, base: Literal["q", "e"] = "q"
) -> Tensor:
    """The SDM activation of logits.

    Args:
        z: Logits, `(..., C)`.
        q: Similarities, at least 0, `(...)`.
        d: Distance quantiles in [0, 1], `(...)`, or one for each class, `(..., C)`.
        log: Whether to return logarithms.
        base: Base of those logarithms: 2 + q or e.

    Shape:
        - z: `(..., C)`
        - q: `(...)`
        - d: `(...)` or `(..., C)`
        - output: `(..., C)`

    Returns:
        Probabilities or their logarithms, in the dtype of `z`.

    Raises:
        ValueError: Shapes that don't fit, a negative `q`, a `d` outside [0, 1], or another base.
            Values are not looked at while compiling.

    Source:
        Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025, the SDM activation.

    Example:
        >>> z = torch.tensor([1.0, 0.0])
        >>> [round(v, 3) for v in sdm_softmax(z, torch.tensor(7.0), torch.tensor(1.0)).tolist()]
        [0.9, 0.1]
    """
    if base not in ("q", "e"):
        raise ValueError(f"base: expected 'q' or 'e', got {base!r}")
    scale = _log_base(z, q, d)
    if not log and d.ndim < z.ndim:
        return scaled_softmax(z, d.to(scale.dtype) * scale.squeeze(-1))
    d = d if d.ndim == z.ndim else d.unsqueeze(-1)
    scaled = z * (d.to(scale.dtype) * scale)
    if not log:
        return scaled.softmax(-1).to(z.dtype)
    logs = scaled.log_softmax(-1)
    return (logs / scale if base == "q" else logs).to(z.dtype)


def sdm_loss(z: Tensor, target: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Mean negative logarithm, to the base 2 + q, of the target's SDM probability.

    Its gradient to the logits of a row is `d (SDM - onehot)`: the base cancels.

    Args:
        z: Logits, `(..., C)`.
        target: Classes, int64, `(...)`.
        q: Similarities, at least 0, `(...)`.
        d: Distance quantiles in [0, 1], `(...)` or `(..., C)`.

    Shape:
        - z: `(..., C)`
        - target, q: `(...)`
        - output: `()`

    Raises:
        ValueError: As for `sdm_softmax`, or a target of another shape than `q`.

    Source:
        Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025, the training loss.

    Example:
        >>> q, d = torch.tensor([2.0]), torch.tensor([0.0])
        >>> sdm_loss(torch.tensor([[5.0, 1.0]]), torch.tensor([1]), q, d).item()  # log_4(2)
        0.5
    """
    if target.shape != q.shape:
        raise ValueError(f"target: expected shape {tuple(q.shape)}, got {tuple(target.shape)}")
    logs = sdm_softmax(z, q, d, log=True)
    return -logs.gather(-1, target.unsqueeze(-1)).mean()


def _log_base(z: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """`ln(2 + q)`, `(..., 1)`, after checking the arguments."""
    if z.ndim == 0 or q.shape != z.shape[:-1]:
        raise ValueError(
            f"q: expected the shape of z without its last axis, got {tuple(q.shape)} "
            f"for z {tuple(z.shape)}"
        )
    if d.shape not in (q.shape, z.shape):
        raise ValueError(f"d: expected the shape of q or z, got {tuple(d.shape)}")
    if not torch.compiler.is_compiling() and not z.is_meta:
        if (q < 0).any():
            raise ValueError(f"q: expected values of at least 0, got {q.min().item()}")
        if not ((d >= 0) & (d <= 1)).all():
            raise ValueError(f"d: expected values in [0, 1], got {d.min()} to {d.max()}")
    return torch.log(2 + q.to(torch.promote_types(z.dtype, torch.float32))).unsqueeze(-1)
