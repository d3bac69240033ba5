"""The head that predicts which filters of a convolution fire for an image.

S. Elkerdawy, M. Elhoushi, H. Zhang and N. Ray, "Fire Together Wire Together: A Dynamic Pruning
Approach with Self-Supervised Mask Prediction", 2022: g = linear(pool(x)), a logit for each filter.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register


@register(
    paper=43,
    example=lambda: Example(
        {"in_channels": 3, "out_channels": 4, "pool_target": 12, "softmax": True},
        (torch.randn(2, 3, 5, 4),),
        bad_options={"in_channels": 0, "out_channels": 0, "pool_target": 0},
    ),
    exempt={"fixed-rank": "images are (B, C, H, W)"},
    compare="a part of FTWTConv2d, which has peers",
)
class MaskPredictor(ZooModel):
    """The head: average pooling and one linear layer, a logit for each filter.

    Args:
        in_channels: Channels of the images.
        out_channels: Filters.
        pool_target: Features to pool to, about: the images become squares of side
            round(sqrt(pool_target / in_channels)), at least 1. -1: one feature a channel.
        softmax: Softmax over the pooled features.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - x: `(B, in_channels, H, W)`
        - output: `(B, out_channels)`

    Returns:
        Logits; a filter is computed where its logit is above 0.

    Raises:
        ValueError: An option out of its range, or an input of another shape.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022, the mask prediction head.

    Example:
        >>> MaskPredictor(3, 8)(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        pool_target: int = -1,
        softmax: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if pool_target < 1 and pool_target != -1:
            raise ValueError(f"pool_target: expected at least 1, or -1, got {pool_target}")
        self.in_channels = in_channels
        self.softmax = softmax
        self.side = 1 if pool_target == -1 else max(1, round(math.sqrt(pool_target / in_channels)))
        features = in_channels * self.side**2
        self.linear = nn.Linear(features, out_channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Uniform in ±1/√features, as `nn.Linear` starts."""
        self.linear.reset_parameters()

    @property
    def macs(self) -> int:
        """Multiplications for an image, without those of the pooling."""
        return self.linear.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_channels)
        pooled = F.adaptive_avg_pool2d(x, self.side).flatten(1)
        return self.linear(pooled.softmax(-1) if self.softmax else pooled)

    def extra_repr(self) -> str:
        return f"side={self.side}, softmax={self.softmax}"


def check_images(x: Tensor, channels: int) -> None:
    """Raise a ValueError unless x is images of so many channels."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: expected (B, {channels}, H, W), got {tuple(x.shape)}")
