"""The Importance Factor: which features, layers or moments a gate lets through, from 0 to 1.

G. Ioannides, A. Chadha, A. Elkins, Gaussian Adaptive Attention is All You Need, 2024. With GA the
weights averaged over a validation set, IF = (GA - min GA) / (max GA - min GA).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.attention.gaussian_adaptive import check_mask


def importance_factor(
    weights: Tensor, dim: int | tuple[int, ...] | None = None, eps: float = 1e-12
) -> Tensor:
    """Scale averaged attention weights to [0, 1].

    Args:
        weights: Weights, averaged over a data set (see `ImportanceTracker`).
        dim: Axes over which minimum and maximum are taken; None for the whole map.
        eps: Smallest range that is divided by.

    Shape:
        - weights: any; output: the same

    Returns:
        The factor: 0 at the minimum, 1 at the maximum, and 0 everywhere for constant weights.

    Raises:
        ValueError: `weights` is empty.

    Source:
        Ioannides, Chadha, Elkins, Gaussian Adaptive Attention is All You Need, 2024, the equation
        of the Importance Factor.

    Example:
        >>> importance_factor(torch.tensor([0.25, 0.5, 0.75]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    if not weights.numel():
        raise ValueError(f"weights: expected at least one, got shape {tuple(weights.shape)}")
    axes = tuple(range(weights.ndim)) if dim is None else dim
    low = weights.amin(axes, keepdim=True)
    high = weights.amax(axes, keepdim=True)
    return (weights - low) / (high - low).clamp_min(eps)


class ImportanceTracker:
    """Average attention weights over batches and give their Importance Factor.

    Shape:
        - weights: `(..., n, D)`, with the same n and D at every update
        - mask: `(..., n)`, bool, True = counts; importance: `(n, D)`

    Raises:
        ValueError: Weights or mask of another shape; the importance of nothing.

    Source:
        Ioannides, Chadha, Elkins, Gaussian Adaptive Attention is All You Need, 2024.

    Example:
        >>> from torchzoo.attention import GaussianAdaptiveAttention
        >>> attention, tracker = GaussianAdaptiveAttention(4), ImportanceTracker()
        >>> for batch in torch.randn(3, 8, 12, 4):
        ...     _, weights = attention(batch, return_weights=True)
        ...     tracker.update(weights)
        >>> tracker.compute().shape
        torch.Size([12, 4])
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._total: Tensor | None = None
        self._count = torch.tensor(0)

    @torch.no_grad()
    def update(self, weights: Tensor, mask: Tensor | None = None) -> None:
        """Add the weights of a batch; `mask` says which of them count."""
        if weights.ndim < 2 or (
            self._total is not None and weights.shape[-2:] != self._total.shape
        ):
            known = "..., n, D" if self._total is None else f"..., {tuple(self._total.shape)}"
            raise ValueError(f"weights: expected shape ({known}), got {tuple(weights.shape)}")
        check_mask(mask, weights)
        kept = torch.ones(weights.shape[:-1], dtype=torch.bool, device=weights.device)
        kept = (kept if mask is None else mask).unsqueeze(-1)
        maps = weights.double().where(kept, 0).reshape(-1, *weights.shape[-2:])
        self._total = maps.sum(0) + (0 if self._total is None else self._total)
        self._count = kept.reshape(-1, *kept.shape[-2:]).sum(0) + self._count

    @property
    def mean(self) -> Tensor:
        """The weights averaged over everything that counted, in float64; 0 where nothing did."""
        if self._total is None:
            raise ValueError("weights: expected at least one update before, got none")
        return self._total / self._count.clamp_min(1)

    def compute(self) -> Tensor:
        """The Importance Factor of the averaged weights."""
        return importance_factor(self.mean)
