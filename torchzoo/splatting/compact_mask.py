"""Masks that learn which splats a scene can do without."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register

__all__ = ["LearnableGaussianMask", "hard_mask"]


def hard_mask(logits: Tensor, threshold: float = 0.01) -> Tensor:
    """1 where `sigmoid(m) > threshold`, else 0, with the gradient of the sigmoid.

    Args:
        logits: m, of any shape.
        threshold: eps, between 0 and 1.

    Example:
        >>> hard_mask(torch.tensor([1.0, -4.5, -4.7]))
        tensor([1., 1., 0.])
    """
    soft = logits.sigmoid()
    return (soft > threshold).to(soft.dtype) + (soft - soft.detach())


@register(
    paper=26,
    # open so wide that finite differences can't see a straight-through gradient
    example=lambda: Example({"n": 5, "init": 40.0}, (), 0, {"n": -1, "threshold": 1.5}),
    compare="a part of Compact3DGS, which has a peer",
)
class LearnableGaussianMask(ZooModel):
    """One logit for each splat, which keeps it or takes it out, and learns from what that changes.

    Multiply scales and opacities by it, and add a multiple of `loss()` to the training loss.

    Args:
        n: Number N of splats.
        threshold: Masks whose sigmoid is not above this are 0.
        init: Logit that all begin with.
        device: Device of the logits.
        dtype: Type of the logits.

    Shape:
        - output: `(N,)`

    Returns:
        Zeros and ones, with the gradient of the sigmoid.

    Raises:
        ValueError: `n` is negative, or `threshold` not between 0 and 1.

    Source:
        Lee et al., "Compact 3D Gaussian Representation for Radiance Field", 2024, equations 2 to 4.

    Example:
        >>> mask = LearnableGaussianMask(4)
        >>> mask(), mask.loss().item()
        (tensor([1., 1., 1., 1.], grad_fn=<AddBackward0>), 0.731...)
    """

    def __init__(
        self,
        n: int,
        *,
        threshold: float = 0.01,
        init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n < 0:
            raise ValueError(f"n: got {n}, expected at least 0")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: got {threshold}, expected between 0 and 1")
        self.threshold, self.init = threshold, init
        self.logits = nn.Parameter(torch.empty(n, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All logits at `init`."""
        nn.init.constant_(self.logits, self.init)

    def forward(self) -> Tensor:
        """The mask `(N,)`."""
        return hard_mask(self.logits, self.threshold)

    def loss(self) -> Tensor:
        """Mean of the sigmoids, 0 without splats."""
        return self.logits.sigmoid().sum() / max(len(self.logits), 1)

    def keep(self) -> Tensor:
        """Which splats stay, `(N,)` bool."""
        return self.logits.detach().sigmoid() > self.threshold

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{len(self.logits)}, threshold={self.threshold}, init={self.init}"
