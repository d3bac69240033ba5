"""How many neurons of a feed-forward layer can be dropped while its output hardly changes.

Luo et al., "Sparsing law: towards large language models with greater activation sparsity", 2024.
Neuron i adds h_i w_i to a token's output y, with w_i a column of the down-projection. Dropping
those of importance m_i = abs(h_i) ‖w_i‖ up to τ leaves the cumulative error of tail truncation

    CETT(τ) = mean over tokens of ‖Σ_{m_i ≤ τ} h_i w_i‖ / ‖y‖.

A layer's threshold for a target c is the largest τ of a grid with CETT(τ) ≤ c; neuron i is kept
where abs(h_i) > τ / ‖w_i‖.

Deviations: a layer whose least candidate already exceeds the target gets τ = 0, not the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 2**24  # numbers that one step of the curve may hold


def cett(h: Tensor, w_down: Tensor, mask_keep: Tensor) -> Tensor:
    """The relative error of each token's output when only some neurons are kept.

    Args:
        h: What the neurons give.
        w_down: Weight of the down-projection.
        mask_keep: Which neurons are kept.

    Shape:
        - h: `(N, f)`
        - w_down: `(d, f)`
        - mask_keep: `(N, f)`, bool
        - output: `(N,)`; NaN where the whole output is 0

    Raises:
        ValueError: Shapes that don't fit together.

    Source:
        Luo et al., "Sparsing law: towards large language models with greater activation sparsity",
        2024.

    Example:
        >>> keep = torch.tensor([[True, False]])
        >>> cett(torch.tensor([[4.0, 3.0]]), torch.eye(2), keep)
        tensor([0.6000])
    """
    _check(h, w_down)
    if mask_keep.shape != h.shape or mask_keep.dtype != torch.bool:
        raise ValueError(
            f"mask_keep: expected bool of shape {tuple(h.shape)}, "
            f"got {mask_keep.dtype} {tuple(mask_keep.shape)}"
        )
    dropped = torch.where(mask_keep, 0.0, h) @ w_down.mT
    whole = (h @ w_down.mT).norm(dim=-1)
    return torch.where(whole > 0, dropped.norm(dim=-1) / whole, torch.nan)


def importance(h: Tensor, w_down: Tensor) -> Tensor:
    """How much each neuron `(N, f)` adds to a token's output: abs(h_i) ‖w_i‖."""
    return h.abs() * w_down.norm(dim=0)


@torch.no_grad()
def cett_curve(
    h: Tensor, w_down: Tensor, taus: Tensor, *, token_mask: Tensor | None = None
) -> Tensor:
    """Mean CETT over tokens for many thresholds, in one pass over the tokens.

    The neurons of a token are added up in the order of their importance, so every threshold is
    read off the same running sum: the cost is N f d, however many thresholds there are. Tokens
    whose output is 0 are left out.

    Args:
        h: What the neurons give.
        w_down: Weight of the down-projection.
        taus: Thresholds on the importance.
        token_mask: Which tokens count; None: all.

    Shape:
        - h: `(N, f)`
        - w_down: `(d, f)`
        - taus: `(T,)`
        - token_mask: `(N,)`, bool
        - output: `(T,)`, float64

    Raises:
        ValueError: Shapes that don't fit together, or no token whose output is not 0.

    Source:
        Luo et al., "Sparsing law: towards large language models with greater activation sparsity",
        2024.

    Example:
        >>> cett_curve(torch.tensor([[4.0, 3.0]]), torch.eye(2), torch.tensor([0.0, 3.0, 9.0]))
        tensor([0.0000, 0.6000, 1.0000], dtype=torch.float64)
    """
    _check(h, w_down)
    h, w_down = _wide(h, w_down, token_mask)
    columns, total, count = w_down.mT, h.new_zeros(len(taus), dtype=torch.float64), 0
    for part in h.split(max(1, _CHUNK // max(w_down.numel(), len(taus)))):
        m, order = importance(part, w_down).sort(-1)
        sums = (part.gather(-1, order)[..., None] * columns[order]).cumsum(-2)
        tail = torch.nn.functional.pad(sums.norm(dim=-1), (1, 0))  # of the 0, 1, … least
        alive = tail[:, -1] > 0
        wanted = taus.to(m).repeat(int(alive.sum()), 1)
        steps = torch.searchsorted(m[alive], wanted, right=True)
        error = (tail / tail[:, -1:])[alive].gather(-1, steps)
        total += error.double().sum(0)
        count += len(error)
    if not count:
        raise ValueError("h: expected a token whose output is not 0")
    return total / count


def cett_thresholds(
    h: Tensor,
    w_down: Tensor,
    target: float,
    *,
    num_candidates: int = 65536,
    token_mask: Tensor | None = None,
) -> float:
    """The largest threshold on the importance at which mean CETT is at most a target.

    Candidates are spread evenly from the least importance to its quantile 0.99.

    Args:
        h: What the neurons give.
        w_down: Weight of the down-projection.
        target: The CETT allowed, in [0, 1).
        num_candidates: How many candidates there are.
        token_mask: Which tokens count; None: all.

    Shape:
        - h: `(N, f)`
        - w_down: `(d, f)`
        - token_mask: `(N,)`, bool

    Returns:
        τ; 0 where even the least candidate exceeds the target. Neuron i is to be kept where
        abs(h_i) > τ / ‖w_i‖.

    Raises:
        ValueError: Shapes that don't fit together, or a target outside [0, 1).

    Source:
        Luo et al., "Sparsing law: towards large language models with greater activation sparsity",
        2024.

    Example:
        >>> h = torch.tensor([[0.0, 3.0, 4.0]])
        >>> tau = cett_thresholds(h, torch.eye(3), 0.7)
        >>> 3.0 <= tau < 4.0
        True
    """
    return Curve(h, w_down, num_candidates, token_mask).threshold(target)


class Curve:
    """CETT of one layer on its grid of candidates."""

    def __init__(
        self, h: Tensor, w_down: Tensor, num_candidates: int, token_mask: Tensor | None = None
    ):
        _check(h, w_down)
        if num_candidates < 2:
            raise ValueError(f"num_candidates: expected at least 2, got {num_candidates}")
        h, w_down = _wide(h, w_down, token_mask)
        m = importance(h, w_down).flatten()
        top = m.kthvalue(int(0.99 * (m.numel() - 1)) + 1).values
        steps = torch.linspace(0, 1, num_candidates, device=m.device, dtype=m.dtype)
        self.taus = m.min() + steps * (top - m.min())
        self.error = cett_curve(h, w_down, self.taus)

    def threshold(self, target: float) -> float:
        if not 0 <= target < 1:
            raise ValueError(f"target: expected a number in [0, 1), got {target}")
        allowed = (self.error <= target).nonzero()
        return self.taus[int(allowed[-1])].item() if len(allowed) else 0.0


def _check(h: Tensor, w_down: Tensor) -> None:
    if h.ndim != 2 or w_down.ndim != 2 or h.shape[1] != w_down.shape[1]:
        raise ValueError(
            "h, w_down: expected shapes (N, f) and (d, f), "
            f"got {tuple(h.shape)} and {tuple(w_down.shape)}"
        )


def _wide(h: Tensor, w_down: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens that count, in float32 at least."""
    if token_mask is not None and token_mask.shape != h.shape[:1]:
        raise ValueError(
            f"token_mask: expected shape {tuple(h.shape[:1])}, got {tuple(token_mask.shape)}"
        )
    dtype = torch.promote_types(h.dtype, torch.float32)
    return (h if token_mask is None else h[token_mask]).to(dtype), w_down.to(dtype)
