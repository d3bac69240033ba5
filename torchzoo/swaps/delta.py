"""Delta forms of linear layers and convolutions: a stream computes only what changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchzoo.sparsity import DeltaConv2d, DeltaLinear
from torchzoo.surgery import Init, Match, Swapped, swap


class FrameDeltaConv2d(DeltaConv2d):
    """A `DeltaConv2d` with channels first, in the place of an `nn.Conv2d`.

    Args:
        *args: As for `DeltaConv2d`.
        **options: As there.

    Shape:
        x: (..., C, H, W) → (..., O, H', W'). With a threshold or quantum (B, T, C, H, W) with T
        frames, or (T, C, H, W), one film.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> import torch
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> x = torch.randn(5, 3, 8, 8)
        >>> torch.testing.assert_close(FrameDeltaConv2d.from_module(conv)(x), conv(x))
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        film = x.ndim == 4 and bool(self.threshold or self.quantum)
        last = (x.unsqueeze(0) if film else x).movedim(-3, -1)
        y = super().forward(last).movedim(-1, -3)
        return y.squeeze(0) if film else y


def swap_delta(
    model: nn.Module,
    match: Match = (nn.Linear, nn.Conv2d),
    *,
    init: Init = "match",
    inputs: Any = None,
    **options: Any,
) -> Swapped:
    """Give linear layers and convolutions their delta forms, in place, on the same weights.

    Args:
        model: The model to change.
        match: As for `torchzoo.surgery.find`; linear layers and convolutions only.
        init: As for `torchzoo.surgery.swap`.
        inputs: As there.
        **options: Options of `DeltaLinear` and `DeltaConv2d`: `threshold` (0, the default, leaves
            what the model computes as it is), `quantum`, `resync_every`.

    Returns:
        What changed.

    Raises:
        UnknownNameError: Nothing is selected.
        ValueError: A module of another class, or a grouped convolution.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
        >>> [change.new for change in swap_delta(model).changes]
        ['FrameDeltaConv2d', 'DeltaLinear']
    """

    def delta(old: nn.Module) -> nn.Module:
        if isinstance(old, nn.Conv2d):
            return FrameDeltaConv2d.from_module(old, **options)
        if isinstance(old, nn.Linear):
            return DeltaLinear.from_module(old, **options)
        raise ValueError(f"match: expected Linear and Conv2d layers, got {type(old).__name__}")

    return swap(model, match, delta, init=init, inputs=inputs)
